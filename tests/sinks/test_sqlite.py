"""The SQLite sink's own promises: other people's databases, tables that grow, exact values."""

from __future__ import annotations

import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings

from casparian_flow.durable import owned
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks import sqlite as sqlite_sink
from casparian_flow.engine.sinks import sqlite_tables
from casparian_flow.engine.sinks.base import LINEAGE
from casparian_flow.errors import JobError, OutputRefused, SinkConflict, SinkUnavailable
from casparian_flow.protocol import Output, State
from tests.sinks.columns_of_any_type import Sample, samples
from tests.sinks.stages import TOPIC, Place

LOSSY = 2**53 + 1
"""The first integer a double cannot hold."""


@contextmanager
def database(place: Place) -> Iterator[sqlite3.Connection]:
    """Somebody's own connection to the database."""
    place.database.parent.mkdir(exist_ok=True)
    with closing(sqlite3.connect(place.database, isolation_level=None)) as connection:
        yield connection


@contextmanager
def small(place: Place) -> Iterator[None]:
    """The disk has room for a few more pages only, as SQLite's own limit has it."""
    opened = sqlite3.connect

    def limited(*args: Any, **named: Any) -> sqlite3.Connection:
        connection = opened(*args, **named)
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages + 20}")
        return connection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", limited)
        yield


def published(place: Place, columns: Any, job: int = 1) -> Output:
    (seen,) = place.show(place.sealed(columns, job))
    return seen


def refused(place: Place, columns: Any, job: int = 1) -> JobError:
    """The refusal of an output, of which nothing is left: no row, no ledger row, no column."""
    before = everything(place)
    (outcome,) = place.publish(place.sealed(columns, job))
    assert isinstance(outcome, JobError), outcome
    assert everything(place) == before
    return outcome


def everything(place: Place) -> list[str]:
    with database(place) as connection:
        return list(connection.iterdump())


def column(place: Place, name: str) -> list[Any]:
    return [row[name] for row in place.rows()]


@settings(max_examples=80, deadline=None)
@given(sample=samples())
@pytest.mark.slow
def test_any_value_is_stored_as_documented(sample: Sample) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Place("sqlite", Path(folder))
        stage = place.stage()
        for batch in sample.batches():
            stage.write(batch)
        place.show(*sinks.seal([stage]))
        found = [tuple(row.values())[: -len(LINEAGE)] for row in place.rows()]
    assert found == sample.stored()
    assert [[type(v) for v in row] for row in found] == [
        [type(v) for v in row] for row in sample.stored()
    ]


def test_a_new_database_is_in_wal_mode_and_clean_when_closed(sqlite: Place) -> None:
    made = published(sqlite, {"id": [1]})
    assert made.target == f"{sqlite.database}:{TOPIC}"
    with database(sqlite) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert [f.name for f in (sqlite.home / "out").iterdir() if f.is_file()] == ["tables.sqlite3"]


def test_somebodys_database_stays_as_it_is_but_for_our_tables(sqlite: Place) -> None:
    with database(sqlite) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("CREATE TABLE theirs (a)")
        connection.execute("INSERT INTO theirs VALUES (1)")
    published(sqlite, {"id": [1]})
    with database(sqlite) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert connection.execute("SELECT a FROM theirs").fetchall() == [(1,)]


def test_somebodys_table_of_the_topics_name_is_left_untouched(sqlite: Place) -> None:
    with database(sqlite) as connection:
        connection.execute(f"CREATE TABLE {TOPIC} (id INTEGER)")
    before = sqlite.database.read_bytes()
    error = refused(sqlite, {"id": [1]})
    assert isinstance(error, SinkConflict)
    assert f"table '{TOPIC}'" in error.message
    assert sqlite.database.read_bytes() == before


