"""The two forms in which the store has a content: a row of a SQLite file, or a file of its own.

    <state folder>/store/<database>/small.sqlite3   contents of up to SMALL_BYTES, a row each
                                    ab/ab12...      larger ones, read-only, named by their SHA-256
                                    tmp/<owner>/    large contents that one scan has captured
                                    lock            held by whoever adds or removes contents

Rows have the numbers that the ledger gave the contents (`db.kept`), so nothing here indexes hashes:
such an index is written at random places, which in a large store costs more than the bytes.

The file has a rollback journal and not a write-ahead log. Rows are added at its end, and new pages
need no journal: they are written once and not twice. SQLite's fault of several writers to a
write-ahead log (docs/adr/0002) cannot occur.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from casparian_flow.crashpoints import crashpoint

SMALL_BYTES = 16 << 10
"""Up to here a row costs less than a file, and takes no inode."""

PAGE_BYTES = 8 << 10
"""Measured: contents of 2 to 8 KiB take a fifth less time than in pages of 4 KiB, and no more than
an eighth of the room goes to waste; in pages of 16 KiB half of it does."""

BUSY_SECONDS = 30.0
"""How long to wait for another process's commit, which takes one batch's time."""

LAST = (1 << 63) - 1
"""The highest number that a row can have."""

FAULTS = (OSError, sqlite3.Error)
"""What a store that is full, damaged or not writable raises."""

_SCHEMA = """
BEGIN;
CREATE TABLE content (id INTEGER PRIMARY KEY, content_hash BLOB NOT NULL, bytes BLOB NOT NULL);
-- Lists the numbers without a look at the pages with the bytes.
CREATE INDEX content_id ON content (id);
COMMIT;
"""


def content_file(folder: Path, content_hash: str) -> Path:
    """Path of a large content in a store."""
    return folder / content_hash[:2] / content_hash


def words(error: Exception) -> str:
    """What one of `FAULTS` says, without the path."""
    full = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
    if full or getattr(error, "errno", 0) == errno.ENOSPC:
        return "its disk is full"
    return getattr(error, "strerror", None) or str(error)


class SmallContents:
    """The SQLite file with the small contents of a store. All methods may raise `FAULTS`.

    It is opened at first use, and may be used by one thread after the other. Whoever writes holds
    the store's lock.

    Args:
        folder: the store.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "small.sqlite3"
        self._connection: sqlite3.Connection | None = None
        self._place: tuple[int, int] | None = None

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def add(self, contents: Sequence[tuple[int, str, bytes]]) -> None:
        """Add contents (number, hash, bytes) durably, in one transaction with one commit."""
        rows = [(number, bytes.fromhex(digest), content) for number, digest, content in contents]
        with self._writing() as connection:
            connection.executemany("INSERT INTO content VALUES (?, ?, ?)", rows)
            crashpoint("contents.rows_written")
        crashpoint("contents.rows_committed")

    def last(self) -> int:
        """The highest number in the file; 0 where it has none."""
        connection = self._opened()
        row = connection and connection.execute("SELECT max(id) FROM content").fetchone()
        return (row and row[0]) or 0

    def read(self, number: int) -> bytes | None:
        """A content; None where the file has none of this number."""
        return next(iter(self.read_all([number]).values()), None)

    def intact(self, number: int, content_hash: str) -> bytes | None:
        """A content; None where it is missing or damaged."""
        try:
            content = self.read(number)
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise
            return None
        return content if content is not None and digest_of(content) == content_hash else None

    def read_all(self, numbers: Iterable[int]) -> dict[int, bytes]:
        """Contents by their numbers; those that the file does not have are left out."""
        connection = self._opened()
        if connection is None:
            return {}
        query = "SELECT bytes FROM content WHERE id = ?"
        found = {number: connection.execute(query, (number,)).fetchone() for number in numbers}
        return {number: row[0] for number, row in found.items() if row}

    def numbers(self, after: int, until: int = LAST, limit: int = -1) -> set[int]:
        """The numbers that the file has above `after`, up to `until`; the lowest of them."""
        connection = self._opened()
        if connection is None:
            return set()
        query = "SELECT id FROM content INDEXED BY content_id WHERE id > ? AND id <= ? LIMIT ?"
        return {row[0] for row in connection.execute(query, (after, until, limit))}

    def find(self, hashes: Collection[str]) -> list[tuple[int, str, int]]:
        """Number, hash and size of those of these contents that the file has. Reads all of it."""
        connection = self._opened()
        if connection is None or not hashes:
            return []
        wanted = set(hashes)
        rows = connection.execute("SELECT id, content_hash, length(bytes) FROM content ORDER BY id")
        return [(row[0], row[1].hex(), row[2]) for row in rows if row[1].hex() in wanted]

    def delete(self, numbers: Iterable[int]) -> None:
        """Delete contents; later ones take the room."""
        doomed = [(number,) for number in numbers]
        if not doomed or self._opened() is None:
            return
        with self._writing() as connection:
            connection.executemany("DELETE FROM content WHERE id = ?", doomed)
            crashpoint("contents.rows_deleted")

    def shrink(self) -> None:
        """Give the room of deleted contents back to the disk."""
        connection = self._opened()
        if connection is not None:
            connection.executescript("PRAGMA incremental_vacuum")  # `execute` makes one step of it

    def _opened(self, *, create: bool = False) -> sqlite3.Connection | None:
        """The connection; None where there is no file."""
        place = _place(self.path)
        if self._connection is not None and place != self._place:
            self.close()  # the store was removed or put back meanwhile
        if self._connection is not None or (place is None and not create):
            return self._connection
        connection = sqlite3.connect(
            f"{self.path.as_uri()}?mode={'rwc' if create else 'rw'}", uri=True,
            timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False,
        )  # fmt: skip
        connection.text_factory = bytes  # a content is bytes whatever somebody has written there
        try:
            if place is None:
                os.chmod(self.path, 0o600)
                connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            # The journal stays and is truncated, durably: a deleted one could come back after a
            # power cut and undo what the ledger has recorded since.
            connection.execute("PRAGMA journal_mode = TRUNCATE")
            connection.execute("PRAGMA synchronous = FULL")
            if place is None:
                connection.executescript(_SCHEMA)
        except BaseException:
            connection.close()
            raise
        self._connection, self._place = connection, _place(self.path)
        return connection

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        connection = self._opened(create=True)
        assert connection is not None
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):  # the error that led here says more
                    connection.execute("ROLLBACK")


def _place(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file; None where there is none, or nothing was written to it yet."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return (status.st_dev, status.st_ino) if status.st_size else None


def digest_of(content: bytes) -> str:
    """SHA-256, hexadecimal."""
    return hashlib.sha256(content).hexdigest()
