"""Large outputs of the Parquet sink: folders of parts, all or nothing like a single file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from casparian_flow.engine import sinks
from casparian_flow.engine.sinks import parquet_moves, parts, query
from casparian_flow.engine.sinks import stage as staging
from casparian_flow.errors import OutputRefused, SinkConflict
from casparian_flow.protocol import Output, State
from proofs import sink_reader
from tests.sinks.stages import TOPIC, Place

GROUP_ROWS = 200
ROWS = 3 * GROUP_ROWS - 5
PARTS = ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "GROUP_ROWS", GROUP_ROWS)


def large(place: Place, job: int = 1, **named: Any) -> Output:
    """An output of three row groups, and a part for each."""
    stage = place.stage(job, split_bytes=1, **named)
    for start in range(0, ROWS, GROUP_ROWS):
        stage.write(pa.record_batch({"id": [*range(start, min(start + GROUP_ROWS, ROWS))]}))
    return sinks.seal([stage])[0]


def test_a_large_output_is_a_folder_of_parts(parquet: Place) -> None:
    output = large(parquet)
    (published,) = parquet.show(output)
    folder = Path(published.target)
    assert folder == parquet.home / "out" / TOPIC / output.version_slot[:32]
    assert sorted(os.listdir(folder)) == PARTS
    tables = [pq.read_table(folder / name) for name in PARTS]
    assert pa.concat_tables(tables).column("id").to_pylist() == [*range(ROWS)]
    assert published.rows == output.rows == ROWS
    assert published.digest == output.digest == parts.digest(folder)
    assert parquet.staged_files() == []
    assert parquet.check([published]) == []


def test_each_footer_says_which_part_it_is_and_the_last_one_counts(parquet: Place) -> None:
    (published,) = parquet.show(large(parquet, job=7))
    facts = [pq.read_metadata(Path(published.target) / name).metadata for name in PARTS]
    assert [each[b"casparian.part"] for each in facts] == [b"0", b"1", b"2"]
    assert {each[b"casparian.job_id"] for each in facts} == {b"7"}
    assert [each.get(b"casparian.rows") for each in facts] == [None, None, str(ROWS).encode()]
    assert facts[-1][b"casparian.batches"] == facts[-1][b"casparian.parts"] == b"3"


def test_an_output_is_split_by_what_is_written(
    parquet: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below the limit there is one file; a part ends with the row group that reaches it."""
    monkeypatch.setattr(staging, "GROUP_BYTES", 64 << 10)
    batch = pa.record_batch({"noise": [os.urandom(1 << 10) for _ in range(64)]})
    one, two = (parquet.stage(job, split_bytes=limit << 10) for job, limit in ((1, 200), (2, 100)))
    for stage in (one, two):
        for _ in range(3):
            stage.write(batch)
    outputs = sinks.seal([one, two])
    assert [Path(output.stage).is_dir() for output in outputs] == [False, True]
    sizes = [file.stat().st_size >> 16 for file in parts.files(Path(outputs[1].stage))]
    assert sizes == [2, 1]
    assert outputs[1].size_bytes == parts.size(two.path)


def test_publishing_twice_is_publishing_once(parquet: Place) -> None:
    output = large(parquet)
    (first,) = parquet.show(output)
    (second,) = parquet.show(output)
    (other,) = parquet.show(large(parquet, attempt="a2"))
    assert first == second == msgspec.structs.replace(other, stage=first.stage)
    assert len(parquet.rows()) == ROWS
    assert parquet.staged_files() == []


@pytest.mark.parametrize("first", ["a file", "a folder"])
def test_an_attempt_that_splits_otherwise_adopts_the_first(parquet: Place, first: str) -> None:
    """Somebody changed `split_bytes`, and the ledger was lost."""
    whole = parquet.sealed({"id": [*range(ROWS)]}, attempt="a1")
    split = large(parquet, attempt="a2")
    order = [whole, split] if first == "a file" else [split, whole]
    made, adopted = (parquet.show(output)[0] for output in order)
    assert (adopted.target, adopted.digest) == (made.target, made.digest)
    assert len(parquet.rows()) == ROWS
    assert parquet.staged_files() == []


@pytest.mark.parametrize("thing", ["empty folder", "a part too few", "another's part", "a file"])
def test_whatever_is_in_the_way_stays(parquet: Place, thing: str) -> None:
    """A rename would take the place of an empty folder without a word."""
    output = large(parquet)
    target = parquet.home / "out" / TOPIC / output.version_slot[:32]
    target.parent.mkdir()
    if thing == "a file":
        target.write_bytes(b"notes")
    elif thing == "empty folder":
        target.mkdir()
    else:
        shutil.copytree(large(parquet, attempt="a2").stage, target)
        (target / PARTS[1]).unlink()
        if thing == "another's part":
            other = Path(large(parquet, job=2).stage)
            shutil.copy(other / PARTS[1], target)
    before = sorted(target.iterdir()) if target.is_dir() else target.read_bytes()
    (outcome,) = parquet.publish(output)
    assert isinstance(outcome, SinkConflict)
    assert str(target) in outcome.message
    assert before == (sorted(target.iterdir()) if target.is_dir() else target.read_bytes())
    assert Path(output.stage).is_dir()


