"""Convert a SQLite sink of an earlier release to the form of `sql.py`, in one transaction.

In those a topic was a table whose rows name their job in the lineage columns; retracted rows were
in `_cf_retracted_<topic>`, and replaced rows were deleted. The table is renamed and keeps its
columns and indexes; each row gets the number of its output. Other people's views and triggers on
the topic go on working: what they name is the new view, or the renamed table.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks.base import LINEAGE
from casparian_flow.engine.sinks.columns import fold
from casparian_flow.engine.sinks.sql import LEDGER, Record
from casparian_flow.engine.sinks.sqlite_tables import (
    SqliteSchema,
    index_outputs,
    make_ledger,
    quote,
)
from casparian_flow.errors import SinkConflict
from casparian_flow.protocol import State, key_of

_EARLIER = "_cf_outputs_earlier"
_RETRACTED = "_cf_retracted_"

_THESE = " AND ".join(f"{name} IS ?" for name in LINEAGE)

Lineage = tuple[Any, ...]
"""The values of a row in the columns of `LINEAGE`."""


def upgrade(schema: SqliteSchema) -> list[str]:
    """Convert the database; see `Sink.upgrade`.

    Args:
        schema: of a connection with `legacy_alter_table`, in a transaction.

    Raises:
        SinkConflict: the outputs cannot be told apart, or readers would see other rows; the caller
            rolls back.
    """
    records = list(schema.records())
    topics = {fold(record["topic"]): _Topic(schema, record["topic"]) for record in records}
    before = {topic.name: _digest(schema, topic.name) for topic in topics.values() if topic.is_ours}
    schema.send(f"ALTER TABLE {LEDGER} RENAME TO {_EARLIER}")
    make_ledger(schema.connection)
    schema.forget_ledger()
    crashpoint("sqlite.upgrade_begun")
    for record in records:
        if record.get("state") != "replaced" or not record["rows"]:
            topics[fold(record["topic"])].add(record)
    schema.send(f"DROP TABLE {_EARLIER}")
    crashpoint("sqlite.outputs_upgraded")
    ours = [topic for topic in topics.values() if topic.is_ours]
    for topic in ours:
        topic.convert()
    for topic in ours:  # once all tables are there: a topic may be named like another's view
        schema.make_views(topic.name)
        topic.restore_triggers()
        crashpoint("sqlite.topic_upgraded")
    for topic in ours:
        if (after := _digest(schema, topic.name)) != before[topic.name]:
            raise SinkConflict(
                f"readers of {schema.target(topic.name)} would see other rows than now "
                f"(digest {after[:12]} instead of {before[topic.name][:12]}); nothing was changed",
                "find what was altered in that table: casparian verify",
            )
    return [f"{schema.target(t.name)}: {t.said()}; digest {before[t.name][:12]}" for t in ours]


@dataclass
class _Topic:
    """A topic while it is converted."""

    schema: SqliteSchema
    name: str
    outputs: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        tables = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ? COLLATE NOCASE"
        is_table = bool(self.schema.ask(tables, self.name))
        self.is_ours = is_table and self.schema.columns(self.name).keys() >= set(LINEAGE)
        self.table = self.schema.rows_table(self.name)
        self.triggers: list[str] = []

    def said(self) -> str:
        """What was done."""
        return ", ".join([f"{len(self.outputs)} outputs converted", *self.notes])

    def add(self, record: Record) -> None:
        """Record an output in today's form."""
        facts = {name: str(value) for name, value in record.items() if name != "facts"}
        facts |= json.loads(record.get("facts") or "{}")
        state = {"shown": State.CURRENT, "retracted": State.RETRACTED}
        self._record(
            record["output_key"], state.get(record.get("state", "shown"), State.HIDDEN),
            record["rows"], json.dumps(facts), record["published_at"], record["digest"],
            (record["file_version_id"], record["job_id"], facts.get("source_hash"),
             facts.get("plugin_version")), record.get("mode", "append"),
        )  # fmt: skip

    def convert(self) -> None:
        """Rename the table, give its rows the numbers of their outputs, add the retracted rows."""
        send = self.schema.send
        send(f"ALTER TABLE {quote(self.name)} RENAME TO {quote(self.table)}")
        send(f"ALTER TABLE {quote(self.table)} ADD COLUMN _cf_output INTEGER")
        crashpoint("sqlite.table_renamed")
        self._take_triggers()
        self._give_numbers(State.CURRENT)
        crashpoint("sqlite.rows_numbered")
        self._take_retracted()
        self._give_numbers(State.RETRACTED)
        send(f"DROP INDEX IF EXISTS {quote(f'_cf_job_of_{self.name}')}")
        self._admit_equal_rows()
        index_outputs(self.schema.connection, self.table)
        crashpoint("sqlite.table_upgraded")

    def restore_triggers(self) -> None:
        """Create the triggers on the table again."""
        for trigger in self.triggers:
            self.schema.send(trigger)

    def _record(
        self, key: str, state: State, rows: int, facts: str, time: str, digest: str,
        lineage: Lineage, mode: str,
    ) -> int:  # fmt: skip
        shown = state == State.CURRENT
        named = {name.removeprefix("_cf_"): v for name, v in zip(LINEAGE, lineage, strict=True)}
        record = self.schema.insert(
            {
                "output_key": key, "topic": self.name, "view_name": self.name, "mode": mode,
                "state": str(state), "rows": rows, "digest": digest, "published_at": time,
                "shown_at": time if shown else "", "hidden_at": "", **named, "facts": facts,
                "table_number": 1 if rows else 0,
            }
        )  # fmt: skip
        self.outputs.append(record)
        return int(record["id"])

    def _take_triggers(self) -> None:
        """Drop the triggers until rows no longer change."""
        found = self.schema.ask(
            "SELECT name, sql FROM sqlite_master "
            "WHERE type = 'trigger' AND tbl_name = ? COLLATE NOCASE",
            self.table,
        )
        for name, text in found:
            self.triggers.append(text)
            self.schema.send(f"DROP TRIGGER {quote(name)}")

    def _take_retracted(self) -> None:
        """Move the retracted rows into the table; nobody sees them there either.

        Raises:
            SinkConflict: the table lacks a column that they have.
        """
        kept = _RETRACTED + self.name
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
            self.schema.send(
                f"INSERT INTO {quote(self.table)} ({listed}) SELECT {listed} FROM {quote(kept)}"  # noqa: S608
            )
            self.schema.send(f"DROP TABLE {quote(kept)}")
            crashpoint("sqlite.retracted_moved")

    def _give_numbers(self, state: State) -> None:
        """Give rows without one the number of their output, of those in this state.

        Rows that no output explains are other people's: they get a record of their own for each
        lineage, without facts, and readers go on seeing them.
        """
        unclaimed = [o for o in self.outputs if o["state"] == state and o["rows"]]
        by_job: dict[Any, list[Record]] = defaultdict(list)
        for output in unclaimed:
            by_job[output["job_id"]].append(output)
        lineages = ", ".join(LINEAGE)
        groups = self.schema.ask(
            f"SELECT {lineages}, COUNT(*) FROM {quote(self.table)} "  # noqa: S608
            f"WHERE _cf_output IS NULL GROUP BY {lineages}"
        )
        numbers = []
        for *values, count in groups:
            lineage = tuple(values)
            found = [o for o in by_job[lineage[1]] if _brought(o, lineage)]
            for output in found:
                by_job[lineage[1]].remove(output)
                self._note_lineage(output, lineage)
            for output in found[:-1]:  # ledgers that gave equal ids: their rows are equal, too
                self._number_some(lineage, output)
            last = found[-1]["id"] if found else self._record_theirs(lineage, count, state)
            numbers.append((*lineage, last))
        self._number(numbers)

    def _number(self, numbers: Iterable[tuple[Any, ...]]) -> None:
        """Number all rows that have none, by their lineage."""
        lineages = ", ".join(LINEAGE)
        self.schema.send(f"CREATE TABLE temp._cf_numbers ({lineages}, number)")
        self.schema.connection.executemany(
            "INSERT INTO _cf_numbers VALUES (?, ?, ?, ?, ?)", numbers
        )
        self.schema.send("CREATE INDEX temp._cf_numbers_of ON _cf_numbers (_cf_job_id)")
        same = " AND ".join(f"n.{name} IS r.{name}" for name in LINEAGE)
        self.schema.send(
            f"UPDATE {quote(self.table)} AS r SET _cf_output = "  # noqa: S608
            f"(SELECT number FROM _cf_numbers AS n WHERE {same}) WHERE _cf_output IS NULL"
        )
        self.schema.send("DROP TABLE temp._cf_numbers")

    def _number_some(self, lineage: Lineage, output: Record) -> None:
        """Number as many rows of a lineage as an output has.

        Raises:
            SinkConflict: the table has no name for its row number.
        """
        taken = {fold(name) for name in self.schema.columns(self.table)}
        rowid = next((name for name in ("rowid", "_rowid_", "oid") if name not in taken), None)
        if rowid is None:
            raise SinkConflict(
                f"table {self.name!r} has equal rows of two outputs, and columns for every name of "
                "SQLite's row number, so that they cannot be told apart; nothing was changed",
                "rename one of the columns rowid, _rowid_ and oid",
            )
        table = quote(self.table)
        self.schema.send(
            f"UPDATE {table} SET _cf_output = ? WHERE {rowid} IN (SELECT {rowid} FROM {table} "  # noqa: S608
            f"WHERE _cf_output IS NULL AND {_THESE} LIMIT ?)",
            output["id"], *lineage, output["rows"],
        )  # fmt: skip

    def _note_lineage(self, output: Record, lineage: Lineage) -> None:
        """Note what the first release wrote into the rows only."""
        names = ("source_hash", "plugin_version")
        if all(output[name] is not None for name in names):
            return
        facts = json.loads(output["facts"])
        facts |= dict(zip(names, map(str, lineage[2:]), strict=True))
        self.schema.send(
            f"UPDATE {LEDGER} SET source_hash = ?, plugin_version = ?, facts = ? WHERE id = ?",  # noqa: S608
            *lineage[2:], json.dumps(facts), output["id"],
        )  # fmt: skip

    def _record_theirs(self, lineage: Lineage, count: int, state: State) -> int:
        self.notes.append(f"{count} rows that Casparian Flow did not write stay {state}")
        key = key_of("rows of other programs", fold(self.name), str(state), *map(repr, lineage))
        return self._record(key, state, count, "", "", "", lineage, "append")

    def _admit_equal_rows(self) -> None:
        """Make unique indexes ordinary ones: rows of earlier versions stay in the table now."""
        found = self.schema.ask(
            "SELECT name, sql FROM sqlite_master WHERE type = 'index' "
            "AND tbl_name = ? COLLATE NOCASE AND sql LIKE 'CREATE UNIQUE INDEX %'",
            self.table,
        )
        for name, text in found:
            self.schema.send(f"DROP INDEX {quote(name)}")
            self.schema.send(text.replace(" UNIQUE", "", 1))
            self.notes.append(f"its index {name!r} is no longer unique, since versions are kept")


def _brought(output: Record, lineage: Lineage) -> bool:
    """Whether rows of a lineage may be an output's; what it does not tell may be anything."""
    told = (output[name.removeprefix("_cf_")] for name in LINEAGE)
    return all(t is None or t == value for t, value in zip(told, lineage, strict=True))


def _digest(schema: SqliteSchema, view: str) -> str:
    """A digest of all rows and columns of a topic, in whatever order they are."""
    names = sorted(schema.columns(view))
    listed = ", ".join(map(quote, names))
    total = 0
    for row in _rows(schema, f"SELECT {listed} FROM {quote(view)}"):  # noqa: S608
        total += int.from_bytes(hashlib.blake2b(repr(row).encode(), digest_size=16).digest())
    return hashlib.sha256(f"{names} {total}".encode("utf-8", "surrogatepass")).hexdigest()


def _rows(schema: SqliteSchema, query: str) -> Iterator[Any]:
    yield from schema.connection.execute(query)
