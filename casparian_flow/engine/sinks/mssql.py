"""The SQL Server sink: a table of the server that the configuration names, and a ledger beside it.

`mssql_publish` has how outputs get there, `mssql_types` how values are kept, `mssql_statements`
what is sent, `mssql_faults` what is done about an error. The Worker's half needs no server and no
secret: it stages beside the ledger, and looks at the columns.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from casparian_flow.config import DatabaseSettings, MssqlSettings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks import mssql_statements as statements
from casparian_flow.engine.sinks import table_of
from casparian_flow.engine.sinks.base import (
    KEY_DIGITS,
    LINEAGE,
    Claim,
    Found,
    Lineage,
    facts_of,
    found,
)
from casparian_flow.engine.sinks.columns import pieces
from casparian_flow.engine.sinks.mssql_session import Fault, Kind, Refused, Session, refusal
from casparian_flow.engine.sinks.mssql_statements import (
    LEDGER,
    LINEAGE_TYPES,
    RECORDED,
    REPLACED,
    RETRACTED,
    SHOWN,
    STAGE,
    Declared,
    Statement,
)
from casparian_flow.engine.sinks.mssql_types import (
    Column,
    check_count,
    check_values,
    columns_of,
    declared_as,
    fold,
)
from casparian_flow.engine.sinks.stage import Stage, reading
from casparian_flow.errors import JobError, SinkConflict, SinkUnavailable
from casparian_flow.protocol import OutputPlan, Published, StagedOutput


class MssqlSink:
    """A table of SQL Server; it publishes outputs to any table of that server.

    Args:
        location: `mssql://table` or `mssql://schema.table`.
        database: the ledger's: where outputs are staged, and how the server is reached.
    """

    def __init__(self, location: str, database: DatabaseSettings) -> None:
        self.location = location
        self.stage_folder = database.stage_folder
        self._settings = database.mssql

    def open_stage(self, plan: OutputPlan, lineage: Lineage, attempt: str) -> Stage:
        """See `Sink.open_stage`. Asks nothing of the server."""
        return Stage(self.stage_folder, plan, lineage, attempt, check=check_values)

    def publish(self, outputs: Sequence[StagedOutput]) -> list[Published | JobError]:
        """See `Sink.publish`. One transaction a job."""
        jobs: dict[tuple[int, int], list[StagedOutput]] = {}
        seen = Counter[str]()
        for output in outputs:  # one that comes again is published, and so adopted, after the first
            jobs.setdefault((seen[output.output_key], output.job_id), []).append(output)
            seen[output.output_key] += 1
        ended: dict[int, Published | JobError] = {}
        with contextlib.closing(Publisher(self._settings)) as publisher:
            for of in jobs.values():
                ended |= zip(map(id, of), publisher.publish(of), strict=True)
        outcomes = [ended[id(output)] for output in outputs]
        for output, outcome in zip(outputs, outcomes, strict=True):
            if isinstance(outcome, Published):
                with contextlib.suppress(OSError):
                    Path(output.stage).unlink()
                crashpoint("mssql.unstaged")
        return outcomes

    def check(self, claims: Sequence[Claim]) -> list[str]:
        """See `Sink.check`. Counts the table's rows once, for all claims on it."""
        try:
            with self._target() as target:
                ledger = target.in_table() if target.has_ledger() else []
                there = target.counts() if any(each.rows for each in ledger) else {}
        except SinkUnavailable as error:
            return [f"{claim.target}: it cannot be read: {error.message}" for claim in claims]
        known = {each.output_key: each for each in ledger}
        return [f"{c.target}: {fault}" for c in claims if (fault := _fault(c, known, there))]

    def inventory(self, known: Container[str]) -> Iterator[Found]:
        """See `Sink.inventory`. The ledger beside the table says it all."""
        with self._target() as target:
            ledger = target.in_table() if target.has_ledger() else []
        for each in ledger:
            retracted = each.state == RETRACTED
            if retracted or each.output_key[:KEY_DIGITS] not in known:
                facts = {**json.loads(each.facts), "output_key": each.output_key}
                yield found(target.place, each.rows, each.digest, facts, retracted=retracted)

    def withdraw(self, claim: Claim) -> None:
        """See `Sink.withdraw`. What a person left of its rows goes with the ledger's row, and
        where they took that, the rows that no other output has brought."""
        with self._changing(claim) as (target, record):
            ask, send = target.ask, target.session.execute
            if record:
                send(ask.delete_rows(record.lineage))
                if target.has_aside():
                    send(ask.delete_retracted(record.lineage))
                send(ask.forget(record.output_key))
            elif target.has_ledger():
                brought = {each.lineage for each in target.in_table()}
                for lineage in target.counts().keys() - brought:
                    if lineage[1] == claim.job_id:
                        send(ask.delete_rows(lineage))

    def retract(self, claim: Claim) -> None:
        """See `Sink.retract`. The rows move to another table with the ledger's word for it."""
        with self._changing(claim, aside=True) as (target, record):
            if record and record.state == SHOWN:
                moves = target.ask.move_out(record.lineage, target.names())
                _move(target, record, RETRACTED, moves)

    def reinstate(self, claim: Claim) -> None:
        """See `Sink.reinstate`."""
        with self._changing(claim, aside=True) as (target, record):
            if record is None:
                raise SinkConflict(f"{claim.target}: its ledger does not have the output")
            if record.state == RETRACTED and target.is_late(record):
                _move(target, record, REPLACED, [target.ask.delete_retracted(record.lineage)])
            elif record.state == RETRACTED:
                moves = target.ask.move_back(record.lineage, target.names())
                _move(target, record, SHOWN, moves)

    def drop_stages(self, tag: str, owed: Iterable[str]) -> None:
        """See `sinks.drop_stages`. What another program holds the lock of stays."""
        kept = {stage_table(each) for each in owed}
        with self._target() as target:
            session = target.session
            for (table,) in session.execute(statements.stage_tables(target.schema, tag)):
                if table not in kept and session.try_lock(table):
                    with session.transaction():
                        session.execute(statements.drop(target.schema, table))
                    crashpoint("mssql.stage_swept")

    @contextlib.contextmanager
    def _target(self) -> Iterator[Target]:
        """The table, on a connection of its own.

        Raises:
            SinkUnavailable: the server refuses, or cannot be reached.
        """
        try:
            with contextlib.closing(Session(self._settings)) as session:
                yield Target(session, *table_of(self.location))
        except Refused as refused:
            fault = refused.fault._replace(kind=Kind.PAUSE)
            raise refusal(fault, self.location) from None

    @contextlib.contextmanager
    def _changing(
        self, claim: Claim, *, aside: bool = False
    ) -> Iterator[tuple[Target, Recorded | None]]:
        """A transaction that changes where an output is, and the ledger's row of it.

        Where nobody knows whether it was committed the caller is told so, and asks again: what is
        done already is not done twice.

        Args:
            aside: have the table for what is retracted.
        """
        with self._target() as target:
            record = target.recorded(claim.output_key) if target.has_ledger() else None
            if record and aside:
                target.prepare_aside()
            slots = [record.slot] if record else []
            with target.session.transaction(locks([claim.output_key, *slots])):
                yield target, target.recorded(claim.output_key) if record else None
                crashpoint("mssql.change_written")
            crashpoint("mssql.changed")


