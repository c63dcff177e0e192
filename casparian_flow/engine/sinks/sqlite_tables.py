"""The tables of the SQLite sink: each topic's own, and the one for its retracted rows.

An output's rows are found by their lineage columns; a table gets an index for that when rows are
first taken out of it. Retracted rows are in `_cf_retracted_<topic>`. Its columns have no types, so
no value is converted.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks.base import LINEAGE, facts_of, otherwise, own_topic
from casparian_flow.engine.sinks.columns import (
    Column,
    columns_of,
    fit,
    fold,
    is_binary,
    is_text,
    pieces,
)
from casparian_flow.engine.sinks.topic_schema import EXACT_IN_DOUBLE
from casparian_flow.errors import OutputRefused, SinkConflict

# SQLite cannot change a column's declared type, but each value has a type of its own. So
# `_cf_columns` has the current type of columns whose type changed: a column of nulls is declared
# without a type and gets one with its first values, and an INTEGER column may become REAL. An entry
# is valid only while the column is still declared as the entry says.


BATCH_ROWS = 16 << 10
"""Rows of a staged file that are checked at once."""

RETRACTED = "_cf_retracted_"
"""How the name of a table of retracted rows begins; the topic follows."""

_TABLE = """
CREATE TABLE IF NOT EXISTS _cf_columns (
    topic TEXT NOT NULL, name TEXT NOT NULL, declared TEXT NOT NULL, type TEXT NOT NULL,
    PRIMARY KEY (topic, name)
)"""


def declared(connection: sqlite3.Connection, table: str) -> dict[str, str]:
    """Name -> declared type of a table's columns; empty if there is no such table."""
    return dict(connection.execute("SELECT name, type FROM pragma_table_info(?)", [table]))


def column_types(connection: sqlite3.Connection, topic: str) -> dict[str, str]:
    """Name -> current type of a topic's columns; empty for one without a type."""
    found = declared(connection, topic)
    if not declared(connection, "_cf_columns"):
        return found
    rows = connection.execute("SELECT * FROM _cf_columns WHERE topic = ?", [fold(topic)])
    later = {(name, before): kind for _, name, before, kind in map(tuple, rows)}
    return {name: later.get((fold(name), kind), kind) for name, kind in found.items()}


def fitted(
    connection: sqlite3.Connection, topic: str, staged: Any, incoming: Sequence[Column],
    settles: str,
) -> list[Column]:  # fmt: skip
    """Fit an output's columns to the topic's table, which must have all of them.

    Args:
        staged: the output's file (`pyarrow.parquet.ParquetFile`).
        settles: the command to suggest if a column is refused.

    Raises:
        OutputRefused: a column has another type in the table.
    """
    kinds = {fold(name): kind for name, kind in column_types(connection, topic).items()}
    found = []
    for column in incoming:
        kind = kinds.get(fold(column.name), column.declared)
        if not kind and column.declared:
            _settle(connection, topic, column)
        elif (kind, column.declared) == ("INTEGER", "REAL") and not _is_whole(column, staged):
            _widen(connection, topic, column, settles)
            kind = "REAL"
        found.append(fit(column, kind, settles))
    return found


def _settle(connection: sqlite3.Connection, topic: str, column: Column) -> None:
    """Give a column without a type the output's, unless the table has values of another type."""
    storage = column.declared.lower()
    if not any(_has(connection, topic, column.name, f"typeof({{}}) NOT IN ('null', '{storage}')")):
        _note_type(connection, topic, column.name, column.declared)


def _widen(connection: sqlite3.Connection, topic: str, column: Column, settles: str) -> None:
    """Let an INTEGER column accept REALs.

    Raises:
        OutputRefused: it has a whole number that a REAL cannot hold exactly.
    """
    beyond = f"{{0}} > {EXACT_IN_DOUBLE} OR {{0}} < -{EXACT_IN_DOUBLE}"
    if any(_has(connection, topic, column.name, beyond)):
        raise OutputRefused(
            f"column {column.name!r} ({column.kind}) is INTEGER in the table, and has whole "
            f"numbers that a REAL cannot hold exactly{otherwise(settles, column.name)}",
            "convert the column in the plugin, or give it another name",
        )
    _note_type(connection, topic, column.name, "REAL")


def _is_whole(column: Column, staged: Any) -> bool:
    """Whether all numbers of a staged column are integers of 64 bits."""
    whole = replace(column, plain=pa.int64())
    try:
        for batch in staged.iter_batches(BATCH_ROWS, columns=[column.name]):
            whole.check(batch.column(batch.schema.get_field_index(column.name)))
    except OutputRefused:
        return False
    return True


