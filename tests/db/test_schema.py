"""The database: created, brought up to date, refused when it is not ours."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy
from sqlalchemy import create_engine, text

from casparian_flow.config import DatabaseSettings
from casparian_flow.db import schema
from casparian_flow.db.access import Connection, Ledger, get_engine
from casparian_flow.db.models import Base
from casparian_flow.errors import LedgerError


def parts(sql: str) -> list[str]:
    """What a CREATE says, in any order: a column that was added later comes last."""
    return sorted(re.split(r", (?![^()]*\))", re.sub(r"\s+", " ", sql).rstrip(" )")))


def layout(connection: sqlalchemy.Connection) -> list[tuple[object, ...]]:
    rows = connection.execute(
        text(
            "SELECT type, name, tbl_name, sql FROM sqlite_schema WHERE type <> 'trigger' "
            "AND name NOT LIKE 'sqlite_%' ORDER BY type, name"
        )
    )
    return [(*row[:3], parts(row[3] or "")) for row in rows]


def database(folder: Path) -> DatabaseSettings:
    return DatabaseSettings(db_location=str(folder / "ledger.sqlite3"))


def test_migrations_and_models_agree(tmp_path: Path) -> None:
    wanted = create_engine("sqlite://")
    Base.metadata.create_all(wanted)
    found = get_engine(database(tmp_path))
    with wanted.connect() as left, found.connect() as right:
        assert layout(left) == layout(right)
    wanted.dispose()
    found.dispose()


def test_creating_marks_the_database_as_ours(tmp_path: Path) -> None:
    get_engine(database(tmp_path)).dispose()
    assert (tmp_path / ".casparian" / "owned").read_text() == "ledger.sqlite3*\n"


def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    file = database(tmp_path).path
    with sqlite3.connect(file) as other:
        other.execute("CREATE TABLE mine (x)")
    other.close()
    before = file.read_bytes()
    with pytest.raises(LedgerError, match="another program"):
        get_engine(database(tmp_path))
    assert file.read_bytes() == before


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    database(tmp_path).path.write_text("hello, " * 1000)
    with pytest.raises(LedgerError, match="not a SQLite database"):
        get_engine(database(tmp_path))
    assert database(tmp_path).path.read_text().startswith("hello")


def test_a_database_from_a_newer_release_is_refused(tmp_path: Path) -> None:
    get_engine(database(tmp_path)).dispose()
    connection = schema.connect(database(tmp_path))
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(LedgerError, match="newer release"):
        get_engine(database(tmp_path))


def test_a_folder_that_cannot_be_made_is_an_error_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="cannot use the database"):
        get_engine(database(tmp_path / "file" / "below"))


def test_many_processes_may_create_it_at_once(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from casparian_flow.config import DatabaseSettings\n"
        "from casparian_flow.db.access import get_engine\n"
        "sys.stdin.readline()\n"
        "get_engine(DatabaseSettings(db_location=sys.argv[1])).dispose()\n"
    )
    command = [sys.executable, "-c", code, str(database(tmp_path).path)]
    crowd = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(4)]
    for one in crowd:
        one.communicate(b"go\n")
    assert [one.returncode for one in crowd] == [0] * 4
    get_engine(database(tmp_path)).dispose()


@pytest.mark.parametrize("verb", ["UPDATE {} SET rowid = rowid", "DELETE FROM {}"])
@pytest.mark.parametrize("table", ["cf_file_version", "cf_plugin", "cf_attempt", "cf_audit"])
def test_what_is_written_once_stays(ledger: Ledger, table: str, verb: str) -> None:
    rows = {
        "cf_file_version": "(location_id, ordinal, content_hash, size_bytes, detected_at) "
        f"VALUES (1, 1, '{'0' * 64}', 0, '')",
        "cf_plugin": "(name, version, source, lock, manifest, artifact_hash, public_key, "
        "signature, publisher, deployed_at) VALUES ('', '', '', '', '', '', '', '', '', '')",
        "cf_attempt": "(job_id, fence, epoch, worker, outcome, error, log, seconds, ended_at) "
        "VALUES (1, 1, 1, '', '', '', '', 0, '')",
        "cf_audit": "(seq, at, actor, action, subject, detail, previous, hash) "
        "VALUES (1, '', '', '', '', '', '', '')",
    }

    def insert_and_change(connection: Connection) -> None:
        connection.execute(text("PRAGMA defer_foreign_keys = ON"))
        connection.execute(text(f"INSERT INTO {table} {rows[table]}"))
        connection.execute(text(verb.format(table)))

    with pytest.raises(sqlite3.IntegrityError, match="is never"):
        ledger.write(insert_and_change)
