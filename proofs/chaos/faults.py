"""What is done to a running system, each for some seconds and then undone."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil

from proofs.chaos.crew import Crew
from proofs.chaos.place import Place
from tests import disks

DISK_BYTES = 512 << 20


@contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """SIGSTOP, and SIGCONT at last."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Take every byte that a filesystem has left, in smaller and smaller pieces."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        size = DISK_BYTES
        while size >= 4096:
            try:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                size //= 2
        try:
            yield
        finally:
            filler.unlink()


@contextmanager
def locked(database: Path) -> Iterator[None]:
    """Hold the write lock of a SQLite sink, as a program of somebody else's might."""
    with closing(sqlite3.connect(database, timeout=30.0, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            other.execute("ROLLBACK")


@contextmanager
def away(root: Path, turn: contextlib.AbstractContextManager[object]) -> Iterator[None]:
    """Move a source root elsewhere and back; `turn` keeps the load from writing meanwhile."""
    elsewhere = root.with_name(f"{root.name}-away")
    with turn:
        root.rename(elsewhere)
        try:
            yield
        finally:
            elsewhere.rename(root)


def small_disk(folder: Path) -> bool:
    """Give `folder` a filesystem of its own; False where we may not mount."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        disks.mount(folder, *disks.tmpfs(str(DISK_BYTES)))
    except PermissionError:
        return False
    return True


class Faults:
    """The faults by name.

    Args:
        place: whose sinks and source root.
        crew: its processes.
        turn: held by the load while it changes a file.
        disk: whether the Parquet sink has a filesystem of its own.
    """

    def __init__(
        self,
        place: Place,
        crew: Crew,
        turn: contextlib.AbstractContextManager[object],
        disk: bool,
    ) -> None:
        self._place = place
        self._crew = crew
        self._turn = turn
        self.gentle: dict[str, Callable[[float], None]] = {
            "kill guest": self._kill_guest,
            "kill one-shot": self._kill_scan,
            "stop daemon": lambda seconds: self._stop(("daemon", "sentinel"), seconds),
            "stop guest": self._stop_guest,
            "sink locked": lambda seconds: self._during(locked(place.sink), seconds),
            "source away": lambda seconds: self._during(away(place.root, turn), seconds),
        }
        """Those that a daemon outlives; each is given seconds."""
        if disk:
            self.gentle["disk full"] = lambda seconds: self._during(
                full(place.parquet.parent), seconds
            )
        self.all = self.gentle | {
            "kill daemon": lambda _: self._kill(("daemon", "sentinel")),
            "kill worker": lambda _: self._kill(("worker",)),
            "stop worker": lambda seconds: self._stop(("worker",), seconds),
        }

    def _during(self, fault: contextlib.AbstractContextManager[None], seconds: float) -> None:
        with fault:
            time.sleep(seconds)

    def _kill(self, roles: tuple[str, ...]) -> None:
        for hand in [hand for hand in self._crew.hands if hand.role in roles][:1]:
            self._crew.kill(hand)

    def _kill_guest(self, _: float) -> None:
        for guest in self._crew.guests()[:1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                guest.kill()

    def _kill_scan(self, seconds: float) -> None:
        hand = self._crew.start("drain")
        time.sleep(min(seconds, 2.0))
        self._crew.kill(hand)

    def _stop(self, roles: tuple[str, ...], seconds: float) -> None:
        pids = [hand.process.pid for hand in self._crew.hands if hand.role in roles]
        self._during(stopped(pids), seconds)

    def _stop_guest(self, seconds: float) -> None:
        self._during(stopped([guest.pid for guest in self._crew.guests()[:1]]), seconds)
