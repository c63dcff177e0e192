"""What readers see of each published output. `standing` decides; sinks are told.

At most one output stands in a version slot: (version, plugin, topic, sink). At most one of those
is current in the location slot: (location, plugin, topic, sink). `cf_visibility` has the decision
for each published output, and what its sink has confirmed; where they differ, that is a debt.

    refresh         decides anew, after a change of anything that `standing` looks at
    publications    what the sinks are to publish for decided jobs, and what ceases to stand by it
    debts, told     what the sinks are to be told, and that they have been
    committed       what `casparian query` reads
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import Connection

from casparian_flow import sink_uri
from casparian_flow.db.models import PASSED_OVER, REMOVED, RETRACT, utcnow
from casparian_flow.errors import ConfigError, counted
from casparian_flow.protocol import Output, Publication, State

Query = Callable[[str, tuple[Any, ...]], Sequence[Any]]
"""Runs one driver-level statement; its rows."""


Slot = tuple[int | str, ...]
"""Key of a location slot: location, plugin, topic and sink."""


class Facts(NamedTuple):
    """What decides whether a published output stands; one that was removed or forgotten has none.

    Plugin versions with the same bytes are one artifact, deployed when the last of them was.
    """

    output_id: int
    slot: Slot
    version_id: int
    ordinal: int
    is_active: bool
    """Whether its artifact is the plugin's active one."""
    deployed: int
    """Greater for an artifact that was deployed later."""
    job_id: int
    is_retracted: bool
    """Whether its version is."""
    is_withdrawn: bool
    """Whether its file is gone and takes its rows along, or it was left behind in a sink that its
    topic left, or its topic was removed (`db.rebuild`)."""
    generation: int = 0
    """Of its job's outputs; above 0 where they were rebuilt."""
    is_apart: bool = False
    """Whether it takes no place: its rebuild is not complete, or was cancelled."""


def standing(facts: Iterable[Facts]) -> dict[int, State]:
    """Decide the state of each output, given all outputs of the same location slots."""
    states: dict[int, State] = {}
    best: dict[tuple[Slot, int], Facts] = {}
    for one in facts:
        states[one.output_id] = State.HIDDEN
        if one.is_apart:
            continue
        place = (one.slot, one.version_id)
        other = best.get(place)
        if other is None or _rank(one) > _rank(other):
            best[place] = one
    newest: dict[Slot, int] = {}
    for one in best.values():
        if one.ordinal > newest.get(one.slot, 0):
            newest[one.slot] = one.ordinal
    for one in best.values():
        if one.is_retracted:
            states[one.output_id] = State.RETRACTED
        elif not one.is_withdrawn:
            is_newest = one.ordinal == newest[one.slot]
            states[one.output_id] = State.CURRENT if is_newest else State.PAST
    return states


def _rank(one: Facts) -> tuple[bool, int, int, int, int]:
    return one.is_active, one.deployed, one.job_id, one.generation, one.output_id


def is_visible(state: str, mode: str) -> bool:
    """Whether the topic shows it; `protocol.Output.visible` says the same."""
    return state == State.CURRENT or (state == State.PAST and mode != "replace")


SHOWN = "(s.state = 'current' OR s.state = 'past' AND s.mode <> 'replace')"
"""The same, as a condition over the row `s` of `cf_visibility`."""


# Reading the facts.


class Scope(NamedTuple):
    """Outputs whose state may have changed; everything by default."""

    locations: Collection[int] | None = None
    """Ids of file locations."""
    plugin: str | None = None
    topic: str | None = None


EVERYTHING = Scope()


def of_jobs(connection: Connection, job_ids: Iterable[int]) -> Scope:
    """The locations of jobs."""
    query = (
        "SELECT DISTINCT v.location_id FROM cf_processing_queue j "
        "JOIN cf_file_version v ON v.id = j.file_version_id "
        "WHERE j.id IN (SELECT value FROM json_each(?))"
    )
    return Scope(_ids(connection, query, job_ids))


