"""What a guest's process inherits and may have, what it uses, how it ended, what it started."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from socket import socket
from subprocess import DEVNULL, PIPE, STDOUT, Popen

from casparian_flow.config import GuestSettings
from casparian_flow.errors import GuestDied, GuestKilled, JobError, OutOfMemory
from casparian_flow.protocol import Artifact, Evidence
from casparian_flow.security.sandbox import THREADS, Confinement, InPlace

ENDING_SECONDS = 0.2
"""Between the end of a process's wire and its own end, if it is ending."""

_FROM_ELSEWHERE = {
    -number
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
}
"""Exit codes of a process that somebody ended: no fault of its own raises these signals."""


def environment(allowed: Confinement) -> dict[str, str]:
    """All that a guest inherits of ours: no variable of the host's, so no secret in one."""
    return {
        "LANG": "C.UTF-8",
        "HOME": allowed.home,
        "TMPDIR": allowed.scratch,
        "PATH": os.defpath,
        # One job, one core: workers run side by side, and each thread reserves address space.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        # What polars would read in /proc: taken for none, it spills to a disk that is not there.
        "POLARS_OVERRIDE_TOTAL_MEMORY_MB": str(allowed.memory_bytes >> 20),
        "POLARS_TEMP_DIR": allowed.scratch,
    }


def confinement(
    artifact: Artifact,
    limits: GuestSettings,
    folder: Path,
    read: list[str],
    in_place: InPlace | None,
) -> Confinement:
    """What a guest may have: what the plugin asks for, and no more than the limits."""
    return Confinement(
        mode=limits.sandbox,
        home=os.path.realpath(folder),
        read=read,
        in_place=in_place,
        memory_bytes=min(artifact.memory_bytes or limits.memory_bytes, limits.memory_bytes),
        scratch_bytes=min(artifact.scratch_bytes, limits.scratch_bytes),
        network=artifact.network and limits.network,
    )


def spawn(
    python: Path, script: Path, wire: socket, site_packages: Path, allowed: Confinement
) -> Popen[bytes]:
    """Start a guest with one end of the wire, a clean environment, and nothing else of ours.

    Raises:
        OSError: it cannot be started.
    """
    said = json.dumps(dataclasses.asdict(allowed))
    return Popen(
        [python, "-I", "-S", script, str(wire.fileno()), site_packages, said],
        cwd=allowed.home,
        env=environment(allowed),
        pass_fds=[wire.fileno()],
        start_new_session=True,
        bufsize=0,
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=STDOUT,
    )


class Meter:
    """Processor time and memory of another process, all its threads.

    Args:
        process: a child nobody has waited for yet.
    """

    def __init__(self, process: Popen[bytes]) -> None:
        self._process = process
        # CPUCLOCK_SCHED of a process, as clock_getcpuclockid(3) makes it on Linux.
        self._clock = (~process.pid << 3) | 2
        self._began = 0.0
        self._most = math.inf
        self._usage: resource.struct_rusage | None = None
        self._oom_kills = oom_kills()

    def start(self, limit_seconds: float) -> None:
        """Count from here; it may use so much."""
        self._began = self._used()
        self._most = self._began + limit_seconds

    def charge(self, seconds: float) -> None:
        """Count work that somebody else did for it as its own."""
        self._most -= seconds

    def left(self) -> float:
        """Seconds of wall clock before which it cannot have used it up, on all cores at once."""
        return (self._most - self._used()) / (os.cpu_count() or 1)

    def has_ended(self) -> bool:
        """Whether the process has ended, or ends by itself within a moment."""
        deadline = time.monotonic() + ENDING_SECONDS
        while self._process.returncode is None and sys.platform == "linux":
            try:
                if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    break
            except ChildProcessError:
                break
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def reap(self) -> None:
        """Wait for the process and take its last word on what it used."""
        try:
            _, status, self._usage = os.wait4(self._process.pid, 0)
        except ChildProcessError:  # somebody else in this process has waited for it
            self._process.wait()
        else:
            self._process.returncode = os.waitstatus_to_exitcode(status)

    def cause(self, who: str, by_itself: bool) -> JobError:
        """Why a process that was reaped ended, though it had not been asked to.

        Args:
            who: whose guest it was.
            by_itself: it had ended before we killed it.
        """
        code = self._process.returncode
        words = exit_words(code) if by_itself else "closed the wire, and we killed it"
        hint = "see the job's log for what the plugin printed"
        if not by_itself or code not in _FROM_ELSEWHERE:
            return GuestDied(f"the guest of {who} {words}", hint)
        if code != -signal.SIGKILL:
            return GuestKilled(f"the guest of {who} {words}", hint)
        if oom_kills() == self._oom_kills:
            return GuestKilled(f"the guest of {who} {words}, and not by us", hint)
        what = f"the machine had no memory left, and it held {self._rss() >> 20} MiB"
        return OutOfMemory(f"the guest of {who} {words}: {what}", "give the plugin smaller files")

    def evidence(self, batches: int, rows: int) -> Evidence:
        """What is known of the process, for the attempt that began at `start`."""
        code = self._process.returncode
        return Evidence(
            signal=signal_name(-code) if code is not None and code < 0 else "",
            exit_code=code if code is not None and code >= 0 else None,
            batches=batches,
            rows=rows,
            max_rss_bytes=self._rss(),
            cpu_seconds=max(0.0, self._used() - self._began),
        )

    def _used(self) -> float:
        if self._usage:
            return self._usage.ru_utime + self._usage.ru_stime
        if sys.platform != "linux":  # measured nowhere else; the wall clock bounds it
            return 0.0
        try:
            return time.clock_gettime(self._clock)
        except OSError:  # it has ended
            return 0.0

    def _rss(self) -> int:
        if self._usage:
            return self._usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return status_number(self._process.pid, b"VmHWM") << 10


