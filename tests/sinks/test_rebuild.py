"""What a rebuild publishes takes the place of what stands, in one change, whatever its columns."""

from __future__ import annotations

import datetime
import os
import shutil
import sqlite3
import threading
from contextlib import closing
from decimal import Decimal
from typing import Any

import msgspec
import pyarrow as pa
import pytest

from casparian_flow import crashpoints
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks import parquet_moves, parts
from casparian_flow.engine.sinks import query as queries
from casparian_flow.errors import (
    CasparianError,
    JobError,
    OutputRefused,
    SinkConflict,
    SinkUnavailable,
)
from casparian_flow.protocol import Output, State
from tests.sinks import forks
from tests.sinks.stages import TOPIC, Place
from tests.sinks.test_query import listed

DAY = datetime.date(2026, 1, 31)
MENDED = {
    "text to integer": ("7", 7, pa.int64()),
    "integer to text": (7, "007", pa.string()),
    "integer to decimal": (7, Decimal("7.50"), pa.decimal128(5, 2)),
    "double to integer": (7.0, 7, pa.int64()),
    "date to timestamp": (DAY, datetime.datetime(2026, 1, 31, 12), pa.timestamp("us")),
    "text to list": ("7", [7], pa.list_(pa.int64())),
}
"""What was mended -> the value before, the value after, and its type."""


def batch(name: str, job: int, *, mended: bool) -> Any:
    before, after, kind = MENDED[name]
    values = pa.array([after], kind) if mended else pa.array([before])
    return pa.record_batch({"id": [job], "v": values})


def rebuilt(place: Place, name: str, job: int, generation: int = 1, **named: Any) -> Output:
    return place.sealed(
        batch(name, job, mended=True), job, key=f"{job} of {generation}", generation=generation,
        attempt=f"a{job}g{generation}", state=named.pop("state", State.HIDDEN), **named,
    )  # fmt: skip


def exchange(place: Place, old: list[Output], new: list[Output]) -> tuple[list[Output], ...]:
    """Tell the sink that a rebuild has ended."""
    told = [
        [msgspec.structs.replace(o, state=state) for o in of]
        for of, state in ((old, State.HIDDEN), (new, State.CURRENT))
    ]
    place.sink.change([*told[0], *told[1]])
    return tuple(told)


def asked(outputs: list[Output], question: str = f"SELECT * FROM {TOPIC}") -> Any:
    with queries.answer(question, [listed(o) for o in outputs]) as reader:
        return reader.read_all()


@pytest.mark.of_a_folder
@pytest.mark.parametrize("name", MENDED)
def test_a_mended_type(place: Place, name: str) -> None:
    old = place.show(*(place.sealed(batch(name, job, mended=False), job) for job in (1, 2, 3)))
    before = place.rows()
    new = place.show(*(rebuilt(place, name, job) for job in (1, 2, 3)))
    assert place.rows() == before
    assert place.check([*old, *new]) == []
    old, new = exchange(place, old, new)
    assert place.check([*old, *new]) == []
    assert [row["_cf_job_id"] for row in place.rows()] == [1, 2, 3]
    found = asked(new)
    assert found.num_rows == 3
    if name in ("text to integer", "double to integer"):
        assert found.schema.field("v").type == pa.int64()
    if place.scheme == "sqlite":
        with closing(sqlite3.connect(place.database)) as connection:
            kinds = dict(connection.execute(f"SELECT name, type FROM pragma_table_info('{TOPIC}')"))
        declared = {"text to integer": "INTEGER", "double to integer": "INTEGER"}
        assert kinds["v"] == declared.get(name, "TEXT")
    # A file that comes now has the mended type, and does not need to be of a rebuild.
    (late,) = place.show(place.sealed(batch(name, 9, mended=True), 9))
    assert [row["_cf_job_id"] for row in place.rows()] == [1, 2, 3, 9]
    # Rolled back, and forth again.
    if place.scheme == "parquet" and name != "double to integer":
        with pytest.raises(SinkConflict, match=late.target):
            exchange(place, new, old)
        assert [row["_cf_job_id"] for row in place.rows()] == [1, 2, 3, 9]
    place.tell(State.RETRACTED, late)
    new, old = exchange(place, new, old)
    assert [row["v"] for row in place.rows() if row["_cf_job_id"] < 9] == [r["v"] for r in before]
    old, new = exchange(place, old, new)
    (late,) = place.tell(State.CURRENT, late)
    assert place.check([*old, *new, late]) == []
    place.sink.delete(old)
    assert [row["_cf_job_id"] for row in place.rows()] == [1, 2, 3, 9]
    assert place.check([*new, late]) == []


