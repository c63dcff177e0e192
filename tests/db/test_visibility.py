"""What stands, against a restatement of the rules for a small world drawn at random."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from casparian_flow.config import DatabaseSettings
from casparian_flow.db import debts, outputs, schema, visibility
from casparian_flow.db.access import Connection
from casparian_flow.db.states import REMOVED, utcnow
from casparian_flow.db.visibility import Scope
from tests.factories import undone

SINKS = ("sqlite:////a", "sqlite:////b")
MODES = ("append", "replace", "error")


@dataclass
class Job:
    """One job, and what it gave."""

    location: int
    ordinal: int
    plugin: str
    label: int
    """Index of the plugin version."""
    outputs: list[tuple[str, str]]
    """Topic and sink of each."""
    decided: bool = False
    """Whether it is still to be published."""


@dataclass
class World:
    """What happened, in the words of the rules."""

    labels: dict[str, list[str]]
    """Plugin -> the artifact of each of its versions, as deployed."""
    active: dict[str, int | None]
    gone: set[int]
    takes_along: bool
    """Whether a deleted file takes its rows along."""
    jobs: list[Job]
    retracted: set[tuple[int, int]]
    """Location and ordinal."""
    forgotten: set[int]
    removed: set[int]
    """Numbers of outputs, in the order of jobs."""
    modes: dict[tuple[str, str, str], str] = field(default_factory=dict)

    def every(self) -> list[tuple[Job, str, str]]:
        """Job, topic and sink of each output."""
        return [(job, topic, sink) for job in self.jobs for topic, sink in job.outputs]

    def artifact(self, job: Job) -> str:
        return self.labels[job.plugin][job.label]

    def mode(self, number: int) -> str:
        job, topic, sink = self.every()[number]
        return self.modes.get((job.plugin, topic, sink), "append")


@st.composite
def worlds(draw: st.DrawFn, decided: bool = False) -> World:
    labels = {p: draw(st.lists(st.sampled_from("xyz"), min_size=1, max_size=4)) for p in "pq"}
    active = {p: draw(st.none() | st.integers(0, len(labels[p]) - 1)) for p in "pq"}
    places = st.lists(
        st.sampled_from([(topic, sink) for topic in "tu" for sink in SINKS]), unique=True
    )
    jobs, taken = [], set()
    for _ in range(draw(st.integers(0, 9))):
        plugin = draw(st.sampled_from("pq"))
        key = (
            draw(st.integers(1, 2)), draw(st.integers(1, 3)), plugin,
            draw(st.integers(0, len(labels[plugin]) - 1)),
        )  # fmt: skip
        if key not in taken:
            taken.add(key)
            jobs.append(Job(*key, draw(places)))
    if decided and jobs:
        # Of one version and artifact there is one job by now, as `jobs.enqueue` sees to it.
        seen = set()
        kept = []
        for job in jobs:
            mark = (job.location, job.ordinal, job.plugin, labels[job.plugin][job.label])
            if mark not in seen:
                seen.add(mark)
                kept.append(job)
        jobs = kept
        for job in jobs[draw(st.integers(0, len(jobs))) :]:
            job.decided = True
    count = sum(len(job.outputs) for job in jobs)
    numbers = st.sets(st.integers(0, max(count - 1, 0)), max_size=2)
    published = {
        n for n, job in enumerate(job for job in jobs for _ in job.outputs) if not job.decided
    }
    return World(
        labels,
        active,
        draw(st.sets(st.integers(1, 2))),
        draw(st.booleans()),
        jobs,
        draw(st.sets(st.tuples(st.integers(1, 2), st.integers(1, 3)), max_size=2)),
        draw(numbers) & published,
        draw(numbers) & published,
        {
            (p, topic, sink): draw(st.sampled_from(MODES))
            for p in "pq"
            for topic in "tu"
            for sink in SINKS
            if draw(st.booleans())
        },
    )


def expected(world: World, *, sinks_apart: bool = True) -> dict[int, str]:
    """The rules, one output at a time."""
    every = world.every()
    last = {}
    for number, (job, topic, sink) in enumerate(every):
        last[job.location, job.ordinal, world.artifact(job), job.plugin, topic, sink] = number

    def counts(number: int) -> bool:
        job, topic, sink = every[number]
        mine = (job.location, job.ordinal, world.artifact(job), job.plugin, topic, sink)
        return number not in world.forgotten | world.removed and last[mine] == number

    here = [n for n in range(len(every)) if counts(n)]
    if not sinks_apart:
        here = [n for n in here if not any(m < n and every[m][:2] == every[n][:2] for m in here)]

    def slot(number: int) -> tuple[object, ...]:
        job, topic, sink = every[number]
        return job.location, job.plugin, topic, sink if sinks_apart else ""

    def is_better(one: int, other: int) -> bool:
        """Whether an output of the same version stands rather than the other."""
        a, b = every[one][0], every[other][0]
        x, y = world.artifact(a), world.artifact(b)
        labels, index = world.labels[a.plugin], world.active[a.plugin]
        if x != y:
            if index is not None and labels[index] in (x, y):
                return labels[index] == x
            return max(n for n, has in enumerate(labels) if has == x) > max(
                n for n, has in enumerate(labels) if has == y
            )
        return world.jobs.index(a) > world.jobs.index(b)

    states = {n: REMOVED for n in range(len(every)) if n not in here}
    for n in here:
        job = every[n][0]
        rivals = [m for m in here if m != n and slot(m) == slot(n)]
        same = [m for m in rivals if every[m][0].ordinal == job.ordinal]
        if any(is_better(m, n) for m in same):
            states[n] = "hidden"
        elif (job.location, job.ordinal) in world.retracted:
            states[n] = "retracted"
        elif job.location in world.gone and world.takes_along:
            states[n] = "hidden"
        elif any(every[m][0].ordinal > job.ordinal for m in rivals):
            states[n] = "past"
        else:
            states[n] = "current"
    return states


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> DatabaseSettings:
    file = tmp_path_factory.mktemp("ledger") / "ledger.sqlite3"
    database = DatabaseSettings(db_location=str(file))
    schema.bring_up_to_date(database)
    return database


def lay(connection: Connection, world: World) -> list[int]:
    """Write a world into the ledger; the ids of its outputs, by number."""

    def insert(table: str, **values: Any) -> None:
        names, marks = ", ".join(values), ", ".join(f":{name}" for name in values)
        connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({marks})"), values)

    keeps = "retract" if world.takes_along else "keep"
    insert("cf_source_root", id=1, path="/r", name="r", active=1, ignore="", settle_seconds=0,
           on_delete=keeps)  # fmt: skip
    insert("cf_directory", id=1, source_root_id=1, path=b"")
    for place in (1, 2):
        insert("cf_file_location", id=place, source_root_id=1, directory_id=1,
               path=b"%d" % place, rel_path=str(place), discovered_at="", problem="", racy=0,
               gone_at=str(utcnow()) if place in world.gone else None)  # fmt: skip
        for ordinal in (1, 2, 3):
            insert("cf_file_version", id=10 * place + ordinal, location_id=place, ordinal=ordinal,
                   content_hash=f"{place}{ordinal}" * 32, size_bytes=1, detected_at="")  # fmt: skip
    plugin_ids = {}
    for plugin, labels in world.labels.items():
        for number, artifact in enumerate(labels):
            plugin_ids[plugin, number] = len(plugin_ids) + 1
            insert("cf_plugin", id=len(plugin_ids), name=plugin, version=f"1.0.{number}",
                   source=b"", lock="", manifest=json.dumps({"topics": ["t", "u"]}),
                   artifact_hash=plugin + artifact, public_key=b"", signature=b"", publisher="",
                   deployed_at="")  # fmt: skip
        index = world.active[plugin]
        insert("cf_plugin_config", plugin_name=plugin, subscription_tags="",
               active_version=None if index is None else f"1.0.{index}")  # fmt: skip
    for (plugin, topic, sink), mode in world.modes.items():
        insert("cf_topic_config", plugin_name=plugin, topic_name=topic,
               uri=f"{sink}?mode={mode}" if mode == "replace" else sink, mode=mode)  # fmt: skip
    ids: list[int] = []
    for number, job in enumerate(world.jobs, 1):
        insert("cf_processing_queue", id=number, file_version_id=10 * job.location + job.ordinal,
               plugin_id=plugin_ids[job.plugin, job.label], plugin_name=job.plugin, priority=0,
               status="COMMITTING" if job.decided else "COMPLETED", fence=1, attempts=1,
               not_before=0, reason="", created_at="")  # fmt: skip
        for topic, sink in job.outputs:
            ids.append(len(ids) + 1)
            key = f"{job.location} {job.ordinal} {world.artifact(job)} {job.plugin} {topic} {sink}"
            insert("cf_output", id=ids[-1], job_id=number, topic=topic, uri=sink, location=sink,
                   mode="append", output_key=key, state="PLANNED" if job.decided else "PUBLISHED",
                   stage="", target="", rows=number, size_bytes=1, digest="",
                   published_at=None if job.decided else "now")  # fmt: skip
            if ids[-1] - 1 in world.forgotten:
                sql = "INSERT OR IGNORE INTO cf_forgotten_output VALUES (:key, '')"
                connection.execute(text(sql), {"key": key})
            if ids[-1] - 1 in world.removed:
                insert("cf_visibility", output_id=ids[-1], state=REMOVED, mode="append", told="",
                       changed_at="")  # fmt: skip
    for place, ordinal in world.retracted:
        insert("cf_retracted_version", file_version_id=10 * place + ordinal, retracted_at="")
    return ids


def without_twins(world: World) -> World:
    """A forgotten output's key is forgotten for every output that has it."""
    every = world.every()
    keys = {
        (job.location, job.ordinal, world.artifact(job), job.plugin, topic, sink)
        for n, (job, topic, sink) in enumerate(every)
        if n in world.forgotten
    }
    world.forgotten = {
        n
        for n, (job, topic, sink) in enumerate(every)
        if (job.location, job.ordinal, world.artifact(job), job.plugin, topic, sink) in keys
    }
    return world


