"""Real revision histories, in short; `python -m proofs.replay` runs them whole."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from casparian_flow import config
from casparian_flow.db.access import open_ledger
from proofs.replay.history import HISTORIES, Way, replay
from proofs.replay.tables import SINKS, Tables
from tests.real_data import absent

KILLS_SEED = 7

pytestmark = pytest.mark.skipif(
    not HISTORIES.is_dir(),
    reason=absent("histories", "that real histories of files are recorded as they were"),
)


@pytest.mark.slow
def test_the_first_commits_one_by_one(tmp_path: Path) -> None:
    figures = replay(tmp_path, "sp500", Way(commits=20))
    assert figures["versions"] == figures["COMPLETED"]


@pytest.mark.slow
def test_identical_rewrites_give_no_version(tmp_path: Path) -> None:
    replay(tmp_path, "countries", Way(commits=10))


def test_a_flood(tmp_path: Path) -> None:
    replay(tmp_path, "sp500", Way(flood=True))


@pytest.mark.slow
def test_tables_equal_the_files_in_every_mode_with_kills_in_between(tmp_path: Path) -> None:
    way = Way(10, False, ["replace", "append"], kills=2, seed=KILLS_SEED)
    figures = replay(tmp_path, "sp500", way)
    assert figures["looks under replace"] == 10
    assert figures["looks under append"] == 1
    check_that_harm_is_noticed(tmp_path)


def check_that_harm_is_noticed(folder: Path) -> None:
    """An oracle that never finds anything proves nothing."""
    settings = config.load(str(folder / "flow" / config.FILE_NAME))
    database = sqlite3.connect(settings.home / "replace.sqlite3")
    with open_ledger(settings.database) as ledger, closing(database):
        tables = Tables(ledger, settings, "replace", list(SINKS), folder / "blobs")

        def found(statement: str) -> str:
            with database:
                database.execute(statement)
                database.commit()
            return "\n".join(tables.problems())

        assert found("SELECT 1") == ""
        rows = "_cf_rows_delimited"
        shown = "SELECT id FROM _cf_outputs WHERE topic = 'delimited' AND state = 'current'"
        one = f"SELECT min(rowid) FROM {rows} WHERE _cf_output IN ({shown})"
        copy = f"INSERT INTO {rows} SELECT * FROM {rows} WHERE rowid = ({one})"
        assert "are not those of the file" in found(copy)
        assert found(f"DELETE FROM {rows} WHERE rowid = (SELECT max(rowid) FROM {rows})") == ""
        assert "should not be there" in found(
            "UPDATE _cf_outputs SET state = 'current' WHERE topic = 'delimited' AND state = 'past'"
        )
        assert "are lost" in found(f"DELETE FROM {rows}")
        (file, *_) = (settings.home / "replace" / "delimited").glob("*.parquet")
        file.unlink()
        lost = [words for words in tables.problems() if words.startswith("parquet")]
        assert "are lost" in "\n".join(lost)
