"""The Committer in a daemon, when a sink, a disk or the ledger is not as it should be."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from casparian_flow.config import Settings
from casparian_flow.db import debts, jobs, outputs, plugins
from casparian_flow.db.access import Connection, Ledger
from casparian_flow.engine import committer, sinks
from casparian_flow.engine.committer import Committer
from casparian_flow.engine.sinks.base import KEY_DIGITS
from casparian_flow.errors import LedgerError
from casparian_flow.protocol import Conclude, Outcome, Receipt
from casparian_flow.services import jobs as job_verbs
from tests.disks import in_memory, remount
from tests.engine.test_leases import assigned, becomes, joined, play, staged, state
from tests.engine.wires import Attacked
from tests.eventually import PATIENCE, eventually
from tests.factories import add_job


def test_a_paused_sink_is_tried_again_though_nothing_is_owed_to_it_any_more(
    ledger: Ledger, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its only output is of a job that another sink refuses."""
    monkeypatch.setattr(committer, "PAUSE_SECONDS", 0.1)
    job = add_job(ledger, fence=0, attempts=0)
    blocked, taken = tmp_path / "blocked", tmp_path / "taken"
    blocked.write_text("a file where the folder should be")
    foreign = taken / "u" / f"{'j' * KEY_DIGITS}.parquet"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"foreign")
    owes = staged(job, 1, tmp_path / "one", blocked)
    (refused,) = staged(job, 1, tmp_path / "two", taken).outputs
    refused = msgspec.structs.replace(refused, topic="u", output_key="j" * 64)
    both = msgspec.structs.replace(owes, outputs=[*owes.outputs, refused])

    async def story(target: Attacked) -> None:
        peer = await joined(target, "w")
        await assigned(peer)
        await peer.send(Conclude(receipts=[both]))
        await becomes(ledger, job, ("FAILED", 1, 1))
        await eventually(lambda: not target.sentinel._committer.paused)

    play(settings, story)


@pytest.mark.slow
def test_a_late_receipt_whose_file_cannot_be_removed_does_no_harm(
    ledger: Ledger, settings: Settings, tmp_path: Path
) -> None:
    job, other = (add_job(ledger, fence=0, attempts=0) for _ in range(2))
    with in_memory(tmp_path / "disk", "1m") as disk:

        async def story(target: Attacked) -> None:
            peer = await joined(target, "w")
            await assigned(peer)
            late = staged(job, 1, disk / "stage", disk)
            job_verbs.abort(ledger, [job])
            remount(disk, "ro")
            await peer.send(Conclude(receipts=[late]))
            done = Receipt(job_id=other, fence=1, outcome=Outcome.STAGED)
            await peer.send(Conclude(receipts=[done]))
            await becomes(ledger, other, ("COMPLETED", 1, 1))

        play(settings, story)


def test_a_read_that_fails_is_tried_again(
    ledger: Ledger, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committer, "PAUSE_SECONDS", 0.01)
    job = add_job(ledger, fence=0, attempts=0)
    real, failures = outputs.all_published, iter(["unable to open database file"])

    def all_published(connection: Connection) -> list[int]:
        if words := next(failures, ""):
            raise LedgerError(f"the ledger could not be read: {words}")
        return real(connection)

    monkeypatch.setattr(outputs, "all_published", all_published)

    async def story(target: Attacked) -> None:
        peer = await joined(target, "w")
        await assigned(peer)
        await peer.send(Conclude(receipts=[Receipt(job_id=job, fence=1, outcome=Outcome.STAGED)]))
        await becomes(ledger, job, ("COMPLETED", 1, 1))

    play(settings, story)
    assert next(failures, None) is None, "it was asked and refused"


def test_a_clean_stop_sees_through_what_is_being_decided(
    ledger: Ledger, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = add_job(ledger, fence=0, attempts=0)
    deciding, decide = threading.Event(), threading.Event()
    real = Committer._decide

    def slowly(self: Committer, *arguments: Any) -> Any:
        deciding.set()
        assert decide.wait(PATIENCE)
        return real(self, *arguments)

    monkeypatch.setattr(Committer, "_decide", slowly)
    told = Committer.leave

    def leave(self: Committer) -> None:
        told(self)
        decide.set()

    monkeypatch.setattr(Committer, "leave", leave)

    async def story(target: Attacked) -> None:
        peer = await joined(target, "w")
        await assigned(peer)
        await peer.send(Conclude(receipts=[Receipt(job_id=job, fence=1, outcome=Outcome.STAGED)]))
        await eventually(deciding.is_set)

    play(settings, story)
    assert state(ledger, job) == ("COMPLETED", 1, 1)


def test_what_a_job_has_published_before_leaves_no_staged_file(
    ledger: Ledger, settings: Settings, tmp_path: Path
) -> None:
    """One of its outputs is gone from its sink, so it runs again and stages them all."""
    job = add_job(ledger, fence=0, attempts=0)
    epoch = ledger.write(plugins.begin_epoch)
    ours = Committer(ledger, epoch, settings.jobs, lambda: None)
    unwanted = []
    for fence in (1, 2):
        ledger.write(lambda c: jobs.claim(c, "w", epoch, 1))
        receipt = staged(job, fence, tmp_path / f"stage-{fence}", tmp_path / "sink")
        decide = partial(ours._decide, group=[committer._WorkerReceipt("w", receipt)])
        unwanted.append(ledger.write(decide))
        for part in ledger.read(lambda c: debts.publications(c, sinks.store, ())):
            done = dict(zip(part.output_ids, part.publication.outputs, strict=True))
            ledger.write(partial(outputs.mark_published, done=done))
        ledger.write(lambda c: jobs.complete(c, [job]))
        ledger.write(lambda c: jobs.restore(c, [job]))
    assert [[Path(each).name for each in left] for left in unwanted] == [[], ["stage-2"]]
