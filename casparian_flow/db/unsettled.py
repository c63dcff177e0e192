"""Files that scans found being written, and since when: they have no version of what is in them."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from sqlalchemy import Connection, func, select

from casparian_flow.db.access import execute_many
from casparian_flow.db.models import SourceRoot, Unsettled

KEPT = 1000
"""Of one source root, at the most: of a crowd that has just been copied there, most settle soon."""


def known(connection: Connection, root_id: int) -> dict[bytes, float]:
    """Those of a source root, and when each was first seen, seconds since the epoch."""
    query = select(Unsettled.path, Unsettled.first_seen).where(Unsettled.source_root_id == root_id)
    return {row.path: row.first_seen for row in connection.execute(query)}


def change(
    connection: Connection, root_id: int, ended: Collection[bytes], began: Collection[bytes]
) -> None:
    """Forget those that are at rest or gone, and remember since when others are being written."""
    execute_many(
        connection,
        "DELETE FROM cf_unsettled WHERE source_root_id = ? AND path = ?",
        [(root_id, path) for path in ended],
    )
    execute_many(
        connection,
        "INSERT INTO cf_unsettled (source_root_id, path, first_seen) VALUES (?, ?, ?) "
        "ON CONFLICT DO NOTHING",
        [(root_id, path, time.time()) for path in began],
    )


def listed(connection: Connection, limit: int) -> list[dict[str, Any]]:
    """Those of active source roots, the oldest first."""
    columns = (SourceRoot.name, Unsettled.path, Unsettled.first_seen)
    rows = connection.execute(
        select(*columns)
        .join(SourceRoot, SourceRoot.id == Unsettled.source_root_id)
        .where(SourceRoot.active)
        .order_by(Unsettled.first_seen, Unsettled.path)
        .limit(limit)
    )
    now = time.time()
    return [
        {
            "source": name,
            "rel_path": path.decode("utf-8", "backslashreplace"),
            "seconds": max(0.0, now - first_seen),
        }
        for name, path, first_seen in rows
    ]


def count(connection: Connection) -> int:
    """How many there are in active source roots."""
    query = (
        select(func.count())
        .select_from(Unsettled)
        .join(SourceRoot, SourceRoot.id == Unsettled.source_root_id)
        .where(SourceRoot.active)
    )
    return connection.execute(query).scalar_one()
