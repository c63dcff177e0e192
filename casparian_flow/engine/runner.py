"""Running assigned jobs: a version's bytes into a guest, the guest's batches into sealed stages.

Blocking code for one long-lived thread of a worker. Guests stay warm between jobs, one for each
plugin version, least recently used out first. Several jobs are sealed together, because the disk
makes ten files durable in little more time than one.
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
from casparian_flow.engine.inbox import BadSnapshot, placed, proved
from casparian_flow.engine.sinks.base import Lineage
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
    OutputPlan,
    Receipt,
    StagedOutput,
    Welcome,
)
from casparian_flow.security.sandbox import InPlace
from casparian_flow.trees import clear_away

log = logging.getLogger(__name__)


@dataclass
class _Seat:
    """A warm guest, the folder it lives in, and its environment."""

    guest: Guest
    folder: Path
    lease: Lease

    def keep_byte_code(self) -> None:
        """Have what the first guest of an environment compiled at hand for those after it.

        It takes of the time that the guest has left. Without it a job is slower, and no less done.
        """
        modules, self.guest.compiled_anew = self.guest.compiled_anew, []
        if modules:
            try:
                self.lease.compile(modules, self.guest.seconds_left)
            except Exception:  # which modules is the guest's word
                log.exception("byte code of %s was not cached", self.lease.site_packages)

    def leave(self) -> None:
        """Let the guest go; what goes wrong then costs no more than a line in the log."""
        for step in (self.guest.close, partial(clear_away, self.folder), self.lease.release):
            try:
                step()
            except Exception:  # it had a guest's folder or process in hand
                log.exception("a guest's leavings in %s were not cleared", self.folder)


@dataclass
class _Ran:
    """A job that ran; where it came to its end, its stages wait to be sealed."""

    job: Assignment
    stages: list[Stage] = field(default_factory=list)
    log: str = ""
    seconds: float = 0.0
    sandbox: str = ""
    evidence: Evidence = field(default_factory=Evidence)
    fault: JobError | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The one place that every exception of an attempt comes to: the first one ends it.

        All that has to do with a guest is done in here. What a guest says, does or leaves behind
        can make any step of ours fail, in ways that nobody has foreseen; an exception that went
        further would end the worker, and the daemon with it.
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
    """Runs batches of jobs, one at a time, on the thread that calls it.

    Args:
        welcome: what the Sentinel said when it let this worker in.
        cache: where environments and the guest's files are kept.
    """

    def __init__(self, welcome: Welcome, cache: Path) -> None:
        self._cache = cache
        self._seats: OrderedDict[int, _Seat] = OrderedDict()
        self.follow(welcome)
        self._halted = threading.Event()
        self._killed = threading.Event()
        self._lock = threading.Lock()
        self._current: tuple[int, int] | None = None
        """The attempt that runs, as job id and fence."""
        self._running: Guest | None = None
        """What runs it, while it does; with `_lock` held it stays so."""
        self._used: Guest | None = None
        """The guest that ran it last; its log may wait to be taken."""
        self._rejects: Rejects | None = None
        """What the current attempt has given so far."""
        self._revoked: set[tuple[int, int]] = set()

    def follow(self, welcome: Welcome) -> None:
        """Serve this Sentinel, under its settings: a new one has swept away the guests we had."""
        self.close()
        self._welcome = welcome
        self._limits = welcome.limits
        self._database = DatabaseSettings(db_location=welcome.database)
        self._environments = EnvironmentStore(
            self._cache / "envs", welcome.limits.environments_bytes, given_up=self._taken,
            one_limit_bytes=welcome.limits.environment_limit_bytes,
        )  # fmt: skip

    def run(self, jobs: Sequence[tuple[Assignment, Artifact]]) -> list[Receipt]:
        """Run each job, then seal what they staged; one receipt a job, in their order."""
        outcomes = [self._attempt(job, artifact) for job, artifact in jobs]
        with self._lock:
            over = self._revoked & {(job.job_id, job.fence) for job, _ in jobs}
            self._revoked -= over
        outcomes = [_kept(outcome, over) for outcome in outcomes]
        stages = [stage for o in outcomes if isinstance(o, _Ran) for stage in o.stages]
        try:
            sealed = iter(sinks.seal(stages))
            return [_staged(o, sealed) if isinstance(o, _Ran) else o for o in outcomes]
        except Exception as error:  # noqa: BLE001 - sorted by _job_error
            _discard(stages)
            fault = _job_error(error)
            return [_failed(o, fault) if isinstance(o, _Ran) else o for o in outcomes]

    def halt(self, kill: bool = False) -> None:
        """From another thread: start no further job, and with `kill` end the one that runs.

        Jobs that were not begun, or were ended so, are released.
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

        They were taken from us: their receipts say Released, and they leave no stage.
        """
        with self._lock:
            self._revoked |= attempts
            if self._current in attempts and self._running:
                self._running.interrupt()

    def close(self) -> None:
        """Let every guest go."""
        for seat in self._seats.values():
            seat.leave()
        self._seats.clear()

    def _attempt(self, job: Assignment, artifact: Artifact) -> _Ran | Receipt:
        """One attempt; whatever goes wrong becomes a receipt, and no stage is left behind."""
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
        """Take what the guest that ran it has said and used, if one did."""
        if self._used:
            ran.log, ran.sandbox = self._used.take_log(), self._used.sandbox
            ran.evidence = self._used.evidence
        if failed and self._rejects and (rejects := self._rejects.log()):
            ran.log = "\n".join(filter(None, [ran.log.rstrip("\n"), rejects]))
        ran.log = _with_notes(ran.log, ran.stages)

    def _run(self, job: Assignment, artifact: Artifact) -> list[Stage]:
        """Stage a job's output; with the version's file where its snapshot cannot be used."""
        try:
            return self._run_placed(job, artifact)
        except BadSnapshot as fault:
            log.warning("job %d is not run on a snapshot: %s", job.job_id, fault)
            try:
                return self._run_placed(msgspec.structs.replace(job, snapshot=""), artifact)
            except Superseded as error:
                words = f"{error.message}; its snapshot cannot be used: {fault}"
                raise Superseded(words, error.hint) from error

    def _run_placed(self, job: Assignment, artifact: Artifact) -> list[Stage]:
        with self._seated(job, artifact) as seat, self._minded(seat.guest):
            stages = self._stage(seat, job)
            seat.keep_byte_code()
            return stages

    @contextlib.contextmanager
    def _minded(self, guest: Guest) -> Iterator[None]:
        """While a guest works for the current attempt, another thread may end it."""
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
        """Whether the current attempt was taken from us, or we are to end it."""
        return self._killed.is_set() or self._current in self._revoked

    @contextlib.contextmanager
    def _seated(self, job: Assignment, artifact: Artifact) -> Iterator[_Seat]:
        """A guest for the job. Rights cannot be added later: a large file gets one of its own.

        Its modules run with the right to read the file: it is proved before.
        """
        if job.snapshot or job.size_bytes <= self._limits.copy_limit_bytes:
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
                # Who publishes nothing to a topic in mode replace takes its earlier rows away.
                for topic in plans.keys() - stages.keys():
                    replacing = [plan for plan in plans[topic] if plan.mode == "replace"]
                    self._open(stages.setdefault(topic, []), job, replacing)
                for stage in _flat(stages):
                    stage.finish()
            rejects.judge()  # only now is it sure which bytes they came of
        except BaseException:
            _discard(_flat(stages))
            raise
        return _flat(stages)

    def _open(self, stages: list[Stage], job: Assignment, plans: Sequence[OutputPlan]) -> None:
        """Add one for each plan; where one cannot be opened, those before it can be discarded."""
        lineage = Lineage(
            file_version_id=job.version_id,
            job_id=job.job_id,
            source_hash=job.content_hash,
            plugin_version=job.plugin_version,
        )
        for plan in plans:
            sink = sinks.open_sink(plan.location, self._database)
            stages.append(sink.open_stage(plan, lineage, job.attempt))

    def _seat(self, artifact: Artifact) -> _Seat:
        """A living guest of this artifact, warm if there is one."""
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
                raise Unavailable(f"cannot make a guest's folder in {parent}: {error}") from error
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
    """An attempt's log with what its sinks have to say of its outputs."""
    notes = list(dict.fromkeys(stage.note for stage in stages if stage.note))
    if notes and log and not log.endswith("\n"):
        log += "\n"
    return log + "".join(f"{note}\n" for note in notes)


