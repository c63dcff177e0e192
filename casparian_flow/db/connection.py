"""One SQLite connection that takes its turn: the gate around everything that writes.

SQLite 3.7.0 to 3.51.2 can corrupt a WAL database when two connections write or checkpoint at the
same moment (docs/adr/0002). A daemon beside a scan from cron is that shape, so every writing
transaction, checkpoint and close of all our processes holds one file lock, the gate. The lock is
also fairer than SQLite's own busy handler, which sleeps and retries.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

from casparian_flow.crashpoints import crashpoint

log = logging.getLogger(__name__)

CHECKPOINT_BYTES = 4 << 20
"""The write-ahead log is copied into the database when it is larger than this."""

CHECKPOINT_PAUSE_SECONDS = 1.0
"""A long reader can keep a checkpoint from finishing; do not try at every commit."""


class LedgerConnection(sqlite3.Connection):
    """A connection that holds the gate while it writes."""

    def __init__(self, gate: Path, path: str, *args: Any, **options: Any) -> None:
        super().__init__(path, *args, **options)
        self._wal = Path(f"{path}-wal")
        self._gate = os.open(gate, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._next_checkpoint = 0.0
        self._closed = False
        self.writing = False

    def begin_writing(self) -> None:
        """Hold the gate and SQLite's write lock until the next commit or rollback.

        A read transaction in progress starts anew: its snapshot may be older than the last
        commit, and writing on it would fail. What was read before may therefore be older than
        what is written now.
        """
        if self.writing:
            return
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
