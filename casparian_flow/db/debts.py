"""What sinks are to publish and to be told, by what `db.visibility` has decided.

records         outputs as sinks get them
publications    what the sinks are to publish for decided jobs, and what ceases to stand by it
owed, told      what the sinks are to be told, and that they have been
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec

from casparian_flow.db.access import Connection
from casparian_flow.db.moves import Moves
from casparian_flow.db.states import REMOVED, utcnow
from casparian_flow.db.visibility import (
    SAVE,
    Facts,
    Known,
    Slot,
    of_jobs,
    owners,
    query_of,
    read,
    standing,
    stands_for,
)
from casparian_flow.protocol import Output, Publication, State

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
    rows = query_of(connection)(
        f"{_RECORDS} WHERE o.id IN (SELECT value FROM json_each(?)) ORDER BY o.id",  # noqa: S608
        (json.dumps(list(output_ids)),),
    )
    return {row[0]: _record(row[:-1]) for row in rows}


def every_record(connection: Connection) -> Iterator[Output]:
    """Every published output that was neither removed nor forgotten, in the order of ids, in the
    state and mode that its sink was told last."""
    rows = query_of(connection)(
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
    query = query_of(connection)
    decided = query(
        "SELECT DISTINCT j.id FROM cf_processing_queue j JOIN cf_output o ON o.job_id = j.id "
        "WHERE j.status = 'COMMITTING' AND +o.state = 'PLANNED'",
        (),
    )
    if not decided:
        return []
    scope = of_jobs(connection, (row[0] for row in decided))
    every = list(read(query, scope, planned=True))
    owner = owners(every)
    standing_now = [one for one in every if one.is_published and stands_for(one, owner)]
    expected = _Expected(standing_now, Moves(query, {one.facts.location_id for one in every}))
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
            waits = not owed.isdisjoint(expected.slots(outputs))
            if is_whole and name not in paused and not waits:
                own, changes = expected.publish(outputs, partial(_is_in, store, name))
            drafts.append(_Draft(job_id, name, own, changes, is_whole))
    return _parts(connection, drafts, {one.facts.output_id: one.mode for one in every})


def _is_in(store: Callable[[str], str], name: str, sink: str) -> bool:
    return store(sink) == name


class _Expected:
    """The states of outputs as jobs are published one after another."""

    def __init__(self, published: Iterable[Known], moves: Moves) -> None:
        self._slots: dict[Slot, dict[int, Facts]] = defaultdict(dict)
        self._places: dict[int, set[Slot]] = defaultdict(set)
        self._states: dict[int, str] = {}
        self._moves = moves
        for one in published:
            self._slots[one.facts.slot][one.facts.output_id] = one.facts
            self._places[one.facts.location_id].add(one.facts.slot)
            self._states[one.facts.output_id] = one.state or ""

    def slots(self, outputs: Sequence[Facts]) -> set[Slot]:
        """The location slots in which a job's outputs may change something: their own, and those
        that their file moved away from."""
        origins = self._moves.origins(outputs[0].location_id)
        left = {slot for place in origins for slot in self._places[place]}
        return left | {one.slot for one in outputs}

    def publish(
        self, outputs: Sequence[Facts], is_told: Callable[[str], bool]
    ) -> tuple[dict[int, State], dict[int, State]]:
        """Add a job's outputs; their states, and those of others that change by them.

        Args:
            is_told: whether a sink is told in the same step; others are told later.
        """
        for one in outputs:
            self._slots[one.slot][one.output_id] = one
        self._moves.publish(outputs[0].location_id, outputs[0].ordinal, outputs[0].plugin)
        now: dict[int, State] = {}
        for slot in self.slots(outputs):
            if is_told(str(slot[-1])):
                now |= standing(one.moved_by(self._moves) for one in self._slots[slot].values())
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


def owed(connection: Connection) -> dict[str, list[Debt]]:
    """The debts to each sink, by its location."""
    rows = query_of(connection)(
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
    due = {row[0]: row[1:] for row in rows}
    found: dict[str, list[Debt]] = defaultdict(list)
    for number, output in records(connection, due).items():
        state, before, is_forgotten, rebuild, is_left = due[number]
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
        connection.exec_driver_sql(SAVE, rows)
