"""The Parquet sink's own promises: the file, its footer, its row groups, and what is in the way."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from casparian_flow.engine import sinks
from casparian_flow.engine.sinks.base import LINEAGE
from casparian_flow.engine.sinks.parts import COLUMNS_FILE, GROUP_ROWS
from casparian_flow.errors import SinkConflict, SinkUnavailable
from casparian_flow.protocol import Published, StagedOutput
from tests.sinks.columns_of_any_type import Sample, samples
from tests.sinks.stages import TOPIC, Place, claims


def target(place: Place, output: StagedOutput) -> Path:
    return place.home / "out" / TOPIC / f"{output.output_key[:32]}.parquet"


def test_the_file_is_named_by_the_output_key_and_says_so_inside(parquet: Place) -> None:
    output = parquet.sealed({"id": [1]}, job=7)
    (seen,) = parquet.publish(output)
    assert isinstance(seen, Published)
    assert seen.target == str(target(parquet, output))
    footer = pq.read_metadata(seen.target)
    assert {k: v for k, v in footer.metadata.items() if k.startswith(b"casparian.")} == {
        b"casparian.topic": TOPIC.encode(),
        b"casparian.output_key": output.output_key.encode(),
        b"casparian.mode": b"append",
        b"casparian.slot": output.slot.encode(),
        b"casparian.ordinal": b"1",
        b"casparian.job_id": b"7",
        b"casparian.file_version_id": b"107",
        b"casparian.source_hash": b"ab" * 32,
        b"casparian.plugin_version": b"1.2.3",
        b"casparian.rows": b"1",
        b"casparian.batches": b"1",
        b"casparian.attempt": b"a1",
    }
    lineage = list(pq.read_schema(seen.target))[-4:]
    assert [field.name for field in lineage] == list(LINEAGE)
    assert [str(field.type) for field in lineage] == ["int64", "int64", "string", "string"]
    assert footer.row_group(0).column(0).compression == "ZSTD"


def test_what_a_plugin_says_of_itself_never_reaches_the_footer(parquet: Place) -> None:
    schema = pa.schema([("id", pa.int64())], {"casparian.output_key": "forged", "pandas": "{}"})
    output = parquet.sealed(pa.record_batch([pa.array([1])], schema=schema))
    keys = pq.read_metadata(output.stage).metadata
    assert keys[b"casparian.output_key"] == output.output_key.encode()
    assert b"pandas" not in keys


def test_small_batches_become_large_row_groups(parquet: Place) -> None:
    stage = parquet.stage()
    batch = pa.record_batch({"id": [*range(64)]})
    count = 2 * GROUP_ROWS // 64 + 1
    for _ in range(count):
        stage.write(batch)
    (output,) = sinks.seal([stage])
    footer = pq.read_metadata(output.stage)
    groups = [footer.row_group(n).num_rows for n in range(footer.num_row_groups)]
    assert groups == [GROUP_ROWS, GROUP_ROWS, 64]
    assert output.rows == footer.num_rows == count * 64
    assert output.size_bytes == Path(output.stage).stat().st_size


def test_wide_rows_are_written_before_they_fill_the_memory(parquet: Place) -> None:
    stage = parquet.stage()
    batch = pa.record_batch({"blob": [os.urandom(4 << 20)]})
    for _ in range(17):
        stage.write(batch)
    assert stage.path.stat().st_size > 60 << 20
    stage.discard()


@settings(max_examples=80, deadline=None)
@given(sample=samples())
@pytest.mark.slow
def test_any_table_comes_back_as_it_was(sample: Sample) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Place("parquet", Path(folder))
        stage = place.stage()
        for batch in sample.batches():
            stage.write(batch)
        (seen,) = place.publish(*sinks.seal([stage]))
        assert isinstance(seen, Published)
        found = pq.read_table(seen.target).drop_columns(list(LINEAGE))
    expected = pa.Table.from_batches(sample.batches())
    assert found.cast(expected.schema).equals(expected)


def test_other_tools_read_the_whole_topic(parquet: Place) -> None:
    for job in range(1, 4):
        parquet.publish(parquet.sealed({"id": [job] * 10}, job))
    glob = str(parquet.home / "out" / TOPIC / "*.parquet")
    with duckdb.connect() as connection:
        counted = connection.execute(
            "SELECT _cf_job_id, count(*) FROM read_parquet(?) GROUP BY 1 ORDER BY 1", [glob]
        ).fetchall()
    assert counted == [(1, 10), (2, 10), (3, 10)]


def test_an_output_of_another_key_is_never_replaced(parquet: Place) -> None:
    mine, other = parquet.sealed({"id": [1]}), parquet.sealed({"id": [2]}, job=2)
    (seen,) = parquet.publish(other)
    assert isinstance(seen, Published)
    os.link(seen.target, target(parquet, mine))
    before = target(parquet, mine).read_bytes()
    (outcome,) = parquet.publish(mine)
    assert isinstance(outcome, SinkConflict)
    assert target(parquet, mine).read_bytes() == before


@pytest.mark.parametrize("thing", ["folder", "dangling symlink", "other rows"])
def test_whatever_is_in_the_way_stays(parquet: Place, thing: str) -> None:
    output = parquet.sealed({"id": [1]})
    path = target(parquet, output)
    path.parent.mkdir()
    if thing == "folder":
        path.mkdir()
    elif thing == "dangling symlink":
        path.symlink_to(parquet.home / "nowhere")
    else:
        os.link(parquet.sealed({"id": [1, 2]}, attempt="a2").stage, path)
    before = path.lstat()
    (outcome,) = parquet.publish(output)
    assert isinstance(outcome, SinkConflict)
    assert path.lstat().st_ino == before.st_ino
    assert Path(output.stage).exists()


def test_a_topic_on_another_filesystem_is_waited_for(parquet: Place) -> None:
    """There are no hard links across filesystems, as there are none on some."""
    elsewhere = Path("/dev/shm")
    output = parquet.sealed({"id": [1]})
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == parquet.home.stat().st_dev:
        pytest.skip("NOT PROVEN: a topic on another filesystem (/dev/shm is none here)")
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        (parquet.home / "out" / TOPIC).symlink_to(folder)
        (outcome,) = parquet.publish(output)
        assert [file.name for file in Path(folder).iterdir()] == [COLUMNS_FILE]
    assert isinstance(outcome, SinkUnavailable)
    assert "cannot link" in outcome.message
    assert "hard links" in outcome.hint


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("flipped byte", "its bytes have changed since it was published"),
        ("cut short", "its bytes have changed since it was published"),
        ("deleted", "the file is gone"),
        ("a folder", "its bytes have changed since it was published"),
    ],
)
def test_check_sees_harm(parquet: Place, harm: str, said: str) -> None:
    outputs = [parquet.sealed({"id": [1, 2]}, job) for job in (1, 2)]
    made = claims(outputs, parquet.publish(*outputs))
    assert parquet.sink.check(made) == []
    path = target(parquet, outputs[1])
    data = bytearray(path.read_bytes())
    path.unlink()
    match harm:
        case "flipped byte":
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        case "cut short":
            path.write_bytes(data[:-1])
        case "a folder":
            path.mkdir()
    (fault,) = parquet.sink.check(made)
    assert fault.startswith(f"{path}: {said}")
