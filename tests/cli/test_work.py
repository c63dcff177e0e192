"""Publish, scan, look, ask, verify: the main job from the command line."""

from __future__ import annotations

import csv
import io
import signal
import sqlite3
import subprocess
from pathlib import Path

import pytest

from tests.commands import COMMAND, Casparian
from tests.daemons import said
from tests.plugs import BEHAVES, ROWS


def test_the_main_job_from_file_to_proof(shown: Casparian) -> None:
    asked = "SELECT line, _cf_job_id AS job FROM lines ORDER BY line"
    rows = shown.json("query", asked)
    assert [row["line"] for row in rows] == ["edited", "three"]
    job = shown.json("jobs", "show", str(rows[0]["job"]))
    assert (job["rel_path"], job["status"], job["version"]) == ("a.txt", "COMPLETED", 2)
    assert job["outputs"][0]["rows"] == 1
    assert job["attempt_log"][0]["outcome"] == "STAGED"
    first, second = shown.json("versions", "in/a.txt")
    assert second["content_hash"] == job["content_hash"]
    assert (first["current"], second["current"]) == (False, True)
    assert first["detected_at"].endswith("Z")
    assert shown.json("versions", "../in/a.txt") == [first, second]
    assert len(shown.json("query", "SELECT * FROM lines_history")) == 4
    assert shown.json("verify")["problems"] == []


def test_people_see_tables(shown: Casparian) -> None:
    assert "b\\n.txt" in shown.out("files")
    assert "COMPLETED" in shown.out("jobs", "--path", "a*", "--plugin", "rows")
    assert "jobs" in shown.err("jobs", "--status", "failed")
    assert "no problems found" in shown.out("verify")
    assert "parquet://output" in shown.out("status")
    assert "attempt 1: STAGED" in shown.out("jobs", "show", "1")
    done = shown.run("query", "SELECT * FROM lines_history", "--limit", "1")
    assert "1 of 4; --limit N or --all" in done.stderr


def test_every_reading_command_is_one_json_document(shown: Casparian) -> None:
    for words in ("source list", "rules list", "topics list", "plugins", "files", "jobs"):
        rows = shown.json(*words.split())
        assert isinstance(rows, list)
        assert rows
    status = shown.json("status")
    assert status["daemon"] is None
    assert status["jobs"] == {"COMPLETED": 3}
    assert status["advice"] == []
    assert [p["version"] for p in shown.json("plugins")] == ["1.0.0"]


@pytest.mark.slow
def test_publishing_twice_changes_nothing(filled: Casparian) -> None:
    file = filled.folder / "rows.py"
    assert "already" in filled.out("publish", file, "--version", "1.0.0")
    assert "deployed rows 1.0.1" in filled.out("publish", file)
    file.write_text(ROWS + "\n# edited\n")
    assert "already exists" in filled.err("publish", file, "--version", "1.0.0", code=65)


@pytest.mark.parametrize(
    ("plugin", "words"),
    [
        ("def f(:\n", "line 1"),
        ("class Handler: ...\n", "MANIFEST"),
        (ROWS.replace("class Handler", "class Reader"), "Handler"),
        (ROWS.replace('"*.txt"', "pattern()"), "line 5"),
        (ROWS.replace('topic="lines"', 'sinks={"lines": "ftp://x"}'), "ftp"),
        (ROWS + "import requests\n", "imports requests"),
    ],
)
def test_what_is_no_plugin_is_refused(casparian: Casparian, plugin: str, words: str) -> None:
    code = 78 if "ftp" in words else 65
    done = casparian.run("publish", casparian.plugin("bad", plugin), code=code)
    assert words in done.stderr
    assert casparian.json("plugins") == []


def test_failed_jobs_are_told_with_their_reason_and_can_be_retried(
    casparian: Casparian, source: Path
) -> None:
    casparian.run("publish", casparian.plugin("behaves", BEHAVES))
    (source / "a.do").write_text("raise")
    (source / "b.do").write_text("fine")
    done = casparian.run("scan", "--drain", code=1)
    assert "1 job COMPLETED, 1 job FAILED" in done.stdout
    assert "ValueError: no such thing" in done.stderr
    assert "1 job failed" in casparian.err("status")
    (failed,) = casparian.json("jobs", "--status", "failed")
    shown = casparian.out("jobs", "show", str(failed["id"]))
    assert "told to raise" in shown
    assert "fault: PluginFailed; memory: " in shown
    assert "0 jobs queued" in casparian.out("jobs", "retry", "--failed", "--path", "b*")
    assert "1 job queued" in casparian.out("jobs", "retry", "--failed")
    assert "1 job aborted" in casparian.out("jobs", "abort", str(failed["id"]))
    assert "is ABORTED" in casparian.err("jobs", "abort", str(failed["id"]), code=1)
    assert "job 99 does not exist" in casparian.err("jobs", "retry", "99", code=66)
    assert casparian.json("verify")["problems"] == []


