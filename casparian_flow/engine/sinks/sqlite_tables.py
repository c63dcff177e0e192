"""The tables of a SQLite database, and how the columns of an output fit to them.

`_cf_rows_<topic>` has `_cf_output` and the topic's columns; a table that an earlier release made
has the lineage columns too, and they are filled, for the sake of other people's triggers.

SQLite cannot change a column's declared type, but each value has a type of its own. So
`_cf_columns` has the current type of columns whose type changed: a column of nulls is declared
without a type and gets one with its first values, and an INTEGER column may become REAL. An entry
is valid only while the column is still declared as the entry says.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks.base import LINEAGE, otherwise, own_topic
from casparian_flow.engine.sinks.columns import (
    Column,
    columns_of,
    fit,
    fold,
    is_binary,
    is_text,
    pieces,
)
from casparian_flow.engine.sinks.sql import LEDGER, ROWS, Schema
from casparian_flow.engine.sinks.stage import reading
from casparian_flow.engine.sinks.topic_schema import EXACT_IN_DOUBLE
from casparian_flow.errors import OutputRefused, SinkConflict
from casparian_flow.protocol import Output

INSERT_ROWS = 16 << 10
"""The most rows of a staged file that are converted to Python values at once."""

CELL_BYTES = 1_000_000_000
"""SQLite's default limit of a value and of a row (SQLITE_MAX_LENGTH), which distributions keep."""

_TYPES = defaultdict(lambda: "TEXT", serial="INTEGER", number="INTEGER", name="TEXT COLLATE NOCASE")

_CURRENT_TYPES = """
CREATE TABLE IF NOT EXISTS _cf_columns (
    topic TEXT NOT NULL, name TEXT NOT NULL, declared TEXT NOT NULL, type TEXT NOT NULL,
    PRIMARY KEY (topic, name)
)"""
"""A first table's `topic` is the topic's name; a further one's is its own name."""


def quote(name: str) -> str:
    """A name quoted for a statement."""
    return '"' + name.replace('"', '""') + '"'


