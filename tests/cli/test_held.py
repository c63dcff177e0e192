"""A held version waits for a person: it is counted apart from failures, wherever those are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import Casparian, holds
from tests.plugs import HOLDS


@pytest.fixture
def held(casparian: Casparian, source: Path) -> Casparian:
    """`a.txt` was worked, and its edit is held; `b.txt` was worked."""
    casparian.run("publish", casparian.plugin("table", HOLDS), "--version", "1.0.0")
    (source / "a.txt").write_text("one\ntwo\n")
    (source / "b.txt").write_text("three\n")
    casparian.run("scan", "--drain")
    (source / "a.txt").write_text("one\nnew\n")
    done = casparian.run("scan", "--drain", code=1)
    assert "1 job held" in done.stdout
    assert "failed" not in done.stderr
    assert "in/a.txt, version 2: column rabatt is new" in done.stderr
    return casparian


def state(casparian: Casparian, *, held: int, failed: int = 0) -> None:
    """Every place that counts held versions says so many."""
    counted = casparian.json("status")["jobs"]
    assert counted.get("held", 0) == held
    assert counted.get("FAILED", 0) == failed
    assert len(casparian.json("jobs", "--held")) == held
    assert len(casparian.json("jobs", "--status", "held")) == held
    assert len(casparian.json("jobs", "--status", "FAILED")) == failed
    words = [line.split()[1] for line in casparian.out("jobs").splitlines()[1:]]
    assert words.count("HELD") == held
    assert words.count("FAILED") == failed
    check = casparian.run("status", "--check", code=1 if held or failed else 0)
    assert (" held, such as" in check.stderr) == bool(held)
    reasons = casparian.json("status")["reasons"]
    assert sum(row["jobs"] for row in reasons if row["status"] == "HELD") == held
    holds(casparian)


def test_a_held_version_is_no_failure_and_the_rows_before_it_stay(
    held: Casparian, source: Path
) -> None:
    state(held, held=1)
    (job,) = held.json("jobs", "--held")
    assert (job["status"], job["failure"]) == ("FAILED", "held")
    assert (job["reason"], job["attempts"]) == ("held: column rabatt is new", 1)
    shown = held.json("jobs", "show", str(job["id"]))
    (attempt,) = shown["attempt_log"]
    assert (attempt["fault"], attempt["log"]) == ("Held", "")
    document = held.json("status")
    assert document["rows"] == 3
    assert document["stale"] == {"files": 1, "rows": 2, "rejects": 0}
    (source / "c.txt").write_text("four\n")
    later = held.run("scan", "--drain")
    assert "1 version is held since earlier runs" in later.stderr
    assert "0 jobs queued" in held.out("jobs", "retry", "--failed")
    assert "cannot be combined" in held.err("jobs", "--held", "--status", "FAILED", code=2)


@pytest.mark.slow
def test_it_closes_when_the_version_succeeds_under_another_artifact(held: Casparian) -> None:
    wider = HOLDS.replace('"new" in lines', "False")
    held.run("publish", held.plugin("table", wider), "--version", "1.0.1")
    state(held, held=1)
    held.run("backfill", "table", "--redo", "--path", "a.txt")
    held.run("scan", "--drain")
    state(held, held=0)
    (job,) = held.json("jobs", "--status", "mended")
    assert job["reason"] == "held: column rabatt is new"
    assert held.json("status")["stale"]["files"] == 0


@pytest.mark.slow
def test_it_closes_when_a_later_version_fits(held: Casparian, source: Path) -> None:
    (source / "a.txt").write_text("one\n")
    held.run("scan", "--drain")
    state(held, held=0)


@pytest.mark.slow
def test_a_retry_holds_it_again_and_a_person_may_dismiss_it(held: Casparian) -> None:
    (job,) = held.json("jobs", "--held")
    held.run("jobs", "retry", str(job["id"]))
    held.run("scan", "--drain", code=1)
    state(held, held=1)
    held.run("jobs", "dismiss", str(job["id"]))
    state(held, held=0)


@pytest.mark.slow
def test_it_waits_although_its_file_is_gone(held: Casparian, source: Path) -> None:
    (source / "a.txt").unlink()
    held.run("scan")
    state(held, held=1)


def test_no_other_error_is_held_whatever_it_says(held: Casparian, source: Path) -> None:
    (source / "b.txt").write_text("fake\n")
    held.run("scan", "--drain", code=1)
    (job,) = held.json("jobs", "--status", "FAILED")
    assert job["failure"] == "open"
    assert job["reason"].startswith("plugin table 1.0.0: ValueError: held: I want attention")
    state(held, held=1, failed=1)
