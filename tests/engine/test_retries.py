"""Who is tried again, and when; what a death of a daemon or of a Worker costs a job."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import insert, select

from casparian_flow.config import JobSettings
from casparian_flow.db import audit, jobs, plugins, rebuild
from casparian_flow.db.access import Connection, Ledger
from casparian_flow.db.jobs import AttemptResult, add_attempts
from casparian_flow.db.models import Attempt, Epoch, ProcessingJob, Rebuild
from casparian_flow.db.states import JobStatus
from casparian_flow.engine import dispatch, endings
from casparian_flow.engine.endings import Ending
from casparian_flow.protocol import Evidence, Outcome, Pair, Receipt
from tests.factories import add_job

MANY = JobSettings(max_attempts=100, retry_seconds=0.0)


def job_row(ledger: Ledger, job: int) -> ProcessingJob:
    query = select(*ProcessingJob.__table__.columns).where(ProcessingJob.id == job)
    return ledger.read(lambda c: c.execute(query).one())  # type: ignore[return-value]


def attempts_of(ledger: Ledger, job: int) -> list[str]:
    query = select(Attempt.outcome).where(Attempt.job_id == job).order_by(Attempt.fence)
    return ledger.read(lambda c: list(c.execute(query).scalars()))


def epoch(ledger: Ledger) -> int:
    return ledger.read(lambda c: c.execute(select(Epoch.id).order_by(Epoch.id.desc())).scalar())  # type: ignore[return-value]


def claim(ledger: Ledger, limit: int = 10, worker: str = "w") -> list[int]:
    return ledger.write(lambda c: jobs.claim(c, worker, epoch(ledger), limit))


TRACED, KILLED, CUT = Ending(traced=True), Ending(), Ending(machine=True, traced=True)


def die(
    ledger: Ledger,
    folder: Path,
    hands: Sequence[Pair],
    limits: JobSettings = MANY,
    ending: Ending = TRACED,
) -> None:
    """The daemon dies with these in hand, and the next one begins."""
    folder.mkdir(exist_ok=True)
    for job_id, fence in hands:
        (folder / f"hand-{job_id}-{fence}").touch()
    ledger.write(lambda c: dispatch.begin_epoch(c, limits, ending, folder))
    for file in folder.iterdir():
        file.unlink()


@given(seconds=st.floats(0, 1e6), attempts=st.integers(1, 10_000), share=st.floats(0, 1))
def test_pauses_grow_have_jitter_and_a_limit(seconds: float, attempts: int, share: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("random.uniform", lambda low, high: low + share * (high - low))
        found = dispatch.pause_seconds(JobSettings(retry_seconds=seconds), attempts)
    wanted = share * min(seconds * 4.0 ** min(attempts - 1, 16), 900.0)
    assert found == pytest.approx(wanted)


def test_the_pause_is_drawn_anew_each_time() -> None:
    limits = JobSettings(retry_seconds=5.0)
    drawn = {dispatch.pause_seconds(limits, 2) for _ in range(20)}
    assert len(drawn) == 20
    assert all(0 <= pause <= 20 for pause in drawn)


def test_a_failed_attempt_waits_in_the_ledger(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    monkeypatch.setattr("time.time", lambda: 1000.0)
    job = add_job(ledger, JobStatus.RUNNING, attempts=1)
    limits = JobSettings(retry_seconds=7.0)
    end = Receipt(job_id=job, fence=1, outcome=Outcome.FAILED, error="no")
    assert ledger.write(lambda c: dispatch.after_failure(c, end, limits, "test"))
    assert job_row(ledger, job).not_before == 1007.0
    assert not ledger.write(lambda c: dispatch.after_failure(c, end, limits, "test"))


def fails(ledger: Ledger, job: int, fault: str, error: str, limits: JobSettings = MANY) -> str:
    """Claim the job, fail its attempt with this error; its status then."""
    assert claim(ledger) == [job]
    fence = job_row(ledger, job).fence
    end = Receipt(
        job_id=job, fence=fence, outcome=Outcome.FAILED, error=error, evidence=Evidence(fault=fault)
    )
    ledger.write(partial(dispatch.after_failure, end=end, limits=limits, actor="test"))
    ended = AttemptResult(job, fence, "w", "FAILED", error, fault=fault)
    ledger.write(partial(add_attempts, epoch=epoch(ledger), results=[ended]))
    return str(job_row(ledger, job).status)


@pytest.mark.parametrize(
    ("fault", "first", "second"),
    [
        ("OutOfMemory", "it had 40 MiB", "it had 41 MiB"),
        ("PluginFailed", "ValueError: line 7", "ValueError: line 7"),
        ("PluginFailed", "<Sheet at 0x7f01>: no", "<Sheet at 0x7fee>: no"),
        ("PluginFailed", "no file /a/tmpq1w2e3r4/x", "no file /a/tmp_y7u8i9o/x"),
        ("GuestDied", "was killed by SIGSEGV", "was killed by SIGSEGV"),
        ("JobError", "KeyError: 'x'", "KeyError: 'x'"),
    ],
)
def test_the_same_error_twice_is_not_tried_a_third_time(
    ledger: Ledger, fault: str, first: str, second: str
) -> None:
    job = add_job(ledger, fence=0, attempts=0)
    assert fails(ledger, job, fault, first) == "QUEUED"
    assert fails(ledger, job, fault, second) == "FAILED"
    ledger.write(lambda c: jobs.retry(c, [job]))
    assert fails(ledger, job, fault, second) == "QUEUED", "a person gave it a fresh budget"
    assert fails(ledger, job, fault, second) == "FAILED"


@pytest.mark.parametrize(
    ("fault", "first", "second"),
    [
        ("PluginFailed", "ValueError: line 7", "ValueError: line 8"),
        ("PluginTimeout", "ran longer than 1 s", "ran longer than 1 s"),
        ("GuestKilled", "was killed by SIGKILL", "was killed by SIGKILL"),
        ("EnvironmentFailed", "the index does not answer", "the index does not answer"),
    ],
)
def test_an_error_that_may_pass_is_tried_as_often_as_may_be(
    ledger: Ledger, fault: str, first: str, second: str
) -> None:
    job = add_job(ledger, fence=0, attempts=0)
    limits = JobSettings(max_attempts=3, retry_seconds=0.0)
    assert fails(ledger, job, fault, first, limits) == "QUEUED"
    assert fails(ledger, job, fault, second, limits) == "QUEUED"
    assert fails(ledger, job, fault, "at last", limits) == "FAILED"


def test_what_repeats_is_seen_behind_attempts_that_did_not_count(ledger: Ledger) -> None:
    job = add_job(ledger, fence=0, attempts=0)
    assert fails(ledger, job, "PluginFailed", "no") == "QUEUED"
    for _ in range(3):
        assert claim(ledger) == [job]
        pair = (job, job_row(ledger, job).fence)
        ledger.write(partial(dispatch.release, pairs=[pair], why="left"))
    assert fails(ledger, job, "PluginTimeout", "too slow") == "QUEUED"
    assert fails(ledger, job, "PluginFailed", "no") == "FAILED"


def test_a_job_in_hand_when_the_daemon_died_is_told_from_those_that_waited(
    ledger: Ledger, tmp_path: Path
) -> None:
    first, second, other = add_job(ledger), add_job(ledger), add_job(ledger)
    ledger.write(lambda c: jobs.claim(c, "one", epoch(ledger), 2))
    ledger.write(lambda c: jobs.claim(c, "two", epoch(ledger), 1))
    die(ledger, tmp_path / "guests", [(first, 2)])
    found = [job_row(ledger, job) for job in (first, second, other)]
    assert [row.status for row in found] == ["QUEUED"] * 3
    # `first` may be the cause; `second` waited behind it; the other worker had not begun.
    assert [row.attempts for row in found] == [1, 1, 1], "an attempt counts for nobody"
    assert [row.crashes for row in found] == [1, 0, 0]
    assert [attempts_of(ledger, job) for job in (first, second, other)] == [
        ["LOST"], ["RELEASED"], ["RELEASED"],
    ]  # fmt: skip


def test_a_job_of_a_worker_that_lives_on_is_not_charged_with_the_end_of_the_daemon(
    ledger: Ledger, tmp_path: Path
) -> None:
    job = add_job(ledger, fence=0, attempts=0)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as worker:
        claim(ledger, worker=f"{os.uname().nodename}-{worker.pid}")
        die(ledger, tmp_path / "guests", [(job, 1)])
    row = job_row(ledger, job)
    assert (row.status, row.attempts, row.crashes) == ("QUEUED", 0, 0)
    claim(ledger, worker=f"{os.uname().nodename}-{worker.pid}")
    die(ledger, tmp_path / "guests", [(job, 2)])
    row = job_row(ledger, job)
    assert (row.status, row.attempts, row.crashes) == ("QUEUED", 0, 1), "it ended as well"


def test_poison_runs_alone_and_is_failed_the_third_time(ledger: Ledger, tmp_path: Path) -> None:
    folder = tmp_path / "guests"
    poison = add_job(ledger, priority=5, fence=0, attempts=0)
    calm = [add_job(ledger, fence=0, attempts=0) for _ in range(3)]
    for death in (1, 2):
        assert claim(ledger, 2) == [poison, calm[0]]
        die(ledger, folder, [(poison, death)])
    assert "will run alone" in job_row(ledger, poison).reason
    assert claim(ledger) == [poison]
    assert claim(ledger, worker="other") == [], "nothing runs beside it"
    die(ledger, folder, [(poison, 3)])
    row = job_row(ledger, poison)
    assert row.status == JobStatus.FAILED
    assert row.reason.startswith("POISON: the daemon ended 3 times")
    assert sorted(claim(ledger)) == calm, "the others go on"
    assert ledger.read(lambda c: list(audit.problems(c))) == []


def test_a_suspect_waits_until_nothing_runs_and_only_then_holds_the_others_up(
    ledger: Ledger,
) -> None:
    running = add_job(ledger, JobStatus.RUNNING)
    before = add_job(ledger, priority=9)
    suspect = add_job(ledger, priority=5, crashes=2)
    after = add_job(ledger, priority=1)
    assert claim(ledger) == [before]
    assert claim(ledger) == [], "its turn has come, and something runs"
    for job in (running, before):
        fence = job_row(ledger, job).fence
        ledger.write(partial(jobs.fail, job_id=job, fence=fence, reason="over"))
    assert claim(ledger) == [suspect]
    assert claim(ledger) == []
    ledger.write(lambda c: jobs.requeue(c, suspect, 2, reason="again", delay_seconds=3600))
    assert claim(ledger) == [after]


def test_a_retried_poison_is_alone_again(ledger: Ledger, tmp_path: Path) -> None:
    job = add_job(ledger, JobStatus.FAILED, crashes=2)
    add_job(ledger)
    ledger.write(lambda c: jobs.retry(c, [job]))
    assert claim(ledger) == [job]
    die(ledger, tmp_path / "guests", [(job, 2)])
    assert job_row(ledger, job).status == JobStatus.FAILED


def test_all_that_ran_is_suspected_where_the_machine_itself_ended(
    ledger: Ledger, tmp_path: Path
) -> None:
    """What was in hand is not known then, as after a power cut."""
    taker, other = add_job(ledger, attempts=0, fence=0), add_job(ledger, attempts=0, fence=0)
    for _ in range(2):
        assert claim(ledger) == [taker, other]
        die(ledger, tmp_path / "guests", [], ending=CUT)
    assert claim(ledger) == [taker], "each alone"
    die(ledger, tmp_path / "guests", [], ending=CUT)
    assert job_row(ledger, taker).status == JobStatus.FAILED
    assert claim(ledger) == [other]
    assert job_row(ledger, other).attempts == 1


def test_a_dozen_kills_make_no_poison_of_what_runs_and_a_killer_ends_all_the_same(
    ledger: Ledger, tmp_path: Path
) -> None:
    job = add_job(ledger, fence=0, attempts=0)
    once = JobSettings(max_attempts=1, retry_seconds=0.0)
    for death in range(1, dispatch.POISON_AFTER_KILLS + 1):
        assert claim(ledger) == [job]
        assert job_row(ledger, job).attempts == 1
        die(ledger, tmp_path / "guests", [(job, death)], once, KILLED)
    assert dispatch.POISON_AFTER_KILLS > 12
    assert job_row(ledger, job).status == JobStatus.FAILED
    assert job_row(ledger, job).reason.startswith("POISON: the daemon ended 14 times")


ENDS = {
    "import os; os.kill(os.getpid(), 9)": KILLED,
    "import os; os.kill(os.getpid(), 11)": TRACED,
    "import os; os.abort()": TRACED,
    "import ctypes; ctypes.string_at(0)": TRACED,
    "raise SystemExit(3)": KILLED,
}


@pytest.mark.parametrize(("end", "ending"), ENDS.items())
def test_how_a_daemon_ended_is_read_from_what_it_left(
    tmp_path: Path, end: str, ending: Ending
) -> None:
    guests = tmp_path / "flow" / "x.guests"
    assert endings.read_ending(guests) == KILLED, "of none before it nothing is known"
    code = f"""