@pytest.mark.parametrize("name", ["it's [1] *.db", "ünïcode.db", "a b#c%41.db"])
def test_databases_of_any_name(tmp_path: Path, name: str) -> None:
    place = Place("sqlite", tmp_path)
    place.location = sinks.resolve(f"sqlite:///{name}", tmp_path)
    place.database = tmp_path / name
    output = place.sealed({"id": [1]})
    found = place.show(output)
    assert len(place.rows()) == 1
    (pattern,) = owned(tmp_path / ".casparian")
    assert sorted(f.name for f in tmp_path.glob(pattern)) == [name]
    assert place.sink.check(found) == []


def test_a_locked_database_is_waited_for(sqlite: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_sink, "BUSY_SECONDS", 0.01)
    output = sqlite.sealed({"id": [1]})
    with database(sqlite) as connection:
        connection.execute("CREATE TABLE theirs (a)")
        connection.execute("BEGIN IMMEDIATE")
        (outcome,) = sqlite.publish(output)
        connection.execute("ROLLBACK")
    assert isinstance(outcome, SinkUnavailable)
    assert "database is locked" in outcome.message
    sqlite.show(output)


def test_a_sink_that_cannot_be_read_is_not_a_sink_without_records(
    sqlite: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_sink, "BUSY_SECONDS", 0.01)
    with database(sqlite) as connection:
        connection.execute("CREATE TABLE theirs (a)")
    made = sqlite.show(sqlite.sealed({"id": [1]}))
    with database(sqlite) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(SinkUnavailable, match=r"cannot read .* database is locked"):
            list(sqlite.sink.records(()))
        (fault,) = sqlite.check(made)
    assert "database is locked" in fault


def test_columns_come_and_go(sqlite: Place) -> None:
    published(sqlite, {"id": [1], "old": ["x"]}, job=1)
    published(sqlite, {"new": [2.5], "ID": [2]}, job=2)
    rows = [(row["id"], row["old"], row["new"], row["_cf_job_id"]) for row in sqlite.rows()]
    assert rows == [(1, "x", None, 1), (2, None, 2.5, 2)]


@pytest.mark.parametrize(
    ("first", "second", "declared"),
    [
        ([1], ["x"], "INTEGER"),
        (["x"], [1], "TEXT"),
        ([1.5], [b"x"], "REAL"),
        ([b"x"], ["x"], "BLOB"),
    ],
)
def test_a_column_keeps_its_type(
    sqlite: Place, first: list[Any], second: list[Any], declared: str
) -> None:
    published(sqlite, {"odd": first})
    error = refused(sqlite, {"odd": second, "added": [1]}, job=2)
    assert isinstance(error, OutputRefused)
    assert f"column 'odd' ({pa.array(second).type}) is {declared} in the table" in error.message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("CREATE UNIQUE INDEX one ON _cf_rows_sales (id)", "UNIQUE constraint failed"),
        (
            "CREATE TRIGGER no BEFORE INSERT ON _cf_rows_sales WHEN NEW.id = 7"
            " BEGIN SELECT RAISE(ABORT, 'seven'); END",
            "seven",
        ),
        (
            "DROP TABLE _cf_rows_sales;"
            "CREATE TABLE _cf_rows_sales (_cf_output, id INTEGER, must TEXT NOT NULL)",
            "NOT NULL constraint failed: _cf_rows_sales.must",
        ),
        ("DROP VIEW sales; CREATE VIEW sales AS SELECT 1 AS id", "left untouched"),
        ("DROP VIEW sales; CREATE TABLE sales (id)", "left untouched"),
    ],
    ids=["unique", "row n", "not null", "view", "table"],
)
def test_a_table_that_somebody_changed_takes_all_rows_or_none(
    sqlite: Place, change: str, said: str
) -> None:
    published(sqlite, {"id": [5]}, job=1)
    with database(sqlite) as connection:
        connection.executescript(change)
    error = refused(sqlite, {"id": [*range(20_000)], "added": [0] * 20_000}, job=2)
    assert isinstance(error, OutputRefused | SinkConflict)
    assert said in error.message
    sqlite.show(sqlite.sealed({"id": [1]}, job=3, topic="other"))


