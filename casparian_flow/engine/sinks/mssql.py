"""The SQL Server sink: a table of the configured server, and the sink's ledger in its schema.

`mssql_types` has the conversion of values, `mssql_statements` the SQL, `mssql_session` the
connection and its errors. A Worker needs neither the server nor a password: it stages beside
Casparian Flow's ledger and checks the columns.
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
    """A table of SQL Server. `publish` accepts outputs for any table of that server.

    Args:
        location: `mssql://table` or `mssql://schema.table`.
        database: settings of the ledger's database: where to stage, and how to reach the server.
    """

    def __init__(self, location: str, database: DatabaseSettings) -> None:
        self.location = location
        self.stage_folder = database.stage_folder
        self._settings = database.mssql

    def open_stage(self, plan: OutputPlan, lineage: Lineage, attempt: str) -> Stage:
        """See `Sink.open_stage`. Does not connect to the server."""
        return Stage(self.stage_folder, plan, lineage, attempt, check=check_values)

    def publish(self, outputs: Sequence[StagedOutput]) -> list[Published | JobError]:
        """See `Sink.publish`. One transaction for each job."""
        jobs: dict[tuple[int, int], list[StagedOutput]] = {}
        seen = Counter[str]()
        for output in outputs:  # a repeated output comes after the first one, and adopts it
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
                counted = target.counts() if any(record.rows for record in ledger) else {}
        except SinkUnavailable as error:
            return [f"{claim.target} cannot be read: {error.message}" for claim in claims]
        known = {record.output_key: record for record in ledger}
        return [f"{c.target}: {fault}" for c in claims if (fault := _fault(c, known, counted))]

    def inventory(self, known: Container[str]) -> Iterator[Found]:
        """See `Sink.inventory`. Reads the ledger beside the table."""
        with self._target() as target:
            ledger = target.in_table() if target.has_ledger() else []
        for record in ledger:
            retracted = record.state == RETRACTED
            if retracted or record.output_key[:KEY_DIGITS] not in known:
                facts = {**json.loads(record.facts), "output_key": record.output_key}
                yield found(target.place, record.rows, record.digest, facts, retracted=retracted)

    def withdraw(self, claim: Claim) -> None:
        """See `Sink.withdraw`. Deletes the output's ledger entry and the rows left of it. If the
        entry is gone, deletes the job's rows that belong to no other output."""
        with self._changing(claim) as (target, record):
            ask, send = target.ask, target.session.execute
            if record:
                send(ask.delete_rows(record.lineage))
                if target.has_aside():
                    send(ask.delete_retracted(record.lineage))
                send(ask.forget(record.output_key))
            elif target.has_ledger():
                brought = {other.lineage for other in target.in_table()}
                for lineage in target.counts().keys() - brought:
                    if lineage[1] == claim.job_id:
                        send(ask.delete_rows(lineage))

    def retract(self, claim: Claim) -> None:
        """See `Sink.retract`. The rows move to another table as the ledger entry changes."""
        with self._changing(claim, aside=True) as (target, record):
            if record and record.state == SHOWN:
                moves = target.ask.move_out(record.lineage, target.names())
                _move(target, record, RETRACTED, moves)

    def reinstate(self, claim: Claim) -> None:
        """See `Sink.reinstate`."""
        with self._changing(claim, aside=True) as (target, record):
            if record is None:
                raise SinkConflict(
                    f"{claim.target}: its table _cf_outputs does not list the output"
                )
            if record.state == RETRACTED and target.is_late(record):
                _move(target, record, REPLACED, [target.ask.delete_retracted(record.lineage)])
            elif record.state == RETRACTED:
                moves = target.ask.move_back(record.lineage, target.names())
                _move(target, record, SHOWN, moves)

    def drop_stages(self, tag: str, owed: Iterable[str]) -> None:
        """See `sinks.drop_stages`. A table whose lock another program holds stays."""
        kept = {stage_table(file) for file in owed}
        with self._target() as target:
            session = target.session
            for (table,) in session.execute(statements.stage_tables(target.schema, tag)):
                if table not in kept and session.try_lock(table):
                    with session.transaction():
                        session.execute(statements.drop(target.schema, table))
                    crashpoint("mssql.stage_swept")

    @contextlib.contextmanager
    def _target(self) -> Iterator[Target]:
        """The table, on a new connection.

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
        """A transaction that changes an output's state; yields its ledger entry too.

        If it is unknown whether the transaction was committed, SinkUnavailable is raised. The
        caller may repeat the change; a change that was made is not made again.

        Args:
            aside: create the table of retracted rows if it is missing.
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
    """Change an output's state: move its rows, and update its ledger entry.

    Raises:
        SinkConflict: the number of rows is not the number that was published.
    """
    for moved in map(target.session.change, moves):
        if moved != record.rows:
            raise SinkConflict(
                f"{target.place} has {moved} rows of job {record.job_id} instead of the "
                f"{record.rows} published; nothing was changed",
                f"casparian outputs restore {record.job_id}",
            )
    target.session.execute(target.ask.mark(record.output_key, state))


