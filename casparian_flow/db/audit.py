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


def append(connection: Connection, actor: str, events: Iterable[Event]) -> None:
    """Add rows in the caller's transaction, which must be a writing one."""
    last = connection.execute(
        select(AuditEntry.seq, AuditEntry.hash).order_by(AuditEntry.seq.desc()).limit(1)
    ).first()
    seq, previous = (last.seq, last.hash) if last else (0, GENESIS)
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


def problems(connection: Connection) -> Iterable[str]:
    """One sentence for each break in the chain."""
    expected, previous = 1, GENESIS
    columns = AuditEntry.__table__.columns
    for found in connection.execute(select(*columns).order_by(AuditEntry.seq)).mappings():
        row = dict(found)
        claimed = row.pop("hash")
        if row["seq"] != expected:
            yield f"audit: row {expected} is missing"
        elif row["previous"] != previous or claimed != _hash(row):
            yield f"audit: row {row['seq']} was altered"
        expected, previous = row["seq"] + 1, claimed


def _hash(row: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()
