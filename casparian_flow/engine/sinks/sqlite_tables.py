"""The tables of a SQLite database, and how the columns of an output fit to them.

`_cf_rows_<topic>` has `_cf_output` and the topic's columns; a table that an earlier release made
has the lineage columns too, and they are filled, for the sake of other people's triggers. What a
rebuild has mended may be in further tables (`sql.py`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
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
from casparian_flow.errors import OutputRefused
from casparian_flow.protocol import Output

# SQLite cannot change a column's declared type, but each value has a type of its own. So
# `_cf_columns` has the current type of columns whose type changed: a column of nulls is declared
# without a type and gets one with its first values, and an INTEGER column may become REAL. An entry
# is valid only while the column is still declared as the entry says.


BATCH_ROWS = 16 << 10
"""Rows of a staged file that are checked at once."""

_TABLE = """
CREATE TABLE IF NOT EXISTS _cf_columns (
    topic TEXT NOT NULL, name TEXT NOT NULL, declared TEXT NOT NULL, type TEXT NOT NULL,
    PRIMARY KEY (topic, name)
)"""


def declared(connection: sqlite3.Connection, table: str) -> dict[str, str]:
    """Name -> declared type of a table's columns; empty if there is no such table."""
    return dict(connection.execute("SELECT name, type FROM pragma_table_info(?)", [table]))


def column_types(connection: sqlite3.Connection, table: str) -> dict[str, str]:
    """Name -> current type of the columns of a table of rows; empty for one without a type."""
    found = declared(connection, table)
    if not declared(connection, "_cf_columns"):
        return found
    rows = connection.execute("SELECT * FROM _cf_columns WHERE topic = ?", [_owner(table)])
    later = {(name, before): kind for _, name, before, kind in map(tuple, rows)}
    return {name: later.get((fold(name), kind), kind) for name, kind in found.items()}


def _owner(table: str) -> str:
    """What `_cf_columns` has as the topic: that of a first table, or the name of a further one."""
    return fold(table).removeprefix(ROWS)


class _Fit:
    """Fits an output's columns to a table, which must have all of them.

    Args:
        table: a table of the topic's rows.
        staged: the output's file (`pyarrow.parquet.ParquetFile`).
        settles: the command to suggest if a column is refused.
    """

    def __init__(
        self, connection: sqlite3.Connection, table: str, staged: Any, settles: str
    ) -> None:
        self._connection = connection
        self._table = table
        self._staged = staged
        self._settles = settles
        types = column_types(connection, table)
        self._kinds = {fold(name): kind for name, kind in types.items()}

    def column(self, column: Column) -> Column:
        """A column as the table takes its values.

        Raises:
            OutputRefused: it has another type in the table.
        """
        kind = self._kinds.get(fold(column.name), column.declared)
        if not kind and column.declared:
            self._settle(column)
        elif (kind, column.declared) == ("INTEGER", "REAL") and not _is_whole(column, self._staged):
            self._widen(column)
            kind = "REAL"
        return fit(column, kind, self._settles)

    def _settle(self, column: Column) -> None:
        """Give a column without a type the output's, unless the table has values of another."""
        storage = column.declared.lower()
        if not self._has(column, f"typeof({{}}) NOT IN ('null', '{storage}')"):
            self._note(column, column.declared)

    def _widen(self, column: Column) -> None:
        """Let an INTEGER column accept REALs.

        Raises:
            OutputRefused: it has a whole number that a REAL cannot hold exactly.
        """
        if self._has(column, f"{{0}} > {EXACT_IN_DOUBLE} OR {{0}} < -{EXACT_IN_DOUBLE}"):
            raise OutputRefused(
                f"column {column.name!r} ({column.kind}) is INTEGER in the table, and has whole "
                f"numbers that a REAL cannot hold exactly{otherwise(self._settles, column.name)}",
                "convert the column in the plugin, or give it another name",
            )
        self._note(column, "REAL")

    def _has(self, column: Column, condition: str) -> bool:
        """Whether some row fulfils a condition, whether anybody sees it or not."""
        chosen = condition.format(quote(column.name))
        query = f"SELECT 1 FROM {quote(self._table)} WHERE {chosen} LIMIT 1"  # noqa: S608
        return self._connection.execute(query).fetchone() is not None

    def _note(self, column: Column, kind: str) -> None:
        table = declared(self._connection, self._table)
        before = {fold(name): declared_as for name, declared_as in table.items()}
        name = fold(column.name)
        self._connection.execute(_TABLE)
        self._connection.execute(
            "INSERT OR REPLACE INTO _cf_columns VALUES (?, ?, ?, ?)",
            [_owner(self._table), name, before[name], kind],
        )