def of_versions(connection: Connection, version_ids: Iterable[int]) -> Scope:
    """The locations of versions."""
    query = (
        "SELECT DISTINCT location_id FROM cf_file_version "
        "WHERE id IN (SELECT value FROM json_each(?))"
    )
    return Scope(_ids(connection, query, version_ids))


def _ids(connection: Connection, query: str, ids: Iterable[int]) -> list[int]:
    return [row[0] for row in _driver(connection)(query, (json.dumps(list(ids)),))]


OF_REBUILD = """
SELECT 1 FROM cf_rebuild_job m JOIN cf_rebuild b ON b.id = m.rebuild_id
WHERE m.job_id = o.job_id AND m.generation = o.generation
"""
"""Whether a rebuild `b` made the output `o`, by its job `m`."""

CANCELLED = f"""
EXISTS ({OF_REBUILD} AND b.outcome = 'cancelled'
        AND m.was NOT IN ('QUEUED', 'RUNNING', 'COMMITTING'))
"""
"""Whether the output `o` was made for a rebuild that was cancelled. Jobs that others had queued
before it are theirs."""

OPEN = f"EXISTS ({OF_REBUILD} AND b.ended_at IS NULL)"

_IGNORED = PASSED_OVER.replace("'", "''")

_WITHDRAWN = f"""
l.gone_at IS NOT NULL AND r.on_delete = '{RETRACT}' AND l.problem <> '{_IGNORED}'
"""
"""Whether the deleted file `l` of the source root `r` took its rows along. What scans pass over is
not deleted."""

# SQLite keeps the order of a CROSS JOIN: it finds the outputs of a few locations by index.
_FACTS = f"""
SELECT o.id, v.location_id, j.plugin_name, o.topic, o.location, v.id, v.ordinal, j.plugin_id,
       o.job_id, EXISTS (SELECT 1 FROM cf_retracted_version WHERE file_version_id = v.id),
       EXISTS (SELECT 1 FROM cf_file_location l JOIN cf_source_root r ON r.id = l.source_root_id
               WHERE l.id = v.location_id AND {_WITHDRAWN}),
       EXISTS (SELECT 1 FROM cf_forgotten_output WHERE output_key = o.output_key),
       o.output_key, o.uri, o.mode, o.rows, o.target, s.state, s.mode, s.told, s.shown_at,
       s.hidden_at, o.state = 'PUBLISHED', o.generation, {OPEN}, {CANCELLED},
       EXISTS (SELECT 1 FROM cf_left_output WHERE output_id = o.id)
FROM cf_file_version v CROSS JOIN cf_processing_queue j ON j.file_version_id = v.id
CROSS JOIN cf_output o ON o.job_id = j.id LEFT JOIN cf_visibility s ON s.output_id = o.id
"""  # noqa: S608


class _Known(NamedTuple):
    """A row of `_FACTS`."""

    facts: Facts
    is_forgotten: bool
    output_key: str
    mode: str
    """The effective one."""
    rows: int
    target: str
    state: str | None
    """None where nothing was decided yet."""
    known_mode: str | None
    told: str
    shown_at: str | None
    hidden_at: str | None
    is_published: bool
    is_cancelled: bool
    """Whether it was made for a rebuild that was cancelled: it is removed."""
    is_left: bool
    """Whether a rebuild left it behind in a sink that its topic left, or its topic was removed. It
    keeps its place, also once it is removed, so that no older version shows instead."""

    @property
    def sink(self) -> str:
        return str(self.facts.slot[-1])

    @property
    def is_candidate(self) -> bool:
        is_removed = self.state == REMOVED and not self.is_left
        return not (self.is_forgotten or self.is_cancelled or is_removed)

    @property
    def is_owed(self) -> bool:
        """Whether the sink has yet to be told what was decided."""
        return self.is_published and self.told != f"{self.state}/{self.known_mode}"


