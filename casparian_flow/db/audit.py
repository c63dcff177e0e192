"""The hash-chained audit: what people did and what was committed (see `db.seals`)."""

from __future__ import annotations

import getpass
import os
from collections.abc import Iterable

from casparian_flow.db import seals
from casparian_flow.db.connection import Connection, execute, execute_many
from casparian_flow.db.seals import GENESIS, Event, Head, holds, link
from casparian_flow.errors import CasparianError

__all__ = ["GENESIS", "Event", "Head", "actor", "append", "check_text", "head", "lost", "problems"]

TEXT_LIMIT = 200
"""Characters of an owner's name or of a reason."""


def actor() -> str:
    """This process's user, as the audit names them."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return f"uid {os.getuid()}"


def check_text(what: str, text: str) -> None:
    """Return if a text of a person can be kept for ever and shown to anybody.

    Args:
        what: what it is, for the message.

    Raises:
        CasparianError: it is empty or too long, or would move a terminal's cursor.
    """
    if not text.strip() or not text.isprintable() or len(text) > TEXT_LIMIT:
        raise CasparianError(
            f"{text[:80]!r} is not a valid {what}", f"use 1 to {TEXT_LIMIT} printable characters"
        )


def head(connection: Connection) -> Head:
    """The last row; 0 and `GENESIS` where there is none."""
    last = connection.execute("SELECT seq, hash FROM cf_audit ORDER BY seq DESC LIMIT 1").first()
    return Head(*last) if last else Head(0, GENESIS)


def append(connection: Connection, actor: str, events: Iterable[Event]) -> None:
    """Add rows in the caller's transaction, which must be a writing one.

    What a person does is not appended here but by `Ledger.change`.

    Args:
        actor: who did it, where an event does not name them.
    """
    execute_many(
        connection,
        "INSERT INTO cf_audit (seq, at, actor, action, subject, detail, previous, hash) "
        "VALUES (:seq, :at, :actor, :action, :subject, :detail, :previous, :hash)",
        link(head(connection), actor, events),
    )


def lost(connection: Connection, noted: Head) -> Iterable[str]:
    """A sentence if a head that was noted earlier is not in the chain any more."""
    query = "SELECT hash FROM cf_audit WHERE seq = :seq"
    found = execute(connection, query, seq=noted.seq).scalar() or (
        GENESIS if noted.seq == 0 else None
    )
    if found is None:
        yield f"audit row {noted.seq}, the given head, is missing: the end of the audit was cut off"
    elif found != noted.hash:
        yield f"audit row {noted.seq} has another hash than the given head: the audit was rewritten"


def problems(connection: Connection) -> Iterable[str]:
    """One sentence for each break in the chain."""
    expected, previous = 1, GENESIS
    query = "SELECT seq, at, actor, action, subject, detail, previous, hash FROM cf_audit"
    with seals.exact(connection.driver):
        for found in connection.exec_driver_sql(f"{query} ORDER BY seq").mappings():
            row = dict(found)
            is_next = row["seq"] == expected
            if not is_next:
                yield f"audit row {expected} is missing"
            if not holds(row) or (is_next and row["previous"] != previous):
                yield f"audit row {row['seq']} was changed"
            expected, previous = row["seq"] + 1, row["hash"]
