"""Convert a schema that an earlier release wrote to the form of `sql.py`, in one transaction.

In those a topic was a table whose rows name their job in the lineage columns; retracted rows were
in `_cf_retracted_<topic>`, and replaced rows were deleted. The table is renamed and keeps its
columns, indexes and triggers; each row gets the number of its output. What other people made on the
topic goes on working: what it names is the new view, or the renamed table.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks.base import LINEAGE
from casparian_flow.engine.sinks.sql import EARLIER, LEDGER, Record, Schema
from casparian_flow.errors import SinkConflict
from casparian_flow.protocol import State, key_of

_EARLIER_LEDGER = "_cf_outputs_earlier"
_RETRACTED = "_cf_retracted_"

Lineage = tuple[Any, ...]
"""The values of a row in the columns of `LINEAGE`."""


def upgrade(schema: Schema) -> list[str]:
    """Convert all topics; see `Sink.upgrade`.

    Args:
        schema: in a transaction, and held.

    Raises:
        SinkConflict: the outputs cannot be told apart, or readers would see other rows; the caller
            rolls back.
    """
    records = list(schema.records())
    topics = {schema.fold(r["view_name"]): _Topic(schema, r["view_name"]) for r in records}
    ours = [topic for topic in topics.values() if topic.is_ours]
    before = {topic.name: _digest(schema, topic.name) for topic in ours}
    schema.rename(LEDGER, _EARLIER_LEDGER)
    schema.create_ledger()
    crashpoint("sql.upgrade_begun")
    for record in records:
        state = EARLIER.get(record["state"], State.HIDDEN)
        if record["state"] != "replaced" or not record["rows"]:
            topics[schema.fold(record["view_name"])].add(record, state)
    schema.send(f"DROP TABLE {schema.table(_EARLIER_LEDGER)}")
    crashpoint("sql.outputs_upgraded")
    for topic in ours:
        topic.convert()
    for topic in ours:  # once all tables are there: a topic may be named like another's view
        schema.make_views(topic.name)
        crashpoint("sql.topic_upgraded")
    for topic in ours:
        if (after := _digest(schema, topic.name)) != before[topic.name]:
            raise SinkConflict(
                f"readers of {schema.target(topic.name)} would see other rows than now "
                f"(digest {after[:12]} instead of {before[topic.name][:12]}); nothing was changed",
                "find what was altered in that table: casparian verify",
            )
    return [
        f"{schema.target(topic.name)}: "
        f"{', '.join([f'{len(topic.outputs)} outputs converted', *topic.notes])}; "
        f"digest {before[topic.name][:12]}"
        for topic in ours
    ]


@dataclass
class _Topic:
    """A topic while it is converted."""

    schema: Schema
    name: str
    outputs: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.table = self.schema.rows_table(self.name)
        is_view = self.schema.definition(self.name)
        self.is_ours = not is_view and self.schema.columns(self.name).keys() >= set(LINEAGE)

    def add(self, record: Record, state: State) -> Record:
        """Record an output in today's form."""
        shown_at = record["published_at"] if state == State.CURRENT else ""
        added = self.schema.insert({**record, "state": str(state), "shown_at": shown_at})
        self.outputs.append(added)
        return added

    def convert(self) -> None:
        """Rename the table, give its rows the numbers of their outputs, add the retracted rows."""
        schema, table = self.schema, self.schema.table(self.table)
        schema.rename(self.name, self.table)
        schema.send(f"ALTER TABLE {table} ADD _cf_output {schema.types['number']} NULL")
        crashpoint("sql.table_renamed")
        again, notes = schema.set_apart(self.table)
        self.notes += notes
        self._give_numbers(State.CURRENT)
        crashpoint("sql.rows_numbered")
        self._take_retracted()
        self._give_numbers(State.RETRACTED)
        for statement in again:
            schema.send(statement)
        schema.index_outputs(self.table)
        crashpoint("sql.table_upgraded")

    def _take_retracted(self) -> None:
        """Move the retracted rows into the table; nobody sees them there either.

        Raises:
            SinkConflict: the table lacks a column that they have.
        """
        schema = self.schema
        kept = schema.named(_RETRACTED, self.name)
        names = schema.columns(kept)
        known = {schema.fold(name) for name in schema.columns(self.table)}
        if lost := [name for name in names if schema.fold(name) not in known]:
            raise SinkConflict(
                f"table {self.name!r} lacks the column {lost[0]!r}, which its retracted rows have; "
                "nothing was changed",
                f"add that column again; the rows are in the table {kept!r}",
            )
        if names:
            listed = ", ".join(map(schema.quote, names))
            rows, of = schema.table(self.table), schema.table(kept)
            schema.send(f"INSERT INTO {rows} ({listed}) SELECT {listed} FROM {of}")  # noqa: S608
            schema.send(f"DROP TABLE {of}")
            crashpoint("sql.retracted_moved")

    def _give_numbers(self, state: State) -> None:
        """Give rows without one the number of their output, of those in this state.

        Rows that no output explains are other people's: they get a record of their own for each
        lineage, without facts, and readers go on seeing them.
        """
        by_job: dict[Any, list[Record]] = defaultdict(list)
        for output in self.outputs:
            if output["state"] == state and output["rows"]:
                by_job[output["job_id"]].append(output)
        schema, listed = self.schema, ", ".join(LINEAGE)
        groups = schema.ask(
            f"SELECT {listed}, {schema.number_of_rows} FROM {schema.table(self.table)} "  # noqa: S608
            f"WHERE _cf_output IS NULL GROUP BY {listed}"
        )
        for *values, count in groups:
            lineage = tuple(values)
            found = [output for output in by_job[lineage[1]] if _brought(output, lineage)]
            for output in found:
                by_job[lineage[1]].remove(output)
                self._note_lineage(output, lineage)
            for output in found[:-1]:  # ledgers that gave equal ids: their rows are equal, too
                schema.number(self.table, lineage, output["id"], output["rows"])
            last = found[-1] if found else self._record_theirs(lineage, count, state)
            schema.number(self.table, lineage, last["id"])

    def _note_lineage(self, output: Record, lineage: Lineage) -> None:
        """Note what the first release wrote into the rows only."""
        names = ("source_hash", "plugin_version")
        if all(output[name] is not None for name in names):
            return
        facts = json.loads(output["facts"])
        facts |= dict(zip(names, map(str, lineage[2:]), strict=True))
        self.schema.send(
            f"UPDATE {self.schema.table(LEDGER)} SET source_hash = ?, plugin_version = ?, "  # noqa: S608
            "facts = ? WHERE id = ?",
            *lineage[2:], json.dumps(facts), output["id"],
        )  # fmt: skip

    def _record_theirs(self, lineage: Lineage, count: int, state: State) -> Record:
        self.notes.append(f"{count} rows that Casparian Flow did not write stay {state}")
        key = key_of(
            "rows of other programs", self.schema.fold(self.name), str(state), *map(repr, lineage)
        )
        named = {
            name.removeprefix("_cf_"): value for name, value in zip(LINEAGE, lineage, strict=True)
        }
        theirs = {
            "output_key": key, "topic": self.name, "view_name": self.name, "mode": "append",
            "rows": count, "digest": "", "published_at": "", "hidden_at": "", **named, "facts": "",
            "table_number": 1,
        }  # fmt: skip
        return self.add(theirs, state)


def _brought(output: Record, lineage: Lineage) -> bool:
    """Whether rows of a lineage may be an output's; what it does not tell may be anything."""
    told = (output[name.removeprefix("_cf_")] for name in LINEAGE)
    return all(t is None or t == value for t, value in zip(told, lineage, strict=True))


def _digest(schema: Schema, view: str) -> str:
    """A digest of a topic's columns, and of what `Schema.compared` gives, in any order."""
    total = 0
    for row in schema.compared(view):
        total += int.from_bytes(hashlib.blake2b(repr(row).encode(), digest_size=16).digest())
    whole = f"{sorted(schema.columns(view))} {total}"
    return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()