def _has(connection: sqlite3.Connection, topic: str, name: str, condition: str) -> Iterator[bool]:
    """Whether some value fulfils a condition: among the shown rows, then among the retracted."""
    for table in (topic, RETRACTED + topic):
        if fold(name) in {fold(column) for column in declared(connection, table)}:
            chosen = condition.format(quote(name))
            query = f"SELECT 1 FROM {quote(table)} WHERE {chosen} LIMIT 1"  # noqa: S608
            yield connection.execute(query).fetchone() is not None


def _note_type(connection: sqlite3.Connection, topic: str, name: str, kind: str) -> None:
    before = {fold(column): kind for column, kind in declared(connection, topic).items()}
    connection.execute(_TABLE)
    connection.execute(
        "INSERT OR REPLACE INTO _cf_columns VALUES (?, ?, ?, ?)",
        [fold(topic), fold(name), before[fold(name)], kind],
    )


def quote(name: str) -> str:
    """A name quoted for a statement."""
    return '"' + name.replace('"', '""') + '"'


INSERT_ROWS = 16 << 10
"""The most rows that are converted to Python values at once."""


class Rows(NamedTuple):
    """Selects the rows of an output by their lineage, up to a number.

    Two ledgers that share a table may have given the same ids to the same content. Their rows are
    equal then, and each ledger selects as many as it has published.
    """

    job_id: int
    file_version_id: int = 0
    """0: not known, as are empty values of the next two."""
    source_hash: str = ""
    plugin_version: str = ""
    number: int = -1
    """The most rows to select; -1: all."""


_THESE = """
_cf_job_id = :job_id
AND _cf_file_version_id = coalesce(nullif(:file_version_id, 0), _cf_file_version_id)
AND _cf_source_hash = coalesce(nullif(:source_hash, ''), _cf_source_hash)
AND _cf_plugin_version = coalesce(nullif(:plugin_version, ''), _cf_plugin_version)
"""


def is_ours(connection: sqlite3.Connection, table: str) -> bool:
    """Whether the table exists and has the lineage columns."""
    return declared(connection, table).keys() >= set(LINEAGE)


def count_rows(connection: sqlite3.Connection, topic: str) -> dict[int, int]:
    """Job id -> how many rows of it a topic's table has.

    Raises:
        sqlite3.OperationalError: there is no such table, or it lacks the lineage columns.
    """
    query = f"SELECT _cf_job_id, COUNT(*) FROM {quote(topic)} GROUP BY 1"  # noqa: S608
    return dict(map(tuple, connection.execute(query)))


def insert_rows(connection: sqlite3.Connection, topic: str, staged: Any) -> None:
    """Insert the rows of a staged file (`pyarrow.parquet.ParquetFile`).

    An empty output of mode replace has only the lineage columns, and needs no table.

    Raises:
        SinkConflict: the topic's table is not one of ours.
        OutputRefused: a column's type differs from the table's, or a value would change in it.
    """
    incoming = columns_of(staged.schema_arrow)
    if len(incoming) == len(LINEAGE):
        return
    try:
        taken = _fit_table(connection, topic, staged, incoming)
        crashpoint("sqlite.table_fitted")
        names = ", ".join(quote(column.name) for column in taken)
        marks = ", ".join("?" * len(taken))
        statement = f"INSERT INTO {quote(topic)} ({names}) VALUES ({marks})"  # noqa: S608
        for batch in chain.from_iterable(map(pieces, staged.iter_batches(INSERT_ROWS))):
            values = [c.values(a) for c, a in zip(taken, batch.columns, strict=True)]
            connection.executemany(statement, zip(*values, strict=True))
            crashpoint("sqlite.rows_written")
    except OutputRefused as error:
        raise type(error)(f"topic {topic!r}: {error.message}", error.hint) from error


def create_table(connection: sqlite3.Connection, topic: str, incoming: Sequence[Column]) -> None:
    """Create a topic's table."""
    described = ", ".join(f"{quote(column.name)} {column.declared}" for column in incoming)
    connection.execute(f"CREATE TABLE {quote(topic)} ({described})")


def delete_rows(connection: sqlite3.Connection, topic: str, rows: Rows) -> int:
    """Delete an output's rows from a topic's table; returns their number."""
    if not is_ours(connection, topic):
        return 0
    chosen = _chosen(connection, topic)
    return connection.execute(f"DELETE FROM {quote(topic)} {chosen}", rows._asdict()).rowcount  # noqa: S608


def retract_rows(connection: sqlite3.Connection, topic: str, rows: Rows) -> int:
    """Move an output's rows to the table of retracted rows; returns their number."""
    if not is_ours(connection, topic):
        return 0
    kept = RETRACTED + topic
    known = {fold(name) for name in declared(connection, kept)}
    lacking = [name for name in declared(connection, topic) if fold(name) not in known]
    if not known:
        described = ", ".join(map(quote, lacking))
        connection.execute(f"CREATE TABLE {quote(kept)} ({described})")
    else:
        for name in lacking:
            connection.execute(f"ALTER TABLE {quote(kept)} ADD COLUMN {quote(name)}")
    return _move(connection, topic, kept, declared(connection, topic), rows)


