"""Verbs that forget something, skip a move, or die in the middle: caught; all others: clean."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from sqlalchemy import text, update

from casparian_flow.config import Settings
from casparian_flow.db import debts, integrity, jobs, outputs, schema, seals, visibility
from casparian_flow.db.access import Connection, Ledger, driver, open_ledger
from casparian_flow.db.models import ProcessingJob
from casparian_flow.db.states import JOB_ARROWS, JobStatus
from casparian_flow.protocol import Output
from casparian_flow.services.scan import Root, scan
from casparian_flow.services.verify import verify
from tests.conftest import write_config
from tests.db.real_ledger import attacker, before, said
from tests.factories import add_job

GUARDS = ("cf_processing_queue_arrows", "cf_processing_queue_adopted")


def words(ledger: Ledger) -> str:
    return "\n".join(ledger.read(said))


def moved(status: str) -> Callable[[Connection, int], object]:
    """A verb without any guard."""
    return lambda c, job: c.execute(
        update(ProcessingJob)
        .where(ProcessingJob.id == job)
        .values(status=status, worker="w" if status == "RUNNING" else None)
    )


def staged(job: int, topic: str = "t") -> Output:
    return Output(
        topic=topic, uri="u", location="l", mode="append", output_key=f"{job}-{topic}",
        source="s", path=b"f", ordinal=1, content_hash="0" * 64, file_bytes=0, plugin="p",
        plugin_version="1", artifact_hash="", version_id=1, job_id=job, rows=1, size_bytes=1,
    )  # fmt: skip


def attempt(connection: Connection, job: int, fence: int, outcome: str = "STAGED") -> None:
    jobs.add_attempts(connection, 1, [jobs.AttemptResult(job, fence, "w", outcome, "", "", 0.1)])


@pytest.mark.parametrize("start", JOB_ARROWS)
def test_a_move_that_there_is_not_is_named_where_the_database_did_not_refuse_it(
    ledger: Ledger, start: str
) -> None:
    """`complete` without `decide` and every other: the mutant's own records give it away."""
    missing = sorted(set(JobStatus) - JOB_ARROWS.get(start, set()) - {start})
    for guard in GUARDS:
        ledger.write(lambda c, g=guard: c.execute(text(f"DROP TRIGGER {g}")).rowcount)
    for end in missing:
        if start:
            job = add_job(ledger, JobStatus(start))
            ledger.write(lambda c, j=job, e=end: moved(e)(c, j) and None)
        else:
            job = add_job(ledger, JobStatus(end))
        assert f"job {job} is moved from {start or 'nothing'} to {end} by audit row " in words(
            ledger
        )


def test_an_attempt_that_lost_its_job_cannot_be_decided_unseen(ledger: Ledger) -> None:
    """A `decide` that looks at the status only, and not at the fence."""
    job = add_job(ledger)
    ledger.write(lambda c: jobs.claim(c, "slow", 1, 1))
    ledger.write(lambda c: jobs.requeue(c, job, 2, reason="silent"))
    ledger.write(lambda c: jobs.claim(c, "quick", 1, 1))

    def decide(connection: Connection) -> None:
        moved("COMMITTING")(connection, job)
        outputs.plan(connection, [(job, [staged(job)])])
        attempt(connection, job, 2)

    ledger.write(decide)
    assert f"job {job} is COMMITTING, but none of its attempts staged an output" in words(ledger)


def test_a_claim_without_a_new_fence_is_named(ledger: Ledger) -> None:
    job = add_job(ledger)
    ledger.write(lambda c: moved("RUNNING")(c, job) and None)
    assert f"job {job} is moved to RUNNING with fence 1 by audit row 2, after fence 1" in words(
        ledger
    )


def test_a_job_that_failed_without_a_word_is_named(ledger: Ledger) -> None:
    job = add_job(ledger)
    ledger.write(lambda c: jobs.claim(c, "w", 1, 1))
    ledger.write(lambda c: jobs.fail(c, job, 2, "no"))
    assert f"job {job} is FAILED, but no attempt and no audit row records that" in words(ledger)