def _read(query: Query, scope: Scope, planned: bool = False) -> Iterator[_Known]:
    """The outputs in a scope that are published.

    Args:
        planned: also those that decided jobs are still to publish.
    """
    artifacts, modes = _artifacts(query), _modes(query)
    for row in _rows(query, scope, planned):
        (number, location, plugin, topic, sink, version, ordinal, plugin_id, job, retracted,
         withdrawn, forgotten, key, uri, mode, *rest) = row  # fmt: skip
        (rows, target, state, known_mode, told, shown_at, hidden_at, published, generation, waits,
         cancelled, left) = rest  # fmt: skip
        is_active, deployed = artifacts.get(plugin_id, (False, 0))
        facts = Facts(
            number, (location, plugin, topic, sink), version, ordinal, is_active, deployed, job,
            bool(retracted), bool(withdrawn or left), generation, bool(waits or cancelled),
        )  # fmt: skip
        # A topic that went elsewhere keeps the mode that it had there.
        effective = modes.get((plugin, topic, uri), known_mode or mode)
        yield _Known(
            facts, bool(forgotten), key, effective, rows, target, state, known_mode, told or "",
            shown_at, hidden_at, bool(published), bool(cancelled), bool(left),
        )  # fmt: skip


def _rows(query: Query, scope: Scope, planned: bool) -> Sequence[Any]:
    which = "o.state = 'PUBLISHED'"
    if planned:
        which = f"({which} OR o.state = 'PLANNED' AND j.status = 'COMMITTING')"
    values: list[Any] = []
    for column, value in (
        ("v.location_id IN (SELECT value FROM json_each(?))", scope.locations),
        ("j.plugin_name = ?", scope.plugin),
        ("o.topic = ?", scope.topic),
    ):
        if value is not None:
            which += f" AND {column}"
            values.append(value if isinstance(value, str) else json.dumps(list(value)))
    return query(f"{_FACTS} WHERE {which} ORDER BY o.id", tuple(values))


def _artifacts(query: Query) -> dict[int, tuple[bool, int]]:
    """Plugin id -> whether its artifact is the active one, and the last id with the artifact."""
    rows = query(
        "SELECT p.id, p.name, p.artifact_hash, p.version = c.active_version FROM cf_plugin p "
        "LEFT JOIN cf_plugin_config c ON c.plugin_name = p.name ORDER BY p.id",
        (),
    )
    last = {(name, artifact): number for number, name, artifact, _ in rows}
    active = {(name, artifact) for _, name, artifact, is_active in rows if is_active}
    return {
        number: ((name, artifact) in active, last[name, artifact])
        for number, name, artifact, _ in rows
    }


def modes(connection: Connection) -> dict[tuple[str, str], dict[str, str]]:
    """(plugin, topic) -> sink URI -> mode, as topics are configured now."""
    found: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for (plugin, topic, uri), mode in _modes(_driver(connection)).items():
        found[plugin, topic][uri] = mode
    return found


def _modes(query: Query) -> dict[tuple[str, str, str], str]:
    """(plugin, topic, sink URI) -> mode, as topics are configured now."""
    modes = {}
    for plugin, topic, written, mode in query(
        "SELECT plugin_name, topic_name, uri, mode FROM cf_topic_config ORDER BY id", ()
    ):
        try:
            uri, own = sink_uri.read(written)  # users also write options into the table
        except ConfigError:
            uri, own = written, ""
        modes[plugin, topic, uri] = own or mode
    return modes


def _driver(connection: Connection) -> Query:
    def query(statement: str, values: tuple[Any, ...]) -> Sequence[Any]:
        with contextlib.closing(connection.exec_driver_sql(statement, values)) as result:
            # Its own tuples: a third of the time that SQLAlchemy's rows take.
            return result.cursor.fetchall()

    return query


# Deciding anew.


class Change(NamedTuple):
    """What a decision made visible and invisible in topics."""

    shown: int = 0
    """Outputs."""
    shown_rows: int = 0
    hidden: int = 0
    hidden_rows: int = 0
    versions: int = 0
    """File versions that the shown outputs are of."""

    @property
    def any(self) -> bool:
        return bool(self.shown or self.hidden)

    def plus(self, other: Change) -> Change:
        """The counts of both."""
        return Change(*(one + two for one, two in zip(self, other, strict=True)))

    @property
    def words(self) -> str:
        """Such as `3 outputs (12 rows) are visible again, 1 output (4 rows) is hidden`."""
        return ", ".join(
            f"{counted(outputs, 'output')} ({counted(rows, 'row')}) "
            f"{'is' if outputs == 1 else 'are'} {now}"
            for outputs, rows, now in (
                (self.shown, self.shown_rows, "visible now"),
                (self.hidden, self.hidden_rows, "hidden now"),
            )
            if outputs
        )


