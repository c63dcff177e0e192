"""What modes and states leave in the folders of a Parquet sink."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks import parquet_record
from casparian_flow.errors import JobError, OutputRefused, SinkConflict, SinkUnavailable
from casparian_flow.protocol import Output, Publication, State
from tests.sinks import forks
from tests.sinks.stages import TOPIC, Place


def files(place: Place, topic: str = TOPIC) -> list[str]:
    """What is in the topic's folder beside its columns."""
    folder = place.home / "out" / topic
    return sorted(path.name for path in folder.iterdir() if path.name[0] not in "_.")


def kept(place: Place) -> list[str]:
    folder = place.home / "out" / ".casparian" / "kept" / TOPIC
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def file_of(key: str) -> str:
    return f"{key[:32]}.parquet"


def past(*outputs: Output) -> list[Output]:
    return [msgspec.structs.replace(output, state=State.PAST) for output in outputs]


def hidden(*outputs: Output) -> list[Output]:
    return [msgspec.structs.replace(output, state=State.HIDDEN) for output in outputs]


def test_the_versions_of_a_location_have_one_file(parquet: Place) -> None:
    (first,) = parquet.show(parquet.replacing(1, 1))
    name = file_of(first.location_slot)
    assert files(parquet) == [name]
    (second,) = parquet.show(parquet.replacing(2, 2), changes=past(first))
    assert (files(parquet), kept(parquet)) == ([name], [file_of(first.output_key)])
    assert second.target == first.target
    facts = pq.read_metadata(second.target).metadata
    assert facts[b"casparian.output_key"] == second.output_key.encode()
    assert parquet.rows()[0]["id"] == 2


def test_a_reader_that_has_the_older_file_open_reads_it_to_its_end(parquet: Place) -> None:
    (made,) = parquet.show(parquet.replacing(1, 1))
    with pq.ParquetFile(made.target) as opened:
        parquet.show(parquet.replacing(2, 2), changes=past(made))
        assert opened.read().column("id").to_pylist() == [1]


def test_what_is_shown_again_in_a_slot_takes_the_name_that_is_there(parquet: Place) -> None:
    """A roll back and a roll forward: the name never goes, and never moves."""
    (good,) = parquet.show(parquet.sealed({"id": [1]}, 1, slot="s"))
    (bad,) = parquet.show(parquet.sealed({"id": [2]}, 2, slot="s"), changes=hidden(good))
    name = file_of(good.version_slot)
    assert (files(parquet), kept(parquet)) == ([name], [file_of(good.output_key)])
    inode = os.stat(good.target).st_ino
    parquet.sink.change([good, *hidden(bad)])
    assert (files(parquet), kept(parquet)) == ([name], [file_of(bad.output_key)])
    parquet.sink.change([*hidden(good), bad])
    assert (files(parquet), kept(parquet)) == ([name], [file_of(good.output_key)])
    assert os.stat(good.target).st_ino == inode


def test_readers_see_one_of_two_outputs_of_a_slot(parquet: Place) -> None:
    """While it is rolled back and forward."""
    (good,) = parquet.show(parquet.sealed({"id": [1] * 9}, 1, slot="s"))
    (bad,) = parquet.show(parquet.sealed({"id": [2] * 9}, 2, slot="s"), changes=hidden(good))
    stop, seen, looks = threading.Event(), set[tuple[int, ...]](), [0]

    def poll() -> None:
        while not stop.is_set():
            seen.add(tuple(row["id"] for row in parquet.rows()))
            looks[0] += 1

    reader = threading.Thread(target=poll)
    reader.start()
    try:
        while looks[0] < 20:
            parquet.sink.change([good, *hidden(bad)])
            parquet.sink.change([*hidden(good), bad])
    finally:
        stop.set()
        reader.join()
    assert seen <= {(1,) * 9, (2,) * 9}