def test_an_output_folder_that_cannot_be_written_is_named_and_waited_for(
    blocked: Casparian, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert str(blocked.folder / "output") in blocked.err("scan", "--drain", code=1)
    monkeypatch.undo()
    (blocked.folder / "output").unlink()
    assert "1 job COMPLETED" in blocked.out("scan", "--drain")


def test_a_root_that_is_gone_is_an_error_and_nothing_is_inferred(
    casparian: Casparian, source: Path
) -> None:
    (source / "a.txt").write_text("one")
    casparian.run("scan")
    source.rename(source.with_name("moved"))
    assert "No such file" in casparian.err("scan", code=66)
    assert casparian.json("files", "--gone") == []
    assert len(casparian.json("files")) == 1


def test_the_program_says_what_is_missing(casparian: Casparian, tmp_path: Path) -> None:
    assert "no source root" in casparian.err("status")
    assert "no plugin" in casparian.err("scan")
    folder = tmp_path / "in"
    folder.mkdir()
    casparian.run("source", "add", folder)
    assert "never scanned" in casparian.err("status")
    assert "no daemon" in casparian.err("wait", "--idle", code=75)
    assert "no file is known as x" in casparian.err("versions", "x", code=66)
    assert "job 7 does not exist" in casparian.err("jobs", "show", "7", code=66)


def test_queries_only_read(shown: Casparian) -> None:
    for question in ("COPY lines TO 'x.csv'", "SELECT 1; SELECT 2", "INSTALL httpfs", ""):
        assert "one SELECT" in shown.err("query", question, code=1)
    assert "topics with output: lines" in shown.err("query", "SELECT * FROM nope", code=66)
    assert "query failed" in shown.err("query", "SELECT nope FROM lines", code=1)
    assert not (shown.folder / "x.csv").exists()


def test_query_answers_in_every_form(shown: Casparian) -> None:
    asked = "SELECT 1 AS a, 'nan'::DOUBLE AS b, TIMESTAMPTZ '2024-01-31 12:00:00+00' AS c, [1] AS d"
    assert shown.json("query", asked) == [
        {"a": 1, "b": None, "c": "2024-01-31T12:00:00+00:00", "d": [1]}
    ]
    rows = list(csv.DictReader(io.StringIO(shown.out("query", "--csv", "SELECT * FROM lines"))))
    assert sorted(row["line"] for row in rows) == ["edited", "three"]
    assert shown.json("query", "SELECT line FROM lines WHERE false") == []
    words = shown.out("query", "SELECT 1234567.89 AS x, 'abc' AS made_at, 12 AS sold_at, true AS t")
    assert words.split() == ["x", "made_at", "sold_at", "t", "1234567.89", "abc", "12", "yes"]


def test_verify_finds_a_tampered_file_and_a_tampered_ledger(filled: Casparian) -> None:
    file = next((filled.folder / "output" / "lines").glob("*.parquet"))
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + b"x")
    verdict = filled.json("verify", code=1)
    assert [str(file) in problem for problem in verdict["problems"]] == [True]
    file.unlink()
    assert "is gone" in filled.out("verify", code=1)
    file.write_bytes(kept)
    ledger = sqlite3.connect(filled.folder / "casparian_flow.sqlite3")
    with ledger:
        ledger.execute("DROP TRIGGER cf_audit_no_update")
        ledger.execute("UPDATE cf_audit SET actor = 'nobody' WHERE seq = 2")
        ledger.execute("UPDATE cf_output SET rows = rows + 1 WHERE id = 1")
        ledger.execute("UPDATE cf_file_location SET current_version_id = 1")
    ledger.close()
    problems = "\n".join(filled.json("verify", code=1)["problems"])
    assert "audit row 2" in problems
    assert "current version" in problems
    assert "rows" in problems


def drop(source: Path, name: str, content: str) -> None:
    """Put a file there at once: without a settle window, one that was just created is a version."""
    made = source.with_name(name)
    made.write_text(content)
    made.rename(source / name)


def test_a_daemon_watches_works_and_stops(casparian: Casparian, source: Path) -> None:
    casparian.run("publish", casparian.plugin("rows", ROWS))
    with casparian.start("start", "--workers", "1") as daemon:
        said(daemon, f"watching in ({source})")
        assert f"process {daemon.pid}" in casparian.err("start", code=75)
        assert casparian.json("status")["daemon"]["role"] == "casparian start"
        drop(source, "a.txt", "one\n")
        casparian.run("wait", "--idle", "--timeout", "120")
        assert casparian.json("query", "SELECT line FROM lines") == [{"line": "one"}]
        assert "deployed other" in casparian.out(
            "publish", casparian.plugin("other", ROWS.replace('"lines"', '"more"'))
        )
        drop(source, "b.txt", "two\n")
        casparian.run("scan", "--drain")
        assert len(casparian.json("query", "SELECT line FROM more")) == 2
        daemon.send_signal(signal.SIGTERM)
        said(daemon, "stopped: 4 completed, 4 rows")
    assert daemon.returncode == 0
    assert casparian.json("verify")["problems"] == []


def test_a_closed_pipe_is_no_error(shown: Casparian) -> None:
    with subprocess.Popen(
        [*COMMAND, "query", "--csv", "SELECT range FROM range(1000000)"],
        cwd=shown.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == b"range\n"
        process.stdout.close()
        assert process.stderr.read() == b""