def _move(target: Target, record: Recorded, state: str, moves: Sequence[Statement]) -> None:
    """Take an output's rows to where they belong from now on, and write it down.

    Raises:
        SinkConflict: they are not those that were published.
    """
    for moved in map(target.session.change, moves):
        if moved != record.rows:
            raise SinkConflict(
                f"{target.place} has {moved} rows of job {record.job_id}, where {record.rows} "
                "were published; nothing was changed",
                f"casparian outputs restore {record.job_id}",
            )
    target.session.execute(target.ask.mark(record.output_key, state))


def _fault(claim: Claim, ledger: dict[str, Recorded], there: dict[Any, int]) -> str:
    """What is wrong with a claimed output; empty where nothing is."""
    record = ledger.get(claim.output_key)
    if record is None or (record.rows, record.digest) != (claim.rows, claim.digest):
        return f"its ledger does not have the output of job {claim.job_id}"
    if record.state != SHOWN:
        return f"its ledger has job {claim.job_id} as {record.state}"
    if (rows := there.get(record.lineage, 0)) != record.rows:
        return f"{rows} rows of job {record.job_id}, where {record.rows} were published"
    return ""


# How staged outputs get into SQL Server, each exactly once for its output key.
#
#     look      is it there already? Under a lock on its key, so that who is at it is waited for
#     load      the staged rows go into a stage table, in bulk: restartable, and nobody reads it
#     publish   one transaction: locks on the keys and slots, the ledger's word once more, the
#               ledger's rows, and the stage tables' rows into their tables; of one job all or none
#     clean     the stage tables are dropped
#
# An error while the transaction is committed means that nobody knows. Then, as after a deadlock,
# all is done again from the start, on another connection: the server gives the lock on the key when
# it is done with the connection that had it, and then the ledger tells.
#
# A stage table is named after the staged file, so that another try finds it, and a session's lock
# on its name says that somebody uses it.


