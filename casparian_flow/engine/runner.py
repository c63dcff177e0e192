"""Run assigned jobs: start a guest, run it over a version's bytes, and stage its batches.

Blocking code for one long-lived thread of a Worker. Guests stay warm between jobs, one for each
plugin version; the least recently used is closed first. Several jobs are sealed (made durable)
together, since a disk syncs ten files in little more time than one.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from casparian_flow.config import DatabaseSettings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.durable import make_folder
from casparian_flow.engine import endings, sinks
from casparian_flow.engine.attempt import printable
from casparian_flow.engine.batches import Rejects
from casparian_flow.engine.bridge import MESSAGE_LIMIT, Guest
from casparian_flow.engine.environments import EnvironmentStore, Lease, bundle
from casparian_flow.engine.inbox import StoreFault, is_kept, placed, proved
from casparian_flow.engine.sinks.stage import Stage
from casparian_flow.errors import (
    ArtifactRefused,
    JobError,
    Superseded,
    Unavailable,
)
from casparian_flow.protocol import (
    Artifact,
    Assignment,
    Evidence,
    Outcome,
    Output,
    Receipt,
    Welcome,
)
from casparian_flow.security.sandbox import InPlace
from casparian_flow.trees import clear_away

log = logging.getLogger(__name__)


@dataclass
class _Seat:
    """A warm guest, its folder, and the lease on its environment."""

    guest: Guest
    folder: Path
    lease: Lease

    def keep_byte_code(self) -> None:
        """Cache byte code of the modules that the guest compiled, for the next guests.

        Uses what is left of the guest's time. A failure only makes later jobs slower.
        """
        modules, self.guest.compiled_anew = self.guest.compiled_anew, []
        if modules:
            try:
                self.lease.compile(modules, self.guest.seconds_left)
            except Exception:  # the names come from the guest
                log.exception("cannot cache the byte code of %s", self.lease.site_packages)

    def leave(self) -> None:
        """Close the guest, remove its folder, release its lease; errors are only logged."""
        for step in (self.guest.close, partial(clear_away, self.folder), self.lease.release):
            try:
                step()
            except Exception:  # a plugin may leave anything in its folder
                log.exception("cannot delete a plugin's temporary files in %s", self.folder)


@dataclass
class _Ran:
    """A finished attempt; if it succeeded, its stages are to be sealed."""

    job: Assignment
    stages: list[Stage] = field(default_factory=list)
    log: str = ""
    seconds: float = 0.0
    sandbox: str = ""
    evidence: Evidence = field(default_factory=Evidence)
    fault: JobError | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Catch every exception of the block; the first becomes the attempt's fault.

        All work with a guest runs in here: its messages, actions and files can make any step fail
        in unforeseen ways, and an uncaught exception would end the Worker and the daemon.
        """
        try:
            yield
        except Exception as error:  # noqa: BLE001 - sorted by _job_error
            self.fault = self.fault or _job_error(error)

    def receipt(self, outcome: Outcome, **more: Any) -> Receipt:
        return Receipt(
            job_id=self.job.job_id,
            fence=self.job.fence,
            outcome=outcome,
            log=self.log,
            seconds=self.seconds,
            sandbox=self.sandbox,
            **{"evidence": self.evidence, **more},
        )


