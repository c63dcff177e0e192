"""The SQL Server sink: how an output is published exactly once.

    look      read the ledger, under a lock on the output key that waits for other publishers
    load      bulk load the staged rows into a stage table; it may be repeated
    publish   one transaction for a job: lock keys and slots, read the ledger again, write the
              ledger, copy the rows from the stage tables into their tables, change the states of
              other outputs
    clean     drop the stage tables

After an error during the commit it is unknown whether the transaction was committed. Then, and
after a deadlock, all steps are repeated, after such an error on a new connection. The server
releases the lock on the key only when it has ended the old connection, so the ledger's answer is
final.

A stage table is named after the staged file, so that a repeated try finds it. Whether it has all
of the output's rows is counted when they are copied. A Worker needs neither the server nor a
password: it stages beside Casparian Flow's ledger and checks the columns.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from casparian_flow.config import DatabaseSettings, MssqlSettings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks import table_of
from casparian_flow.engine.sinks.columns import pieces
from casparian_flow.engine.sinks.mssql_session import Fault, Kind, Refused, Session, refusal
from casparian_flow.engine.sinks.mssql_tables import STAGE, MssqlSchema, Staged, quote
from casparian_flow.engine.sinks.mssql_types import Column, check_values, columns_of
from casparian_flow.engine.sinks.sql_sink import SchemaOf, SqlSink, publish_job
from casparian_flow.engine.sinks.stage import Stage, reading
from casparian_flow.errors import JobError, SinkUnavailable
from casparian_flow.protocol import Output, Publication


class MssqlSink(SqlSink):
    """A table of SQL Server. Outputs of any table of that server can be published and changed.

    Args:
        location: `mssql://table` or `mssql://schema.table`.
        database: settings of the ledger's database: where to stage, and how to reach the server.
    """

    def __init__(self, location: str, database: DatabaseSettings) -> None:
        super().__init__(location, table_of(location)[1])
        self.stage_folder = database.stage_folder
        self._settings = database.mssql

    def open_stage(self, output: Output, attempt: str) -> Stage:
        """See `Sink.open_stage`. Does not connect to the server."""
        return Stage(self.stage_folder, output, attempt, check=check_values)

    def publish_jobs(self, jobs: Sequence[Publication]) -> list[list[Output] | JobError]:
        """See `SqlSink.publish_jobs`. One transaction for each job."""
        with contextlib.closing(_Publisher(self._settings)) as publisher:
            return [publisher.away or publisher.publish(job) for job in jobs]

    @contextlib.contextmanager
    def writing(self, outputs: Sequence[Output]) -> Iterator[SchemaOf]:
        """See `SqlSink.writing`.

        If it is unknown whether the transaction was committed, SinkUnavailable is raised. The
        caller may repeat the change.
        """
        with self._session() as session, session.transaction(_locks(outputs)):
            yield schemas(session)

    @contextlib.contextmanager
    def reading(self) -> Iterator[SchemaOf | None]:
        """See `SqlSink.reading`."""
        with self._session() as session:
            yield schemas(session)

    def drop_stages(self, tag: str, owed: Iterable[str]) -> None:
        """See `sinks.drop_stages`."""
        kept = {stage_table(file) for file in owed}
        with self._session() as session:
            schema = MssqlSchema(session, table_of(self.location)[0])
            begin = f"{STAGE}{tag}-"
            found = session.ask(
                "SELECT t.name FROM sys.tables AS t WHERE t.schema_id = SCHEMA_ID(?) "
                "AND LEFT(t.name, ?) = ? ORDER BY t.name",
                schema.name, len(begin), begin,
            )  # fmt: skip
            for (table,) in found:
                if table not in kept:
                    with session.transaction():
                        session.send(f"DROP TABLE IF EXISTS {schema.table(table)}")
                    crashpoint("mssql.stage_swept")

    @contextlib.contextmanager
    def _session(self) -> Iterator[Session]:
        """A new connection; what goes wrong with it is SinkUnavailable."""
        try:
            with contextlib.closing(Session(self._settings, self.location)) as session:
                yield session
        except Refused as refused:
            fault = refused.fault._replace(kind=Kind.PAUSE)
            raise refusal(fault, self.location) from None


def schemas(session: Session) -> Callable[[str], MssqlSchema]:
    """The schemas of locations, over one connection; each is the same when asked for again."""

    @functools.cache
    def named(schema: str) -> MssqlSchema:
        return MssqlSchema(session, schema)

    return lambda location: named(table_of(location)[0])


BATCH_ROWS = 64 << 10
"""Rows converted and sent to the server at once."""

TRIES = 3
"""How often to try to publish a job's outputs before the sink is paused."""


