"""The life of jobs as a state machine, played against the real database and the real verbs.

Hypothesis calls the rules in any order; a model in a few lines says what each must do, and after
every step the ledger must agree with it and with its own invariants. Receipts may be stale,
repeated, or of attempts that were never given.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import insert, select

from casparian_flow.config import DatabaseSettings, JobSettings
from casparian_flow.db import audit, debts, integrity, jobs, outputs, schema
from casparian_flow.db.access import Connection, Ledger
from casparian_flow.db.jobs import ALONE_AFTER
from casparian_flow.db.models import (
    AuditEntry,
    Directory,
    FileLocation,
    FileVersion,
    ProcessingJob,
    SourceRoot,
)
from casparian_flow.db.routing import JobRequest
from casparian_flow.db.states import JobStatus, utcnow
from casparian_flow.engine import dispatch
from casparian_flow.engine.committer import Committer, _Results, _WorkerReceipt
from casparian_flow.engine.dispatch import POISON_AFTER, POISON_AFTER_KILLS
from casparian_flow.engine.endings import Ending
from casparian_flow.errors import SinkConflict
from casparian_flow.protocol import Evidence, Outcome, Output, Pair, Receipt
from tests.factories import add_plugin

T = TypeVar("T")
Q, R, C = JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.COMMITTING

TOPICS = ("a", "b")

REPEAT = {"OutOfMemory", "PluginFailed"}
"""Faults that are not tried a third time where they come twice; the words are always the same."""


@dataclass
class Job:
    """What the model knows of a job."""

    id: int
    version: int
    priority: int
    status: JobStatus = Q
    fence: int = 0
    attempts: int = 0
    crashes: int = 0
    worker: str = ""
    faults: set[str] = field(default_factory=set)
    """How its attempts have failed since its budget was last fresh."""
    planned: set[str] = field(default_factory=set)
    published: set[str] = field(default_factory=set)

    def begin_anew(self) -> None:
        """Queued on somebody's word."""
        self.status, self.attempts, self.faults = Q, 0, set()

    @property
    def pair(self) -> Pair:
        return self.id, self.fence