def _is_whole(column: Column, staged: Any) -> bool:
    """Whether all numbers of a staged column are integers of 64 bits."""
    whole = replace(column, plain=pa.int64())
    try:
        for batch in staged.iter_batches(BATCH_ROWS, columns=[column.name]):
            whole.check(batch.column(batch.schema.get_field_index(column.name)))
    except OutputRefused:
        return False
    return True


def quote(name: str) -> str:
    """A name quoted for a statement."""
    return '"' + name.replace('"', '""') + '"'


def fit_table(
    connection: sqlite3.Connection, table: str, staged: Any, settles: str
) -> list[Column]:
    """Create a table of rows, or add the columns that it lacks.

    Returns:
        the columns to load, fitted to the table; none if the output has none of its own.

    Raises:
        OutputRefused: a column has another type in the table.
    """
    incoming = columns_of(staged.schema_arrow)
    own = [column for column in incoming if column.name not in LINEAGE]
    if not own:
        return []
    existing = {fold(name) for name in declared(connection, table)}
    if not existing:
        create_table(connection, table, own)
        index_outputs(connection, table)
        return own
    for column in own:
        if fold(column.name) not in existing:
            connection.execute(
                f"ALTER TABLE {quote(table)} ADD COLUMN {quote(column.name)} {column.declared}"
            )
    fitting = _Fit(connection, table, staged, settles)
    taken = (c for c in incoming if c.name not in LINEAGE or c.name in existing)
    return [fitting.column(column) for column in taken]


def create_table(connection: sqlite3.Connection, table: str, own: Sequence[Column]) -> None:
    """Create the table for a topic's rows."""
    described = "".join(f", {quote(column.name)} {column.declared}" for column in own)
    connection.execute(f"CREATE TABLE {quote(table)} (_cf_output INTEGER NOT NULL{described})")


def index_outputs(connection: sqlite3.Connection, table: str) -> None:
    """Create the index by which the rows of an output are counted and deleted."""
    index = quote(table.replace("_cf_rows", "_cf_output_of", 1))
    connection.execute(f"CREATE INDEX {index} ON {quote(table)} (_cf_output)")


INSERT_ROWS = 16 << 10
"""The most rows that are converted to Python values at once."""

_LEDGER = f"""
CREATE TABLE IF NOT EXISTS {LEDGER} (
    id INTEGER PRIMARY KEY, output_key TEXT NOT NULL UNIQUE, topic TEXT NOT NULL,
    view_name TEXT NOT NULL COLLATE NOCASE, mode TEXT NOT NULL, state TEXT NOT NULL,
    rows INTEGER NOT NULL, digest TEXT NOT NULL, published_at TEXT NOT NULL, shown_at TEXT NOT NULL,
    hidden_at TEXT NOT NULL, job_id INTEGER, file_version_id INTEGER, source_hash TEXT,
    plugin_version TEXT, facts TEXT NOT NULL, table_number INTEGER NOT NULL
)"""
_LEDGER_INDEX = f"""
CREATE INDEX IF NOT EXISTS {LEDGER}_by_table ON {LEDGER} (view_name, table_number, state)
"""


def make_ledger(connection: sqlite3.Connection) -> None:
    """Create the sink's ledger, unless there is one."""
    connection.execute(_LEDGER)
    if "table_number" in declared(connection, LEDGER):  # else of an earlier release
        connection.execute(_LEDGER_INDEX)


