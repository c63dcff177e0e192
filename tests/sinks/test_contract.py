"""What every sink must do (`engine.sinks.Sink`); each test runs once for each sink."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest

from casparian_flow.durable import owned
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks.base import LINEAGE
from casparian_flow.errors import JobError, OutputRefused, SinkConflict, SinkUnavailable
from casparian_flow.protocol import Output, Publication, State
from tests.disks import fill, in_memory, remount
from tests.sinks.stages import TOPIC, Place, published

ROOT = Path(__file__).parents[2]
HOSTILE_NAMES = [
    'qu"ote', "apos'trophe", "new\nline", "שלום", "\u202egpj.exe", "ü" * 128, " ", "a.b", "?", ":x",
    "select", "DROP TABLE sales; --", "🐟", "\\", "%s", "]", "rowid", "__index_level_0__",
]  # fmt: skip

PUBLISHER = """
import sys
import msgspec
from casparian_flow.config import DatabaseSettings
from casparian_flow.engine import sinks
from casparian_flow.protocol import Output, Publication

staged = msgspec.json.decode(sys.stdin.buffer.readline(), type=Output)
settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=DatabaseSettings)
sink = sinks.open_sink(staged.location, settings)
print("ready", flush=True)
sys.stdin.readline()
((outcome,),) = sink.publish([Publication(outputs=[staged])])
print(msgspec.json.encode(outcome).decode(), flush=True)
"""
"""A process that publishes one output when it is told to."""


def publisher(place: Place, output: Output) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", PUBLISHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin
    assert process.stdout
    for word in (output, place.settings):
        process.stdin.write(msgspec.json.encode(word) + b"\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"ready\n"
    return process


def test_rows_and_lineage_are_exact(place: Place) -> None:
    output = place.sealed({"id": [1, 2, None], "name": ["a", None, ""]}, job=7)
    (seen,) = place.publish(output)
    assert published(seen).rows == output.rows == 3
    assert published(seen).digest == output.digest
    lineage = dict(zip(LINEAGE, (107, 7, "ab" * 32, "1.2.3"), strict=True))
    assert place.rows() == [
        {"id": 1, "name": "a", **lineage},
        {"id": 2, "name": None, **lineage},
        {"id": None, "name": "", **lineage},
    ]


def test_nothing_is_visible_before_publish(place: Place) -> None:
    place.sealed({"id": [1]})
    assert place.rows() == []


def test_many_outputs_in_one_call(place: Place) -> None:
    outputs = [place.sealed({"id": [job]}, job, topic=f"t{job % 3}") for job in range(1, 11)]
    found = place.show(*outputs)
    assert sorted(row["id"] for t in range(3) for row in place.rows(f"t{t}")) == [*range(1, 11)]
    assert place.staged_files() == []
    assert place.check(found) == []


def test_a_file_without_rows(place: Place) -> None:
    found = place.show(place.sealed(pa.record_batch({"id": pa.array([], pa.int64())})))
    assert found[0].rows == 0
    assert place.rows() == []
    assert place.check(found) == []


def test_publishing_twice_is_publishing_once(place: Place) -> None:
    output = place.sealed({"id": [1, 2]})
    assert place.show(output) == place.show(output)
    assert len(place.rows()) == 2


def test_a_second_attempt_with_the_same_key_adopts_the_first(place: Place) -> None:
    """The ledger was lost and the job ran again: its rows are there already."""
    first = place.sealed({"id": [1, 2]}, job=1, key="same", slot="same")
    again = place.sealed({"id": [1, 2]}, job=9, key="same", slot="same", attempt="a9")
    (seen,) = place.show(first)
    (adopted,) = place.show(again)
    assert adopted.digest == seen.digest == first.digest != again.digest
    assert adopted.shown_at == seen.shown_at
    assert [row["_cf_job_id"] for row in place.rows()] == [1, 1]
    assert place.staged_files() == []


def test_one_key_twice_in_one_call(place: Place) -> None:
    outputs = [place.sealed({"id": [1]}, key="same", attempt=f"a{n}") for n in range(3)]
    found = place.show(*outputs)
    assert {output.digest for output in found} == {outputs[0].digest}
    assert len(place.rows()) == 1


@pytest.mark.slow
def test_two_processes_that_race_publish_once(place: Place) -> None:
    rounds = 5
    for number in range(rounds):
        rivals = [
            publisher(
                place, place.sealed({"id": [number] * 50}, key=f"{number}", attempt=f"{number}-{n}")
            )
            for n in range(2)
        ]
        for rival in rivals:
            assert rival.stdin
            rival.stdin.write(b"go\n")
            rival.stdin.flush()
        told = [msgspec.json.decode(r.communicate()[0], type=Output) for r in rivals]
        assert len({(seen.digest, seen.shown_at) for seen in told}) == 1
    assert sorted(row["id"] for row in place.rows()) == sorted([*range(rounds)] * 50)


@pytest.mark.slow_but("parquet")
def test_a_publisher_that_is_killed_leaves_the_rows_once(place: Place) -> None:
    """Killed at a moment nobody chose, then published again, as after any crash."""
    outputs = [place.sealed({"id": [*range(40_000)]}, job, attempt=f"{job}") for job in (1, 2, 3)]
    for output in outputs:
        process = publisher(place, output)
        assert process.stdin
        process.stdin.write(b"go\n")
        process.stdin.flush()
        process.kill()
        process.communicate()
    found = place.show(*outputs)
    assert [seen.rows for seen in found] == [40_000] * 3
    assert len(place.rows()) == 120_000
    assert place.check(found) == []


@pytest.mark.slow_but("parquet")
def test_readers_see_whole_outputs_only(place: Place) -> None:
    size, stop = 3000, threading.Event()
    seen: list[int] = []

    def poll() -> None:
        while not stop.is_set():
            seen.append(len(place.rows()))

    reader = threading.Thread(target=poll)
    reader.start()
    try:
        for job in range(1, 11):
            published(*place.publish(place.sealed({"id": [*range(size)]}, job)))
    finally:
        stop.set()
        reader.join()
    assert len(place.rows()) == 10 * size
    assert {count % size for count in seen} <= {0}
    assert seen == sorted(seen)


def test_a_lost_staged_file_is_told_of_and_stops_nobody_else(place: Place) -> None:
    lost, fine = place.sealed({"id": [1]}, job=1), place.sealed({"id": [2]}, job=2)
    Path(lost.stage).unlink()
    refused, seen = place.publish(lost, fine)
    assert isinstance(refused, JobError)
    assert not isinstance(refused, SinkUnavailable | OutputRefused)
    assert lost.stage in refused.message
    assert "it is gone" in refused.message
    published(seen)
    assert [row["id"] for row in place.rows()] == [2]


def test_a_staged_file_cut_at_any_byte_is_told_of(place: Place, seed: int) -> None:
    chance = random.Random(seed)
    for job in range(1, 9):
        output = place.sealed({"id": [*range(100)]}, job)
        os.truncate(output.stage, chance.randrange(output.size_bytes))
        (outcome,) = place.publish(output)
        assert type(outcome) is JobError
        assert output.stage in outcome.message
    assert place.rows() == []


@pytest.mark.of_a_folder
def test_a_folder_that_somebody_deletes_meanwhile_is_made_again(place: Place) -> None:
    published(*place.publish(place.sealed({"id": [1]}, job=1)))
    output = place.sealed({"id": [2]}, job=2)
    shutil.rmtree(place.home / "out")
    (outcome,) = place.publish(output)
    assert type(outcome) is JobError
    assert "it is gone" in outcome.message
    assert place.rows() == []
    published(*place.publish(place.sealed({"id": [2]}, job=2, attempt="a2")))
    assert [row["id"] for row in place.rows()] == [2]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
@pytest.mark.slow_cases("mssql")
def test_hostile_column_names(place: Place, name: str) -> None:
    published(*place.publish(place.sealed({"plain": [1], name: ["x"]})))
    published(*place.publish(place.sealed({name: ["y"]}, job=2)))
    assert [row[name] for row in place.rows()] == ["x", "y"]


@pytest.mark.slow_cases("mssql")
def test_the_line_of_a_record_is_a_column(place: Place) -> None:
    published(*place.publish(place.sealed({"v": ["x", "y"], "_cf_line": [2, 3]})))
    assert [(row["v"], row["_cf_line"]) for row in place.rows()] == [("x", 2), ("y", 3)]
    with pytest.raises(OutputRefused, match="'_cf_line' is reserved"):
        place.sealed({"v": ["z"], "_cf_line": ["four"]}, job=2)


@pytest.mark.of_a_folder
def test_a_column_name_as_long_as_a_filename(place: Place) -> None:
    test_hostile_column_names(place, "ü" * 255)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["_cf_job_id"], "'_cf_job_id' is reserved"),
        (["_CF_anything"], "'_CF_anything' is reserved"),
        (["_CF_line"], "'_CF_line' is reserved"),
        (["a", "a"], "'a' occurs twice"),
        (["a", ""], "'' is empty"),
        (["a\0b"], r"has a NUL character"),
        ([], "has no columns"),
    ],
)
def test_column_names_that_are_refused(place: Place, names: list[str], said: str) -> None:
    batch = pa.RecordBatch.from_arrays([pa.array([1])] * len(names), names=names)
    with pytest.raises(OutputRefused, match=said) as refused:
        place.sealed(batch)
    assert repr(TOPIC) in refused.value.message
    assert place.staged_files() == []


@pytest.mark.parametrize(
    "kind",
    [
        pa.month_day_nano_interval(),
        pa.struct([]),
        pa.dense_union([pa.field("a", pa.int8())]),
        pa.run_end_encoded(pa.int32(), pa.int64()),
        pa.binary(0),
        pa.decimal128(5, -2),
    ],
    ids=str,
)
def test_a_type_that_cannot_be_stored_is_refused_by_name(place: Place, kind: Any) -> None:
    with pytest.raises(OutputRefused, match="column 'odd' ") as refused:
        place.sealed({"id": pa.nulls(2, pa.int64()), "odd": pa.nulls(2, kind)})
    assert str(kind) in refused.value.message
    assert place.staged_files() == []


def test_a_value_that_cannot_be_stored_is_refused_when_the_topic_ends_at_the_latest(
    place: Place,
) -> None:
    """Parquet keeps seconds as milliseconds, and these overflow; the others see it at once."""
    stage = place.stage()
    with pytest.raises(OutputRefused, match=r"column 'when' \(timestamp\[s\]\)"):
        stage.write(pa.record_batch({"id": [1], "when": pa.array([2**62], pa.timestamp("s"))}))
        stage.finish()
    stage.discard()
    assert place.staged_files() == []


@pytest.mark.parametrize("topic", ["", ".", "..", "../up", "a/b", ".hidden", "_cf_outputs", "a\nb"])
def test_topics_that_could_not_be_a_folder_or_a_table(place: Place, topic: str) -> None:
    with pytest.raises(OutputRefused, match="cannot name a folder or table"):
        place.stage(topic=topic)


def test_modes_that_there_are_not(place: Place) -> None:
    with pytest.raises(OutputRefused, match="there is no mode 'upsert'") as refused:
        place.stage(mode="upsert")
    assert refused.value.hint == "use one of append, replace, error"


def test_discard_leaves_nothing_at_any_time(place: Place) -> None:
    batch = pa.record_batch({"id": [1]})
    opened, written, finished, sealed = (place.stage(attempt=f"a{n}") for n in range(4))
    other = place.stage(attempt="other")
    for stage in (written, finished, sealed, other):
        stage.write(batch)
    finished.finish()
    sealed.seal()
    for stage in (opened, written, finished, sealed):
        stage.discard()
        stage.discard()
    assert place.staged_files() == [other.path.name]
    published(*place.publish(*sinks.seal([other])))
    assert len(place.rows()) == 1


def test_two_attempts_do_not_share_a_stage(place: Place) -> None:
    place.stage(attempt="a1").discard()
    stage = place.stage(attempt="a1")
    with pytest.raises(SinkUnavailable):
        place.stage(attempt="a1")
    stage.discard()


def test_a_stage_that_cannot_be_opened_leaves_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(pa, "OSFile", refuse)
    with pytest.raises(SinkUnavailable, match="too many open files"):
        place.stage()
    assert not place.staged_files()


@pytest.mark.of_a_folder
def test_our_outputs_are_marked_as_ours(place: Place) -> None:
    place.publish(place.sealed({"id": [1]}))
    marked = owned(place.home / "out" / ".casparian")
    assert marked == ([TOPIC] if place.scheme == "parquet" else ["tables.sqlite3*"])


@pytest.mark.of_a_folder
def test_a_target_that_cannot_be_written(place: Place) -> None:
    """A file where the folder should be: it holds for root as well."""
    (place.home / "out").write_bytes(b"not a folder")
    with pytest.raises(SinkUnavailable, match=r"cannot write .*out"):
        place.stage()
    assert (place.home / "out").read_bytes() == b"not a folder"


STAGER = """
import sys
from pathlib import Path
from casparian_flow.errors import SinkUnavailable
from tests.sinks.stages import Place

