"""The tables of SQL Server that a topic's rows are in, and how they come to have its columns.

What makes or widens a table is a transaction of its own, before any row: under a lock of the
schema, and only where something is missing. It is never undone: a table without rows, or a column
of nulls, is what the next attempt needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks import mssql_statements as statements
from casparian_flow.engine.sinks.base import LINEAGE
from casparian_flow.engine.sinks.mssql_session import Session
from casparian_flow.engine.sinks.mssql_statements import LEDGER, LINEAGE_TYPES, RECORDED, Declared
from casparian_flow.engine.sinks.mssql_types import (
    Column,
    check_count,
    columns_of,
    declared_as,
    fold,
)
from casparian_flow.errors import SinkConflict
from casparian_flow.protocol import StagedOutput


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
