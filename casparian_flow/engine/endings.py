"""Find out how the last daemon ended, and which attempts it had begun.

A daemon writes a record at its start. The record and the files beside it distinguish three cases:

    machine     the machine was rebooted; which attempts had begun is not known
    trace       the process crashed (faulthandler wrote a traceback), or the kernel's OOM killer ran
                since its start: a begun attempt may be the cause
    no trace    it was killed, or ended without a message: a begun attempt may be the cause or not
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
    """How the last daemon ended."""

    machine: bool = False
    """The machine was rebooted since: files without fsync may be lost."""
    traced: bool = False
    """It crashed, or the OOM killer ran during its life."""


class _Record(msgspec.Struct):
    boot: str
    oom_kills: int


def read_ending(guests_folder: Path) -> Ending:
    """How the last daemon of this database ended. The caller holds the daemon lock."""
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
    """Write this daemon's record, and have faulthandler write beside it.

    If they cannot be written, the daemon starts all the same; less will be known of its end.
    """
    try:
        _begin_ending(guests_folder)
    except OSError as error:
        log.warning("cannot record how this daemon ends: %s", error)


def _begin_ending(guests_folder: Path) -> None:
    make_folder(guests_folder.parent, mode=0o700)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    trace = os.open(_trace(guests_folder), flags, 0o600)
    if faulthandler.is_enabled():
        os.close(trace)
    else:
        faulthandler.enable(trace)  # stays open for the life of the process
    record = _Record(_boot(), oom_kills())
    write_once(_record(guests_folder), msgspec.json.encode(record), mode=0o600)


def _record(guests_folder: Path) -> Path:
    return guests_folder.with_suffix(".begun")


def _trace(guests_folder: Path) -> Path:
    return guests_folder.with_suffix(".crash")


def _boot() -> str:
    """The kernel's boot id; empty if there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


# Markers of attempts that a Worker has begun and not ended: an empty file each, in the guests'
# folder. They distinguish the job that may have killed the process from jobs that only waited. They
# are not made durable, and not used after a power cut.

_NAME = re.compile(r"hand-([0-9]+)-([0-9]+)")

_ours: set[Path] = set()
"""The markers of this process."""


@contextlib.contextmanager
def held(folder: Path, job_id: int, fence: int) -> Iterator[None]:
    """Keep an attempt's marker while the block runs.

    Args:
        folder: the guests' folder.

    Raises:
        OSError: the marker cannot be created.
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
    """(job id, fence) of every attempt with a marker: begun, or begun when its Worker died."""
    matches = map(_NAME.fullmatch, (file.name for file in folder.glob("hand-*")))
    return {(int(match[1]), int(match[2])) for match in matches if match}


def forget(folder: Path, attempts: Iterable[tuple[int, int]]) -> None:
    """Remove the markers of these attempts of a dead Worker."""
    for job_id, fence in attempts:
        (folder / f"hand-{job_id}-{fence}").unlink(missing_ok=True)


def let_go() -> None:
    """Remove this process's markers before it ends itself: no job is to be suspected."""
    for file in list(_ours):
        file.unlink(missing_ok=True)