try:
    Place(sys.argv[1], Path(sys.argv[2])).stage()
except SinkUnavailable as refused:
    print(refused.message, refused.hint, sep="\\n")
"""
"""Opens a stage, and prints what the sink says of it."""


@pytest.mark.of_a_folder
@pytest.mark.slow_but("parquet")
def test_a_folder_without_the_right_to_write(place: Place) -> None:
    command = [sys.executable, "-c", STAGER, place.scheme, str(place.home)]
    if os.geteuid() == 0:  # it may write everywhere, until it gives that right up
        rights = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}", *command]
        if not shutil.which("setpriv"):
            pytest.skip("NOT PROVEN: what a sink says without write permission; we are root, and "
                        "there is no setpriv to be less")  # fmt: skip
    (place.home / "out").mkdir(mode=0o500)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    message, hint = done.stdout.splitlines() or [done.stderr, ""]
    assert "permission denied" in message
    assert "write permission" in hint


@pytest.mark.parametrize("fault", ["forgotten", "other rows", "other state"])
def test_check_tells_of_outputs_that_are_not_as_they_should_be(place: Place, fault: str) -> None:
    good, bad = place.show(*(place.sealed({"id": [1, 2]}, job) for job in (1, 2)))
    wrong: dict[str, dict[str, Any]] = {
        "forgotten": {"output_key": "0" * 64},
        "other rows": {"rows": 3},
        "other state": {"state": State.RETRACTED},
    }
    (said,) = place.sink.check([good, msgspec.structs.replace(bad, **wrong[fault])])
    assert said.startswith(bad.target)


@pytest.mark.parametrize("state", [*State])
def test_check_tells_of_rows_that_are_gone_whoever_sees_them(place: Place, state: State) -> None:
    good, bad = place.show(place.sealed({"id": [1]}, 1), place.sealed({"id": [1]}, 2, state=state))
    place.damage(bad)
    (said,) = place.sink.check([good, bad])
    assert said.startswith(bad.target)


@pytest.mark.of_a_folder
def test_check_tells_of_a_sink_that_is_gone(place: Place) -> None:
    made = place.show(place.sealed({"id": [1]}))
    (place.home / "out").rename(place.home / "elsewhere")
    (said,) = place.sink.check(made)
    assert said.startswith(made[0].target)
    assert not (place.home / "out").exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of one mebibyte."""
    with in_memory(tmp_path / "disk", "1m") as folder:
        yield folder


