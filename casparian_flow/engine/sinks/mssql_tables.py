"""The tables and views of a schema of SQL Server, and how the columns of an output fit to them.

    <schema>._cf_outputs               the sink's ledger: a row for each output
    <schema>._cf_rows_<table>          the topic's rows
    <schema>.<table>                   view of the rows that stand; <table>_current, <table>_history
    <schema>.casparian_stage_<...>     rows on their way into a `_cf_rows_<table>`

`_cf_rows_<table>` has `_cf_output` and the topic's columns; a table that an earlier release made
has the lineage columns too, and they are filled, for the sake of other people's triggers.

Tables, columns and views are made in a transaction of their own before rows are written, under a
lock on the schema. It is never undone: the next attempt needs them.
tests/sinks/mssql_statements.sql shows all statements as they are sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks import table_of
from casparian_flow.engine.sinks.base import LINEAGE
from casparian_flow.engine.sinks.mssql_session import RIGHTS, Fault, Kind, Refused, Session
from casparian_flow.engine.sinks.mssql_types import (
    Column,
    are_one,
    check_count,
    columns_of,
    declared_as,
    fold,
    is_short,
)
from casparian_flow.engine.sinks.sql import LEDGER, Schema
from casparian_flow.errors import OutputRefused, SinkConflict
from casparian_flow.protocol import Output

STAGE = "casparian_stage_"
"""How the name of every stage table begins."""

_EXACT = "COLLATE Latin1_General_BIN2"
"""The collation of keys: bytes are compared, whatever the database's own collation."""

_TYPES = {
    "serial": "bigint IDENTITY", "number": "bigint", "key": f"nvarchar(64) {_EXACT}",
    "topic": f"nvarchar(400) {_EXACT}", "name": "nvarchar(128)", "word": "nvarchar(10)",
    "hash": "nvarchar(64)", "time": "nvarchar(40)", "label": "nvarchar(255)",
    "text": "nvarchar(max)",
}  # fmt: skip

_READ = "state, mode, file_version_id, job_id, source_hash, plugin_version"
"""What views read of the ledger. An index has it all, so that readers of one view do not wait for
who changes outputs of another."""


class Staged(NamedTuple):
    """Where the rows of an output are before it is published."""

    table: str
    """The stage table; empty if the output has no rows."""
    names: Sequence[str]
    """The columns to copy."""
    number: int
    """The number of the table that they are for; 0 if none is."""


def quote(name: str) -> str:
    """A name in brackets."""
    return "[" + name.replace("]", "]]") + "]"


def qualified(schema: str, name: str) -> str:
    """The name of a table or view with its schema, in brackets."""
    return f"{quote(schema)}.{quote(name)}"