def status_number(pid: int, key: bytes) -> int:
    """A number of a process's `/proc/<pid>/status`; 0 where it has none.

    A process chooses its name, which stands there before all else: of any bytes, but for a newline,
    which the kernel writes as `\\n`. So a key counts at the beginning of a line only.
    """
    return _number(f"/proc/{pid}/status", rb"^%s:[ \t]+([0-9]{1,15})\b" % re.escape(key))


def oom_kills() -> int:
    """How often the kernel has killed a process for want of memory since it was started."""
    return _number("/proc/vmstat", rb"^oom_kill ([0-9]{1,15})$")


def _number(file: str, pattern: bytes) -> int:
    try:
        found = re.search(pattern, Path(file).read_bytes(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def signal_name(number: int) -> str:
    """`SIGSEGV`, or `signal 40` where it has no name."""
    names = {int(each): each.name for each in signal.Signals}
    return names.get(number, f"signal {number}")


def exit_words(returncode: int) -> str:
    """How a process ended: `was killed by SIGSEGV`, `ended with exit status 0`."""
    if returncode >= 0:
        return f"ended with exit status {returncode}"
    return f"was killed by {signal_name(-returncode)}"


def kill_tree(pid: int) -> None:
    """Kill a process that leads its group, and all below it.

    Nobody has waited for it yet, so that its number, and its group's, is still its.
    """
    kill_below(pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def kill_below(pid: int) -> None:
    """Kill what a process has started. Once it has ended, nobody knows what that was."""
    for each in descendants(pid):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(each, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Every process below `pid`, the lowest first, as far as the kernel lists them (Linux)."""
    found = [pid]
    for each in found:  # it grows meanwhile
        for listing in Path(f"/proc/{each}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, listing.read_bytes().split())
    return found[:0:-1]


# Ends a guest that has started too many threads, whatever its host does meanwhile.
#
# A thread costs the kernel some 30 KiB that no limit of the guest's memory counts, and a process
# id, of which a machine has few. The kernel holds an ordinary user's guest to a number; root's it
# does not. So one thread of this process looks at all guests that run.


LOOK_SECONDS = 0.05
"""One that does nothing else starts some eight hundred in it, which is not yet too much to hold."""


class ThreadWatch:
    """Looks at processes that nobody has waited for yet, so that their numbers stay theirs."""

    def __init__(self) -> None:
        self._watched: dict[int, Callable[[], None]] = {}
        self._change = threading.Condition()
        self._started = False

    def watch(self, pid: int, on_kill: Callable[[], None]) -> None:
        """Kill this process when it has more than THREADS, until `forget`.

        Args:
            on_kill: called just before, in the watching thread.
        """
        with self._change:
            self._watched[pid] = on_kill
            if not self._started:
                threading.Thread(target=self._run, name="thread-watch", daemon=True).start()
                self._started = True
            self._change.notify()

    def forget(self, pid: int) -> None:
        """Look at it no more: it waits for its next job, or is about to be waited for."""
        with self._change:
            self._watched.pop(pid, None)

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._watched:
                    self._change.wait()
            time.sleep(LOOK_SECONDS)  # first: a short job is over before anybody looks
            with self._change:
                for pid in list(self._watched):
                    if status_number(pid, b"Threads") > THREADS:
                        self._watched.pop(pid)()
                        with contextlib.suppress(OSError):
                            os.kill(pid, signal.SIGKILL)


WATCH = ThreadWatch()
"""The one of this process."""
