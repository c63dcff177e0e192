"""The audit's chain, without the database: each row's hash covers the row and the hash before it.

Altering or removing any row breaks the chain from there on (the construction of a linked
timestamp, Haber and Stornetta 1991).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, NamedTuple

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


def link(head: Head, actor: str, events: Iterable[Event]) -> list[dict[str, Any]]:
    """The rows that come after a head, one for each event, by column."""
    seq, previous = head
    at = datetime.now(UTC).replace(tzinfo=None).isoformat()
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
    return rows


def holds(row: dict[str, Any]) -> bool:
    """Whether a row is what its hash says."""
    rest = {name: value for name, value in row.items() if name != "hash"}
    try:
        return bool(row["hash"] == _hash(rest))
    except TypeError:  # SQLite keeps bytes in a column of text, if somebody writes them
        return False


def _hash(row: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()
