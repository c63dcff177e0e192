"""The tables and views of a schema of SQL Server, and how the columns of an output fit to them.

`_cf_rows_<table>` has `_cf_output` and the topic's columns; a table that an earlier release made
has the lineage columns too, and they are filled, for the sake of other people's triggers.

Tables, columns and views are made in a transaction of their own before rows are written, under a
lock on the schema. It is never undone: the next attempt needs them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks import mssql_statements as statements
from casparian_flow.engine.sinks import table_of
from casparian_flow.engine.sinks.base import LINEAGE
from casparian_flow.engine.sinks.mssql_session import RIGHTS, Fault, Kind, Refused, Session
from casparian_flow.engine.sinks.mssql_statements import Declared, Statement, qualified
from casparian_flow.engine.sinks.mssql_types import (
    NAME_LIMIT,
    Column,
    check_count,
    columns_of,
    declared_as,
    fold,
)
from casparian_flow.engine.sinks.sql import LEDGER, Schema, rows_prefix
from casparian_flow.errors import OutputRefused, SinkConflict
from casparian_flow.protocol import Output


class Staged(NamedTuple):
    """Where the rows of an output are before it is published."""

    table: str
    """The stage table; empty if the output has no rows."""
    names: Sequence[str]
    """The columns to copy."""
    number: int
    """The number of the table that they are for; 0 if none is."""


class MssqlSchema(Schema):
    """A schema of SQL Server.

    Args:
        session: must stay open while the schema is used.
        schema: its name; empty means the login's default schema.
    """

    own_topic_hint = "rename that table, or give the topic another table"
    number_of_rows = "COUNT_BIG(*)"
    dirty_hint = " WITH (READUNCOMMITTED)"

    def __init__(self, session: Session, schema: str) -> None:
        if not schema:
            ((schema,),) = session.execute(statements.default_schema())
        self.session = session
        self.name = schema
        self.place = f"schema {schema} of SQL Server"
        self.lock = f"casparian:{fold(schema)}"
        """Who makes tables and views holds it."""
        self.staged: dict[str, Staged] = {}
        """Output key -> where its rows are."""

    def ask(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """See `Schema.ask`."""
        return self.session.execute(Statement(sql, values))

    def send(self, sql: str, *values: Any) -> int:
        """See `Schema.send`."""
        return self.session.change(Statement(sql, values))

    def quote(self, name: str) -> str:
        """See `Schema.quote`."""
        return statements.quote(name)

    def table(self, name: str) -> str:
        """See `Schema.table`."""
        return qualified(self.name, name)

    def fold(self, name: str) -> str:
        """See `Schema.fold`."""
        return fold(name)

    def columns(self, name: str) -> Mapping[str, str]:
        """See `Schema.columns`."""
        rows = self.session.execute(statements.columns(self.table(name)))
        return {column: declared_as(*described) for column, *described in rows}

    def has(self, name: str) -> bool:
        """See `Schema.has`. Procedures and other objects share the names of tables, too."""
        ((number,),) = self.session.execute(statements.object_id(self.table(name)))
        return number is not None

    def definition(self, view: str) -> str:
        """See `Schema.definition`.

        Raises:
            Refused: the login may not see whether the view is ours.
        """
        ((number, text),) = self.session.execute(statements.definition(self.table(view)))
        if number is not None and text is None:
            words = f"the login may not see the definition of the view {view!r}"
            raise Refused(Fault(Kind.PAUSE, words, RIGHTS))
        return text or ""

    def put_view(self, view: str, query: str) -> None:
        """See `Schema.put_view`."""
        if not self.definition(view).endswith(f" AS {query}"):
            self.session.execute(statements.put_view(self.table(view), query))

    def target(self, view: str) -> str:
        """See `Schema.target`."""
        return f"mssql://{self.name}.{view}"

    def view_of(self, output: Output) -> str:
        """See `Schema.view_of`."""
        return table_of(output.location)[1]

    def rows_table(self, view: str, number: int = 1) -> str:
        """See `Schema.rows_table`."""
        return named_after(rows_prefix(number), view)

    def null(self, kind: str) -> str:
        """See `Schema.null`. A bare NULL would be an integer, and so would the column."""
        return f"CAST(NULL AS {kind})"

    def misfit(self, view: str, numbers: Sequence[int]) -> str:
        """See `Schema.misfit`. A union has one type, and a value that is not of it is an error for
        whoever reads, or is rounded."""
        found: dict[str, str] = {}
        for table in (self.rows_table(view, number) for number in reversed(numbers)):
            for name, kind in self.columns(table).items():
                first = found.setdefault(fold(name), kind)
                if not _are_one(first, kind):
                    return f"column {name!r} is {first} in one and {kind} in others"
        return ""

    def is_name(self, view: str) -> bool:
        """See `Schema.is_name`."""
        return _is_short(view)

    def load(self, output: Output, number: int) -> int:
        """See `Schema.load`. The rows are in a stage table.

        Raises:
            Refused: they are not, or not all of them.
        """
        staged = self.staged.get(output.output_key)
        if staged is None:
            raise Refused(Fault(Kind.RETRY, "another program has just deleted the same output"))
        if staged.table:
            copied = self.session.change(
                statements.insert_staged(
                    self.table(self.rows_table(self.view_of(output), staged.number)),
                    self.table(staged.table), staged.names, number,
                )
            )  # fmt: skip
            if copied != output.rows:
                raise Refused(Fault(Kind.RETRY, f"{copied} rows were in {staged.table}"))
            crashpoint("mssql.rows_written")
        return staged.number

    def make_ledger(self) -> None:
        """Create the sink's ledger, unless there is one."""
        if not self.has_ledger():
            with self.session.transaction([self.lock]):
                if not self.has_ledger():  # another process may have created it
                    self.session.execute(*statements.create_ledger(self.name))
                    crashpoint("mssql.ledger_made")

    def rename(self, table: str, name: str) -> None:
        """Give a table another name; it keeps its indexes, triggers and rights."""
        self.session.execute(statements.rename(self.table(table), name))

    def rights(self, name: str) -> list[str]:
        """Who was given rights on a table itself, a sentence for all."""
        rows = self.session.execute(statements.rights(self.table(name)))
        given = [f"{state} {right} to {who}" for state, right, who in rows]
        return [f"rights to give again: {'; '.join(given)}"] if given else []

    def prepare(self, output: Output, arrow: Any) -> tuple[int, list[Column]]:
        """Have a table of the topic with the columns of an output, and the views.

        Args:
            arrow: the Arrow schema of the staged rows, including the lineage columns.

        Returns:
            the table's number, and the output's columns that it takes, fitted to it; not those of
            nulls only.

        Raises:
            SinkConflict: the view's name is taken, or it has another topic's rows.
            OutputRefused: a column has another type in the table, or there are too many.
        """
        incoming = columns_of(arrow)
        own = [column for column in incoming if column.name not in LINEAGE]
        if not own:  # a plugin that published no batch has given no columns
            return 0, []
        view = self.view_of(output)
        number = self._table_for(output, incoming)
        table = self.rows_table(view, number)
        existing = self._by_fold(table)
        self._check_topic(view, output.topic)
        if not existing or _missing(own, existing) or not self._is_our_view(view):
            with self.session.transaction([self.lock]):
                self.check_ours(view)
                self._check_topic(view, output.topic)
                self._make(table, own)
                self.make_views(view)
            crashpoint("mssql.table_ready")
            existing = self._by_fold(table)
        return number, _fitted(incoming, existing)

    def _table_for(self, output: Output, incoming: Sequence[Column]) -> int:
        """The number of the table for an output's rows."""
        view = self.view_of(output)

        def types(number: int) -> dict[str, Declared]:
            return self._by_fold(self.rows_table(view, number))

        def is_alike(number: int) -> bool:
            there = types(number)
            return all(
                there[fold(c.name)].type == c.declared
                for c in incoming
                if c.declared and fold(c.name) in there
            )

        def fits(number: int) -> bool:
            try:
                _fitted(incoming, types(number))
            except OutputRefused:
                return False
            return True

        return self.choose_table(
            view, 0, is_rebuilt=output.generation > 0, is_alike=is_alike, fits=fits
        )

    def scope(self, view: str) -> str:
        """See `Schema.scope`. A view reads no outputs of other views, which may be locked now."""
        return f" AND o.view_name = {statements.text(view)}"

    def _by_fold(self, table: str) -> dict[str, Declared]:
        return {fold(name): Declared(name, kind) for name, kind in self.columns(table).items()}

    def _make(self, table: str, own: Sequence[Column]) -> None:
        existing = self._by_fold(table)  # another process may have created it
        missing = _missing(own, existing)
        ours = {*map(fold, LINEAGE), "_cf_output"}
        check_count(len((existing.keys() | {fold(column.name) for column in missing}) - ours))
        if not existing:
            self.session.execute(*statements.create_rows(self.table(table), missing))
        elif missing:
            self.session.execute(statements.add_columns(self.table(table), missing))

    def _check_topic(self, view: str, topic: str) -> None:
        found = statements.other_topics(self.table(LEDGER), view, topic)
        if others := self.session.execute(found):
            raise SinkConflict(
                f"{self.target(view)} has the rows of topic {others[0][0]!r}; it was left "
                "untouched",
                f"give topic {topic!r} a table of its own",
            )