class Runner:
    """Runs batches of jobs, one job at a time, on the calling thread.

    Args:
        welcome: the Sentinel's settings for this Worker.
        cache: folder for environments and the guest's files.
    """

    def __init__(self, welcome: Welcome, cache: Path) -> None:
        self._cache = cache
        self._seats: OrderedDict[int, _Seat] = OrderedDict()
        self.follow(welcome)
        self._halted = threading.Event()
        self._killed = threading.Event()
        self._lock = threading.Lock()
        self._current: tuple[int, int] | None = None
        """The current attempt: (job id, fence)."""
        self._running: Guest | None = None
        """The guest that is running it. Guarded by `_lock`."""
        self._used: Guest | None = None
        """The guest that ran it, whose log is to be taken."""
        self._rejects: Rejects | None = None
        """Rows and rejects of the current attempt so far."""
        self._revoked: set[tuple[int, int]] = set()

    def follow(self, welcome: Welcome) -> None:
        """Serve this Sentinel, under its settings. A new one has removed the guests' folders."""
        self.close()
        self._welcome = welcome
        self._limits = welcome.limits
        self._database = DatabaseSettings(db_location=welcome.database)
        self._environments = EnvironmentStore(
            self._cache / "envs", welcome.limits.environments_bytes, given_up=self._taken,
            one_limit_bytes=welcome.limits.environment_limit_bytes,
        )  # fmt: skip

    def run(self, jobs: Sequence[tuple[Assignment, Artifact]]) -> list[Receipt]:
        """Run each job, then seal their stages; one receipt a job, in their order."""
        outcomes = [self._attempt(job, artifact) for job, artifact in jobs]
        with self._lock:
            revoked = self._revoked & {(job.job_id, job.fence) for job, _ in jobs}
            self._revoked -= revoked
        outcomes = [_without(outcome, revoked) for outcome in outcomes]
        stages = [stage for o in outcomes if isinstance(o, _Ran) for stage in o.stages]
        try:
            sealed = iter(sinks.seal(stages))
            return [_staged(o, sealed) if isinstance(o, _Ran) else o for o in outcomes]
        except Exception as error:  # noqa: BLE001 - sorted by _job_error
            _discard(stages)
            fault = _job_error(error)
            return [_failed(o, fault) if isinstance(o, _Ran) else o for o in outcomes]

    def halt(self, kill: bool = False) -> None:
        """From another thread: start no further job, and with `kill` end the current one.

        Jobs that did not begin, or were ended so, are released.
        """
        self._halted.set()
        if not kill:
            return
        self._killed.set()
        with self._lock:
            if self._running:
                self._running.interrupt()

    def revoke(self, attempts: Set[tuple[int, int]]) -> None:
        """From another thread: end these attempts (job id, fence), or do not begin them.

        The Sentinel took them back: their receipts are RELEASED, and their stages are removed.
        """
        with self._lock:
            self._revoked |= attempts
            if self._current in attempts and self._running:
                self._running.interrupt()

    def close(self) -> None:
        """Close every guest."""
        for seat in self._seats.values():
            seat.leave()
        self._seats.clear()

    def _attempt(self, job: Assignment, artifact: Artifact) -> _Ran | Receipt:
        """Run one attempt. If it fails, return its receipt and leave no stage."""
        self._current, self._used = (job.job_id, job.fence), None
        self._rejects = None
        if self._halted.is_set() or self._taken():
            return released(job)
        started = time.monotonic()
        ran = _Ran(job)
        with ran.held():
            if artifact.refusal:
                raise ArtifactRefused(artifact.refusal)
            with endings.held(Path(self._welcome.guests_folder), *self._current):
                ran.stages = self._run(job, artifact)
        ran.seconds = time.monotonic() - started
        with ran.held():
            self._account(ran, failed=ran.fault is not None)
        if ran.fault is None:
            return ran
        _discard(ran.stages)
        return released(job, ran.log) if self._taken() else _failed(ran, ran.fault)

    def _account(self, ran: _Ran, *, failed: bool) -> None:
        """Take the log and measurements of the guest that ran it, if one did."""
        if self._used:
            ran.log, ran.sandbox = self._used.take_log(), self._used.sandbox
            ran.evidence = self._used.evidence
        if failed and self._rejects and (rejects := self._rejects.log()):
            ran.log = "\n".join(filter(None, [ran.log.rstrip("\n"), rejects]))
        ran.log = _with_notes(ran.log, ran.stages)

    def _run(self, job: Assignment, artifact: Artifact) -> list[Stage]:
        """Stage a job's output; use the file itself if the store's bytes are unusable."""
        try:
            return self._run_placed(job, artifact)
        except StoreFault as fault:
            log.warning("job %d cannot use the bytes in the store: %s", job.job_id, fault)
            try:
                unkept = msgspec.structs.replace(job, kept_file="", kept_bytes=None)
                return self._run_placed(unkept, artifact)
            except Superseded as error:
                message = f"{error.message}; the store's cannot be used either: {fault}"
                raise Superseded(message, error.hint) from error

    def _run_placed(self, job: Assignment, artifact: Artifact) -> list[Stage]:
        with self._seated(job, artifact) as seat, self._minded(seat.guest):
            stages = self._stage(seat, job)
            seat.keep_byte_code()
            return stages

    @contextlib.contextmanager
    def _minded(self, guest: Guest) -> Iterator[None]:
        """Let other threads interrupt the guest while the block runs."""
        with self._lock:
            self._running = self._used = guest
            if self._taken():
                guest.interrupt()
        try:
            yield
        finally:
            with self._lock:
                self._running = None

    def _taken(self) -> bool:
        """Whether the current attempt was revoked, or all are to end."""
        return self._killed.is_set() or self._current in self._revoked

    @contextlib.contextmanager
    def _seated(self, job: Assignment, artifact: Artifact) -> Iterator[_Seat]:
        """A guest for the job.

        A large file gets a guest of its own, since a sandbox cannot be widened later. Its modules
        can read the file, so the file is checked before.
        """
        if is_kept(job) or job.size_bytes <= self._limits.copy_limit_bytes:
            yield self._seat(artifact)
            return
        with proved(job) as file:
            seat = self._start(artifact, file)
            try:
                yield seat
            finally:
                seat.leave()

    def _stage(self, seat: _Seat, job: Assignment) -> list[Stage]:
        plans = _by_topic(job.outputs)
        stages: dict[str, list[Stage]] = {}
        self._rejects = rejects = Rejects(plans.keys(), job.may_be_empty)
        try:
            with (
                placed(job, seat.folder / "in", self._limits.copy_limit_bytes) as file,
                contextlib.closing(seat.guest.run(file, job.timeout_seconds)) as batches,
            ):
                for topic, batch in batches:
                    rejects.see(topic, batch)
                    if topic not in stages:
                        self._open(stages.setdefault(topic, []), job, plans[topic])
                    for stage in stages[topic]:
                        stage.write(batch)
                for stage in _flat(stages):
                    stage.finish()
            rejects.judge()  # after `placed` has checked that the bytes did not change
        except BaseException:
            _discard(_flat(stages))
            raise
        return _flat(stages)

    def _open(self, stages: list[Stage], job: Assignment, plans: Sequence[Output]) -> None:
        """Append a stage for each plan, so that the caller can discard them if one fails."""
        for plan in plans:
            sink = sinks.open_sink(plan.location, self._database)
            stages.append(sink.open_stage(plan, job.attempt))

    def _seat(self, artifact: Artifact) -> _Seat:
        """A guest of this artifact: a warm one if there is one, else a new one."""
        seat = self._seats.pop(artifact.plugin_id, None)
        if seat and (not seat.guest.alive or seat.guest.jobs_served >= self._limits.recycle_jobs):
            seat.leave()
            seat = None
        if seat is None:
            while len(self._seats) >= self._welcome.guests:
                self._seats.popitem(last=False)[1].leave()
            seat = self._start(artifact)
        self._seats[artifact.plugin_id] = seat
        return seat

    def _start(self, artifact: Artifact, file: InPlace | None = None) -> _Seat:
        lease = self._environments.lease(artifact.lock)
        try:
            return self._settle(artifact, lease, file)
        except BaseException:
            lease.release()
            raise

    def _settle(self, artifact: Artifact, lease: Lease, file: InPlace | None) -> _Seat:
        parent = Path(self._welcome.guests_folder)
        with contextlib.ExitStack() as undo:
            try:
                make_folder(parent, mode=0o700)
                folder = Path(tempfile.mkdtemp(dir=parent))
                undo.callback(clear_away, folder)
                (folder / "in").mkdir()
                (folder / "tmp").mkdir()
                crashpoint("runner.guest_housed")
            except OSError as error:
                raise Unavailable(f"cannot create a working folder in {parent}: {error}") from error
            guest = Guest(
                lease.python, lease.site_packages, artifact,
                folder=folder, bundle=bundle(self._cache), limits=self._limits, in_place=file,
            )  # fmt: skip
            undo.callback(guest.close)
            with self._minded(guest):
                guest.load()
            undo.pop_all()
        seat = _Seat(guest, folder, lease)
        seat.keep_byte_code()
        return seat