@pytest.mark.parametrize("harm", ["a byte", "a part less", "a part more", "gone"])
def test_check_sees_harm(parquet: Place, harm: str) -> None:
    output = large(parquet)
    (published,) = parquet.show(output)
    made, folder = [published], Path(published.target)
    if harm == "a byte":
        data = bytearray((folder / PARTS[1]).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / PARTS[1]).write_bytes(data)
    elif harm == "a part less":
        (folder / PARTS[2]).unlink()
    elif harm == "a part more":
        shutil.copy(folder / PARTS[2], folder / "part-00003.parquet")
    else:
        shutil.rmtree(folder)
    (fault,) = parquet.sink.check(made)
    words = "the file is gone" if harm == "gone" else "its bytes have changed"
    assert fault.startswith(f"{folder}: {words}")


def test_an_altered_folder_is_not_deleted(parquet: Place) -> None:
    (published,) = parquet.show(large(parquet))
    (Path(published.target) / PARTS[0]).unlink()
    with pytest.raises(SinkConflict, match="was changed"):
        parquet.sink.delete([published])
    shutil.rmtree(published.target)
    parquet.sink.delete([published])
    parquet.show(large(parquet, attempt="a2"))
    assert len(parquet.rows()) == ROWS


@pytest.mark.parametrize("swaps", [True, False])
def test_folders_are_exchanged(
    parquet: Place, monkeypatch: pytest.MonkeyPatch, swaps: bool
) -> None:
    """In one step where the filesystem can."""
    if not swaps:
        monkeypatch.setattr(parquet_moves, "swap", lambda *_: False)
    (older,) = parquet.show(large(parquet, slot="s"))
    hidden = msgspec.structs.replace(older, state=State.HIDDEN)
    (newer,) = parquet.show(large(parquet, job=2, slot="s"), changes=[hidden])
    assert newer.target == older.target
    assert {row["_cf_job_id"] for row in parquet.rows()} == {2}
    assert len(parquet.rows()) == ROWS
    assert parquet.check([hidden, newer]) == []
    parquet.sink.change([older, msgspec.structs.replace(newer, state=State.HIDDEN)])
    assert {row["_cf_job_id"] for row in parquet.rows()} == {1}


def test_a_lost_or_shorter_part_is_told_of(parquet: Place) -> None:
    for job, part in enumerate(PARTS, start=1):
        output = large(parquet, job)
        os.truncate(Path(output.stage) / part, 100)
        (outcome,) = parquet.publish(output)
        assert f"not {output.size_bytes}" in str(outcome)
        (Path(output.stage) / part).unlink()
        (outcome,) = parquet.publish(output)
        assert f"not {output.size_bytes}" in str(outcome)
    assert parquet.rows() == []


def test_a_race_over_the_columns_rewrites_every_part(parquet: Place) -> None:
    output = large(parquet, job=2)
    parquet.show(parquet.sealed({"id": [0.5], "more": ["x"]}, job=1))
    (published,) = parquet.show(output)
    folder = Path(published.target)
    assert sorted(os.listdir(folder)) == PARTS
    tables = [pq.read_table(folder / name, partitioning=None) for name in PARTS]
    assert {table.schema.field("id").type for table in tables} == {pa.float64()}
    assert sum(table.num_rows for table in tables) == ROWS
    (found,) = parquet.sink.records({parquet.sealed({"id": [1]}, attempt="a9").output_key})
    assert (found.rows, found.digest) == (ROWS, published.digest)


def test_discard_leaves_nothing(parquet: Place) -> None:
    stage = parquet.stage(split_bytes=1)
    for _ in range(2):
        stage.write(pa.record_batch({"id": [*range(GROUP_ROWS)]}))
    assert stage.path.is_dir()
    stage.discard()
    stage.discard()
    assert parquet.staged_files() == []
    with pytest.raises(OutputRefused):
        parquet.stage(topic=".hidden", split_bytes=1)


def test_our_own_readers_take_it_for_one_output(parquet: Place) -> None:
    output = large(parquet, job=7)
    (published,) = parquet.show(output)
    parquet.show(parquet.sealed({"id": [-1]}, job=8))
    assert sorted(
        (group.job_id, len(group.rows)) for group in sink_reader.groups(parquet.location, TOPIC)
    ) == [(7, ROWS), (8, 1)]
    known: set[Path] = set()
    assert sum(count for _, count in sink_reader.counts(parquet.location, TOPIC, known)) == ROWS + 1
    assert Path(published.target) in known
    committed = {
        "topic": TOPIC, "location": parquet.location, "target": published.target,
        "output_key": output.output_key, "rows": ROWS, "latest": True,
    }  # fmt: skip
    question = f"SELECT count(*) AS n, sum(id) AS s FROM {TOPIC}"
    with query.answer(question, [committed]) as answer:
        assert answer.read_all().to_pylist() == [{"n": ROWS, "s": ROWS * (ROWS - 1) // 2}]