BATCH_ROWS = 64 << 10
"""Rows converted at once, on their way to the server."""

TRIES = 3
"""How often a job's outputs are published in a row, before the sink is paused."""


class _Loaded(NamedTuple):
    """An output whose rows wait in a stage table."""

    output: StagedOutput
    target: Target
    stage: str
    """The table; empty where there are no rows."""
    names: list[str]
    """The columns that it has."""
    facts: dict[str, str]
    """What the staged file's footer says."""


class Publisher:
    """Publishes one job after another, on one connection while that lasts; to be closed.

    Args:
        settings: the server.
    """

    def __init__(self, settings: MssqlSettings) -> None:
        self._settings = settings
        self._session: Session | None = None
        self._away: JobError | None = None

    def close(self) -> None:
        """Give the connection back."""
        if self._session:
            self._session.close()
        self._session = None

    def publish(self, outputs: Sequence[StagedOutput]) -> list[Published | JobError]:
        """Publish the outputs of one job: see `Sink.publish`.

        A server that cannot be reached is asked once, not for every job: that may take long, and
        other sinks wait for it.
        """
        done: dict[str, Published] = {}
        fault: JobError
        for _ in range(TRIES):
            try:
                self._try(self._connected(outputs), outputs, done)
                break
            except Refused as refused:
                fault = refusal(refused.fault, _places(outputs))
                if refused.fault.kind is Kind.LOST:
                    self.close()
                elif refused.fault.kind is not Kind.RETRY:
                    break
            except JobError as error:
                fault = error
                break
        return [done.get(output.output_key) or fault for output in outputs]

    def _connected(self, outputs: Sequence[StagedOutput]) -> Session:
        """The connection, made where there is none.

        Raises:
            SinkUnavailable: it cannot be made, now or when it was last tried.
        """
        if self._away:
            raise self._away
        if self._session is None:
            try:
                self._session = Session(self._settings)
            except Refused as refused:
                self._away = refusal(refused.fault._replace(kind=Kind.PAUSE), _places(outputs))
                raise self._away from None
        return self._session

    def _try(
        self, session: Session, outputs: Sequence[StagedOutput], done: dict[str, Published]
    ) -> None:
        """Publish them, all that are not there; `done` gets what is.

        Raises:
            Refused: the server or the driver said no; what was not committed is undone.
            JobError: the rows are not to be had, or cannot be kept.
        """
        aims = [(o, Target(session, *table_of(o.location))) for o in outputs]
        with session.transaction(_locks_of(outputs)):
            done |= _adopted(aims)
        with contextlib.ExitStack() as stack:
            loaded = [
                stack.enter_context(_loaded(session, output, target))
                for output, target in aims
                if output.output_key not in done
            ]
            if loaded:
                with session.transaction(_locks_of(outputs)):
                    crashpoint("mssql.begun")
                    found = _adopted(aims)
                    added = {
                        each.output.output_key: _add(session, each)
                        for each in loaded
                        if each.output.output_key not in found
                    }
                    crashpoint("mssql.all_written")
                crashpoint("mssql.committed")
                done |= found | added


