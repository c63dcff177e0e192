"""The hash-chained audit: what people did and what was committed (see `db.seals`)."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, insert, select

from casparian_flow.db import seals
from casparian_flow.db.access import driver
from casparian_flow.db.models import AuditEntry
from casparian_flow.db.seals import GENESIS, Event, Head, holds, link

__all__ = ["GENESIS", "Event", "Head", "append", "head", "lost", "problems"]


def head(connection: Connection) -> Head:
    """The last row; 0 and `GENESIS` where there is none."""
    query = select(AuditEntry.seq, AuditEntry.hash).order_by(AuditEntry.seq.desc()).limit(1)
    last = connection.execute(query).first()
    return Head(*last) if last else Head(0, GENESIS)


def append(connection: Connection, actor: str, events: Iterable[Event]) -> None:
    """Add rows in the caller's transaction, which must be a writing one."""
    rows = link(head(connection), actor, events)
    if rows:
        connection.execute(insert(AuditEntry), rows)


def lost(connection: Connection, noted: Head) -> Iterable[str]:
    """A sentence if a head that was noted earlier is not in the chain any more."""
    query = select(AuditEntry.hash).where(AuditEntry.seq == noted.seq)
    found = connection.execute(query).scalar() or (GENESIS if noted.seq == 0 else None)
    if found is None:
        yield f"audit: row {noted.seq}, whose hash was noted, is missing: the end was cut off"
    elif found != noted.hash:
        yield f"audit: row {noted.seq} has another hash than was noted: it was written anew"


def problems(connection: Connection) -> Iterable[str]:
    """One sentence for each break in the chain."""
    expected, previous = 1, GENESIS
    query = "SELECT seq, at, actor, action, subject, detail, previous, hash FROM cf_audit"
    with seals.exact(driver(connection)):
        for found in connection.exec_driver_sql(f"{query} ORDER BY seq").mappings():
            row = dict(found)
            is_next = row["seq"] == expected
            if not is_next:
                yield f"audit: row {expected} is missing"
            if not holds(row) or (is_next and row["previous"] != previous):
                yield f"audit: row {row['seq']} was altered"
            expected, previous = row["seq"] + 1, row["hash"]