def test_views_and_tables_that_somebody_dropped_are_made_again(sqlite: Place) -> None:
    (made,) = [published(sqlite, {"id": [1], "name": ["a"]}, job=1)]
    with database(sqlite) as connection:
        connection.executescript("DROP VIEW sales; DROP VIEW sales_current")
    (fault,) = sqlite.check([made])
    assert "the view 'sales' is gone" in fault
    published(sqlite, {"id": [2], "name": ["b"]}, job=2)
    assert column(sqlite, "name") == ["a", "b"] == [r["name"] for r in sqlite.rows("sales_current")]
    with database(sqlite) as connection:
        connection.executescript("DROP TABLE _cf_rows_sales")
    published(sqlite, {"id": [3], "name": ["c"]}, job=3)
    assert column(sqlite, "name") == ["c"]


def test_a_view_that_grows_keeps_its_triggers_and_the_views_on_it(sqlite: Place) -> None:
    published(sqlite, {"id": [1]}, job=1)
    with database(sqlite) as connection:
        connection.executescript(
            """
            CREATE VIEW mine AS SELECT count(*) AS n FROM sales;
            CREATE TABLE log (id);
            CREATE TRIGGER taken INSTEAD OF INSERT ON sales
            BEGIN INSERT INTO log VALUES (NEW.id); END;
            """
        )
    published(sqlite, {"id": [2], "new": ["x"]}, job=2)
    with database(sqlite) as connection:
        connection.execute("INSERT INTO sales (id) VALUES (7)")
        assert connection.execute("SELECT * FROM log").fetchall() == [(7,)]
        assert connection.execute("SELECT * FROM mine").fetchall() == [(2,)]


def test_current_and_history(sqlite: Place) -> None:
    (first,) = sqlite.show(sqlite.replacing(1, 1))
    (second,) = sqlite.show(sqlite.replacing(2, 2), changes=sqlite.tell(State.PAST, first))
    for topic, jobs in ((TOPIC, [2]), ("sales_current", [2]), ("sales_history", [1, 2])):
        assert [row["_cf_job_id"] for row in sqlite.rows(topic)] == jobs
    sqlite.tell(State.PAST, first, mode="append")
    assert column(sqlite, "id") == [1, 2]
    sqlite.tell(State.RETRACTED, second)
    assert [column["id"] for column in sqlite.rows("sales_history")] == [1]
    assert sqlite.rows("sales_current") == []


def test_a_topic_is_named_like_another_topics_view(sqlite: Place) -> None:
    published(sqlite, {"id": [1]}, job=1)
    sqlite.show(sqlite.sealed({"n": [2]}, 2, topic="sales_history"))
    published(sqlite, {"id": [1], "new": [1]}, job=3)
    assert [row["n"] for row in sqlite.rows("sales_history")] == [2]
    assert [row["n"] for row in sqlite.rows("sales_history_history")] == [2]
    with database(sqlite) as connection:
        connection.execute("CREATE TABLE other_current (theirs)")
        connection.execute("CREATE INDEX more_current ON other_current (theirs)")
    sqlite.show(sqlite.sealed({"n": [3]}, 4, topic="other"))
    assert sqlite.rows("other_current") == []
    assert len(sqlite.rows("other_history")) == 1
    sqlite.show(sqlite.sealed({"n": [3]}, 5, topic="more"))
    assert len(sqlite.rows("more")) == 1


def test_integers_and_reals_mix_where_they_stay_exact(sqlite: Place) -> None:
    """A column of whole numbers comes as floats from pandas, as soon as one of them is missing."""
    published(sqlite, {"whole": [1], "real": [0.5]}, job=1)
    published(sqlite, {"whole": [2.0, 3.0, None], "real": [3, None, 4]}, job=2)
    assert column(sqlite, "whole") == [1, 2, 3, None]
    assert column(sqlite, "real") == [0.5, 3.0, None, 4.0]
    error = refused(sqlite, {"whole": [1], "real": [LOSSY]}, job=3)
    assert "column 'real' (int64)" in error.message
    published(sqlite, {"whole": [LOSSY], "real": [1]}, job=4)
    assert column(sqlite, "whole")[-1] == LOSSY
    error = refused(sqlite, {"whole": [2.5]}, job=5)
    assert "topic 'sales': column 'whole' (double)" in error.message


