"""The history of attempts: one row each, written when it ended, never changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, select

from casparian_flow.db.access import execute_many
from casparian_flow.db.models import Attempt, utcnow


class Ended(NamedTuple):
    """How an attempt ended, as it goes into the ledger; `db.evidence.Attempt` has the meanings."""

    job_id: int
    fence: int
    worker: str
    outcome: str
    error: str
    log: str = ""
    seconds: float = 0.0
    sandbox: str = ""
    fault: str = ""
    signal: str = ""
    exit_code: int | None = None
    batches: int = 0
    rows: int = 0
    max_rss_bytes: int = 0
    cpu_seconds: float = 0.0


def add_attempts(connection: Connection, epoch: int, ended: Sequence[Ended]) -> None:
    """Keep how attempts of an epoch ended."""
    now = utcnow().isoformat(" ")
    execute_many(
        connection,
        """
        INSERT INTO cf_attempt
            (epoch, ended_at, job_id, fence, worker, outcome, error, log, seconds, sandbox,
             fault, signal, exit_code, batches, rows, max_rss_bytes, cpu_seconds)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
        """,
        [(epoch, now, *end) for end in ended],
    )


def counted(connection: Connection, job_id: int, number: int) -> list[Any]:
    """The last attempts of the job that count against its budget: outcome, fault, error.

    Args:
        number: how many; those that were released or aborted are not among them.
    """
    query = (
        select(Attempt.outcome, Attempt.fault, Attempt.error)
        .where(Attempt.job_id == job_id, Attempt.outcome.in_(["FAILED", "LOST"]))
        .order_by(Attempt.fence.desc())
        .limit(number)
    )
    return list(connection.execute(query))