def states(connection: Connection) -> dict[int, str]:
    rows = connection.execute(text("SELECT output_id, state FROM cf_visibility"))
    return {row[0]: row[1] for row in rows}


def anew(test: Any) -> Any:
    """Many worlds in one ledger, each taken back."""
    return settings(
        deadline=None,
        max_examples=60,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )(test)


@anew
@given(worlds().map(without_twins))
def test_what_stands_is_what_the_rules_say(database: DatabaseSettings, world: World) -> None:
    with undone(database) as connection:
        ids = lay(connection, world)
        visibility.refresh(connection)
        wanted = {ids[number]: state for number, state in expected(world).items()}
        assert states(connection) == wanted
        assert list(visibility.differences(connection)) == []
        alone = expected(world, sinks_apart=False)
        found = {row["id"]: row["latest"] for row in visibility.committed(connection)}
        assert found == {
            ids[number]: state == "current"
            for number, state in alone.items()
            if state in ("current", "past")
        }


def test_where_the_active_artifact_has_none_that_of_the_last_deployment_stands(
    database: DatabaseSettings,
) -> None:
    """Whichever job was the later one."""
    jobs = [Job(1, 1, "p", 1, [("t", SINKS[0])]), Job(1, 1, "p", 0, [("t", SINKS[0])])]
    world = World({"p": ["x", "y", "z"], "q": ["x"]}, {"p": 2, "q": 0}, set(), False, jobs,
                  set(), set(), set())  # fmt: skip
    with undone(database) as connection:
        lay(connection, world)
        visibility.refresh(connection)
        assert states(connection) == {1: "current", 2: "hidden"}