def test_a_verb_that_leaves_no_record_is_named(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = add_job(ledger)
    ledger.write(lambda c: jobs.claim(c, "w", 1, 1))
    assert words(ledger) == ""

    def forgetful(connection: Connection) -> bool:
        found = jobs.requeue(connection, job, 2, reason="again")
        driver(connection).execute("DELETE FROM cf_moved")
        return found

    assert ledger.write(forgetful)
    assert words(ledger) == (
        f"job {job} is QUEUED, but audit row 2 has it RUNNING: "
        "it was changed outside Casparian Flow"
    )
    monkeypatch.setattr(seals, "seal", lambda connection, marks: None)
    other = add_job(ledger)
    assert f"job {other} was inserted outside Casparian Flow: it has no audit record" in words(
        ledger
    )


def test_a_request_that_is_undone_is_not_sealed(ledger: Ledger) -> None:
    job = add_job(ledger)

    def fails(connection: Connection) -> None:
        jobs.abort(connection, [job], "me")
        raise ValueError("on second thoughts")

    with pytest.raises(ValueError, match="second thoughts"):
        ledger.write(fails)
    ledger.write(lambda c: jobs.claim(c, "w", 1, 1))
    assert words(ledger) == ""


def test_what_another_connection_writes_is_in_no_seal(ledger: Ledger, settings: Settings) -> None:
    """Through the triggers of the database and all; and the next of our transactions adds none."""
    job = add_job(ledger)
    with closing(schema.connect(settings.database)) as raw:
        raw.begin_writing()
        jobs.abort(Connection(raw), [job], "me")
        raw.commit()
    ledger.write(lambda c: jobs.claim(c, "w", 1, 1))
    assert "it was changed outside Casparian Flow" in words(ledger)
    assert words(ledger) in verify(settings, ledger).problems


def finish(connection: Connection, job: int) -> None:
    """What the Committer does with a receipt."""
    fence = connection.execute(
        text("SELECT fence FROM cf_processing_queue WHERE id = :id"), {"id": job}
    ).scalar_one()
    if not jobs.decide(connection, [(job, fence)]):
        return
    outputs.plan(connection, [(job, [staged(job), staged(job, "other")])])
    attempt(connection, job, fence)


def publish(connection: Connection, job: int, refused: bool) -> None:
    parts = [p for p in debts.publications(connection, str, ()) if p.job_id == job]
    if refused and parts:
        outputs.mark_refused(connection, [job])
        jobs.refuse(connection, job, "never")
    else:
        for part in parts:
            done = zip(part.output_ids, part.publication.outputs, strict=True)
            outputs.mark_published(connection, dict(done))
    finished = jobs.complete(connection, outputs.all_published(connection))
    visibility.refresh(connection, visibility.of_jobs(connection, finished))


def attempted(connection: Connection, job: int, verb: Callable[..., bool]) -> None:
    row = connection.execute(
        text("SELECT fence, status FROM cf_processing_queue WHERE id = :id"), {"id": job}
    ).one()
    if row.status == "RUNNING":
        verb(connection, job, row.fence, reason="so it is")
        attempt(connection, job, row.fence, "FAILED")


VERBS: dict[str, Callable[[Connection, int], object]] = {
    "claim": lambda c, job: jobs.claim(c, "w", 1, 2),
    "finish": finish,
    "publish": lambda c, job: publish(c, job, refused=False),
    "refuse": lambda c, job: publish(c, job, refused=True),
    "requeue": lambda c, job: attempted(c, job, jobs.requeue),
    "fail": lambda c, job: attempted(c, job, jobs.fail),
    "supersede": lambda c, job: attempted(c, job, jobs.supersede),
    "abort": lambda c, job: jobs.abort(c, [job], "me"),
    "retry": lambda c, job: jobs.retry(c, [job]),
    "revive": lambda c, job: jobs.revive(c, [job]),
    "set_reason": lambda c, job: jobs.set_reason(c, [job], "waits"),
}


@examples(
    max_examples=15, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    story=st.lists(
        st.lists(st.tuples(st.sampled_from(sorted(VERBS)), st.integers(1, 3)), max_size=5),
        min_size=3, max_size=10,
    )
)  # fmt: skip
def test_whatever_the_verbs_do_the_audit_and_the_rows_agree(
    tmp_path: Path, story: list[list[tuple[str, int]]]
) -> None:
    """Several verbs in one transaction among them, as when many requests share one."""
    settings = write_config(tmp_path / os.urandom(6).hex())
    with open_ledger(settings.database) as ledger:
        for _ in range(3):
            add_job(ledger)
        for together in story:

            def work(c: Connection, verbs: list[tuple[str, int]] = together) -> None:
                for verb, job in verbs:
                    VERBS[verb](c, job)

            ledger.write(work)
        assert ledger.read(lambda c: list(integrity.seal_problems(c))) == []


def before_seals(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger with rows, as the release before the seals left it."""
    with monkeypatch.context() as patch:
        before(patch, "0006")
        patch.setattr(seals, "seal", lambda connection, marks: None)
        with open_ledger(settings.database) as ledger:
            for status in (JobStatus.COMPLETED, JobStatus.RUNNING, JobStatus.QUEUED):
                job = add_job(ledger, status)
                ledger.write(lambda c, j=job: attempt(c, j, 1))
                ledger.write(lambda c, j=job: c.execute(text(PLANNED_THEN), {"job": j}).rowcount)


PLANNED_THEN = """
INSERT INTO cf_output (job_id, topic, uri, location, mode, output_key, state, stage, target,
                       rows, size_bytes, digest)
VALUES (:job, 't', 'u', 'l', 'append', :job || '-t', 'PLANNED', '', '', 1, 1, '')
"""
"""How that release planned an output."""


def test_rows_of_an_earlier_release_are_sealed_once_and_said_to_be(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seals, "SEALED_AT_ONCE", 2)
    before_seals(settings, monkeypatch)
    with open_ledger(settings.database) as ledger:
        assert ledger.read(lambda c: list(integrity.seal_problems(c))) == []
        rows, setup = verify(settings, ledger).notes
        assert rows.startswith("rows of an earlier release were sealed on ")
        assert "(audit rows 1 to 8)" in rows
        assert setup.startswith("locations and setup of an earlier release were sealed on ")
        ledger.write(lambda c: jobs.decide(c, [(2, 1)]))
        add_job(ledger)
        assert ledger.read(lambda c: list(integrity.seal_problems(c))) == []
    with attacker(settings) as other:
        other.execute("UPDATE cf_file_version SET size_bytes = 9 WHERE id = 3")
        other.execute("UPDATE cf_processing_queue SET priority = 9 WHERE id = 1")
    with open_ledger(settings.database) as ledger:
        assert ledger.read(lambda c: list(integrity.seal_problems(c))) == [
            "version 3 was changed outside Casparian Flow",
            "job 1 was changed outside Casparian Flow since it became COMPLETED",
        ]  # fmt: skip


def test_a_column_that_comes_later_has_its_default_in_rows_sealed_before(
    ledger: Ledger, settings: Settings
) -> None:
    job = add_job(ledger)
    ledger.write(lambda c: jobs.abort(c, [job], "me"))
    with attacker(settings) as later:
        later.execute("ALTER TABLE cf_processing_queue ADD COLUMN falls INTEGER DEFAULT 0 NOT NULL")
        later.execute("ALTER TABLE cf_file_version ADD COLUMN remark VARCHAR DEFAULT '' NOT NULL")
        later.execute("ALTER TABLE cf_file_version ADD COLUMN seen DOUBLE")
    other = add_job(ledger)
    ledger.write(lambda c: jobs.abort(c, [other], "me"))
    assert words(ledger) == ""
    with attacker(settings) as later:
        later.execute("UPDATE cf_file_version SET remark = 'x' WHERE id = 1")
        later.execute("UPDATE cf_file_version SET seen = 0 WHERE id = 2")
        later.execute("UPDATE cf_processing_queue SET falls = 1")
    assert words(ledger).splitlines() == [
        "version 1 was changed outside Casparian Flow",
        "version 2 was changed outside Casparian Flow",
        "job 1 was changed outside Casparian Flow since it became ABORTED",
        "job 2 was changed outside Casparian Flow since it became ABORTED",
    ]  # fmt: skip


KILLED = """
import os, signal, sys
from casparian_flow import config, crashpoints
from casparian_flow.db.access import open_ledger
from casparian_flow.services.scan import Root, scan
from sqlalchemy import text

left = int(sys.argv[2])

def react(name):
    global left
    if name == "seals.sealed":
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

crashpoints.arm(react)
with open_ledger(config.load(sys.argv[1]).database) as ledger:
    row = ledger.read(lambda c: c.execute(text("SELECT * FROM cf_source_root")).mappings().one())
    scan(ledger, Root(row["id"], row["path"], row["name"], row["ignore"], 0.0))
"""


def killed(settings: Settings, nth: int) -> None:
    """Another process scans, and is killed when it has written its nth seal, before the commit."""
    command = [sys.executable, "-c", KILLED, str(settings.home / "global_config.toml"), str(nth)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL


def test_a_kill_between_seal_and_commit_leaves_neither(
    settings: Settings, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the migration that begins the seals, and in a scan after it."""
    before_seals(settings, monkeypatch)
    with closing(sqlite3.connect(settings.database.path, isolation_level=None)) as database:
        database.execute("DELETE FROM cf_source_root")
        database.execute(
            "INSERT INTO cf_source_root (path, name, active, ignore, settle_seconds) "
            f"VALUES ('{source}', 'in', 1, '', 0)"
        )
    for n in range(5):
        (source / f"{n}.txt").write_text(str(n))
    seed = random.Random(6)
    killed(settings, seed.randrange(1, 5))  # of the migration's four
    with closing(sqlite3.connect(settings.database.path, isolation_level=None)) as database:
        assert database.execute("SELECT count(*) FROM cf_audit").fetchone() == (0,)
    killed(settings, 5)  # the scan's
    with open_ledger(settings.database) as ledger:
        assert ledger.read(lambda c: list(integrity.seal_problems(c))) == []
        assert ledger.read(integrity.sizes)["versions"] == 3
        root = ledger.read(lambda c: c.execute(text("SELECT * FROM cf_source_root")).one())
        assert scan(ledger, Root(root.id, root.path, root.name, "", 0.0)).versions == 5
        assert ledger.read(lambda c: list(integrity.seal_problems(c))) == []