def refresh(connection: Connection, scope: Scope = EVERYTHING) -> Change:
    """Decide what stands in a scope, in the caller's transaction, and record it."""
    query = _driver(connection)
    now = utcnow().isoformat(" ")
    return _save(connection.exec_driver_sql, _decide(query, scope), now)


def fill(connection: sqlite3.Connection) -> None:
    """Decide what stands for every output of an earlier release, in the migration."""
    now = utcnow().isoformat(" ")

    def query(statement: str, values: tuple[Any, ...]) -> Sequence[Any]:
        return connection.execute(statement, values).fetchall()

    _save(connection.executemany, _decide(query, EVERYTHING), now)


def _decide(query: Query, scope: Scope) -> list[tuple[_Known, str]]:
    """Each output in a scope with the state that it gets.

    A key that two outputs have is of jobs of one artifact, which an earlier release allowed. The
    sink has its rows once: they are those of the later job.
    """
    every = list(_read(query, scope))
    owner = _owners(every)
    states = standing(one.facts for one in every if _stands_for(one, owner))
    return [
        (one, REMOVED if one.state == REMOVED else states.get(one.facts.output_id, REMOVED))
        for one in every
    ]


def _owners(every: Iterable[_Known]) -> dict[tuple[str, str], int]:
    """Sink and output key -> the last output with the key."""
    return {(one.sink, one.output_key): one.facts.output_id for one in every}


def _stands_for(one: _Known, owner: Mapping[tuple[str, str], int]) -> bool:
    return one.is_candidate and owner[one.sink, one.output_key] == one.facts.output_id


_SAVE = """
INSERT INTO cf_visibility (output_id, state, mode, told, shown_at, hidden_at, changed_at)
VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (output_id) DO UPDATE SET
    changed_at = CASE WHEN state = excluded.state THEN changed_at ELSE excluded.changed_at END,
    state = excluded.state, mode = excluded.mode, told = excluded.told,
    shown_at = excluded.shown_at, hidden_at = excluded.hidden_at
"""


def _save(
    write: Callable[[str, list[tuple[Any, ...]]], object],
    decided: Iterable[tuple[_Known, str]],
    now: str,
) -> Change:
    rows: list[tuple[Any, ...]] = []
    shown = shown_rows = hidden = hidden_rows = 0
    versions: set[int] = set()
    for one, state in decided:
        was = one.state is not None and is_visible(one.state, one.known_mode or one.mode)
        will = is_visible(state, one.mode)
        shown_at = one.shown_at or (now if will else None)
        hidden_at = None if will else one.hidden_at or now
        told = one.told
        if state == REMOVED != one.state and not (one.is_forgotten or one.is_cancelled):
            told = f"{REMOVED}/{one.mode}"  # the later output with the key is told
        if (one.state, one.known_mode, one.told) != (state, one.mode, told) or (
            (one.shown_at, one.hidden_at) != (shown_at, hidden_at)
        ):
            number = one.facts.output_id
            rows.append((number, state, one.mode, told, shown_at, hidden_at, now))
        if will and not was:
            shown, shown_rows = shown + 1, shown_rows + one.rows
            versions.add(one.facts.version_id)
        elif was and not will:
            hidden, hidden_rows = hidden + 1, hidden_rows + one.rows
    if rows:
        write(_SAVE, rows)
    return Change(shown, shown_rows, hidden, hidden_rows, len(versions))


class Usage(NamedTuple):
    """What a topic of a plugin shows in one sink."""

    uri: str
    outputs: int
    rows: int


