"""What the modes, retract and reinstate leave in the folders of a Parquet sink."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from casparian_flow.engine import sinks
from casparian_flow.errors import JobError, OutputRefused, SinkConflict, SinkUnavailable
from casparian_flow.protocol import Published
from tests.sinks.stages import TOPIC, Place


def files(place: Place) -> list[Path]:
    """What is in the topic's folder beside its columns."""
    return sorted(
        path for path in (place.home / "out" / TOPIC).rglob("*") if path.name[0] not in "_."
    )


def hidden(place: Place) -> list[str]:
    folder = place.home / "out" / ".casparian" / "hidden" / TOPIC
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_the_versions_of_a_location_have_one_file(parquet: Place) -> None:
    first, second = parquet.replacing(1, 1), parquet.replacing(2, 2)
    target = parquet.home / "out" / TOPIC / f"{first.slot[:32]}.parquet"
    assert first.slot == second.slot
    for output in (first, second):
        assert parquet.show(output)[0].target == str(target)
        assert files(parquet) == [target]
    facts = pq.read_metadata(target).metadata
    assert facts[b"casparian.output_key"] == second.output_key.encode()
    assert (facts[b"casparian.mode"], facts[b"casparian.ordinal"]) == (b"replace", b"2")
    assert parquet.rows()[0]["id"] == 2


def test_a_reader_that_has_the_older_file_open_reads_it_to_its_end(parquet: Place) -> None:
    (made,) = parquet.show(parquet.replacing(1, 1))
    with pq.ParquetFile(made.target) as opened:
        parquet.show(parquet.replacing(2, 2))
        assert opened.read().column("id").to_pylist() == [1]


def test_a_large_replacement_is_one_file(parquet: Place) -> None:
    stage = parquet.stage(mode="replace", split_bytes=1)
    for _ in range(3):
        stage.write(pa.record_batch({"id": [*range(128 << 10)]}))
    (made,) = parquet.show(sinks.seal([stage])[0])
    assert files(parquet) == [Path(made.target)]


def test_a_late_version_leaves_no_trace(parquet: Place) -> None:
    late, newer = parquet.replacing(1, 1), parquet.replacing(2, 2)
    parquet.show(newer)
    before = files(parquet)[0].stat()
    (outcome,) = parquet.publish(late)
    assert outcome == Published(
        target=str(files(parquet)[0]), rows=1, digest=late.digest, adopted=False
    )
    assert files(parquet)[0].stat().st_ino == before.st_ino
    assert hidden(parquet) == parquet.staged_files() == []


def test_columns_of_versions_are_united_too(parquet: Place) -> None:
    parquet.show(parquet.replacing(1, 1))
    parquet.publish(parquet.sealed({"more": ["x"]}, 2, mode="replace", ordinal=2, attempt="a2"))
    assert [(row["id"], row["more"]) for row in parquet.rows()] == [(None, "x")]


def test_an_empty_version_is_a_file_without_rows(parquet: Place) -> None:
    """It takes the place of the one before by the same one rename."""
    parquet.show(parquet.replacing(1, 1))
    stage = parquet.stage(2, mode="replace", ordinal=2, attempt="a2")
    stage.finish()
    (made,) = parquet.show(sinks.seal([stage])[0])
    assert pq.read_schema(made.target).names[0] == "id"
    assert pq.read_metadata(made.target).num_rows == 0


@pytest.mark.parametrize("thing", ["foreign", "folder", "another slot's", "appended"])
def test_what_is_not_of_the_slot_is_never_replaced(parquet: Place, thing: str) -> None:
    output = parquet.replacing(2, 2)
    target = parquet.home / "out" / TOPIC / f"{output.slot[:32]}.parquet"
    target.parent.mkdir()
    if thing == "folder":
        target.mkdir()
    elif thing == "foreign":
        target.write_bytes(b"notes")
    else:
        named = {"slot": "other", "mode": "replace"} if thing != "appended" else {}
        os.link(parquet.sealed({"id": [7]}, attempt="a7", **named).stage, target)
    before = target.lstat()
    (outcome,) = parquet.publish(output)
    assert isinstance(outcome, SinkConflict)
    assert str(target) in outcome.message
    assert target.lstat().st_ino == before.st_ino
    assert Path(output.stage).exists()