class _Publisher:
    """Publishes one job after another on one connection, replaced if it is lost.

    Args:
        settings: the server.
    """

    def __init__(self, settings: MssqlSettings) -> None:
        self._settings = settings
        self._session: Session | None = None
        self.away: SinkUnavailable | None = None
        """Why there is no connection. Later jobs then fail without another try, because each may
        take long and other sinks wait."""

    def close(self) -> None:
        """Close the connection."""
        if self._session:
            self._session.close()
        self._session = None

    def publish(self, job: Publication) -> list[Output] | JobError:
        """Publish a job; see `Sink.publish`."""
        place = ", ".join(dict.fromkeys(output.location for output in job.outputs))
        fault: JobError
        for _ in range(TRIES):
            try:
                self._session = self._session or Session(self._settings, place)
            except SinkUnavailable as error:
                self.away = error
                return error
            try:
                return _try(self._session, job)
            except Refused as refused:
                fault = refusal(refused.fault, place)
                if refused.fault.kind is Kind.LOST:
                    self.close()
                elif refused.fault.kind is not Kind.RETRY:
                    break
            except JobError as error:
                return error
        return fault


def _try(session: Session, job: Publication) -> list[Output]:
    """Publish a job.

    Raises:
        Refused: the server or the driver refused; uncommitted changes are rolled back.
        JobError: the staged rows cannot be read, or the table cannot hold them.
    """
    schema_of = schemas(session)
    locks = _locks([*job.outputs, *job.changes])
    new = []
    with session.transaction(locks):
        for output in job.outputs:
            schema_of(output.location).check_form()
            if not schema_of(output.location).record(output.output_key):
                new.append(output)
    for output in new:
        schema_of(output.location).make_ledger()
    with contextlib.ExitStack() as stack:
        for output in new:
            if output.stage:
                stack.enter_context(_staged(session, schema_of(output.location), output))
        with session.transaction(locks):
            crashpoint("mssql.begun")
            published = publish_job(schema_of, job)
            crashpoint("mssql.all_written")
        crashpoint("mssql.committed")
    return published


def _locks(outputs: Sequence[Output]) -> list[str]:
    """What is locked to change these outputs: their keys and location slots."""
    return [f"casparian:{key}" for o in outputs for key in (o.output_key, o.location_slot)]


def stage_table(stage: str) -> str:
    """The stage table of a staged file."""
    return STAGE + Path(stage).name.partition(".")[0]


@contextlib.contextmanager
def _staged(session: Session, schema: MssqlSchema, output: Output) -> Iterator[None]:
    """Load an output's rows into a stage table, which exists while the block runs."""
    with reading(output) as staged:
        number, columns = schema.prepare(output, staged.schema_arrow)
        names = [column.name for column in columns]
        if not output.rows:
            schema.staged[output.output_key] = Staged("", names, number)
            yield
            return
        # Columns of nulls only are not loaded; a table has at least one, and so have rows.
        loaded = columns or columns_of(staged.schema_arrow)[-1:]
        table = stage_table(output.stage)
        drop = f"DROP TABLE IF EXISTS {schema.table(table)}"
        described = ", ".join(f"{quote(c.name)} {c.loaded} NULL" for c in loaded)
        with session.transaction():
            session.send(drop)
            session.send(f"CREATE TABLE {schema.table(table)} ({described})")
        crashpoint("mssql.stage_made")
        _load(session, schema.table(table), staged, loaded, output.rows)
        crashpoint("mssql.loaded")
    schema.staged[output.output_key] = Staged(table, names, number)
    try:
        yield
    finally:
        # If this fails, a repeated try, or `drop_stages`, removes it.
        with contextlib.suppress(Refused), session.transaction():
            session.send(drop)


def _load(session: Session, table: str, staged: Any, columns: Sequence[Column], rows: int) -> None:
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
        sent = session.load(table, pa.RecordBatchReader.from_batches(fields, batches()))
    except Refused:
        if faults:
            raise faults[0] from None
        raise
    if sent != rows:
        raise Refused(Fault(Kind.RETRY, f"{sent} of {rows} rows arrived in {table}"))
