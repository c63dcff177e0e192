"""The Sentinel and workers of other processes: leases, repeated messages, jobs taken away."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from casparian_flow import main, protocol
from casparian_flow.config import Settings
from casparian_flow.db import audit
from casparian_flow.db.access import Ledger
from casparian_flow.db.models import Attempt, AuditEntry, ProcessingJob
from casparian_flow.db.states import JobStatus
from casparian_flow.engine import dispatch, sentinel, worker_client
from casparian_flow.engine.dispatch import Dispatcher
from casparian_flow.engine.sentinel import Sentinel
from casparian_flow.errors import CasparianError
from casparian_flow.protocol import Assignment, Conclude, Granted, Outcome, Output, Receipt
from casparian_flow.services import jobs
from tests.engine.wires import Attacked, Peer, attacked
from tests.eventually import PATIENCE, eventually
from tests.factories import add_job

Story = Callable[[Attacked], Awaitable[None]]


def play(settings: Settings, story: Story) -> None:
    async def stage() -> None:
        async with attacked(settings) as target:
            await story(target)

    asyncio.run(stage())


async def joined(target: Attacked, name: str) -> Peer:
    peer = target.peer()
    await peer.send(protocol.Hello(worker=name))
    assert isinstance(await peer.hear(), protocol.Welcome)
    return peer


async def assigned(peer: Peer, free: int = 10) -> list[Assignment]:
    await peer.send(protocol.Ready(free=free))
    message = await peer.hear()
    assert isinstance(message, protocol.Assign)
    return message.jobs


async def granted(peer: Peer) -> list[tuple[int, int]]:
    """What the Sentinel answers to a heartbeat."""
    await peer.send(protocol.Heartbeat(sent=1.0))
    while True:
        message = await peer.hear()
        assert isinstance(message, Granted), "the worker was not known any more"
        if message.sent:
            return message.jobs


def state(ledger: Ledger, job: int) -> tuple[str, int, int]:
    """Status, fence, attempts."""
    columns = (ProcessingJob.status, ProcessingJob.fence, ProcessingJob.attempts)
    query = select(*columns).where(ProcessingJob.id == job)
    status, fence, attempts = ledger.read(lambda c: c.execute(query).one())
    return status, fence, attempts


async def becomes(ledger: Ledger, job: int, wanted: tuple[str, int, int]) -> None:
    await eventually(lambda: state(ledger, job) == wanted)


def staged(job: int, fence: int, stage: Path, sink: Path) -> Receipt:
    stage.write_bytes(b"rows")
    output = Output(
        topic="t", uri="parquet://out", location=f"parquet://{sink}", mode="append",
        output_key="k" * 64, source="s", path=b"f", ordinal=1, content_hash="0" * 64, file_bytes=0,
        plugin="p", plugin_version="1", artifact_hash="", version_id=1, job_id=job,
        stage=str(stage), rows=1, size_bytes=4,
    )  # fmt: skip
    return Receipt(job_id=job, fence=fence, outcome=Outcome.STAGED, outputs=[output])


async def removed(file: Path) -> None:
    await eventually(lambda: not file.exists())


def test_a_silent_worker_loses_its_jobs_and_what_it_says_later_is_refused(
    ledger: Ledger, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentinel, "LEASE_SECONDS", 3.0)  # time to be given jobs
    job, waiting = (add_job(ledger, fence=0, attempts=0) for _ in range(2))

    async def story(target: Attacked) -> None:
        asleep = await joined(target, "asleep")
        assert [each.fence for each in await assigned(asleep)] == [1, 1]
        settings.database.guests_folder.mkdir(parents=True, exist_ok=True)
        (settings.database.guests_folder / f"hand-{job}-1").touch()
        monkeypatch.setattr(sentinel, "LEASE_SECONDS", 0.3)
        await becomes(ledger, job, ("QUEUED", 1, 1))
        await becomes(ledger, waiting, ("QUEUED", 1, 0))
        monkeypatch.setattr(sentinel, "LEASE_SECONDS", 600.0)  # however slow the rest is
        awake = await joined(target, "awake")
        await assigned(awake)
        stage = tmp_path / "stage"
        await asleep.send(protocol.Hello(worker="asleep"))
        await asleep.send(Conclude(receipts=[staged(job, 1, stage, tmp_path)]))
        await removed(stage)
        await awake.send(Conclude(receipts=[Receipt(job_id=job, fence=2, outcome=Outcome.STAGED)]))
        await becomes(ledger, job, ("COMPLETED", 2, 2))

    play(settings, story)
    seen = select(Attempt.outcome).where(Attempt.job_id == job).order_by(Attempt.fence)
    assert ledger.read(lambda c: list(c.execute(seen).scalars())) == ["LOST", "STAGED"]


def test_a_worker_that_wakes_while_its_jobs_are_taken_back_gets_none_that_nobody_holds(
    ledger: Ledger, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentinel, "LEASE_SECONDS", 3.0)  # time to be given a job
    job_ids = {add_job(ledger, fence=0, attempts=0) for _ in range(2)}
    writing, write = threading.Event(), threading.Event()
    real = dispatch.lose

    def lose(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        writing.set()
        assert write.wait(PATIENCE)

    monkeypatch.setattr(dispatch, "lose", lose)

    async def story(target: Attacked) -> None:
        peer = await joined(target, "sleeper")
        assert len(await assigned(peer, free=1)) == 1
        monkeypatch.setattr(sentinel, "LEASE_SECONDS", 0.6)
        await eventually(writing.is_set)
        monkeypatch.setattr(sentinel, "LEASE_SECONDS", 600.0)
        await peer.send(protocol.Ready(free=5))
        assert await granted(peer), "and it was heard"
        write.set()
        message: protocol.AnyMessage = Granted(jobs=[])
        while isinstance(message, Granted):
            await peer.send(protocol.Heartbeat(sent=1.0))
            message = await peer.hear()
        assert isinstance(message, protocol.Unknown)
        while not isinstance(message, protocol.Welcome):
            await peer.send(protocol.Hello(worker="sleeper"))
            message = await peer.hear()
            assert isinstance(message, protocol.Unknown | protocol.Welcome)
        assert {each.job_id for each in await assigned(peer)} == job_ids

    play(settings, story)


def test_a_hello_that_is_said_again_is_answered_again(ledger: Ledger, settings: Settings) -> None:
    job = add_job(ledger, fence=0, attempts=0)

    async def story(target: Attacked) -> None:
        peer = await joined(target, "unheard")
        await assigned(peer)
        await peer.send(protocol.Hello(worker="unheard"))
        assert isinstance(await peer.hear(), protocol.Welcome)
        assert await granted(peer) == [(job, 1)], "it keeps what it has"
        late = Receipt(job_id=job, fence=0, outcome=Outcome.RELEASED)
        await peer.send(Conclude(receipts=[late]))
        assert await granted(peer) == [(job, 1)], "that was of an earlier attempt"

    play(settings, story)


def test_a_worker_that_was_not_heard_says_hello_again(
    ledger: Ledger, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_client, "HEARTBEAT_SECONDS", 0.1)
    real, lost = Sentinel._send, asyncio.Event()

    async def send(self: Sentinel, identity: bytes, message: protocol.AnyMessage) -> None:
        if isinstance(message, protocol.Welcome) and not lost.is_set():
            lost.set()
        else:
            await real(self, identity, message)

    monkeypatch.setattr(Sentinel, "_send", send)

    async def story() -> None:
        async with main.running(settings, "test", workers=1, watch=False) as daemon:
            await eventually(
                lambda: [peer.free for peer in daemon.sentinel._peers.values() if peer.free]
            )

    asyncio.run(story())
    assert lost.is_set()


@pytest.mark.slow
def test_nobody_is_lost_while_the_sentinel_itself_does_not_listen(
    ledger: Ledger, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentinel, "LEASE_SECONDS", 3.0)  # longer than a busy machine's pauses
    job = add_job(ledger, fence=0, attempts=0)

    async def story(target: Attacked) -> None:
        peer = await joined(target, "patient")
        await assigned(peer)
        assert await granted(peer) == [(job, 1)]
        time.sleep(3.5)  # the loop of the Sentinel, which is ours
        assert await granted(peer) == [(job, 1)]

    play(settings, story)
    assert state(ledger, job) == ("QUEUED", 1, 0), "it left in peace at the end"


def test_a_worker_that_is_back_by_another_connection_keeps_its_jobs(
    ledger: Ledger, settings: Settings
) -> None:
    job = add_job(ledger, fence=0, attempts=0)

    async def story(target: Attacked) -> None:
        peer = await joined(target, "roamer")
        await assigned(peer)
        peer.socket.close()
        again = await joined(target, "roamer")
        assert await granted(again) == [(job, 1)]
        await again.send(Conclude(receipts=[Receipt(job_id=job, fence=1, outcome=Outcome.STAGED)]))
        await becomes(ledger, job, ("COMPLETED", 1, 1))

    play(settings, story)


def test_a_repeated_receipt_counts_once_and_spares_the_files_of_the_first(
    ledger: Ledger, settings: Settings, tmp_path: Path
) -> None:
    """The sink is out of order, so that what was decided is not published yet."""
    job, other = (add_job(ledger, fence=0, attempts=0) for _ in range(2))
    sink = tmp_path / "sink"
    sink.write_text("a file where the folder should be")
    stage = tmp_path / "stage"

    async def story(target: Attacked) -> None:
        peer = await joined(target, "twice")
        await assigned(peer)
        first = staged(job, 1, stage, sink)
        await peer.send(Conclude(receipts=[first, first]))
        await becomes(ledger, job, ("COMMITTING", 1, 1))
        await peer.send(Conclude(receipts=[first]))
        ended = Receipt(job_id=other, fence=1, outcome=Outcome.FAILED, retryable=False, error="no")
        await peer.send(Conclude(receipts=[ended, ended]), Conclude(receipts=[ended]))
        await becomes(ledger, other, ("FAILED", 1, 1))

    play(settings, story)
    assert stage.exists(), "it is still to be published"
    attempts = select(Attempt.outcome).order_by(Attempt.job_id)
    assert ledger.read(lambda c: list(c.execute(attempts).scalars())) == ["STAGED", "FAILED"]


def test_an_aborted_job_is_taken_from_its_worker_and_its_result_refused(
    ledger: Ledger, settings: Settings, tmp_path: Path
) -> None:
    job, kept = (add_job(ledger, fence=0, attempts=0) for _ in range(2))

    async def story(target: Attacked) -> None:
        peer = await joined(target, "busy")
        await assigned(peer)
        assert await asyncio.to_thread(jobs.abort, ledger, [job]) == 1
        assert await peer.hear() == Granted(jobs=[(kept, 1)])
        stage = tmp_path / "stage"
        await peer.send(Conclude(receipts=[staged(job, 1, stage, tmp_path)]))
        await removed(stage)
        assert await granted(peer) == [(kept, 1)]

    play(settings, story)
    assert state(ledger, job) == ("ABORTED", 1, 1)
    ended = select(Attempt.outcome).where(Attempt.job_id == job)
    assert ledger.read(lambda c: list(c.execute(ended).scalars())) == ["ABORTED"]
    entry = select(AuditEntry.actor, AuditEntry.subject).where(AuditEntry.action == "abort")
    actor, subject = ledger.read(lambda c: c.execute(entry).one())
    assert subject == f"job {job}"
    assert actor
    assert ledger.read(lambda c: list(audit.problems(c))) == []


def test_a_decided_job_is_not_aborted(ledger: Ledger, settings: Settings) -> None:
    decided, queued = add_job(ledger, JobStatus.COMMITTING), add_job(ledger)
    with pytest.raises(CasparianError, match="is COMMITTING"):
        jobs.abort(ledger, [decided, queued])
    assert state(ledger, decided)[0] == JobStatus.COMMITTING
    assert state(ledger, queued)[0] == JobStatus.ABORTED


class Claim:
    """A claim that has found jobs and cannot commit before it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._under_way, self.commit = threading.Event(), threading.Event()
        real = Dispatcher.claim

        def claim(*arguments: Any, **options: Any) -> list[Assignment]:
            found = real(*arguments, **options)
            if found:
                self._under_way.set()
                assert self.commit.wait(PATIENCE)
            return found

        monkeypatch.setattr(Dispatcher, "claim", claim)

    async def under_way(self) -> None:
        assert await asyncio.to_thread(self._under_way.wait, PATIENCE)


