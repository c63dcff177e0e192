"""`verify` finds that readers see too much, too little or the wrong thing, and nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sqlalchemy import text

from casparian_flow.config import DatabaseSettings, Settings
from casparian_flow.db import promises, schema, visibility
from casparian_flow.db.access import Connection, Ledger
from casparian_flow.db.routing import Routing
from casparian_flow.db.states import REMOVED
from casparian_flow.services.scan import scan
from casparian_flow.services.verify import verify
from tests.daemons import work_off
from tests.db.test_visibility import SINKS, Job, World, anew, lay, states, without_twins, worlds
from tests.factories import add_root, undone
from tests.plugs import ROWS, publish


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> DatabaseSettings:
    file = tmp_path_factory.mktemp("ledger") / "ledger.sqlite3"
    database = DatabaseSettings(db_location=str(file))
    schema.bring_up_to_date(database)
    return database


@anew
@given(worlds().map(without_twins), st.data())
def test_whatever_differs_from_what_stands_is_a_broken_promise(
    database: DatabaseSettings, world: World, data: st.DataObject
) -> None:
    world.removed.clear()
    with undone(database) as connection:
        lay(connection, world)
        visibility.refresh(connection)
        assert list(promises.broken(connection)) == []
        right = {number: state for number, state in states(connection).items() if state != REMOVED}
        if right:
            number = data.draw(st.sampled_from(sorted(right)))
            place = 1 + world.jobs.index(world.every()[number - 1][0])
            withdrawn = world.takes_along and world.jobs[place - 1].location in world.gone
            other = data.draw(st.sampled_from(["current", "past", "hidden", "retracted"]))
            # What a gone file takes along is hidden, whatever else; only `differences` asks that.
            assume(other != right[number] and not withdrawn)
            change = text("UPDATE cf_visibility SET state = :other WHERE output_id = :number")
            connection.execute(change, {"other": other, "number": number})
            assert list(promises.broken(connection))


def worked(*states_of: tuple[int, str, str]) -> Callable[[Connection], list[str]]:
    """The findings about versions of a file that were worked: (ordinal, artifact, state) each."""

    def findings(connection: Connection) -> list[str]:
        jobs = [
            Job(1, ordinal, "p", "xy".index(artifact), [("t", SINKS[0])])
            for ordinal, artifact, _ in states_of
        ]
        world = World({"p": ["x", "y"], "q": ["x"]}, {"p": 0, "q": 0}, set(), False, jobs,
                      set(), set(), set())  # fmt: skip
        lay(connection, world)
        visibility.refresh(connection)
        for number, (_, _, state) in enumerate(states_of, 1):
            connection.execute(
                text("UPDATE cf_visibility SET state = :state WHERE output_id = :number"),
                {"state": state, "number": number},
            )
        return list(promises.broken(connection))

    return findings


@pytest.mark.parametrize(
    ("ledger_of", "said"),
    [
        (worked((1, "x", "hidden")), "nobody can see: job 1 is COMPLETED"),
        (worked((1, "x", "removed")), "nobody can see: job 1 is COMPLETED"),
        (worked((1, "x", "current"), (1, "y", "current")), "twice, from job 1 and 2"),
        (worked((1, "x", "current"), (2, "x", "current")), "version 2 by plugin p in topic t"),
        (worked((1, "x", "hidden"), (1, "y", "current")), "not those of the plugin's active"),
        (worked((1, "x", "current"), (2, "x", "past")), "a later version was worked"),
        (worked((1, "x", "past"), (2, "x", "hidden")), "no later version was worked"),
        (worked((1, "x", "retracted")), "nobody has retracted the version"),
    ],
)
def test_a_finding_names_file_plugin_and_job(
    database: DatabaseSettings, ledger_of: Callable[[Connection], list[str]], said: str
) -> None:
    with undone(database) as connection:
        found = ledger_of(connection)
    (sentence,) = (line for line in found if said in line)
    assert sentence.startswith("rows of r/1 version ")
    assert "by plugin p in topic t of " in sentence
    assert "(casparian jobs show " in sentence


def test_a_present_file_without_its_job_is_named(
    ledger: Ledger, settings: Settings, source: Path
) -> None:
    (source / "two words.txt").write_text("a\n")
    publish(ledger, settings, "rows", ROWS, "1.0.0")
    root = add_root(ledger, source)
    scan(ledger, root)
    with pytest.raises(RuntimeError):  # taken back: a job is never deleted
        ledger.write(_lose_the_job)
    work_off(settings)
    assert verify(settings, ledger).problems == []


def _lose_the_job(connection: Connection) -> None:
    assert list(promises.broken(connection)) == []
    connection.execute(text("DROP TRIGGER cf_processing_queue_no_delete"))
    connection.execute(text("DELETE FROM cf_processing_queue"))
    (said,) = promises.broken(connection)
    assert "two words.txt version 1 has no job of plugin rows" in said
    assert "(casparian backfill rows --path 'two words.txt')" in said
    connection.execute(text("UPDATE cf_scan_state SET routed = 'by other rules'"))
    assert list(promises.broken(connection)) == []
    raise RuntimeError


def test_a_file_that_comes_back_goes_to_the_plugins_of_now(
    ledger: Ledger, settings: Settings, source: Path
) -> None:
    """It was gone when the plugin was deployed, and its content is not new."""
    (source / "a.txt").write_text("a\n")
    (source / "b.txt").write_text("b\n")
    root = add_root(ledger, source)
    scan(ledger, root)
    (source / "a.txt").rename(source.parent / "a.txt")
    scan(ledger, root)
    publish(ledger, settings, "rows", ROWS, "1.0.0")
    scan(ledger, root)
    (source.parent / "a.txt").rename(source / "a.txt")
    assert len(scan(ledger, root).job_ids) == 1
    work_off(settings)
    assert verify(settings, ledger).problems == []


@pytest.mark.slow
def test_a_hundred_thousand_files_are_checked_in_time(database: DatabaseSettings) -> None:
    with undone(database) as connection:
        _lay_many(connection, 100_000)
        visibility.refresh(connection)
        routed = {"routed": Routing(connection).fingerprint}
        connection.execute(
            text(
                "INSERT INTO cf_scan_state (source_root_id, started, finished, files, unreadable, "
                "unsettled, problem, routed) VALUES (1, 1, 1, 0, 0, 0, '', :routed)"
            ),
            routed,
        )
        started = time.process_time()
        assert list(promises.broken(connection)) == []
        seconds = time.process_time() - started
        print(f"{seconds:.1f} s")
        assert seconds < 8


def _lay_many(connection: Connection, count: int) -> None:
    """Files that match a rule, each worked by one plugin with two topics."""
    lay(connection, World({"p": ["x"], "q": ["x"]}, {"p": 0, "q": 0}, set(), False, [],
                          set(), set(), set()))  # fmt: skip
    connection.execute(text("UPDATE cf_plugin_config SET subscription_tags = plugin_name"))
    numbers = f"WITH RECURSIVE n(i) AS (SELECT 100 UNION ALL SELECT i + 1 FROM n LIMIT {count})"
    outputs = json.dumps(["t", "u"])
    for statement in (
        "INSERT INTO cf_routing_rule (pattern, tag, priority, any_case) "
        "VALUES ('in/**/*.txt', 'p', 0, 1)",
        "INSERT INTO cf_file_location (id, source_root_id, directory_id, path, rel_path, "
        f"discovered_at, problem, racy) {numbers} SELECT i, 1, 1, "
        "CAST('in/' || i || '.txt' AS BLOB), 'in/' || i || '.txt', '', '', 0 FROM n",
        "INSERT INTO cf_file_version (id, location_id, ordinal, content_hash, size_bytes, "
        f"detected_at) {numbers} SELECT i, i, 1, '{'0' * 64}', 1, '' FROM n",
        "UPDATE cf_file_location SET current_version_id = id WHERE id >= 100",
        "INSERT INTO cf_processing_queue (id, file_version_id, plugin_id, plugin_name, "
        "priority, status, fence, attempts, not_before, reason, created_at) "
        f"{numbers} SELECT i, i, 1, 'p', 0, 'COMPLETED', 1, 1, 0, '', '' FROM n",
        "INSERT INTO cf_output (job_id, topic, uri, location, mode, output_key, state, "
        f"stage, target, rows, size_bytes, digest, published_at) {numbers} "
        "SELECT i, value, 'u', 'u', 'append', i || value, 'PUBLISHED', '', '', 1, 1, '', '' "
        f"FROM n, json_each('{outputs}')",
    ):
        connection.execute(text(statement))
