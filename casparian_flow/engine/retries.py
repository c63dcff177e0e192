"""Which jobs are tried again, and when; and what becomes of those whose Worker or daemon is gone.

    the attempt failed    again after a pause, while attempts are left and the error may pass: one
                          that has come twice the same (`_repeats`) is not tried a third time
    its Worker is gone    what it had in hand counts an attempt; what only waited there does not
    the daemon is gone    the same, and it counts as a crash of the job: after two, the job runs
                          alone (`jobs.claim`); after the third it is FAILED as poison. But what a
                          Worker that lives on has in hand does not count

Where nothing is known to have been in hand (a power cut, or a moment between two jobs), every
attempt counts: a job that takes the whole machine with it must come to its end too.
"""

from __future__ import annotations

import itertools
import os
import random
import re
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import audit, jobs, plugins
from casparian_flow.db.attempts import Ended, add_attempts, counted
from casparian_flow.engine import in_hand
from casparian_flow.errors import GuestDied, JobError, OutOfMemory, PluginFailed
from casparian_flow.protocol import Pair, Receipt
from casparian_flow.sections import JobSettings

PAUSE_LIMIT_SECONDS = 900.0
"""The longest pause before a job is tried again."""

POISON_AFTER = jobs.ALONE_AFTER + 1
"""Deaths of the daemon with a job in hand after which it is not tried again."""

_DETERMINISTIC = {each.__name__ for each in (PluginFailed, GuestDied, JobError)}
"""Kinds of error that come of the plugin and the bytes, where the words are the same. Not among
them: what ran out of time, was killed from elsewhere, or lacked an environment, since the next
attempt may find a machine that is less busy, or an index that answers."""

_VARYING = re.compile(r"\b0x[0-9a-fA-F]+\b|(?<=/)tmp\w{8}\b")
"""What differs between two errors that are the same: addresses, and names of scratch folders."""

_RECOVERY = "recovery"


def pause(limits: JobSettings, attempts: int) -> float:
    """Seconds before the next attempt: exponential, with full jitter, so that jobs that failed
    together do not come back together (M. Brooker, Exponential Backoff And Jitter, 2015).

    Args:
        attempts: how many the job has had, the one that failed among them.
    """
    longest = limits.retry_seconds * 4.0 ** min(max(attempts - 1, 0), 16)
    return random.uniform(0.0, min(longest, PAUSE_LIMIT_SECONDS))  # noqa: S311  no secret


def after_failure(connection: Connection, end: Receipt, limits: JobSettings, actor: str) -> bool:
    """Give a failed attempt its consequence; False when the job was another's by now."""
    attempts = jobs.attempts(connection, end.job_id)
    # Those before this one, since a person last gave the job a fresh budget.
    earlier = counted(connection, end.job_id, max(attempts - 1, 0))
    vain = any(_repeats(end, each.fault, each.error) for each in earlier)
    if end.retryable and attempts < limits.max_attempts and not vain:
        delay = pause(limits, attempts)
        return jobs.requeue(
            connection, end.job_id, end.fence, reason=end.error, delay_seconds=delay
        )
    return _fail(connection, end.job_id, end.fence, end.error, actor)


def _repeats(end: Receipt, fault: str, error: str) -> bool:
    """Whether an attempt failed as an earlier one did, for a reason that does not pass.

    Args:
        fault, error: of the earlier one.
    """
    if fault != end.evidence.fault:
        return False
    if fault == OutOfMemory.__name__:  # how much it had by then differs each time
        return True
    return fault in _DETERMINISTIC and _VARYING.sub("", error) == _VARYING.sub("", end.error)


def begin(connection: Connection, limits: JobSettings, guests_folder: Path) -> int:
    """Start an epoch, which is returned. What an older one left RUNNING is dead: we hold the
    daemon lock."""
    epoch = plugins.begin_epoch(connection)
    _take_back(
        connection, jobs.held(connection, epoch), in_hand.read(guests_folder), limits,
        "the daemon ended", daemon=True,
    )  # fmt: skip
    return epoch


def lose(
    connection: Connection, pairs: Iterable[Pair], hands: Set[Pair], limits: JobSettings, why: str
) -> None:
    """Take their jobs from a Worker that is gone, for all that is known.

    Args:
        hands: the attempts that are in somebody's hand.
        why: which Worker, and what it did not do.
    """
    _take_back(connection, jobs.granted(connection, pairs), hands, limits, why, daemon=False)


def release(connection: Connection, pairs: Iterable[Pair], why: str) -> None:
    """Take their jobs from a Worker that leaves; their attempts do not count."""
    for job in jobs.granted(connection, pairs):
        _give_back(connection, job, why)


def _take_back(
    connection: Connection, rows: Sequence[Any], hands: Set[Pair], limits: JobSettings,
    why: str, *, daemon: bool,
) -> None:  # fmt: skip
    for _, group in itertools.groupby(rows, lambda job: job.worker):
        crew = list(group)
        suspects = {(job.id, job.fence) for job in crew} & hands
        for job in crew:
            if daemon and _lives(job.worker):
                _give_back(connection, job, f"{why}, and its worker lives")
                continue
            suspected = (job.id, job.fence) in suspects
            if suspects and not suspected:
                _give_back(connection, job, f"{why} before it began")
            else:
                _count(connection, job, limits, f"{why} while it ran", daemon and suspected)
            crashpoint("retries.job_taken_back")


def _lives(worker: str) -> bool:
    """Whether a Worker of a process of its own, on this machine, is there still: then its job
    had no part in the daemon's end. Another process with its number is taken for it."""
    host, _, number = worker.rpartition("-")
    if host != os.uname().nodename or not number.isdecimal():
        return False
    try:
        os.kill(int(number), 0)
    except (OSError, OverflowError):
        return False
    return True


def _give_back(connection: Connection, job: Any, why: str) -> None:
    ended = Ended(job.id, job.fence, job.worker, "RELEASED", why)
    add_attempts(connection, job.epoch, [ended])
    jobs.requeue(connection, job.id, job.fence, reason="", refund=True)


def _count(connection: Connection, job: Any, limits: JobSettings, why: str, crashed: bool) -> None:
    reason = f"{why} ({job.attempts} of {limits.max_attempts} attempts)"
    crashes = job.crashes + crashed
    poison = crashed and crashes >= POISON_AFTER
    if poison:
        reason = f"POISON: {why}, {crashes} times, the last time alone; it is not tried again"
    elif crashes >= jobs.ALONE_AFTER:
        reason += f"; it did so {crashes} times, so the job will run alone"
    ended = Ended(job.id, job.fence, job.worker, "LOST", reason)
    add_attempts(connection, job.epoch, [ended])
    if poison or job.attempts >= limits.max_attempts:
        _fail(connection, job.id, job.fence, reason, _RECOVERY)
    else:
        delay = pause(limits, job.attempts) if crashed else 0.0
        jobs.requeue(
            connection, job.id, job.fence, reason=reason, delay_seconds=delay, crashed=crashed
        )


def _fail(connection: Connection, job_id: int, fence: int, reason: str, actor: str) -> bool:
    moved = jobs.fail(connection, job_id, fence, reason)
    if moved:
        audit.append(connection, actor, [audit.Event("fail", f"job {job_id}", {"reason": reason})])
    return moved
