"""What a guest's process inherits and may have, what it uses, how it ended, what it started."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from socket import socket
from subprocess import DEVNULL, PIPE, STDOUT, Popen

from casparian_flow.protocol import Artifact
from casparian_flow.sections import GuestSettings
from casparian_flow.security.sandbox import Confinement


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
    artifact: Artifact, limits: GuestSettings, folder: Path, read: list[str]
) -> Confinement:
    """What a guest may have: what the plugin asks for, and no more than the limits."""
    return Confinement(
        mode=limits.sandbox,
        home=os.path.realpath(folder),
        read=read,
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


class CpuClock:
    """Processor time of another process, all its threads, since a moment.

    Args:
        pid: a child nobody has waited for yet.
    """

    def __init__(self, pid: int) -> None:
        # CPUCLOCK_SCHED of a process, as clock_getcpuclockid(3) makes it on Linux.
        self._clock = (~pid << 3) | 2
        self._most = math.inf

    def start(self, limit_seconds: float) -> None:
        """Count from here; it may use so much."""
        self._most = self._used() + limit_seconds

    def left(self) -> float:
        """Seconds of wall clock before which it cannot have used it up, on all cores at once."""
        return (self._most - self._used()) / (os.cpu_count() or 1)

    def _used(self) -> float:
        if sys.platform != "linux":  # measured nowhere else; the wall clock bounds it
            return 0.0
        try:
            return time.clock_gettime(self._clock)
        except OSError:  # it has ended
            return 0.0


def exit_words(returncode: int) -> str:
    """How a process ended: `was killed by SIGSEGV`, `ended with exit status 0`."""
    if returncode >= 0:
        return f"ended with exit status {returncode}"
    names = {int(number): number.name for number in signal.Signals}
    return f"was killed by {names.get(-returncode, f'signal {-returncode}')}"


def descendants(pid: int) -> Iterator[int]:
    """Every process below `pid`, as far as the kernel lists them (Linux)."""
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, listing.read_text().split()):
                yield from descendants(child)
                yield child