class Life(RuleBasedStateMachine):
    """Every verb of `db.jobs`, by those who call it."""

    def __init__(self) -> None:
        super().__init__()
        memory = Path("/dev/shm")
        place = memory if os.access(memory, os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(prefix="life-", dir=place))
        database = DatabaseSettings(db_location=str(self.folder / "ledger.sqlite3"))
        schema.bring_up_to_date(database)
        self.ledger = Ledger(database)
        self.jobs: dict[int, Job] = {}
        self.issued: list[Pair] = []
        """Every attempt that was ever given to a worker."""

    @initialize(max_attempts=st.integers(1, 6))
    def begin(self, max_attempts: int) -> None:
        self.limits = JobSettings(max_attempts=max_attempts, retry_seconds=0.0)
        self.plugins = [add_plugin(self.ledger, f"p{n}") for n in range(3)]
        self.guests = self.folder / "guests"
        self.guests.mkdir()
        self.write(self._add_location)
        self._start_epoch()

    def write(self, work: Callable[[Connection], T]) -> T:
        return self.ledger.write(work)

    def _add_location(self, connection: Connection) -> None:
        root = insert(SourceRoot).values(path="/nowhere", name="root", active=True, ignore="")
        root_id = connection.execute(root.returning(SourceRoot.id)).scalar_one()
        folder = insert(Directory).values(source_root_id=root_id, path=b"")
        folder_id = connection.execute(folder.returning(Directory.id)).scalar_one()
        self.places = {"source_root_id": root_id, "directory_id": folder_id}

    ending = Ending()

    def _start_epoch(self) -> None:
        self.epoch = self.write(
            partial(
                dispatch.begin_epoch,
                limits=self.limits,
                ending=self.ending,
                guests_folder=self.guests,
            )
        )
        for file in self.guests.iterdir():
            file.unlink()
        self.committer = Committer(self.ledger, self.epoch, self.limits, lambda: None)

    def of(self, *statuses: JobStatus) -> list[Job]:
        return [job for job in self.jobs.values() if job.status in statuses]

    # --- Scout ---

    @rule(priority=st.integers(-1, 1), plugin=st.integers(0, 2))
    def enqueue(self, priority: int, plugin: int) -> None:
        number = len(self.jobs)

        def work(connection: Connection) -> tuple[int, list[int]]:
            location = insert(FileLocation).values(
                path=str(number).encode(), rel_path=str(number), **self.places
            )
            location_id = connection.execute(location.returning(FileLocation.id)).scalar_one()
            version = insert(FileVersion).values(
                location_id=location_id, ordinal=1, content_hash="0" * 64, size_bytes=0
            )
            version_id = connection.execute(version.returning(FileVersion.id)).scalar_one()
            connection.exec_driver_sql(
                "UPDATE cf_file_location SET current_version_id = ? WHERE id = ?",
                (version_id, location_id),
            )
            wanted = JobRequest(self.plugins[plugin], f"p{plugin}", priority)
            pairs = [(version_id, wanted)] * 2
            return version_id, jobs.enqueue(connection, pairs, utcnow().isoformat(" "))

        version, (job_id,) = self.write(work)
        self.jobs[job_id] = Job(job_id, version, priority)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def revive(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(list(self.jobs.values()))))
        found = self.write(partial(jobs.revive, version_ids=[job.version for job in chosen]))
        wanted = {job.id for job in chosen if job.status == JobStatus.SUPERSEDED}
        assert set(found) == wanted
        for job_id in wanted:
            self.jobs[job_id].begin_anew()

    # --- Sentinel ---

    @rule(limit=st.integers(1, 4), worker=st.sampled_from(["w1", "w2"]))
    def claim(self, limit: int, worker: str) -> None:
        found = self.write(partial(jobs.claim, worker=worker, epoch=self.epoch, limit=limit))
        running = self.of(R)
        due = sorted(self.of(Q), key=lambda job: (-job.priority, job.id))[:limit]
        wanted = list(itertools.takewhile(lambda job: job.crashes < ALONE_AFTER, due))
        if any(job.crashes >= ALONE_AFTER for job in running):
            wanted = []
        elif not wanted and not running:
            wanted = due[:1]
        assert sorted(found) == sorted(job.id for job in wanted)
        for job in wanted:
            job.status, job.worker = R, worker
            job.fence += 1
            job.attempts += 1
            self.issued.append(job.pair)

    @rule(data=st.data(), silent=st.booleans())
    def worker_is_gone(self, data: st.DataObject, silent: bool) -> None:
        pairs = data.draw(st.lists(self._any_pair(), unique=True))
        hands = set(data.draw(st.lists(self._any_pair(), max_size=2)))
        if silent:
            self.write(
                partial(dispatch.lose, pairs=pairs, hands=hands, limits=self.limits, why="gone")
            )
        else:
            self.write(partial(dispatch.release, pairs=pairs, why="left"))
        held = [job for job in self.of(R) if job.pair in pairs]
        self._taken(held, hands if silent else None)

    @rule(data=st.data(), ending=st.builds(Ending, st.booleans(), st.booleans()))
    def daemon_dies(self, data: st.DataObject, ending: Ending) -> None:
        hands = set(data.draw(st.lists(self._any_pair(), max_size=2)))
        for job_id, fence in hands:
            (self.guests / f"hand-{job_id}-{fence}").touch()
        held = self.of(R)
        self.ending = ending
        self._start_epoch()
        most = POISON_AFTER if ending.traced else POISON_AFTER_KILLS
        for job in held:
            job.status = Q
            job.attempts -= 1
            if ending.machine or job.pair in hands:
                if job.crashes + 1 >= most:
                    job.status = JobStatus.FAILED
                    job.attempts += 1
                else:
                    job.crashes += 1

    def _taken(self, held: list[Job], hands: set[Pair] | None) -> None:
        for worker in {job.worker for job in held}:
            crew = [job for job in held if job.worker == worker]
            suspects = [job for job in crew if hands is not None and job.pair in hands]
            for job in crew:
                if hands is None or (suspects and job not in suspects):
                    job.status = Q
                    job.attempts -= 1
                    continue
                job.status = JobStatus.FAILED if job.attempts >= self.limits.max_attempts else Q

    # --- Committer ---

    @rule(data=st.data())
    def receipts(self, data: st.DataObject) -> None:
        group = data.draw(
            st.lists(st.builds(self._receipt, self._any_pair(), _OUTCOMES), max_size=4)
        )
        group += data.draw(st.permutations(group))[: len(group) // 2]
        over = self.write(
            lambda c: self.committer._decide(c, [_WorkerReceipt("w", receipt) for receipt in group])
        )
        first: dict[Pair, Receipt] = {}
        for receipt in group:
            first.setdefault((receipt.job_id, receipt.fence), receipt)
        for pair, receipt in first.items():
            job = self.jobs.get(pair[0])
            if job and job.status == R and job.pair == pair:
                self._ended(job, receipt)
        owed = self.ledger.read(outputs.stages)
        assert not owed & set(over), "what is decided lost its stage"

    def _ended(self, job: Job, receipt: Receipt) -> None:
        match receipt.outcome:
            case Outcome.STAGED:
                job.status = C
                job.planned = {output.topic for output in receipt.outputs} - job.published
            case Outcome.SUPERSEDED:
                job.status = JobStatus.SUPERSEDED
            case Outcome.RELEASED:
                job.status = Q
                job.attempts -= 1
            case Outcome.FAILED:
                fault = receipt.evidence.fault
                again = receipt.retryable and job.attempts < self.limits.max_attempts
                vain = fault in job.faults & REPEAT
                job.status = Q if again and not vain else JobStatus.FAILED
                job.faults.add(fault)

    @rule(data=st.data(), refuse=st.booleans())
    def publish(self, data: st.DataObject, refuse: bool) -> None:
        owed = self.ledger.read(lambda c: debts.publications(c, str, ()))
        assert {(p.job_id, o.topic) for p in owed for o in p.publication.outputs} == {
            (job.id, topic) for job in self.of(C) for topic in job.planned
        }
        chosen = data.draw(st.lists(st.sampled_from(owed), unique_by=id)) if owed else []
        refused = {part.job_id: (part, SinkConflict("it is another's")) for part in chosen[:refuse]}
        taken = chosen[len(refused) :]
        published = {
            number: output
            for part in taken
            for number, output in zip(part.output_ids, part.publication.outputs, strict=True)
        }
        asyncio.run(self.committer._complete(_Results(published, {}, dict(refused))))
        for part in taken:
            job = self.jobs[part.job_id]
            job.published |= job.planned
            job.planned = set()
        for job_id in refused:
            self.jobs[job_id].status = JobStatus.FAILED
        for job in self.of(C):
            if not job.planned:
                job.status = JobStatus.COMPLETED

    def _receipt(self, pair: Pair, ending: tuple[Outcome, bool, str, frozenset[str]]) -> Receipt:
        outcome, retryable, fault, topics = ending
        staged = [
            Output(
                topic=topic, uri="u", location="l", mode="append", output_key=f"{pair[0]}{topic}",
                source="s", path=b"f", ordinal=1, content_hash="", file_bytes=1, plugin="p",
                plugin_version="1", artifact_hash="", version_id=1, job_id=pair[0],
                stage=f"{pair}{topic}", rows=1, size_bytes=1,
            )
            for topic in topics
        ]  # fmt: skip
        error = "" if outcome in (Outcome.STAGED, Outcome.RELEASED) else "no"
        return Receipt(
            job_id=pair[0], fence=pair[1], outcome=outcome, retryable=retryable, error=error,
            outputs=staged if outcome is Outcome.STAGED else [], evidence=Evidence(fault=fault),
        )  # fmt: skip

    def _any_pair(self) -> st.SearchStrategy[Pair]:
        """An attempt that runs, that did once, or that never was."""
        known: list[st.SearchStrategy[Pair]] = [
            st.sampled_from(pairs)
            for pairs in ([job.pair for job in self.of(R)], self.issued)
            if pairs
        ]
        return st.one_of(*known, st.tuples(st.integers(1, 9), st.integers(1, 9)))

    # --- people ---

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(list(self.jobs)), unique=True))
        found = self.write(partial(jobs.abort, job_ids=chosen, who="somebody"))
        wanted = [job for job in self.of(Q, R) if job.id in chosen]
        assert sorted(found) == sorted(job.id for job in wanted)
        for job in wanted:
            job.status = JobStatus.ABORTED

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(list(self.jobs)), unique=True))
        found = self.write(partial(jobs.retry, job_ids=chosen))
        wanted = [j for j in self.of(JobStatus.FAILED, JobStatus.ABORTED) if j.id in chosen]
        assert sorted(found) == sorted(job.id for job in wanted)
        for job in wanted:
            job.begin_anew()

    # --- what must hold ---

    @invariant()
    def the_ledger_agrees(self) -> None:
        columns = ProcessingJob.__table__.columns
        rows: Any = self.ledger.read(lambda c: c.execute(select(*columns)).all())
        assert len(rows) == len(self.jobs)
        for row in rows:
            job = self.jobs[row.id]
            found = (row.status, row.fence, row.attempts, row.crashes)
            assert found == (job.status, job.fence, job.attempts, job.crashes), row.id
            assert (row.finished_at is None) == (row.status in jobs.UNFINISHED)
            assert 0 <= row.attempts <= row.fence
        assert self.ledger.read(lambda c: list(integrity.broken_invariants(c))) == []
        commits = select(AuditEntry.subject).where(AuditEntry.action == "commit")
        committed = Counter(self.ledger.read(lambda c: list(c.execute(commits).scalars())))
        assert committed == {f"job {job.id}": 1 for job in self.of(JobStatus.COMPLETED)}

    def teardown(self) -> None:
        assert self.ledger.read(lambda c: list(audit.problems(c))) == []
        self.ledger.close()
        shutil.rmtree(self.folder)


_OUTCOMES = st.tuples(
    st.sampled_from(Outcome),
    st.booleans(),
    st.sampled_from(["", "PluginTimeout", "PluginFailed", "OutOfMemory"]),
    st.frozensets(st.sampled_from(TOPICS)),
)