def _job_error(fault: Exception) -> JobError:
    """A fault nobody foresaw costs the job an attempt, and not the daemon its life."""
    if isinstance(fault, JobError):
        return fault
    if isinstance(fault, OSError):
        return Unavailable(f"{fault.strerror or fault}: {fault.filename or 'this machine'}")
    log.exception("an attempt failed in a way we did not expect", exc_info=fault)
    words = f"a bug in casparian, or a guest that found one: {type(fault).__name__}: {fault}"
    return JobError(words, "the daemon's log has the traceback; please report it")


def _discard(stages: Sequence[Stage]) -> None:
    """Leave nothing of them; what cannot be removed now is swept at the next start."""
    for stage in stages:
        try:
            stage.discard()
        except Exception:
            log.exception("what was staged in %s was not removed", stage.path)


def _staged(ran: _Ran, sealed: Iterator[StagedOutput]) -> Receipt:
    outputs = list(itertools.islice(sealed, len(ran.stages)))
    return ran.receipt(Outcome.STAGED, outputs=outputs)


def _kept(outcome: _Ran | Receipt, over: Set[tuple[int, int]]) -> _Ran | Receipt:
    """The same, unless the attempt was taken from us when it had just run: nothing stays then."""
    if isinstance(outcome, Receipt) or (outcome.job.job_id, outcome.job.fence) not in over:
        return outcome
    _discard(outcome.stages)
    return released(outcome.job, outcome.log)


def _by_topic(plans: Sequence[OutputPlan]) -> dict[str, list[OutputPlan]]:
    topics: dict[str, list[OutputPlan]] = {}
    for plan in plans:
        topics.setdefault(plan.topic, []).append(plan)
    return topics


def _flat(stages: dict[str, list[Stage]]) -> list[Stage]:
    return [stage for group in stages.values() for stage in group]


def released(job: Assignment, log: str = "") -> Receipt:
    """The receipt of an attempt that was not run to its end, by no fault of the job."""
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
    words = printable(error.message[: 2 * MESSAGE_LIMIT])  # a guest may have had its say in it
    return ran.receipt(outcome, error=words, retryable=error.retryable, evidence=evidence)
