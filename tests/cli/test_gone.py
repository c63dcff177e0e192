"""A deleted file's rows: they stay and are counted, or go with it until it is back."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from tests.commands import Casparian, Kept, asked, holds
from tests.eventually import wait_until
from tests.plugs import REJECTS, ROWS

URIS = {"parquet": "parquet://output", "sqlite": "sqlite:///out.sqlite3"}


class Flow:
    """Two files worked into one sink; `a.txt` had another content before."""

    def __init__(self, casparian: Casparian, source: Path, scheme: str) -> None:
        self.casparian = casparian
        self.source = source
        self.scheme = scheme
        casparian.run("publish", casparian.plugin("rows", ROWS), "--version", "1.0.0")
        casparian.run("topics", "set", "rows", "lines", URIS[scheme])
        self.write("a.txt", "old\n")
        self.drain()
        self.write("a.txt", "one\ntwo\n")
        self.write("b.txt", "three\n")
        self.drain()
        self.casparian.run("source", "set", "in", "--on-delete", "retract")

    def write(self, name: str, content: str) -> None:
        (self.source / name).write_text(content)

    def drain(self) -> None:
        self.casparian.run("scan", "--drain")

    def seen(self) -> list[str]:
        """What a reader of the sink sees."""
        folder = self.casparian.folder
        if self.scheme == "sqlite":
            with closing(sqlite3.connect(folder / "out.sqlite3")) as connection:
                return sorted(row[0] for row in connection.execute("SELECT line FROM lines"))
        files = sorted(map(str, (folder / "output" / "lines").glob("[!_]*.parquet")))
        return sorted(ds.dataset(files).to_table(["line"])["line"].to_pylist()) if files else []

    def jobs(self) -> int:
        return len(self.casparian.json("jobs", "--all"))


@pytest.fixture(params=list(URIS))
def flow(request: pytest.FixtureRequest, kept: Kept) -> Flow:
    return kept.begun(request.param, partial(Flow, scheme=request.param))


ALL = ["old", "one", "three", "two"]


def test_rows_go_with_their_file_and_come_back_with_it(flow: Flow) -> None:
    casparian = flow.casparian
    worked = flow.jobs()
    (flow.source / "a.txt").rename(flow.source.parent / "aside")
    said = casparian.out("scan")
    assert "1 deleted, 2 outputs (3 rows) are hidden now" in said
    assert flow.seen() == asked(casparian) == ["three"]
    assert casparian.json("status")["gone"] == {"files": 0, "rows": 0, "rejects": 0}
    holds(casparian)
    shutil.copyfile(flow.source.parent / "aside", flow.source / "a.txt")
    assert "2 outputs (3 rows) are visible now" in casparian.out("scan")
    assert flow.seen() == ALL
    assert flow.jobs() == worked
    holds(casparian)


def test_the_setting_also_counts_for_files_that_are_gone_already(flow: Flow) -> None:
    casparian = flow.casparian
    (flow.source / "a.txt").unlink()
    casparian.run("scan")
    said = casparian.out("source", "set", "in", "--on-delete", "keep")
    assert "1 file gone already: 2 outputs (3 rows) are visible now" in said
    assert flow.seen() == ALL
    assert casparian.json("status")["gone"] == {"files": 1, "rows": 3, "rejects": 0}
    assert "gone      3 rows of 1 file" in casparian.out("status")
    (row,) = casparian.json("files", "--gone")
    assert (row["rel_path"], row["rows"]) == ("a.txt", 3)
    assert row["gone_at"][:16] in casparian.out("files", "--gone")
    casparian.run("source", "remove", "in")
    said = casparian.out("source", "add", flow.source, "--on-delete", "retract")
    assert "2 outputs (3 rows) are hidden now" in said
    assert flow.seen() == ["three"]
    assert [root["on_delete"] for root in casparian.json("source", "list")] == ["retract"]
    assert "'drop'" in casparian.err("source", "set", "in", "--on-delete", "drop", code=66)
    holds(casparian)


def test_a_file_that_comes_back_with_another_content_is_worked(flow: Flow) -> None:
    (flow.source / "a.txt").unlink()
    flow.drain()
    flow.write("a.txt", "new\n")
    flow.drain()
    assert flow.seen() == ["new", *ALL]
    holds(flow.casparian)


def each(scan: str, parquet: str) -> pytest.MarkDecorator:
    """Each sink at each crash point: those of the scan, its own, those of who tells it."""
    points = {"parquet": parquet, "sqlite": "sql.change_written sql.changed"}
    cases = [
        (scheme, at)
        for scheme in URIS
        for at in f"{scan} {points[scheme]} telling.told telling.recorded".split()
    ]
    return pytest.mark.parametrize(("flow", "at"), cases, indirect=["flow"])


@each("scan.vanished", "parquet.recorded parquet.moved parquet.moved:2 parquet.settled")
@pytest.mark.slow_but("sqlite-scan.vanished")
def test_killed_while_rows_go(flow: Flow, at: str) -> None:
    (flow.source / "a.txt").unlink()
    assert flow.casparian.killed(at, "scan")
    flow.casparian.run("scan")
    assert flow.seen() == ["three"]
    holds(flow.casparian)


@each(
    "scan.hashed scan.batch_written scan.batch_committed",
    "parquet.recorded parquet.linked parquet.unkept parquet.linked:2 parquet.settled",
)
@pytest.mark.slow
def test_killed_while_rows_come_back(flow: Flow, at: str) -> None:
    (flow.source / "a.txt").unlink()
    flow.casparian.run("scan")
    worked = flow.jobs()
    flow.write("a.txt", "one\ntwo\n")
    assert flow.casparian.killed(at, "scan")
    flow.casparian.run("scan")
    assert flow.seen() == ALL
    assert flow.jobs() == worked
    holds(flow.casparian)


@pytest.mark.parametrize("at", ["changes.source_set", "telling.told"])
@pytest.mark.slow
def test_killed_while_the_setting_changes(flow: Flow, at: str) -> None:
    (flow.source / "a.txt").unlink()
    flow.casparian.run("scan")
    assert flow.casparian.killed(at, "source", "set", "in", "--on-delete", "keep")
    flow.casparian.run("scan")
    assert flow.seen() == ALL
    holds(flow.casparian)


@pytest.mark.slow
def test_a_mass_deletion_takes_no_rows_before_it_is_believed(flow: Flow) -> None:
    for number in range(120):
        flow.write(f"{number}.txt", "x\n")
    flow.drain()
    for file in flow.source.iterdir():
        file.unlink()
    flow.casparian.run("scan", code=3)
    assert len(flow.seen()) == 124
    said = flow.casparian.out("scan", "in", "--believe-deletions")
    assert "123 outputs (124 rows) are hidden now" in said
    assert flow.seen() == []
    holds(flow.casparian)


@pytest.mark.slow
def test_what_is_ignored_is_not_deleted(flow: Flow) -> None:
    flow.casparian.run("source", "set", "in", "--ignore", "a.txt")
    flow.casparian.run("scan")
    assert flow.seen() == ALL
    assert flow.casparian.json("status")["gone"]["rows"] == 3
    holds(flow.casparian)


@pytest.mark.slow
def test_a_daemon_tells_the_sinks_soon(flow: Flow) -> None:
    with flow.casparian.start("start") as daemon:
        wait_until(lambda: flow.casparian.json("status")["daemon"])
        (flow.source / "a.txt").unlink()
        flow.casparian.run("scan")
        wait_until(lambda: flow.seen() == ["three"])
        flow.write("a.txt", "one\ntwo\n")
        wait_until(lambda: flow.seen() == ALL)
        daemon.terminate()
    holds(flow.casparian)


def test_copies_of_a_deleted_file_are_named(casparian: Casparian, source: Path) -> None:
    casparian.run("publish", casparian.plugin("rows", ROWS))
    for name in ("a.txt", "empty.txt"):
        (source / name).write_text("one\n" if name == "a.txt" else "")
    casparian.run("scan", "--drain")
    for name in ("a.txt", "empty.txt"):
        shutil.copyfile(source / name, source / f"of {name}")
    casparian.run("scan", "--drain")
    assert casparian.json("files", "--copies") == []
    for name in ("a.txt", "empty.txt"):
        (source / name).unlink()
    said = casparian.err("scan")
    assert "1 file has the content of a deleted file: rows may be there twice" in said
    assert casparian.err("scan", "-q") == ""
    (row,) = casparian.json("files", "--copies")
    assert (row["rel_path"], row["copy_of"]) == ("of a.txt", "in/a.txt")
    assert "in/a.txt" in casparian.out("files", "--copies")
    assert "cannot be combined" in casparian.err("files", "--copies", "--gone", code=2)
    casparian.run("status", "--check")
    casparian.run("retract", "in/a.txt")
    assert casparian.json("files", "--copies") == []
    assert asked(casparian) == ["one"]


def test_rows_are_stale_while_a_newer_version_is_not_worked(
    casparian: Casparian, source: Path
) -> None:
    casparian.run("publish", casparian.plugin("rows", REJECTS))
    (source / "a.txt").write_text("one\ntwo\n!no\n")
    (source / "b.txt").write_text("three\n")
    casparian.run("scan", "--drain")
    assert casparian.json("status")["stale"]["files"] == 0
    (source / "a.txt").write_text("one\nraise\n")
    casparian.run("scan")
    assert casparian.json("status")["stale"] == {"files": 1, "rows": 2, "rejects": 1}
    casparian.run("scan", "--drain", code=1)
    assert casparian.json("status")["stale"] == {"files": 1, "rows": 2, "rejects": 1}
    (line,) = [line for line in casparian.out("status").splitlines() if line[:5] == "stale"]
    assert line == "stale     2 rows, 1 reject of 1 file whose newer version was not processed"
    (source / "a.txt").write_text("four\n")
    casparian.run("scan", "--drain")
    assert casparian.json("status")["stale"]["files"] == 0
    (source / "a.txt").write_text("raise\n")
    casparian.run("scan", "--drain", code=1)
    (source / "a.txt").unlink()
    casparian.run("scan")
    assert casparian.json("status")["stale"]["files"] == 0
    assert casparian.json("status")["gone"] == {"files": 1, "rows": 3, "rejects": 1}
