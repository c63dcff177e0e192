"""The types that columns of SQLite tables have today, where the table itself cannot say it.

SQLite keeps what a column was declared as. A column that was null everywhere is declared without a
type, and gets one with the first values; an INTEGER column that meets a REAL holds both, since in
SQLite each value has a type of its own. `_cf_columns` has what such columns are now: a row is made
with the first column that needs one, and counts while the column is declared as it was then.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from casparian_flow.engine.sinks.base import otherwise
from casparian_flow.engine.sinks.columns import Column, fit, fold
from casparian_flow.engine.sinks.topic_schema import EXACT_IN_DOUBLE
from casparian_flow.errors import OutputRefused

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


def types(connection: sqlite3.Connection, topic: str) -> dict[str, str]:
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
    kinds = {fold(name): kind for name, kind in types(connection, topic).items()}
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
        _note(connection, topic, column.name, column.declared)


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
    _note(connection, topic, column.name, "REAL")


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


def _note(connection: sqlite3.Connection, topic: str, name: str, kind: str) -> None:
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