FOLLOWS = World(
    {"p": ["x"], "q": ["x"]}, {"p": 0, "q": None}, set(), False,
    [Job(1, 1, "p", 0, [("t", SINKS[0])]), Job(1, 2, "p", 0, [("t", SINKS[0])], decided=True)],
    set(), set(), set(),
)  # fmt: skip
"""What is decided takes the place of what is published."""


@anew
@given(worlds(decided=True).map(without_twins))
@example(FOLLOWS)
def test_jobs_of_one_group_are_published_as_if_one_after_another(
    database: DatabaseSettings, world: World
) -> None:
    """Afterwards no sink is to be told anything, except of jobs that wrote to both."""
    with undone(database) as connection:
        ids = lay(connection, world)
        visibility.refresh(connection)
        connection.execute(text("UPDATE cf_visibility SET told = state || '/' || mode"))
        parts = debts.publications(connection, str, ())
        shown: dict[str, str] = {}
        wrote_twice = set()
        for part in parts:
            if not part.is_whole:
                wrote_twice.add(part.job_id)
            for output in [*part.publication.outputs, *part.publication.changes]:
                assert output.location == part.store
                shown[output.output_key] = output.state
        for part in parts:
            done = dict(zip(part.output_ids, part.publication.outputs, strict=True))
            outputs.mark_published(connection, done)
        for part in parts:
            changes = zip(part.change_ids, part.publication.changes, strict=True)
            debts.told(connection, {n: (o.state, o.mode) for n, o in changes})
        connection.execute(text("UPDATE cf_processing_queue SET status = 'COMPLETED'"))
        visibility.refresh(connection)
        wanted = {ids[number]: state for number, state in expected(world).items()}
        assert states(connection) == wanted
        slots = {
            (job.location, job.plugin)
            for number, job in enumerate(world.jobs, 1)
            if number in wrote_twice
        }
        owed = {
            (int(debt.output.path), debt.output.plugin)
            for group in debts.owed(connection).values()
            for debt in group
        }
        assert owed <= slots