def _places(outputs: Sequence[StagedOutput]) -> str:
    return ", ".join(dict.fromkeys(output.location for output in outputs))


def locks(keys: Iterable[str]) -> list[str]:
    """What is locked while these output keys and slots are worked on."""
    return [f"casparian:{key}" for key in keys]


def stage_table(stage: str) -> str:
    """The stage table of a staged file."""
    return STAGE + Path(stage).name.partition(".")[0]


def _locks_of(outputs: Sequence[StagedOutput]) -> list[str]:
    slots = [output.slot for output in outputs if output.mode == "replace"]
    return locks([*(output.output_key for output in outputs), *slots])


def _adopted(aims: Sequence[tuple[StagedOutput, Target]]) -> dict[str, Published]:
    """What the ledgers say of the output keys."""
    found = {}
    for output, target in aims:
        record = target.recorded(output.output_key) if target.has_ledger() else None
        if record:
            found[output.output_key] = Published(
                target=target.place, rows=record.rows, digest=record.digest, adopted=True,
                retracted=record.state == statements.RETRACTED,
            )  # fmt: skip
    return found


@contextlib.contextmanager
def _loaded(session: Session, output: StagedOutput, target: Target) -> Iterator[_Loaded]:
    """The rows of an output in a stage table, while the block runs."""
    with reading(output) as staged:
        columns = target.prepare(output.topic, staged.schema_arrow)
        facts = facts_of(staged.metadata.metadata)
        names = [column.name for column in columns]
        if not output.rows:
            yield _Loaded(output, target, "", names, facts)
            return
        table = stage_table(output.stage)
        session.lock(table, session=True)
        described = [Declared(column.name, column.loaded) for column in columns]
        with session.transaction():
            session.execute(
                statements.drop(target.schema, table),
                statements.create_stage(target.schema, table, described),
            )
        crashpoint("mssql.stage_made")
        _load(session, target.schema, table, staged, columns, output.rows)
        crashpoint("mssql.loaded")
    try:
        yield _Loaded(output, target, table, names, facts)
    finally:
        with contextlib.suppress(Refused):  # then another try finds it, or `sweep`
            with session.transaction():
                session.execute(statements.drop(target.schema, table))
            session.execute(statements.unlock(table))


def _load(
    session: Session, schema: str, table: str, staged: Any, columns: Sequence[Column], rows: int
) -> None:
    """Send the staged rows to a stage table.

    Raises:
        OutputRefused: a value cannot be kept.
        Refused: they did not all arrive.
    """
    fields = pa.schema([(column.name, column.plain) for column in columns])
    numbers = [staged.schema_arrow.get_field_index(column.source) for column in columns]
    faults: list[JobError] = []

    def batches() -> Iterator[Any]:
        try:
            for batch in chain.from_iterable(map(pieces, staged.iter_batches(BATCH_ROWS))):
                arrays = [c.array(batch.column(n)) for c, n in zip(columns, numbers, strict=True)]
                yield pa.record_batch(arrays, schema=fields)
                crashpoint("mssql.batch_sent")
        except JobError as error:  # the driver would make a text of it
            faults.append(error)
            raise

    try:
        sent = session.load(schema, table, pa.RecordBatchReader.from_batches(fields, batches()))
    except Refused:
        if faults:
            raise faults[0] from None
        raise
    if sent != rows:
        raise Refused(Fault(Kind.RETRY, f"{sent} of {rows} rows arrived in {table}"))