def _with_notes(log: str, stages: Sequence[Stage]) -> str:
    """Append the sinks' notes on its outputs to an attempt's log."""
    notes = list(dict.fromkeys(stage.note for stage in stages if stage.note))
    if notes and log and not log.endswith("\n"):
        log += "\n"
    return log + "".join(f"{note}\n" for note in notes)


def _job_error(fault: Exception) -> JobError:
    """An unforeseen exception fails the attempt, and does not end the daemon."""
    if isinstance(fault, JobError):
        return fault
    if isinstance(fault, OSError):
        return Unavailable(f"{fault.strerror or fault}: {fault.filename or 'this machine'}")
    log.exception("an attempt failed unexpectedly", exc_info=fault)
    message = f"a bug in casparian, or a plugin that triggers one: {type(fault).__name__}: {fault}"
    return JobError(message, "report the traceback in the daemon's log")


def _discard(stages: Sequence[Stage]) -> None:
    """Remove stages; the next start sweeps those that cannot be removed now."""
    for stage in stages:
        try:
            stage.discard()
        except Exception:
            log.exception("cannot delete the staged files in %s", stage.path)


def _staged(ran: _Ran, sealed: Iterator[Output]) -> Receipt:
    """The receipt of a successful attempt. A topic that the plugin declares and gave no rows has an
    output without a stage: it takes the place of the version's earlier rows."""
    outputs = list(itertools.islice(sealed, len(ran.stages)))
    given = {output.output_key for output in outputs}
    outputs += [
        plan
        for plan in ran.job.outputs
        if plan.output_key not in given and plan.topic in plan.topics.split("/")
    ]
    return ran.receipt(Outcome.STAGED, outputs=outputs)


