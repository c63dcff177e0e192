"""What no database of SQLite can hold, found while an output is staged: SQLite itself is asked.

An empty database in memory gets the topic's table, so that a name it reserves, columns it does not
tell apart or has no room for are refused before anything is decided. Whether a database that is
there has room for more columns, its own transaction finds.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from casparian_flow.engine.sinks import sqlite_tables as tables
from casparian_flow.engine.sinks.base import LINEAGE, Lineage
from casparian_flow.engine.sinks.columns import Column, columns_of
from casparian_flow.engine.sinks.stage import Stage
from casparian_flow.errors import OutputRefused
from casparian_flow.protocol import OutputPlan

CELL_BYTES = 1_000_000_000
"""SQLite's limit of a value, and of a row (SQLITE_MAX_LENGTH), as every distribution builds it."""


class SqliteStage(Stage):
    """A stage for SQLite; see `Stage`, and `Sink.open_stage` for what it raises."""

    def __init__(self, folder: Path, plan: OutputPlan, lineage: Lineage, attempt: str) -> None:
        super().__init__(
            folder, plan, lineage, attempt, admit=lambda schema: check_table(plan.topic, schema)
        )
        self._topic = plan.topic

    def write(self, batch: Any) -> None:
        """See `Stage.write`."""
        check_cells(self._topic, batch)
        super().write(batch)


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


def check_cells(topic: str, batch: Any) -> None:
    """Return if no text and no bytes of a batch are longer than SQLite's longest.

    Raises:
        OutputRefused: some are; the message names their column.
    """
    if batch.nbytes <= CELL_BYTES:
        return
    for field, column in zip(batch.schema, batch.columns, strict=True):
        if _is_text(field.type) or _is_binary(field.type):
            long = column.cast(pa.large_string() if _is_text(field.type) else pa.large_binary())
            longest = pc.max(pc.binary_length(long)).as_py() or 0
            if longest > CELL_BYTES:
                raise OutputRefused(
                    f"topic {topic!r}: column {field.name!r} ({field.type}) has a value of "
                    f"{longest} bytes; SQLite's longest has {CELL_BYTES}",
                    "publish it in parts; Parquet has room: casparian topics set",
                )


def _is_text(kind: Any) -> bool:
    types = pa.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_binary(kind: Any) -> bool:
    types = pa.types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))