@pytest.mark.parametrize("thing", ["theirs.parquet", "0" * 32 + ".parquet", "f" * 32, "notes"])
def test_in_mode_error_everything_there_must_be_ours(parquet: Place, thing: str) -> None:
    parquet.show(parquet.sealed({"id": [1]}, mode="error"))
    theirs = parquet.home / "out" / TOPIC / thing
    if thing[0] == "f":
        theirs.mkdir()
    else:
        pq.write_table(pa.table({"id": [1]}), theirs)
    columns = (theirs.parent / "_common_metadata").stat().st_mtime_ns
    output = parquet.sealed({"id": [2], "new": [1]}, 2, mode="error")
    (outcome,) = parquet.publish(output)
    assert isinstance(outcome, SinkConflict)
    assert str(theirs) in outcome.message
    assert (theirs.parent / "_common_metadata").stat().st_mtime_ns == columns
    assert Path(output.stage).exists()


def test_a_job_that_cannot_publish_everything_publishes_nothing(parquet: Place) -> None:
    """Its outputs of other topics too; other jobs go on."""
    parquet.show(parquet.sealed({"id": [1]}, job=1, key="old"))
    fine = parquet.sealed({"id": [2]}, job=2, topic="fine")
    wrong = parquet.sealed({"id": [1], "n": [1]}, job=2, key="wrong")
    other = parquet.sealed({"id": [3]}, job=3)
    Path(wrong.stage).unlink()
    outcomes = parquet.publish(fine, wrong, other)
    assert [type(outcome) for outcome in outcomes] == [JobError, JobError, Published]
    assert parquet.rows("fine") == []
    assert sorted(row["id"] for row in parquet.rows()) == [1, 3]
    again = parquet.sealed({"id": [1], "n": [1]}, job=2, key="wrong", attempt="a2")
    assert [type(outcome) for outcome in parquet.publish(fine, again)] == [Published, Published]


def test_one_that_was_published_is_not_taken_back_with_its_job(parquet: Place) -> None:
    done = parquet.sealed({"id": [1]}, job=1, topic="done")
    parquet.show(done)
    refused = parquet.sealed({"n": ["1.5"]}, job=1)
    parquet.show(parquet.sealed({"n": [1]}, job=2))
    adopted, outcome = parquet.publish(done, refused)
    assert isinstance(adopted, Published)
    assert adopted.adopted
    assert isinstance(outcome, OutputRefused)


