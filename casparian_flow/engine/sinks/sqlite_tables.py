"""The tables of the SQLite sink: a topic's own, and the one that keeps what was retracted of it.

The rows of an output are found by their lineage; the first time that rows are taken out of a
table, it gets an index for that. What is retracted waits in `_cf_retracted_<topic>`, whose columns
have no types: there every value stays what it is.
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

# The types that columns of SQLite tables have today, where the table itself cannot say it.
#
# SQLite keeps what a column was declared as. A column that was null everywhere is declared without
# a type, and gets one with the first values; an INTEGER column that meets a REAL holds both, since
# in SQLite each value has a type of its own. `_cf_columns` has what such columns are now: a row is
# made with the first column that needs one, and counts while the column is declared as it was then.


BATCH_ROWS = 16 << 10
"""Rows of a staged file that are looked at at once."""

RETRACTED = "_cf_retracted_"
"""Begins the name of the table that keeps a topic's retracted rows."""

_TABLE = """
CREATE TABLE IF NOT EXISTS _cf_columns (
    topic TEXT NOT NULL, name TEXT NOT NULL, declared TEXT NOT NULL, type TEXT NOT NULL,
    PRIMARY KEY (topic, name)
)"""


def declared(connection: sqlite3.Connection, table: str) -> dict[str, str]:
    """Name -> declared type; empty where there is no such table."""
    return dict(connection.execute("SELECT name, type FROM pragma_table_info(?)", [table]))


def column_types(connection: sqlite3.Connection, topic: str) -> dict[str, str]:
    """Name -> type that a topic's column has today; empty where it has none yet, or any."""
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
    """An output's columns as the topic's table takes them, which has them all.

    Args:
        staged: the output's file (`pyarrow.parquet.ParquetFile`).
        settles: what to type where a column is refused.

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
    """Give a column without a type that of its first values; one that has others stays open."""
    storage = column.declared.lower()
    if not any(_has(connection, topic, column.name, f"typeof({{}}) NOT IN ('null', '{storage}')")):
        _note_type(connection, topic, column.name, column.declared)


def _widen(connection: sqlite3.Connection, topic: str, column: Column, settles: str) -> None:
    """Have an INTEGER column take REALs.

    Raises:
        OutputRefused: it has a whole number that no REAL is exactly.
    """
    beyond = f"{{0}} > {EXACT_IN_DOUBLE} OR {{0}} < -{EXACT_IN_DOUBLE}"
    if any(_has(connection, topic, column.name, beyond)):
        raise OutputRefused(
            f"column {column.name!r} ({column.kind}) is INTEGER in the table, with whole numbers "
            f"that no REAL is exactly{otherwise(settles, column.name)}",
            "convert the column in the plugin, or give it another name",
        )
    _note_type(connection, topic, column.name, "REAL")


def _is_whole(column: Column, staged: Any) -> bool:
    """Whether all numbers of a staged column are whole ones of 64 bits."""
    whole = replace(column, plain=pa.int64())
    try:
        for batch in staged.iter_batches(BATCH_ROWS, columns=[column.name]):
            whole.check(batch.column(batch.schema.get_field_index(column.name)))
    except OutputRefused:
        return False
    return True


def _has(connection: sqlite3.Connection, topic: str, name: str, condition: str) -> Iterator[bool]:
    """Whether a value is so, of those that are shown, and of those that were retracted."""
    for table in (topic, RETRACTED + topic):
        if fold(name) in {fold(each) for each in declared(connection, table)}:
            chosen = condition.format(quote(name))
            query = f"SELECT 1 FROM {quote(table)} WHERE {chosen} LIMIT 1"  # noqa: S608
            yield connection.execute(query).fetchone() is not None


def _note_type(connection: sqlite3.Connection, topic: str, name: str, kind: str) -> None:
    """Write down what a column's type is from now on."""
    before = {fold(each): kind for each, kind in declared(connection, topic).items()}
    connection.execute(_TABLE)
    connection.execute(
        "INSERT OR REPLACE INTO _cf_columns VALUES (?, ?, ?, ?)",
        [fold(topic), fold(name), before[fold(name)], kind],
    )


def quote(name: str) -> str:
    """A name as a statement has it."""
    return '"' + name.replace('"', '""') + '"'


INSERT_ROWS = 16 << 10
"""Rows converted to Python values at once, at most."""


class Rows(NamedTuple):
    """Rows of an output: their lineage, and how many there should be.

    Two ledgers that share a table may give the same ids to the same content. Then their rows are
    alike, and each ledger takes as many as are its own.
    """

    job_id: int
    file_version_id: int = 0
    """0, as what follows where it is empty: not known."""
    source_hash: str = ""
    plugin_version: str = ""
    number: int = -1
    """No more than so many; -1 for all."""


_THESE = """
_cf_job_id = :job_id
AND _cf_file_version_id = coalesce(nullif(:file_version_id, 0), _cf_file_version_id)
AND _cf_source_hash = coalesce(nullif(:source_hash, ''), _cf_source_hash)
AND _cf_plugin_version = coalesce(nullif(:plugin_version, ''), _cf_plugin_version)
"""


def is_ours(connection: sqlite3.Connection, table: str) -> bool:
    """Whether there is such a table, and it has the lineage columns."""
    return declared(connection, table).keys() >= set(LINEAGE)