class SqliteSchema(Schema):
    """A SQLite database, in an open transaction.

    Args:
        connection: without implicit transactions.
        path: the database.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.connection = connection
        self.place = str(path)

    def ask(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """See `Schema.ask`."""
        return self.connection.execute(sql, values).fetchall()

    def send(self, sql: str, *values: Any) -> int:
        """See `Schema.send`."""
        return self.connection.execute(sql, values).rowcount

    def quote(self, name: str) -> str:
        """See `Schema.quote`."""
        return quote(name)

    def fold(self, name: str) -> str:
        """See `Schema.fold`."""
        return fold(name)

    def columns(self, name: str) -> Mapping[str, str]:
        """See `Schema.columns`."""
        return declared(self.connection, name)

    def has(self, name: str) -> bool:
        """See `Schema.has`."""
        # Indexes share the names of tables and views.
        query = "SELECT 1 FROM sqlite_master WHERE name = ? COLLATE NOCASE AND type <> 'trigger'"
        return bool(self.ask(query, name))

    def definition(self, view: str) -> str:
        """See `Schema.definition`."""
        query = "SELECT sql FROM sqlite_master WHERE name = ? COLLATE NOCASE AND type = 'view'"
        return str(next(iter(self.ask(query, view)), [""])[0])

    def put_view(self, view: str, query: str) -> None:
        """See `Schema.put_view`."""
        text = f"CREATE VIEW {quote(view)} AS {query}"
        if self.definition(view) == text:
            return
        triggers = self.ask(
            "SELECT sql FROM sqlite_master WHERE tbl_name = ? COLLATE NOCASE AND type = 'trigger'",
            view,
        )
        self.send(f"DROP VIEW IF EXISTS {quote(view)}")
        self.send(text)
        self.ask(f"SELECT * FROM {quote(view)} LIMIT 0")  # noqa: S608  too many columns?
        for (trigger,) in triggers:
            self.send(trigger)

    def target(self, view: str) -> str:
        """See `Schema.target`."""
        return f"{self.place}:{view}"

    def drop(self, table: str) -> None:
        """See `Schema.drop`."""
        super().drop(table)
        if self.columns("_cf_columns"):
            self.send("DELETE FROM _cf_columns WHERE topic = ?", _owner(table))

    def load(self, output: Output, number: int) -> int:
        """See `Schema.load`."""
        view = self.view_of(output)
        try:
            with reading(output) as staged:
                names = staged.schema_arrow.names
                which = self._table_for(output, number, staged)
                table = self.rows_table(view, which)
                taken = fit_table(self.connection, table, staged, own_topic(output))
                if not taken:  # a plugin that published no batch has given no columns
                    return 0
                self.check_ours(view)
                self.make_views(view)
                crashpoint("sqlite.table_fitted")
                listed = ", ".join(quote(column.name) for column in taken)
                marks = ", ".join("?" * len(taken))
                statement = (
                    f"INSERT INTO {quote(table)} (_cf_output, {listed}) "  # noqa: S608
                    f"VALUES ({number}, {marks})"
                )
                places = [names.index(column.name) for column in taken]
                for batch in chain.from_iterable(map(pieces, staged.iter_batches(INSERT_ROWS))):
                    values = [
                        column.values(batch.column(place))
                        for column, place in zip(taken, places, strict=True)
                    ]
                    self.connection.executemany(statement, zip(*values, strict=True))
                    crashpoint("sqlite.rows_written")
        except OutputRefused as error:
            message = f"topic {output.topic!r}: {error.message}"
            raise type(error)(message, error.hint) from error
        return which

    def _table_for(self, output: Output, number: int, staged: Any) -> int:
        """The number of the table for an output's rows."""
        view = self.view_of(output)
        incoming = {fold(c.name): c.declared for c in columns_of(staged.schema_arrow)}

        def is_alike(which: int) -> bool:
            types = column_types(self.connection, self.rows_table(view, which))
            pairs = ((kind, incoming.get(fold(name), "")) for name, kind in types.items())
            return all(not one or not other or one == other for one, other in pairs)

        def fits(which: int) -> bool:
            self.connection.execute("SAVEPOINT trial")
            try:
                fit_table(self.connection, self.rows_table(view, which), staged, "")
            except OutputRefused:
                return False
            finally:
                self.connection.execute("ROLLBACK TO trial")
                self.connection.execute("RELEASE trial")
            return True

        return self.choose_table(
            view, number, is_rebuilt=output.generation > 0, is_alike=is_alike, fits=fits
        )


# Checks while an output is staged, before its job is decided: the topic's table is created in an
# empty database in memory, where SQLite refuses reserved names, equal names and too many columns.
# Whether an existing table has room for more columns is only found when it is published.


CELL_BYTES = 1_000_000_000
"""SQLite's default limit of a value and of a row (SQLITE_MAX_LENGTH), which distributions keep."""


def check_table(topic: str, schema: Any) -> None:
    """Check that SQLite can have a table of these columns and the lineage columns.

    Raises:
        OutputRefused: it cannot; the message names a column if one is the reason.
    """
    ours = [Column(name, pa.null(), pa.null(), "") for name in LINEAGE]
    columns = [*columns_of(schema), *ours]
    with closing(sqlite3.connect(":memory:")) as trial:
        room = trial.getlimit(sqlite3.SQLITE_LIMIT_COLUMN)  # of a view's columns, too
        if len(columns) > room:
            raise OutputRefused(
                f"topic {topic!r} has {len(columns) - len(ours)} columns: from column "
                f"{columns[room - len(ours)].name!r} on they do not fit: a table of SQLite has "
                f"room for {room}, with the lineage columns",
                "publish fewer columns, or columns of lists; or use Parquet: casparian topics set",
            )
        try:
            create_table(trial, topic, columns[: -len(ours)])
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
