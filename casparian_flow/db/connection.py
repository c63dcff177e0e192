"""One SQLite connection that takes its turn: the gate around everything that writes.

SQLite 3.7.0 to 3.51.2 can corrupt a WAL database when two connections write or checkpoint at the
same moment (docs/adr/0002). A daemon beside a scan from cron is that shape, so every writing
transaction, checkpoint and close of all our processes holds one file lock, the gate. The lock is
also fairer than SQLite's own busy handler, which sleeps and retries.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

from casparian_flow.crashpoints import crashpoint
from casparian_flow.errors import LedgerLost

log = logging.getLogger(__name__)

CHECKPOINT_BYTES = 4 << 20
"""The write-ahead log is copied into the database when it is larger than this."""

CHECKPOINT_PAUSE_SECONDS = 1.0
"""A long reader can keep a checkpoint from finishing; do not try at every commit."""


def identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file; None where it is not there."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def check_place(path: Path, opened: tuple[int, int] | None) -> None:
    """Return if a file is still the one that was opened: SQLite writes to a deleted one for ever.

    Raises:
        LedgerLost: it is not.
    """
    found = identity(path)
    if found != opened:
        raise LedgerLost(
            f"{path} was {'replaced' if found else 'deleted'} while it was in use; nothing was "
            "written since",
            "put the file or a backup in its place, then: casparian verify   (docs/disaster.md)",
        )


def configure(connection: sqlite3.Connection) -> None:
    """What every connection needs. FULL: NORMAL loses acknowledged commits in a power cut."""
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA wal_autocheckpoint = 0")


class LedgerConnection(sqlite3.Connection):
    """A connection that holds the gate while it writes. One that cannot be made ready is closed.

    Args:
        gate: the file whose lock is the gate.
        path: the database.
        create: make it where it is not there; else that is an error, since a database that was
            deleted under us must not come back empty.
    """

    def __init__(
        self, gate: Path, path: str, *args: Any, create: bool = False, **options: Any
    ) -> None:
        self._path = Path(os.path.abspath(path))
        self._wal = Path(f"{path}-wal")
        self._wal_place: tuple[int, int] | None = None
        self._next_checkpoint = 0.0
        self._closed = False
        self.writing = False
        mode = "rwc" if create else "rw"
        super().__init__(f"{self._path.as_uri()}?mode={mode}", *args, **{**options, "uri": True})
        with contextlib.ExitStack() as undo:
            undo.callback(super().close)
            self._gate = os.open(gate, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            undo.pop_all()
            undo.callback(self.close)
            self._place = identity(self._path)
            configure(self)
            undo.pop_all()

    def begin_writing(self) -> None:
        """Hold the gate and SQLite's write lock until the next commit or rollback.

        A read transaction in progress starts anew: its snapshot may be older than the last
        commit, and writing on it would fail. What was read before may therefore be older than
        what is written now.

        Raises:
            LedgerLost: the file we have open is not the ledger any more.
        """
        if self.writing:
            return
        self._check_place()
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        self.writing = True
        try:
            if self.in_transaction:
                super().rollback()
            self.execute("BEGIN IMMEDIATE")
        except sqlite3.Error:
            self._leave()
            raise

    def commit(self) -> None:
        super().commit()
        try:
            if self.writing:
                self._wal_place = self._wal_place or identity(self._wal)
                self._checkpoint_if_due()
        except sqlite3.Error as error:
            # What was committed is committed: the log is only copied later than we would like.
            log.warning("the write-ahead log could not be copied: %s", error)
        finally:
            self._leave()

    def rollback(self) -> None:
        super().rollback()
        self._leave()

    def close(self) -> None:
        """Close; the last connection of all checkpoints, so this too is done under the gate."""
        if self._closed:
            return
        self._closed = True
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        try:
            super().close()
            crashpoint("connection.closed")
        finally:
            os.close(self._gate)

    def _check_place(self) -> None:
        check_place(self._path, self._place)
        if self._wal_place is not None:  # it stays for as long as any connection is open
            check_place(self._wal, self._wal_place)

    def _leave(self) -> None:
        if self.writing and not self.in_transaction:
            self.writing = False
            fcntl.flock(self._gate, fcntl.LOCK_UN)

    def _checkpoint_if_due(self) -> None:
        now = time.monotonic()
        if now < self._next_checkpoint or not self._wal_is_large():
            return
        self._next_checkpoint = now + CHECKPOINT_PAUSE_SECONDS
        (timeout,) = self.execute("PRAGMA busy_timeout").fetchone()
        self.execute("PRAGMA busy_timeout = 0")
        try:
            self.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            crashpoint("connection.checkpointed")
        finally:
            self.execute(f"PRAGMA busy_timeout = {timeout}")

    def _wal_is_large(self) -> bool:
        try:
            return self._wal.stat().st_size > CHECKPOINT_BYTES
        except FileNotFoundError:
            return False
