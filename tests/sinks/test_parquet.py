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
from casparian_flow.engine.sinks.parts import GROUP_ROWS
from casparian_flow.errors import SinkConflict, SinkUnavailable
from casparian_flow.protocol import Output
from tests.sinks.columns_of_any_type import Sample, samples
from tests.sinks.stages import TOPIC, Place


def target(place: Place, output: Output) -> Path:
    return place.home / "out" / TOPIC / f"{output.version_slot[:32]}.parquet"


def test_the_file_is_named_by_its_slot_and_says_what_it_is_inside(parquet: Place) -> None:
    output = parquet.sealed({"id": [1]}, job=7)
    (seen,) = parquet.show(output)
    assert seen.target == str(target(parquet, output))
    footer = pq.read_metadata(seen.target)
    assert {k: v for k, v in footer.metadata.items() if k.startswith(b"casparian.")} == {
        b"casparian.topic": TOPIC.encode(),
        b"casparian.output_key": output.output_key.encode(),
        b"casparian.mode": b"append",
        b"casparian.ordinal": b"1",
        b"casparian.source": b"inbox",
        b"casparian.path": b"7.csv".hex().encode(),
        b"casparian.size_bytes": b"10",
        b"casparian.artifact_hash": b"cd" * 32,
        b"casparian.plugin": b"tables",
        b"casparian.topics": b"",
        b"casparian.uri": parquet.location.encode(),
        b"casparian.job_id": b"7",
        b"casparian.file_version_id": b"107",
        b"casparian.source_hash": b"ab" * 32,
        b"casparian.plugin_version": b"1.2.3",
        b"casparian.rows": b"1",
        b"casparian.batches": b"1",
        b"casparian.attempt": b"a7",
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
        (seen,) = place.show(*sinks.seal([stage]))
        found = pq.read_table(seen.target).drop_columns(list(LINEAGE))
    expected = pa.Table.from_batches(sample.batches())
    assert found.cast(expected.schema).equals(expected)


def test_other_tools_read_the_whole_topic(parquet: Place) -> None:
    for job in range(1, 4):
        parquet.show(parquet.sealed({"id": [job] * 10}, job))
    glob = str(parquet.home / "out" / TOPIC / "*.parquet")
    with duckdb.connect() as connection:
        counted = connection.execute(
            "SELECT _cf_job_id, count(*) FROM read_parquet(?) GROUP BY 1 ORDER BY 1", [glob]
        ).fetchall()
    assert counted == [(1, 10), (2, 10), (3, 10)]


def test_an_output_of_another_key_is_never_replaced(parquet: Place) -> None:
    mine, other = parquet.sealed({"id": [1]}), parquet.sealed({"id": [2]}, job=2)
    (seen,) = parquet.show(other)
    os.link(seen.target, target(parquet, mine))
    before = target(parquet, mine).read_bytes()
    (outcome,) = parquet.publish(mine)
    assert isinstance(outcome, SinkConflict)
    assert target(parquet, mine).read_bytes() == before


@pytest.mark.parametrize("thing", ["folder", "dangling symlink", "other rows"])
def test_whatever_is_in_the_way_stays(parquet: Place, thing: str) -> None:
    parquet.show(parquet.sealed({"id": [9]}, job=9))
    output = parquet.sealed({"id": [1]})
    path = target(parquet, output)
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


def test_a_file_that_nothing_recorded_is_adopted(parquet: Place) -> None:
    """Its footer says that it is the output."""
    parquet.show(parquet.sealed({"id": [9]}, job=9))
    first, again = (parquet.sealed({"id": [1]}, attempt=name) for name in ("a1", "a2"))
    os.link(first.stage, target(parquet, first))
    (seen,) = parquet.show(again)
    assert seen.digest == first.digest != again.digest
    assert parquet.check([seen]) == []
    assert [row["id"] for row in parquet.rows()] == [1, 9]


def test_a_topic_on_another_filesystem_is_waited_for(parquet: Place) -> None:
    """There are no hard links across filesystems, as there are none on some."""
    elsewhere = Path("/dev/shm")
    output = parquet.sealed({"id": [1]})
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == parquet.home.stat().st_dev:
        pytest.skip("NOT PROVEN: a topic on another filesystem (/dev/shm is none here)")
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        (parquet.home / "out" / TOPIC).symlink_to(folder)
        (outcome,) = parquet.publish(output)
        assert list(Path(folder).iterdir()) == []
        (fine,) = parquet.show(parquet.sealed({"id": [2]}, job=2, topic="fine"))
        assert parquet.check([fine]) == []
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
    made = parquet.show(*outputs)
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
