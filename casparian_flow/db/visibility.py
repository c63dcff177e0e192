"""What readers see of each published output. `standing` decides; sinks are told.

At most one output stands in a version slot: (version, plugin, topic, sink). At most one of those
is current in the location slot: (location, plugin, topic, sink). `cf_visibility` has the decision
for each published output, and what its sink has confirmed; where they differ, that is a debt.

    refresh         decides anew, after a change of anything that `standing` looks at
    committed       what `casparian query` reads

What sinks are to publish and to be told by it is in `db.debts`.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, cast

from casparian_flow import sink_uri
from casparian_flow.db.connection import Connection
from casparian_flow.db.moves import Moves, Query, with_origins
from casparian_flow.db.states import PASSED_OVER, REMOVED, RETRACT, utcnow
from casparian_flow.errors import ConfigError, counted
from casparian_flow.protocol import State

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
    has_moved: bool = False
    """Whether its version shows where its file is now (`db.moves`)."""
    has_left: bool = False
    """Whether its location's last version does: nothing is current in the location."""
    generation: int = 0
    """Of its job's outputs; above 0 where they were rebuilt."""
    is_apart: bool = False
    """Whether it takes no place: its rebuild is not complete, or was cancelled."""

    @property
    def location_id(self) -> int:
        return cast(int, self.slot[0])

    @property
    def plugin(self) -> str:
        return cast(str, self.slot[1])

    def moved_by(self, moves: Moves) -> Facts:
        """The same facts with what these moves say."""
        has_moved = moves.has_moved(self.version_id, self.plugin)
        has_left = moves.has_left(self.location_id, self.plugin)
        return self._replace(has_moved=has_moved, has_left=has_left)


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
        elif not (one.is_withdrawn or one.has_moved):
            is_newest = one.ordinal == newest[one.slot] and not one.has_left
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
    """Ids of file locations. Those from which their files came are in the scope too."""
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


def has_origins(connection: Connection, locations: Sequence[int]) -> bool:
    """Whether a file had moved to one of these locations."""
    return len(with_origins(query_of(connection), locations)) > len(locations)


def _ids(connection: Connection, query: str, ids: Iterable[int]) -> list[int]:
    return [row[0] for row in query_of(connection)(query, (json.dumps(list(ids)),))]


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


class Known(NamedTuple):
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


def read(query: Query, scope: Scope, planned: bool = False) -> Iterator[Known]:
    """The outputs in a scope that are published.

    Args:
        planned: also those that decided jobs are still to publish.
    """
    scope = _with_origins(query, scope)
    moves = Moves(query, scope.locations)
    artifacts, modes = _artifacts(query), _modes(query)
    for row in _rows(query, scope, planned):
        (number, location, plugin, topic, sink, version, ordinal, plugin_id, job, retracted,
         withdrawn, forgotten, key, uri, mode, *rest) = row  # fmt: skip
        (rows, target, state, known_mode, told, shown_at, hidden_at, published, generation, waits,
         cancelled, left) = rest  # fmt: skip
        is_active, deployed = artifacts.get(plugin_id, (False, 0))
        facts = Facts(
            number, (location, plugin, topic, sink), version, ordinal, is_active, deployed, job,
            bool(retracted), bool(left or (withdrawn and moves.is_deleted(location))),
            moves.has_moved(version, plugin), moves.has_left(location, plugin), generation,
            bool(waits or cancelled),
        )  # fmt: skip
        # A topic that went elsewhere keeps the mode that it had there.
        effective = modes.get((plugin, topic, uri), known_mode or mode)
        yield Known(
            facts, bool(forgotten), key, effective, rows, target, state, known_mode, told or "",
            shown_at, hidden_at, bool(published), bool(cancelled), bool(left),
        )  # fmt: skip


def _with_origins(query: Query, scope: Scope) -> Scope:
    if scope.locations is None:
        return scope
    return scope._replace(locations=with_origins(query, scope.locations))


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
    for (plugin, topic, uri), mode in _modes(query_of(connection)).items():
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


def query_of(connection: Connection) -> Query:
    def query(statement: str, values: tuple[Any, ...]) -> Sequence[Any]:
        return connection.driver.execute(statement, values).fetchall()

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
    query = query_of(connection)
    now = utcnow().isoformat(" ")
    return _save(connection.exec_driver_sql, _decide(query, scope), now)


def fill(connection: sqlite3.Connection) -> None:
    """Decide what stands for every output of an earlier release, in the migration."""
    now = utcnow().isoformat(" ")

    def query(statement: str, values: tuple[Any, ...]) -> Sequence[Any]:
        return connection.execute(statement, values).fetchall()

    _save(connection.executemany, _decide(query, EVERYTHING), now)


def _decide(query: Query, scope: Scope) -> list[tuple[Known, str]]:
    """Each output in a scope with the state that it gets.

    A key that two outputs have is of jobs of one artifact, which an earlier release allowed. The
    sink has its rows once: they are those of the later job.
    """
    every = list(read(query, scope))
    owner = owners(every)
    states = standing(one.facts for one in every if stands_for(one, owner))
    return [
        (one, REMOVED if one.state == REMOVED else states.get(one.facts.output_id, REMOVED))
        for one in every
    ]


