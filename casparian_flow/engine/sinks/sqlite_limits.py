"""What no database of SQLite can hold, found while an output is staged: SQLite itself is asked.

An empty database in memory gets the topic's table, so that a name it reserves, columns it does not
tell apart or has no room for are refused before anything is decided. Whether a database that is
there has room for more columns, its own transaction finds.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from casparian_flow.engine.sinks import sqlite_tables as tables
from casparian_flow.engine.sinks.base import LINEAGE
from casparian_flow.engine.sinks.columns import Column, columns_of, is_binary, is_text
from casparian_flow.errors import OutputRefused

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
            tables.create(trial, topic, columns)
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
