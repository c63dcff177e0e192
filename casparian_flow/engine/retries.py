"""Which jobs are tried again, and when; and what becomes of those whose Worker or daemon is gone.

    the attempt failed    again after a pause, while attempts are left and the error may pass: one
                          that has come twice the same (`_repeats`) is not tried a third time
    its Worker is gone    what it had in hand counts an attempt; what only waited there does not
    the daemon is gone    no attempt counts: it has many ends, and most have nothing to do with
                          what it was doing. But what it had in hand is suspected, unless a Worker
                          that lives on has it: after two ends the job runs alone (`jobs.claim`),
                          and after more of them, all alone, it is FAILED as poison

How many more depends on the trace that the daemon left (`engine.endings`). After a crash, a kill
for want of memory or the machine's own end, the third is the last. Without a trace anybody may have
killed it: one who does so a dozen times while a job runs makes no poison of it.

Where the machine itself has ended, what was in hand is not known: then all that ran is suspected.
"""

from __future__ import annotations

import itertools
import os
import random
import re
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import audit, jobs, plugins
from casparian_flow.db.attempts import Ended, add_attempts, counted
from casparian_flow.engine import in_hand
from casparian_flow.engine.endings import Ending
from casparian_flow.errors import GuestDied, JobError, OutOfMemory, PluginFailed
from casparian_flow.protocol import Pair, Receipt
from casparian_flow.sections import JobSettings

PAUSE_LIMIT_SECONDS = 900.0
"""The longest pause before a job is tried again."""

POISON_AFTER = jobs.ALONE_AFTER + 1
"""Deaths of the daemon with a job in hand after which it is not tried again, the last with a trace
of why."""

POISON_AFTER_KILLS = 14
"""The same, where the last left none."""

SUSPECT_PAUSES = 3
"""Deaths of the daemon up to which the pause before a suspected job's next run grows."""

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


def begin(connection: Connection, limits: JobSettings, ending: Ending, guests_folder: Path) -> int:
    """Start an epoch, which is returned. What an older one left RUNNING is dead: we hold the
    daemon lock.

    Args:
        ending: how that one ended.
    """
    epoch = plugins.begin_epoch(connection)
    hands = in_hand.read(guests_folder)
    for job in jobs.held(connection, epoch):
        if _lives(job.worker):
            _give_back(connection, job, "the daemon ended, and its worker lives")
        elif ending.machine or (job.id, job.fence) in hands:
            _suspect(connection, job, limits, ending)
        else:
            _give_back(connection, job, "the daemon ended before it began")
        crashpoint("retries.job_taken_back")
    return epoch


def lose(
    connection: Connection, pairs: Iterable[Pair], hands: Set[Pair], limits: JobSettings, why: str
) -> None:
    """Take their jobs from a Worker that is gone, for all that is known.

    Args:
        hands: the attempts that are in somebody's hand.
        why: which Worker, and what it did not do.
    """
    for _, group in itertools.groupby(jobs.granted(connection, pairs), lambda job: job.worker):
        crew = list(group)
        suspects = {(job.id, job.fence) for job in crew} & hands
        for job in crew:
            if suspects and (job.id, job.fence) not in suspects:
                _give_back(connection, job, f"{why} before it began")
            else:
                _count(connection, job, limits, f"{why} while it ran")
            crashpoint("retries.lost_job_taken_back")


def release(connection: Connection, pairs: Iterable[Pair], why: str) -> None:
    """Take their jobs from a Worker that leaves; their attempts do not count."""
    for job in jobs.granted(connection, pairs):
        _give_back(connection, job, why)


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


def _count(connection: Connection, job: Any, limits: JobSettings, why: str) -> None:
    """An attempt that its Worker did not live to end: it may have been the cause."""
    reason = f"{why} ({job.attempts} of {limits.max_attempts} attempts)"
    add_attempts(connection, job.epoch, [Ended(job.id, job.fence, job.worker, "LOST", reason)])
    if job.attempts >= limits.max_attempts:
        _fail(connection, job.id, job.fence, reason, _RECOVERY)
    else:
        jobs.requeue(connection, job.id, job.fence, reason=reason)


def _suspect(connection: Connection, job: Any, limits: JobSettings, ending: Ending) -> None:
    """A job that was in hand when the daemon ended; no attempt of it counts for that."""
    deaths = job.crashes + 1
    reason = f"the daemon ended while it ran, {deaths} times"
    poison = deaths >= (POISON_AFTER if ending.traced else POISON_AFTER_KILLS)
    if poison:
        reason = f"POISON: {reason}, the last time alone; it is not tried again"
    elif deaths >= jobs.ALONE_AFTER:
        reason += "; it will run alone"
    add_attempts(connection, job.epoch, [Ended(job.id, job.fence, job.worker, "LOST", reason)])
    if poison:
        _fail(connection, job.id, job.fence, reason, _RECOVERY)
        return
    # Not sooner each time: what comes after it has its turn, should it be the cause.
    delay = pause(limits, min(deaths, SUSPECT_PAUSES))
    jobs.requeue(
        connection, job.id, job.fence, reason=reason, delay_seconds=delay, refund=True, crashed=True
    )


def _fail(connection: Connection, job_id: int, fence: int, reason: str, actor: str) -> bool:
    moved = jobs.fail(connection, job_id, fence, reason)
    if moved:
        audit.append(connection, actor, [audit.Event("fail", f"job {job_id}", {"reason": reason})])
    return moved