BESIDE: dict[str, list[Any]] = {
    "text to integer": ["7", "7"],
    "integer to text": ["007", "7"],
    "integer to decimal": [Decimal("7.50"), Decimal(7)],
    "double to integer": [7.0, 7.0],
    "date to timestamp": ["2026-01-31 12:00:00", "2026-01-31"],
    "text to list": ["[7]", "7"],
}
"""What was mended -> what a query shows of the new value beside the old one."""


@pytest.mark.parametrize("name", BESIDE)
def test_a_value_that_was_mended_beside_one_that_was_not(parquet: Place, name: str) -> None:
    """What the folder cannot show, a query does: no value is cast to a type that does not hold it.

    At the seven that is a double and the seven that is a whole number, it is the type which says
    that they are equal.
    """
    old = parquet.show(*(parquet.sealed(batch(name, job, mended=False), job) for job in (1, 2)))
    (new,) = parquet.show(rebuilt(parquet, name, 1))
    values = asked([new, old[1]], f"SELECT v FROM {TOPIC} ORDER BY id")["v"].to_pylist()
    assert values == BESIDE[name]
    assert [type(value) for value in values] == [type(value) for value in BESIDE[name]]


@pytest.mark.of_a_folder
def test_a_double_shows_only_whole_numbers_that_it_is(place: Place) -> None:
    odd = (1 << 53) + 1
    old = place.show(*(place.sealed({"v": [v]}, job) for job, v in enumerate((odd, 5, 1 << 60))))
    (new,) = place.show(
        place.sealed(
            {"v": [0.5]}, key="new", generation=1, attempt="b", state=State.HIDDEN
        )
    )  # fmt: skip
    question = f"SELECT v FROM {TOPIC} ORDER BY v"
    assert asked([new, *old[1:]], question)["v"].to_pylist() == [0.5, 5.0, float(1 << 60)]
    with pytest.raises(CasparianError, match=str(odd)):
        asked([new, *old], question)
    assert len(asked([new, *old], f"SELECT _cf_job_id FROM {TOPIC}")) == 4


def test_bytes_and_text_are_not_shown_as_one_column(parquet: Place) -> None:
    old = parquet.show(*(parquet.sealed({"v": [v]}, job) for job, v in enumerate((b"\xff", b"x"))))
    (new,) = parquet.show(
        parquet.sealed({"v": ["x"]}, 1, key="new", generation=1, attempt="b", state=State.HIDDEN)
    )
    with pytest.raises(CasparianError, match="casparian rebuild"):
        asked([new, old[0]])
    assert len(asked([new, old[0]], f"SELECT _cf_job_id FROM {TOPIC}")) == 2
    assert asked([new], f"SELECT v FROM {TOPIC}")["v"].to_pylist() == ["x"]


@pytest.mark.of_a_folder
def test_others_are_refused_as_before(place: Place) -> None:
    """Only a rebuild may bring another type."""
    place.show(place.sealed({"id": [1], "v": ["x"]}))
    with pytest.raises(OutputRefused):
        outcome = place.publish(place.sealed({"id": [2], "v": [2]}, 2))[0]
        if isinstance(outcome, JobError):
            raise outcome


def test_the_same_columns_stay_together(sqlite: Place) -> None:
    (old,) = sqlite.show(sqlite.sealed({"id": [1]}))
    (new,) = sqlite.show(
        sqlite.sealed({"id": [2]}, key="new", generation=1, attempt="b", state=State.HIDDEN)
    )
    exchange(sqlite, [old], [new])
    assert tables(sqlite) == ["_cf_rows_sales"]
    assert [row["id"] for row in sqlite.rows()] == [2]


def tables(place: Place) -> list[str]:
    query = "SELECT name FROM sqlite_master WHERE name LIKE '\\_cf\\_rows%' ESCAPE '\\' ORDER BY 1"
    with closing(sqlite3.connect(place.database)) as connection:
        return [name for (name,) in connection.execute(query)]