@anew
@given(worlds(), st.data())
def test_a_part_of_the_ledger_is_refreshed_as_the_whole(
    database: DatabaseSettings, world: World, data: st.DataObject
) -> None:
    """Each cause changes only outputs in its scope."""
    scope = data.draw(
        st.sampled_from([Scope(locations=[1]), Scope(plugin="p"), Scope(plugin="q", topic="t")])
    )
    with undone(database) as connection:
        lay(connection, world)
        visibility.refresh(connection)
        before = states(connection)
        if scope.locations:
            connection.execute(text("DELETE FROM cf_retracted_version WHERE file_version_id < 20"))
        elif scope.topic is None:
            connection.execute(
                text("UPDATE cf_plugin_config SET active_version = '1.0.0' WHERE plugin_name = 'p'")
            )
        else:
            connection.execute(
                text("DELETE FROM cf_topic_config WHERE plugin_name = 'q' AND topic_name = 't'")
            )
        visibility.refresh(connection, scope)
        after = states(connection)
        visibility.refresh(connection)
        assert states(connection) == after
        assert before.keys() == after.keys()


def test_the_sink_is_owed_a_state_and_a_mode(database: DatabaseSettings) -> None:
    world = World({"p": ["x"], "q": ["x"]}, {"p": 0, "q": 0}, set(), False,
                  [Job(1, 1, "p", 0, [("t", SINKS[0])]), Job(1, 2, "p", 0, [("t", SINKS[0])])],
                  set(), set(), set())  # fmt: skip
    with undone(database) as connection:
        lay(connection, world)
        assert visibility.refresh(connection) == (2, 3, 0, 0, 2)
        (owed,) = debts.owed(connection).values()
        told = {d.output_id: (str(d.output.state), d.output.mode) for d in owed}
        assert told == {1: ("past", "append"), 2: ("current", "append")}
        debts.told(connection, told)
        assert debts.owed(connection) == {}
        connection.execute(
            text(
                "INSERT INTO cf_topic_config (plugin_name, topic_name, uri, mode) "
                f"VALUES ('p', 't', '{SINKS[0]}', 'replace')"
            )
        )
        change = visibility.refresh(connection, Scope(plugin="p", topic="t"))
        assert change == (0, 0, 1, 1, 0)
        assert change.words == "1 output (1 row) is hidden now"
        (owed,) = debts.owed(connection).values()
        assert [(d.output_id, d.output.state, d.output.mode) for d in owed] == [
            (1, "past", "replace"), (2, "current", "replace"),
        ]  # fmt: skip


