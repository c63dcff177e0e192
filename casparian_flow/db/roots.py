"""Source roots, and what the last scan of each found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, select, update
from sqlalchemy.dialects.sqlite import insert

from casparian_flow.db.models import ScanState, SourceRoot


def active_roots(connection: Connection) -> Sequence[Any]:
    """The row of every active source root."""
    columns = SourceRoot.__table__.columns
    return connection.execute(
        select(*columns).where(SourceRoot.active).order_by(SourceRoot.id)
    ).all()


def active_paths(connection: Connection) -> list[str]:
    """The directory of every active source root."""
    return list(connection.execute(select(SourceRoot.path).where(SourceRoot.active)).scalars())


def scan_state(connection: Connection, root_id: int) -> Any:
    """The root's ScanState row; None before its first scan."""
    columns = ScanState.__table__.columns
    return connection.execute(select(*columns).where(ScanState.source_root_id == root_id)).first()


def save_scan_state(connection: Connection, root_id: int, **values: Any) -> None:
    """Change columns of the root's ScanState, creating it."""
    fresh = {
        "started": 0.0, "finished": 0.0, "files": 0, "unreadable": 0, "unsettled": 0,
        "problem": "", "routed": "", "waiting": 0, "held": 0, "held_since": 0.0, "watch": "",
        "missed": 0, "scrub_after": 0, "scrubbed": 0.0, "hidden": 0,
    }  # fmt: skip
    connection.execute(
        insert(ScanState)
        .values(source_root_id=root_id, **{**fresh, **values})
        .on_conflict_do_update(index_elements=["source_root_id"], set_=values)
    )


def count_up(connection: Connection, root_id: int, **counts: int) -> None:
    """Add to counters of the root's ScanState: `missed`, `hidden`."""
    columns = ScanState.__table__.columns
    connection.execute(
        update(ScanState)
        .where(ScanState.source_root_id == root_id)
        .values({name: columns[name] + count for name, count in counts.items()})
    )