class SqliteSchema(Schema):
    """A SQLite database, in an open transaction.

    Args:
        connection: without implicit transactions.
        path: the database.
    """

    types = _TYPES
    ledger_indexes = (f"CREATE INDEX {LEDGER}_by_table ON {{}} (view_name, table_number, state)",)

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.connection = connection
        self.place = str(path)

    def ask(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        return self.connection.execute(sql, values).fetchall()

    def send(self, sql: str, *values: Any) -> int:
        return self.connection.execute(sql, values).rowcount

    def quote(self, name: str) -> str:
        return quote(name)

    def table(self, name: str) -> str:
        return quote(name)

    def fold(self, name: str) -> str:
        return fold(name)

    def columns(self, name: str) -> Mapping[str, str]:
        return dict(self.ask("SELECT name, type FROM pragma_table_info(?)", name))

    def has(self, name: str) -> bool:
        # Indexes share the names of tables and views.
        query = "SELECT 1 FROM sqlite_master WHERE name = ? COLLATE NOCASE AND type <> 'trigger'"
        return bool(self.ask(query, name))

    def definition(self, view: str) -> str:
        query = "SELECT sql FROM sqlite_master WHERE name = ? COLLATE NOCASE AND type = 'view'"
        return str(next(iter(self.ask(query, view)), [""])[0])

    def put_view(self, view: str, query: str) -> None:
        text = f"CREATE VIEW {quote(view)} AS {query}"
        if self.definition(view) == text:
            return
        triggers = self._made_on(view, "type = 'trigger'")
        self.send(f"DROP VIEW IF EXISTS {quote(view)}")
        self.send(text)
        self.ask(f"SELECT * FROM {quote(view)} LIMIT 0")  # noqa: S608  too many columns?
        for _, trigger in triggers:
            self.send(trigger)

    def target(self, view: str) -> str:
        return f"{self.place}:{view}"

    def index_outputs(self, table: str) -> None:
        index = quote(table.replace("_cf_rows", "_cf_output_of", 1))
        self.send(f"CREATE INDEX {index} ON {quote(table)} (_cf_output)")

    def drop(self, table: str) -> None:
        super().drop(table)
        if self.columns("_cf_columns"):
            self.send("DELETE FROM _cf_columns WHERE topic = ?", _owner(table))

    def load(self, output: Output, number: int) -> int:
        view = self.view_of(output)
        try:
            with reading(output) as staged:
                columns = columns_of(staged.schema_arrow)
                which = self.choose_table(output, columns, lambda name: self._fits(name, staged))
                table = self.rows_table(view, which)
                taken = self._fit_table(table, staged, own_topic(output))
                if not taken:  # a plugin that published no batch has given no columns
                    return 0
                self.check_ours(view)
                self.make_views(view)
                crashpoint("sqlite.table_fitted")
                self._insert(table, taken, staged, number)
        except OutputRefused as error:
            message = f"topic {output.topic!r}: {error.message}"
            raise type(error)(message, error.hint) from error
        return which

    def _insert(self, table: str, taken: Sequence[Column], staged: Any, number: int) -> None:
        listed = ", ".join(quote(column.name) for column in taken)
        marks = ", ".join("?" * len(taken))
        statement = f"INSERT INTO {quote(table)} (_cf_output, {listed}) VALUES ({number}, {marks})"  # noqa: S608
        names = staged.schema_arrow.names
        places = [names.index(column.name) for column in taken]
        for batch in chain.from_iterable(map(pieces, staged.iter_batches(INSERT_ROWS))):
            values = [
                column.values(batch.column(place))
                for column, place in zip(taken, places, strict=True)
            ]
            self.connection.executemany(statement, zip(*values, strict=True))
            crashpoint("sqlite.rows_written")

    # The columns of a table of rows.

    def _fits(self, table: str, staged: Any) -> bool:
        """Whether a table takes the values of an output."""
        self.send("SAVEPOINT trial")
        try:
            self._fit_table(table, staged, "")
        except OutputRefused:
            return False
        finally:
            self.send("ROLLBACK TO trial")
            self.send("RELEASE trial")
        return True

    def kinds(self, table: str) -> dict[str, str]:
        later: dict[tuple[str, str], str] = {}
        if self.columns("_cf_columns"):
            query = "SELECT name, declared, type FROM _cf_columns WHERE topic = ?"
            later = {(name, was): kind for name, was, kind in self.ask(query, _owner(table))}
        declared = super().kinds(table)
        return {name: later.get((name, kind), kind) for name, kind in declared.items()}

    def _fit_table(self, table: str, staged: Any, settles: str) -> list[Column]:
        """Create a table of rows, or add the columns that it lacks.

        Args:
            staged: the output's file (`pyarrow.parquet.ParquetFile`).
            settles: the command to suggest if a column is refused.

        Returns:
            the columns to load, fitted to the table; none if the output has none of its own.

        Raises:
            OutputRefused: a column has another type in the table.
        """
        incoming = columns_of(staged.schema_arrow)
        own = [column for column in incoming if column.name not in LINEAGE]
        if not own:
            return []
        self.widen(table, own)
        kinds = self.kinds(table)
        taken = [column for column in incoming if fold(column.name) in kinds]
        return [self._fitted(table, c, kinds[fold(c.name)], staged, settles) for c in taken]

    def _fitted(
        self, table: str, column: Column, kind: str, staged: Any, settles: str
    ) -> Column:  # fmt: skip
        """A column as the table, where it has this type, takes its values.

        Raises:
            OutputRefused: the table cannot take them, or would not hold its own exactly.
        """
        name, declared = quote(column.name), column.declared
        if not kind and declared:  # it gets a type now, unless it has values of another
            if not self._any(table, f"typeof({name}) NOT IN ('null', '{declared.lower()}')"):
                self._note(table, column.name, declared)
        elif (kind, declared) == ("INTEGER", "REAL") and not _is_whole(column, staged):
            if self._any(table, f"{name} > {EXACT_IN_DOUBLE} OR {name} < -{EXACT_IN_DOUBLE}"):
                raise OutputRefused(
                    f"column {column.name!r} ({column.kind}) is INTEGER in the table, and has "
                    "whole numbers that a REAL cannot hold exactly"
                    f"{otherwise(settles, column.name)}",
                    "convert the column in the plugin, or give it another name",
                )
            kind = "REAL"
            self._note(table, column.name, kind)
        return fit(column, kind, settles)

    def _any(self, table: str, condition: str) -> bool:
        """Whether some row fulfils a condition, whether anybody sees it or not."""
        return bool(self.ask(f"SELECT 1 FROM {quote(table)} WHERE {condition} LIMIT 1"))  # noqa: S608

    def _note(self, table: str, column: str, kind: str) -> None:
        """Note the current type of a column."""
        declared = super().kinds(table)[fold(column)]
        self.send(_CURRENT_TYPES)
        self.send(
            "INSERT OR REPLACE INTO _cf_columns VALUES (?, ?, ?, ?)",
            _owner(table), fold(column), declared, kind,
        )  # fmt: skip

    # For an upgrade; the connection has `legacy_alter_table`.

    def _made_on(self, table: str, which: str) -> list[tuple[Any, ...]]:
        """Name and text of the triggers or indexes on a table or view."""
        query = "SELECT name, sql FROM sqlite_master WHERE tbl_name = ? COLLATE NOCASE AND "
        return self.ask(query + which, table)

    def hold(self) -> None:
        """The transaction is the only one that writes."""

    def rename(self, table: str, name: str) -> None:
        self.send(f"ALTER TABLE {quote(table)} RENAME TO {quote(name)}")

    def set_apart(self, table: str) -> tuple[list[str], list[str]]:
        """Triggers wait until rows no longer change. Unique indexes become ordinary ones: rows of
        earlier versions stay in the table from now on."""
        again, notes = [], []
        for name, text in self._made_on(table, "type = 'trigger'"):
            self.send(f"DROP TRIGGER {quote(name)}")
            again.append(text)
        for name, text in self._made_on(table, "sql LIKE 'CREATE UNIQUE INDEX %'"):
            self.send(f"DROP INDEX {quote(name)}")
            again.append(text.replace(" UNIQUE", "", 1))
            notes.append(f"its index {name!r} is no longer unique, since versions are kept")
        jobs = quote(f"_cf_job_of_{table.removeprefix(ROWS)}")
        self.send(f"CREATE INDEX IF NOT EXISTS {jobs} ON {quote(table)} (_cf_job_id)")
        return [f"DROP INDEX {jobs}", *again], notes

    def number(self, table: str, lineage: Sequence[Any], output: int, most: int = 0) -> None:
        these = f"_cf_output IS NULL AND {' AND '.join(f'{name} IS ?' for name in LINEAGE)}"
        if most:
            taken = {fold(name) for name in self.columns(table)}
            rowid = next((name for name in ("rowid", "_rowid_", "oid") if name not in taken), None)
            if rowid is None:
                raise SinkConflict(
                    f"table {table!r} has equal rows of two outputs, and columns for every name "
                    "of SQLite's row number, so that they cannot be told apart; nothing was "
                    "changed",
                    "rename one of the columns rowid, _rowid_ and oid",
                )
            chosen = f"SELECT {rowid} FROM {quote(table)} WHERE {these} LIMIT {most:d}"  # noqa: S608
            these = f"{rowid} IN ({chosen})"
        update = f"UPDATE {quote(table)} SET _cf_output = ? WHERE {these}"  # noqa: S608
        self.send(update, output, *lineage)

    def compared(self, view: str) -> Iterator[Any]:
        """All its rows."""
        listed = ", ".join(map(quote, sorted(self.columns(view))))
        yield from self.connection.execute(f"SELECT {listed} FROM {quote(view)}")  # noqa: S608


def _owner(table: str) -> str:
    """What `_cf_columns` has as the topic of a table."""
    return fold(table).removeprefix(ROWS)


def _is_whole(column: Column, staged: Any) -> bool:
    """Whether all numbers of a staged column are integers of 64 bits."""
    whole = replace(column, plain=pa.int64())
    try:
        for batch in staged.iter_batches(INSERT_ROWS, columns=[column.name]):
            whole.check(batch.column(batch.schema.get_field_index(column.name)))
    except OutputRefused:
        return False
    return True


# Checks while an output is staged, before its job is decided: the topic's table is created in an
# empty database in memory, where SQLite refuses reserved names, equal names and too many columns.
# Whether an existing table has room for more columns is only found when it is published.


def check_table(topic: str, schema: Any) -> None:
    """Check that SQLite can have a table of these columns and the lineage columns.

    Raises:
        OutputRefused: it cannot; the message names a column if one is the reason.
    """
    columns = columns_of(schema)
    with closing(sqlite3.connect(":memory:")) as trial:
        room = trial.getlimit(sqlite3.SQLITE_LIMIT_COLUMN)  # of a view's columns, too
        free = room - len(LINEAGE)
        if len(columns) > free:
            raise OutputRefused(
                f"topic {topic!r} has {len(columns)} columns: from column {columns[free].name!r} "
                f"on they do not fit: a table of SQLite has room for {room}, with the lineage "
                "columns",
                "publish fewer columns, or columns of lists; or use Parquet: casparian topics set",
            )
        try:
            described = ", ".join(f"{quote(c.name)} {c.declared}" for c in columns)
            trial.execute(f"CREATE TABLE {quote(topic)} (_cf_output, {described})")
        except sqlite3.Error as error:
            raise OutputRefused(
                f"topic {topic!r}: SQLite cannot have such a table: {error}",
                "rename the topic or its columns in the plugin",
            ) from error


def check_values(batch: Any) -> None:
    """Check that SQLite can hold every value of a batch.

    Raises:
        OutputRefused: it cannot; the message names the column.
    """
    large = batch.nbytes > CELL_BYTES
    for column, values in zip(columns_of(batch.schema), batch.columns, strict=True):
        column.check(values)
        if large:
            _check_length(column, values)


def _check_length(column: Column, values: Any) -> None:
    if not (is_text(column.kind) or is_binary(column.kind)):
        return
    long = values.cast(pa.large_string() if is_text(column.kind) else pa.large_binary())
    longest = pc.max(pc.binary_length(long)).as_py() or 0
    if longest > CELL_BYTES:
        raise OutputRefused(
            f"column {column.name!r} ({column.kind}) has a value of {longest} bytes; SQLite's "
            f"longest has {CELL_BYTES}",
            "publish it in parts, or use Parquet: casparian topics set",
        )