def test_what_does_not_stand_is_removed_in_time(database: DatabaseSettings) -> None:
    world = World({"p": ["x", "y"], "q": ["x"]}, {"p": 1, "q": 0}, set(), False,
                  [Job(1, 1, "p", 0, [("t", SINKS[0])]), Job(1, 1, "p", 1, [("t", SINKS[0])])],
                  set(), set(), set())  # fmt: skip
    with undone(database) as connection:
        lay(connection, world)
        visibility.refresh(connection)
        assert states(connection) == {1: "hidden", 2: "current"}
        assert not visibility.has_expired(connection, utcnow() - timedelta(days=1))
        assert visibility.has_expired(connection, utcnow())
        assert visibility.remove_expired(connection, utcnow()) == 1
        visibility.refresh(connection)
        assert states(connection) == {1: REMOVED, 2: "current"}
        (owed,) = debts.owed(connection).values()
        assert [d.output_id for d in owed if d.is_expired] == [1]


def test_what_a_gone_file_took_along_waits_for_its_return(database: DatabaseSettings) -> None:
    world = World({"p": ["x"], "q": ["x"]}, {"p": 0, "q": 0}, {1}, True,
                  [Job(1, 1, "p", 0, [("t", SINKS[0])])], set(), set(), set())  # fmt: skip
    with undone(database) as connection:
        lay(connection, world)
        visibility.refresh(connection)
        assert states(connection) == {1: "hidden"}
        assert not visibility.has_expired(connection, utcnow())
        connection.execute(text("UPDATE cf_file_location SET gone_at = NULL"))
        visibility.refresh(connection, Scope(locations=[1]))
        assert states(connection) == {1: "current"}


@pytest.mark.slow
def test_twenty_thousand_outputs_are_read_in_time(
    database: DatabaseSettings, tmp_path: Path
) -> None:
    with undone(database) as connection:
        lay(connection, World({"p": ["x"], "q": ["x"]}, {"p": 0, "q": 0}, set(), False, [],
                              set(), set(), set()))  # fmt: skip
        numbers = "WITH RECURSIVE n(i) AS (SELECT 100 UNION ALL SELECT i + 1 FROM n LIMIT 20000)"
        for statement in (
            "INSERT INTO cf_file_location (id, source_root_id, directory_id, path, rel_path, "
            f"discovered_at, problem, racy) {numbers} SELECT i, 1, 1, CAST(i AS BLOB), i, '', '', 0"
            " FROM n",
            "INSERT INTO cf_file_version (id, location_id, ordinal, content_hash, size_bytes, "
            f"detected_at) {numbers} SELECT i, i, 1, '{'0' * 64}', 1, '' FROM n",
            "INSERT INTO cf_processing_queue (id, file_version_id, plugin_id, plugin_name, "
            "priority, status, fence, attempts, not_before, reason, created_at) "
            f"{numbers} SELECT i, i, 1, 'p', 0, 'COMPLETED', 1, 1, 0, '', '' FROM n",
            "INSERT INTO cf_output (id, job_id, topic, uri, location, mode, output_key, state, "
            "stage, target, rows, size_bytes, digest, published_at) "
            f"{numbers} SELECT i, i, 't', 'u', 'u', 'append', i, 'PUBLISHED', '', '', 1, 1, '', ''"
            " FROM n",
        ):
            connection.execute(text(statement))
        visibility.refresh(connection)
        started = utcnow()
        assert len(visibility.committed(connection)) == 20_000
        seconds = (utcnow() - started).total_seconds()
        print(f"{seconds:.3f} s")
        assert seconds < 1.5  # 0.2 s on an idle machine
