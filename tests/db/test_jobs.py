"""The life of a job: each verb moves what it may, and nothing else moves."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable

import pytest
from sqlalchemy import select, text

from casparian_flow.db import jobs
from casparian_flow.db.access import Connection, Ledger
from casparian_flow.db.models import ProcessingJob
from casparian_flow.db.routing import JobRequest
from casparian_flow.db.states import JobStatus, utcnow
from tests.factories import add_job


def version_of(connection: Connection, job: int) -> int:
    query = select(ProcessingJob.file_version_id).where(ProcessingJob.id == job)
    return connection.execute(query).scalar_one()


VERBS: dict[str, tuple[Callable[[Connection, int], object], set[JobStatus], JobStatus]] = {
    "claim": (
        lambda c, job: jobs.claim(c, "w2", 1, 10),
        {JobStatus.QUEUED},
        JobStatus.RUNNING,
    ),
    "decide": (
        lambda c, job: jobs.decide(c, [(job, 1)]),
        {JobStatus.RUNNING},
        JobStatus.COMMITTING,
    ),
    "complete": (
        lambda c, job: jobs.complete(c, [job]),
        {JobStatus.COMMITTING},
        JobStatus.COMPLETED,
    ),
    "refuse": (lambda c, job: jobs.refuse(c, job, "no"), {JobStatus.COMMITTING}, JobStatus.FAILED),
    "requeue": (
        lambda c, job: jobs.requeue(c, job, 1, reason="again"),
        {JobStatus.RUNNING},
        JobStatus.QUEUED,
    ),
    "fail": (lambda c, job: jobs.fail(c, job, 1, "no"), {JobStatus.RUNNING}, JobStatus.FAILED),
    "supersede": (
        lambda c, job: jobs.supersede(c, job, 1, "gone"),
        {JobStatus.RUNNING},
        JobStatus.SUPERSEDED,
    ),
    "revive": (
        lambda c, job: jobs.revive(c, [version_of(c, job)]),
        {JobStatus.SUPERSEDED},
        JobStatus.QUEUED,
    ),
    "abort": (
        lambda c, job: jobs.abort(c, [job], "somebody"),
        {JobStatus.QUEUED, JobStatus.RUNNING},
        JobStatus.ABORTED,
    ),
    "retry": (
        lambda c, job: jobs.retry(c, [job]),
        {JobStatus.FAILED, JobStatus.ABORTED},
        JobStatus.QUEUED,
    ),
}


def status(ledger: Ledger, job: int) -> str:
    return ledger.read(
        lambda c: c.execute(
            select(ProcessingJob.status).where(ProcessingJob.id == job)
        ).scalar_one()
    )


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("start", JobStatus)
def test_a_verb_moves_from_its_states_only(ledger: Ledger, verb: str, start: JobStatus) -> None:
    job = add_job(ledger, start)
    act, sources, target = VERBS[verb]
    ledger.write(lambda c: act(c, job))
    assert status(ledger, job) == (target if start in sources else start)


ARROWS = {
    "QUEUED": {"RUNNING", "ABORTED", "SUPERSEDED"},
    "RUNNING": {"COMMITTING", "QUEUED", "FAILED", "ABORTED", "SUPERSEDED"},
    "COMMITTING": {"COMPLETED", "FAILED"},
    "FAILED": {"QUEUED"},
    "ABORTED": {"QUEUED"},
    "COMPLETED": {"QUEUED"},
    "SUPERSEDED": {"QUEUED"},
}


@pytest.mark.parametrize("start", JobStatus)
@pytest.mark.parametrize("end", JobStatus)
def test_the_database_refuses_every_other_arrow(
    ledger: Ledger, start: JobStatus, end: JobStatus
) -> None:
    job = add_job(ledger, start)
    worker = "'w'" if end == JobStatus.RUNNING else "NULL"
    move = text(
        f"UPDATE cf_processing_queue SET status = '{end}', worker = {worker} WHERE id = {job}"
    )
    if start == end or end in ARROWS[start]:
        ledger.write(lambda c: c.execute(move).rowcount)
        assert status(ledger, job) == end
    else:
        with pytest.raises(sqlite3.IntegrityError, match=r"does not move that way|is not complete"):
            ledger.write(lambda c: c.execute(move).rowcount)


def test_a_slow_loser_cannot_touch_the_winners_attempt(ledger: Ledger) -> None:
    job = add_job(ledger, JobStatus.RUNNING)
    ledger.write(lambda c: jobs.requeue(c, job, 1, reason="the worker fell silent"))
    assert ledger.write(lambda c: jobs.claim(c, "other", 1, 1)) == [job]
    for verb in (
        lambda c: jobs.decide(c, [(job, 1)]),
        lambda c: jobs.fail(c, job, 1, "late"),
        lambda c: jobs.supersede(c, job, 1, "late"),
        lambda c: jobs.requeue(c, job, 1, reason="late"),
    ):
        assert not ledger.write(verb)
    assert ledger.write(lambda c: jobs.decide(c, [(job, 2)])) == {(job, 2)}


def test_claims_go_by_priority_then_age_and_wait_for_their_time(ledger: Ledger) -> None:
    low = add_job(ledger, priority=1)
    assert ledger.read(jobs.claimable)
    high = add_job(ledger, priority=9)
    same = add_job(ledger, priority=1)
    add_job(ledger, priority=99, not_before=time.time() + 3600)
    assert ledger.write(lambda c: jobs.claim(c, "w", 1, 1)) == [high]
    assert sorted(ledger.write(lambda c: jobs.claim(c, "w", 1, 10))) == [low, same]
    assert not ledger.read(jobs.claimable)


def test_the_attempt_is_counted_at_the_claim_and_given_back_by_a_refund(ledger: Ledger) -> None:
    job = add_job(ledger)
    ledger.write(lambda c: jobs.claim(c, "w", 1, 1))
    assert ledger.read(lambda c: jobs.attempt_count(c, job)) == 2
    ledger.write(lambda c: jobs.requeue(c, job, 2, reason="disk full", refund=True))
    assert ledger.read(lambda c: jobs.attempt_count(c, job)) == 1


def test_a_version_is_queued_once_for_a_plugin_whatever_its_version(ledger: Ledger) -> None:
    job = add_job(ledger, JobStatus.COMPLETED)
    row = ledger.read(
        lambda c: c.execute(
            select(
                ProcessingJob.file_version_id, ProcessingJob.plugin_id, ProcessingJob.plugin_name
            ).where(ProcessingJob.id == job)
        ).one()
    )  # fmt: skip
    wanted = JobRequest(row.plugin_id, row.plugin_name, 0)
    now = utcnow().isoformat(" ")
    assert ledger.write(lambda c: jobs.enqueue(c, [(row.file_version_id, wanted)], now)) == []


def test_running_and_only_running_jobs_have_a_worker(ledger: Ledger) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="worker"):
        add_job(ledger, JobStatus.QUEUED, worker="w")