def test_a_table_goes_with_its_last_output(sqlite: Place) -> None:
    """What users made on the first one stays; a topic named like a further table is no other's."""
    name = "text to integer"
    old = sqlite.show(sqlite.sealed(batch(name, 1, mended=False), 1))
    with closing(sqlite3.connect(sqlite.database)) as connection, connection:
        connection.executescript(
            "CREATE VIEW mine AS SELECT v FROM sales; CREATE INDEX my_index ON _cf_rows_sales (v);"
            "CREATE TRIGGER my_trigger INSTEAD OF DELETE ON sales BEGIN SELECT 1; END;"
            "CREATE TRIGGER my_other AFTER INSERT ON _cf_rows_sales BEGIN SELECT 1; END"
        )
    new = sqlite.show(rebuilt(sqlite, name, 1))
    assert tables(sqlite) == ["_cf_rows2_sales", "_cf_rows_sales"]
    sqlite.show(sqlite.sealed({"id": [5]}, 5, topic="2_sales"))
    old, new = exchange(sqlite, old, new)
    again = sqlite.show(rebuilt(sqlite, "integer to text", 1, 2))
    assert tables(sqlite) == [
        "_cf_rows2_sales", "_cf_rows3_sales", "_cf_rows_2_sales", "_cf_rows_sales"
    ]  # fmt: skip
    new, again = exchange(sqlite, new, again)
    sqlite.sink.delete([*old, *new])
    assert tables(sqlite) == ["_cf_rows3_sales", "_cf_rows_2_sales", "_cf_rows_sales"]
    with closing(sqlite3.connect(sqlite.database)) as connection:
        assert connection.execute("SELECT * FROM mine").fetchall() == [("007",)]
        names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    assert names >= {"mine", "my_index", "my_trigger", "my_other"}
    assert sqlite.check(again) == []
    sqlite.sink.delete(again)
    assert tables(sqlite) == ["_cf_rows_2_sales", "_cf_rows_sales"]
    assert sqlite.rows() == []
    sqlite.show(sqlite.sealed({"id": [1], "v": [b"x"]}, 7))  # the topic has no type any more
    assert [row["v"] for row in sqlite.rows()] == [b"x"]


def test_what_stays_is_united_by_name(sqlite: Place) -> None:
    """Another plugin's rows in the same topic; the newest columns come first."""
    mine = sqlite.show(sqlite.sealed({"id": [1], "v": ["x"], "old": [0.5]}))
    theirs = sqlite.show(sqlite.sealed({"Id": [2], "theirs": ["y"]}, 2, plugin="other"))
    new = sqlite.show(
        sqlite.sealed(
            {"V": [1], "id": [3], "more": ["z"]}, 1, key="new", generation=1, attempt="b",
            state=State.HIDDEN,
        )
    )  # fmt: skip
    exchange(sqlite, mine, new)
    rows = sqlite.rows()
    assert [*rows[0]][:5] == ["V", "id", "more", "old", "theirs"]
    picked = sorted((row["id"], row["V"], row["theirs"]) for row in rows)
    assert picked == [(2, None, "y"), (3, 1, None)]
    both = [*theirs, *new]
    assert sorted(asked(both, f"SELECT id FROM {TOPIC}")["id"].to_pylist()) == [2, 3]


@pytest.mark.of_a_folder
@pytest.mark.parametrize("count", [3, 20])
def test_a_reader_sees_the_old_or_the_new(place: Place, count: int) -> None:
    name = "text to integer"
    jobs = range(1, count + 1)
    old = place.show(*(place.sealed(batch(name, job, mended=False), job) for job in jobs))
    new = place.show(*(rebuilt(place, name, job) for job in jobs))
    seen: list[list[Any]] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append(sorted(map(str, look(place))))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(4):
        old, new = exchange(place, old, new)
        old, new = new, old
    done.set()
    reader.join()
    allowed = [sorted(map(str, values)) for values in ([7] * count, ["7"] * count)]
    if place.scheme == "parquet":
        assert all(len(each) == count for each in seen) or count == 3
    else:
        assert all(each in allowed for each in seen)
    assert len(seen) > 2


def look(place: Place) -> list[Any]:
    """The values, or in a folder the names, that one look shows.

    A folder that was exchanged while it was listed may be half removed by then: that is no look.
    """
    if place.scheme != "parquet":
        return [row["v"] for row in place.rows()]
    folder = place.home / "out" / TOPIC
    while True:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            names = [name for name in os.listdir(descriptor) if name.endswith(".parquet")]
            if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                return names
        finally:
            os.close(descriptor)


def shown(place: Place, count: int, **named: Any) -> tuple[list[Output], list[Output]]:
    """Outputs of a topic that stand, and their rebuilt ones, whose type is mended."""
    name, jobs = "text to integer", range(1, count + 1)
    old = place.show(*(place.sealed(batch(name, job, mended=False), job, **named) for job in jobs))
    new = place.show(*(rebuilt(place, name, job, **named) for job in jobs))
    return old, new


