"""The SQLite sink: how a database is opened, locked and written, and what its errors mean.

One call of `publish` is one transaction with a savepoint for each job, so a job that is refused
undoes only its own changes.
"""

from __future__ import annotations

import contextlib
import glob
import sqlite3
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from casparian_flow import durable
from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks.base import unavailable
from casparian_flow.engine.sinks.sql_sink import SchemaOf, SqlSink, publish_job
from casparian_flow.engine.sinks.sqlite_tables import SqliteSchema, check_table, check_values
from casparian_flow.engine.sinks.stage import Stage
from casparian_flow.errors import JobError, OutputRefused, SinkConflict, SinkUnavailable
from casparian_flow.protocol import Output, Publication

BUSY_SECONDS = 5.0
"""How long to wait for another program's lock before the sink counts as unavailable."""

_PASSING = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_PROTOCOL,
}  # fmt: skip
"""Result codes after which the same rows may be accepted later."""


class SqliteSink(SqlSink):
    """A SQLite database.

    Args:
        path: the database; created, in WAL mode, with the first output.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(f"sqlite:///{path}")
        self.path = path
        self.stage_folder = path.parent / durable.STATE_FOLDER / "stage"

    def open_stage(self, output: Output, attempt: str) -> Stage:
        """See `Sink.open_stage`."""
        return Stage(
            self.stage_folder, output, attempt, admit=partial(check_table, output.topic),
            check=check_values, known=partial(self._names, output.topic),
        )  # fmt: skip

    def _names(self, topic: str) -> list[str]:
        """The columns of a topic; none if the database cannot be read now."""
        try:
            with self.reading() as schema_of:
                return [*schema_of(self.location).columns(topic)] if schema_of else []
        except JobError:
            return []

    def publish_jobs(self, jobs: Sequence[Publication]) -> list[list[Output] | JobError]:
        """See `SqlSink.publish_jobs`. One transaction for all jobs."""
        try:
            with self._transaction() as schema:
                if not schema.has_ledger():
                    schema.create_ledger()
                crashpoint("sqlite.ledger_ready")
                outcomes = [self._publish(schema, job) for job in jobs]
                if all(isinstance(outcome, JobError) for outcome in outcomes):
                    schema.connection.rollback()  # nothing was published: create no ledger either
                return outcomes
        except (OSError, sqlite3.Error) as error:
            return [self._refusal(error)] * len(jobs)

    def _publish(self, schema: SqliteSchema, job: Publication) -> list[Output] | JobError:
        """Publish a job in a savepoint."""
        connection = schema.connection
        connection.execute("SAVEPOINT job")
        try:
            outcome: list[Output] | JobError = publish_job(lambda _: schema, job)
        except (JobError, sqlite3.Error) as error:
            if not connection.in_transaction:  # SQLite has rolled back the whole transaction
                raise
            connection.execute("ROLLBACK TO job")
            topics = _topics(job.outputs)
            outcome = error if isinstance(error, JobError) else self._refusal(error, topics)
        connection.execute("RELEASE job")
        return outcome

    @contextlib.contextmanager
    def writing(self, outputs: Sequence[Output]) -> Iterator[SchemaOf]:
        """See `SqlSink.writing`. All outputs are in this database."""
        if not self.path.exists():
            with contextlib.closing(sqlite3.connect(":memory:")) as nothing:
                yield lambda _: SqliteSchema(nothing, self.path)
            return
        try:
            with self._transaction() as schema:
                yield lambda _: schema
        except (OSError, sqlite3.Error) as error:
            raise self._refusal(error, _topics(outputs)) from error

    @contextlib.contextmanager
    def reading(self) -> Iterator[SchemaOf | None]:
        """See `SqlSink.reading`. One transaction."""
        if not self.path.exists():
            yield None
            return
        try:
            uri = f"{self.path.as_uri()}?mode=ro"
            opened = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
            with contextlib.closing(opened) as connection:
                connection.execute("BEGIN")
                schema = SqliteSchema(connection, self.path)
                yield lambda _: schema
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_NOTADB:
                raise self._refusal(error) from error
            raise SinkUnavailable(
                f"cannot read {self.path}: {error}", "make it readable, and try again"
            ) from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[SqliteSchema]:
        """A transaction that may write; rolled back if the block raises.

        All our processes take a lock for it: SQLite before 3.51.3 may corrupt a WAL database when
        two connections write or checkpoint at the same time.
        """
        folder, name = self.path.parent, self.path.name
        durable.own(folder, glob.escape(name) + "*")
        with (
            durable.exclusive(folder / durable.STATE_FOLDER / f"{name}.gate"),
            contextlib.closing(
                sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
            ) as connection,
        ):
            if not self.path.stat().st_size:  # new: in WAL mode readers never block the writer
                connection.execute("PRAGMA journal_mode = WAL")
                crashpoint("sqlite.created")
            connection.execute("PRAGMA synchronous = FULL")
            # ALTER TABLE RENAME then leaves other people's views as they are; it counts for this
            # connection only, and cannot be set within a transaction.
            connection.execute("PRAGMA legacy_alter_table = ON")
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                crashpoint("sqlite.begun")
                yield SqliteSchema(connection, self.path)
                crashpoint("sqlite.all_written")
            crashpoint("sqlite.committed")

    def _refusal(self, error: OSError | sqlite3.Error, topics: str = "") -> JobError:
        """The error to report for one of the disk or SQLite."""
        if isinstance(error, OSError):
            return unavailable(error, self.path)
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code in _PASSING:
            return SinkUnavailable(
                f"cannot write {self.path}: {error}",
                "make it writable, and close programs that lock it; the jobs then continue by "
                "themselves",
            )
        if code == sqlite3.SQLITE_NOTADB:
            return SinkConflict(f"{self.path} is not a SQLite database; it was left untouched")
        if not topics:
            return SinkConflict(f"{self.path} cannot be changed: {error}; it was left untouched")
        return OutputRefused(f"topic {topics}: {self.path} does not accept the rows: {error}")


def _topics(outputs: Sequence[Output]) -> str:
    return ", ".join(dict.fromkeys(repr(output.topic) for output in outputs))
