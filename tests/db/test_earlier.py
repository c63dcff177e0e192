"""What the first release published: its signatures prove less, and its ledger is kept whole."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import text

from casparian_flow.config import Settings
from casparian_flow.db import integrity, schema, visibility
from casparian_flow.db.access import Connection, open_ledger
from casparian_flow.db.seals import GENESIS, Event, Head, link
from casparian_flow.db.states import JobStatus
from casparian_flow.errors import LedgerError
from casparian_flow.security import signing
from casparian_flow.services import architect, backup, report
from casparian_flow.services.verify import verify
from tests.db.real_ledger import attacker, before
from tests.factories import add_job
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
        assert [words.split(": ")[0] for words in verify(settings, ledger).problems] == [
            "plugin 1 (rows 1.0.0) was changed outside Casparian Flow",
            "plugin rows 1.0.0",
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
        assert [words.split(": ")[0] for words in verify(settings, ledger).problems] == [
            f"plugin {1 + upgraded} (rows 2.0.0) was changed outside Casparian Flow",
            "plugin rows 2.0.0",
        ]


# The release before the ledger decided what readers see: schema 12.


def release_before(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A ledger with four published outputs, of which the second is retracted, the third is being
    reinstated and the fourth is forgotten; their ids."""
    ids = []
    with monkeypatch.context() as patch:
        before(patch, "0013")
        with open_ledger(settings.database) as ledger:
            for _ in range(4):
                job = add_job(ledger, JobStatus.COMPLETED)
                ids.append(ledger.write(partial(published_then, job=job)))
            for number, state in ((ids[1], "RETRACTED"), (ids[2], "REINSTATING")):
                row = f"VALUES ('key {number}', '{state}', '2026-01-01')"
                ledger.write(run(f"INSERT INTO cf_retracted_output {row}"))
            ledger.write(run(f"INSERT INTO cf_forgotten_output VALUES ('key {ids[3]}', '')"))
            ledger.write(
                run(
                    "INSERT INTO cf_found_output (output_key, location, topic, uri, target, rows, "
                    "digest, job_id, file_version_id, source, path, ordinal, content_hash, "
                    "size_bytes, artifact_hash, plugin_name, plugin_version, found_at) VALUES "
                    "('k', 'l', 't', 'u', '', 1, '', 77, 99, 's', x'00', 1, '', 1, '', '', '', '')"
                )
            )
    return ids


def run(statement: str) -> Callable[[Connection], int]:
    return lambda connection: connection.execute(text(statement)).rowcount


def published_then(connection: Connection, job: int) -> int:
    """An output of a job, as that release had it."""
    (number,) = connection.execute(
        text(
            "INSERT INTO cf_output (job_id, topic, uri, location, mode, output_key, state, stage, "
            "target, rows, size_bytes, digest) VALUES (:job, 't', 'u', 'l', 'append', "
            "'key ' || :job, 'PLANNED', '', '', 1, 1, '') RETURNING id"
        ),
        {"job": job},
    ).one()
    run(f"UPDATE cf_output SET state = 'PUBLISHED', published_at = 'now' WHERE id = {number}")(
        connection
    )
    return int(number)


def test_a_ledger_of_the_release_before_is_copied_and_then_says_what_stands(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shown, retracted, reinstating, forgotten = release_before(settings, monkeypatch)
    with open_ledger(settings.database) as ledger:
        rows = ledger.read(
            lambda c: c.execute(text("SELECT output_id, state, told FROM cf_visibility")).all()
        )
        assert {row[0]: row[1] for row in rows} == {
            shown: "current", retracted: "retracted", reinstating: "current", forgotten: "removed",
        }  # fmt: skip
        assert {row[2] for row in rows} == {""}, "each sink is to be told"
        floor = ledger.read(lambda c: c.execute(text("SELECT * FROM cf_id_floor")).one())
        assert tuple(floor) == (1, 99, 77)
        assert list(ledger.read(lambda c: list(integrity.seal_problems(c)))) == []
        assert list(ledger.read(lambda c: list(visibility.differences(c)))) == []
    copy = schema.backup_of(settings.database)
    assert str(copy) in caplog.text
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (12,)
        assert connection.execute("SELECT count(*) FROM cf_output").fetchone() == (4,)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    before = copy.stat()
    with open_ledger(settings.database):
        assert copy.stat() == before, "a ledger that is up to date is not copied"


def test_a_ledger_that_cannot_be_copied_is_not_migrated(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    release_before(settings, monkeypatch)
    copy = schema.backup_of(settings.database)
    (copy.with_name(f"{copy.name}.part") / "in the way").mkdir(parents=True)
    before = settings.database.path.read_bytes()
    with (
        pytest.raises(LedgerError, match="cannot be copied") as refused,
        open_ledger(settings.database),
    ):
        pass
    assert "make room" in refused.value.hint
    assert not copy.exists()
    assert settings.database.path.read_bytes() == before


@pytest.mark.parametrize("point", ["schema.copied", "schema.backed_up"])
def test_a_kill_after_the_copy_is_made_leaves_the_ledger_to_the_next_start(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    release_before(settings, monkeypatch)

    class Killed(BaseException):
        pass

    def kill(name: str) -> None:
        if name == point:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(schema, "crashpoint", kill)
        with open_ledger(settings.database):
            pass
    with open_ledger(settings.database) as ledger:
        assert ledger.read(lambda c: list(visibility.differences(c))) == []
    assert schema.backup_of(settings.database).exists()


def test_a_new_ledger_is_not_copied(settings: Settings) -> None:
    with open_ledger(settings.database):
        pass
    assert not schema.backup_of(settings.database).exists()