def test_other_programs_files_are_carried_over(parquet: Place) -> None:
    """The files themselves, no copies; a folder of theirs forces file by file."""
    old, new = shown(parquet, 12)
    folder = parquet.home / "out" / TOPIC
    (folder / "_SUCCESS").write_text("theirs")
    inode = (folder / "_SUCCESS").stat().st_ino
    before = folder.stat().st_ino
    old, new = exchange(parquet, old, new)
    assert folder.stat().st_ino != before, "the folder was exchanged"
    assert (folder / "_SUCCESS").stat().st_ino == inode
    assert parquet.check([*old, *new]) == []
    assert not list((parquet.home / "out" / ".casparian" / "exchange").iterdir())
    (folder / "theirs").mkdir()
    (folder / "theirs" / "file").write_text("kept")
    before = folder.stat().st_ino
    new, old = exchange(parquet, new, old)
    assert folder.stat().st_ino == before, "its files were moved one by one"
    assert (folder / "theirs" / "file").read_text() == "kept"
    assert parquet.check([*old, *new]) == []
    assert [row["v"] for row in parquet.rows()] == ["7"] * 12


@pytest.mark.parametrize("where", ["built", "exchanged"])
def test_what_others_write_meanwhile_is_kept(
    parquet: Place, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into the folder that a reader has found, while it is exchanged."""
    old, new = shown(parquet, 2)
    folder = parquet.home / "out" / TOPIC
    (folder / "_SUCCESS").write_text("old")
    other = parquet.home / "out" / parquet_moves.OTHERS / TOPIC

    def write(point: str) -> None:
        if point == f"parquet.{'exchange_built' if where == 'built' else 'folders_exchanged'}":
            place = folder if where == "built" else other
            (place / "late").write_text("late")
            (place / "_tmp").write_text("new")
            (place / "_tmp").rename(place / "_SUCCESS")

    monkeypatch.setattr(crashpoints, "_react", write)
    exchange(parquet, old, new)
    assert (folder / "late").read_text() == "late"
    assert (folder / "_SUCCESS").read_text() == "new"


def test_without_an_exchange_the_files_move_one_by_one(
    parquet: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a filesystem or kernel that has none."""
    old, new = shown(parquet, 12)
    monkeypatch.setattr(parquet_moves, "swap", lambda *_: False)
    old, new = exchange(parquet, old, new)
    assert parquet.check([*old, *new]) == []
    assert [row["v"] for row in parquet.rows()] == [7] * 12
    assert asked(new).schema.field("v").type == pa.int64()
    assert not list((parquet.home / "out" / ".casparian" / "exchange").iterdir())


def test_files_that_stay_and_do_not_fit_are_named(parquet: Place) -> None:
    old, new = shown(parquet, 2)
    stays = parquet.show(parquet.sealed({"v": ["other"]}, 3, plugin="other"))[0]
    before = sorted(map(str, parquet.rows()))
    with pytest.raises(SinkConflict, match=f"{stays.target}$"):
        exchange(parquet, old, new)
    assert sorted(map(str, parquet.rows())) == before
    assert parquet.check([*old, *new, stays]) == []


@pytest.mark.of_a_folder
def test_a_hidden_output_whose_name_is_taken_is_refused(place: Place) -> None:
    """Not only when it is to be shown, when its job has been worked and thrown away."""
    output = place.sealed({"id": [1]}, state=State.HIDDEN)
    if place.scheme == "parquet":
        folder = place.home / "out" / TOPIC
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{output.version_slot[:32]}.parquet").write_bytes(b"theirs")
    else:
        with closing(sqlite3.connect(place.database)) as connection, connection:
            connection.execute(f"CREATE TABLE {TOPIC} (theirs)")
    (outcome,) = place.publish(output)
    assert isinstance(outcome, SinkConflict), outcome


def test_a_file_that_is_no_database_is_no_empty_sink(sqlite: Place) -> None:
    sqlite.show(sqlite.sealed({"id": [1]}))
    for file in sqlite.database.parent.glob("tables.sqlite3-*"):
        file.unlink()
    sqlite.database.write_bytes(b"no database" * 1000)
    with pytest.raises(SinkUnavailable):
        list(sqlite.sink.records(()))
    assert sqlite.database.read_bytes().startswith(b"no database")


@pytest.mark.of_a_folder
@pytest.mark.parametrize("rows", [1, 5])
def test_a_rebuild_that_is_killed(place: Place, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each crash point of the change a reader has the old or the new, and it goes on."""
    monkeypatch.setattr(parts, "GROUP_ROWS", 2)
    name, jobs = "text to integer", (1, 2, 3)

    def made(job: int, *, mended: bool, **named: Any) -> Output:
        stage = place.stage(job, split_bytes=1, **named)
        for _ in range(rows):
            stage.write(batch(name, job, mended=mended))
        return sinks.seal([stage])[0]

    old = place.show(*(made(job, mended=False) for job in jobs))
    new = place.show(
        *(
            made(
                job, mended=True, key=f"new {job}", generation=1, attempt=f"g{job}",
                state=State.HIDDEN,
            )
            for job in jobs
        )
    )  # fmt: skip
    home, fresh = place.home / "out", place.home / "fresh"
    shutil.copytree(home, fresh)
    number, seen = 1, set[str]()
    while True:
        shutil.rmtree(home)
        shutil.copytree(fresh, home)
        if not forks.dies(lambda: exchange(place, old, new), number):
            break
        found = sorted(str(row["v"]) + str(type(row["v"])) for row in place.rows())
        assert len(set(found)) == 1, f"crash point {number}: {found}"
        assert len(found) == 3 * rows, f"crash point {number}"
        seen |= set(found)
        told = exchange(place, old, new)
        assert place.check([*told[0], *told[1]]) == [], f"crash point {number}"
        assert [row["v"] for row in place.rows()] == [7] * 3 * rows
        assert asked(told[1]).schema.field("v").type == pa.int64()
        assert [o.output_key for o in place.sink.records({o.output_key for o in old + new})] == []
        number += 1
    assert len(seen) == 2
    assert number > 5


def test_every_sink_exchanges_all_of_it_or_nothing(place: Place) -> None:
    """Rows of another plugin that stay keep their type: SQLite alone can show both."""
    old, new = shown(place, 2)
    (stays,) = place.show(place.sealed({"v": ["other"]}, 3, plugin="other"))
    assert [row["v"] for row in place.rows()] == ["7", "7", "other"]
    if place.scheme == "sqlite":
        old, new = exchange(place, old, new)
        assert sorted(str(row["v"]) for row in place.rows()) == ["7", "7", "other"]
        return
    with pytest.raises(SinkConflict):
        exchange(place, old, new)
    assert [row["v"] for row in place.rows()] == ["7", "7", "other"]
    assert place.check([*old, *new, stays]) == []
    (stays,) = place.tell(State.RETRACTED, stays)
    old, new = exchange(place, old, new)
    assert [row["v"] for row in place.rows()] == [7, 7]
    assert place.check([*old, *new, stays]) == []
    place.sink.delete([*old, stays])
    assert [row["v"] for row in place.rows()] == [7, 7]
    assert place.check(new) == []
    late = place.show(place.sealed({"v": [8], "more": ["x"]}, 9))
    assert [row["v"] for row in place.rows()] == [7, 7, 8]
    place.sink.delete([*new, *late])
    assert place.rows() == []


def test_a_table_without_a_column_has_nulls_in_it(place: Place) -> None:
    """The rows of another plugin stay, whose table or files have no column `is`."""
    small, large = pa.array([7], pa.int32()), pa.array([1 << 40])
    old = place.show(place.sealed({"id": [1], "v": small, "was": ["w"]}))
    (other,) = place.show(place.sealed({"id": [2], "was": ["w"]}, 2, plugin="other"))
    new = place.show(
        place.sealed(
            {"id": [3], "v": large, "is": [0.5]}, 1, key="new", generation=1, attempt="b",
            state=State.HIDDEN,
        )
    )  # fmt: skip
    old, new = exchange(place, old, new)
    rows = [{k: v for k, v in row.items() if k[0] != "_" and v is not None} for row in place.rows()]
    by_id = sorted(rows, key=lambda row: row["id"])
    assert by_id == [{"id": 2, "was": "w"}, {"id": 3, "v": 1 << 40, "is": 0.5}]
    assert place.check([*old, *new, other]) == []


def test_past_versions_that_stay_count_too(parquet: Place) -> None:
    """In mode replace no reader of the folder sees them, but `casparian query` asks for them."""
    named = {"mode": "replace", "slot": "one.csv"}
    past = parquet.show(parquet.sealed({"v": ["x"]}, 1, state=State.PAST, **named))[0]
    old = parquet.show(parquet.sealed({"v": ["7"]}, 2, ordinal=2, **named))
    new = parquet.show(
        parquet.sealed(
            {"v": [7]}, 2, ordinal=2, key="new", generation=1, attempt="b", state=State.HIDDEN,
            **named,
        )
    )  # fmt: skip
    with pytest.raises(SinkConflict, match=past.target):
        exchange(parquet, old, new)
    assert asked([past, *old])["v"].to_pylist() == ["x", "7"]
