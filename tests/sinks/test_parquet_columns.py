"""A topic's columns in the Parquet sink: what each file has, and what `_common_metadata` says."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from casparian_flow.engine import sinks
from casparian_flow.engine.sinks import parts
from casparian_flow.engine.sinks.base import LINEAGE
from casparian_flow.engine.sinks.parts import COLUMNS_FILE
from casparian_flow.errors import OutputRefused, SinkConflict, SinkUnavailable
from casparian_flow.protocol import Output, State
from tests.sinks.stages import TOPIC, Place


def show(place: Place, *outputs: Output) -> list[Path]:
    """Publish outputs that are all taken; their files."""
    return [Path(seen.target) for seen in place.show(*outputs)]


def folder(place: Place) -> Path:
    return place.home / "out" / TOPIC


def said(place: Place) -> Any:
    return pq.read_schema(folder(place) / COLUMNS_FILE)


def names(schema: Any) -> list[str]:
    assert schema.names[-4:] == list(LINEAGE)
    return list(schema.names[:-4])


def test_every_file_has_the_columns_that_were_known(parquet: Place) -> None:
    (first,) = show(parquet, parquet.sealed({"b": [1], "a": ["x"]}, job=1))
    (second,) = show(parquet, parquet.sealed({"c": [1.5], "b": [2]}, job=2))
    (third,) = show(parquet, parquet.sealed({"c": [2.5]}, job=3))
    assert names(pq.read_schema(first)) == ["b", "a"]
    assert names(pq.read_schema(second)) == names(pq.read_schema(third)) == ["b", "a", "c"]
    assert names(said(parquet)) == ["b", "a", "c"]
    assert said(parquet).metadata == {b"casparian.topic": TOPIC.encode()}
    rows = pq.read_table(second).drop_columns(list(LINEAGE)).to_pylist()
    assert rows == [{"b": 2, "a": None, "c": 1.5}]


def test_a_later_column_is_cast_where_that_is_exact(parquet: Place) -> None:
    show(parquet, parquet.sealed({"n": [1.5]}, job=1))
    (second,) = show(parquet, parquet.sealed({"n": [2, None]}, job=2))
    assert pq.read_schema(second).field("n").type == pa.float64()
    with pytest.raises(OutputRefused, match=r"column 'n' is double .* has int64"):
        parquet.sealed({"n": [2**53 + 1]}, job=3)
    with pytest.raises(OutputRefused, match=r"column 'n' .* different kind of value"):
        parquet.sealed({"n": ["2"]}, job=4)
    assert parquet.staged_files() == []


def test_whole_numbers_become_doubles_where_they_all_are_exact(parquet: Place) -> None:
    show(parquet, parquet.sealed({"a.b": [1, 2**53, None], "n": [1, 2, 3]}, job=1))
    show(parquet, parquet.sealed({"a.b": [2.0, None]}, job=2))
    assert said(parquet).field("a.b").type == pa.int64()
    (third,) = show(parquet, parquet.sealed({"a.b": [0.5, -0.0]}, job=3))
    assert said(parquet).field("a.b").type == pa.float64()
    assert pq.read_schema(third).field("a.b").type == pa.float64()
    (fourth,) = show(parquet, parquet.sealed({"a.b": [7], "n": pa.nulls(1)}, job=4))
    assert pq.read_schema(fourth).field("a.b").type == pa.float64()
    with pytest.raises(OutputRefused, match=r"column 'a.b' is double .* has int64"):
        parquet.sealed({"a.b": [2**53 + 1]}, job=5)
    (folder(parquet) / COLUMNS_FILE).unlink()
    assert parts.topic_columns(folder(parquet)).field("a.b").type == pa.float64()


@pytest.mark.parametrize("retracted", [False, True])
def test_a_whole_number_that_no_double_is_keeps_doubles_out(
    parquet: Place, retracted: bool
) -> None:
    (first,) = parquet.show(parquet.sealed({"n": [2**53 + 1]}, job=1))
    if retracted:
        parquet.tell(State.RETRACTED, first)
    (refused,) = parquet.publish(parquet.sealed({"n": [0.5]}, job=2))
    assert isinstance(refused, OutputRefused)
    assert "column 'n' is int64 since it was first published; this output has double" in str(
        refused
    )
    assert said(parquet).field("n").type == pa.int64()
    (third,) = show(parquet, parquet.sealed({"n": [2.0]}, job=3))
    assert pq.read_table(third).column("n").to_pylist() == [2]


def test_a_file_that_cannot_be_read_may_have_any_number(parquet: Place) -> None:
    show(parquet, parquet.sealed({"n": [1]}, job=1))
    (folder(parquet) / f"{'a' * 32}.parquet").write_bytes(b"PAR1 of somebody")
    (refused,) = parquet.publish(parquet.sealed({"n": [0.5]}, job=2))
    assert isinstance(refused, OutputRefused)


def test_two_racing_outputs_widen_a_column_in_either_order(parquet: Place) -> None:
    show(parquet, parquet.sealed({"n": pa.array([1], pa.int8())}, job=1))
    wide, real = parquet.sealed({"n": [300]}, job=2), parquet.sealed({"n": [0.5]}, job=3)
    (_, seen) = show(parquet, wide, real)
    assert said(parquet).field("n").type == pa.float64()
    assert pq.read_table(seen).column("n").to_pylist() == [0.5]
    late = parquet.sealed({"n": pa.array([0.25], pa.float32())}, job=4)
    (seen,) = show(parquet, late)
    assert pq.read_schema(seen).field("n").type == pa.float64()


def test_the_first_type_of_a_column_that_was_null_holds(parquet: Place) -> None:
    show(parquet, parquet.sealed({"n": pa.nulls(2)}, job=1))
    assert said(parquet).field("n").type == pa.null()
    show(parquet, parquet.sealed({"n": ["x"]}, job=2))
    assert said(parquet).field("n").type == pa.string()
    (third,) = show(parquet, parquet.sealed({"n": pa.nulls(1)}, job=3))
    assert pq.read_schema(third).field("n").type == pa.string()


def test_bits_of_floating_point_are_kept(parquet: Place) -> None:
    bits = [0x7FF8000000000000, 0xFFF8000000000001, 0x7FF0000000000001, 1 << 63, 1]
    column = pa.Array.from_buffers(
        pa.float64(), len(bits), [None, pa.py_buffer(struct.pack(f"<{len(bits)}Q", *bits))]
    )
    (file,) = show(parquet, parquet.sealed({"n": column}))
    found = pq.read_table(file).column("n").combine_chunks().view(pa.uint64()).to_pylist()
    assert found == bits


def test_two_workers_that_race_agree_in_the_end(parquet: Place) -> None:
    """Both staged when the topic had no columns: the first that is published says what they are."""
    first = parquet.sealed({"n": [1.5], "a": ["x"]}, job=1)
    second = parquet.sealed({"n": [2, 3], "b": ["y", "z"]}, job=2)
    assert pq.read_schema(second.stage).field("n").type == pa.int64()
    found = parquet.show(first, second)
    assert parquet.check(found) == []
    _, seen = found
    assert (seen.rows, seen.digest == second.digest) == (2, False)
    assert names(pq.read_schema(seen.target)) == ["n", "a", "b"]
    assert pq.read_table(seen.target).column("n").to_pylist() == [2.0, 3.0]
    facts = pq.read_metadata(seen.target).metadata
    assert facts[b"casparian.output_key"] == second.output_key.encode()
    assert facts[b"casparian.rows"] == b"2"
    assert parquet.staged_files() == []


def test_a_racing_output_whose_values_do_not_fit_is_refused_and_changes_nothing(
    parquet: Place,
) -> None:
    first = parquet.sealed({"n": [1]}, job=1)
    second = parquet.sealed({"n": ["1"], "new": [1]}, job=2)
    seen, refused = parquet.publish(first, second)
    assert isinstance(seen, Output)
    assert isinstance(refused, OutputRefused)
    assert "column 'n' is int64 since it was first published" in refused.message
    assert names(said(parquet)) == ["n"]
    assert Path(second.stage).exists()


def test_what_a_dead_publisher_had_rewritten_is_written_anew(parquet: Place) -> None:
    late = parquet.sealed({"n": [2]}, job=2)
    show(parquet, parquet.sealed({"n": [1.5]}, job=1))
    Path(f"{late.stage}.fitted").write_bytes(b"half a file")
    (file,) = show(parquet, late)
    assert pq.read_table(file).column("n").to_pylist() == [2.0]
    assert parquet.staged_files() == []


def test_outputs_of_an_earlier_release_say_their_columns_themselves(parquet: Place) -> None:
    """By the order of their jobs, whatever their names."""
    for job, columns in enumerate(({"n": [1.5]}, {"n": [2], "late": ["x"]}, {"z": [1]}), start=1):
        show(parquet, parquet.sealed(columns, job, key=f"any {-job}"))
        (folder(parquet) / COLUMNS_FILE).unlink()
    (folder(parquet) / f"{'a' * 32}.parquet").write_bytes(b"PAR1 of somebody")
    (folder(parquet) / ("b" * 32)).mkdir()
    assert parts.topic_columns(folder(parquet)).names == ["n", "late", "z"]
    (file,) = show(parquet, parquet.sealed({"n": [7], "new": [1]}, job=4))
    assert names(pq.read_schema(file)) == names(said(parquet)) == ["n", "late", "z", "new"]
    assert said(parquet).field("n").type == pa.float64()


@pytest.mark.parametrize("thing", ["no Parquet", "another's", "a folder"])
def test_a_file_of_that_name_which_is_not_ours_is_left_alone(parquet: Place, thing: str) -> None:
    output = parquet.sealed({"id": [1]})
    foreign = folder(parquet) / COLUMNS_FILE
    foreign.parent.mkdir()
    if thing == "a folder":
        foreign.mkdir()
    elif thing == "another's":
        pq.write_metadata(pa.schema([("theirs", pa.int8())]), foreign)
    else:
        foreign.write_bytes(b"notes")
    before = foreign.stat()
    with pytest.raises(SinkConflict, match="left untouched"):
        parquet.sealed({"id": [1]}, job=2)
    (outcome,) = parquet.publish(output)
    assert isinstance(outcome, SinkConflict)
    assert foreign.stat().st_mtime_ns == before.st_mtime_ns
    assert [path.name for path in foreign.parent.iterdir()] == [COLUMNS_FILE]
    assert Path(output.stage).exists()


def test_a_topic_of_many_columns(parquet: Place) -> None:
    wide = {f"c{n}": [n] for n in range(500)}
    (file,) = show(parquet, parquet.sealed(wide))
    (later,) = show(parquet, parquet.sealed({"c7": [math.pi], "more": [1]} | {"c7": [7.0]}, job=2))
    assert len(pq.read_schema(file)) == 504
    assert len(pq.read_schema(later)) == 505
    assert pq.read_table(later, columns=["c7"]).column("c7").to_pylist() == [7]


def test_the_columns_are_there_before_the_file_that_has_them(
    parquet: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = parquet.sealed({"id": [1]})
    outcomes: list[list[str]] = []

    def look(*_: object) -> None:
        outcomes.append([path.name for path in folder(parquet).iterdir()])
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.link", look)
    (outcome,) = parquet.publish(output)
    assert isinstance(outcome, SinkUnavailable)
    assert outcomes == [[COLUMNS_FILE]]
    monkeypatch.undo()
    show(parquet, output)


def test_sealed_together_and_published_together(parquet: Place) -> None:
    stages = [parquet.stage(job) for job in (1, 2, 3)]
    for number, stage in enumerate(stages):
        stage.write(pa.record_batch({f"c{number}": [number], "n": [1]}))
    show(parquet, *sinks.seal(stages))
    assert names(said(parquet)) == ["c0", "n", "c1", "c2"]
