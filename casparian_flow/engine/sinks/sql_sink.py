"""What all sinks in SQL databases do, each act in one transaction; `sql.py` has the tables."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from msgspec import structs

from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks.sql import SEEN, Schema
from casparian_flow.engine.sinks.sql_upgrade import upgrade
from casparian_flow.errors import JobError, SinkConflict, SinkUnavailable
from casparian_flow.protocol import Output, Publication, State

SchemaOf = Callable[[str], Schema]
"""The schema of a location, in the open transaction."""


class SqlSink(ABC):
    """A sink in a SQL database.

    Args:
        location: as `sinks.resolve` returned it.
        view: the only topic's view that belongs to the sink; empty if all of the database do.
    """

    def __init__(self, location: str, view: str = "") -> None:
        self.location = location
        self.view = view

    @abstractmethod
    def publish_jobs(self, jobs: Sequence[Publication]) -> list[list[Output] | JobError]:
        """Publish each job with `publish_job`, wholly or not at all."""

    @abstractmethod
    def writing(self, outputs: Sequence[Output]) -> AbstractContextManager[SchemaOf]:
        """A transaction that changes these outputs; committed unless the block raises.

        Raises:
            JobError: the database's own errors, classified.
        """

    @abstractmethod
    def reading(self) -> AbstractContextManager[SchemaOf | None]:
        """A connection for reading; None if the database does not exist.

        Raises:
            SinkConflict: it is no database.
            SinkUnavailable: it cannot be read.
        """

    def publish(self, jobs: Sequence[Publication]) -> list[list[Output] | JobError]:
        """See `Sink.publish`."""
        outcomes = self.publish_jobs(jobs)
        for job, outcome in zip(jobs, outcomes, strict=True):
            if not isinstance(outcome, JobError):
                for output in job.outputs:
                    if output.stage:
                        with contextlib.suppress(OSError):
                            Path(output.stage).unlink()
                        crashpoint("sql.unstaged")
        return outcomes

    def change(self, outputs: Sequence[Output]) -> None:
        """See `Sink.change`. One transaction."""
        if not outputs:
            return
        with self.writing(outputs) as schema_of:
            change_outputs(schema_of, outputs)
            crashpoint("sql.change_written")
        crashpoint("sql.changed")

    def delete(self, outputs: Sequence[Output]) -> None:
        """See `Sink.delete`. One transaction."""
        if not outputs:
            return
        with self.writing(outputs) as schema_of:
            for output in outputs:
                schema = schema_of(output.location)
                schema.check_form()
                if record := schema.record(output.output_key):
                    schema.delete(record)
                    crashpoint("sql.rows_deleted")
            crashpoint("sql.deletion_written")
        crashpoint("sql.deleted")

    def check(self, outputs: Sequence[Output]) -> list[str]:
        """See `Sink.check`. Counts each table's rows once, for all of its outputs."""
        targets: dict[str, list[Output]] = defaultdict(list)
        for output in outputs:
            targets[output.target].append(output)
        faults: list[str] = []
        for target, of in targets.items():
            try:
                with self.reading() as schema_of:
                    schema = schema_of and schema_of(of[0].location)
                    found = schema.faults(of) if schema else ["the database is gone"] * len(of)
                    faults += [f"{target}: {fault}" for fault in found]
            except JobError as error:
                faults += [f"{target}: {error.message}" for _ in of]
        return faults

    def records(self, known: Container[str]) -> Iterator[Output]:
        """See `Sink.records`. Reads the ledger in the database, of any release."""
        try:
            with self.reading() as schema_of:
                if schema_of:
                    schema = schema_of(self.location)
                    for record in schema.records(self.view):
                        is_known = record["output_key"] in known
                        if not is_known or record["state"] == State.RETRACTED:
                            with contextlib.suppress(ValueError, KeyError):
                                yield schema.output(record, self.location)
        except SinkConflict as error:  # it is no database: not the same as one without outputs
            raise SinkUnavailable(error.message, error.hint or "put the database back") from error

    def upgrade(self) -> list[str]:
        """See `Sink.upgrade`. One transaction for the whole schema."""
        with self.reading() as schema_of:
            if not schema_of or not schema_of(self.location).is_earlier():
                return []
        with self.writing([]) as schema_of:
            schema = schema_of(self.location)
            schema.hold()
            changed = upgrade(schema) if schema.is_earlier() else []  # or another process was first
            crashpoint("sql.upgrade_written")
        crashpoint("sql.upgraded")
        return changed


def publish_job(schema_of: SchemaOf, job: Publication) -> list[Output]:
    """Record a job's outputs and load their rows, then change the states of others; within one
    transaction, which the caller commits, or rolls back if this raises.

    Raises:
        JobError: the rows cannot be read, or the database cannot hold them.
        Exception: the driver's own errors.
    """
    published = []
    for output in job.outputs:
        schema = schema_of(output.location)
        schema.check_form()
        found = schema.record(output.output_key)
        if found is None:
            if output.mode == "error":
                schema.check_only_ours(schema.view_of(output))
            record = schema.add(output)
            crashpoint("sql.recorded")
            if output.stage:
                record = schema.assign(record, schema.load(output, record["id"]))
                crashpoint("sql.rows_loaded")
        else:
            record = schema.mark(found, output)
        published.append(
            structs.replace(
                output, rows=int(record["rows"]), digest=record["digest"],
                target=schema.target(record["view_name"]), shown_at=record["shown_at"],
                hidden_at=record["hidden_at"],
            )
        )  # fmt: skip
    change_outputs(schema_of, job.changes, fitted=job.outputs)
    crashpoint("sql.job_written")
    return published


def change_outputs(
    schema_of: SchemaOf, outputs: Sequence[Output], fitted: Sequence[Output] = ()
) -> None:
    """Give outputs the state and mode that they have here, and views the tables of those that
    stand; within one transaction.

    Args:
        fitted: outputs that were published in the same transaction.

    Raises:
        SinkConflict: rows that are to be visible are not whole, or not all can be shown together.
    """
    for output in outputs:
        schema = schema_of(output.location)
        schema.check_form()
        if record := schema.record(output.output_key):
            if output.state in SEEN and record["state"] not in SEEN:
                schema.check_whole(record)
            schema.mark(record, output)
            crashpoint("sql.marked")
    # The views of one location and topic once, after all of its outputs have their states.
    for output in {(o.location, o.topic): o for o in (*outputs, *fitted)}.values():
        schema = schema_of(output.location)
        schema.fit_views(schema.view_of(output))