def test_a_column_of_nulls_has_the_first_type_that_comes(sqlite: Place) -> None:
    published(sqlite, {"empty": [None], "n": [1]}, job=1)
    published(sqlite, {"empty": [7], "n": pa.nulls(1)}, job=2)
    error = refused(sqlite, {"empty": ["007"], "n": [2]}, job=3)
    assert "column 'empty' (string) is INTEGER in the table, not TEXT" in error.message
    published(sqlite, {"empty": [0.5], "n": [2]}, job=4)
    assert column(sqlite, "empty") == [None, 7, 0.5]
    assert column(sqlite, "n") == [1, None, 2]


def test_a_column_without_a_type_that_has_several_kinds_of_value_stays_open(
    sqlite: Place,
) -> None:
    """As earlier releases left it."""
    published(sqlite, {"empty": [None, None]}, job=1)
    with database(sqlite) as connection:
        connection.execute(
            "UPDATE _cf_rows_sales SET empty = CASE rowid WHEN 1 THEN 7 ELSE '007' END"
        )
    published(sqlite, {"empty": ["x"]}, job=2)
    published(sqlite, {"empty": [0.5]}, job=3)
    assert column(sqlite, "empty") == [7, "007", "x", 0.5]


def test_whole_numbers_take_reals_where_a_real_holds_them_all(sqlite: Place) -> None:
    published(sqlite, {"n": [1, 2**53, -(2**53), None], "m": [2**53 + 1, 1, 1, 1]}, job=1)
    published(sqlite, {"n": [0.5, 1e300, 3.0]}, job=2)
    published(sqlite, {"N": [4]}, job=3)
    assert column(sqlite, "n") == [1, 2**53, -(2**53), None, 0.5, 1e300, 3, 4]
    error = refused(sqlite, {"n": [2**53 + 1]}, job=4)
    assert "column 'n' (int64)" in error.message
    error = refused(sqlite, {"m": [0.5]}, job=5)
    assert "whole numbers" in error.message
    with database(sqlite) as connection:
        connection.executescript(
            """
            DROP VIEW sales; DROP VIEW sales_current; DROP VIEW sales_history;
            ALTER TABLE _cf_rows_sales DROP COLUMN n; ALTER TABLE _cf_rows_sales ADD n TEXT;
            """
        )
    published(sqlite, {"n": ["what was noted of the other column does not count"]}, job=6)


def test_a_retracted_whole_number_keeps_reals_out(sqlite: Place) -> None:
    sqlite.show(sqlite.sealed({"n": [-(2**63), 1]}, job=1, state=State.RETRACTED))
    error = refused(sqlite, {"n": [0.5]}, job=2)
    assert "whole numbers" in error.message


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1.0, float("nan")]),
        pa.array([2**63], pa.uint64()),
        pa.array([2**62], pa.timestamp("us")),
        pa.array([2**62], pa.timestamp("ms", "Asia/Tokyo")),
        pa.array([2**31 - 1], pa.date32()),
        pa.array([2**62], pa.duration("s")),
        pa.array([[float("nan")]]),
        pa.array([[float("inf")]]),
        pa.array([[2**62]], pa.list_(pa.timestamp("us"))),
        pa.array([1, 2**63], pa.uint64()).dictionary_encode(),
    ],
    ids=lambda values: str(values.type),
)
def test_a_value_that_would_change_is_refused_while_staging(sqlite: Place, values: Any) -> None:
    with pytest.raises(OutputRefused, match=r"column 'odd' \(.* cannot be stored in SQLite"):
        sqlite.sealed({"odd": values})
    assert sqlite.staged_files() == []


