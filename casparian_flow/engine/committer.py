"""The Committer: turns receipts into published outputs and completed jobs.

It decides a group of receipts in one transaction, publishes their outputs, and completes their jobs
in another transaction. Nothing else publishes to sinks. After a crash it continues with the next
step: decisions are in the ledger, and publishing is idempotent.

    decide     RUNNING -> COMMITTING with the planned outputs, guarded by the fence
    publish    make the staged outputs visible, each once for its output key
    complete   outputs PUBLISHED, job COMPLETED, audit
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec
from sqlalchemy import Connection

from casparian_flow import durable
from casparian_flow.config import JobSettings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import audit, jobs, outputs, versions
from casparian_flow.db.access import Ledger, Work
from casparian_flow.db.models import PAUSED
from casparian_flow.engine import dispatch, sinks
from casparian_flow.errors import JobError, LedgerError, LedgerLost, SinkUnavailable, Unavailable
from casparian_flow.protocol import Outcome, Pair, Published, Receipt, StagedOutput

log = logging.getLogger(__name__)

T = TypeVar("T")

GROUP_LIMIT = 256
"""Receipts decided in one transaction at most."""

PAUSE_SECONDS = 5.0
"""Pause before an unavailable sink is tried again."""

ACTOR = "committer"


class _WorkerReceipt(NamedTuple):
    worker: str
    receipt: Receipt


class _PendingOutput(NamedTuple):
    output_id: int
    job_id: int
    staged: StagedOutput


class Committer:
    """Decides, publishes and completes, one group after another.

    Args:
        ledger: the ledger.
        epoch: number of this run of the daemon.
        limits: limit of attempts, and delays between them.
        on_change: called when jobs may have become claimable or finished.
    """

    def __init__(
        self, ledger: Ledger, epoch: int, limits: JobSettings, on_change: Callable[[], None]
    ) -> None:
        self._ledger = ledger
        self._epoch = epoch
        self._limits = limits
        self._on_change = on_change
        self._receipts: asyncio.Queue[_WorkerReceipt | None] = asyncio.Queue()
        self._paused_until: dict[str, float] = {}
        self._leaving = False

    @property
    def paused(self) -> frozenset[str]:
        """Paused stores (`sinks.store`)."""
        return frozenset(self._paused_until)

    def accept(self, worker: str, receipt: Receipt) -> None:
        """Queue a receipt; it is decided with the next group."""
        self._receipts.put_nowait(_WorkerReceipt(worker, receipt))

    async def run(self) -> None:
        """Serve until `leave`. First finishes what an earlier run decided but did not publish."""
        await self._settle()
        while not self._leaving:
            await self._serve(await self._next_group())

    def leave(self) -> None:
        """Have `run` return after its current group; cancelling it would drop the group."""
        self._leaving = True
        self._receipts.put_nowait(None)

    async def finish(self) -> None:
        """Decide and publish the queued receipts after `run` has returned, for a clean stop.

        Raises:
            LedgerError: the ledger cannot be written. The next start publishes what was decided,
                and runs the other jobs again.
        """
        self._leaving = True
        while not self._receipts.empty():
            await self._serve(await self._next_group())
        await self._settle()

    async def _serve(self, group: Sequence[_WorkerReceipt]) -> None:
        if group:
            fenced = await self._write(lambda c: self._decide(c, group))
            crashpoint("committer.decided")
            await asyncio.to_thread(_remove, [output.stage for output in fenced])
        await self._settle()
        self._on_change()

    async def _next_group(self) -> list[_WorkerReceipt]:
        """Wait for a receipt or for a paused sink's next try; return all queued receipts."""
        group: list[_WorkerReceipt | None] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PAUSE_SECONDS if self._paused_until else None):
                group.append(await self._receipts.get())
        while len(group) < GROUP_LIMIT and not self._receipts.empty():
            group.append(self._receipts.get_nowait())
        return [ended for ended in group if ended]

    def _decide(
        self, connection: Connection, group: Sequence[_WorkerReceipt]
    ) -> list[StagedOutput]:
        """Move the job of each receipt; returns the staged outputs that will not be published."""
        # A message may arrive twice; it counts once.
        first: dict[Pair, _WorkerReceipt] = {}
        for item in group:
            first.setdefault((item.receipt.job_id, item.receipt.fence), item)
        group = list(first.values())
        staged = [end for _, end in group if end.outcome is Outcome.STAGED]
        moved = jobs.decide(connection, [(end.job_id, end.fence) for end in staged])
        decided = [end for end in staged if (end.job_id, end.fence) in moved]
        outputs.plan(connection, [(end.job_id, end.outputs) for end in decided])
        moved |= {
            (end.job_id, end.fence)
            for _, end in group
            if end.outcome is not Outcome.STAGED and self._without_output(connection, end)
        }
        in_time = [end for end in group if (end.receipt.job_id, end.receipt.fence) in moved]
        jobs.add_attempts(connection, self._epoch, [_attempt(*end) for end in in_time])
        crashpoint("committer.decision_written")
        late = [end for _, end in group if (end.job_id, end.fence) not in moved]
        for end in late:
            log.warning(
                "job %d: ignored the result of attempt %d, which came too late",
                end.job_id,
                end.fence,
            )
        # Keep the stages of unpublished outputs: the repeated receipt of a decided attempt names
        # them too. A decided receipt may also name stages whose output was published before.
        ended = [*late, *decided]
        needed = outputs.stages(connection, [end.job_id for end in ended])
        return [output for end in ended for output in end.outputs if output.stage not in needed]

    def _without_output(self, connection: Connection, end: Receipt) -> bool:
        """Move a job whose attempt has no output; False if the attempt lost the job meanwhile."""
        if end.outcome is Outcome.SUPERSEDED:
            moved = jobs.supersede(connection, end.job_id, end.fence, end.error)
            if moved:
                versions.invalidate(connection, end.job_id)
            return moved
        if end.outcome is Outcome.RELEASED:
            return jobs.requeue(
                connection, end.job_id, end.fence,
                reason=f"{PAUSED}{end.error}" if end.error else "",
                delay_seconds=PAUSE_SECONDS if end.error else 0.0, refund=True,
            )  # fmt: skip
        return dispatch.after_failure(connection, end, self._limits, ACTOR)

    async def _settle(self) -> None:
        """Publish and complete all decided outputs, except those of paused sinks."""
        pending = [_PendingOutput(*row) for row in await self._read(outputs.unpublished)]
        now = time.monotonic()
        # Also sinks without pending outputs: no job is claimed for a sink while it is paused.
        self._paused_until = {
            store: until for store, until in self._paused_until.items() if until > now
        }
        by_store: dict[str, list[_PendingOutput]] = defaultdict(list)
        for output in pending:
            store = sinks.store(output.staged.location)
            if store not in self._paused_until:
                by_store[store].append(output)
        done: list[tuple[_PendingOutput, Published]] = []
        refused: list[tuple[_PendingOutput, JobError]] = []
        for store, group in by_store.items():
            outcomes = await asyncio.to_thread(self._publish, [o.staged for o in group])
            crashpoint("committer.published")
            waiting = []
            for output, outcome in zip(group, outcomes, strict=True):
                if isinstance(outcome, Published):
                    done.append((output, outcome))
                elif isinstance(outcome, Unavailable):
                    waiting.append((output.job_id, outcome))
                else:
                    refused.append((output, outcome))
            if waiting:
                await self._pause(store, waiting[0][1], [job_id for job_id, _ in waiting])
        await self._complete(done, refused)

    def _publish(self, staged: list[StagedOutput]) -> list[Published | JobError]:
        """Publish outputs of one store; an error in the place of an output that failed."""
        location = staged[0].location
        try:
            return sinks.open_sink(location, self._ledger.database).publish(staged)
        except Exception as error:
            # A bug in one sink must not end the daemon, nor lose a decided output.
            log.exception("sink %s failed unexpectedly", location)
            return [SinkUnavailable(f"{type(error).__name__}: {error}")] * len(staged)

    async def _complete(
        self,
        done: Sequence[tuple[_PendingOutput, Published]],
        refused: Sequence[tuple[_PendingOutput, JobError]],
    ) -> None:
        # A sink refuses all outputs of a job together; the first has the reason.
        ended = {output.job_id: (output, error) for output, error in reversed(refused)}
        stages: list[str] = []

        def work(connection: Connection) -> None:
            outputs.mark_published(connection, [(o.output_id, seen) for o, seen in done])
            stages.extend(outputs.mark_refused(connection, list(ended)))
            crashpoint("committer.outputs_marked")
            events = []
            for output, error in ended.values():
                jobs.refuse(connection, output.job_id, error.message)
                detail = {"reason": error.message, "topic": output.staged.topic}
                events.append(audit.Event("refuse", f"job {output.job_id}", detail))
            finished = jobs.complete(connection, outputs.decided_without_debts(connection))
            events += [
                audit.Event("commit", f"job {job_id}", {"outputs": targets})
                for job_id, targets in outputs.targets(connection, finished).items()
            ]
            audit.append(connection, ACTOR, events)
            crashpoint("committer.completion_written")

        finishable = await self._read(outputs.decided_without_debts)
        if done or refused or finishable:
            await self._write(work)
            crashpoint("committer.completed")
            await asyncio.to_thread(_remove, stages)

    async def _pause(self, store: str, error: Unavailable, job_ids: list[int]) -> None:
        log.warning("sink %s is paused: %s", store, error.message)
        self._paused_until[store] = time.monotonic() + PAUSE_SECONDS
        reason = f"{PAUSED}{error.message}"
        await self._write(lambda c: jobs.set_reason(c, job_ids, reason))

    async def _read(self, work: Work[T]) -> T:
        return await self._insist(self._ledger.read_soon, work)

    async def _write(self, work: Work[T]) -> T:
        return await self._insist(self._ledger.write_soon, work)

    async def _insist(self, use: Callable[[Work[T]], Awaitable[T]], work: Work[T]) -> T:
        """Retry while the ledger's disk is full, so that finished jobs need not run again."""
        while True:
            try:
                return await use(work)
            except LedgerLost:
                raise
            except LedgerError as error:
                if self._leaving or self._ledger.broken:
                    raise
                log.error("%s (trying again in %g s)", error.message, PAUSE_SECONDS)
                await asyncio.sleep(PAUSE_SECONDS)


def _attempt(worker: str, end: Receipt) -> jobs.AttemptResult:
    return jobs.AttemptResult(
        end.job_id, end.fence, worker, end.outcome.value, end.error, end.log, end.seconds,
        end.sandbox, **msgspec.structs.asdict(end.evidence),
    )  # fmt: skip


def _remove(stages: Sequence[str]) -> None:
    """Remove stages that will not be published; the next start sweeps what cannot be removed."""
    for stage in stages:
        with contextlib.suppress(OSError):
            durable.remove(Path(stage))
