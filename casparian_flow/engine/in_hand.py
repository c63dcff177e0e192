"""Which attempts a Worker has begun and not ended: an empty file each, in the guests' folder.

A process that dies cannot say what it was doing; these say it, and they tell the job that may have
killed it from those that only waited behind it. They are not made durable: after a power cut
nobody is suspected.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from casparian_flow.atomic import make_folder

_NAME = re.compile(r"hand-([0-9]+)-([0-9]+)")

_ours: set[Path] = set()
"""What this process has in hand."""


@contextlib.contextmanager
def held(folder: Path, job_id: int, fence: int) -> Iterator[None]:
    """Have an attempt in hand while the block runs.

    Args:
        folder: the guests' folder.

    Raises:
        OSError: the file cannot be made.
    """
    file = folder / f"hand-{job_id}-{fence}"
    make_folder(folder, mode=0o700)
    file.touch()
    _ours.add(file)
    try:
        yield
    finally:
        _ours.discard(file)
        file.unlink(missing_ok=True)


def read(folder: Path) -> set[tuple[int, int]]:
    """(job id, fence) of every attempt that is in hand, or was when its Worker died."""
    found = map(_NAME.fullmatch, (file.name for file in folder.glob("hand-*")))
    return {(int(match[1]), int(match[2])) for match in found if match}


def forget(folder: Path, attempts: Iterable[tuple[int, int]]) -> None:
    """Remove what a dead Worker left of these."""
    for job_id, fence in attempts:
        (folder / f"hand-{job_id}-{fence}").unlink(missing_ok=True)


def let_go() -> None:
    """This process is about to end itself: nothing it has in hand is to be suspected of that."""
    for file in list(_ours):
        file.unlink(missing_ok=True)