@pytest.mark.parametrize("around", ["nothing", "a list", "a struct"])
def test_fields_that_json_would_lose_are_refused_while_staging(sqlite: Place, around: str) -> None:
    twins = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"])
    columns = {
        "nothing": twins,
        "a list": pa.ListArray.from_arrays([0, 1], twins),
        "a struct": pa.StructArray.from_arrays([twins], ["deep"]),
    }
    with pytest.raises(OutputRefused, match=r"column 'odd' .* two of its fields have one name"):
        sqlite.sealed({"odd": columns[around]})


def test_a_value_under_a_null_struct_is_not_looked_at(sqlite: Place) -> None:
    hidden = pa.StructArray.from_arrays(
        [pa.array([1.5, float("nan")])], ["a"], mask=pa.array([False, True])
    )
    published(sqlite, {"s": hidden})
    assert column(sqlite, "s") == ['{"a":1.5}', None]


def test_nulls_in_lists_under_a_null_struct_are_counted_right(sqlite: Place) -> None:
    """pyarrow's cast of such lists to themselves gives arrays that end the process."""
    lists = pa.array([[None] * 5, [None], [None] * 3], pa.list_(pa.null()))
    structs = pa.StructArray.from_arrays([lists], ["l"], mask=pa.array([True, False, False]))
    published(sqlite, {"s": structs})
    assert column(sqlite, "s") == [None, '{"l":[null]}', '{"l":[null,null,null]}']


def test_slices_of_maps_keep_their_pairs(sqlite: Place) -> None:
    maps = pa.array(
        [[("a", 1)], None, [], [("b", 2), ("c", None)]], pa.map_(pa.string(), pa.int8())
    )
    published(sqlite, {"m": maps[2:]})
    assert column(sqlite, "m") == ["[]", '[{"key":"b","value":2},{"key":"c","value":null}]']


def test_names_that_differ_in_case_only_are_refused_while_staging(sqlite: Place) -> None:
    with pytest.raises(OutputRefused, match="'Id'"):
        sqlite.sealed({"Id": [1], "iD": [2]})
    published(sqlite, {"Ü": [1], "ü": [2]})  # SQLite folds ASCII only
    assert [(row["Ü"], row["ü"]) for row in sqlite.rows()] == [(1, 2)]


def test_what_sqlite_itself_refuses(sqlite: Place) -> None:
    """Before anything is decided; what the table there has no room for, when it is published."""
    with pytest.raises(OutputRefused, match="from column 'c1996' on"):
        sqlite.sealed({f"c{n}": [n] for n in range(1997)})
    published(sqlite, {f"c{n}": [n] for n in range(1996)})
    before = sqlite.rows()
    (error,) = sqlite.publish(sqlite.sealed({"one more": [1]}, job=2))
    assert isinstance(error, OutputRefused)
    assert "too many columns" in error.message
    assert sqlite.rows() == before
    with pytest.raises(OutputRefused, match="object name reserved"):
        sqlite.sealed({"id": [1]}, job=3, topic="sqlite_sales")


