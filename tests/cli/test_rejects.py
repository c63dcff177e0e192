"""Rejects are said aloud: counted everywhere, and a file that gives nothing else has failed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.commands import Casparian, asked, holds
from tests.eventually import wait_until
from tests.plugs import REJECTS


@pytest.fixture
def shouts(casparian: Casparian, source: Path) -> Casparian:
    """Lines that begin with `!` are rejects."""
    casparian.run("publish", casparian.plugin("rows", REJECTS), "--version", "1.0.0")
    return casparian


def test_a_file_of_nothing_but_rejects_is_failed_and_its_log_has_the_first_of_them(
    shouts: Casparian, source: Path
) -> None:
    (source / "bad.txt").write_bytes(b"!\x1b[2J\x00 \xff\n" + b"!no\n" * 30)
    done = shouts.run("scan", "--drain", code=1)
    assert "31 rejects and no row for lines" in done.stderr
    assert "\x1b" not in done.stderr
    (job,) = shouts.json("jobs", "--status", "FAILED")
    found = shouts.json("jobs", "show", str(job["id"]))
    (attempt,) = found["attempt_log"]
    assert (attempt["fault"], attempt["outcome"]) == ("OnlyRejects", "FAILED")
    lines = attempt["log"].splitlines()
    assert lines[0] == "31 rejects, not published; the first 20:"
    assert lines[1] == "rejected: line 1; reason it shouts; raw !\\x1b[2J\\x00 ÿ"
    assert lines[20] == "rejected: line 20; reason it shouts; raw !no"
    assert len(lines) == 21
    assert found["outputs"] == []
    assert not (shouts.folder / "output" / "lines_rejects").exists()
    holds(shouts)


def test_one_row_among_rejects_is_enough(shouts: Casparian, source: Path) -> None:
    (source / "a.txt").write_text("!no\nyes\n!no\n")
    (source / "empty.txt").write_text("")
    shouts.run("scan", "--drain")
    assert asked(shouts) == ["yes"]
    assert len(shouts.json("query", "SELECT * FROM lines_rejects")) == 2
    assert {job["status"] for job in shouts.json("jobs")} == {"COMPLETED"}


@pytest.mark.slow
def test_a_person_may_allow_that_nothing_but_rejects_comes(shouts: Casparian, source: Path) -> None:
    (source / "bad.txt").write_text("!no\n")
    shouts.run("scan", "--drain", code=1)
    assert "lines_rejects is a topic of rejects" in shouts.err(
        "topics", "set", "rows", "lines_rejects", "--allow-empty", code=78
    )
    assert "no topic 'nope'" in shouts.err(
        "topics", "set", "rows", "nope", "--allow-empty", code=66
    )
    assert "COMPLETED" in shouts.out("topics", "set", "rows", "lines", "--allow-empty")
    shouts.run("topics", "set", "rows", "lines", "sqlite:///other.db")
    allowed = {t["topic"]: t["may_be_empty"] for t in shouts.json("topics")}
    assert allowed == {"lines": True, "lines_rejects": False}, "a sink does not take it back"
    shouts.run("jobs", "retry", "--failed")
    shouts.run("scan", "--drain")
    assert len(shouts.json("query", "SELECT * FROM lines_rejects")) == 1
    assert "FAILED" in shouts.out("topics", "set", "lines", "--no-allow-empty")
    (source / "worse.txt").write_text("!no\n!no\n")
    shouts.run("scan", "--drain", code=1)
    noted = [e["detail"] for e in shouts.json("audit", "show") if e["action"] == "set-topic"]
    assert [detail for detail in noted if "allow_empty" in detail] == [
        '{"allow_empty": false}', '{"allow_empty": true}',
    ]  # fmt: skip
    holds(shouts)


@pytest.mark.slow
def test_whatever_else_fails_an_attempt_its_rejects_are_in_its_log(
    shouts: Casparian, source: Path
) -> None:
    (source / "a.txt").write_text("yes\n!no\nraise\n")
    shouts.run("scan", "--drain", code=1)
    (job,) = shouts.json("jobs")
    attempts = shouts.json("jobs", "show", str(job["id"]))["attempt_log"]
    assert [attempt["fault"] for attempt in attempts] == ["PluginFailed"] * 2
    for attempt in attempts:
        assert "rejected: line 2; reason it shouts; raw !no" in attempt["log"].splitlines()


def test_a_plugin_that_has_only_topics_of_that_name_makes_data(
    casparian: Casparian, source: Path
) -> None:
    only = REJECTS.replace('["lines", "lines_rejects"]', '"bank_rejects"').replace(
        '"lines_rejects"', '"bank_rejects"'
    )
    casparian.run("publish", casparian.plugin("bank", only), "--version", "1.0.0")
    (source / "a.txt").write_text("!one\n")
    casparian.run("scan", "--drain")
    assert len(casparian.json("query", "SELECT * FROM bank_rejects")) == 1


def test_rows_and_rejects_are_counted_and_versions_with_many_are_named(
    shouts: Casparian, source: Path
) -> None:
    (source / "few.txt").write_text("yes\n" * 99 + "!no\n")
    (source / "many.txt").write_text("yes\n" * 97 + "!no\n" * 3)
    done = shouts.run("scan", "--drain")
    assert "2 jobs COMPLETED; 196 rows, 4 rejects" in done.stdout
    named = "in/many.txt, version 1: 3 of 100 rejected (3.0 %)"
    assert named in done.stderr
    assert "few.txt" not in done.stderr
    status = shouts.json("status")
    assert (status["rows"], status["rejects"]) == (196, 4)
    (worst,) = status["rejected_most"]
    assert (worst["rel_path"], worst["rows"], worst["rejects"]) == ("many.txt", 97, 3)
    assert "output    196 rows, 4 rejects" in shouts.out("status")
    assert "many.txt" in shouts.out("status").partition("more than 1 % rejects")[2]
    jobs = {job["rel_path"]: (job["rows"], job["rejects"]) for job in shouts.json("jobs")}
    assert jobs == {"few.txt": (99, 1), "many.txt": (97, 3)}
    assert "3 (3.0 %)" in shouts.out("jobs")
    assert [job["rel_path"] for job in shouts.json("jobs", "--rejects")] == ["many.txt"]
    shouts.run("status", "--check")


@pytest.mark.slow
def test_a_daemon_counts_and_names_them_too(shouts: Casparian, source: Path) -> None:
    (source / "many.txt").write_text("yes\n" * 97 + "!no\n" * 3)
    with shouts.start("start") as daemon:
        wait_until(lambda: shouts.json("status")["jobs"] == {"COMPLETED": 1})
        daemon.send_signal(signal.SIGTERM)
        said = daemon.communicate(timeout=60)[1]
    assert said.splitlines()[-1] == "stopped: 1 completed, 97 rows, 3 rejects"
    assert said.count("rejects: in/many.txt, version 1: 3 of 100 rejected (3.0 %)") == 1


@pytest.mark.slow
def test_a_version_that_was_mended_is_named_no_more(shouts: Casparian, source: Path) -> None:
    (source / "a.txt").write_text("yes\n!no\n")
    shouts.run("scan", "--drain")
    assert len(shouts.json("status")["rejected_most"]) == 1
    (source / "a.txt").write_text("yes\nno\n")
    shouts.run("scan", "--drain")
    status = shouts.json("status")
    assert status["rejected_most"] == []
    assert (status["rows"], status["rejects"]) == (3, 1), "both versions stand in mode append"
    assert shouts.json("jobs", "--rejects") == []
    shouts.run("retract", "in/a.txt")
    status = shouts.json("status")
    assert (status["rows"], status["rejects"]) == (0, 0)


def test_a_topic_in_several_sinks_counts_once(shouts: Casparian, source: Path) -> None:
    for topic in ("lines", "lines_rejects"):
        shouts.run("topics", "set", "rows", topic, "parquet://one", "sqlite:///two.db")
    (source / "a.txt").write_text("yes\nyes\n!no\n")
    assert "2 rows, 1 reject\n" in shouts.out("scan", "--drain")
    status = shouts.json("status")
    assert (status["rows"], status["rejects"]) == (2, 1)
    (job,) = shouts.json("jobs")
    assert (job["rows"], job["rejects"]) == (2, 1)


def test_what_one_sink_replaced_and_another_shows_is_counted(
    shouts: Casparian, source: Path
) -> None:
    shouts.run("topics", "set", "rows", "lines", "parquet://one?mode=replace", "sqlite:///two.db")
    for content in ("a\nb\n", "c\n"):
        (source / "a.txt").write_text(content)
        shouts.run("scan", "--drain")
    assert len(asked(shouts, "lines_history")) == shouts.json("status")["rows"] == 3