@pytest.mark.of_a_folder
@pytest.mark.parametrize("moment", ["staging", "publishing"])
def test_a_full_disk_is_waited_for(place: Place, disk: Path, moment: str) -> None:
    place = Place(place.scheme, disk)
    if moment == "staging":
        with pytest.raises(SinkUnavailable, match="the disk is full") as refused:
            place.sealed({"noise": [os.urandom(4096) for _ in range(1000)]})
        assert "free some space" in refused.value.hint
        assert place.staged_files() == []
        published(*place.publish(place.sealed({"id": [1]})))
        return
    output = place.sealed({"noise": [os.urandom(2048) for _ in range(100)]})
    ballast = fill(disk)
    (outcome,) = place.publish(output)
    assert isinstance(outcome, SinkUnavailable), outcome
    assert "disk is full" in outcome.message or "is full" in outcome.message
    assert place.rows() == []
    ballast.unlink()
    published(*place.publish(output))
    assert len(place.rows()) == 100


@pytest.mark.of_a_folder
def test_a_read_only_disk_is_waited_for(place: Place, disk: Path) -> None:
    place = Place(place.scheme, disk)
    published(*place.publish(place.sealed({"id": [1]}, job=1)))
    output = place.sealed({"id": [2]}, job=2)
    remount(disk, "ro")
    (outcome,) = place.publish(output)
    assert isinstance(outcome, SinkUnavailable), outcome
    assert "read-only" in outcome.message or "readonly" in outcome.message
    with pytest.raises(SinkUnavailable, match="the filesystem is read-only"):
        place.stage(job=3)
    remount(disk, "rw")
    published(*place.publish(output))
    assert [row["id"] for row in place.rows()] == [1, 2]


