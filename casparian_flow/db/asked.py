"""Which sinks were asked for outputs that the ledger does not know.

A sink is asked at each start of a daemon, before scans, and when a topic first goes there. Where
that fails, what it has is unknown, and jobs that would write there wait until it was asked. But a
ledger that asked it once, and has been there ever since, knows all of it: everything that was
published since, it has published itself. Whether it has been there ever since:

    another ledger, or none    a new ledger has asked no sink
    a backup                   `casparian backup` leaves the copy without its answers
    another copy               a file beside the ledger has the number of its last epoch, which is
                               greater than that of the copy
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from casparian_flow.db.access import Connection, execute, execute_many
from casparian_flow.db.states import utcnow


def configured(connection: Connection) -> set[str]:
    """The sinks that topics go to, as they are written."""
    return set(connection.execute("SELECT uri FROM cf_topic_config").scalars())


def used(connection: Connection) -> list[str]:
    """The locations of the sinks that have outputs."""
    query = "SELECT DISTINCT location FROM cf_output ORDER BY location"
    return list(connection.execute(query).scalars())


def known(connection: Connection) -> set[str]:
    """The locations of sinks whose outputs the ledger knows."""
    query = "SELECT location FROM cf_asked_sink WHERE asked_at IS NOT NULL"
    return set(connection.execute(query).scalars())


def unknown(connection: Connection) -> dict[str, str]:
    """The locations of sinks that could not be asked yet -> why."""
    query = "SELECT location, problem FROM cf_asked_sink WHERE asked_at IS NULL"
    return {row.location: row.problem for row in connection.execute(query)}


def note(
    connection: Connection, answered: Collection[str], failed: Mapping[str, str], *, doubt: bool
) -> None:
    """Record which sinks have answered, and why others have not.

    Args:
        doubt: what those have that did not answer is unknown, though it was known before.
    """
    now = utcnow().isoformat(" ")
    save = (
        "INSERT INTO cf_asked_sink (location, asked_at, problem) VALUES (?, ?, ?) "
        "ON CONFLICT (location) DO UPDATE SET problem = excluded.problem, asked_at = "
    )
    execute_many(connection, f"{save} excluded.asked_at", [(one, now, "") for one in answered])
    kept = "NULL" if doubt else "asked_at"
    failures = [(location, None, why) for location, why in failed.items()]
    execute_many(connection, f"{save} {kept}", failures)


class Mark(NamedTuple):
    """A ledger, as the file beside it has it."""

    ledger_id: str
    epoch: int


def mark(connection: Connection) -> Mark:
    """The ledger's id, and the number of its last epoch."""
    ledger_id = connection.execute("SELECT id FROM cf_ledger_identity").scalar() or ""
    return Mark(ledger_id, connection.execute("SELECT max(id) FROM cf_epoch").scalar() or 0)


def is_doubtful(connection: Connection, beside: Mark | None) -> bool:
    """Whether the ledger may be older than its sinks.

    Args:
        beside: what the file beside the ledger says; None where there is none.
    """
    if connection.execute("SELECT 1 FROM cf_asked_sink LIMIT 1").first() is None:
        return True
    ours = mark(connection)
    return beside is None or beside.ledger_id != ours.ledger_id or beside.epoch > ours.epoch


def doubt(connection: Connection) -> None:
    """Forget that sinks were asked, and what they were told."""
    execute(
        connection,
        """
        INSERT INTO cf_asked_sink (location, asked_at, problem)
        SELECT DISTINCT location, NULL, '' FROM cf_output WHERE state = 'PUBLISHED'
        ON CONFLICT (location) DO NOTHING
        """,
    )
    execute(connection, "UPDATE cf_asked_sink SET asked_at = NULL")
    execute(connection, "UPDATE cf_visibility SET told = '' WHERE state <> 'removed'")