def _add(session: Session, each: _Loaded) -> Published:
    """The ledger's row, then the table's, in place of those they replace."""
    output, target = each.output, each.target
    late = target.is_late(output)
    if output.mode == "error":
        _check_all_ours(target)
    if output.mode == "replace" and not late:
        for earlier in target.in_slot(output.slot):
            if earlier.state == SHOWN:
                session.execute(
                    target.ask.mark(earlier.output_key, REPLACED),
                    target.ask.delete_rows(earlier.lineage),
                )
                crashpoint("mssql.replaced")
    session.execute(
        target.ask.record(
            {
                "output_key": output.output_key, "topic": output.topic, "job_id": output.job_id,
                "file_version_id": int(each.facts["file_version_id"]),
                "source_hash": each.facts["source_hash"],
                "plugin_version": each.facts["plugin_version"], "rows": output.rows,
                "digest": output.digest, "slot": output.slot, "ordinal": output.ordinal,
                "mode": output.mode, "state": REPLACED if late else SHOWN,
                "facts": json.dumps(each.facts),
            }
        )
    )  # fmt: skip
    crashpoint("mssql.ledger_written")
    if each.stage and not late:
        moved = session.change(target.ask.insert_staged(each.stage, each.names))
        if moved != output.rows:
            raise Refused(Fault(Kind.RETRY, f"{moved} rows were in {each.stage}"))
        crashpoint("mssql.rows_written")
    return Published(target=target.place, rows=output.rows, digest=output.digest, adopted=False)


def _check_all_ours(target: Target) -> None:
    """Return if every row of the table is accounted for.

    Raises:
        SinkConflict: it holds what is not ours.
    """
    shown = {each.lineage: each.rows for each in target.in_table() if each.state == SHOWN}
    if target.counts() != {lineage: rows for lineage, rows in shown.items() if rows}:
        raise SinkConflict(
            f"table {target.place} holds rows that are not ours, and the topic's mode is error; "
            "it was left untouched",
            "rename that table, or: casparian topics set ... --mode append",
        )


# The tables of SQL Server that a topic's rows are in, and how they come to have its columns.
#
# What makes or widens a table is a transaction of its own, before any row: under a lock of the
# schema, and only where something is missing. It is never undone: a table without rows, or a column
# of nulls, is what the next attempt needs.


class Recorded(NamedTuple):
    """The ledger's row of an output."""

    output_key: str
    topic: str
    rows: int
    digest: str
    mode: str
    state: str
    slot: str
    ordinal: int
    file_version_id: int
    job_id: int
    source_hash: str
    plugin_version: str
    facts: str

    @property
    def lineage(self) -> tuple[int, int, str, str]:
        """What its rows have in the lineage columns."""
        return self.file_version_id, self.job_id, self.source_hash, self.plugin_version


assert Recorded._fields == RECORDED


