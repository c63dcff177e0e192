"""SQLite sinks of earlier releases: read as they are, and converted by `upgrade`."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from casparian_flow.engine.sinks.sql_sink import SchemaOf
from casparian_flow.engine.sinks.sqlite import SqliteSink
from casparian_flow.errors import SinkConflict, SinkUnavailable
from casparian_flow.protocol import Output, State
from tests.sinks import forks
from tests.sinks.earlier import Earlier
from tests.sinks.stages import TOPIC, Place

THEIRS = """
CREATE VIEW theirs AS SELECT name, count(*) AS n FROM sales GROUP BY name;
CREATE VIEW theirs_of_jobs AS SELECT id, _cf_job_id, _cf_plugin_version FROM sales;
CREATE INDEX by_name ON sales (name);
CREATE UNIQUE INDEX by_id ON sales (id, _cf_job_id);
CREATE TABLE log (id, job, name);
CREATE TRIGGER noted AFTER INSERT ON sales
BEGIN INSERT INTO log VALUES (NEW.id, NEW._cf_job_id, (SELECT count(*) FROM sales)); END;
"""
"""What users made around a topic."""


@pytest.fixture
def home() -> Iterator[Path]:
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def ask(place: Place, query: str) -> list[Any]:
    with closing(sqlite3.connect(place.database, isolation_level=None)) as connection:
        return connection.execute(query).fetchall()


def run(place: Place, script: str) -> None:
    with closing(sqlite3.connect(place.database, isolation_level=None)) as connection:
        connection.executescript(script)


def seen(place: Place, *topics: str) -> dict[str, list[str]]:
    """What readers see: rows in any order, the columns in their order."""
    return {topic: sorted(repr(row) for row in place.rows(topic)) for topic in topics or [TOPIC]}


def a_week(place: Place) -> list[Output]:
    """Four outputs of one topic, of which one is retracted and one replaced; and an empty one."""
    earlier = Earlier(place)
    earlier.topic(TOPIC, "id INTEGER, name TEXT", "late REAL")
    outputs = [
        earlier.add(place.output(1, mode="replace"), [(1, "a", None), (2, None, 0.5)]),
        earlier.add(place.output(2), [(3, "b", 1.0)]),
        earlier.add(place.output(3), [(4, "c", 2.0), (5, "c", None)], "retracted"),
        earlier.add(place.output(4, mode="replace"), [(6, "d", None)], "replaced"),
        earlier.add(place.output(5, topic="nothing", mode="replace"), []),
    ]
    states = [State.CURRENT, State.CURRENT, State.RETRACTED, State.HIDDEN, State.CURRENT]
    return [msgspec.structs.replace(o, state=s) for o, s in zip(outputs, states, strict=True)]


def test_an_earlier_sink_is_read_and_not_written(sqlite: Place) -> None:
    outputs = a_week(sqlite)
    before = sqlite.database.read_bytes()
    assert sqlite.check(outputs) == []
    found = {output.output_key: output for output in sqlite.sink.records(())}
    assert {key: output.state for key, output in found.items()} == {
        output.output_key: output.state for output in outputs
    }
    assert all(found[o.output_key].path == o.path for o in outputs)
    (outcome,) = sqlite.publish(sqlite.sealed({"id": [9]}, 9))
    assert isinstance(outcome, SinkUnavailable)
    assert outcome.hint == "casparian upgrade"
    for act in (sqlite.sink.change, sqlite.sink.delete):
        with pytest.raises(SinkUnavailable) as refused:
            act(outputs[:1])
        assert refused.value.hint == "casparian upgrade"
    assert sqlite.database.read_bytes() == before


def test_check_of_an_earlier_sink_sees_harm(sqlite: Place) -> None:
    outputs = a_week(sqlite)
    run(sqlite, "DELETE FROM sales WHERE id = 2")
    (fault,) = sqlite.check(outputs)
    assert "1 rows of job 1 instead of the 2" in fault
    wrong = [msgspec.structs.replace(outputs[1], state=State.RETRACTED)]
    assert "as shown" in sqlite.check(wrong)[0]


def test_readers_see_the_same_rows_after_an_upgrade(sqlite: Place) -> None:
    outputs = a_week(sqlite)
    before, columns = seen(sqlite), list(sqlite.rows()[0])
    (said,) = sqlite.sink.upgrade()
    assert said.startswith(f"{sqlite.database}:{TOPIC}: 3 outputs converted; digest ")
    assert seen(sqlite) == before
    assert list(sqlite.rows()[0]) == columns == [
        "id", "name", "_cf_file_version_id", "_cf_job_id", "_cf_source_hash",
        "_cf_plugin_version", "late",
    ]  # fmt: skip
    assert sqlite.sink.upgrade() == []
    kept = [outputs[number] for number in (0, 1, 2, 4)]
    assert sqlite.check(kept) == []
    assert ask(sqlite, "SELECT name FROM sqlite_master WHERE name LIKE '%earlier%' "
                       "OR name LIKE '_cf_retracted%' OR name LIKE '_cf_job%'") == []  # fmt: skip
    assert ask(sqlite, "PRAGMA integrity_check") == [("ok",)]


def test_an_upgraded_sink_goes_on(sqlite: Place) -> None:
    outputs = a_week(sqlite)
    sqlite.sink.upgrade()
    sqlite.tell(State.CURRENT, outputs[2])
    assert sorted(row["id"] for row in sqlite.rows()) == [1, 2, 3, 4, 5]
    sqlite.tell(State.HIDDEN, outputs[0])
    sqlite.show(sqlite.sealed({"id": [7], "new": ["x"]}, 7))
    assert [(row["id"], row["new"], row["_cf_job_id"]) for row in sqlite.rows()][-1] == (7, "x", 7)
    sqlite.sink.delete([outputs[1]])
    assert sorted(row["id"] for row in sqlite.rows()) == [4, 5, 7]
    sqlite.show(sqlite.sealed({"id": [6]}, 4))  # the rows that were replaced, worked again
    assert sorted(row["id"] for row in sqlite.rows()) == [4, 5, 6, 7]


def test_what_users_made_around_a_topic_goes_on_working(sqlite: Place) -> None:
    a_week(sqlite)
    run(sqlite, THEIRS)
    views = {name: ask(sqlite, f"SELECT * FROM {name}") for name in ("theirs", "theirs_of_jobs")}
    texts = ask(sqlite, "SELECT sql FROM sqlite_master WHERE name LIKE 'theirs%'")
    (said,) = sqlite.sink.upgrade()
    assert "'by_id' is no longer unique" in said
    assert {name: ask(sqlite, f"SELECT * FROM {name}") for name in views} == views
    assert ask(sqlite, "SELECT sql FROM sqlite_master WHERE name LIKE 'theirs%'") == texts
    assert ask(sqlite, "SELECT * FROM log") == []
    sqlite.show(sqlite.sealed({"id": [7], "name": ["b"]}, 7))
    assert ask(sqlite, "SELECT id, job FROM log") == [(7, 7)]
    assert ask(sqlite, "SELECT n FROM theirs WHERE name = 'b'") == [(2,)]
    assert ask(sqlite, "SELECT * FROM theirs_of_jobs WHERE id = 7") == [(7, 7, "1.2.3")]
    (plan,) = ask(sqlite, "EXPLAIN QUERY PLAN SELECT 1 FROM sales WHERE name = 'b'")[:1]
    assert "by_name" in plan[3]


def test_a_sink_of_the_first_release(sqlite: Place) -> None:
    earlier = Earlier(sqlite, is_first=True)
    earlier.topic(TOPIC, "id INTEGER")
    outputs = [earlier.add(sqlite.output(job), [(job,), (job,)]) for job in (1, 2)]
    assert sqlite.check(outputs) == []
    assert [found.job_id for found in sqlite.sink.records(())] == [1, 2]
    before = seen(sqlite)
    assert len(sqlite.sink.upgrade()) == 1
    assert seen(sqlite) == before
    assert sqlite.check(outputs) == []
    found = [*sqlite.sink.records(())]
    assert [(f.content_hash, f.plugin_version, f.mode) for f in found] == [
        ("ab" * 32, "1.2.3", "append")
    ] * 2
    sqlite.tell(State.RETRACTED, outputs[0])
    assert [row["id"] for row in sqlite.rows()] == [2, 2]


def test_rows_that_users_inserted_stay_to_be_seen(sqlite: Place) -> None:
    outputs = a_week(sqlite)
    run(sqlite, "INSERT INTO sales (id) VALUES (90), (91);"
                "INSERT INTO sales (id, _cf_job_id) VALUES (92, 1)")  # fmt: skip
    before = seen(sqlite)
    (said,) = sqlite.sink.upgrade()
    assert "2 rows that Casparian Flow did not write stay current" in said
    assert seen(sqlite) == before
    kept = [outputs[number] for number in (0, 1, 2, 4)]
    assert sqlite.check(kept) == []
    assert {o.output_key for o in sqlite.sink.records(())} == {o.output_key for o in kept}
    (outcome,) = sqlite.publish(sqlite.sealed({"id": [7]}, 7, mode="error"))
    assert isinstance(outcome, SinkConflict)
    assert "3 rows" in outcome.message


def test_outputs_of_two_ledgers_with_equal_ids(sqlite: Place) -> None:
    """Both gave the same ids to the same content: their rows are alike; one is retracted."""
    earlier = Earlier(sqlite)
    earlier.topic(TOPIC, "id INTEGER")
    states = {"ours": "shown", "theirs": "shown", "gone": "retracted"}
    outputs = {
        name: earlier.add(sqlite.output(1, key=name), [(1,), (2,)], state)
        for name, state in states.items()
    }
    sqlite.sink.upgrade()
    assert sqlite.check([outputs["ours"], outputs["theirs"]]) == []
    assert [row["id"] for row in sqlite.rows()] == [1, 2, 1, 2]
    sqlite.tell(State.HIDDEN, outputs["ours"])
    assert [row["id"] for row in sqlite.rows()] == [1, 2]
    sqlite.tell(State.CURRENT, outputs["gone"])
    assert len(sqlite.rows()) == 4


def test_topics_that_are_named_like_other_topics_views(sqlite: Place) -> None:
    earlier = Earlier(sqlite)
    names = (TOPIC, "sales_history", "sales_current")
    for number, name in enumerate(names, start=1):
        earlier.topic(name, "id INTEGER")
        earlier.add(sqlite.output(number, topic=name), [(number,)])
    before = seen(sqlite, *names)
    assert len(sqlite.sink.upgrade()) == 3
    assert seen(sqlite, *names) == before


def test_a_column_that_only_retracted_rows_have(sqlite: Place) -> None:
    a_week(sqlite)
    run(sqlite, "ALTER TABLE sales DROP COLUMN late")
    before = ask(sqlite, "SELECT * FROM sqlite_master")
    with pytest.raises(SinkConflict, match="column 'late'"):
        sqlite.sink.upgrade()
    assert ask(sqlite, "SELECT * FROM sqlite_master") == before


def test_a_topic_whose_table_users_exchanged_is_left_alone(sqlite: Place) -> None:
    outputs = a_week(sqlite)
    run(sqlite, "ALTER TABLE sales RENAME TO mine; CREATE VIEW sales AS SELECT id FROM mine")
    before = seen(sqlite, TOPIC, "mine")
    assert sqlite.sink.upgrade() == []
    assert seen(sqlite, TOPIC, "mine") == before
    assert len(sqlite.check(outputs[:2])) == 2
    (outcome,) = sqlite.publish(sqlite.sealed({"id": [7]}, 7))
    assert isinstance(outcome, SinkConflict)


def test_two_processes_upgrade_once(sqlite: Place) -> None:
    class Late(SqliteSink):
        """Begins its transaction after another process has upgraded."""

        @contextmanager
        def writing(self, outputs: Sequence[Output]) -> Iterator[SchemaOf]:
            assert len(SqliteSink(self.path).upgrade()) == 1
            with super().writing(outputs) as schema_of:
                yield schema_of

    a_week(sqlite)
    before = seen(sqlite)
    assert Late(sqlite.database).upgrade() == []
    assert seen(sqlite) == before


def test_an_upgrade_that_has_no_room_changes_nothing(sqlite: Place) -> None:
    a_week(sqlite)
    before = seen(sqlite)
    opened = sqlite3.connect

    def limited(*args: Any, **named: Any) -> Any:
        connection = opened(*args, **named)
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", limited)
        with pytest.raises(SinkUnavailable, match="full"):
            sqlite.sink.upgrade()
    assert seen(sqlite) == before
    assert len(sqlite.sink.upgrade()) == 1


def test_an_upgrade_that_is_killed(home: Path) -> None:
    """At any crash point: the database is as it was, or upgraded; again, and it is upgraded."""
    place = Place("sqlite", home / "place")
    place.home.mkdir()
    outputs = a_week(place)
    run(place, THEIRS)
    shutil.copytree(place.home, home / "fresh")
    before = seen(place)
    number = 0
    while True:
        number += 1
        shutil.rmtree(place.home)
        shutil.copytree(home / "fresh", place.home)
        if not forks.dies(place.sink.upgrade, number):
            break
        assert seen(place) == before, f"crash point {number}"
        place.sink.upgrade()
        assert place.sink.upgrade() == []
        assert seen(place) == before, f"crash point {number}"
        assert place.check([outputs[n] for n in (0, 1, 2, 4)]) == []
        place.show(place.sealed({"id": [7]}, 7))
    assert number > 10, "hardly a crash point was met"
