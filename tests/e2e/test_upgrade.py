"""A ledger and its sinks, as the last release left them, under the code of today."""

from __future__ import annotations

import io
import os
import shutil
import sqlite3
import subprocess
import tarfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from casparian_flow.db import schema
from tests.commands import Casparian, holds, initialized
from tests.plugs import plugin

ROOT = Path(__file__).parents[2]
LAST = "1e3b28e"
"""The commit that landed last."""

SIZES = plugin(
    'pattern="*.txt", topic=["whole", "lite", "lite_rejects"]',
    """
        with open(file_path) as file:
            words = file.read().split()
        if "raise" in words:
            raise ValueError("told to")
        bad = [word for word in words if word.startswith("!")]
        good = [float(w) if "." in w else int(w) for w in words if w not in bad]
        if any(isinstance(value, float) for value in good):
            good = [float(value) for value in good]
        for topic in ("whole", "lite"):
            self.publish(topic, pa.table({"n": good}))
        if bad:
            self.publish("lite_rejects", pa.table({"raw": bad}))
    """,
)
FILES = {"a": "1 2", "b": "3", "gone": "4", "edited": "5", "bad": "raise", "some": "6 !six"}
SQLITE = "sqlite:///lite.sqlite3"


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """The package as it was then."""
    packed = subprocess.run(
        ["git", "-C", ROOT, "archive", LAST, "casparian_flow"], capture_output=True, check=False
    )
    if packed.returncode:
        pytest.skip(f"commit {LAST} is not in the history here: {packed.stderr.decode()}")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(tmp_path / "before", filter="data")
    return tmp_path / "before"


def rows(folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Every row that a reader of the sinks sees, without asking us."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    for file in sorted((folder / "output").glob("[!.]*/*.parquet")):
        table = pq.read_table(file, partitioning=None)
        found.setdefault(file.parent.name, []).extend(tuple(r.values()) for r in table.to_pylist())
    with closing(sqlite3.connect(f"file:{folder}/lite.sqlite3?mode=ro", uri=True)) as sink:
        for name in ("lite", "lite_rejects"):
            found[name] = sink.execute(f"SELECT * FROM {name}").fetchall()
    return {name: sorted(each, key=repr) for name, each in found.items()}


def worked_before(before: Casparian, today: Casparian, source: Path) -> None:
    """Versions of each kind: worked, edited, gone, failed, with rejects, retracted."""
    before.process("source", "add", source, "--settle", "0")
    before.process("publish", today.plugin("sizes", SIZES), "--version", "1.0.0")
    for topic in ("lite", "lite_rejects"):
        before.process("topics", "set", "sizes", topic, SQLITE, "--mode", "replace")
    for name, words in FILES.items():
        (source / f"{name}.txt").write_text(words)
    before.process("scan", "--drain", code=1)
    (source / "edited.txt").write_text("7 8")
    (source / "gone.txt").unlink()
    before.process("scan", "--drain")
    before.process("retract", "source/b.txt")


def killed_now_and_then(today: Casparian) -> int:
    """Die at the first, second, fourth, ... statement of the upgrade, from the same ledger each
    time; how often. tests/db/test_disaster.py dies at each.
    """
    database = today.folder / "casparian_flow.sqlite3"
    kept = database.with_suffix(".kept")
    shutil.copy(database, kept)
    times = 0
    while today.killed(f"schema.statement_run:{1 << times}", "rules", "list"):
        with closing(sqlite3.connect(database)) as left_over:
            (version,) = left_over.execute("PRAGMA user_version").fetchone()
        assert version < len(schema.migrations())
        for left in ("-wal", "-shm"):
            database.with_name(database.name + left).unlink(missing_ok=True)
        shutil.copy(kept, database)
        times += 1
    kept.unlink()
    return times


@pytest.mark.slow
def test_what_the_last_release_left_is_whole_under_todays_code(code: Path, tmp_path: Path) -> None:
    today = initialized(tmp_path / "flow")
    for file in today.folder.glob("casparian_flow.sqlite3*"):
        file.unlink()
    before = Casparian(today.folder, {**os.environ, "PYTHONPATH": str(code)})
    source = tmp_path / "source"
    source.mkdir()
    worked_before(before, today, source)
    there = rows(today.folder)
    assert {name: len(each) for name, each in there.items()} == {
        "whole": 7, "lite": 6, "lite_rejects": 1,
    }  # fmt: skip

    assert killed_now_and_then(today) > 3
    today.run("upgrade")
    holds(today)
    assert rows(today.folder) == there
    assert today.json("status")["jobs"] == {"COMPLETED": 6, "FAILED": 1}
    (rule,) = today.json("rules", "list")
    assert rule["case"] == "exact"
    today.run("scan", "--drain")
    today.run("backup", tmp_path / "copy")
    assert rows(today.folder) == there

    database = (today.folder / "casparian_flow.sqlite3").read_bytes()
    for command in (["status"], ["scan", "--drain"], ["verify"], ["start"]):
        assert "newer release" in before.process(*command, code=74).stderr
    assert (today.folder / "casparian_flow.sqlite3").read_bytes() == database

    today.run("publish", today.plugin("sizes", SIZES + "\n# 2\n"), "--version", "1.1.0")
    assert "1 version skipped, since retracted" in today.out("backfill", "sizes", "--redo")
    (source / "drifts.txt").write_text("9 0.5")
    today.run("scan", "--drain", code=1)  # `raise` still does
    today.run("retract", "source/b.txt", "--undo")
    holds(today)
    for topic in ("whole", "lite"):
        asked = today.json("query", f"SELECT n FROM {topic} ORDER BY n")
        assert [row["n"] for row in asked] == [0.5, 1, 2, 3, 4, 6, 7, 8, 9]
    assert len(rows(today.folder)["lite"]) == 9
