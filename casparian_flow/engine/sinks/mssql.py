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
from pathlib import Path
from typing import Any

from casparian_flow.config import DatabaseSettings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks import mssql_statements as statements
from casparian_flow.engine.sinks import table_of
from casparian_flow.engine.sinks.base import KEY_DIGITS, Claim, Found, Lineage, found
from casparian_flow.engine.sinks.mssql_faults import Kind, refusal
from casparian_flow.engine.sinks.mssql_publish import Publisher, locks, stage_table
from casparian_flow.engine.sinks.mssql_session import Refused, Session
from casparian_flow.engine.sinks.mssql_statements import REPLACED, RETRACTED, SHOWN, Statement
from casparian_flow.engine.sinks.mssql_tables import Recorded, Target
from casparian_flow.engine.sinks.mssql_types import check_values
from casparian_flow.engine.sinks.stage import Stage
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
