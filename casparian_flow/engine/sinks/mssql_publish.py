"""How staged outputs get into SQL Server, each exactly once for its output key.

    look      is it there already? Under a lock on its key, so that who is at it is waited for
    load      the staged rows go into a stage table, in bulk: restartable, and nobody reads it
    publish   one transaction: locks on the keys and slots, the ledger's word once more, the
              ledger's rows, and the stage tables' rows into their tables; of one job all or none
    clean     the stage tables are dropped

An error while the transaction is committed means that nobody knows. Then, as after a deadlock, all
is done again from the start, on another connection: the server gives the lock on the key when it is
done with the connection that had it, and then the ledger tells.

A stage table is named after the staged file, so that another try finds it, and a session's lock on
its name says that somebody uses it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks import mssql_statements as statements
from casparian_flow.engine.sinks import table_of
from casparian_flow.engine.sinks.base import facts_of
from casparian_flow.engine.sinks.columns import pieces
from casparian_flow.engine.sinks.mssql_faults import Fault, Kind, refusal
from casparian_flow.engine.sinks.mssql_session import Refused, Session
from casparian_flow.engine.sinks.mssql_statements import REPLACED, SHOWN, STAGE, Declared
from casparian_flow.engine.sinks.mssql_tables import Target
from casparian_flow.engine.sinks.mssql_types import Column
from casparian_flow.engine.sinks.stage import reading
from casparian_flow.errors import JobError, SinkConflict
from casparian_flow.protocol import Published, StagedOutput
from casparian_flow.sections import MssqlSettings

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
