"""Creating the database, bringing it up to date, and refusing one that is not ours.

`migrations/NNNN_*.sql` are applied in order, each in one transaction with the record of it
(`PRAGMA user_version`). Nothing here imports SQLAlchemy: most starts only read one number.
"""

from __future__ import annotations

import functools
import glob
import sqlite3
from collections.abc import Iterator
from importlib.resources import files

from casparian_flow import atomic
from casparian_flow.config import DatabaseSettings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import seals
from casparian_flow.db.connection import LedgerConnection
from casparian_flow.errors import LedgerError, LedgerLost

APPLICATION_ID = 0x43464C57
"""Marks a SQLite file as a ledger of ours ("CFLW")."""

NEEDED = (3, 35, 0)
"""The first SQLite that returns what a statement has changed."""

NOT_A_DATABASE = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
"""Result codes of a file whose pages make no sense."""


_AFTER = {"0006_seals.sql": seals.seal_what_is_there}
"""What SQL alone cannot do, in the same transaction as a migration's statements."""


@functools.cache
def _scripts() -> list[tuple[str, str]]:
    """(file name, SQL) of every migration, oldest first."""
    folder = files("casparian_flow.db") / "migrations"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".sql"))
    return [(name, (folder / name).read_text("utf-8")) for name in names]


def migrations() -> list[str]:
    """The SQL of every migration, oldest first."""
    return [script for _, script in _scripts()]


def bring_up_to_date(database: DatabaseSettings) -> None:
    """Create the database, or apply the migrations it lacks.

    Raises:
        LedgerError: it cannot be opened or written, is another program's, or is from a newer
            release. Nothing was changed.
    """
    if sqlite3.sqlite_version_info < NEEDED:
        raise LedgerError(
            f"this Python comes with SQLite {sqlite3.sqlite_version}; "
            f"{'.'.join(map(str, NEEDED))} or newer is needed",
            "use another build of Python; nothing was touched",
        )
    try:
        atomic.make_folder(database.path.parent)
        atomic.make_folder(database.state_folder, mode=0o700)
        # A scan of this folder must not take the ledger for a file that was dropped there. It is
        # said each time: the ledger may be a copy, brought here from elsewhere.
        atomic.own(database.path.parent, f"{glob.escape(database.path.name)}*")
        connection = connect(database)
        try:
            if _version(connection, database) < len(migrations()):
                _migrate(connection, database)
            elif connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                _enter_wal(connection, database)  # a copy that another tool has made
        finally:
            connection.close()
    except (sqlite3.Error, OSError) as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in NOT_A_DATABASE:
            raise LedgerLost(
                f"{database.path} is not a SQLite database, or is damaged: {error}; it was not "
                "touched",
                "put a backup in its place (docs/disaster.md), or name another file in "
                "[database] db_location",
            ) from error
        raise LedgerError(
            f"cannot use the database {database.path}: {error}",
            "check that the folder exists, is writable and has room",
        ) from error


def connect(database: DatabaseSettings) -> LedgerConnection:
    """A plain connection; the engine's connections are of the same kind."""
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
            f"{database.path} is a database of another program",
            "name another file in [database] db_location; this one was not touched",
        )
    if version > len(migrations()):
        raise LedgerError(
            f"{database.path} was written by a newer release (schema {version}; this one knows "
            f"{len(migrations())})",
            "upgrade casparian-flow; the database was not touched",
        )
    return int(version)


def _migrate(connection: LedgerConnection, database: DatabaseSettings) -> None:
    _enter_wal(connection, database)
    for number, (name, script) in enumerate(_scripts()):
        connection.begin_writing()
        # Another process may have been faster while we waited for the gate.
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


def _enter_wal(connection: LedgerConnection, database: DatabaseSettings) -> None:
    """Write-ahead logging is a property of the file, and cannot be entered in a transaction."""
    with atomic.exclusive(database.gate):
        connection.execute("PRAGMA journal_mode = WAL")
        crashpoint("schema.wal_entered")


def _statements(script: str) -> Iterator[str]:
    """Split at the semicolons that end a statement, not those inside a trigger."""
    pending = ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            yield pending
            pending = ""
