"""Connections to the database that hold the gate, and the migrations of its schema.

`migrations/NNNN_*.sql` are applied in order, each in one transaction that also counts it in
`PRAGMA user_version`. Nothing here imports SQLAlchemy: most starts only read that number.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import glob
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from casparian_flow import durable
from casparian_flow.config import DatabaseSettings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import seals
from casparian_flow.errors import LedgerError, LedgerLost

log = logging.getLogger(__name__)


# SQLite 3.7.0 to 3.51.2 can corrupt a WAL database when two connections write or checkpoint at the
# same moment (docs/adr/0002), as a daemon and a scan from cron do. So every writing transaction,
# checkpoint and close of all our processes holds one file lock, the gate. The lock is also fairer
# than SQLite's own busy handler, which sleeps and retries.


CHECKPOINT_BYTES = 4 << 20
"""The write-ahead log is copied into the database when it is larger than this."""

CHECKPOINT_PAUSE_SECONDS = 1.0
"""Between two checkpoints: a long reader can keep one from finishing."""


def identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file; None where it does not exist."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def check_place(path: Path, opened: tuple[int, int] | None) -> None:
    """Check that a file is still the one that was opened: SQLite would write on to a deleted one.

    Raises:
        LedgerLost: it is not.
    """
    current = identity(path)
    if current != opened:
        raise LedgerLost(
            f"{path} was {'replaced' if current else 'deleted'} while in use; nothing was "
            "written to it since",
            "restore the file or a backup, then: casparian verify   (docs/disaster.md)",
        )


def configure(connection: sqlite3.Connection) -> None:
    """Set what every connection needs. NORMAL would lose acknowledged commits in a power cut."""
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA wal_autocheckpoint = 0")


class LedgerConnection(sqlite3.Connection):
    """A connection that holds the gate while it writes.

    Args:
        gate: the file whose lock is the gate.
        path: the database.
        create: create it if it does not exist. Otherwise that is an error, since a database that
            was deleted while in use must not come back empty.
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

        A read transaction in progress is restarted: its snapshot may be older than the last
        commit, and a write on it would fail. So what was read before may be out of date.

        Raises:
            LedgerLost: the open file is not the ledger any more.
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
            # The commit holds; the log is only copied later.
            log.warning("the write-ahead log could not be copied into the database: %s", error)
        finally:
            self._leave()

    def rollback(self) -> None:
        super().rollback()
        self._leave()

    def close(self) -> None:
        """Close, under the gate: the last connection of all checkpoints as it closes."""
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
        if self._wal_place is not None:  # it exists while any connection is open
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


APPLICATION_ID = 0x43464C57
"""Marks a SQLite file as a ledger: "CFLW"."""

NEEDED = (3, 35, 0)
"""The first SQLite with RETURNING."""

NOT_A_DATABASE = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
"""Result codes for a file that is damaged, or no database."""


def _decide_what_stands(connection: sqlite3.Connection) -> None:
    from casparian_flow.db import visibility

    visibility.fill(connection)


_AFTER: dict[str, Callable[[sqlite3.Connection], None]] = {
    "0006_seals.sql": seals.seal_existing_rows,
    "0017_moves.sql": _decide_what_stands,  # it reads the tables of this one too
    "0018_setup_seals.sql": seals.seal_existing_setup,
}
"""What SQL cannot do, after a migration's statements and in the same transaction."""


@functools.cache
def _scripts() -> list[tuple[str, str]]:
    """(file name, SQL) of every migration, oldest first."""
    folder = files("casparian_flow.db") / "migrations"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".sql"))
    return [(name, (folder / name).read_text("utf-8")) for name in names]


def migrations() -> list[str]:
    """The SQL of every migration, oldest first."""
    return [script for _, script in _scripts()]


class Made(NamedTuple):
    """A table, index, view or trigger of a database."""

    kind: str
    name: str
    table: str
    """The one that it belongs to."""
    sql: str
    """The statement that made it, with single spaces."""


def objects(connection: sqlite3.Connection) -> list[Made]:
    """All that is in the schema of a database, but what SQLite adds itself."""
    rows = connection.execute("SELECT type, name, tbl_name, coalesce(sql, '') FROM sqlite_schema")
    return [
        Made(kind, name, table, " ".join(sql.split()))
        for kind, name, table, sql in rows
        if not (kind == "table" and name in _SQLITES)
        and not (kind == "index" and not sql and name.startswith("sqlite_autoindex_"))
    ]


_SQLITES = {"sqlite_sequence", "sqlite_stat1", "sqlite_stat3", "sqlite_stat4"}