def test_a_name_is_never_without_a_file(parquet: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older output is visible until the rename, and kept by then."""
    (first,) = parquet.show(parquet.replacing(1, 1))
    replace, seen = os.replace, []

    def look(source: Any, target: Any) -> None:
        if TOPIC in str(target):
            seen.append(([row["id"] for row in parquet.rows()], kept(parquet)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    parquet.show(parquet.replacing(2, 2), changes=past(first))
    assert seen == [([1], [file_of(first.output_key)])]


def test_a_change_of_the_mode_moves_only_what_must_be(parquet: Place) -> None:
    (v1,) = parquet.show(parquet.replacing(1, 1))
    (v2,) = parquet.show(parquet.replacing(2, 2), changes=past(v1))
    as_append = [msgspec.structs.replace(o, mode="append") for o in (*past(v1), v2)]
    parquet.sink.change(as_append)
    assert files(parquet) == sorted([file_of(v1.version_slot), file_of(v1.location_slot)])
    (v3,) = parquet.show(
        parquet.sealed({"id": [3]}, 3, slot="one.csv", ordinal=3), changes=past(*as_append[1:])
    )
    assert sorted(row["id"] for row in parquet.rows()) == [1, 2, 3]
    versions = [*as_append[:1], *past(*as_append[1:]), v3]
    parquet.sink.change([msgspec.structs.replace(o, mode="replace") for o in versions])
    assert files(parquet) == [file_of(v3.version_slot)]
    # The next version takes its file, so that the name of the slot is in use: a key names v3.
    v3 = msgspec.structs.replace(v3, mode="replace", state=State.PAST)
    (v4,) = parquet.show(parquet.replacing(4, 4), changes=[v3])
    assert files(parquet) == [file_of(v3.version_slot)]
    everything = [*versions[:2], v3, v4]
    parquet.sink.change([msgspec.structs.replace(o, mode="append") for o in everything])
    assert sorted(row["id"] for row in parquet.rows()) == [1, 2, 3, 4]
    assert file_of(v3.output_key) in files(parquet)
    assert kept(parquet) == []
    assert parquet.check([msgspec.structs.replace(o, mode="append") for o in everything]) == []


def test_a_version_that_leaves_makes_room_for_a_file_elsewhere(parquet: Place) -> None:
    """A file was renamed: the rows of the old location go as those of the new one come."""
    (old,) = parquet.show(parquet.replacing(1, 1, slot="old"))
    (new,) = parquet.show(parquet.replacing(2, 1, slot="new"), changes=hidden(old))
    assert new.target == old.target
    (again,) = parquet.show(parquet.replacing(3, 2, slot="old"))
    assert sorted(row["id"] for row in parquet.rows()) == [2, 3]
    assert Path(again.target).name == file_of(again.output_key)


def test_two_versions_in_one_call_show_the_later_one(parquet: Place) -> None:
    first, second = parquet.replacing(1, 1), parquet.replacing(2, 2)
    jobs = [Publication(outputs=[first]), Publication(outputs=[second], changes=past(first))]
    (made,), (later,) = (found for found in parquet.sink.publish(jobs) if isinstance(found, list))
    assert files(parquet) == [file_of(first.location_slot)]
    assert kept(parquet) == [file_of(first.output_key)]
    assert parquet.check([*past(made), later]) == []


def test_one_call_that_takes_a_version_away_and_brings_it_back(parquet: Place) -> None:
    (v1,) = parquet.show(parquet.replacing(1, 1))
    v2 = parquet.replacing(2, 2)
    jobs = [
        Publication(outputs=[v2], changes=past(v1)),
        Publication(outputs=[parquet.replacing(3, 1, slot="x")], changes=[v1, *past(v2)]),
    ]
    assert all(isinstance(found, list) for found in parquet.sink.publish(jobs))
    assert sorted(row["id"] for row in parquet.rows()) == [1, 3]
    assert parquet.check([v1]) == []


@pytest.mark.parametrize("thing", ["foreign", "folder", "another's"])
def test_what_is_not_of_the_slot_is_never_replaced(parquet: Place, thing: str) -> None:
    parquet.show(parquet.sealed({"id": [9]}, 9))
    output = parquet.replacing(2, 2)
    target = parquet.home / "out" / TOPIC / file_of(output.location_slot)
    if thing == "folder":
        target.mkdir()
    elif thing == "foreign":
        target.write_bytes(b"notes")
    else:
        os.link(parquet.sealed({"id": [7]}, 7, attempt="a7").stage, target)
    before = target.lstat()
    (outcome,) = parquet.publish(output)
    assert isinstance(outcome, SinkConflict)
    assert str(target) in outcome.message
    assert target.lstat().st_ino == before.st_ino
    assert Path(output.stage).exists()


def test_a_file_that_somebody_put_in_the_place_of_ours_is_not_moved(parquet: Place) -> None:
    (made,) = parquet.show(parquet.replacing(1, 1))
    Path(made.target).write_bytes(b"notes")
    (outcome,) = parquet.publish(parquet.replacing(2, 2), changes=past(made))
    assert isinstance(outcome, SinkConflict)
    with pytest.raises(SinkConflict, match="left untouched"):
        parquet.sink.change(hidden(made))
    with pytest.raises(SinkConflict, match="was changed"):
        parquet.sink.delete([made])
    assert Path(made.target).read_bytes() == b"notes"
    Path(made.target).unlink()
    parquet.sink.change(hidden(made))
    assert parquet.rows() == []


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


def test_columns_of_a_job_that_is_refused_are_not_added(parquet: Place) -> None:
    fine, bad = parquet.sealed({"id": [1], "new": [1]}), parquet.sealed({"n": ["x"]}, topic="two")
    parquet.show(parquet.sealed({"id": [1]}, 2))
    parquet.show(parquet.sealed({"n": [1]}, 3, topic="two"))
    assert {type(outcome) for outcome in parquet.publish(fine, bad)} == {OutputRefused}
    assert pq.read_schema(parquet.home / "out" / TOPIC / "_common_metadata").names[0:1] == ["id"]
    assert "new" not in pq.read_schema(parquet.home / "out" / TOPIC / "_common_metadata").names
    assert len(parquet.rows()) == 1


@pytest.mark.parametrize("failing", ["link", "replace"])
def test_a_fault_in_the_midst_of_files_is_made_good_later(
    parquet: Place, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """What was recorded is done by whoever comes next: here, by a reader of the record."""
    (made,) = parquet.show(parquet.replacing(1, 1))
    new, newer = parquet.sealed({"id": [3]}, 3), parquet.replacing(2, 2)
    act = getattr(os, failing)

    def refuse(*names: Any) -> None:
        if ".casparian/kept" in str(names[1]):
            act(*names)
        else:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, refuse)
    outcomes = parquet.publish(new, newer, changes=past(made))
    assert [type(outcome) for outcome in outcomes] == [SinkUnavailable] * 2
    assert "the disk is full" in str(outcomes[0])
    assert 1 in [row["id"] for row in parquet.rows()]
    monkeypatch.undo()
    assert len([*parquet.sink.records(())]) == 3
    assert sorted(row["id"] for row in parquet.rows()) == [2, 3]
    found = parquet.show(new, newer, changes=past(made))
    assert parquet.check([*found, *past(made)]) == []
    assert parquet.staged_files() == []


def test_a_stage_that_vanishes_after_it_was_recorded_leaves_what_is_there(
    parquet: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash, then a ledger from before the job: nothing protects its staged file."""
    (made,) = parquet.show(parquet.replacing(1, 1))
    newer = parquet.replacing(2, 2)

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", refuse)
    parquet.publish(newer, changes=past(made))
    monkeypatch.undo()
    Path(newer.stage).unlink()
    (found,) = parquet.sink.records(())
    assert (found.output_key, found.state, found.target) == (
        made.output_key, State.CURRENT, made.target,
    )  # fmt: skip
    assert (kept(parquet), [row["id"] for row in parquet.rows()]) == ([], [1])
    (outcome,) = parquet.publish(newer, changes=past(made))
    assert type(outcome) is JobError
    assert parquet.check([made]) == []


def test_what_is_not_visible_is_kept_where_no_reader_looks(
    parquet: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("casparian_flow.engine.sinks.parts.GROUP_ROWS", 1)
    (file,) = parquet.show(parquet.sealed({"id": [1]}))
    stage = parquet.stage(2, split_bytes=1)
    for number in range(3):
        stage.write(pa.record_batch({"id": [number]}))
    (folder,) = parquet.show(*sinks.seal([stage]))
    inodes = [os.stat(each.target).st_ino for each in (file, folder)]
    told = parquet.tell(State.RETRACTED, file, folder)
    assert files(parquet) == []
    assert kept(parquet) == sorted([file_of(file.output_key), folder.output_key[:32]])
    assert parquet.check(told) == []
    parquet.tell(State.CURRENT, file, folder)
    assert [os.stat(each.target).st_ino for each in (file, folder)] == inodes
    assert kept(parquet) == []


def test_a_kept_file_that_was_altered_is_not_shown(parquet: Place) -> None:
    (made,) = parquet.show(parquet.sealed({"id": [1]}))
    parquet.tell(State.RETRACTED, made)
    (path,) = (parquet.home / "out" / ".casparian" / "kept" / TOPIC).iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SinkConflict, match="its bytes have changed"):
        parquet.tell(State.CURRENT, made)
    assert files(parquet) == []


def test_a_file_that_was_deleted_is_published_again(parquet: Place) -> None:
    """Its ledger was lost and its job ran again; the record still has it."""
    (made,) = parquet.show(parquet.sealed({"id": [1]}))
    Path(made.target).unlink()
    (again,) = parquet.show(parquet.sealed({"id": [1]}, attempt="a2"))
    assert [row["id"] for row in parquet.rows()] == [1]
    assert parquet.check([again]) == []


def test_a_sink_that_was_moved_is_changed_where_it_is(parquet: Place) -> None:
    """The ledger still says where it was."""
    (made,) = parquet.show(parquet.sealed({"id": [1]}))
    (parquet.home / "out").rename(parquet.home / "moved")
    sink = sinks.open_sink(f"parquet://{parquet.home}/moved", parquet.settings)
    sink.change(hidden(made))
    assert not (parquet.home / "moved" / TOPIC / Path(made.target).name).exists()
    (found,) = sink.records(())
    assert found.target.startswith(str(parquet.home / "moved"))


def test_a_transaction_that_was_killed_is_undone_by_whoever_looks(parquet: Place) -> None:
    (made,) = parquet.show(parquet.sealed({"id": [1]}))
    with parquet_record.opened(parquet.home / "out", write=False) as record:
        assert record
        (entry,) = record.all()

    def write() -> None:
        with parquet_record.opened(parquet.home / "out", write=True) as record:
            assert record
            record._connection.execute("PRAGMA cache_size = 1")
            filler = "x" * 5000
            record.put(
                msgspec.structs.replace(entry, output_key=f"{n}", facts=filler) for n in fill()
            )

    def fill() -> Iterator[int]:
        yield from range(50)
        crashpoint("test.filled")

    assert forks.dies(write, 1)
    (found,) = parquet.sink.records(())
    assert found.output_key == made.output_key
    assert parquet.check([made]) == []


def test_a_folder_that_is_no_sink_stays_as_it_is(parquet: Place) -> None:
    (parquet.home / "out" / TOPIC).mkdir(parents=True)
    parquet.sink.change([parquet.output()])
    parquet.sink.delete([parquet.output()])
    assert parquet.sink.upgrade() == []
    assert os.listdir(parquet.home / "out") == [TOPIC]


def test_a_record_that_is_damaged_is_said(parquet: Place) -> None:
    (made,) = parquet.show(parquet.sealed({"id": [1]}))
    record = parquet.home / "out" / ".casparian" / "outputs.sqlite3"
    record.write_bytes(b"notes" * 1000)
    with pytest.raises(SinkUnavailable, match="not a database") as refused:
        parquet.sink.change(hidden(made))
    assert "casparian upgrade" in refused.value.hint
    with pytest.raises(SinkUnavailable):
        list(parquet.sink.records(()))
    (fault,) = parquet.check([made])
    assert fault.startswith(f"{made.target}: cannot use the sink's record")
    record.unlink()
    assert parquet.sink.upgrade()
    assert [each.output_key for each in parquet.sink.records(())] == [made.output_key]


def test_a_publication_reads_only_the_entries_that_it_changes(parquet: Place) -> None:
    """Not those of the years before: each of its statements uses an index."""
    parquet.show(*(parquet.sealed({"id": [job]}, job) for job in range(1, 4)))
    asked: list[str] = []
    with parquet_record.opened(parquet.home / "out", write=True) as record:
        assert record
        entries = list(record.entries([parquet.output(2).output_key]).values())
        record._connection.set_trace_callback(asked.append)
        record.put(entries)
        record.moving()
        record.settled([], entries)
        record._connection.set_trace_callback(None)
        told = [each for each in asked if each.startswith(("SELECT", "UPDATE"))]
        assert len(told) == 2
        for statement in told:
            plan = record._connection.execute(f"EXPLAIN QUERY PLAN {statement}").fetchall()
            assert "USING INDEX outputs_moving" in str(plan[0]), plan
