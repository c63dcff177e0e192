"""What a guest's process inherits, how it ended, and what it started."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path


def environment(folder: Path) -> dict[str, str]:
    """All that a guest inherits of ours: no variable of the host's, so no secret in one."""
    return {
        "LANG": "C.UTF-8",
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "PATH": os.defpath,
        # One job, one core: workers run side by side, and each thread reserves address space.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }


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
