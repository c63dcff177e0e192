"""The Committer: turns receipts into published outputs and completed jobs.

It decides a group of receipts in one transaction, publishes their outputs, and completes their jobs
in another transaction. Nothing else publishes to sinks. After a crash it continues with the next
step: decisions are in the ledger, and publishing is idempotent.

    decide     RUNNING -> COMMITTING with the planned outputs, guarded by the fence
    publish    give each store the outputs of each job, with the state that readers see of them, and
               the states of the outputs whose place they take
    complete   outputs PUBLISHED, what stands decided anew, job COMPLETED, audit; and rebuilds of
               which every job has ended well are ended (`db.rebuild`)
    tell       tell the sinks what they do not know yet of that, and of what other commands decided

Outputs of a job that writes to several stores are published hidden, and shown when every store has
taken its own. So if one store refuses, nothing of the job shows: what the others have is deleted.
From publish to tell the Committer holds the lock of `engine.telling`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from casparian_flow import durable
from casparian_flow.config import JobSettings, OutputSettings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import audit, debts, jobs, outputs, rebuild, versions, visibility
from casparian_flow.db.access import Connection, Ledger, Work
from casparian_flow.db.debts import Part
from casparian_flow.db.states import PAUSED, utcnow
from casparian_flow.engine import dispatch, sinks, telling
from casparian_flow.errors import (
    CasparianError,
    JobError,
    LedgerError,
    LedgerLost,
    SinkUnavailable,
    Unavailable,
)
from casparian_flow.protocol import Outcome, Output, Pair, Publication, Receipt

log = logging.getLogger(__name__)

T = TypeVar("T")

GROUP_LIMIT = 256
"""Receipts decided in one transaction at most."""

PAUSE_SECONDS = 5.0
"""Pause before an unavailable sink is tried again."""

IDLE_SECONDS = 60.0
"""An idle Committer looks this often for what sinks are to be told, and for replaced outputs that
are to be removed."""

ACTOR = "committer"


class _WorkerReceipt(NamedTuple):
    worker: str
    receipt: Receipt


class _Results(NamedTuple):
    """What came of one round of publishing."""

    published: dict[int, Output]
    """The outputs of jobs of which every store has taken its own, by id."""
    changed: dict[int, Output]
    """Outputs whose states changed with them, by id."""
    refused: dict[int, tuple[Part, JobError]]
    """Job id -> what a store will never take of it, and why."""


class Committer:
    """Decides, publishes and completes, one group after another.

    Args:
        ledger: the ledger.
        epoch: number of this run of the daemon.
        limits: limit of attempts, and delays between them.
        on_change: called when jobs may have become claimable or finished.
        keep_days: how long replaced outputs stay in their sinks (`[output] keep_replaced_days`).
    """

    def __init__(
        self,
        ledger: Ledger,
        epoch: int,
        limits: JobSettings,
        on_change: Callable[[], None],
        keep_days: float = OutputSettings().keep_replaced_days,
    ) -> None:
        self._ledger = ledger
        self._epoch = epoch
        self._limits = limits
        self._on_change = on_change
        self._receipts: asyncio.Queue[_WorkerReceipt | None] = asyncio.Queue()
        self._paused_until: dict[str, float] = {}
        self._taken: dict[tuple[int, str], list[Output]] = {}
        """(job id, store) -> its outputs there, while other stores have not taken theirs."""
        self._stuck: set[int] = set()
        """Outputs that a sink cannot be told of: it is not asked again before a restart."""
        self._keep = timedelta(days=keep_days)
        self._leaving = False

    @property
    def paused(self) -> frozenset[str]:
        """Paused stores (`sinks.store`)."""
        return frozenset(self._paused_until)

    def accept(self, worker: str, receipt: Receipt) -> None:
        """Queue a receipt; it is decided with the next group."""
        self._receipts.put_nowait(_WorkerReceipt(worker, receipt))

    def look(self) -> None:
        """Look soon at what others decided: sinks may have to be told of it."""
        self._receipts.put_nowait(None)

    async def run(self) -> None:
        """Serve until `leave`. First finishes what an earlier run decided but did not publish."""
        # A user may have edited the tables of topics and plugins, which no verb then followed.
        if await self._read(lambda c: any(visibility.differences(c))):
            await self._write(visibility.refresh)
        await self._settle()
        while not self._leaving:
            await self._serve(await self._next_group())

    def leave(self) -> None:
        """Have `run` return after its current group; cancelling it would drop the group."""
        self._leaving = True
        self.look()

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
            await asyncio.to_thread(_remove, fenced)
        await self._settle()
        self._on_change()

    async def _next_group(self) -> list[_WorkerReceipt]:
        """Wait for a receipt, a paused sink's next try or the next look at what others decided;
        return all queued receipts."""
        group: list[_WorkerReceipt | None] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PAUSE_SECONDS if self._paused_until else IDLE_SECONDS):
                group.append(await self._receipts.get())
        while len(group) < GROUP_LIMIT and not self._receipts.empty():
            group.append(self._receipts.get_nowait())
        return [ended for ended in group if ended]

    def _decide(self, connection: Connection, group: Sequence[_WorkerReceipt]) -> list[str]:
        """Move the job of each receipt; returns the staged files that will not be published."""
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
        named = {output.stage for end in ended for output in end.outputs if output.stage}
        return sorted(named - needed)

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
        """Publish and complete what is decided, and tell the sinks the rest, except paused ones."""
        now = time.monotonic()
        # Also sinks without pending outputs: no job is claimed for a sink while it is paused.
        self._paused_until = {
            store: until for store, until in self._paused_until.items() if until > now
        }
        async with self._telling():
            parts = await self._read(
                lambda c: debts.publications(c, sinks.store, self._paused_until)
            )
            await self._complete(await self._publish_all(parts))
            await self._tell()

    @contextlib.asynccontextmanager
    async def _telling(self) -> AsyncIterator[None]:
        """Hold the lock of `engine.telling`; the event loop does not wait for it."""
        with contextlib.ExitStack() as stack:
            held = telling.lock(self._ledger.database)
            await asyncio.to_thread(stack.enter_context, held)
            yield

    async def _publish_all(self, parts: Sequence[Part]) -> _Results:
        """Publish what is due, store by store."""
        changed: dict[int, Output] = {}
        refused: dict[int, tuple[Part, JobError]] = {}
        by_store: dict[str, list[Part]] = defaultdict(list)
        for part in parts:
            if (
                part.store not in self._paused_until
                and (part.job_id, part.store) not in self._taken
            ):
                by_store[part.store].append(part)
        for store, asked in by_store.items():
            group = [part for part in asked if part.job_id not in refused]
            outcomes = await asyncio.to_thread(self._publish, [p.publication for p in group])
            crashpoint("committer.published")
            waiting = []
            for part, outcome in zip(group, outcomes, strict=True):
                if isinstance(outcome, list):
                    self._taken[part.job_id, store] = outcome
                    changed |= zip(part.change_ids, part.publication.changes, strict=True)
                elif isinstance(outcome, Unavailable):
                    waiting.append((part.job_id, outcome))
                else:
                    refused[part.job_id] = part, outcome
            if waiting:
                await self._pause(store, waiting[0][1], [job_id for job_id, _ in waiting])
        lacking = {p.job_id for p in parts if (p.job_id, p.store) not in self._taken}
        published = {
            number: output
            for part in parts
            if part.job_id not in lacking and part.job_id not in refused
            for number, output in zip(
                part.output_ids, self._taken[part.job_id, part.store], strict=True
            )
        }
        return _Results(published, changed, refused)

    def _publish(self, group: list[Publication]) -> list[list[Output] | JobError]:
        """Publish to one store; an error in the place of a job that failed."""
        if not group:
            return []
        location = group[0].outputs[0].location
        try:
            return sinks.open_sink(location, self._ledger.database).publish(group)
        except Exception as error:
            # A bug in one sink must not end the daemon, nor lose a decided output.
            log.exception("sink %s failed unexpectedly", location)
            return [SinkUnavailable(f"{type(error).__name__}: {error}")] * len(group)

    async def _complete(self, results: _Results) -> None:
        stages: list[str] = []

        def work(connection: Connection) -> None:
            outputs.mark_published(connection, results.published)
            told = {number: (str(o.state), o.mode) for number, o in results.changed.items()}
            debts.told(connection, told)
            stages.extend(outputs.mark_refused(connection, list(results.refused)))
            crashpoint("committer.outputs_marked")
            events = []
            overtaken = jobs.overtaken(connection, results.refused.keys())
            for job_id, (part, error) in results.refused.items():
                jobs.refuse(connection, job_id, error.message)
                topics = sorted({output.topic for output in part.publication.outputs})
                detail = {"reason": error.message, "topic": ", ".join(topics)}
                events.append(audit.Event("refuse", f"job {job_id}", detail))
            jobs.retry(connection, overtaken)
            finished = jobs.complete(connection, outputs.all_published(connection))
            visibility.refresh(connection, visibility.of_jobs(connection, finished))
            events += [
                audit.Event("commit", f"job {job_id}", {"outputs": given})
                for job_id, given in outputs.given(connection, finished).items()
            ]
            events += rebuild.end(connection, [*finished, *results.refused])
            audit.append(connection, ACTOR, events)
            crashpoint("committer.completion_written")

        finishable = await self._read(lambda c: outputs.all_published(c) or rebuild.is_over(c))
        if results.published or results.refused or finishable:
            await self._write(work)
            crashpoint("committer.completed")
        ended = {output.job_id for output in results.published.values()} | results.refused.keys()
        left = {key: self._taken.pop(key) for key in list(self._taken) if key[0] in ended}
        unwanted = [outs for (job_id, _), outs in left.items() if job_id in results.refused]
        await asyncio.to_thread(self._delete, unwanted)
        await asyncio.to_thread(_remove, stages)

    def _delete(self, unwanted: Sequence[list[Output]]) -> None:
        """Delete what stores have of refused jobs. What cannot be deleted is hidden, and no list
        has it."""
        for group in unwanted:
            location = group[0].location
            try:
                sinks.open_sink(location, self._ledger.database).delete(group)
            except Exception as error:  # noqa: BLE001 - as in `_publish`
                log.warning("sink %s keeps hidden rows of job %d: %s", location, group[0].job_id,
                            error)  # fmt: skip

    async def _tell(self) -> None:
        """Tell the sinks their debts, after replaced outputs that are due were removed."""
        before = utcnow() - self._keep
        if await self._read(lambda c: visibility.has_expired(c, before)):
            await self._write(lambda c: visibility.remove_expired(c, before))
            crashpoint("committer.expired")
        try:
            done = await asyncio.to_thread(
                telling.tell, self._ledger, self._paused_until, self._stuck
            )
        except LedgerLost:
            raise
        except LedgerError as error:
            log.error("%s", error.message)  # they are told in the next round
            return
        for conflict in done.conflicts.values():
            log.warning("%s", conflict.message)
        self._stuck |= done.conflicts.keys()
        for store, fault in done.away.items():
            await self._pause(store, fault, [])

    async def _pause(self, store: str, error: CasparianError, job_ids: list[int]) -> None:
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