def _without(outcome: _Ran | Receipt, revoked: Set[tuple[int, int]]) -> _Ran | Receipt:
    """Release an attempt that was revoked after it ran, and discard its stages."""
    if isinstance(outcome, Receipt) or (outcome.job.job_id, outcome.job.fence) not in revoked:
        return outcome
    _discard(outcome.stages)
    return released(outcome.job, outcome.log)


def _by_topic(plans: Sequence[Output]) -> dict[str, list[Output]]:
    topics: dict[str, list[Output]] = {}
    for plan in plans:
        topics.setdefault(plan.topic, []).append(plan)
    return topics


def _flat(stages: dict[str, list[Stage]]) -> list[Stage]:
    return [stage for group in stages.values() for stage in group]


def released(job: Assignment, log: str = "") -> Receipt:
    """The receipt of an attempt that did not run to its end, through no fault of the job."""
    return Receipt(job_id=job.job_id, fence=job.fence, outcome=Outcome.RELEASED, log=log)


def _failed(ran: _Ran, error: JobError) -> Receipt:
    match error:
        case Superseded():
            outcome = Outcome.SUPERSEDED
        case Unavailable():
            outcome = Outcome.RELEASED
        case _:
            outcome = Outcome.FAILED
    evidence = msgspec.structs.replace(ran.evidence, fault=type(error).__name__)
    message = printable(error.message[: 2 * MESSAGE_LIMIT])  # may contain text of the guest
    return ran.receipt(outcome, error=message, retryable=error.retryable, evidence=evidence)