def test_a_value_longer_than_any_of_sqlite_is_refused_while_staging(
    sqlite: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        assert connection.getlimit(sqlite3.SQLITE_LIMIT_LENGTH) == sqlite_tables.CELL_BYTES
    monkeypatch.setattr(sqlite_tables, "CELL_BYTES", 1000)
    published(sqlite, {"text": ["x" * 1000], "bytes": [b"x" * 1000]})
    for kind in (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.binary_view()):
        with pytest.raises(OutputRefused, match=rf"column 'long' \({kind}\) .* 1001 bytes"):
            sqlite.sealed({"short": ["x"], "long": pa.array(["x" * 1001], kind)})


def test_a_damaged_staged_file_is_told_of(sqlite: Place) -> None:
    output = sqlite.sealed({"id": [1]})
    Path(output.stage).write_bytes(b"PAR1 is not enough PAR1")
    (outcome,) = sqlite.publish(output)
    assert type(outcome) is JobError
    assert output.stage in outcome.message
    assert sqlite.rows() == []


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (
            "DELETE FROM _cf_rows_sales WHERE id = 1 AND _cf_output = 2",
            "1 rows of job 2 inst",
        ),
        ("INSERT INTO _cf_rows_sales SELECT * FROM _cf_rows_sales WHERE _cf_output = 2", "4 rows"),
        ("UPDATE _cf_rows_sales SET _cf_output = 3 WHERE _cf_output = 2", "0 rows of job 2"),
        ("UPDATE _cf_outputs SET state = 'past' WHERE job_id = 2", "as past, mode append, instead"),
        ("DELETE FROM _cf_outputs WHERE job_id = 2", "the output of job 2"),
        ("UPDATE _cf_outputs SET digest = '' WHERE job_id = 2", "the output"),
    ],
)
def test_check_sees_harm(sqlite: Place, harm: str, said: str) -> None:
    made = sqlite.show(*(sqlite.sealed({"id": [1, 2]}, job) for job in (1, 2)))
    assert sqlite.sink.check(made) == []
    with database(sqlite) as connection:
        connection.execute(harm)
    (fault,) = sqlite.sink.check(made)
    assert fault.startswith(f"{sqlite.database}:{TOPIC}: ")
    assert said in fault


def test_check_sees_a_dropped_table_and_speaks_of_each_output(sqlite: Place) -> None:
    made = sqlite.show(*(sqlite.sealed({"id": [1]}, job) for job in (1, 2)))
    with database(sqlite) as connection:
        connection.execute(f"DROP TABLE _cf_rows_{TOPIC}")
    assert ["0 rows of job" in fault for fault in sqlite.sink.check(made)] == [True, True]


def test_the_outputs_of_a_job_appear_together_and_are_refused_together(sqlite: Place) -> None:
    published(sqlite, {"id": [1]}, job=1)
    refused_job = [
        sqlite.sealed({"id": [2]}, 2, topic="fine", key="fine"),
        sqlite.sealed({"id": ["x"]}, 2, attempt="a2"),
    ]
    good = [sqlite.sealed({"id": [3]}, 3, topic=topic, key=topic) for topic in ("t1", "t2")]
    before = everything(sqlite)
    outcomes = sqlite.publish(refused_job[0], good[0], refused_job[1], good[1])
    assert [type(outcome) for outcome in outcomes] == [
        OutputRefused, Output, OutputRefused, Output,
    ]  # fmt: skip
    assert all("column 'id' (string)" in o.message for o in outcomes if isinstance(o, JobError))
    assert [len(sqlite.rows(topic)) for topic in (TOPIC, "fine", "t1", "t2")] == [1, 0, 1, 1]
    assert set(before) < set(everything(sqlite))
    assert Path(refused_job[0].stage).exists()


@pytest.mark.slow
def test_no_reader_sees_one_topic_of_a_job_without_the_other(sqlite: Place) -> None:
    stop, seen = threading.Event(), set[int]()

    def poll() -> None:
        with closing(sqlite3.connect(f"{sqlite.database.as_uri()}?mode=ro", uri=True)) as reader:
            while not stop.is_set():
                seen.update(*reader.execute("SELECT (SELECT count(*) FROM l) - count(*) FROM r"))

    def both(job: int) -> list[Output]:
        return [
            sqlite.sealed({"id": [job] * 50}, job, topic=topic, key=f"{topic}{job}")
            for topic in ("l", "r")
        ]

    sqlite.publish(*both(1))
    reader = threading.Thread(target=poll)
    reader.start()
    try:
        for job in range(2, 30):
            assert all(isinstance(o, Output) for o in sqlite.publish(*both(job)))
    finally:
        stop.set()
        reader.join()
    assert seen == {0}