def usage(connection: Connection, plugin: str, topic: str) -> list[Usage]:
    """What a topic shows, sink by sink."""
    query = f"""
        SELECT o.uri, count(*), sum(o.rows) FROM cf_output o
        JOIN cf_processing_queue j ON j.id = o.job_id JOIN cf_visibility s ON s.output_id = o.id
        WHERE o.topic = ? AND o.state = 'PUBLISHED' AND j.plugin_name = ? AND {SHOWN}
        GROUP BY o.uri ORDER BY o.uri
        """  # noqa: S608
    rows = _driver(connection)(query, (topic, plugin))
    return [Usage(*row) for row in rows]


def differences(connection: Connection) -> Iterator[str]:
    """A sentence for each output whose recorded state is not the one that `standing` decides."""
    for one, state in _decide(_driver(connection), EVERYTHING):
        decided, known = f"{state}/{one.mode}", f"{one.state}/{one.known_mode}"
        if decided != known:
            yield (
                f"output {one.facts.output_id} of job {one.facts.job_id} is recorded as "
                f"{known if one.state else 'nothing'} for readers, but is to be {decided}"
            )
    strays = _driver(connection)(
        "SELECT s.output_id FROM cf_visibility s LEFT JOIN cf_output o ON o.id = s.output_id "
        "WHERE o.state IS NOT 'PUBLISHED' ORDER BY s.output_id",
        (),
    )
    for (number,) in strays:
        yield f"output {number} is recorded as published for readers, but is not published"


# The records of outputs, as sinks get them.


_RECORDS = """
SELECT o.id, o.output_key, o.topic, o.uri, o.location, coalesce(s.mode, o.mode), r.name, l.path,
       v.ordinal, v.content_hash, v.size_bytes, j.plugin_name, p.version, p.artifact_hash, v.id,
       o.job_id,
       CASE WHEN json_valid(p.manifest)
            THEN (SELECT group_concat(value, '/') FROM json_each(p.manifest, '$.topics')) END,
       o.generation, o.stage, o.rows, o.size_bytes, o.digest, coalesce(s.state, ''), o.target,
       s.shown_at, s.hidden_at, s.told
FROM cf_output o CROSS JOIN cf_processing_queue j ON j.id = o.job_id
CROSS JOIN cf_file_version v ON v.id = j.file_version_id
LEFT JOIN cf_visibility s ON s.output_id = o.id
JOIN cf_plugin p ON p.id = j.plugin_id
JOIN cf_file_location l ON l.id = v.location_id
JOIN cf_source_root r ON r.id = l.source_root_id
"""

_DECIDED = {state.value: state for state in State}


def records(connection: Connection, output_ids: Collection[int]) -> dict[int, Output]:
    """Outputs by id, in the state that was decided last."""
    rows = _driver(connection)(
        f"{_RECORDS} WHERE o.id IN (SELECT value FROM json_each(?)) ORDER BY o.id",  # noqa: S608
        (json.dumps(list(output_ids)),),
    )
    return {row[0]: _record(row[:-1]) for row in rows}


def every_record(connection: Connection) -> Iterator[Output]:
    """Every published output that was neither removed nor forgotten, in the order of ids, in the
    state and mode that its sink was told last."""
    rows = _driver(connection)(
        f"{_RECORDS} WHERE o.state = 'PUBLISHED' AND s.state <> ? ORDER BY o.id",
        (REMOVED,),
    )
    for *row, last in rows:
        output, (state, _, mode) = _record(row), last.partition("/")
        if state in _DECIDED:
            output = msgspec.structs.replace(output, state=_DECIDED[state], mode=mode)
        yield output


def _record(row: Any) -> Output:
    (_, key, topic, uri, location, mode, source, path, ordinal, content_hash, file_bytes, plugin,
     version, artifact, version_id, job_id, topics, generation, stage, rows, size, digest, state,
     target, shown_at, hidden_at) = row  # fmt: skip
    return Output(
        output_key=key, topic=topic, uri=uri, location=location, mode=mode, source=source,
        path=path, ordinal=ordinal, content_hash=content_hash, file_bytes=file_bytes,
        plugin=plugin, plugin_version=version, artifact_hash=artifact, version_id=version_id,
        job_id=job_id, topics=topics or "", generation=generation, stage=stage, rows=rows,
        size_bytes=size, digest=digest, state=_DECIDED.get(state, State.HIDDEN), target=target,
        shown_at=_time(shown_at), hidden_at=_time(hidden_at),
    )  # fmt: skip


