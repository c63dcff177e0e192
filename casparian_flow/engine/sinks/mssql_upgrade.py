"""Convert a schema of SQL Server that an earlier release wrote, in one transaction.

In those a topic was a table whose rows name their job in the lineage columns; retracted rows were
in `_cf_retracted_<table>`, and replaced rows were deleted. The table is renamed and keeps its
columns, indexes and triggers; each row gets the number of its output. Rights on the table do not
go over to the view that takes its name: they are told, to be given again.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC
from typing import Any

from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks import mssql_statements as statements
from casparian_flow.engine.sinks.base import LINEAGE
from casparian_flow.engine.sinks.mssql_statements import quote
from casparian_flow.engine.sinks.mssql_tables import MssqlSchema, named_after
from casparian_flow.engine.sinks.mssql_types import fold
from casparian_flow.engine.sinks.sql import LEDGER, Record
from casparian_flow.errors import SinkConflict
from casparian_flow.protocol import State, key_of

_EARLIER = "_cf_outputs_earlier"
_RETRACTED = "_cf_retracted_"

Lineage = tuple[Any, ...]
"""The values of a row in the columns of `LINEAGE`."""


def upgrade(schema: MssqlSchema) -> list[str]:
    """Convert all tables of a schema; see `Sink.upgrade`.

    Args:
        schema: in a transaction, under its lock.

    Raises:
        SinkConflict: the outputs cannot be told apart, or readers would see other rows; the caller
            rolls back.
    """
    records = list(schema.records())
    tables = {
        fold(record["table_name"]): _Table(schema, record["table_name"]) for record in records
    }
    ours = [table for table in tables.values() if table.is_ours]
    before = {table.name: _digest(schema, table.name) for table in ours}
    schema.rename(LEDGER, _EARLIER)
    schema.session.execute(*statements.create_ledger(schema.name))
    schema.forget_ledger()
    crashpoint("mssql.upgrade_begun")
    for record in records:
        if record["state"] != "replaced" or not record["rows"]:
            tables[fold(record["table_name"])].add(record)
    schema.session.execute(statements.drop(schema.table(_EARLIER)))
    crashpoint("mssql.outputs_upgraded")
    for table in ours:
        table.convert()
    for table in ours:  # once all tables are there: a topic may be named like another's view
        schema.make_views(table.name)
        crashpoint("mssql.table_upgraded")
    for table in ours:
        if (after := _digest(schema, table.name)) != before[table.name]:
            raise SinkConflict(
                f"readers of {schema.target(table.name)} would see other rows than now "
                f"(digest {after[:12]} instead of {before[table.name][:12]}); nothing was changed",
                "find what was altered in that table: casparian verify",
            )
    return [f"{schema.target(t.name)}: {t.said()}; digest {before[t.name][:12]}" for t in ours]


@dataclass
class _Table:
    """A topic's table while it is converted."""

    schema: MssqlSchema
    name: str
    outputs: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.is_ours = self.schema.columns(self.name).keys() >= set(LINEAGE)
        self.table = self.schema.rows_table(self.name)

    def said(self) -> str:
        """What was done."""
        return ", ".join([f"{len(self.outputs)} outputs converted", *self.notes])

    def add(self, record: Record) -> None:
        """Record an output in today's form."""
        facts = {name: str(value) for name, value in record.items() if name != "facts"}
        facts |= json.loads(record["facts"])
        published = record["published_at"].replace(tzinfo=UTC)
        states = {"shown": State.CURRENT, "retracted": State.RETRACTED}
        lineage = tuple(record[name.removeprefix("_cf_")] for name in LINEAGE)
        self._record(
            {
                "output_key": record["output_key"], "topic": record["topic"],
                "mode": record["mode"], "rows": record["rows"], "digest": record["digest"],
                "published_at": published.isoformat("T", "microseconds"),
                "facts": json.dumps(facts),
            },
            states.get(record["state"], State.HIDDEN), lineage,
        )  # fmt: skip

    def convert(self) -> None:
        """Rename the table, give its rows the numbers of their outputs, add the retracted rows."""
        whole = self.schema.table(self.table)
        self.notes += self.schema.rights(self.name)
        self.schema.rename(self.name, self.table)
        self.schema.send(f"ALTER TABLE {whole} ADD _cf_output bigint NULL")
        crashpoint("mssql.table_renamed")
        self._give_numbers(State.CURRENT)
        crashpoint("mssql.rows_numbered")
        self._take_retracted()
        self._give_numbers(State.RETRACTED)
        self.schema.send(f"ALTER TABLE {whole} ALTER COLUMN _cf_output bigint NOT NULL")
        self.schema.session.execute(
            statements.drop_job_index(whole), statements.index_outputs(whole)
        )

    def _record(self, told: Mapping[str, Any], state: State, lineage: Lineage) -> Record:
        named = {
            name.removeprefix("_cf_"): value
            for name, value in zip(LINEAGE, lineage, strict=True)
            if value is not None  # the driver asks the server what type NULL is to have
        }
        shown_at = told["published_at"] if state == State.CURRENT else ""
        record = self.schema.insert(
            {
                **told, "view_name": self.name, "state": str(state), "shown_at": shown_at,
                "hidden_at": "", **named, "table_number": 1 if told["rows"] else 0,
            }
        )  # fmt: skip
        self.outputs.append(record)
        return record

    def _take_retracted(self) -> None:
        """Move the retracted rows into the table; nobody sees them there either.

        Raises:
            SinkConflict: the table lacks a column that they have.
        """
        kept = named_after(_RETRACTED, self.name)
        names = self.schema.columns(kept)
        known = {fold(name) for name in self.schema.columns(self.table)}
        if lost := [name for name in names if fold(name) not in known]:
            raise SinkConflict(
                f"table {self.name!r} lacks the column {lost[0]!r}, which its retracted rows have; "
                "nothing was changed",
                f"add that column again; the rows are in the table {kept!r}",
            )
        if names:
            listed = ", ".join(map(quote, names))
            rows, of = self.schema.table(self.table), self.schema.table(kept)
            self.schema.send(f"INSERT INTO {rows} ({listed}) SELECT {listed} FROM {of}")  # noqa: S608
            self.schema.session.execute(statements.drop(of))
            crashpoint("mssql.retracted_moved")

    def _give_numbers(self, state: State) -> None:
        """Give rows without one the number of their output, of those in this state.

        Rows that no output explains are other people's: they get a record of their own for each
        lineage, without facts, and readers go on seeing them.
        """
        of: dict[Lineage, list[Record]] = defaultdict(list)
        for output in self.outputs:
            if output["state"] == state and output["rows"]:
                of[tuple(output.get(name.removeprefix("_cf_")) for name in LINEAGE)].append(output)
        for lineage, count in _groups(self.schema, self.table, " WHERE _cf_output IS NULL").items():
            found = of[lineage] or [self._record_theirs(lineage, count, state)]
            for output in found[:-1]:  # ledgers that gave equal ids: their rows are equal, too
                self._number(lineage, output["id"], output["rows"])
            self._number(lineage, found[-1]["id"], count)

    def _number(self, lineage: Lineage, number: int, most: int) -> None:
        """Number so many rows of a lineage, at the most."""
        these = " AND ".join(
            f"{name} IS NULL" if value is None else f"{name} = ?"
            for name, value in zip(LINEAGE, lineage, strict=True)
        )
        given = (value for value in lineage if value is not None)
        self.schema.send(
            f"UPDATE TOP ({most:d}) {self.schema.table(self.table)} SET _cf_output = ? "  # noqa: S608
            f"WHERE _cf_output IS NULL AND {these}",
            number, *given,
        )  # fmt: skip

    def _record_theirs(self, lineage: Lineage, count: int, state: State) -> Record:
        self.notes.append(f"{count} rows that Casparian Flow did not write stay {state}")
        key = key_of("rows of other programs", fold(self.name), str(state), *map(repr, lineage))
        told = {"output_key": key, "topic": self.name, "mode": "append", "rows": count}
        return self._record({**told, "digest": "", "published_at": "", "facts": ""}, state, lineage)


def _groups(schema: MssqlSchema, table: str, where: str = "") -> dict[Lineage, int]:
    """The lineages of a table's rows -> how many rows have them."""
    listed = ", ".join(LINEAGE)
    of = schema.table(table)
    query = f"SELECT {listed}, {schema.number_of_rows} FROM {of}{where} GROUP BY {listed}"  # noqa: S608
    return {tuple(lineage): count for *lineage, count in schema.ask(query)}


def _digest(schema: MssqlSchema, name: str) -> str:
    """A digest of a topic's columns, and of how many rows there are of each lineage. The rows
    themselves are never rewritten."""
    counts = sorted(_groups(schema, name).items(), key=repr)
    whole = repr((sorted(schema.columns(name)), counts))
    return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()
