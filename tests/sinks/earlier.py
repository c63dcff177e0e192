"""SQLite sinks as earlier releases left them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from casparian_flow.engine.sinks.base import facts_in, lineage_of
from casparian_flow.protocol import Output
from tests.sinks.stages import Place

_FIRST = """
CREATE TABLE _cf_outputs (
    output_key TEXT PRIMARY KEY, topic TEXT NOT NULL, job_id INTEGER NOT NULL,
    file_version_id INTEGER NOT NULL, rows INTEGER NOT NULL, digest TEXT NOT NULL,
    published_at TEXT NOT NULL
)"""
"""The ledger of the first release."""

_ADDED = {
    "facts": "TEXT NOT NULL DEFAULT ''",
    "slot": "TEXT NOT NULL DEFAULT ''",
    "ordinal": "INTEGER NOT NULL DEFAULT 0",
    "mode": "TEXT NOT NULL DEFAULT 'append'",
    "state": "TEXT NOT NULL DEFAULT 'shown'",
}
"""What the second release added to it."""

_LINEAGE = (
    "_cf_file_version_id INTEGER, _cf_job_id INTEGER, _cf_source_hash TEXT, _cf_plugin_version TEXT"
)


class Earlier:
    """A database that an earlier release writes.

    Args:
        place: where it is.
        is_first: the first release, which knew no modes, no states and no facts.
    """

    def __init__(self, place: Place, *, is_first: bool = False) -> None:
        self.place = place
        self.is_first = is_first
        place.database.parent.mkdir()
        with self._open() as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(_FIRST)
            if not is_first:
                for name, kind in _ADDED.items():
                    connection.execute(f"ALTER TABLE _cf_outputs ADD COLUMN {name} {kind}")
                connection.execute("CREATE INDEX _cf_slots ON _cf_outputs (slot)")

    def topic(self, name: str, columns: str, later: str = "") -> None:
        """Create the table of a topic: columns of its first output, then a later column."""
        with self._open() as connection:
            connection.execute(f'CREATE TABLE "{name}" ({columns}, {_LINEAGE})')
            if later:
                connection.execute(f'ALTER TABLE "{name}" ADD COLUMN {later}')

    def add(self, output: Output, rows: Sequence[Sequence[Any]], state: str = "shown") -> Output:
        """Write an output: `shown`, `replaced` (its rows are deleted) or `retracted`."""
        output = Output(**{**_fields(output), "rows": len(rows), "digest": "d" * 64,
                           "target": f"{self.place.database}:{output.topic}"})  # fmt: skip
        row = {
            "output_key": output.output_key, "topic": output.topic, "job_id": output.job_id,
            "file_version_id": output.version_id, "rows": len(rows), "digest": output.digest,
            "published_at": "2026-01-01T00:00:00+00:00",
        }  # fmt: skip
        if not self.is_first:
            row |= {
                "facts": json.dumps(facts_in(output)), "slot": output.location_slot,
                "ordinal": output.ordinal, "mode": output.mode, "state": state,
            }  # fmt: skip
        with self._open() as connection:
            marks = ", ".join("?" * len(row))
            connection.execute(
                f"INSERT INTO _cf_outputs ({', '.join(row)}) VALUES ({marks})", [*row.values()]
            )
            table = {"shown": output.topic, "retracted": f"_cf_retracted_{output.topic}"}.get(state)
            if table:
                names = self._names(connection, output.topic)
                listed = ", ".join(f'"{name}"' for name in names)
                if state == "retracted":
                    connection.execute(f'CREATE TABLE IF NOT EXISTS "{table}" ({listed})')
                    index = f'"_cf_job_of_{table}" ON "{table}"'
                    connection.execute(f"CREATE INDEX IF NOT EXISTS {index} (_cf_job_id)")
                own = [name for name in names if not name.startswith("_cf_")]
                order = ", ".join([f'"{n}"' for n in own] + [
                    "_cf_file_version_id", "_cf_job_id", "_cf_source_hash", "_cf_plugin_version"])  # fmt: skip  # noqa: E501
                marks = ", ".join("?" * len(names))
                for each in rows:
                    connection.execute(
                        f'INSERT INTO "{table}" ({order}) VALUES ({marks})',
                        [*each, *lineage_of(output)],
                    )
        return output

    def _names(self, connection: sqlite3.Connection, table: str) -> list[str]:
        return [name for (name,) in
                connection.execute("SELECT name FROM pragma_table_info(?)", [table])]  # fmt: skip

    def _open(self) -> Any:
        return closing(sqlite3.connect(self.place.database, isolation_level=None))


def _fields(output: Output) -> dict[str, Any]:
    return {name: getattr(output, name) for name in output.__struct_fields__}