def _time(stored: str | None) -> str:
    return f"{stored.replace(' ', 'T')}Z" if stored else ""


# Telling the sinks.


class Part(NamedTuple):
    """What one store (`sinks.store`) is to be given of one decided job."""

    job_id: int
    store: str
    publication: Publication
    output_ids: list[int]
    """Of the publication's outputs, in their order."""
    change_ids: list[int]
    is_whole: bool
    """Whether the job has no outputs in other stores. Else its outputs are published hidden, and
    shown when every store has taken its own."""


class _Draft(NamedTuple):
    """A `Part` whose outputs are still ids, with the state that each gets."""

    job_id: int
    store: str
    outputs: dict[int, State]
    changes: dict[int, State]
    is_whole: bool


def publications(
    connection: Connection, store: Callable[[str], str], paused: Collection[str]
) -> list[Part]:
    """What decided jobs are to publish, in the order in which they are to be published.

    Each job is decided as if those before it had been published. Those that fail leave debts.

    Args:
        store: from a sink's location to its store.
        paused: stores that are not asked now; what they are to publish is not decided.
    """
    query = _driver(connection)
    decided = query(
        "SELECT DISTINCT j.id FROM cf_processing_queue j JOIN cf_output o ON o.job_id = j.id "
        "WHERE j.status = 'COMMITTING' AND +o.state = 'PLANNED'",
        (),
    )
    if not decided:
        return []
    scope = of_jobs(connection, (row[0] for row in decided))
    every = list(_read(query, scope, planned=True))
    owner = _owners(every)
    expected = _Expected([one for one in every if one.is_published and _stands_for(one, owner)])
    owed = {one.facts.slot for one in every if one.is_owed}
    due: dict[int, dict[str, list[Facts]]] = defaultdict(lambda: defaultdict(list))
    for one in every:
        if not one.is_published:
            due[one.facts.job_id][store(one.sink)].append(one.facts)
    drafts: list[_Draft] = []
    for job_id, by_store in due.items():
        is_whole = len(by_store) == 1
        for name, outputs in by_store.items():
            own = {one.output_id: State.HIDDEN for one in outputs}
            changes: dict[int, State] = {}
            # What a slot's sink has not been told yet is told together with what comes.
            waits = any(one.slot in owed for one in outputs)
            if is_whole and name not in paused and not waits:
                own, changes = expected.publish(outputs)
            drafts.append(_Draft(job_id, name, own, changes, is_whole))
    return _parts(connection, drafts, {one.facts.output_id: one.mode for one in every})


class _Expected:
    """The states of outputs as jobs are published one after another."""

    def __init__(self, published: Iterable[_Known]) -> None:
        self._slots: dict[Slot, dict[int, Facts]] = defaultdict(dict)
        self._states: dict[int, str] = {}
        for one in published:
            self._slots[one.facts.slot][one.facts.output_id] = one.facts
            self._states[one.facts.output_id] = one.state or ""

    def publish(self, outputs: Sequence[Facts]) -> tuple[dict[int, State], dict[int, State]]:
        """Add a job's outputs; their states, and those of others that change by them."""
        for one in outputs:
            self._slots[one.slot][one.output_id] = one
        now: dict[int, State] = {}
        for slot in {one.slot for one in outputs}:
            now |= standing(self._slots[slot].values())
        own = {one.output_id: now[one.output_id] for one in outputs}
        changes = {
            number: state
            for number, state in now.items()
            if number not in own and self._states[number] != state
        }
        self._states |= now
        return own, changes


def _parts(
    connection: Connection, drafts: Sequence[_Draft], modes: Mapping[int, str]
) -> list[Part]:
    known = records(connection, modes.keys())

    def outputs(states: Mapping[int, State]) -> list[Output]:
        return [
            msgspec.structs.replace(known[number], state=state, mode=modes[number])
            for number, state in states.items()
        ]

    return [
        Part(
            draft.job_id, draft.store,
            Publication(outputs=outputs(draft.outputs), changes=outputs(draft.changes)),
            list(draft.outputs), list(draft.changes), draft.is_whole,
        )
        for draft in drafts
    ]  # fmt: skip


