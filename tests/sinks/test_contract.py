"""What every sink must do (`engine/sinks/base.py`); each test runs once for each sink."""

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
from casparian_flow.engine.sinks.base import KEY_DIGITS, LINEAGE, Claim
from casparian_flow.errors import JobError, OutputRefused, SinkConflict, SinkUnavailable
from casparian_flow.protocol import Published, StagedOutput
from tests.disks import fill, in_memory, remount
from tests.sinks.stages import TOPIC, Place, claims

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
from casparian_flow.protocol import Published, StagedOutput

staged = msgspec.json.decode(sys.stdin.buffer.readline(), type=StagedOutput)
settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=DatabaseSettings)
sink = sinks.open_sink(staged.location, settings)
print("ready", flush=True)
sys.stdin.readline()
(outcome,) = sink.publish([staged])
print(msgspec.json.encode(outcome).decode(), flush=True)
"""
"""A process that publishes one output when it is told to."""


def publisher(place: Place, output: StagedOutput) -> subprocess.Popen[bytes]:
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


def published(outcome: Published | JobError) -> Published:
    assert isinstance(outcome, Published), outcome
    return outcome


def test_rows_and_lineage_are_exact(place: Place) -> None:
    output = place.sealed({"id": [1, 2, None], "name": ["a", None, ""]}, job=7)
    (seen,) = place.publish(output)
    assert published(seen).rows == output.rows == 3
    assert not published(seen).adopted
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
    found = place.publish(*outputs)
    assert [published(seen).adopted for seen in found] == [False] * 10
    assert sorted(row["id"] for t in range(3) for row in place.rows(f"t{t}")) == [*range(1, 11)]
    assert place.staged_files() == []
    assert place.check(claims(outputs, found)) == []


def test_an_output_without_rows(place: Place) -> None:
    output = place.sealed(pa.record_batch({"id": pa.array([], pa.int64())}))
    found = place.publish(output)
    assert published(found[0]).rows == 0
    assert place.rows() == []
    assert place.sink.check(claims([output], found)) == []


def test_publishing_twice_is_publishing_once(place: Place) -> None:
    output = place.sealed({"id": [1, 2]})
    first, second = published(*place.publish(output)), published(*place.publish(output))
    assert (first.adopted, second.adopted) == (False, True)
    assert msgspec.structs.replace(second, adopted=False) == first
    assert len(place.rows()) == 2


def test_a_second_attempt_with_the_same_key_adopts_the_first(place: Place) -> None:
    """The ledger was lost and the job ran again: its rows are there already."""
    first = place.sealed({"id": [1, 2]}, job=1, key="same")
    again = place.sealed({"id": [1, 2]}, job=9, key="same", attempt="a9")
    (seen,) = place.publish(first)
    (adopted,) = place.publish(again)
    assert published(adopted).adopted
    assert published(adopted).digest == published(seen).digest == first.digest != again.digest
    assert [row["_cf_job_id"] for row in place.rows()] == [1, 1]
    assert place.staged_files() == []


def test_one_key_twice_in_one_call(place: Place) -> None:
    outputs = [place.sealed({"id": [1]}, key="same", attempt=f"a{n}") for n in range(3)]
    found = place.publish(*outputs)
    assert [published(seen).adopted for seen in found] == [False, True, True]
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
        told = [msgspec.json.decode(r.communicate()[0], type=Published) for r in rivals]
        assert sorted(seen.adopted for seen in told) == [False, True]
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
    found = place.publish(*outputs)
    assert [published(seen).rows for seen in found] == [40_000] * 3
    assert len(place.rows()) == 120_000
    assert place.check(claims(outputs, found)) == []


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


@pytest.mark.of_a_folder
def test_a_column_name_as_long_as_a_filename(place: Place) -> None:
    test_hostile_column_names(place, "ü" * 255)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["_cf_job_id"], "'_cf_job_id' is reserved"),
        (["_CF_anything"], "'_CF_anything' is reserved"),
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


@pytest.mark.parametrize("fault", ["forgotten", "other rows"])
def test_check_tells_of_claims_that_do_not_hold(place: Place, fault: str) -> None:
    outputs = [place.sealed({"id": [1, 2]}, job) for job in (1, 2)]
    good, bad = claims(outputs, place.publish(*outputs))
    wrong = {"forgotten": {"output_key": "0" * 64}, "other rows": {"rows": 3}}[fault]
    (said,) = place.sink.check([good, msgspec.structs.replace(bad, **wrong)])
    assert said.startswith(bad.target)


@pytest.mark.of_a_folder
def test_check_tells_of_a_sink_that_is_gone(place: Place) -> None:
    output = place.sealed({"id": [1]})
    made = claims([output], place.publish(output))
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
        foreign = place.home / "out" / TOPIC / f"{output.output_key[:32]}.parquet"
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


# Modes, retract and reinstate. What each test says of rows holds for every sink.


def ids(place: Place, topic: str = TOPIC) -> list[Any]:
    return sorted(row["id"] for row in place.rows(topic))


def empty(place: Place, job: int, ordinal: int) -> StagedOutput:
    """What a Worker stages where a plugin published nothing to a topic in mode replace."""
    stage = place.stage(job, attempt=f"a{job}", mode="replace", ordinal=ordinal)
    stage.finish()
    return sinks.seal([stage])[0]


def test_a_newer_version_takes_the_place_of_an_older_one(modes: Place) -> None:
    first, other = (
        modes.replacing(1, 1, {"id": [1, 2]}),
        modes.replacing(2, 1, {"id": [7]}, slot="other"),
    )
    modes.publish(first, other)
    assert ids(modes) == [1, 2, 7]
    second = modes.replacing(3, 2, {"id": [3]})
    (seen,) = modes.publish(second)
    assert ids(modes) == [3, 7]
    assert modes.sink.check(claims([second], [seen])) == []
    assert modes.staged_files() == []


def test_an_older_version_that_comes_late_shows_no_rows(modes: Place) -> None:
    late, newer = modes.replacing(1, 1, {"id": [1]}), modes.replacing(2, 2, {"id": [2]})
    for output in (newer, late):
        published(*modes.publish(output))
    assert ids(modes) == [2]
    published(*modes.publish(late))
    assert ids(modes) == [2]
    assert modes.staged_files() == []


def test_of_one_version_the_later_job_has_the_place(modes: Place) -> None:
    """Another version of the plugin has worked it again."""
    for job in (2, 3, 1):
        published(*modes.publish(modes.replacing(job, 1, {"id": [job]})))
    assert ids(modes) == [3]


def test_a_version_that_gives_nothing_takes_the_rows_away(modes: Place) -> None:
    published(*modes.publish(modes.replacing(1, 1, {"id": [1]})))
    output = empty(modes, 2, 2)
    (seen,) = modes.publish(output)
    assert published(seen).rows == 0
    assert ids(modes) == []
    assert modes.sink.check(claims([output], [seen])) == []
    published(*modes.publish(modes.replacing(1, 1, {"id": [1]}, key="late")))
    assert ids(modes) == []
    published(*modes.publish(modes.replacing(3, 3, {"id": [3]})))
    assert ids(modes) == [3]


def test_a_topic_that_begins_with_nothing(modes: Place) -> None:
    output = empty(modes, 1, 1)
    (seen,) = modes.publish(output)
    assert modes.rows() == []
    assert modes.sink.check(claims([output], [seen])) == []
    published(*modes.publish(modes.replacing(2, 2, {"id": [2]})))
    assert ids(modes) == [2]


def test_replace_leaves_alone_what_was_appended(modes: Place) -> None:
    published(*modes.publish(modes.sealed({"id": [1]}, job=1)))
    published(*modes.publish(modes.replacing(2, 2, {"id": [2]})))
    published(*modes.publish(modes.replacing(3, 3, {"id": [3]})))
    assert ids(modes) == [1, 3]


@pytest.mark.slow_cases("mssql")
def test_readers_see_one_version_or_the_other(modes: Place) -> None:
    size, versions = 500, 20
    published(*modes.publish(modes.replacing(1, 1, {"id": [1] * size})))
    stop, seen = threading.Event(), set[tuple[int, ...]]()

    def poll() -> None:
        while not stop.is_set():
            rows = [row["id"] for row in modes.rows()]
            seen.add((len(rows), *sorted(set(rows))))

    reader = threading.Thread(target=poll)
    reader.start()
    try:
        for version in range(2, versions + 1):
            published(*modes.publish(modes.replacing(version, version, {"id": [version] * size})))
    finally:
        stop.set()
        reader.join()
    assert seen <= {(size, version) for version in range(1, versions + 1)}


def test_in_mode_error_only_our_own_rows_may_be_there(modes: Place) -> None:
    for job in (1, 2):
        published(*modes.publish(modes.sealed({"id": [job]}, job, mode="error", attempt=f"a{job}")))
    assert ids(modes) == [1, 2]
    modes.intrude()
    output = modes.sealed({"id": [3]}, 3, mode="error")
    (outcome,) = modes.publish(output)
    assert isinstance(outcome, SinkConflict), outcome
    assert TOPIC in outcome.message
    assert "mode" in outcome.message
    assert 3 not in [row.get("id") for row in modes.rows()]


def test_what_is_retracted_is_out_of_sight_and_comes_back_as_it_was(modes: Place) -> None:
    columns = {"id": [1, 2], "real": [0.1, -0.0], "bytes": [b"\0", None], "text": ["é", ""]}
    outputs = [modes.sealed(columns, job, attempt=f"a{job}") for job in (1, 2)]
    made = claims(outputs, modes.publish(*outputs))
    before = modes.rows()
    for _ in range(2):
        modes.sink.retract(made[0])
    assert {row["_cf_job_id"] for row in modes.rows()} == {2}
    assert modes.sink.check(made[1:]) == []
    assert len(modes.sink.check(made)) == 1
    wider = modes.sealed({"added": ["x"], "id": [3]}, job=3, attempt="a3")
    published(*modes.publish(wider))
    for _ in range(2):
        modes.sink.reinstate(made[0])
    assert modes.sink.check(made) == []
    known = [{name: row[name] for name in before[0]} for row in modes.rows()]
    order = [row for row in known if row["_cf_job_id"] != 3]
    assert sorted(map(repr, order)) == sorted(map(repr, before))


def test_what_is_retracted_stays_so_when_it_is_published_again(modes: Place) -> None:
    """Its ledger was lost, and its job ran again."""
    output = modes.sealed({"id": [1]})
    (made,) = claims([output], modes.publish(output))
    modes.sink.retract(made)
    again = published(*modes.publish(modes.sealed({"id": [1]}, attempt="a2")))
    assert again.adopted
    assert again.retracted
    assert modes.rows() == []
    (found,) = modes.sink.inventory(())
    assert found.retracted
    assert found.output_key == output.output_key
    assert (found.rows, found.slot, found.mode) == (1, output.slot, "append")
    known = {output.output_key[:KEY_DIGITS]}
    assert list(modes.sink.inventory(known)) == [found]
    modes.sink.reinstate(made)
    assert ids(modes) == [1]
    assert [each.retracted for each in modes.sink.inventory(())] == [False]
    assert list(modes.sink.inventory(known)) == []


def test_a_retracted_version_keeps_its_place(modes: Place) -> None:
    old, new = modes.replacing(1, 1, {"id": [1]}), modes.replacing(2, 2, {"id": [2]})
    modes.publish(old)
    (made,) = modes.publish(new)
    modes.sink.retract(*claims([new], [made]))
    assert ids(modes) == []
    published(*modes.publish(modes.replacing(3, 1, {"id": [3]})))
    assert ids(modes) == []
    modes.sink.reinstate(*claims([new], [made]))
    assert ids(modes) == [2]
    modes.sink.retract(*claims([new], [made]))
    published(*modes.publish(modes.replacing(4, 3, {"id": [4]})))
    assert ids(modes) == [4]
    modes.sink.reinstate(*claims([new], [made]))
    assert ids(modes) == [4]


def test_what_is_not_there_cannot_be_reinstated(modes: Place) -> None:
    output = modes.sealed({"id": [1]})
    absent = Claim(
        topic=TOPIC, output_key=output.output_key, job_id=1, target="t", rows=1,
        digest=output.digest,
    )  # fmt: skip
    modes.sink.retract(absent)
    with pytest.raises(SinkConflict):
        modes.sink.reinstate(absent)