@pytest.mark.of_a_folder
def test_a_foreign_target_is_left_untouched(place: Place) -> None:
    output = place.sealed({"id": [1]})
    if place.scheme == "parquet":
        foreign = place.home / "out" / TOPIC / f"{output.version_slot[:32]}.parquet"
        foreign.parent.mkdir()
    else:
        foreign = place.database
    foreign.write_bytes(b"somebody's own bytes" * 100)
    (outcome,) = place.publish(output)
    assert isinstance(outcome, SinkConflict)
    assert str(foreign) in outcome.message
    assert "left untouched" in outcome.message
    assert foreign.read_bytes() == b"somebody's own bytes" * 100
    assert Path(output.stage).exists()


# States. The ledger decides, the sink shows what it is told. What each test says of rows holds for
# every sink.


def ids(place: Place, topic: str = TOPIC) -> list[Any]:
    return sorted(row["id"] for row in place.rows(topic))


SHOWN = {
    ("append", State.CURRENT), ("append", State.PAST), ("error", State.CURRENT),
    ("error", State.PAST), ("replace", State.CURRENT),
}  # fmt: skip
"""The modes and states of outputs that a topic shows."""


@pytest.mark.parametrize("mode", ["append", "replace", "error"])
@pytest.mark.parametrize("state", [*State])
def test_a_topic_shows_what_stands(place: Place, mode: str, state: State) -> None:
    place.show(place.sealed({"id": [0]}, 10))
    (made,) = place.show(place.sealed({"id": [1, 2]}, mode=mode, state=state))
    is_shown = (mode, state) in SHOWN
    assert ids(place) == ([0, 1, 2] if is_shown else [0])
    assert made.state == state
    assert (bool(made.shown_at), bool(made.hidden_at)) == (is_shown, False)
    assert place.check([made]) == []
    assert place.staged_files() == []


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("before", [*State])
def test_an_output_goes_from_any_state_to_any(place: Place, mode: str, before: State) -> None:
    columns = {"id": [1, 2], "real": [0.1, -0.0], "bytes": [b"\0", None], "text": ["é", ""]}
    (made,) = place.show(place.sealed(columns, mode=mode, state=State.CURRENT))
    rows = place.rows()
    for after in State:
        place.tell(before, made)
        for _ in range(2):
            told = place.tell(after, made)
        assert place.rows() == (rows if (mode, after) in SHOWN else [])
        assert place.check(told) == []