class Debt(NamedTuple):
    """What a sink is to be told of one output."""

    output_id: int
    output: Output
    state: str
    """As decided; REMOVED too, whose output is hidden first."""
    is_expired: bool
    """Its rows are to be deleted."""
    told: str
    """What the sink was told last."""
    rebuild: int
    """The rebuild that is shown by it; 0: none."""
    is_left: bool
    """Whether a rebuild left it behind in a sink."""


def debts(connection: Connection) -> dict[str, list[Debt]]:
    """The debts to each sink, by its location."""
    rows = _driver(connection)(
        """
        SELECT s.output_id, s.state, s.told,
               EXISTS (SELECT 1 FROM cf_forgotten_output WHERE output_key = o.output_key),
               coalesce((SELECT max(m.rebuild_id) FROM cf_rebuild_job m
                         JOIN cf_rebuild b ON b.id = m.rebuild_id
                         WHERE m.job_id = o.job_id AND m.generation = o.generation
                         AND b.outcome = 'done' AND s.told LIKE 'hidden/%'),
                        (SELECT rebuild_id FROM cf_left_output WHERE output_id = o.id), 0),
               EXISTS (SELECT 1 FROM cf_left_output
                       WHERE output_id = o.id AND rebuild_id IS NOT NULL)
        FROM cf_visibility s CROSS JOIN cf_output o ON o.id = s.output_id
        WHERE s.told <> s.state || '/' || s.mode
        """,
        (),
    )
    owed = {row[0]: row[1:] for row in rows}
    found: dict[str, list[Debt]] = defaultdict(list)
    for number, output in records(connection, owed).items():
        state, before, is_forgotten, rebuild, is_left = owed[number]
        is_expired = state == REMOVED and not is_forgotten
        debt = Debt(number, output, state, is_expired, before, rebuild, bool(is_left))
        found[output.location].append(debt)
    return dict(found)


def told(connection: Connection, states: Mapping[int, tuple[str, str]]) -> None:
    """Record the state and mode of outputs that their sink has confirmed, by output id."""
    rows = [(f"{state}/{mode}", number) for number, (state, mode) in states.items()]
    if rows:
        connection.exec_driver_sql("UPDATE cf_visibility SET told = ? WHERE output_id = ?", rows)


def published(connection: Connection, outputs: Mapping[int, Output]) -> None:
    """Record the state that outputs were published in, as decided and as told."""
    now = utcnow().isoformat(" ")
    rows = [
        (number, o.state, o.mode, f"{o.state}/{o.mode}", now if o.visible else None,
         None if o.visible else now, now)
        for number, o in outputs.items()
    ]  # fmt: skip
    if rows:
        connection.exec_driver_sql(_SAVE, rows)


# What `casparian query` reads, and what is removed in time.


def committed(connection: Connection) -> list[dict[str, Any]]:
    """The outputs that stand when the sink is left out of the slot: one of each topic of a job.

    A topic that goes to several sinks has the same rows in each, and is read from the first.
    `latest` marks those that are current.
    """
    query = _driver(connection)
    artifacts = _artifacts(query)
    # Plain rows: twice as fast as `_read`, for 20,000 outputs.
    rows = _rows(query, EVERYTHING, planned=False)
    owner = {(row[4], row[12]): row[0] for row in rows}
    first: dict[tuple[int, str, int], Any] = {}
    for row in rows:
        (number, _, _, topic, sink, _, _, _, job, _, _, forgotten, key, *rest) = row
        *_, generation, waits, cancelled, left = rest
        is_out = forgotten or waits or cancelled or left or row[17] == REMOVED
        if not is_out and owner[sink, key] == number:
            first.setdefault((job, topic, generation), row)
    states = standing(
        Facts(
            row[0], row[1:4], row[5], row[6], *artifacts.get(row[7], (False, 0)), row[8],
            bool(row[9]), bool(row[10]), row[23],
        )
        for row in first.values()
    )  # fmt: skip
    return [
        {
            "topic": row[3], "location": row[4], "target": row[16], "output_key": row[12],
            "rows": row[15], "latest": states[row[0]] == State.CURRENT, "id": row[0],
        }
        for row in first.values()
        if states[row[0]] in (State.CURRENT, State.PAST)
    ]  # fmt: skip