from pathlib import Path
from casparian_flow.engine import endings
endings.begin_ending(Path({str(guests)!r}))
{end}
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert endings.read_ending(guests) == ending
    subprocess.run([sys.executable, "-c", code.replace(end, "pass")], check=True)
    assert endings.read_ending(guests) == KILLED, "each begins anew"


def test_another_run_of_the_machine_and_a_kill_for_want_of_memory_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guests = tmp_path / "x.guests"
    endings.begin_ending(guests)
    monkeypatch.setattr(endings, "oom_kills", lambda: 1 << 40)
    assert endings.read_ending(guests) == TRACED
    monkeypatch.setattr(endings, "_boot", lambda: "another")
    assert endings.read_ending(guests) == CUT
    (tmp_path / "x.begun").write_bytes(b"{")
    assert endings.read_ending(guests) == KILLED


def test_a_lost_worker_costs_what_it_had_in_hand_and_no_more(ledger: Ledger) -> None:
    job, waiting = add_job(ledger, JobStatus.RUNNING), add_job(ledger, JobStatus.RUNNING)
    pairs = [(job, 1), (waiting, 1), (99, 1)]
    limits = JobSettings(max_attempts=1)
    ledger.write(lambda c: dispatch.lose(c, pairs, {(job, 1)}, limits, "worker w was silent"))
    assert job_row(ledger, job).status == JobStatus.FAILED
    assert job_row(ledger, job).reason == "worker w was silent while it ran (1 of 1 attempts)"
    assert (job_row(ledger, waiting).status, job_row(ledger, waiting).attempts) == ("QUEUED", 0)
    ledger.write(lambda c: dispatch.lose(c, pairs, {(job, 1)}, limits, "again"))
    assert attempts_of(ledger, job) == ["LOST"]


