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
from pathlib import Path
from typing import NamedTuple

import msgspec

from casparian_flow.atomic import make_folder, write_once
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


def read(guests_folder: Path) -> Ending:
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


def begin(guests_folder: Path) -> None:
    """Make this daemon's own record; what an interpreter that crashes has to say comes beside it.

    Where that cannot be written the daemon starts all the same: less will be known of its end.
    """
    try:
        _begin(guests_folder)
    except OSError as error:
        log.warning("how this daemon ends will not be told from what it leaves: %s", error)


def _begin(guests_folder: Path) -> None:
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