def test_what_is_claimed_for_a_worker_while_it_leaves_goes_back(
    ledger: Ledger, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = add_job(ledger, fence=0, attempts=0)
    claim = Claim(monkeypatch)
    lose = Sentinel._lose

    async def leaves(*arguments: Any, **options: Any) -> None:
        heard.set()
        await lose(*arguments, **options)

    async def story(target: Attacked) -> None:
        peer = await joined(target, "hasty")
        await peer.send(protocol.Ready(free=1))
        await claim.under_way()
        monkeypatch.setattr(Sentinel, "_lose", leaves)
        await peer.send(protocol.Goodbye())
        async with asyncio.timeout(PATIENCE):
            await heard.wait()
        claim.commit.set()
        await eventually(lambda: target.sentinel.workers == 1)
        assert state(ledger, job) == ("QUEUED", 1, 0)

    heard = asyncio.Event()
    play(settings, story)


def test_what_is_claimed_while_the_sentinel_ends_is_assigned_and_then_given_back(
    ledger: Ledger, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = add_job(ledger, fence=0, attempts=0)
    claim = Claim(monkeypatch)

    async def story(target: Attacked) -> None:
        peer = await joined(target, "busy")
        await peer.send(protocol.Ready(free=1))
        await claim.under_way()
        async with asyncio.TaskGroup() as group:
            group.create_task(target.sentinel.drain(PATIENCE))
            await asyncio.sleep(0)  # it has begun
            claim.commit.set()
            heard = [type(await peer.hear()) for _ in range(2)]
            for leaving in (target.good, peer):
                await leaving.send(protocol.Goodbye())
        assert heard == [protocol.Assign, protocol.Drain]
        assert target.sentinel.workers == 0
        assert state(ledger, job) == ("QUEUED", 1, 0)

    play(settings, story)
