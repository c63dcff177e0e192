"""Parquet sinks of earlier releases, and sinks that have lost their record."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from casparian_flow.engine.sinks import parquet_moves, parts
from casparian_flow.errors import SinkConflict, SinkUnavailable
from casparian_flow.protocol import Output, State
from tests.sinks.parquet_acts import make_old
from tests.sinks.stages import TOPIC, Place


def old(place: Place) -> dict[str, Output]:
    """A sink of an earlier release; the outputs by what they are, as the ledger has them."""
    shown, taken = place.show(place.sealed({"id": [1]}, 1), place.sealed({"id": [2]}, 2))
    newest, _ = place.show(place.replacing(3, 2), place.sealed({"id": [4]}, 4, topic="more"))
    made = {"shown": shown, "newest": newest, "retracted": taken}
    make_old(place, [taken])
    ledgers = {}
    for name, output in made.items():
        key = output.location_slot if output.mode == "replace" else output.output_key
        state = State.RETRACTED if name == "retracted" else output.state
        target = str(place.home / "out" / TOPIC / f"{key[:32]}.parquet")
        ledgers[name] = msgspec.structs.replace(output, state=state, target=target)
    return ledgers


def files(place: Place) -> dict[str, bytes]:
    root = place.home / "out"
    return {str(path.relative_to(root)): path.read_bytes() for path in root.glob("[!.]*/*")}


def test_a_sink_of_an_earlier_release_is_read_and_not_written(parquet: Place) -> None:
    outputs = old(parquet)
    before = files(parquet)
    assert parquet.check([*outputs.values()]) == []
    replaced = parquet.output(7, mode="replace", slot="one.csv", state=State.PAST)
    assert parquet.check([replaced]) == []  # an earlier release kept no file of it
    new = parquet.sealed({"id": [9]}, 9)
    refusals: list[Any] = [*parquet.publish(new)]
    for act in (parquet.sink.change, parquet.sink.delete):
        with pytest.raises(SinkUnavailable) as refused:
            act([outputs["shown"]])
        refusals.append(refused.value)
    assert {type(refusal) for refusal in refusals} == {SinkUnavailable}
    assert {refusal.hint for refusal in refusals} == {"casparian upgrade"}
    assert files(parquet) == before
    assert Path(new.stage).exists()


def test_its_records_come_from_footers(parquet: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = old(parquet)
    found = {output.output_key: output for output in parquet.sink.records(())}
    assert len(found) == 4
    states = {name: found[output.output_key].state for name, output in outputs.items()}
    assert states == {"shown": "past", "newest": "current", "retracted": "retracted"}
    for output in outputs.values():
        told = found[output.output_key]
        assert (told.rows, told.digest, told.path) == (1, output.digest, output.path)
    opened = []
    read = parts.read_footer

    def spy(path: Path) -> parts.Footer:
        opened.append(path)
        return read(path)

    monkeypatch.setattr(parts, "read_footer", spy)
    known = {output.output_key for output in found.values()}
    assert [each.state for each in parquet.sink.records(known)] == [State.RETRACTED]
    # A file that is named after its key need not be opened.
    assert sorted(path.name[:32] for path in opened) == sorted(
        [outputs["newest"].location_slot[:32], outputs["retracted"].output_key[:32]]
    )


def test_an_upgrade_touches_no_visible_file(parquet: Place) -> None:
    outputs = old(parquet)
    before, rows = files(parquet), parquet.rows()
    words = parquet.sink.upgrade()
    assert [line.partition(": ")[2] for line in words] == [
        "3 output(s) recorded", "1 output(s) recorded",
    ]  # fmt: skip
    assert parquet.sink.upgrade() == []
    assert (files(parquet), parquet.rows()) == (before, rows)
    assert not (parquet.home / "out" / parquet_moves.HIDDEN).exists()
    parquet.sink.change([*outputs.values()])
    assert parquet.check([*outputs.values()]) == []
    (back,) = parquet.tell(State.CURRENT, outputs["retracted"])
    assert sorted(row["id"] for row in parquet.rows()) == [1, 2, 3]
    past = msgspec.structs.replace(outputs["newest"], state=State.PAST)
    (newer,) = parquet.show(parquet.replacing(5, 3), changes=[past])
    assert newer.target == outputs["newest"].target
    assert parquet.check([outputs["shown"], back, past, newer]) == []


def test_what_the_first_release_wrote_is_upgraded(parquet: Place) -> None:
    """Its footers had less: no mode, no source and no path."""
    folder = parquet.home / "out" / TOPIC
    folder.mkdir(parents=True)
    facts = {
        "topic": TOPIC, "output_key": "ab" * 32, "file_version_id": "7", "job_id": "3",
        "source_hash": "cd" * 32, "plugin_version": "1.0.0", "rows": "2",
    }  # fmt: skip
    schema = pa.schema([("id", pa.int64())], {f"casparian.{k}": v for k, v in facts.items()})
    path = folder / f"{'ab' * 16}.parquet"
    pq.write_table(pa.table({"id": [1, 2]}).cast(schema), path)
    (old,) = parquet.sink.records(())
    assert parquet.sink.upgrade() == [f"{folder}: 1 output(s) recorded"]
    (found,) = parquet.sink.records(())
    assert (found.job_id, found.version_id, found.rows, found.state) == (3, 7, 2, State.PAST)
    assert (found.digest, found.target) == (parts.digest(path), str(path))
    assert msgspec.structs.replace(found, shown_at="") == msgspec.structs.replace(old, shown_at="")


def test_a_copy_of_an_output_must_go_first(parquet: Place) -> None:
    outputs = old(parquet)
    path = Path(outputs["shown"].target)
    copy = path.with_name(f"{'0' * 32}.parquet")
    shutil.copy(path, copy)
    with pytest.raises(SinkConflict, match="hold the same output") as refused:
        parquet.sink.upgrade()
    assert str(copy) in refused.value.message
    copy.unlink()
    assert parquet.sink.upgrade()


def test_files_of_others_are_left_alone(parquet: Place) -> None:
    folder = parquet.home / "out" / TOPIC
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"id": [1]}), folder / f"{'a' * 32}.parquet")
    (folder / ("b" * 32)).mkdir()
    (folder / f"{'c' * 32}.parquet").write_bytes(b"notes")
    before = sorted(os.listdir(folder))
    assert [*parquet.sink.records(())] == []
    (made,) = parquet.show(parquet.sealed({"id": [2]}))  # a new sink: none of them is ours
    assert {*before} < {*os.listdir(folder)}
    assert parquet.check([made]) == []


def test_a_lost_state_folder_is_built_anew_from_what_is_visible(parquet: Place) -> None:
    (v1,) = parquet.show(parquet.replacing(1, 1))
    past = msgspec.structs.replace(v1, state=State.PAST)
    (v2,) = parquet.show(parquet.replacing(2, 2), changes=[past])
    shutil.rmtree(parquet.home / "out" / ".casparian")
    assert [output.output_key for output in parquet.sink.records(())] == [v2.output_key]
    with pytest.raises(SinkUnavailable, match="its record is lost"):
        parquet.sink.change([v2])
    parquet.sink.upgrade()
    assert parquet.check([v2]) == []
    assert len(parquet.check([past])) == 1


def test_a_lost_record_is_built_anew_from_what_is_visible_and_what_is_kept(parquet: Place) -> None:
    (v1,) = parquet.show(parquet.replacing(1, 1))
    past = msgspec.structs.replace(v1, state=State.PAST)
    (v2,) = parquet.show(parquet.replacing(2, 2), changes=[past])
    for path in (parquet.home / "out" / ".casparian").glob("outputs*"):
        path.unlink()
    parquet.sink.upgrade()
    found = {output.output_key: output.state for output in parquet.sink.records(())}
    assert found == {v1.output_key: State.HIDDEN, v2.output_key: State.CURRENT}
    parquet.sink.change([past, v2])
    assert parquet.check([past, v2]) == []