def test_a_database_that_fills_up_within_a_transaction_takes_nothing(sqlite: Place) -> None:
    """SQLite itself may roll back: every job of the transaction waits then."""
    published(sqlite, {"id": [1]}, job=1)
    before = everything(sqlite)
    outputs = [
        sqlite.sealed({"id": [2], "blob": [b"x" * size]}, job, attempt=f"a{job}")
        for job, size in ((2, 10), (3, 1 << 20))
    ]
    with small(sqlite):
        outcomes = sqlite.publish(*outputs)
    assert any(isinstance(outcome, SinkUnavailable) for outcome in outcomes)
    kept = [o.job_id for o, seen in zip(outputs, outcomes, strict=True) if isinstance(seen, Output)]
    assert sorted(row["_cf_job_id"] for row in sqlite.rows()) == [1, *kept]
    assert (everything(sqlite) == before) == (not kept)
    sqlite.show(*outputs)


def test_a_job_that_is_refused_leaves_the_states_of_others(sqlite: Place) -> None:
    (first,) = sqlite.show(sqlite.replacing(1, 1))
    past = Output(**{name: getattr(first, name) for name in first.__struct_fields__} | {
        "state": State.PAST})  # fmt: skip
    (error,) = sqlite.publish(sqlite.replacing(2, 2, {"id": ["x"]}), changes=[past])
    assert isinstance(error, OutputRefused)
    assert column(sqlite, "id") == [1]


def test_two_ledgers_that_share_a_table_take_their_own_rows_only(sqlite: Place) -> None:
    """Both gave the same ids to the same content: their rows are alike."""
    ours, _ = sqlite.show(
        *(sqlite.sealed({"id": [1]}, key=name, attempt=name) for name in ("ours", "theirs"))
    )
    sqlite.tell(State.RETRACTED, ours)
    assert column(sqlite, "id") == [1]


def test_columns_that_have_every_name_of_the_row_number(sqlite: Place) -> None:
    names = ["rowid", "oid", "_rowid_"]
    made = sqlite.show(*(sqlite.sealed({name: [job] for name in names}, job) for job in (1, 2)))
    sqlite.sink.delete(made[:1])
    assert column(sqlite, "rowid") == [2]


def test_a_change_of_many_rows_is_a_change_of_one(sqlite: Place) -> None:
    """Nothing in the table of rows is written."""
    (made,) = sqlite.show(sqlite.sealed({"id": [*range(100_000)]}))
    with database(sqlite) as connection:
        connection.execute("CREATE TRIGGER no BEFORE UPDATE ON _cf_rows_sales "
                           "BEGIN SELECT RAISE(ABORT, 'moved'); END")  # fmt: skip
        connection.execute("CREATE TRIGGER none BEFORE DELETE ON _cf_rows_sales "
                           "BEGIN SELECT RAISE(ABORT, 'moved'); END")  # fmt: skip
    for state in (State.RETRACTED, State.CURRENT, State.HIDDEN, State.PAST):
        sqlite.tell(state, made)
    assert len(sqlite.rows()) == 100_000


def test_readers_find_the_states_of_outputs_by_number(sqlite: Place) -> None:
    """A query on a topic scans its rows once, and uses the indexes that users make on them."""
    published(sqlite, {"id": [*range(1000)], "name": ["x"] * 1000})
    with database(sqlite) as connection:
        connection.execute("CREATE INDEX by_id ON _cf_rows_sales (id)")
        plans = [
            [step[3] for step in connection.execute(f"EXPLAIN QUERY PLAN SELECT {query}")]
            for query in ("count(*) FROM sales", "name FROM sales", "name FROM sales WHERE id = 7")
        ]
    assert [plan[0].partition(" (")[0] for plan in plans] == [
        "SCAN r USING COVERING INDEX _cf_output_of_sales", "SCAN r", "SEARCH r USING INDEX by_id",
    ]  # fmt: skip
    assert {plan[1] for plan in plans} == {"SEARCH o USING INTEGER PRIMARY KEY (rowid=?)"}
