"""Mode replace and `casparian retract`, from the command line: what a reader of the sink sees."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.commands import Casparian, asked, holds
from tests.plugs import QUIET, ROWS, plugin

OURS = "sqlite:///out.sqlite3"


def lines(casparian: Casparian) -> list[str]:
    """What stands in the sink, read without us."""
    with closing(sqlite3.connect(casparian.folder / "out.sqlite3")) as connection:
        return sorted(row[0] for row in connection.execute("SELECT line FROM lines"))


def states(casparian: Casparian) -> dict[tuple[str, int], str]:
    rows = casparian.json("outputs", "list")
    return {(row["rel_path"], row["version"]): row["state"] for row in rows}


@pytest.fixture
def replacing(casparian: Casparian, source: Path) -> Casparian:
    casparian.run("publish", casparian.plugin("rows", QUIET), "--version", "1.0.0")
    casparian.run("topics", "set", "rows", "lines", OURS, "--mode", "replace")
    return casparian


def test_a_history_under_replace_is_the_file_after_every_commit(
    replacing: Casparian, source: Path
) -> None:
    (source / "b.txt").write_text("b1\nb2\n")
    history = ["a1\na2\n", "", "a4\na5\na6\n", "a4\n"]
    for number, content in enumerate(history, 1):
        (source / "a.txt").write_text(content)
        replacing.run("scan", "--drain")
        assert lines(replacing) == sorted([*content.split(), "b1", "b2"])
        assert asked(replacing) == lines(replacing)
        worked = "".join(history[:number]).split()
        assert asked(replacing, "lines_history") == sorted([*worked, "b1", "b2"])
        wanted = {("a.txt", n): "PAST" for n in range(1, number)}
        assert states(replacing) == wanted | {("a.txt", number): "CURRENT",
                                              ("b.txt", 1): "CURRENT"}  # fmt: skip
    holds(replacing)
    (topic,) = replacing.json("topics", "list")
    assert (topic["mode"], topic["outputs"], topic["rows"]) == ("replace", 2, 3)
    (job,) = {row["job"] for row in replacing.json("outputs", "list") if row["version"] == 2}
    assert replacing.json("jobs", "show", str(job))["outputs"][0]["state"] == "PAST"
    for verb in ("forget", "restore"):
        assert "unchanged" in replacing.err("outputs", verb, str(job), code=1)


def test_a_file_is_retracted_and_comes_back(casparian: Casparian, source: Path) -> None:
    casparian.run("publish", casparian.plugin("rows", ROWS), "--version", "1.0.0")
    casparian.run("topics", "set", "rows", "lines", OURS)
    for content in ("a1\n", "a2\na3\n"):
        (source / "a.txt").write_text(content)
        (source / "b.txt").write_text("b1\n")
        casparian.run("scan", "--drain")
    said = casparian.out("retract", "in/a.txt")
    assert "retracted: 1 row of a.txt version 1" in said
    assert "retracted: 2 rows of a.txt version 2" in said
    assert lines(casparian) == asked(casparian, "lines_history") == ["b1"]
    holds(casparian)
    wanted = {("a.txt", 1): "RETRACTED", ("a.txt", 2): "RETRACTED", ("b.txt", 1): "CURRENT"}
    assert states(casparian) == wanted
    assert "in/a.txt has no visible rows" in casparian.err("retract", "in/a.txt", code=66)
    (job,) = {row["job"] for row in casparian.json("outputs", "list") if row["version"] == 2}
    for verb in ("forget", "restore"):
        assert "casparian retract --undo" in casparian.err("outputs", verb, str(job), code=1)
    second = next(v for v in casparian.json("versions", "in/a.txt") if v["version"] == 2)
    version = str(second["version_id"])
    assert "reinstated: 2 rows" in casparian.out("retract", version, "--undo")
    assert lines(casparian) == ["a2", "a3", "b1"]
    casparian.run("retract", source / "a.txt", "--undo")
    assert lines(casparian) == ["a1", "a2", "a3", "b1"]
    casparian.run("retract", version)
    assert lines(casparian) == ["a1", "b1"]
    assert "nowhere has no published outputs" in casparian.err("retract", "nowhere", code=66)
    actions = [row["action"] for row in casparian.json("audit", "show", "--limit", "99")]
    assert actions.count("retract") == 3
    assert actions.count("reinstate") == 2
    holds(casparian)


@pytest.mark.slow
def test_a_mode_also_counts_for_what_was_published_before(
    casparian: Casparian, source: Path
) -> None:
    casparian.run("publish", casparian.plugin("rows", ROWS), "--version", "1.0.0")
    casparian.run("topics", "set", "rows", "lines", OURS)
    (source / "a.txt").write_text("a1\n")
    casparian.run("scan", "--drain")
    (source / "a.txt").write_text("a2\n")
    casparian.run("scan", "--drain")
    assert lines(casparian) == ["a1", "a2"]
    done = casparian.out("topics", "set", "rows", "lines", OURS, "--mode", "replace")
    assert "1 output (1 row) is hidden now" in done
    assert lines(casparian) == ["a2"]
    (source / "a.txt").write_text("a3\n")
    casparian.run("scan", "--drain")
    assert lines(casparian) == asked(casparian) == ["a3"]
    done = casparian.out("topics", "set", "rows", "lines", OURS)
    assert "2 outputs (2 rows) are visible now" in done
    assert lines(casparian) == ["a1", "a2", "a3"]
    holds(casparian)
    assert "no mode 'upsert'" in casparian.err(
        "topics", "set", "rows", "lines", OURS, "--mode", "upsert", code=78
    )


def test_a_lost_ledger_does_not_show_again_what_was_retracted_or_replaced(
    replacing: Casparian, source: Path
) -> None:
    for content in ("a1\n", "a2\n"):
        (source / "a.txt").write_text(content)
        (source / "b.txt").write_text("b1\n")
        replacing.run("scan", "--drain")
    replacing.run("retract", "in/b.txt")
    for file in replacing.folder.glob("casparian_flow.sqlite3*"):
        file.unlink()
    replacing.run("source", "add", source, "--settle", "0")
    replacing.run("publish", replacing.folder / "rows.py", "--version", "1.0.0")
    replacing.run("topics", "set", "rows", "lines", OURS, "--mode", "replace")
    replacing.run("scan", "--drain")
    assert lines(replacing) == asked(replacing) == ["a2"]
    assert {state for (path, _), state in states(replacing).items() if path == "b.txt"} == {
        "RETRACTED"
    }
    holds(replacing)
    replacing.run("retract", "in/b.txt", "--undo")
    assert lines(replacing) == asked(replacing) == ["a2", "b1"]
    holds(replacing)


@pytest.mark.parametrize("at", ["retract.decided", "telling.told"])
@pytest.mark.slow_but("retract.decided")
def test_a_crash_between_the_ledger_and_the_sink_is_rolled_forward(
    replacing: Casparian, source: Path, at: str
) -> None:
    (source / "a.txt").write_text("a1\n")
    replacing.run("scan", "--drain")
    assert replacing.killed(at, "retract", "in/a.txt")
    assert "does not know yet" in replacing.json("verify", code=1)["problems"][-1]
    assert states(replacing) == {("a.txt", 1): "RETRACTED"}
    (source / "b.txt").write_text("b1\n")
    replacing.run("scan", "--drain")  # its daemon rolls forward
    assert lines(replacing) == ["b1"]
    assert replacing.killed(at, "retract", "in/a.txt", "--undo")
    assert "reinstated: 1 row" in replacing.out("retract", "in/a.txt", "--undo")
    assert "in/a.txt has no retracted rows" in replacing.err(
        "retract", "in/a.txt", "--undo", code=66
    )
    assert lines(replacing) == ["a1", "b1"]
    holds(replacing)


@pytest.mark.slow
def test_a_version_is_retracted_while_a_job_of_its_file_is_at_work(
    replacing: Casparian, source: Path
) -> None:
    (source / "a.txt").write_text("a1\n")
    replacing.run("scan", "--drain")
    (source / "a.txt").write_text("a2\n")
    assert replacing.killed("committer.decided", "scan", "--drain")
    assert "retracted: 1 row of a.txt version 1" in replacing.out("retract", "in/a.txt")
    assert lines(replacing) == []
    replacing.run("scan", "--drain")
    assert lines(replacing) == ["a2"]
    assert states(replacing) == {("a.txt", 1): "RETRACTED", ("a.txt", 2): "CURRENT"}
    holds(replacing)


def test_a_name_that_two_files_have_retracts_neither(
    casparian: Casparian, source: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    casparian.run("source", "add", str(other))
    casparian.run("publish", casparian.plugin("rows", ROWS), "--version", "1.0.0")
    for folder in (source, other):
        (folder / "a.txt").write_text(f"{folder.name}\n")
    casparian.run("scan", "--drain")
    both = sorted([source.name, other.name])
    assert "absolute path" in casparian.err("retract", "a.txt", code=1)
    assert asked(casparian) == both
    casparian.run("retract", str(other / "a.txt"))
    assert asked(casparian) == [source.name]
    casparian.run("retract", "--undo", "other/a.txt")
    assert asked(casparian) == both
    holds(casparian)


TWO_TOPICS = plugin(
    'pattern="*.txt", topic=["lines", "empty"]',
    """
        table = pa.table({"line": pa.array(open(file_path).read().split(), pa.string())})
        self.publish("lines", table)
    """,
)


def test_what_is_said_of_outputs_names_topics_and_no_place_that_is_ours(
    casparian: Casparian, source: Path
) -> None:
    casparian.run("publish", casparian.plugin("rows", TWO_TOPICS))
    casparian.run("topics", "set", "rows", "lines", "parquet://one", "sqlite:///two.sqlite3")
    (source / "a.txt").write_text("1 2")
    casparian.run("scan", "--drain")
    (commit,) = (row for row in casparian.json("audit", "show") if row["action"] == "commit")
    assert json.loads(commit["detail"]) == {
        "outputs": ["lines in parquet://one: 2 rows", "lines in sqlite:///two.sqlite3: 2 rows"]
    }
    targets = {row["topic"]: row["target"] for row in casparian.json("outputs", "list")}
    assert targets["empty"] == ""
    said = casparian.out("retract", "in/a.txt")
    assert said == "retracted: 2 rows of a.txt version 1 in topic lines\n"
    (kept,) = (casparian.folder / "one" / ".casparian" / "kept" / "lines").glob("*.parquet")
    content = kept.read_bytes()
    kept.unlink()
    done = casparian.run("retract", "in/a.txt", "--undo", code=1)
    assert "reinstated in the ledger, but readers do not see the change yet" in done.stderr
    assert "nothing was changed" not in done.stderr
    assert f"casparian outputs restore {commit['subject'].removeprefix('job ')}" in done.stderr
    kept.write_bytes(content)
    casparian.run("retract", "in/a.txt", "--undo")
    holds(casparian)