def owners(every: Iterable[Known]) -> dict[tuple[str, str], int]:
    """Sink and output key -> the last output with the key."""
    return {(one.sink, one.output_key): one.facts.output_id for one in every}


def stands_for(one: Known, owner: Mapping[tuple[str, str], int]) -> bool:
    return one.is_candidate and owner[one.sink, one.output_key] == one.facts.output_id


SAVE = """
INSERT INTO cf_visibility (output_id, state, mode, told, shown_at, hidden_at, changed_at)
VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (output_id) DO UPDATE SET
    changed_at = CASE WHEN state = excluded.state THEN changed_at ELSE excluded.changed_at END,
    state = excluded.state, mode = excluded.mode, told = excluded.told,
    shown_at = excluded.shown_at, hidden_at = excluded.hidden_at
"""


def _save(
    write: Callable[[str, list[tuple[Any, ...]]], object],
    decided: Iterable[tuple[Known, str]],
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
        write(SAVE, rows)
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
    rows = query_of(connection)(query, (topic, plugin))
    return [Usage(*row) for row in rows]


def differences(connection: Connection) -> Iterator[str]:
    """A sentence for each output whose recorded state is not the one that `standing` decides."""
    for one, state in _decide(query_of(connection), EVERYTHING):
        decided, known = f"{state}/{one.mode}", f"{one.state}/{one.known_mode}"
        if decided != known:
            yield (
                f"output {one.facts.output_id} of job {one.facts.job_id} is recorded as "
                f"{known if one.state else 'nothing'} for readers, but is to be {decided}"
            )
    strays = query_of(connection)(
        "SELECT s.output_id FROM cf_visibility s LEFT JOIN cf_output o ON o.id = s.output_id "
        "WHERE o.state IS NOT 'PUBLISHED' ORDER BY s.output_id",
        (),
    )
    for (number,) in strays:
        yield f"output {number} is recorded as published for readers, but is not published"


# What `casparian query` reads, and what is removed in time.


def committed(connection: Connection) -> list[dict[str, Any]]:
    """The outputs that stand when the sink is left out of the slot: one of each topic of a job.

    A topic that goes to several sinks has the same rows in each, and is read from the first.
    `latest` marks those that are current.
    """
    query = query_of(connection)
    artifacts, moves = _artifacts(query), Moves(query)
    # Plain rows: twice as fast as `read`, for 20,000 outputs.
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
            bool(row[9]), bool(row[10] and moves.is_deleted(row[1])),
            moves.has_moved(row[5], row[2]), moves.has_left(row[1], row[2]), row[23],
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
    SELECT o.id FROM cf_gone_version g
    JOIN cf_processing_queue j ON j.file_version_id = g.file_version_id
    JOIN cf_output o ON o.job_id = j.id
    WHERE g.to_version_id IS NOT NULL
    UNION ALL
    SELECT o.id FROM cf_rebuild b JOIN cf_rebuild_job m ON m.rebuild_id = b.id
    JOIN cf_output o ON o.job_id = m.job_id AND o.generation = m.generation
    WHERE b.ended_at IS NULL)
"""  # noqa: S608
"""Outputs that have not stood since a time. Those of a file that was deleted or moved, and took its
rows along, wait for its return, and those of an open rebuild for its end."""


def has_expired(connection: Connection, before: datetime) -> bool:
    """Whether `remove_expired` would remove any."""
    query = f"SELECT 1 FROM cf_visibility WHERE {_EXPIRED} LIMIT 1"  # noqa: S608
    return bool(query_of(connection)(query, (before.isoformat(" "),)))


def remove_expired(connection: Connection, before: datetime) -> int:
    """Decide that outputs which have not stood since a time are removed; how many."""
    removed = query_of(connection)(
        f"UPDATE cf_visibility SET state = ?, changed_at = ? WHERE {_EXPIRED} "  # noqa: S608
        "RETURNING output_id",
        (REMOVED, utcnow().isoformat(" "), before.isoformat(" ")),
    )
    return len(removed)


def remove_absent(connection: Connection, location: str, there: Collection[str]) -> None:
    """Decide that replaced outputs are removed whose keys a sink does not have: earlier releases
    deleted the rows that a newer version replaced."""
    rows = query_of(connection)(
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


def remove_deleted(
    connection: Connection, there: Mapping[str, Collection[str]]
) -> dict[tuple[str, str], int]:
    """Decide that outputs are removed which sinks have deleted since this ledger was copied: there
    is another one of the same version, plugin and topic. A sink that has nothing at all was emptied
    by somebody else: what it lacks is missing.

    Args:
        there: sink location -> the keys of what it has.

    Returns:
        (sink location, topic) -> how many.
    """
    rows = query_of(connection)(
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
    deleted = [
        row for row in rows if there[row[2]] and row[1] not in there[row[2]] and row[4:] in has
    ]
    now = utcnow().isoformat(" ")
    if deleted:
        connection.exec_driver_sql(
            "UPDATE cf_visibility SET state = ?, told = ? || '/' || mode, changed_at = ? "
            "WHERE output_id = ?",
            [(REMOVED, REMOVED, now, row[0]) for row in deleted],
        )
        refresh(connection, Scope({row[3] for row in deleted}))
    return Counter((row[2], row[6]) for row in deleted)
