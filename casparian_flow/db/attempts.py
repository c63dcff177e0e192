"""The history of attempts: one row each, written when it ended, never changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Connection, func, select

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


def faults(connection: Connection, job_id: int, fault: str, after: int) -> int:
    """Attempts of the job under a later fence than that which ended with that class of error."""
    query = select(func.count()).where(
        Attempt.job_id == job_id, Attempt.fault == fault, Attempt.fence > after
    )
    return connection.execute(query).scalar_one()