def test_a_newer_version_takes_the_place_of_an_older_one(place: Place) -> None:
    first, _ = place.show(
        place.replacing(1, 1, {"id": [1, 2]}), place.replacing(2, 1, {"id": [7]}, slot="other")
    )
    assert ids(place) == [1, 2, 7]
    past = msgspec.structs.replace(first, state=State.PAST)
    second = place.show(place.replacing(3, 2, {"id": [3]}), changes=[past])
    assert ids(place) == [3, 7]
    assert place.check([*second, past]) == []
    assert place.staged_files() == []


def test_an_older_version_that_comes_late_is_published_as_past(place: Place) -> None:
    place.show(place.replacing(2, 2))
    late = place.replacing(1, 1, state=State.PAST)
    for _ in range(2):
        (made,) = place.show(late)
        assert ids(place) == [2]
        assert made.shown_at == ""
    assert place.check([made]) == []


def test_a_roll_back_and_a_roll_forward(place: Place) -> None:
    """Two artifacts have worked one version; rows go out of sight and come back."""
    (good,) = place.show(place.replacing(1, 1, {"id": [1, 2]}))
    hidden = msgspec.structs.replace(good, state=State.HIDDEN)
    (bad,) = place.show(place.replacing(2, 1, {"id": [9]}), changes=[hidden])
    assert ids(place) == [9]
    for _ in range(2):
        place.sink.change([good, msgspec.structs.replace(bad, state=State.HIDDEN)])
        assert ids(place) == [1, 2]
        place.sink.change([hidden, bad])
        assert ids(place) == [9]
    assert place.check([hidden, bad]) == []


