"""The hash-chained audit: what people did and what was committed.

Each row's hash covers the row and the hash before it, so that altering or removing any row
breaks the chain from there on (the construction of a linked timestamp, Haber and Stornetta 1991).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from sqlalchemy import Connection, insert, select

from casparian_flow.db.models import AuditEntry, utcnow

GENESIS = "0" * 64
"""What the first row has as the hash before it."""


class Event(NamedTuple):
    """Something worth keeping for ever."""

    action: str
    """A verb: publish, commit, fail, add-source, ..."""
    subject: str
    """To what: `job 7`, `plugin sales 1.0.0`."""
    detail: dict[str, Any]


class Head(NamedTuple):
    """The end of the chain at some moment: who has noted it can prove what was before."""

    seq: int
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"


def head(connection: Connection) -> Head:
    """The last row; 0 and `GENESIS` where there is none."""
    query = select(AuditEntry.seq, AuditEntry.hash).order_by(AuditEntry.seq.desc()).limit(1)
    last = connection.execute(query).first()
    return Head(*last) if last else Head(0, GENESIS)


def append(connection: Connection, actor: str, events: Iterable[Event]) -> None:
    """Add rows in the caller's transaction, which must be a writing one."""
    seq, previous = head(connection)
    at = utcnow().isoformat()
    rows = []
    for event in events:
        seq += 1
        row = {
            "seq": seq,
            "at": at,
            "actor": actor,
            "action": event.action,
            "subject": event.subject,
            "detail": json.dumps(event.detail, sort_keys=True),
            "previous": previous,
        }
        previous = row["hash"] = _hash(row)
        rows.append(row)
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
    columns = AuditEntry.__table__.columns
    for found in connection.execute(select(*columns).order_by(AuditEntry.seq)).mappings():
        row = dict(found)
        claimed = row.pop("hash")
        is_next = row["seq"] == expected
        if not is_next:
            yield f"audit: row {expected} is missing"
        if claimed != _hash(row) or (is_next and row["previous"] != previous):
            yield f"audit: row {row['seq']} was altered"
        expected, previous = row["seq"] + 1, claimed


def _hash(row: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()
