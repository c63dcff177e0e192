"""A topic of Parquet as one dataset, by the readers that docs/sinks_parquet.md shows."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from casparian_flow.engine import sinks
from casparian_flow.engine.sinks import parts
from casparian_flow.engine.sinks.base import LINEAGE
from casparian_flow.protocol import State
from tests.sinks.stages import TOPIC, Place

PAGE = Path(__file__).parents[2] / "docs" / "sinks_parquet.md"
LINES = dict(re.findall(r"^```python\n# (\w+)\n(.+?)^```", PAGE.read_text("utf-8"), re.M | re.S))

OUTPUTS: list[dict[str, Any]] = [
    {"n": [1.5, None], "later": pa.nulls(2), "a": ["x", "y"]},
    {"a": ["z"], "n": [2], "more": [[1, 2]], "zone": pa.array([0], pa.timestamp("us", "UTC"))},
    {"later": ["now"], "more": [[]], "s": [{"f": True}]},
    {"whole": pa.array([7, -1], pa.int8()), "thin": pa.array([0.5, 2], pa.float32())},
    {"whole": [2**53, 300], "thin": [0.1, 4.0], "a": ["big", "small"]},
    {"whole": [0.5, None], "a": ["real", "none"]},
    {"a": [f"row {n}" for n in range(500)], "n": [*range(500)]},
]
"""Columns that come, stay away and change their type; the last output is large."""

COLUMNS = ["n", "later", "a", "more", "zone", "s", "whole", "thin", *LINEAGE]


@pytest.fixture
def topic(parquet: Place, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The topic's folder, with everything beside the data that is ever there."""
    monkeypatch.setattr(parts, "GROUP_ROWS", 200)
    for job, columns in enumerate(OUTPUTS, start=1):
        stage = parquet.stage(job, split_bytes=1)
        batch = pa.record_batch(columns)
        for start in range(0, batch.num_rows, 200):
            stage.write(batch.slice(start, 200))
        parquet.show(*sinks.seal([stage]))
    folder = parquet.home / "out" / TOPIC
    (folder / "._common_metadata.tmp").write_bytes(b"of somebody who died")
    taken_back = parquet.sealed(
        {"a": ["taken back"]}, job=1, key="taken back", slot="taken", attempt="a8"
    )
    parquet.tell(State.RETRACTED, *parquet.show(taken_back))
    parquet.sealed({"a": ["staged"]}, job=9)
    return folder


def rows_of(found: Any) -> list[dict[str, Any]]:
    """The rows as Python values, in one order."""
    if hasattr(found, "to_arrow_table"):
        found = found.to_arrow_table()
    elif hasattr(found, "to_arrow"):
        found = found.to_arrow()
    elif hasattr(found, "to_dict"):
        found = pa.Table.from_pandas(found, preserve_index=False)
    assert sorted(found.column_names) == sorted(COLUMNS)
    rows = found.select(COLUMNS).to_pylist()
    return sorted(rows, key=order)


def order(row: dict[str, Any]) -> tuple[Any, ...]:
    numbers = (row["n"], row["thin"])
    return row["_cf_job_id"], row["a"] or "", *(n if n and n == n else 0 for n in numbers)


def expected() -> list[dict[str, Any]]:
    rows = []
    for job, columns in enumerate(OUTPUTS, start=1):
        for row in pa.table(columns).to_pylist():
            lineage = dict(zip(LINEAGE, (job + 100, job, "ab" * 32, "1.2.3"), strict=True))
            rows.append({name: row.get(name) for name in COLUMNS} | lineage)
    return sorted(rows, key=order)


def test_the_page_shows_four_readers() -> None:
    assert list(LINES) == ["pandas", "pyarrow", "polars", "DuckDB"]


@pytest.mark.parametrize("reader", LINES)
def test_every_reader_sees_all_rows_and_columns(
    topic: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic.parent.rename(topic.parent.parent / "output")
    monkeypatch.chdir(topic.parent.parent)
    names: dict[str, Any] = {}
    exec(LINES[reader], names)
    found = rows_of(names["rows"])
    if reader == "pandas":  # which has one word for NaN and null
        found = [
            {name: None if value != value else value for name, value in row.items()}
            for row in found
        ]
    assert found == expected()


def test_nothing_else_begins_otherwise_than_with_a_dot_or_an_underscore(topic: Path) -> None:
    """What Spark and Hive read: files whose name, and whose folders' names, do not begin so."""
    data = {
        path.relative_to(topic)
        for path in topic.rglob("*")
        if path.is_file() and not path.name.startswith(("_", "."))
    }
    assert all(re.fullmatch(r"[0-9a-f]{32}(/part-\d{5})?\.parquet", str(path)) for path in data)
    assert len(data) == len(OUTPUTS) - 1 + 3
    assert {name for name in os.listdir(topic.parent) if name[0] not in "_."} == {TOPIC}
    assert (topic / "_common_metadata").is_file()


def test_readers_of_the_whole_sink_meet_no_other_file(topic: Path) -> None:
    """Neither the record nor what is kept or staged."""
    count = len(expected())
    columns = pq.read_schema(topic / "_common_metadata")
    assert ds.dataset(topic.parent, schema=columns).count_rows() == count
    question = (
        f"SELECT count(*) FROM read_parquet('{topic.parent}/*/*.parquet', union_by_name = true)"
    )
    large = len(OUTPUTS[-1]["a"])
    assert duckdb.sql(question).fetchall() == [(count - large,)]
