"""How the daemon before this one ended, as far as it left a trace.

A process that dies cannot say why. Its record, made when it began, and what stands beside it tell
three ends apart:

    the machine     it was started anew: of what was in hand nothing is known
    a trace         it crashed (the interpreter wrote where), or the kernel has killed something for
                    want of memory since it began: what was in hand may well be the cause
    no trace        somebody killed it, or it ended itself without a word: what was in hand may have
                    done that, or have had no part in it
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from casparian_flow.durable import make_folder, write_once
from casparian_flow.engine.guest_process import oom_kills

log = logging.getLogger(__name__)


class Ending(NamedTuple):
    """What is known of the end of the daemon before this one."""

    machine: bool = False
    """The machine has been started since: files that were not made durable may be gone."""
    traced: bool = False
    """It crashed, or something was killed for want of memory while it ran."""


class _Record(msgspec.Struct):
    boot: str
    oom_kills: int


def read_ending(guests_folder: Path) -> Ending:
    """How the last daemon of this database ended; it has ended, since we hold its lock."""
    try:
        before = msgspec.json.decode(_record(guests_folder).read_bytes(), type=_Record)
    except (OSError, msgspec.MsgspecError):
        return Ending()
    if before.boot != _boot():
        return Ending(machine=True, traced=True)
    crashed = False
    with contextlib.suppress(OSError):
        crashed = _trace(guests_folder).stat().st_size > 0
    return Ending(traced=crashed or oom_kills() > before.oom_kills)


def begin_ending(guests_folder: Path) -> None:
    """Make this daemon's own record; what an interpreter that crashes has to say comes beside it.

    Where that cannot be written the daemon starts all the same: less will be known of its end.
    """
    try:
        _begin_ending(guests_folder)
    except OSError as error:
        log.warning("how this daemon ends will not be told from what it leaves: %s", error)


def _begin_ending(guests_folder: Path) -> None:
    make_folder(guests_folder.parent, mode=0o700)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    trace = os.open(_trace(guests_folder), flags, 0o600)
    if faulthandler.is_enabled():
        os.close(trace)
    else:
        faulthandler.enable(trace)  # it stays open as long as this process lives
    record = _Record(_boot(), oom_kills())
    write_once(_record(guests_folder), msgspec.json.encode(record), mode=0o600)


def _record(guests_folder: Path) -> Path:
    return guests_folder.with_suffix(".begun")


def _trace(guests_folder: Path) -> Path:
    return guests_folder.with_suffix(".crash")


def _boot() -> str:
    """What names this run of the machine; empty where nothing does."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


# Which attempts a Worker has begun and not ended: an empty file each, in the guests' folder.
#
# A process that dies cannot say what it was doing; these say it, and they tell the job that may
# have killed it from those that only waited behind it. They are not made durable: after a power cut
# nobody is suspected.


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


def read_held(folder: Path) -> set[tuple[int, int]]:
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
