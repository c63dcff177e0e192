"""`casparian try`: what a plugin makes of a file, without a trace."""

from __future__ import annotations

import signal
import sqlite3
from contextlib import closing
from pathlib import Path

from tests.commands import Casparian
from tests.eventually import wait_until
from tests.plugs import REJECTS, plugin

SLEEPS = plugin(
    'pattern="*.txt", topic="lines"',
    """
    print("asleep", flush=True)
    time.sleep(3600)
    """,
    imports="time",
)


def everything(casparian: Casparian) -> list[str]:
    """The ledger as text."""
    with closing(sqlite3.connect(casparian.folder / "casparian_flow.sqlite3")) as ledger:
        return list(ledger.iterdump())


def trials(casparian: Casparian) -> list[Path]:
    return list((casparian.folder / ".casparian" / "casparian_flow.sqlite3.trials").glob("*"))


def test_a_plugin_is_tried_on_a_file_and_leaves_no_trace(
    casparian: Casparian, source: Path
) -> None:
    (source / "a.txt").write_text("one\n!two\nthree\nfour\n")
    before = everything(casparian)
    file = casparian.plugin("shouts", REJECTS)
    found = casparian.json("try", f"./{file.name}", source / "a.txt", "--rows", "2")
    assert found["would"] == "complete"
    assert found["file"] == "in/a.txt"
    assert found["topics"]["lines"] == {
        "rows": 3, "columns": {"line": "string"}, "first": [{"line": "one"}, {"line": "three"}],
    }  # fmt: skip
    assert found["topics"]["lines_rejects"]["first"] == [
        {"line": 2, "reason": "it shouts", "raw": "!two"}
    ]
    assert everything(casparian) == before
    assert not trials(casparian)
    assert not (casparian.folder / "output").exists()


def test_a_published_plugin_is_tried_on_an_older_version(
    casparian: Casparian, source: Path
) -> None:
    casparian.run("publish", casparian.plugin("shouts", REJECTS), "--version", "2.1.0")
    (source / "a.txt").write_text("one\n")
    casparian.run("scan", "--drain")
    (source / "a.txt").write_text("other\n")
    casparian.run("scan", "--drain")
    old = casparian.json("try", "shouts", "in/a.txt", "--version", "1")
    now = casparian.json("try", "shouts", "in/a.txt")
    assert old["version"] == "2.1.0"
    assert [row["line"] for row in old["topics"]["lines"]["first"]] == ["one"]
    assert [row["line"] for row in now["topics"]["lines"]["first"]] == ["other"]
    (source / "a.txt").unlink()
    assert casparian.json("try", "shouts", "in/a.txt")["topics"] == now["topics"]


def test_what_a_job_would_fail_for_ends_with_1(casparian: Casparian, source: Path) -> None:
    casparian.plugin("shouts", REJECTS)
    (source / "raises.txt").write_text("one\nraise\n")
    (source / "rejects.txt").write_text("!one\n")
    raised = casparian.json("try", "./shouts.py", source / "raises.txt", code=1)
    assert raised["would"] == "fail"
    assert "told to" in raised["error"] and "Traceback" in raised["log"]
    rejects = casparian.json("try", "./shouts.py", source / "rejects.txt", code=1)
    assert "no row" in rejects["error"]
    assert rejects["topics"]["lines_rejects"]["rows"] == 1
    assert "would fail" in casparian.err("try", "./shouts.py", source / "rejects.txt", code=1)


def test_what_is_not_there_cannot_be_tried(casparian: Casparian, source: Path) -> None:
    casparian.plugin("shouts", REJECTS)
    (source / "a.txt").write_text("one\n")
    assert "plugins list" in casparian.err("try", "shouts", source / "a.txt", code=66)
    casparian.err("try", "./shouts.py", source / "b.txt", code=66)
    casparian.err("try", "./absent.py", source / "a.txt", code=65)


def test_what_a_killed_trial_left_is_removed_by_the_next(
    casparian: Casparian, source: Path
) -> None:
    casparian.plugin("shouts", REJECTS)
    (source / "a.txt").write_text("one\n")
    assert casparian.killed("trial.folder_made", "try", "./shouts.py", str(source / "a.txt"))
    assert len(trials(casparian)) == 1
    casparian.run("try", "./shouts.py", source / "a.txt")
    assert not trials(casparian)


def test_an_interrupted_trial_ends_its_guest_and_removes_its_folder(
    casparian: Casparian, source: Path
) -> None:
    casparian.plugin("sleeps", SLEEPS)
    (source / "a.txt").write_text("one\n")
    with casparian.start("try", "./sleeps.py", str(source / "a.txt")) as process:
        placed = "*/*/in/a.txt"
        folder = casparian.folder / ".casparian" / "casparian_flow.sqlite3.trials"
        wait_until(lambda: list(folder.glob(placed)), 120)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert not trials(casparian)