def test_times_tell_when_rows_were_first_seen_and_ceased_to_be(place: Place) -> None:
    (made,) = place.show(place.sealed({"id": [1]}, state=State.HIDDEN))
    place.tell(State.CURRENT, made)
    (shown,) = place.sink.records(())
    assert shown.shown_at
    assert shown.hidden_at == ""
    place.tell(State.RETRACTED, made)
    (hidden,) = place.sink.records(())
    assert hidden.shown_at == shown.shown_at < hidden.hidden_at
    place.tell(State.CURRENT, made)
    assert [*place.sink.records(())] == [shown]


def test_the_mode_is_told_with_the_state(place: Place) -> None:
    (past,) = place.show(place.sealed({"id": [1]}, state=State.PAST))
    assert ids(place) == [1]
    told = place.tell(State.PAST, past, mode="replace")
    assert ids(place) == []
    assert place.check(told) == []
    assert [record.mode for record in place.sink.records(())] == ["replace"]
    place.tell(State.PAST, past, mode="append")
    assert ids(place) == [1]


def test_a_job_shows_all_its_topics_or_none(place: Place) -> None:
    fine = place.sealed({"id": [1]}, 1, topic="fine")
    lost = place.sealed({"id": [1]}, 1)
    Path(lost.stage).unlink()
    assert [type(seen) for seen in place.publish(fine, lost)] == [JobError, JobError]
    assert place.rows("fine") == place.rows() == []
    again = place.sealed({"id": [1]}, 1, attempt="a2")
    place.show(fine, again)
    assert len(place.rows("fine")) == len(place.rows()) == 1


def test_a_job_that_is_refused_changes_no_other(place: Place) -> None:
    (first,) = place.show(place.replacing(1, 1))
    lost = place.replacing(2, 2)
    Path(lost.stage).unlink()
    past = msgspec.structs.replace(first, state=State.PAST)
    assert type(place.publish(lost, changes=[past])[0]) is JobError
    assert ids(place) == [1]
    assert place.check([first]) == []


def test_jobs_of_one_call_follow_each_other(place: Place) -> None:
    """Two versions of a file: the second takes the place of the first."""
    first, second = place.replacing(1, 1), place.replacing(2, 2)
    past = msgspec.structs.replace(first, state=State.PAST)
    jobs = [Publication(outputs=[first]), Publication(outputs=[second], changes=[past])]
    (made,), (later,) = (found for found in place.sink.publish(jobs) if isinstance(found, list))
    assert ids(place) == [2]
    assert place.check([msgspec.structs.replace(made, state=State.PAST), later]) == []


@pytest.mark.slow_cases("mssql")
def test_readers_see_one_version_or_the_other(place: Place) -> None:
    size, versions = 500, 20
    (last,) = place.show(place.replacing(1, 1, {"id": [1] * size}))
    stop, seen = threading.Event(), set[tuple[int, ...]]()

    def poll() -> None:
        while not stop.is_set():
            rows = [row["id"] for row in place.rows()]
            seen.add((len(rows), *sorted(set(rows))))

    reader = threading.Thread(target=poll)
    reader.start()
    try:
        for version in range(2, versions + 1):
            past = msgspec.structs.replace(last, state=State.PAST)
            newer = place.replacing(version, version, {"id": [version] * size})
            (last,) = place.show(newer, changes=[past])
    finally:
        stop.set()
        reader.join()
    assert seen <= {(size, version) for version in range(1, versions + 1)}


def test_in_mode_error_only_our_own_rows_may_be_there(place: Place) -> None:
    for job in (1, 2):
        place.show(place.sealed({"id": [job]}, job, mode="error"))
    assert ids(place) == [1, 2]
    place.intrude()
    (outcome,) = place.publish(place.sealed({"id": [3]}, 3, mode="error"))
    assert isinstance(outcome, SinkConflict), outcome
    assert TOPIC in outcome.message
    assert "mode" in outcome.message
    assert 3 not in [row.get("id") for row in place.rows()]


# Outputs without rows: the plugin gave the topic none, and there is no staged file.


