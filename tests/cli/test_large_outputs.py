"""An output of several files, from the command line, as the files show it."""

from __future__ import annotations

from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from casparian_flow.engine.sinks.parts import GROUP_ROWS
from tests.commands import Casparian, holds
from tests.plugs import ROWS


def lines(casparian: Casparian) -> list[str]:
    """What stands in the topic's folder, read without us."""
    folder = casparian.folder / "output" / "lines"
    schema = pq.read_schema(folder / "_common_metadata")
    table = ds.dataset(folder, schema=schema).to_table()
    return sorted(table.column("line").to_pylist()) if "line" in table.column_names else []


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