def _fitted(incoming: Iterable[Column], existing: Mapping[str, Declared]) -> list[Column]:
    """The columns that a table has, fitted to it."""
    return [
        column.fit(existing[fold(column.name)].type).named(existing[fold(column.name)].name)
        for column in incoming
        if column.declared and fold(column.name) in existing
    ]


_WHOLE = ("tinyint", "smallint", "int", "bigint")


def _are_one(kind: str, other: str) -> bool:
    """Whether a union holds every value of both types as it is."""
    bases = [each.partition("(")[0] for each in (kind, other)]
    return (
        kind == other
        or all(base in _WHOLE for base in bases)
        or (bases[0] == bases[1] and bases[0] != "decimal")
    )


def named_after(prefix: str, table: str) -> str:
    """The name of a table that belongs to another one; at most 128 characters."""
    whole = prefix + table
    return whole if _is_short(whole) else prefix + hashlib.sha256(table.encode()).hexdigest()[:16]


def _is_short(name: str) -> bool:
    return len(name.encode("utf-16-le")) // 2 <= NAME_LIMIT


def _missing(wanted: Iterable[Column], existing: Mapping[str, Declared]) -> list[Declared]:
    """The columns that a table lacks; a column of nulls is added later, with its type."""
    return [
        Declared(column.name, column.declared)
        for column in wanted
        if column.declared and fold(column.name) not in existing
    ]
