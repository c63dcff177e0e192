"""The ledger in a SQLite sink, `_cf_outputs`: a row for each output that was published there."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from typing import Any

from casparian_flow.engine.sinks.base import Found, found
from casparian_flow.engine.sinks.sqlite_columns import declared
from casparian_flow.engine.sinks.sqlite_tables import Rows
from casparian_flow.errors import SinkConflict

_LEDGER = """
CREATE TABLE IF NOT EXISTS _cf_outputs (
    output_key TEXT PRIMARY KEY, topic TEXT NOT NULL, job_id INTEGER NOT NULL,
    file_version_id INTEGER NOT NULL, rows INTEGER NOT NULL, digest TEXT NOT NULL,
    published_at TEXT NOT NULL
)"""

_LATER = {
    "facts": "TEXT NOT NULL DEFAULT ''",
    "slot": "TEXT NOT NULL DEFAULT ''",
    "ordinal": "INTEGER NOT NULL DEFAULT 0",
    "mode": "TEXT NOT NULL DEFAULT 'append'",
    "state": "TEXT NOT NULL DEFAULT 'shown'",
}
"""Columns that later releases gave the ledger, with what they say of an output from before."""


def make(connection: sqlite3.Connection) -> None:
    """Have the ledger in this transaction, in today's form."""
    connection.execute(_LEDGER)
    for name in _LATER.keys() - declared(connection, "_cf_outputs").keys():
        connection.execute(f"ALTER TABLE _cf_outputs ADD COLUMN {name} {_LATER[name]}")
    connection.execute("CREATE INDEX IF NOT EXISTS _cf_slots ON _cf_outputs (slot)")


def found_as(row: dict[str, Any], target: str) -> Found:
    """A row of the ledger, in whatever form, as an inventory gives it."""
    columns = {name: str(value) for name, value in row.items()}
    facts = {**columns, **json.loads(columns.get("facts") or "{}")}
    retracted = row.get("state") == "retracted"
    return found(target, row["rows"], row["digest"], facts, retracted=retracted)


def record(connection: sqlite3.Connection, output_key: str) -> dict[str, Any] | None:
    """The ledger's row of an output."""
    row = connection.execute(
        "SELECT * FROM _cf_outputs WHERE output_key = ?", [output_key]
    ).fetchone()
    return dict(row) if row else None


def rows_of(record: dict[str, Any]) -> Rows:
    facts = json.loads(record["facts"] or "{}")
    return Rows(
        record["job_id"], record["file_version_id"], facts.get("source_hash", ""),
        facts.get("plugin_version", ""), record["rows"],
    )  # fmt: skip


def is_late(connection: sqlite3.Connection, place: dict[str, Any]) -> bool:
    """Whether a greater output has the slot."""
    greater = connection.execute(
        "SELECT 1 FROM _cf_outputs WHERE slot = :slot AND mode = 'replace' "
        "AND (ordinal, job_id) > (:ordinal, :job_id)",
        place,
    )
    return greater.fetchone() is not None


def shown(connection: sqlite3.Connection, topic: str) -> dict[int, int]:
    """How many rows of each job the ledger promises in a topic's table."""
    promised = connection.execute(
        "SELECT job_id, SUM(rows) AS n FROM _cf_outputs "
        "WHERE topic = ? AND state = 'shown' GROUP BY 1 HAVING n > 0",
        [topic],
    )
    return dict(map(tuple, promised))


def move(
    connection: sqlite3.Connection,
    record: dict[str, Any],
    state: str,
    take: Callable[[sqlite3.Connection, str, Rows], int],
) -> None:
    """Take an output's rows to where they belong from now on, and write it down.

    Raises:
        SinkConflict: they are not those that were published.
    """
    moved = take(connection, record["topic"], rows_of(record))
    if moved != record["rows"]:
        raise SinkConflict(
            f"{record['topic']!r} has {moved} rows of job {record['job_id']}, where "
            f"{record['rows']} were published; nothing was changed",
            f"casparian outputs restore {record['job_id']}",
        )
    connection.execute(
        "UPDATE _cf_outputs SET state = ? WHERE output_key = ?", [state, record["output_key"]]
    )
