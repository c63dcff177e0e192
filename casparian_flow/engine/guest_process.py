"""Start a guest's process, measure it, find out how it ended, and kill its descendants."""

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
"""Longest time between the end of a process's wire and its exit, if it exits by itself."""

_FROM_ELSEWHERE = {
    -number
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
}
"""Exit codes of a process killed from outside: no error of its own raises these signals."""


def environment(allowed: Confinement) -> dict[str, str]:
    """A guest's environment, with no variable of the host, since those may hold secrets."""
    return {
        "LANG": "C.UTF-8",
        "HOME": allowed.home,
        "TMPDIR": allowed.scratch,
        "PATH": os.defpath,
        # One core per job: Workers run in parallel, and each thread reserves address space.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        # polars reads this in /proc, which a guest lacks; with 0 it would spill to disk.
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
    """A guest's rights: what the plugin asks for, within the limits."""
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
    """Start a guest with a clean environment and no open descriptors but its end of the wire.

    Raises:
        OSError: it cannot be started.
    """
    rights = json.dumps(dataclasses.asdict(allowed))
    return Popen(
        [python, "-I", "-S", script, str(wire.fileno()), site_packages, rights],
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
    """Processor time and memory of another process, with all its threads.

    Args:
        process: a child that is not reaped yet.
    """

    def __init__(self, process: Popen[bytes]) -> None:
        self._process = process
        # The process's CPU clock, as clock_getcpuclockid(3) computes it on Linux.
        self._clock = (~process.pid << 3) | 2
        self._began = 0.0
        self._most = math.inf
        self._usage: resource.struct_rusage | None = None
        self._oom_kills = oom_kills()

    def start(self, limit_seconds: float) -> None:
        """Begin to count; the process may use `limit_seconds` from here."""
        self._began = self._used()
        self._most = self._began + limit_seconds

    def charge(self, seconds: float) -> None:
        """Add processor time that the host spent for the process."""
        self._most -= seconds

    def left(self) -> float:
        """Wall clock seconds until it could reach the limit, if it used all cores."""
        return (self._most - self._used()) / (os.cpu_count() or 1)

    def has_ended(self) -> bool:
        """Whether the process has exited, or does within ENDING_SECONDS."""
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
        """Wait for the process and read its total usage."""
        try:
            _, status, self._usage = os.wait4(self._process.pid, 0)
        except ChildProcessError:  # reaped elsewhere in this process
            self._process.wait()
        else:
            self._process.returncode = os.waitstatus_to_exitcode(status)

    def cause(self, who: str, by_itself: bool) -> JobError:
        """The error for a reaped process that ended unasked.

        Args:
            who: the plugin's name and version, for the message.
            by_itself: it had ended before the host killed it.
        """
        code = self._process.returncode
        ending = exit_words(code) if by_itself else "closed its connection and was killed"
        hint = "see the job's log for what the plugin printed"
        if not by_itself or code not in _FROM_ELSEWHERE:
            return GuestDied(f"the process of {who} {ending}", hint)
        if code != -signal.SIGKILL:
            return GuestKilled(f"the process of {who} {ending}", hint)
        if oom_kills() == self._oom_kills:
            return GuestKilled(f"the process of {who} {ending}, sent by another program", hint)
        what = f"the machine ran out of memory while it used {self._rss() >> 20} MiB"
        return OutOfMemory(
            f"the process of {who} {ending}: {what}", "give the plugin smaller files"
        )

    def evidence(self, batches: int, rows: int) -> Evidence:
        """Measurements of the attempt that began at `start`."""
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
        if sys.platform != "linux":  # not measured elsewhere; the wall clock limits it
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
    """A number from `/proc/<pid>/status`; 0 if it is missing.

    Matches a key only at the start of a line: a process chooses its own name, which may contain any
    text, but the kernel escapes a newline in it.
    """
    return _number(f"/proc/{pid}/status", rb"^%s:[ \t]+([0-9]{1,15})\b" % re.escape(key))


def oom_kills() -> int:
    """How many processes the OOM killer has killed since boot."""
    return _number("/proc/vmstat", rb"^oom_kill ([0-9]{1,15})$")


def _number(file: str, pattern: bytes) -> int:
    try:
        match = re.search(pattern, Path(file).read_bytes(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) if match else 0


def signal_name(number: int) -> str:
    """Such as `SIGSEGV`, or `signal 40` if it has no name."""
    names = {int(known): known.name for known in signal.Signals}
    return names.get(number, f"signal {number}")


def exit_words(returncode: int) -> str:
    """How a process ended: `was killed by SIGSEGV`, `ended with exit status 0`."""
    if returncode >= 0:
        return f"ended with exit status {returncode}"
    return f"was killed by {signal_name(-returncode)}"


def kill_tree(pid: int) -> None:
    """Kill a process group's leader, its group and its descendants.

    It must not be reaped yet, so that no other process has its pid.
    """
    kill_below(pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def kill_below(pid: int) -> None:
    """Kill a process's descendants; they cannot be found any more once it has ended."""
    for descendant in descendants(pid):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(descendant, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """All descendants of `pid`, the deepest first, as the kernel lists them (Linux)."""
    tree = [pid]
    for parent in tree:  # the loop appends to it
        for listing in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                tree += map(int, listing.read_bytes().split())
    return tree[:0:-1]


# Limit of a guest's threads. A thread costs the kernel some 30 KiB that the guest's memory limit
# does not count, and a process id. The kernel limits the threads of an ordinary user's guest, but
# not of root's, so a thread of this process checks all running guests.

LOOK_SECONDS = 0.05
"""Pause between checks; a guest can start some 800 threads meanwhile, which a machine can hold."""


class ThreadWatch:
    """Watches processes that are not reaped yet, so that their pids are not reused."""

    def __init__(self) -> None:
        self._watched: dict[int, Callable[[], None]] = {}
        self._change = threading.Condition()
        self._started = False

    def watch(self, pid: int, on_kill: Callable[[], None]) -> None:
        """Kill this process if it has more than THREADS threads, until `unwatch`.

        Args:
            on_kill: called just before, in the watching thread.
        """
        with self._change:
            self._watched[pid] = on_kill
            if not self._started:
                threading.Thread(target=self._run, name="thread-watch", daemon=True).start()
                self._started = True
            self._change.notify()

    def unwatch(self, pid: int) -> None:
        """Stop watching: the process waits for its next job, or is about to be reaped."""
        with self._change:
            self._watched.pop(pid, None)

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._watched:
                    self._change.wait()
            time.sleep(LOOK_SECONDS)  # before the check, so that short jobs need none
            with self._change:
                for pid in list(self._watched):
                    if status_number(pid, b"Threads") > THREADS:
                        self._watched.pop(pid)()
                        with contextlib.suppress(OSError):
                            os.kill(pid, signal.SIGKILL)


WATCH = ThreadWatch()
"""The instance of this process."""
