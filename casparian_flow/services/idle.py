"""Waiting until the daemon has scanned everything and is idle."""

from __future__ import annotations

import os
import time
from typing import Any

from casparian_flow import durable
from casparian_flow.config import Settings
from casparian_flow.db import views
from casparian_flow.db.access import Connection, Ledger
from casparian_flow.db.states import PAUSED
from casparian_flow.db.views import Waiting
from casparian_flow.engine import control
from casparian_flow.errors import DaemonGone, SourceError, counted
from casparian_flow.protocol import Ring
from casparian_flow.services import outputs

POLL_SECONDS = 0.05


def wait_until_idle(
    settings: Settings, ledger: Ledger, timeout_seconds: float | None = None
) -> None:
    """Return when a full scan of every active root, begun after this call, has finished, every
    file in it had settled, no job is QUEUED, RUNNING or COMMITTING, and each sink that can be told
    shows what they gave.

    Args:
        timeout_seconds: how long at the most; None waits for ever.

    Raises:
        DaemonGone: no daemon runs, it ended meanwhile, or the time is up.
        SourceError: a source root is frozen, so that no scan of it will finish.
    """
    deadline = time.monotonic() + timeout_seconds if timeout_seconds is not None else None
    wanted = rung = _ring(settings)
    while True:
        roots, jobs = ledger.read(_look)
        behind = [root for root in roots if root.started < wanted or root.unsettled]
        if not behind and not jobs.unfinished:
            outputs.tell(ledger)  # a job in several stores is shown after it is COMPLETED
            return
        if deadline is not None and time.monotonic() > deadline:
            raise DaemonGone(
                f"not idle after {timeout_seconds:g} s: {_why(behind, jobs)}", "casparian status"
            )
        _refuse_frozen(behind)
        if durable.daemon_lock_holder(settings.database.daemon_lock) is None:
            raise DaemonGone(
                f"the daemon ended before all was done: {_why(behind, jobs)}", "casparian start"
            )
        if any(_due(root, rung) for root in behind):
            rung = _ring(settings)
        time.sleep(POLL_SECONDS)


def _look(connection: Connection) -> tuple[list[Any], Waiting]:
    """Scans and jobs in one snapshot, since a finished scan has already queued its jobs."""
    return list(views.scans(connection)), views.waiting(connection, PAUSED)


def _ring(settings: Settings) -> float:
    """Ask for a full scan; returns the time, seconds since the epoch."""
    now = time.time()
    if control.ask(settings.database, Ring(scan=True)) is None:
        raise DaemonGone("no daemon is running", "casparian start")
    return now


def _due(root: Any, rung: float) -> bool:
    """Whether a scan after the last request found unsettled files that may have settled."""
    return bool(
        root.started >= rung
        and root.unsettled
        and time.time() >= root.finished + root.settle_seconds
    )


def _refuse_frozen(roots: list[Any]) -> None:
    for root in roots:
        if root.problem and not _is_there(root.path):
            raise SourceError(root.problem, "mount or restore it, or: casparian source remove")


def _is_there(path: str) -> bool:
    try:
        with os.scandir(path) as entries:
            return next(entries, None) is not None
    except OSError:
        return False


def _why(behind: list[Any], jobs: Waiting) -> str:
    scans = [
        f"source root {root.name} is still being scanned, or files in it are still being written"
        for root in behind
    ]
    states = ("queued", "running", "committing")
    work = [f"{counted(n, 'job')} {state}" for state in states if (n := getattr(jobs, state))]
    return "; ".join([*scans, *work, *filter(None, [jobs.reason])])