def count_rows(connection: sqlite3.Connection, topic: str) -> dict[int, int]:
    """How many rows of each job a topic's table holds.

    Raises:
        sqlite3.OperationalError: there is no such table, or it is not one of ours.
    """
    query = f"SELECT _cf_job_id, COUNT(*) FROM {quote(topic)} GROUP BY 1"  # noqa: S608
    return dict(map(tuple, connection.execute(query)))


def insert_rows(connection: sqlite3.Connection, topic: str, staged: Any) -> None:
    """Add the rows of a staged file (`pyarrow.parquet.ParquetFile`).

    An empty output of mode replace has no columns but the lineage ones, and needs no table.

    Raises:
        SinkConflict: the topic's table is not one of ours.
        OutputRefused: the columns are not those of the table, or a value would change in it.
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
    """Make a topic's table."""
    described = ", ".join(f"{quote(column.name)} {column.declared}" for column in incoming)
    connection.execute(f"CREATE TABLE {quote(topic)} ({described})")


def delete_rows(connection: sqlite3.Connection, topic: str, rows: Rows) -> int:
    """Take an output's rows out of a topic's table; how many there were."""
    if not is_ours(connection, topic):
        return 0
    chosen = _chosen(connection, topic)
    return connection.execute(f"DELETE FROM {quote(topic)} {chosen}", rows._asdict()).rowcount  # noqa: S608


def retract_rows(connection: sqlite3.Connection, topic: str, rows: Rows) -> int:
    """Move an output's rows to where nobody looks for them; how many there were."""
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
    """Move an output's rows back; how many there were.

    Raises:
        SinkConflict: the topic's table is gone, or lacks a column that the rows have.
    """
    kept = RETRACTED + topic
    if not is_ours(connection, kept):
        return 0
    there = {fold(name) for name in declared(connection, topic)}
    if lost := [name for name in declared(connection, kept) if fold(name) not in there]:
        raise SinkConflict(
            f"table {topic!r} has no column {lost[0]!r}, which rows retracted from it have",
            f"put that column back; the rows wait in the table {kept!r}",
        )
    return _move(connection, kept, topic, declared(connection, kept), rows)


def forget_rows(connection: sqlite3.Connection, topic: str, rows: Rows) -> int:
    """Delete an output's rows from where `retract` has put them; how many there were."""
    return delete_rows(connection, RETRACTED + topic, rows)


def check_all_ours(connection: sqlite3.Connection, topic: str, promised: dict[int, int]) -> None:
    """Return if a topic's table is not there, or every row of it is accounted for.

    Args:
        promised: job -> how many rows of it there should be.

    Raises:
        SinkConflict: it holds what is not ours.
    """
    if not declared(connection, topic):
        return
    if not is_ours(connection, topic) or count_rows(connection, topic) != promised:
        raise SinkConflict(
            f"table {topic!r} holds rows that are not ours, and the topic's mode is error; it was "
            "left untouched",
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
    """The condition that picks `Rows` in a table, with the index it needs."""
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
    """Create the topic's table, or add the columns it lacks; the columns as the table has them.

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
            f"table {topic!r} is not one of ours; it was left untouched",
            "rename that table, or give the topic another sink",
        )
    for column in incoming:
        if fold(column.name) not in existing:
            connection.execute(
                f"ALTER TABLE {table} ADD COLUMN {quote(column.name)} {column.declared}"
            )
    settles = own_topic(topic, facts_of(staged.metadata.metadata))
    return fitted(connection, topic, staged, incoming, settles)


# What no database of SQLite can hold, found while an output is staged: SQLite itself is asked.
#
# An empty database in memory gets the topic's table, so that a name it reserves, columns it does
# not tell apart or has no room for are refused before anything is decided. Whether a database that
# is there has room for more columns, its own transaction finds.


CELL_BYTES = 1_000_000_000
"""SQLite's limit of a value, and of a row (SQLITE_MAX_LENGTH), as every distribution builds it."""


def check_table(topic: str, schema: Any) -> None:
    """Return if SQLite can have a table of these columns and ours.

    Raises:
        OutputRefused: it cannot; the message names the column where one is to blame.
    """
    ours = [Column(name, pa.null(), pa.null(), "") for name in LINEAGE]
    columns = [*columns_of(schema), *ours]
    with closing(sqlite3.connect(":memory:")) as trial:
        room = trial.getlimit(sqlite3.SQLITE_LIMIT_COLUMN)
        if len(columns) > room:
            raise OutputRefused(
                f"topic {topic!r} has {len(columns) - len(ours)} columns: from column "
                f"{columns[room - len(ours)].name!r} on a table of SQLite, which has {room} with "
                "ours, has no room for them",
                "publish fewer columns, or lists; Parquet has room: casparian topics set",
            )
        try:
            create_table(trial, topic, columns)
        except sqlite3.Error as error:
            raise OutputRefused(
                f"topic {topic!r}: SQLite cannot have such a table: {error}",
                "rename the topic or its columns in the plugin",
            ) from error


def check_values(batch: Any) -> None:
    """Return if SQLite can hold every value of a batch.

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
            "publish it in parts; Parquet has room: casparian topics set",
        )