def reinstate_rows(connection: sqlite3.Connection, topic: str, rows: Rows) -> int:
    """Move an output's rows back to the topic's table; returns their number.

    Raises:
        SinkConflict: the topic's table is gone, or lacks a column that the rows have.
    """
    kept = RETRACTED + topic
    if not is_ours(connection, kept):
        return 0
    existing = {fold(name) for name in declared(connection, topic)}
    if lost := [name for name in declared(connection, kept) if fold(name) not in existing]:
        raise SinkConflict(
            f"table {topic!r} lacks the column {lost[0]!r}, which its retracted rows have",
            f"add that column again; the rows are kept in the table {kept!r}",
        )
    return _move(connection, kept, topic, declared(connection, kept), rows)


def forget_rows(connection: sqlite3.Connection, topic: str, rows: Rows) -> int:
    """Delete an output's retracted rows; returns their number."""
    return delete_rows(connection, RETRACTED + topic, rows)


def check_all_ours(connection: sqlite3.Connection, topic: str, promised: dict[int, int]) -> None:
    """Check that a topic's table, if it exists, has only rows that we published.

    Args:
        promised: job id -> how many rows of it there must be.

    Raises:
        SinkConflict: it has other rows.
    """
    if not declared(connection, topic):
        return
    if not is_ours(connection, topic) or count_rows(connection, topic) != promised:
        raise SinkConflict(
            f"table {topic!r} has rows that Casparian Flow did not write, and the topic's mode "
            "is error; it was left untouched",
            "rename that table, or: casparian topics set ... --mode append",
        )


def _move(
    connection: sqlite3.Connection, source: str, target: str, names: Sequence[str] | dict[str, str],
    rows: Rows,
) -> int:  # fmt: skip
    listed = ", ".join(map(quote, names))
    connection.execute(
        f"INSERT INTO {quote(target)} ({listed}) "  # noqa: S608
        f"SELECT {listed} FROM {quote(source)} {_chosen(connection, source)}",
        rows._asdict(),
    )
    crashpoint("sqlite.rows_copied")
    return delete_rows(connection, source, rows)


def _chosen(connection: sqlite3.Connection, table: str) -> str:
    """The WHERE clause that selects `Rows` in a table; creates the index for it."""
    index = quote(f"_cf_job_of_{table}")
    connection.execute(f"CREATE INDEX IF NOT EXISTS {index} ON {quote(table)} (_cf_job_id)")
    taken = {fold(name) for name in declared(connection, table)}
    rowid = next((name for name in ("rowid", "_rowid_", "oid") if name not in taken), None)
    if rowid is None:
        raise SinkConflict(f"table {table!r} has columns for every name of SQLite's row number")
    these = f"SELECT {rowid} FROM {quote(table)} WHERE {_THESE} LIMIT :number"  # noqa: S608
    return f"WHERE {rowid} IN ({these})"


def _fit_table(
    connection: sqlite3.Connection, topic: str, staged: Any, incoming: Sequence[Column]
) -> list[Column]:
    """Create the topic's table, or add the columns it lacks; returns the columns fitted to it.

    Raises:
        SinkConflict: the table is not one of ours.
        OutputRefused: a column has another type in the table.
    """
    table = quote(topic)
    existing = {fold(name): kind for name, kind in declared(connection, topic).items()}
    if not existing:
        create_table(connection, topic, incoming)
        return list(incoming)
    if not existing.keys() >= set(LINEAGE):
        raise SinkConflict(
            f"table {topic!r} was not made by Casparian Flow; it was left untouched",
            "rename that table, or give the topic another sink",
        )
    for column in incoming:
        if fold(column.name) not in existing:
            connection.execute(
                f"ALTER TABLE {table} ADD COLUMN {quote(column.name)} {column.declared}"
            )
    settles = own_topic(topic, facts_of(staged.metadata.metadata))
    return fitted(connection, topic, staged, incoming, settles)


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
        room = trial.getlimit(sqlite3.SQLITE_LIMIT_COLUMN)
        if len(columns) > room:
            raise OutputRefused(
                f"topic {topic!r} has {len(columns) - len(ours)} columns: from column "
                f"{columns[room - len(ours)].name!r} on they do not fit: a table of SQLite has "
                f"room for {room}, with the lineage columns",
                "publish fewer columns, or columns of lists; or use Parquet: casparian topics set",
            )
        try:
            create_table(trial, topic, columns)
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