_EXPIRED = f"""
state = 'hidden' AND changed_at <= ? AND output_id NOT IN (
    SELECT o.id FROM cf_source_root r JOIN cf_file_location l ON l.source_root_id = r.id
    JOIN cf_file_version v ON v.location_id = l.id
    JOIN cf_processing_queue j ON j.file_version_id = v.id
    JOIN cf_output o ON o.job_id = j.id
    WHERE {_WITHDRAWN}
    UNION ALL
    SELECT o.id FROM cf_rebuild b JOIN cf_rebuild_job m ON m.rebuild_id = b.id
    JOIN cf_output o ON o.job_id = m.job_id AND o.generation = m.generation
    WHERE b.ended_at IS NULL)
"""  # noqa: S608
"""Outputs that have not stood since a time. Those of a deleted file that took its rows along wait
for its return, and those of an open rebuild for its end."""


def has_expired(connection: Connection, before: datetime) -> bool:
    """Whether `remove_expired` would remove any."""
    query = f"SELECT 1 FROM cf_visibility WHERE {_EXPIRED} LIMIT 1"  # noqa: S608
    return bool(_driver(connection)(query, (before.isoformat(" "),)))


def remove_expired(connection: Connection, before: datetime) -> int:
    """Decide that outputs which have not stood since a time are removed; how many."""
    removed = _driver(connection)(
        f"UPDATE cf_visibility SET state = ?, changed_at = ? WHERE {_EXPIRED} "  # noqa: S608
        "RETURNING output_id",
        (REMOVED, utcnow().isoformat(" "), before.isoformat(" ")),
    )
    return len(removed)


def remove_absent(connection: Connection, location: str, there: Collection[str]) -> None:
    """Decide that replaced outputs are removed whose keys a sink does not have: earlier releases
    deleted the rows that a newer version replaced."""
    rows = _driver(connection)(
        """
        SELECT o.id, o.output_key FROM cf_output o JOIN cf_visibility s ON s.output_id = o.id
        WHERE o.location = ? AND o.rows > 0 AND s.mode = 'replace' AND s.state IN ('past', 'hidden')
        """,
        (location,),
    )
    now = utcnow().isoformat(" ")
    if absent := [(REMOVED, now, number) for number, key in rows if key not in there]:
        connection.exec_driver_sql(
            "UPDATE cf_visibility SET state = ?, changed_at = ? WHERE output_id = ?", absent
        )


def remove_deleted(connection: Connection, there: Mapping[str, Collection[str]]) -> None:
    """Decide that outputs are removed which sinks have deleted since this ledger was copied: they
    have another one of the same version, plugin and topic.

    Args:
        there: sink location -> the keys of what it has.
    """
    rows = _driver(connection)(
        """
        SELECT o.id, o.output_key, o.location, v.location_id, v.id, j.plugin_name, o.topic
        FROM cf_output o JOIN cf_visibility s ON s.output_id = o.id
        JOIN cf_processing_queue j ON j.id = o.job_id
        JOIN cf_file_version v ON v.id = j.file_version_id
        WHERE s.state <> ? AND o.location IN (SELECT value FROM json_each(?))
        """,
        (REMOVED, json.dumps(list(there))),
    )
    has = {row[4:] for row in rows if row[1] in there[row[2]]}
    deleted = [row for row in rows if row[1] not in there[row[2]] and row[4:] in has]
    now = utcnow().isoformat(" ")
    if deleted:
        connection.exec_driver_sql(
            "UPDATE cf_visibility SET state = ?, told = ? || '/' || mode, changed_at = ? "
            "WHERE output_id = ?",
            [(REMOVED, REMOVED, now, row[0]) for row in deleted],
        )
        refresh(connection, Scope({row[3] for row in deleted}))
