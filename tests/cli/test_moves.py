"""Files that are renamed and moved, as a person does it: what readers see, and what it says."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from tests.commands import Casparian, asked, holds
from tests.eventually import wait_until
from tests.plugs import ROWS

URIS = {"parquet": "parquet://output?mode=append", "sqlite": "sqlite:///out.sqlite3?mode=replace"}


class Flow:
    """A plugin for `*.txt` into one sink."""

    def __init__(self, casparian: Casparian, source: Path, scheme: str) -> None:
        self.casparian, self.source, self.scheme = casparian, source, scheme
        casparian.run("publish", casparian.plugin("rows", ROWS), "--version", "1.0.0")
        casparian.run("topics", "set", "rows", "lines", URIS[scheme])

    def write(self, **lines: str) -> None:
        for name, line in lines.items():
            path = self.source / f"{name.replace('__', '/')}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{line}\n")

    def drain(self) -> None:
        self.casparian.run("scan", "--drain")

    def seen(self) -> list[str]:
        """What a reader of the sink sees; `casparian query` says the same."""
        folder = self.casparian.folder
        if self.scheme == "sqlite":
            with closing(sqlite3.connect(folder / "out.sqlite3")) as connection:
                return sorted(row[0] for row in connection.execute("SELECT line FROM lines"))
        files = sorted(map(str, (folder / "output" / "lines").glob("[!_]*.parquet")))
        return sorted(ds.dataset(files).to_table(["line"])["line"].to_pylist()) if files else []

    def shows(self, *lines: str) -> None:
        assert self.seen() == asked(self.casparian) == sorted(lines)

    def gone(self) -> dict[str, str]:
        rows = self.casparian.json("files", "--gone", "--all")
        return {row["rel_path"]: row["moved_to"] for row in rows}


@pytest.fixture(params=list(URIS))
def flow(request: pytest.FixtureRequest, casparian: Casparian, source: Path) -> Flow:
    return Flow(casparian, source, request.param)


def test_a_folder_that_is_renamed_takes_its_rows_along(flow: Flow) -> None:
    flow.write(day__a="one", day__b="two", c="three")
    flow.drain()
    (flow.source / "day").rename(flow.source / "night")
    said = flow.casparian.out("scan")
    assert "2 jobs queued" in said
    assert "2 moved" in said
    assert "deleted" not in said
    flow.shows("one", "three", "two")
    flow.drain()
    flow.shows("one", "three", "two")
    assert flow.gone() == {"day/a.txt": "in/night/a.txt", "day/b.txt": "in/night/b.txt"}
    assert "moved_to" in flow.casparian.out("files", "--gone")
    assert flow.casparian.json("status")["gone"] == {"files": 0, "rows": 0, "rejects": 0}
    assert flow.casparian.json("files", "--copies") == []
    (event,) = (e for e in flow.casparian.json("audit", "show") if e["action"] == "move")
    assert event["detail"] == '{"files": 2, "retracted": 0}'
    holds(flow.casparian)


def test_a_file_that_moves_back_has_its_rows_without_a_job(flow: Flow) -> None:
    flow.write(a="one")
    flow.drain()
    (flow.source / "a.txt").rename(flow.source / "b.txt")
    flow.drain()
    jobs = len(flow.casparian.json("jobs", "--all"))
    (flow.source / "b.txt").rename(flow.source / "a.txt")
    flow.casparian.run("scan")
    flow.shows("one")
    assert len(flow.casparian.json("jobs", "--all")) == jobs
    assert flow.gone() == {"b.txt": "in/a.txt"}
    flow.write(a="two")
    flow.drain()
    assert asked(flow.casparian) == ["two"]
    assert flow.seen() == (["two"] if flow.scheme == "sqlite" else ["one", "two"])
    holds(flow.casparian)


def test_a_retraction_goes_with_its_file_and_a_moved_file_is_not_deleted(flow: Flow) -> None:
    flow.casparian.run("source", "set", "in", "--on-delete", "retract")
    flow.write(a="one", b="two")
    flow.drain()
    flow.casparian.run("retract", "in/a.txt")
    for name in ("a", "b"):
        (flow.source / f"{name}.txt").rename(flow.source / f"{name}2.txt")
    flow.casparian.run("scan")
    flow.shows("two")
    flow.drain()
    flow.shows("two")
    flow.casparian.run("retract", "--undo", "in/a2.txt")
    flow.shows("one", "two")
    (flow.source / "b2.txt").unlink()
    flow.casparian.run("scan")
    flow.shows("one")
    holds(flow.casparian)


def test_a_file_that_moves_out_of_every_pattern_keeps_its_rows(flow: Flow) -> None:
    flow.write(a="one")
    flow.drain()
    (flow.source / "a.txt").rename(flow.source / "a.done")
    flow.drain()
    flow.shows("one")
    assert flow.gone() == {"a.txt": "in/a.done"}
    (flow.source / "a.done").rename(flow.source / "b.txt")
    flow.drain()
    flow.shows("one")
    holds(flow.casparian)


def test_a_copy_that_keeps_its_time_takes_over_when_the_original_goes(flow: Flow) -> None:
    flow.write(a="one")
    flow.drain()
    shutil.copy2(flow.source / "a.txt", flow.source / "b.txt")
    flow.drain()
    flow.shows("one", "one")
    (flow.source / "a.txt").unlink()
    flow.casparian.run("scan")
    flow.shows("one")
    assert flow.gone() == {"a.txt": "in/b.txt"}
    holds(flow.casparian)


@pytest.mark.parametrize("point", ["moves.written", "scan.batch_committed", "scan.vanished"])
def test_a_scan_that_is_killed_has_readers_see_each_row_once(
    casparian: Casparian, source: Path, point: str
) -> None:
    flow = Flow(casparian, source, "sqlite")
    flow.write(day__a="one", day__b="two")
    flow.drain()
    (flow.source / "day").rename(flow.source / "night")
    assert casparian.killed(point, "scan")
    flow.shows("one", "two")
    assert casparian.killed("committer.published", "scan", "--drain")
    assert set(flow.seen()) == {"one", "two"}
    assert len(flow.seen()) == 2
    flow.drain()
    flow.shows("one", "two")
    assert flow.gone() == {"day/a.txt": "in/night/a.txt", "day/b.txt": "in/night/b.txt"}
    holds(casparian)


def test_the_daemon_follows_a_folder_and_no_reader_sees_a_gap_or_a_double(
    casparian: Casparian, source: Path
) -> None:
    """With a settle time, as it is by default, and rows that would go with a deleted file."""
    flow = Flow(casparian, source, "sqlite")
    casparian.run("source", "set", "in", "--on-delete", "retract")
    lines = sorted(f"line {number}" for number in range(60))
    flow.write(**{f"day__{number}": line for number, line in enumerate(lines)})
    flow.drain()
    casparian.run("source", "set", "in", "--settle", "0.5")
    seen = []

    def all_moved() -> bool:
        seen.append(flow.seen() == lines)
        done = casparian.json("status")["jobs"].get("COMPLETED", 0)
        return bool(done == 120)

    with casparian.start("start") as daemon:
        (flow.source / "day").rename(flow.source / "night")
        wait_until(all_moved)
        daemon.terminate()
    assert all(seen)
    flow.shows(*lines)
    holds(casparian)