def test_an_output_without_a_staged_file_is_recorded_only(place: Place) -> None:
    (made,) = place.show(place.output())
    assert (made.rows, made.state) == (0, State.CURRENT)
    assert place.rows() == []
    assert place.check([made]) == []
    told = place.tell(State.RETRACTED, made)
    assert place.check(told) == []
    (found,) = place.sink.records(())
    assert (found.output_key, found.state) == (made.output_key, State.RETRACTED)
    place.sink.delete([made])
    assert [*place.sink.records(())] == []


def test_a_version_that_gives_nothing_takes_the_rows_away(place: Place) -> None:
    (first,) = place.show(place.replacing(1, 1))
    past = msgspec.structs.replace(first, state=State.PAST)
    nothing = place.output(2, mode="replace", slot="one.csv", ordinal=2)
    (made,) = place.show(nothing, changes=[past])
    assert ids(place) == []
    place.show(place.replacing(3, 3), changes=place.tell(State.PAST, made))
    assert ids(place) == [3]


# Records.


def test_records_have_the_facts_of_outputs_that_the_ledger_does_not_know(place: Place) -> None:
    known, unknown = place.show(
        place.sealed({"id": [1]}, 1), place.sealed({"id": [2]}, 2, path=b"\xff/2.csv", topics="a/b")
    )
    (found,) = place.sink.records({known.output_key})
    assert found == msgspec.structs.replace(unknown, stage="", size_bytes=0)
    place.tell(State.RETRACTED, known)
    assert [output.state for output in place.sink.records({known.output_key})] == [
        State.RETRACTED, State.CURRENT,
    ]  # fmt: skip
    assert place.check([*place.sink.records(())]) == []


def test_a_sink_that_is_not_there_has_no_records(place: Place) -> None:
    output = place.output()
    assert [*place.sink.records(())] == []
    place.sink.change([output])
    place.sink.delete([output])
    assert [*place.sink.records(())] == []
    assert not (place.home / "out").exists()


def test_what_is_adopted_gets_the_state_it_is_published_with(place: Place) -> None:
    (made,) = place.show(place.sealed({"id": [1]}))
    (told,) = place.show(place.sealed({"id": [1]}, attempt="a2", state=State.RETRACTED))
    assert told.state == State.RETRACTED
    assert told.shown_at == made.shown_at
    assert place.rows() == []
    place.show(place.sealed({"id": [1]}, attempt="a3"))
    assert ids(place) == [1]
    assert place.staged_files() == []


def test_what_is_not_recorded_is_passed_over(place: Place) -> None:
    (made,) = place.show(place.sealed({"id": [1]}))
    place.sink.change([place.output(7), msgspec.structs.replace(made, state=State.HIDDEN)])
    assert ids(place) == []
    assert [output.output_key for output in place.sink.records(())] == [made.output_key]


def test_nothing_changes_if_an_output_that_is_to_be_visible_is_not_whole(place: Place) -> None:
    shown, fine, bad = place.show(
        place.sealed({"id": [1]}, 1),
        *(place.sealed({"id": [job]}, job, state=State.RETRACTED) for job in (2, 3)),
    )
    place.damage(bad)
    wanted = [
        msgspec.structs.replace(output, state=state)
        for output, state in ((shown, State.HIDDEN), (fine, State.CURRENT), (bad, State.CURRENT))
    ]
    with pytest.raises(SinkConflict):
        place.sink.change(wanted)
    assert ids(place) == [1]
    place.sink.change([msgspec.structs.replace(bad, state=State.HIDDEN)])
    assert ids(place) == [1]


@pytest.mark.parametrize("state", [*State])
def test_what_is_deleted_can_be_published_again(place: Place, state: State) -> None:
    kept, gone = place.show(place.sealed({"id": [1]}, 1), place.sealed({"id": [2]}, 2, state=state))
    for _ in range(2):
        place.sink.delete([gone])
    assert ids(place) == [1]
    assert [output.output_key for output in place.sink.records(())] == [kept.output_key]
    assert place.check([kept]) == []
    assert len(place.check([gone])) == 1
    place.show(place.sealed({"id": [2]}, 2, attempt="a2"))
    assert ids(place) == [1, 2]


def test_a_sink_of_today_needs_no_upgrade(place: Place) -> None:
    assert place.sink.upgrade() == []
    (made,) = place.show(place.sealed({"id": [1]}))
    assert place.sink.upgrade() == []
    assert place.check([made]) == []
