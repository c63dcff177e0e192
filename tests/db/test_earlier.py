"""What the first release published: its signatures prove less, and its ledger is kept whole."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from casparian_flow.config import Settings
from casparian_flow.db import schema
from casparian_flow.db.access import open_ledger
from casparian_flow.db.seals import GENESIS, Event, Head, link
from casparian_flow.security import signing
from casparian_flow.services import architect, backup, report
from casparian_flow.services.verify import verify
from tests.db.real_ledger import attacker
from tests.plugs import ROWS, signed

LOCK = "rows-dep==1.0\n"
MANIFEST = '{"name": "rows", "version": "1.0.0", "patterns": ["*.txt"], "topics": ["lines"]}'


def first_release(settings: Settings) -> None:
    """A ledger of the first schema, in which one plugin was published."""
    source = ROWS.encode()
    made = signing.artifact_hash(source, LOCK)
    event = Event("publish", "plugin rows 1.0.0", {"artifact": made, "key": "k", "topics": {}})
    (row,) = link(Head(0, GENESIS), "publisher", [event])
    with closing(sqlite3.connect(settings.database.path, isolation_level=None)) as connection:
        connection.executescript(schema.migrations()[0])
        connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 1")
        connection.execute(
            "INSERT INTO cf_plugin (name, version, source, lock, manifest, artifact_hash, "
            "public_key, signature, publisher, deployed_at) "
            "VALUES ('rows', '1.0.0', ?, ?, ?, ?, x'', x'', 'k', '2026-01-01')",
            (source, LOCK, MANIFEST, made),
        )
        connection.execute(
            "INSERT INTO cf_plugin_config (plugin_name, subscription_tags, active_version) "
            "VALUES ('rows', 'plugin:rows', '1.0.0')"
        )
        names = ", ".join(row)
        marks = ", ".join("?" * len(row))
        connection.execute(f"INSERT INTO cf_audit ({names}) VALUES ({marks})", tuple(row.values()))


def test_a_plugin_of_the_first_release_is_no_fault_of_the_ledger(settings: Settings) -> None:
    first_release(settings)
    with open_ledger(settings.database) as ledger:
        verdict = verify(settings, ledger)
        assert verdict.problems == []
        (note,) = (note for note in verdict.notes if note.startswith("plugin rows 1.0.0: "))
        assert note.endswith("it may not run")
        backup.make(settings, ledger, str(settings.home / "copy"))
        wrong = [each.words for each in report.advise(settings, ledger) if each.wrong]
        assert any(words.startswith("plugin rows 1.0.0 may not run: ") for words in wrong)


def test_a_plugin_of_the_first_release_with_other_bytes_is_named(settings: Settings) -> None:
    first_release(settings)
    with open_ledger(settings.database):
        pass
    with attacker(settings) as other:
        source = ROWS.encode() + b"\n# other\n"
        values = (source, signing.artifact_hash(source, LOCK))
        other.execute("UPDATE cf_plugin SET source = ?, artifact_hash = ?", values)
    with open_ledger(settings.database) as ledger:
        assert [words[:19] for words in verify(settings, ledger).problems] == [
            "plugin rows 1.0.0: "
        ]


@pytest.mark.parametrize("upgraded", [False, True])
def test_a_statement_that_somebody_took_away_is_a_fault(
    settings: Settings, tmp_path: Path, upgraded: bool
) -> None:
    if upgraded:
        first_release(settings)
    with open_ledger(settings.database) as ledger:
        architect.deploy(ledger, settings, signed(ledger, tmp_path / "keys", version="2.0.0"))
    with attacker(settings) as other:
        other.execute("UPDATE cf_plugin SET statement = NULL")
    with open_ledger(settings.database) as ledger:
        assert [words[:19] for words in verify(settings, ledger).problems] == [
            "plugin rows 2.0.0: "
        ]