def test_what_is_in_hand_can_be_read_until_it_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "guests"
    with endings.held(folder, 7, 3):
        (folder / "hand-x").touch()
        assert endings.read_held(folder) == {(7, 3)}
        endings.let_go()
        assert endings.read_held(folder) == set()
    with pytest.raises(KeyError), endings.held(folder, 8, 1):
        raise KeyError
    assert endings.read_held(folder) == set()
    (folder / "hand-9-9").touch()
    endings.forget(folder, [(9, 9), (10, 10)])
    assert endings.read_held(folder) == set()


def test_a_job_that_fails_after_a_rebuild_was_completed_beside_it_is_tried_once_more(
    ledger: Ledger,
) -> None:
    """What it failed at may be what the rebuild has mended, such as a column's type."""
    job = add_job(ledger, JobStatus.RUNNING)
    plugin = job_row(ledger, job).plugin_name

    def complete(connection: Connection) -> None:
        plugins.subscribe(connection, plugin, [], "1")
        connection.execute(insert(Rebuild).values(plugin_name=plugin, topic=""))
        assert len(rebuild.end(connection, [])) == 1

    def fails(fence: int) -> JobStatus:
        end = Receipt(job_id=job, fence=fence, outcome=Outcome.FAILED, error="no", retryable=False)
        assert ledger.write(lambda c: dispatch.after_failure(c, end, MANY, "worker"))
        return JobStatus(job_row(ledger, job).status)

    ledger.write(complete)
    assert fails(1) == JobStatus.QUEUED
    assert claim(ledger) == [job]
    assert fails(2) == JobStatus.FAILED