class MssqlSchema(Schema):
    """A schema of SQL Server.

    Args:
        session: must stay open while the schema is used.
        schema: its name; empty means the login's default schema.
    """

    own_topic_hint = "rename that table, or give the topic another table"
    types = _TYPES
    ledger_indexes = (
        f"CREATE INDEX _cf_view ON {{}} (view_name, topic) INCLUDE ({_READ})",
        "CREATE INDEX _cf_table ON {} (view_name, table_number, state)",
    )
    number_of_rows = "COUNT_BIG(*)"
    null = "CAST(NULL AS {})"  # a bare NULL would be an integer, and so would the column
    dirty_hint = " WITH (READUNCOMMITTED)"

    def __init__(self, session: Session, schema: str) -> None:
        if not schema:
            ((schema,),) = session.ask("SELECT SCHEMA_NAME()")
        self.session = session
        self.name = schema
        self.place = f"schema {schema} of SQL Server"
        self.lock = f"casparian:{fold(schema)}"
        """Who makes tables and views holds it."""
        self.staged: dict[str, Staged] = {}
        """Output key -> where its rows are."""

    def ask(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        return self.session.ask(sql, *values)

    def send(self, sql: str, *values: Any) -> int:
        return self.session.send(sql, *values)

    def quote(self, name: str) -> str:
        return quote(name)

    def table(self, name: str) -> str:
        return qualified(self.name, name)

    def fold(self, name: str) -> str:
        return fold(name)

    def columns(self, name: str) -> Mapping[str, str]:
        rows = self.ask(
            "SELECT c.name, TYPE_NAME(c.system_type_id), c.max_length, c.precision, c.scale "
            "FROM sys.columns AS c WHERE c.object_id = OBJECT_ID(?) ORDER BY c.column_id",
            self.table(name),
        )
        return {column: declared_as(*described) for column, *described in rows}

    def has(self, name: str) -> bool:
        """See `Schema.has`. Procedures and other objects share the names of tables, too."""
        return self.ask("SELECT OBJECT_ID(?)", self.table(name)) != [(None,)]

    def definition(self, view: str) -> str:
        """See `Schema.definition`.

        Raises:
            Refused: the login may not see whether the view is ours.
        """
        asked = "SELECT OBJECT_ID(?, 'V'), OBJECT_DEFINITION(OBJECT_ID(?, 'V'))"
        ((number, text),) = self.ask(asked, self.table(view), self.table(view))
        if number is not None and text is None:
            words = f"the login may not see the definition of the view {view!r}"
            raise Refused(Fault(Kind.PAUSE, words, RIGHTS))
        return text or ""

    def put_view(self, view: str, query: str) -> None:
        if not self.definition(view).endswith(f" AS {query}"):
            self.send(f"CREATE OR ALTER VIEW {self.table(view)} AS {query}")

    def target(self, view: str) -> str:
        return f"mssql://{self.name}.{view}"

    def view_of(self, output: Output) -> str:
        return table_of(output.location)[1]

    def named(self, prefix: str, view: str) -> str:
        return named_after(prefix, view)

    def is_name(self, view: str) -> bool:
        return is_short(view)

    def scope(self, view: str) -> str:
        """See `Schema.scope`. A view reads no outputs of other views, which may be locked now."""
        literal = view.replace("'", "''")
        return f" AND o.view_name = N'{literal}'"

    def misfit(self, view: str, numbers: Sequence[int]) -> str:
        """See `Schema.misfit`. A union has one type, and a value that is not of it is an error for
        whoever reads, or is rounded."""
        found: dict[str, str] = {}
        for table in (self.rows_table(view, number) for number in reversed(numbers)):
            for name, kind in self.columns(table).items():
                first = found.setdefault(fold(name), kind)
                if not are_one(first, kind):
                    return f"column {name!r} is {first} in one and {kind} in others"
        return ""

    def index_outputs(self, table: str) -> None:
        self.send(f"CREATE INDEX _cf_output_of ON {self.table(table)} (_cf_output)")

    def make_ledger(self) -> None:
        """Create the sink's ledger, unless there is one."""
        if not self.has_ledger():
            with self.session.transaction([self.lock]):
                if not self.has_ledger():  # another process may have created it
                    self.create_ledger()
                    crashpoint("mssql.ledger_made")

    def load(self, output: Output, number: int) -> int:
        """See `Schema.load`. The rows are in a stage table.

        Raises:
            Refused: they are not, or not all of them.
        """
        staged = self.staged.get(output.output_key)
        if staged is None:
            raise Refused(Fault(Kind.RETRY, "another program has just deleted the same output"))
        if staged.table:
            # Without parameters: a name may have a question mark in it.
            table = self.table(self.rows_table(self.view_of(output), staged.number))
            listed = "".join(f", {quote(name)}" for name in staged.names)
            chosen = "".join(f", s.{quote(name)}" for name in staged.names)
            copied = self.send(
                f"INSERT INTO {table} (_cf_output{listed}) "  # noqa: S608
                f"SELECT {number}{chosen} FROM {self.table(staged.table)} AS s"
            )
            if copied != output.rows:
                raise Refused(Fault(Kind.RETRY, f"{copied} rows were in {staged.table}"))
            crashpoint("mssql.rows_written")
        return staged.number

    # The columns of a table of rows.

    def _fits(self, table: str, incoming: Sequence[Column]) -> bool:
        """Whether a table takes the values of an output."""
        try:
            self._fitted(table, incoming)
        except OutputRefused:
            return False
        return True

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
        wanted = [column for column in own if column.declared]  # others once their type is known
        names = {fold(column.name) for column in wanted}
        view = self.view_of(output)
        number = self.choose_table(output, incoming, lambda name: self._fits(name, incoming))
        table = self.rows_table(view, number)
        self._check_topic(view, output.topic)
        existing = self.kinds(table).keys()
        if not existing or names - existing or not self._is_our_view(view):
            with self.session.transaction([self.lock]):
                self.check_ours(view)
                self._check_topic(view, output.topic)
                existing = self.kinds(table).keys()  # another process may have created it
                check_count(len((existing | names) - {*map(fold, LINEAGE), "_cf_output"}))
                self.widen(table, wanted)
                self.make_views(view)
            crashpoint("mssql.table_ready")
        return number, self._fitted(table, incoming)

    def _fitted(self, table: str, incoming: Sequence[Column]) -> list[Column]:
        """The columns that a table has, fitted to it.

        Raises:
            OutputRefused: one has another type in the table.
        """
        found = {fold(name): (kind, name) for name, kind in self.columns(table).items()}
        taken = (c for c in incoming if c.declared and fold(c.name) in found)
        return [column.fit(*found[fold(column.name)]) for column in taken]

    def _check_topic(self, view: str, topic: str) -> None:
        query = f"SELECT topic FROM {self.table(LEDGER)} WHERE view_name = ? AND topic <> ?"  # noqa: S608
        if others := self.ask(query, view, topic):
            raise SinkConflict(
                f"{self.target(view)} has the rows of topic {others[0][0]!r}; it was left "
                "untouched",
                f"give topic {topic!r} a table of its own",
            )

    # For an upgrade.

    def hold(self) -> None:
        self.session.lock(self.lock)

    def rename(self, table: str, name: str) -> None:
        self.send("EXEC sp_rename @objname = ?, @newname = ?", self.table(table), name)

    def set_apart(self, table: str) -> tuple[list[str], list[str]]:
        """Rights on the table do not go over to the view that takes its name: they are told."""
        name = self.table(table)
        rows = self.ask(
            "SELECT p.state_desc, p.permission_name, USER_NAME(p.grantee_principal_id) "
            "FROM sys.database_permissions AS p WHERE p.class = 1 AND p.major_id = OBJECT_ID(?)",
            name,
        )
        given = [f"{state} {right} to {who}" for state, right, who in rows]
        again = [
            f"ALTER TABLE {name} ALTER COLUMN _cf_output bigint NOT NULL",
            f"DROP INDEX IF EXISTS _cf_job ON {name}",
        ]
        return again, [f"rights to give again: {'; '.join(given)}"] if given else []

    def number(self, table: str, lineage: Sequence[Any], output: int, most: int = 0) -> None:
        these = " AND ".join(
            f"{name} IS NULL" if value is None else f"{name} = ?"
            for name, value in zip(LINEAGE, lineage, strict=True)
        )
        top = f"TOP ({most:d}) " if most else ""
        self.send(
            f"UPDATE {top}{self.table(table)} SET _cf_output = ? "  # noqa: S608
            f"WHERE _cf_output IS NULL AND {these}",
            output, *(value for value in lineage if value is not None),
        )  # fmt: skip

    def compared(self, view: str) -> Iterator[Any]:
        """How many rows there are of each lineage: the rows themselves are never rewritten."""
        listed, of = ", ".join(LINEAGE), self.table(view)
        yield from self.ask(f"SELECT {listed}, {self.number_of_rows} FROM {of} GROUP BY {listed}")  # noqa: S608


def named_after(prefix: str, table: str) -> str:
    """The name of a table that belongs to another one; at most 128 characters."""
    whole = prefix + table
    return whole if is_short(whole) else prefix + hashlib.sha256(table.encode()).hexdigest()[:16]