class Target:
    """One table, with the ledger beside it.

    Args:
        session: to ask of, while the target is used.
        schema: empty means the login's own.
        table: its name.
    """

    def __init__(self, session: Session, schema: str, table: str) -> None:
        if not schema:
            ((schema,),) = session.execute(statements.default_schema())
        self.session = session
        self.schema = schema
        self.table = table
        self.ask = statements.Statements(schema, table)
        self.aside = statements.retracted_name(table)
        """The table of what was retracted."""

    @property
    def place(self) -> str:
        """What people call it."""
        return f"mssql://{self.schema}.{self.table}"

    def has_ledger(self) -> bool:
        """Whether anything was published in the schema."""
        return bool(self._columns(LEDGER))

    def prepare(self, topic: str, schema: Any) -> list[Column]:
        """Have the ledger, and the table with the columns of an output; the columns as the table
        has them, without those that have nothing but nulls.

        Args:
            topic: whose output it is.
            schema: of the staged rows, the lineage columns too.

        Raises:
            SinkConflict: the table is not one of ours, or is another topic's.
            OutputRefused: a column has another type in the table, or there are too many.
        """
        wanted = columns_of(schema)
        there = self._columns(self.table)
        if not self.has_ledger() or _missing(wanted, there):
            with self.session.transaction([f"casparian:{fold(self.schema)}"]):
                self._make_ledger()
                there = self._columns(self.table)  # another may have made it by now
                self._make(wanted, there)
            crashpoint("mssql.table_ready")
            there = self._columns(self.table)
        self._check_ours(there)
        self._check_topic(topic)
        fitted = [column.fit(there[fold(column.name)][1]) for column in wanted if column.declared]
        names = {key: name for key, (name, _) in there.items()}
        return [column.named(names[fold(column.name)]) for column in fitted]

    def recorded(self, key: str) -> Recorded | None:
        """What the ledger says of an output key."""
        rows = self.session.execute(self.ask.recorded(key))
        return Recorded(*rows[0]) if rows else None

    def in_table(self) -> list[Recorded]:
        """What the ledger says of all outputs of the table."""
        return [Recorded(*row) for row in self.session.execute(self.ask.in_table())]

    def in_slot(self, slot: str) -> list[Recorded]:
        """What it says of those of a slot under `replace`."""
        return [Recorded(*row) for row in self.session.execute(self.ask.in_slot(slot))]

    def is_late(self, output: Recorded | StagedOutput) -> bool:
        """Whether a greater output has its slot."""
        place = (output.ordinal, output.job_id)
        return output.mode == "replace" and any(
            (each.ordinal, each.job_id) > place for each in self.in_slot(output.slot)
        )

    def counts(self) -> dict[tuple[Any, ...], int]:
        """Lineage of each output that has rows in the table -> how many."""
        if not self._columns(self.table):
            return {}
        rows = self.session.execute(self.ask.counts(self.table))
        return {tuple(lineage): there for *lineage, there in rows}

    def names(self) -> list[str]:
        """The columns of the table."""
        return [name for name, _ in self._columns(self.table).values()]

    def prepare_aside(self) -> None:
        """Have a table for what is retracted, with the columns of the topic's."""
        there, aside = self._columns(self.table), self._columns(self.aside)
        missing = [Declared(*there[key]) for key in there if key not in aside]
        if missing:
            with self.session.transaction([f"casparian:{fold(self.schema)}"]):
                aside = self._columns(self.aside)
                missing = [Declared(*there[key]) for key in there if key not in aside]
                self._add(self.aside, missing, new=not aside)

    def has_aside(self) -> bool:
        """Whether anything was ever retracted."""
        return bool(self._columns(self.aside))

    def _columns(self, table: str) -> dict[str, tuple[str, str]]:
        """Folded name -> name and type of a table's columns; empty where it is not there."""
        rows = self.session.execute(statements.columns(self.schema, table))
        return {fold(name): (name, declared_as(*described)) for name, *described in rows}

    def _make_ledger(self) -> None:
        if not self.has_ledger():
            self.session.execute(*self.ask.create_ledger())
            crashpoint("mssql.ledger_made")

    def _make(self, wanted: Sequence[Column], there: dict[str, tuple[str, str]]) -> None:
        if there:
            self._check_ours(there)
        missing = _missing(wanted, there)
        check_count(len(there.keys() | {fold(each.name) for each in missing}) - len(LINEAGE))
        self._add(self.table, missing, new=not there)

    def _add(self, table: str, missing: Sequence[Declared], *, new: bool) -> None:
        if missing and new:
            self.session.execute(*statements.create(self.schema, table, missing))
        elif missing:
            self.session.execute(statements.add_columns(self.schema, table, missing))

    def _check_ours(self, there: dict[str, tuple[str, str]]) -> None:
        if not there.keys() >= set(LINEAGE):
            raise SinkConflict(
                f"table {self.place} is not one of ours; it was left untouched",
                "rename that table, or give the topic another",
            )

    def _check_topic(self, topic: str) -> None:
        if others := self.session.execute(self.ask.others(topic)):
            raise SinkConflict(
                f"table {self.place} has the rows of topic {others[0][0]!r}; it was left untouched",
                f"give topic {topic!r} a table of its own",
            )


def _missing(wanted: Sequence[Column], there: dict[str, tuple[str, str]]) -> list[Declared]:
    """The columns that a table lacks; one of nulls waits for its type."""
    ours = dict(zip(LINEAGE, LINEAGE_TYPES, strict=True))
    return [
        Declared(column.name, ours.get(column.name, column.declared))
        for column in wanted
        if column.declared and fold(column.name) not in there
    ]