def _fault(claim: Claim, ledger: dict[str, Recorded], counted: dict[Any, int]) -> str:
    """What is wrong with a claimed output; empty if nothing is."""
    record = ledger.get(claim.output_key)
    if record is None or (record.rows, record.digest) != (claim.rows, claim.digest):
        return f"its table _cf_outputs does not list the output of job {claim.job_id}"
    if record.state != SHOWN:
        return f"its table _cf_outputs has the output of job {claim.job_id} as {record.state}"
    if (rows := counted.get(record.lineage, 0)) != record.rows:
        return f"{rows} rows of job {record.job_id} instead of the {record.rows} published"
    return ""


# Publishing, exactly once for each output key:
#
#     look      read the ledger, under a lock on the output key that waits for other publishers
#     load      bulk load the staged rows into a stage table; it may be repeated
#     publish   one transaction for a job: lock keys and slots, read the ledger again, write the
#               ledger entries, copy the rows from the stage tables into their tables
#     clean     drop the stage tables
#
# After an error during the commit it is unknown whether the transaction was committed. Then, and
# after a deadlock, all steps are repeated, after such an error on a new connection. The server
# releases the lock on the key only when it has ended the old connection, so the ledger's answer is
# final.
#
# A stage table is named after the staged file, so that a repeated try finds it. While it is used, a
# session holds a lock on its name.


BATCH_ROWS = 64 << 10
"""Rows converted and sent to the server at once."""

TRIES = 3
"""How often to try to publish a job's outputs before the sink is paused."""


class _Loaded(NamedTuple):
    """An output whose rows are in a stage table."""

    output: StagedOutput
    target: Target
    stage: str
    """Name of the stage table; empty if the output has no rows."""
    names: list[str]
    """The stage table's columns."""
    facts: dict[str, str]
    """The facts in the staged file's footer."""


class Publisher:
    """Publishes one job after another on one connection, replaced if it is lost. Must be closed.

    Args:
        settings: the server.
    """

    def __init__(self, settings: MssqlSettings) -> None:
        self._settings = settings
        self._session: Session | None = None
        self._away: JobError | None = None

    def close(self) -> None:
        """Close the connection."""
        if self._session:
            self._session.close()
        self._session = None

    def publish(self, outputs: Sequence[StagedOutput]) -> list[Published | JobError]:
        """Publish the outputs of one job; see `Sink.publish`.

        If the server cannot be reached, later jobs fail without another try, because each may take
        long and other sinks wait.
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
        """The connection; opened if there is none.

        Raises:
            SinkUnavailable: connecting fails, or has failed before.
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
        """Publish the outputs that are not published yet; adds every outcome to `done`.

        Raises:
            Refused: the server or the driver refused; uncommitted changes are rolled back.
            JobError: the staged rows cannot be read, or the table cannot hold them.
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
                        entry.output.output_key: _add(session, entry)
                        for entry in loaded
                        if entry.output.output_key not in found
                    }
                    crashpoint("mssql.all_written")
                crashpoint("mssql.committed")
                done |= found | added


def _places(outputs: Sequence[StagedOutput]) -> str:
    return ", ".join(dict.fromkeys(output.location for output in outputs))


def locks(keys: Iterable[str]) -> list[str]:
    """The names of the locks for output keys and slots."""
    return [f"casparian:{key}" for key in keys]


def stage_table(stage: str) -> str:
    """The stage table of a staged file."""
    return STAGE + Path(stage).name.partition(".")[0]


def _locks_of(outputs: Sequence[StagedOutput]) -> list[str]:
    slots = [output.slot for output in outputs if output.mode == "replace"]
    return locks([*(output.output_key for output in outputs), *slots])


def _adopted(aims: Sequence[tuple[StagedOutput, Target]]) -> dict[str, Published]:
    """The outcomes of outputs that the ledgers already have, by output key."""
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
    """Load an output's rows into a stage table, which exists while the block runs."""
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
        with contextlib.suppress(Refused):  # then a repeated try, or `drop_stages`, removes it
            with session.transaction():
                session.execute(statements.drop(target.schema, table))
            session.execute(statements.unlock(table))


