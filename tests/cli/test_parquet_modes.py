"""Parquet from the command line: modes, retractions and large outputs, as files show them."""

from __future__ import annotations

from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from casparian_flow.engine.sinks.parts import GROUP_ROWS
from tests.commands import Casparian, asked, holds
from tests.plugs import QUIET, ROWS


def lines(casparian: Casparian) -> list[str]:
    """What stands in the topic's folder, read without us."""
    folder = casparian.folder / "output" / "lines"
    schema = pq.read_schema(folder / "_common_metadata")
    table = ds.dataset(folder, schema=schema).to_table()
    return sorted(table.column("line").to_pylist()) if "line" in table.column_names else []


@pytest.fixture
def replacing(casparian: Casparian, source: Path) -> Casparian:
    casparian.run("publish", casparian.plugin("rows", QUIET), "--version", "1.0.0")
    casparian.run("topics", "set", "rows", "lines", "parquet://output", "--mode", "replace")
    return casparian


@pytest.mark.slow
def test_a_history_under_replace_is_the_file_after_every_commit(
    replacing: Casparian, source: Path
) -> None:
    (source / "b.txt").write_text("b1\nb2\n")
    for content in ("a1\na2\n", "", "a4\n"):
        (source / "a.txt").write_text(content)
        replacing.run("scan", "--drain")
        assert lines(replacing) == sorted([*content.split(), "b1", "b2"])
    assert asked(replacing) == asked(replacing, "lines_history") == lines(replacing)
    assert len(list((replacing.folder / "output" / "lines").glob("*.parquet"))) == 2
    replacing.run("retract", "in/a.txt")
    assert lines(replacing) == asked(replacing) == ["b1", "b2"]
    for file in replacing.folder.glob("casparian_flow.sqlite3*"):
        file.unlink()  # the ledger is lost, and the sink says what is retracted
    replacing.run("source", "add", source, "--name", "in")
    replacing.run("publish", replacing.plugin("rows", QUIET), "--version", "1.0.0")
    replacing.run("topics", "set", "rows", "lines", "parquet://output", "--mode", "replace")
    replacing.run("scan", "--drain")
    assert lines(replacing) == asked(replacing) == ["b1", "b2"]
    holds(replacing)
    replacing.run("retract", "in/a.txt", "--undo")
    assert lines(replacing) == asked(replacing) == ["a4", "b1", "b2"]
    holds(replacing)


@pytest.mark.parametrize("at", ["parquet.replaced", "parquet.moved"])
@pytest.mark.slow_but("parquet.replaced")
def test_a_command_that_dies_is_made_good_by_the_next(
    replacing: Casparian, source: Path, at: str
) -> None:
    (source / "a.txt").write_text("a1\n")
    (source / "b.txt").write_text("b1\n")
    replacing.run("scan", "--drain")
    (source / "a.txt").write_text("a2\n")
    command = ["scan", "--drain"]
    if at == "parquet.moved":
        replacing.run(*command)
        command = ["retract", "in/a.txt"]
    assert replacing.killed(at, *command)
    replacing.run("scan", "--drain")
    wanted = ["b1"] if at == "parquet.moved" else ["a2", "b1"]
    assert lines(replacing) == asked(replacing) == wanted
    holds(replacing)


@pytest.mark.slow
def test_a_large_output_is_split_asked_verified_and_retracted(
    casparian: Casparian, source: Path
) -> None:
    configuration = casparian.folder / "global_config.toml"
    configuration.write_text(f"{configuration.read_text()}\n[output]\nsplit_bytes = 1000\n")
    casparian.run("publish", casparian.plugin("rows", ROWS), "--version", "1.0.0")
    (source / "large.txt").write_text("".join(f"{n:x}\n" for n in range(2 * GROUP_ROWS + 1)))
    (source / "small.txt").write_text("small\n")
    casparian.run("scan", "--drain")
    folder = casparian.folder / "output" / "lines"
    (large,) = (path for path in folder.iterdir() if path.is_dir())
    assert len(list(large.iterdir())) == 3
    assert len(lines(casparian)) == 2 * GROUP_ROWS + 2
    counted = casparian.json("query", "SELECT count(DISTINCT line) AS n FROM lines")
    assert counted == [{"n": 2 * GROUP_ROWS + 2}]
    holds(casparian)
    casparian.run("retract", "in/large.txt")
    assert lines(casparian) == ["small"]
    casparian.run("retract", "in/large.txt", "--undo")
    holds(casparian)
    (large / "part-00001.parquet").unlink()
    (problem,) = casparian.json("verify", code=1)["problems"]
    assert problem.startswith(f"{large}: its bytes have changed")