@functools.cache
def made_by_migrations() -> tuple[Made, ...]:
    """The schema of a ledger that is up to date."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as empty:
        for script in migrations():
            for statement in _statements(script):
                empty.execute(statement)
        return tuple(objects(empty))


def bring_up_to_date(database: DatabaseSettings) -> None:
    """Create the database, or apply the migrations it lacks.

    Raises:
        LedgerError: it cannot be opened or written, belongs to another program, or is from a
            newer release. Nothing was changed.
    """
    if sqlite3.sqlite_version_info < NEEDED:
        raise LedgerError(
            f"this Python has SQLite {sqlite3.sqlite_version}; {'.'.join(map(str, NEEDED))} or "
            "newer is needed",
            "use another build of Python; nothing was changed",
        )
    try:
        durable.make_folder(database.path.parent)
        durable.make_folder(database.state_folder, mode=0o700)
        # A scan of this folder must pass over the ledger. Marked at each start, since the ledger
        # may be a copy from elsewhere.
        durable.own(database.path.parent, f"{glob.escape(database.path.name)}*")
        connection = connect(database)
        try:
            if _version(connection, database) < len(migrations()):
                _back_up(connection, database)
                _migrate(connection, database)
            elif connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                _enter_wal(connection, database)  # a copy made by another tool
        finally:
            connection.close()
    except (sqlite3.Error, OSError) as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in NOT_A_DATABASE:
            raise LedgerLost(
                f"{database.path} is not a SQLite database, or is damaged: {error}; it was not "
                "touched",
                "restore a backup (docs/disaster.md), or name another file in [database] "
                "db_location",
            ) from error
        raise LedgerError(
            f"cannot use the database {database.path}: {error}",
            "check that the folder exists, is writable and has room",
        ) from error


def connect(database: DatabaseSettings) -> LedgerConnection:
    """A connection outside the engine, of the same class."""
    return LedgerConnection(
        database.gate, str(database.path), create=True, timeout=30.0, isolation_level=None
    )


def _version(connection: sqlite3.Connection, database: DatabaseSettings) -> int:
    """The number of migrations applied; 0 for a new, empty file."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if tables and application != APPLICATION_ID:
        raise LedgerError(
            f"{database.path} is the database of another program",
            "name another file in [database] db_location; this one was not touched",
        )
    if version > len(migrations()):
        raise LedgerError(
            f"{database.path} was written by a newer release (schema {version}; this one knows "
            f"{len(migrations())})",
            "upgrade casparian-flow; the database was not touched",
        )
    return int(version)


_HAS_ROWS = (
    "SELECT 1 FROM cf_source_root LIMIT 1",
    "SELECT 1 FROM cf_plugin LIMIT 1",
    "SELECT 1 FROM cf_audit LIMIT 1",
)
"""A ledger for which one of these gives a row is copied before it is migrated."""


def _back_up(connection: LedgerConnection, database: DatabaseSettings) -> None:
    """Copy a ledger of an earlier release to `<ledger>.before-NNNN`, after the last migration.

    Raises:
        LedgerError: it cannot be copied; nothing was changed.
    """
    with durable.exclusive(database.gate):
        # Another process may have migrated it while we waited for the gate.
        if not 0 < _version(connection, database) < len(migrations()):
            return
        if not any(connection.execute(query).fetchone() for query in _HAS_ROWS):
            return
        copy = backup_of(database)
        part = copy.with_name(f"{copy.name}.part")
        try:
            part.unlink(missing_ok=True)
            connection.execute("VACUUM INTO ?", (str(part),))
            durable.fsync_path(part)
            crashpoint("schema.copied")
            part.replace(copy)
            durable.fsync_path(copy.parent)
        except (sqlite3.Error, OSError) as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in NOT_A_DATABASE:
                raise
            raise LedgerError(
                f"the ledger {database.path} is of an earlier release, and cannot be copied to "
                f"{copy} before it is brought up to date: {error}; nothing was changed",
                "make room on its disk, then the same command again",
            ) from error
        crashpoint("schema.backed_up")
    log.warning(
        "the ledger %s is of an earlier release and is now brought up to date; it was copied to "
        "%s, which may be deleted when all is well",
        database.path,
        copy,
    )


def backup_of(database: DatabaseSettings) -> Path:
    """The copy of a ledger of an earlier release that the last migration makes first."""
    number = _scripts()[-1][0].partition("_")[0]
    return database.path.with_name(f"{database.path.name}.before-{number}")


def _migrate(connection: LedgerConnection, database: DatabaseSettings) -> None:
    _enter_wal(connection, database)
    _move_store(database)
    for number, (name, script) in enumerate(_scripts()):
        connection.begin_writing()
        # Another process may have applied it while we waited for the gate.
        if _version(connection, database) == number:
            for statement in _statements(script):
                connection.execute(statement)
                crashpoint("schema.statement_run")
            if after := _AFTER.get(name):
                after(connection)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {number + 1}")
        crashpoint("schema.migration_written")
        connection.commit()
        crashpoint("schema.migrated")


def _move_store(database: DatabaseSettings) -> None:
    """Bring the contents that earlier releases kept to the place where they are looked for now."""
    old, new = database.earlier_store_folder, database.store_folder
    if old.is_dir() and not new.exists():
        durable.make_folder(new.parent, mode=0o700)
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            old.rename(new)
        crashpoint("schema.store_moved")
        durable.fsync_path(new.parent)
        durable.fsync_path(old.parent)


def _enter_wal(connection: LedgerConnection, database: DatabaseSettings) -> None:
    """Switch to write-ahead logging, which cannot be done in a transaction; the file keeps it."""
    with durable.exclusive(database.gate):
        connection.execute("PRAGMA journal_mode = WAL")
        crashpoint("schema.wal_entered")


def _statements(script: str) -> Iterator[str]:
    """Split a script at the semicolons that end a statement, not at those inside a trigger."""
    pending = ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            yield pending
            pending = ""
