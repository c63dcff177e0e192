"""Source roots, and what the last scan of each found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, select
from sqlalchemy.dialects.sqlite import insert

from casparian_flow.db.models import ScanState, SourceRoot


def active_roots(connection: Connection) -> Sequence[Any]:
    """Every active source root: id, path, name, ignore, settle_seconds."""
    columns = SourceRoot.__table__.columns
    return connection.execute(
        select(*columns).where(SourceRoot.active).order_by(SourceRoot.id)
    ).all()


def scan_state(connection: Connection, root_id: int) -> Any:
    """The root's ScanState row; None before its first scan."""
    columns = ScanState.__table__.columns
    return connection.execute(select(*columns).where(ScanState.source_root_id == root_id)).first()


def save_scan_state(connection: Connection, root_id: int, **values: Any) -> None:
    """Change columns of the root's ScanState, creating it."""
    fresh = {
        "started": 0.0, "finished": 0.0, "files": 0, "unreadable": 0, "unsettled": 0,
        "problem": "", "routed": "",
    }  # fmt: skip
    connection.execute(
        insert(ScanState)
        .values(source_root_id=root_id, **{**fresh, **values})
        .on_conflict_do_update(index_elements=["source_root_id"], set_=values)
    )