def _load(
    session: Session, schema: str, table: str, staged: Any, columns: Sequence[Column], rows: int
) -> None:
    """Send the staged rows to a stage table.

    Raises:
        OutputRefused: SQL Server cannot hold a value.
        Refused: not all rows arrived.
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
        except JobError as error:  # the driver would replace it with its own error
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


def _add(session: Session, loaded: _Loaded) -> Published:
    """Write the ledger entry, then the rows; delete the rows that they replace."""
    output, target = loaded.output, loaded.target
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
                "file_version_id": int(loaded.facts["file_version_id"]),
                "source_hash": loaded.facts["source_hash"],
                "plugin_version": loaded.facts["plugin_version"], "rows": output.rows,
                "digest": output.digest, "slot": output.slot, "ordinal": output.ordinal,
                "mode": output.mode, "state": REPLACED if late else SHOWN,
                "facts": json.dumps(loaded.facts),
            }
        )
    )  # fmt: skip
    crashpoint("mssql.ledger_written")
    if loaded.stage and not late:
        moved = session.change(target.ask.insert_staged(loaded.stage, loaded.names))
        if moved != output.rows:
            raise Refused(Fault(Kind.RETRY, f"{moved} rows were in {loaded.stage}"))
        crashpoint("mssql.rows_written")
    return Published(target=target.place, rows=output.rows, digest=output.digest, adopted=False)


def _check_all_ours(target: Target) -> None:
    """Check that the table has only rows that we published.

    Raises:
        SinkConflict: it has other rows.
    """
    records = target.in_table()
    shown = {record.lineage: record.rows for record in records if record.state == SHOWN}
    if target.counts() != {lineage: rows for lineage, rows in shown.items() if rows}:
        raise SinkConflict(
            f"table {target.place} has rows that Casparian Flow did not write, and the topic's "
            "mode is error; it was left untouched",
            "rename that table, or: casparian topics set ... --mode append",
        )


# Tables are created and get new columns in a transaction of their own, before rows are written and
# under a lock on the schema. It is never undone: the next attempt needs the table and its columns.


class Recorded(NamedTuple):
    """The ledger entry of an output."""

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
        """The values of its rows in the lineage columns."""
        return self.file_version_id, self.job_id, self.source_hash, self.plugin_version


assert Recorded._fields == RECORDED


class Target:
    """One table, with the sink's ledger in its schema.

    Args:
        session: must stay open while the target is used.
        schema: the table's schema; empty means the login's default schema.
        table: the table's name.
    """

    def __init__(self, session: Session, schema: str, table: str) -> None:
        if not schema:
            ((schema,),) = session.execute(statements.default_schema())
        self.session = session
        self.schema = schema
        self.table = table
        self.ask = statements.Statements(schema, table)
        self.aside = statements.retracted_name(table)
        """Name of the table of retracted rows."""

    @property
    def place(self) -> str:
        """The table's URI, for messages."""
        return f"mssql://{self.schema}.{self.table}"

    def has_ledger(self) -> bool:
        """Whether the schema has the sink's ledger."""
        return bool(self._columns(LEDGER))

    def prepare(self, topic: str, schema: Any) -> list[Column]:
        """Create the ledger and the table, or add the columns that the table lacks.

        Args:
            topic: the output's topic.
            schema: the columns of the staged rows, including the lineage columns.

        Returns:
            The output's columns fitted to the table, without columns of nulls only.

        Raises:
            SinkConflict: the table is not one of ours, or has another topic's rows.
            OutputRefused: a column has another type in the table, or there are too many.
        """
        wanted = columns_of(schema)
        existing = self._columns(self.table)
        if not self.has_ledger() or _missing(wanted, existing):
            with self.session.transaction([f"casparian:{fold(self.schema)}"]):
                self._make_ledger()
                existing = self._columns(self.table)  # another process may have created it
                self._make(wanted, existing)
            crashpoint("mssql.table_ready")
            existing = self._columns(self.table)
        self._check_ours(existing)
        self._check_topic(topic)
        fitted = [
            column.fit(existing[fold(column.name)][1]) for column in wanted if column.declared
        ]
        names = {key: name for key, (name, _) in existing.items()}
        return [column.named(names[fold(column.name)]) for column in fitted]

    def recorded(self, key: str) -> Recorded | None:
        """The ledger entry of an output key."""
        rows = self.session.execute(self.ask.recorded(key))
        return Recorded(*rows[0]) if rows else None

    def in_table(self) -> list[Recorded]:
        """The ledger entries of all outputs of the table."""
        return [Recorded(*row) for row in self.session.execute(self.ask.in_table())]

    def in_slot(self, slot: str) -> list[Recorded]:
        """The ledger entries of a slot's outputs in mode `replace`."""
        return [Recorded(*row) for row in self.session.execute(self.ask.in_slot(slot))]

    def is_late(self, output: Recorded | StagedOutput) -> bool:
        """Whether the output's slot already has a greater output."""
        order = (output.ordinal, output.job_id)
        return output.mode == "replace" and any(
            (other.ordinal, other.job_id) > order for other in self.in_slot(output.slot)
        )

    def counts(self) -> dict[tuple[Any, ...], int]:
        """Lineage of each output with rows in the table -> how many rows."""
        if not self._columns(self.table):
            return {}
        rows = self.session.execute(self.ask.counts(self.table))
        return {tuple(lineage): count for *lineage, count in rows}

    def names(self) -> list[str]:
        """The columns of the table."""
        return [name for name, _ in self._columns(self.table).values()]

    def prepare_aside(self) -> None:
        """Create the table of retracted rows, or add the columns that it lacks."""
        existing, aside = self._columns(self.table), self._columns(self.aside)
        missing = [Declared(*existing[key]) for key in existing if key not in aside]
        if missing:
            with self.session.transaction([f"casparian:{fold(self.schema)}"]):
                aside = self._columns(self.aside)
                missing = [Declared(*existing[key]) for key in existing if key not in aside]
                self._add(self.aside, missing, new=not aside)

    def has_aside(self) -> bool:
        """Whether the table of retracted rows exists."""
        return bool(self._columns(self.aside))

    def _columns(self, table: str) -> dict[str, tuple[str, str]]:
        """Folded name -> name and type of a table's columns; empty if there is no such table."""
        rows = self.session.execute(statements.columns(self.schema, table))
        return {fold(name): (name, declared_as(*described)) for name, *described in rows}

    def _make_ledger(self) -> None:
        if not self.has_ledger():
            self.session.execute(*self.ask.create_ledger())
            crashpoint("mssql.ledger_made")

    def _make(self, wanted: Sequence[Column], existing: dict[str, tuple[str, str]]) -> None:
        if existing:
            self._check_ours(existing)
        missing = _missing(wanted, existing)
        names = existing.keys() | {fold(column.name) for column in missing}
        check_count(len(names) - len(LINEAGE))
        self._add(self.table, missing, new=not existing)

    def _add(self, table: str, missing: Sequence[Declared], *, new: bool) -> None:
        if missing and new:
            self.session.execute(*statements.create(self.schema, table, missing))
        elif missing:
            self.session.execute(statements.add_columns(self.schema, table, missing))

    def _check_ours(self, existing: dict[str, tuple[str, str]]) -> None:
        if not existing.keys() >= set(LINEAGE):
            raise SinkConflict(
                f"table {self.place} was not made by Casparian Flow; it was left untouched",
                "rename that table, or give the topic another table",
            )

    def _check_topic(self, topic: str) -> None:
        if others := self.session.execute(self.ask.others(topic)):
            raise SinkConflict(
                f"table {self.place} has the rows of topic {others[0][0]!r}; it was left untouched",
                f"give topic {topic!r} a table of its own",
            )


def _missing(wanted: Sequence[Column], existing: dict[str, tuple[str, str]]) -> list[Declared]:
    """The columns that a table lacks; a column of nulls is added later, with its type."""
    ours = dict(zip(LINEAGE, LINEAGE_TYPES, strict=True))
    return [
        Declared(column.name, ours.get(column.name, column.declared))
        for column in wanted
        if column.declared and fold(column.name) not in existing
    ]
