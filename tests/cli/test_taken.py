"""A file that is a table's is not read by a plugin that takes any file of its kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.commands import Casparian, holds
from tests.plugs import CATCH_ALL, ROWS, table


@pytest.fixture
def any_text(casparian: Casparian, source: Path) -> Casparian:
    """A catch-all plugin has worked `sales_1.txt`; `sales_2.txt` waits for it, as does another."""
    casparian.run("publish", casparian.plugin("any_text", CATCH_ALL), "--version", "1.0.0")
    (source / "sales_1.txt").write_text("one\ntwo\n")
    casparian.run("scan", "--drain")
    (source / "sales_2.txt").write_text("three\n")
    (source / "notes.txt").write_text("four\n")
    casparian.run("scan")
    return casparian


def jobs(casparian: Casparian) -> dict[tuple[str, str], list[str]]:
    """Path and plugin -> the status of their jobs, in the order of the versions."""
    found: dict[tuple[str, str], list[str]] = {}
    for job in reversed(casparian.json("jobs", "--all")):
        found.setdefault((job["rel_path"], job["plugin"]), []).append(job["status"])
    return found


def rows_of(casparian: Casparian, plugin: str) -> int:
    (topic,) = [row for row in casparian.json("topics") if row["plugin"] == plugin]
    return int(topic["rows"])


def test_a_table_takes_its_files_and_what_was_read_before_stays(
    any_text: Casparian, source: Path
) -> None:
    any_text.run("publish", any_text.plugin("sales", table("sales", "sales_*.txt")))
    (source / "sales_1.txt").write_text("one\ntwo\nfive\n")
    (source / "sales_3.txt").write_text("six\n")
    any_text.run("scan", "--drain")
    assert jobs(any_text) == {
        ("sales_1.txt", "any_text"): ["COMPLETED"],
        ("sales_1.txt", "sales"): ["COMPLETED", "COMPLETED"],
        ("sales_2.txt", "any_text"): ["ABORTED"],
        ("sales_2.txt", "sales"): ["COMPLETED"],
        ("sales_3.txt", "sales"): ["COMPLETED"],
        ("notes.txt", "any_text"): ["COMPLETED"],
    }
    (aborted,) = any_text.json("jobs", "--status", "ABORTED")
    assert aborted["reason"] == "the file belongs to table sales"
    assert rows_of(any_text, "any_text") == 3
    said: dict[str, Any] = any_text.json("status")
    (found,) = said["tables"]
    assert (found["name"], found["files"], found["instead_of"]) == ("sales", 3, ["any_text"])
    assert found["left"] == [{"plugin": "any_text", "files": 1, "rows": 2, "rejects": 0}]
    assert said["stale"]["files"] == 0
    assert "2 rows of any_text stay" in any_text.err("status")
    assert any_text.run("status", "--check").stderr == ""
    kinds = {row["name"]: (row["kind"], row["yields_to"]) for row in any_text.json("plugins")}
    assert kinds == {"any_text": ("catch-all", "sales"), "sales": ("table", "")}
    files = {row["rel_path"]: row["table"] for row in any_text.json("files")}
    assert files["sales_3.txt"] == "sales (not any_text)"
    assert files["notes.txt"] == ""
    holds(any_text)


@pytest.mark.slow
def test_every_way_to_queue_jobs_asks_the_tables(any_text: Casparian, source: Path) -> None:
    any_text.run("publish", any_text.plugin("sales", table("sales", "sales_*.txt")))
    any_text.run("scan", "--drain")
    wider = any_text.plugin("any_text", CATCH_ALL.replace("errors=", "  errors="))
    any_text.run("publish", wider, "--version", "1.0.1")
    assert "1 job queued" in any_text.out("backfill", "any_text", "--redo")  # notes.txt
    any_text.run("scan", "--drain")
    any_text.run("plugins", "activate", "any_text", "1.0.0", "--reason", "a test")
    any_text.run("rebuild", "any_text")
    any_text.run("scan", "--drain")
    found = jobs(any_text)
    assert found["sales_1.txt", "any_text"] == ["COMPLETED"]
    assert found["sales_2.txt", "any_text"] == ["ABORTED"]
    assert ("sales_2.txt", "sales") in found
    assert rows_of(any_text, "any_text") == 3
    holds(any_text)


@pytest.mark.slow
def test_a_table_that_is_removed_gives_its_files_back(any_text: Casparian, source: Path) -> None:
    any_text.run("publish", any_text.plugin("sales", table("sales", "sales_*.txt")))
    any_text.run("scan", "--drain")
    (source / "sales_1.txt").write_text("older\n")
    any_text.run("scan", "--drain")
    (source / "sales_1.txt").write_text("newest\n")
    any_text.run("scan", "--drain")
    any_text.run("plugins", "disable", "sales", "--reason", "a test")
    any_text.run("scan", "--drain")  # the current versions
    found = jobs(any_text)
    assert found["sales_1.txt", "any_text"] == ["COMPLETED"] * 2
    assert found["sales_2.txt", "any_text"] == ["COMPLETED"]
    any_text.run("backfill", "any_text")  # and those before
    any_text.run("scan", "--drain")
    assert jobs(any_text)["sales_1.txt", "any_text"] == ["COMPLETED"] * 3
    assert any_text.json("status")["tables"] == []
    assert "sales" not in any_text.run("status").stderr
    holds(any_text)


def test_an_earlier_version_that_a_table_had_taken_is_backfilled(
    any_text: Casparian, source: Path
) -> None:
    any_text.run("publish", any_text.plugin("sales", table("sales", "sales_*.txt")))
    (source / "sales_2.txt").write_text("newest\n")
    any_text.run("scan", "--drain")
    any_text.run("plugins", "disable", "sales", "--reason", "a test")
    any_text.run("scan", "--drain")  # the current version
    assert jobs(any_text)["sales_2.txt", "any_text"] == ["ABORTED", "COMPLETED"]
    assert "1 job queued" in any_text.out("backfill", "any_text")
    any_text.run("scan", "--drain")
    assert jobs(any_text)["sales_2.txt", "any_text"] == ["COMPLETED", "COMPLETED"]
    assert "0 jobs queued" in any_text.out("backfill", "any_text")
    holds(any_text)


def test_a_failed_job_that_is_retried_yields_to_a_table(casparian: Casparian, source: Path) -> None:
    failing = CATCH_ALL.replace(
        "        self.publish", "        raise ValueError\n        self.publish"
    )
    casparian.run("publish", casparian.plugin("any_text", failing), "--version", "1.0.0")
    (source / "sales_1.txt").write_text("one\n")
    casparian.run("scan", "--drain", code=1)
    casparian.run("publish", casparian.plugin("sales", table("sales", "sales_*.txt")))
    (job,) = casparian.json("jobs", "--status", "FAILED")
    casparian.run("jobs", "retry", str(job["id"]))
    casparian.run("scan", "--drain")
    found = casparian.json("jobs", "show", str(job["id"]))
    assert (found["status"], found["reason"]) == ("ABORTED", "the file belongs to table sales")
    assert jobs(casparian)["sales_1.txt", "sales"] == ["COMPLETED"]
    holds(casparian)


def test_a_table_of_one_source_root_leaves_the_others_alone(
    any_text: Casparian, source: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "sales_9.txt").write_text("nine\n")
    any_text.run("source", "add", str(other), "--name", "other")
    any_text.run("publish", any_text.plugin("sales", table("sales", "sales_*.txt", "other")))
    any_text.run("scan", "--drain")
    found = jobs(any_text)
    assert found["sales_9.txt", "sales"] == ["COMPLETED"]
    assert ("sales_9.txt", "any_text") not in found
    assert ("sales_2.txt", "sales") not in found
    assert found["sales_2.txt", "any_text"] == ["COMPLETED"]


@pytest.mark.slow
def test_a_plugin_that_is_no_catch_all_reads_beside_a_table(
    casparian: Casparian, source: Path
) -> None:
    casparian.run("publish", casparian.plugin("rows", ROWS))
    casparian.run("publish", casparian.plugin("sales", table("sales", "sales_*.txt")))
    (source / "sales_1.txt").write_text("one\n")
    casparian.run("scan", "--drain")
    assert set(jobs(casparian)) == {("sales_1.txt", "rows"), ("sales_1.txt", "sales")}
