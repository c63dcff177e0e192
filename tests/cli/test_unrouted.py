"""Files of which nothing is made: no plugin wants them, or they are still being written."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from casparian_flow.cli import context
from casparian_flow.services import scout
from tests.commands import Casparian
from tests.plugs import ROWS


def test_a_file_that_is_written_all_the_time_is_named_with_its_age(
    casparian: Casparian, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scout, "SETTLE_ROUNDS", 0)  # nobody waits an hour here
    casparian.run("source", "set", "in", "--settle", "3600")
    casparian.run("publish", casparian.plugin("rows", ROWS))
    (source / "x.log").write_text("1")
    first = casparian.run("scan", code=3)
    assert "in/x.log: still being written, " in first.stderr
    with closing(sqlite3.connect(casparian.folder / "casparian_flow.sqlite3")) as ledger, ledger:
        ledger.execute("UPDATE cf_unsettled SET first_seen = first_seen - 3 * 3600 - 5")
    again = casparian.run("scan", code=3)
    assert "in/x.log: still being written, first seen 3 h ago" in again.stderr
    status = casparian.json("status")
    (row,) = status["still_written"]
    assert (row["source"], row["rel_path"], row["seconds"] > 3 * 3600) == ("in", "x.log", True)
    assert "3 h" in casparian.out("status")
    # Nothing is known of what is in it: whether a plugin wants it is not asked yet.
    assert (status["still_written_in_all"], status["unrouted"]) == (1, 0)
    assert not any("match" in advice["words"] for advice in status["advice"])
    casparian.run("source", "set", "in", "--settle", "0")
    assert "1 file matches no plugin" in casparian.err("scan")
    status = casparian.json("status")
    assert (status["still_written"], status["unrouted"]) == ([], 1)


def test_files_that_no_plugin_wants_are_counted_and_listed(
    casparian: Casparian, source: Path
) -> None:
    for name in ("a.text", "b.dat", "c.txt"):
        (source / name).write_text(name)
    casparian.run("publish", casparian.plugin("rows", ROWS))
    scanned = casparian.run("scan", "--drain")
    assert "2 files match no plugin\n  try: casparian files --unrouted" in scanned.stderr
    assert "2 files match no plugin" in casparian.err("status")
    rows = casparian.json("files", "--unrouted")
    assert [(row["rel_path"], row["nearest"]) for row in rows] == [
        ("a.text", "rows *.txt"), ("b.dat", ""),
    ]  # fmt: skip
    limited = casparian.run("files", "--unrouted", "--limit", "1", "--source", "in")
    assert "rows *.txt" in limited.stdout
    assert "1 of 2" in limited.stderr
    assert "--gone" in casparian.err("files", "--unrouted", "--gone", code=2)
    casparian.run("rules", "add", "*", "plugin:rows")
    assert casparian.json("files", "--unrouted") == []
    assert casparian.json("status")["unrouted"] == 0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-5, "0 s"), (59.4, "59 s"), (60, "1 min"), (3600, "1 h"), (9e4, "25 h"), (172_800, "2 days")],
)
def test_ages(seconds: float, words: str) -> None:
    assert context.age(seconds) == words