def test_a_fault_in_the_midst_of_a_job_is_waited_for(
    parquet: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = [parquet.sealed({"id": [1]}, topic=topic, key=topic) for topic in ("one", "two")]
    link = os.link

    def refuse(source: Any, target: Path) -> None:
        if target.parent.name == "two":
            raise OSError(28, "No space left on device")
        link(source, target)

    monkeypatch.setattr(os, "link", refuse)
    first, second = parquet.publish(*outputs)
    assert isinstance(first, Published)
    assert isinstance(second, SinkUnavailable)
    assert "the disk is full" in second.message
    monkeypatch.undo()
    assert [type(outcome) for outcome in parquet.publish(*outputs)] == [Published, Published]
    assert [len(parquet.rows(topic)) for topic in ("one", "two")] == [1, 1]


def test_what_is_retracted_moves_to_where_no_reader_looks(parquet: Place) -> None:
    (made,) = parquet.show(parquet.sealed({"id": [1]}))
    inode, name = Path(made.target).stat().st_ino, Path(made.target).name
    parquet.sink.retract(made)
    assert files(parquet) == []
    assert hidden(parquet) == [name]
    parquet.sink.reinstate(made)
    assert Path(made.target).stat().st_ino == inode
    assert hidden(parquet) == []


def test_a_folder_of_parts_is_retracted_whole(
    parquet: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("casparian_flow.engine.sinks.parts.GROUP_ROWS", 1)
    stage = parquet.stage(split_bytes=1)
    for number in range(3):
        stage.write(pa.record_batch({"id": [number]}))
    (made,) = parquet.show(sinks.seal([stage])[0])
    parquet.sink.retract(made)
    assert (files(parquet), hidden(parquet)) == ([], [Path(made.target).name])
    (found,) = parquet.sink.inventory(())
    assert (found.retracted, found.target, found.rows) == (True, made.target, 3)
    parquet.sink.reinstate(made)
    assert sorted(row["id"] for row in parquet.rows()) == [0, 1, 2]
    assert parquet.sink.check([made]) == []


@pytest.mark.parametrize("harm", ["altered", "another's"])
def test_what_is_not_whole_is_neither_retracted_nor_reinstated(parquet: Place, harm: str) -> None:
    (made,) = parquet.show(parquet.sealed({"id": [1]}))
    path, kept = Path(made.target), parquet.home / "kept"
    other = Path(parquet.sealed({"id": [2]}, attempt="a2").stage)

    def damage(place: Path) -> None:
        place.rename(kept)
        place.write_bytes(other.read_bytes() if harm == "another's" else b"PAR1")

    damage(path)
    with pytest.raises(SinkConflict):
        parquet.sink.retract(made)
    assert path.exists()
    kept.rename(path)
    parquet.sink.retract(made)
    damage(parquet.home / "out" / ".casparian" / "hidden" / TOPIC / path.name)
    with pytest.raises(SinkConflict, match="cannot be reinstated from"):
        parquet.sink.reinstate(made)
    assert files(parquet) == []


def test_a_place_that_somebody_took_is_not_reinstated_into(parquet: Place) -> None:
    (made,) = parquet.show(parquet.sealed({"id": [1]}))
    parquet.sink.retract(made)
    Path(made.target).write_bytes(b"notes")
    with pytest.raises(SinkConflict, match="was left untouched"):
        parquet.sink.reinstate(made)
    assert Path(made.target).read_bytes() == b"notes"
    (outcome,) = parquet.publish(parquet.sealed({"id": [1]}, attempt="a2"))
    assert isinstance(outcome, SinkConflict)


def test_a_sink_that_was_moved_is_retracted_where_it_is(parquet: Place) -> None:
    """The ledger still says where it was."""
    (made,) = parquet.show(parquet.sealed({"id": [1]}))
    (parquet.home / "out").rename(parquet.home / "moved")
    sink = sinks.open_sink(f"parquet://{parquet.home}/moved", parquet.settings)
    sink.retract(made)
    assert not (parquet.home / "moved" / TOPIC / Path(made.target).name).exists()


def test_a_lost_ledger_finds_what_is_shown_and_what_is_hidden(parquet: Place) -> None:
    (shown,) = parquet.show(parquet.replacing(2, 2))
    (taken,) = parquet.show(parquet.replacing(3, 1, slot="other"))
    parquet.sink.retract(taken)
    (parquet.home / "out" / TOPIC / f"{'a' * 32}.parquet").write_bytes(b"notes")
    found = {each.output_key: each for each in parquet.sink.inventory(())}
    assert {key: each.retracted for key, each in found.items()} == {
        shown.output_key: False, taken.output_key: True,
    }  # fmt: skip
    assert [found[each.output_key].target for each in (shown, taken)] == [
        shown.target, taken.target,
    ]  # fmt: skip
    assert {each.mode for each in found.values()} == {"replace"}
    known = {shown.output_key[:32], taken.output_key[:32]}
    assert [each.output_key for each in parquet.sink.inventory(known)] == [taken.output_key]


def test_a_topics_folder_that_was_deleted_does_not_bring_back_what_is_hidden(
    parquet: Place,
) -> None:
    (made,) = parquet.show(parquet.sealed({"id": [1]}))
    parquet.sink.retract(made)
    for path in (parquet.home / "out" / TOPIC).iterdir():
        path.unlink()
    (parquet.home / "out" / TOPIC).rmdir()
    (again,) = parquet.publish(parquet.sealed({"id": [1]}, attempt="a2"))
    assert isinstance(again, Published)
    assert again.retracted
    assert parquet.rows() == []
