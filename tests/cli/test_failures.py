"""A failure is open until it is mended, dismissed, or its file is gone; every count agrees."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import Casparian, Kept, holds
from tests.plugs import BEHAVES, ROWS


def _behaves(casparian: Casparian, source: Path) -> Casparian:
    casparian.run("publish", casparian.plugin("behaves", BEHAVES), "--version", "1.0.0")
    (source / "a.do").write_text("raise")
    (source / "b.do").write_text("fine")
    casparian.run("scan", "--drain", code=1)
    return casparian


@pytest.fixture
def behaves(kept: Kept) -> Casparian:
    """`a.do` has failed, `b.do` has not."""
    return kept.begun("behaves", _behaves)


@pytest.fixture
def inbox(behaves: Casparian) -> Path:
    return behaves.folder.parent / "in"


def state(casparian: Casparian, *, opened: int, gone: int = 0) -> None:
    """Every place that counts failures says so many."""
    counted = casparian.json("status")["jobs"]
    assert counted.get("FAILED", 0) == opened
    assert counted.get("gone unread", 0) == gone
    assert len(casparian.json("jobs", "--status", "FAILED")) == opened
    assert len(casparian.json("jobs", "--status", "gone-unread")) == gone
    listed = casparian.json("jobs")
    assert [job["failure"] for job in listed].count("open") == opened
    words = [line.split()[1] for line in casparian.out("jobs").splitlines()[1:]]
    assert words.count("FAILED") == opened
    check = casparian.run("status", "--check", code=1 if opened else 0)
    assert ("failed" in check.stderr) == bool(opened)
    assert check.stdout == ""
    assert casparian.run("status", "--check", "--json", code=1 if opened else 0).stdout
    holds(casparian)


def test_a_failure_closes_when_the_file_is_mended(behaves: Casparian, inbox: Path) -> None:
    state(behaves, opened=1)
    (inbox / "a.do").write_text("fine now")
    behaves.run("scan", "--drain")
    state(behaves, opened=0)
    (job,) = behaves.json("jobs", "--status", "mended")
    assert (job["status"], job["version"]) == ("FAILED", 1)
    assert "MENDED" in behaves.out("jobs", "--path", "a.do")
    assert "0 jobs queued" in behaves.out("jobs", "retry", "--failed")


@pytest.mark.slow
def test_a_newer_version_that_fails_too_closes_nothing(behaves: Casparian, inbox: Path) -> None:
    (inbox / "a.do").write_text("undeclared")
    behaves.run("scan", "--drain", code=1)
    state(behaves, opened=2)
    (inbox / "a.do").write_text("fine at last")
    behaves.run("scan", "--drain")
    state(behaves, opened=0)


@pytest.mark.slow
def test_another_plugin_mends_nothing(behaves: Casparian, inbox: Path) -> None:
    other = ROWS.replace("*.txt", "*.do").replace('"lines"', '"more"')
    behaves.run("publish", behaves.plugin("other", other))
    behaves.run("scan", "--drain")
    assert len(behaves.json("jobs", "--plugin", "other")) == 2
    state(behaves, opened=1)


@pytest.mark.slow
def test_a_failure_closes_when_the_version_succeeds_under_another_artifact(
    behaves: Casparian,
) -> None:
    mended = BEHAVES.replace('raise ValueError("no such thing")', "pass")
    behaves.run("publish", behaves.plugin("behaves", mended), "--version", "1.0.1")
    state(behaves, opened=1)
    behaves.run("backfill", "behaves", "--redo")
    behaves.run("scan", "--drain")
    state(behaves, opened=0)


@pytest.mark.slow
def test_a_new_version_that_fails_where_the_old_one_had_not_is_open_until_it_is_rolled_back(
    behaves: Casparian, inbox: Path
) -> None:
    (inbox / "a.do").write_text("fine now")
    behaves.run("scan", "--drain")
    state(behaves, opened=0)
    worse = BEHAVES.replace('if what == "raise":', "if True:")
    behaves.run("publish", behaves.plugin("behaves", worse), "--version", "1.0.1")
    behaves.run("backfill", "behaves", "--redo")
    behaves.run("scan", "--drain", code=1)
    state(behaves, opened=3)
    behaves.run("plugins", "activate", "behaves", "1.0.0", "--reason", "1.0.1 reads nothing")
    state(behaves, opened=0)


@pytest.mark.slow
def test_what_is_deleted_is_gone_unread_until_it_is_dismissed(
    behaves: Casparian, inbox: Path
) -> None:
    (inbox / "a.do").unlink()
    behaves.run("scan")
    state(behaves, opened=0, gone=1)
    assert "1 version is gone unread" in behaves.err("status")
    (inbox / "a.do").write_text("raise")
    behaves.run("scan", "--drain")
    state(behaves, opened=1)
    (inbox / "a.do").unlink()
    behaves.run("scan")
    assert "1 failure dismissed" in behaves.out("jobs", "dismiss", "--all-gone")
    state(behaves, opened=0)
    assert [e["action"] for e in behaves.json("audit", "show")].count("dismiss") == 1


@pytest.mark.slow
def test_a_person_may_accept_a_failure_and_a_retry_takes_that_back(behaves: Casparian) -> None:
    (job,) = behaves.json("jobs", "--status", "FAILED")
    other = next(j for j in behaves.json("jobs") if j["status"] == "COMPLETED")
    assert "can be dismissed" in behaves.err("jobs", "dismiss", str(other["id"]), code=1)
    assert "job 99 does not exist" in behaves.err("jobs", "dismiss", "99", code=66)
    assert "--all-gone" in behaves.err("jobs", "dismiss", code=2)
    behaves.run("jobs", "dismiss", str(job["id"]))
    behaves.run("jobs", "dismiss", str(job["id"]))
    state(behaves, opened=0)
    assert len(behaves.json("jobs", "--status", "dismissed")) == 1
    behaves.run("jobs", "retry", str(job["id"]))
    behaves.run("scan", "--drain", code=1)
    state(behaves, opened=1)


@pytest.mark.slow
def test_a_drain_speaks_of_its_own_run(behaves: Casparian, inbox: Path) -> None:
    (inbox / "c.do").write_text("fine too")
    done = behaves.run("scan", "--drain")
    assert "1 job COMPLETED; 1 row" in done.stdout
    assert "1 job failed in earlier runs" in done.stderr
    (inbox / "d.do").write_text("prose")
    done = behaves.run("scan", "--drain", code=1)
    assert "1 job FAILED" in done.stdout
    assert "failed: in/d.do" in done.stderr
    assert "a.do" not in done.stderr
    behaves.run("scan", "--drain")


@pytest.mark.slow
def test_a_backfill_of_an_older_version_that_fails_is_open(
    casparian: Casparian, source: Path
) -> None:
    (source / "a.do").write_text("raise")
    casparian.run("scan")
    (source / "a.do").write_text("fine")
    casparian.run("scan")
    casparian.run("publish", casparian.plugin("behaves", BEHAVES))
    casparian.run("scan", "--drain")
    state(casparian, opened=0)
    casparian.run("backfill", "behaves")
    casparian.run("scan", "--drain", code=1)
    state(casparian, opened=1)


@pytest.mark.slow
def test_quiet_says_nothing_when_all_is_well_and_what_is_wrong_else(
    casparian: Casparian, source: Path
) -> None:
    casparian.run("publish", casparian.plugin("behaves", BEHAVES))
    (source / "b.do").write_text("fine")
    for _ in range(2):
        done = casparian.run("scan", "-q", "--drain")
        assert (done.stdout, done.stderr) == ("", "")
    done = casparian.run("scan", "--quiet")
    assert (done.stdout, done.stderr) == ("", "")
    (source / "a.do").write_text("raise")
    done = casparian.run("scan", "-q", "--drain", code=1)
    assert done.stdout == ""
    assert "failed: in/a.do" in done.stderr
    assert "1 job failed" in casparian.err("scan", "-q")


def test_quiet_says_what_check_would_in_a_run_that_has_jobs_too(
    casparian: Casparian, source: Path
) -> None:
    casparian.run("publish", casparian.plugin("rows", ROWS))
    casparian.run("publish", casparian.plugin("behaves", BEHAVES))
    casparian.run("plugins", "disable", "behaves", "--reason", "a test")
    (source / "a.txt").write_text("one\n")
    done = casparian.run("scan", "-q", "--drain")
    check = casparian.run("status", "--check", code=1)
    assert "no version of plugin behaves" in check.stderr
    assert done.stderr == check.stderr


def test_check_sees_what_else_is_wrong(casparian: Casparian, source: Path) -> None:
    assert "no plugin" in casparian.err("status", "--check", code=1)
    casparian.run("publish", casparian.plugin("rows", ROWS))
    (source / "a.txt").write_text("one\n")
    casparian.run("scan")
    assert "1 job is queued" in casparian.err("status", "--check", code=1)
    casparian.run("scan", "--drain")
    assert casparian.run("status", "--check").stderr == ""
    (source / "b.txt").write_text("one\n")
    casparian.run("scan", "--drain")
    source.rename(source.with_name("elsewhere"))
    casparian.run("scan", code=66)
    assert "No such file" in casparian.err("status", "--check", code=1)


def test_a_paused_sink_is_wrong(blocked: Casparian) -> None:
    assert "error: not all" in blocked.err("scan", "-q", "--drain", code=1)
    assert "paused: " in blocked.err("status", "--check", code=1)
