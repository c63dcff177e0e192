"""`casparian query` gives the answer that DuckDB gives over a plain copy of the rows.

The rows are those that the ledger lists, whatever the sink shows, and only what the question needs
is read.
"""

from __future__ import annotations

import os
import random
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pyarrow as pa
import pytest

from casparian_flow.engine import sinks
from casparian_flow.engine.sinks import parts, query_sqlite
from casparian_flow.engine.sinks import query as queries
from casparian_flow.engine.sinks.query import answer
from casparian_flow.engine.sinks.query_sqlite import conjuncts
from casparian_flow.errors import CasparianError
from casparian_flow.protocol import Output, State
from tests.disks import in_memory, or_skip, remount
from tests.sinks.earlier import Earlier
from tests.sinks.stages import TOPIC, Place

TEXTS = ["a", "b", "B", "", "it's", "näh\U0001f40d", "a AND (b", "x\0y", "50%", None]
SCHEMA = pa.schema([
    ("n", pa.int64()), ("x", pa.float64()), ("t", pa.string()), ("b", pa.binary()),
    ("odd name", pa.int64()),
])  # fmt: skip
LINEAGE = pa.schema([
    ("_cf_file_version_id", pa.int64()), ("_cf_job_id", pa.int64()),
    ("_cf_source_hash", pa.string()), ("_cf_plugin_version", pa.string()),
])  # fmt: skip
WIDTHS = (2, 3, 5)
"""How many columns an output has, in turn: three schemas."""
ROWS = 300
OUTPUTS = 24


def columns_of(job: int) -> dict[str, Any]:
    """The rows of a job. The doubles are sums of halves, so that their sums are exact."""
    chance = random.Random(job)
    ends = [0, -(2**62), 2**62, 2**53 + 1, None]
    made = {
        "n": [chance.choice([*range(9), *ends]) for _ in range(ROWS)],
        "x": [chance.choice([k / 4 for k in range(-9, 9)] + [None]) for _ in range(ROWS)],
        "t": [chance.choice(TEXTS) for _ in range(ROWS)],
        "b": [chance.choice([b"", b"\0\xff", None]) for _ in range(ROWS)],
        "odd name": list(range(ROWS)),
    }
    names = SCHEMA.names[: WIDTHS[job % 3]]
    return {name: pa.array(made[name], SCHEMA.field(name).type) for name in names}


def listed(output: Output, *, latest: bool = True) -> dict[str, Any]:
    """An output as the ledger lists it for a query."""
    return {
        "topic": output.topic, "location": output.location, "target": output.target,
        "output_key": output.output_key, "rows": output.rows, "latest": latest,
    }  # fmt: skip


class World:
    """A sink with many outputs, some of which the ledger lists, and a plain copy of their rows."""

    def __init__(self, kind: str, home: Path) -> None:
        place = Place("parquet" if kind == "parquet" else "sqlite", home)
        if kind == "earlier":
            outputs = self._of_earlier_release(place)
        else:
            made = [
                place.sealed(columns_of(job), job, state=list(State)[job % 4])
                for job in range(1, OUTPUTS + 1)
            ]
            outputs = place.show(*made, place.sealed({"n": []}, 99))
        self.listed = [listed(output, latest=bool(output.job_id % 5)) for output in outputs
                       if output.job_id % 7]  # fmt: skip
        self.copy = duckdb.connect()
        history = [output for output in outputs if output.job_id % 7 and output.rows]
        latest = [output for output in history if output.job_id % 5]
        for table, of in (("sales", latest), ("sales_history", history)):
            self.copy.register("incoming", pa.concat_tables(map(self._copied, of)))
            self.copy.execute(f"CREATE TABLE {table} AS SELECT * FROM incoming")

    def _of_earlier_release(self, place: Place) -> list[Output]:
        earlier = Earlier(place)
        earlier.topic(TOPIC, 'n INTEGER, x REAL, t TEXT, b BLOB, "odd name" INTEGER')
        outputs = []
        for job in range(1, OUTPUTS + 1):
            table = self._whole(job)
            rows = [tuple(row.values()) for row in table.to_pylist()]
            outputs.append(earlier.add(place.output(job), rows))
        return [*outputs, earlier.add(place.output(99), [])]

    @staticmethod
    def _whole(job: int) -> Any:
        table = pa.table(columns_of(job))
        for field in SCHEMA:
            if field.name not in table.column_names:
                table = table.append_column(field, pa.nulls(len(table), field.type))
        return table

    def _copied(self, output: Output) -> Any:
        table = self._whole(output.job_id)
        values = (
            output.version_id, output.job_id, output.content_hash, output.plugin_version
        )  # fmt: skip
        for field, value in zip(LINEAGE, values, strict=True):
            table = table.append_column(field, pa.array([value] * len(table), field.type))
        return table

    def both(self, question: str) -> tuple[Any, Any]:
        """The product's answer and the copy's: names, types, and how often each row comes."""
        with answer(question, self.listed) as reader:
            ours = reader.read_all()
        return _facts(ours), _facts(self.copy.sql(question).to_arrow_table())


def _facts(table: Any) -> tuple[list[str], list[str], Counter[str]]:
    types = [str(kind) for kind in table.schema.types]
    rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    return table.column_names, types, Counter(map(repr, rows))


@pytest.fixture(scope="module", params=["parquet", "sqlite", "earlier"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(request.param, tmp_path_factory.mktemp("world"))


def comparisons(chance: random.Random) -> str:
    """A random condition."""
    column = chance.choice(["n", "n", "x", "t", "t", "_cf_job_id", '"odd name"', "n + 1", "b"])
    if column == "t":
        values = [t for t in TEXTS if t and "\0" not in t]
        constant = "'" + chance.choice(values).replace("'", "''") + "'"
    elif column == "b":
        return chance.choice(["b IS NULL", "b = ''::BLOB", "octet_length(b) > 1"])
    else:
        constant = chance.choice(
            ["3", "0", "-1", "1.5", "0.25", "7", str(2**53 + 1), str(2**62), "2e0", "1e-9"]
        )
    shape = chance.choice(["{0} {1} {2}"] * 6 + [
        "NOT ({0} {1} {2})", "{0} BETWEEN {2} AND {2}", "{0} IN ({2}, {2})", "{2} {1} {0}",
        "({0} {1} {2}) BETWEEN false AND (n > 2)", "({0} {1} {2}) IS NOT true",
        "CASE WHEN {0} {1} {2} THEN n > 3 ELSE x > 0 END", "{0} IS NOT DISTINCT FROM {2}",
    ])  # fmt: skip
    sign = chance.choice(["=", "<", ">", "<=", ">=", "<>"])
    return str(shape.format(column, sign, constant))


def conditions(chance: random.Random, depth: int = 2) -> str:
    if depth == 0 or chance.random() < 0.3:
        return comparisons(chance)
    parts = [conditions(chance, depth - 1) for _ in range(chance.choice([2, 2, 3]))]
    return "(" + chance.choice([" AND ", " AND ", " OR "]).join(parts) + ")"


SHAPES = [
    "SELECT count(*) FROM {table} WHERE {condition}",
    "SELECT sum(x), count(n), min(t), max(t) FROM {table} WHERE {condition}",
    "SELECT * FROM {table} WHERE {condition}",
    'SELECT t, "odd name" FROM {table} WHERE {condition}',
    "SELECT t, count(*), sum(x) FROM {table} WHERE {condition} GROUP BY t",
    "SELECT _cf_job_id, _cf_source_hash, count(*) FROM {table} WHERE {condition} GROUP BY ALL",
    "SELECT n FROM (SELECT * FROM {table} WHERE {condition}) WHERE x > 0.5",
    "WITH w AS (SELECT n, x FROM {table} WHERE {condition}) SELECT count(*) FROM w, w v "
    "WHERE w.n = v.n AND w.n = 3",
    "SELECT a.t, count(*) FROM (SELECT DISTINCT t FROM {table} WHERE {condition}) a "
    "JOIN sales_history h ON h.t = a.t AND h.n = 2 GROUP BY a.t",
    "SELECT count(*) FROM sales s WHERE {condition} AND EXISTS "
    '(SELECT 1 FROM sales_history h WHERE h._cf_job_id = s._cf_job_id AND "odd name" = 5)',
    "SELECT t, row_number() OVER (PARTITION BY t ORDER BY n) r FROM {table} "
    "WHERE {condition} QUALIFY r = 1",
    "SELECT (SELECT count(*) FROM {table} WHERE {condition}), (SELECT max(n) FROM sales)",
    "SELECT n FROM {table} WHERE {condition} ORDER BY n NULLS LAST LIMIT 7",
    "FROM {table} SELECT DISTINCT ON (t) t WHERE {condition}",
]


@pytest.mark.parametrize("seed", range(2))
def test_random_questions_have_the_answers_of_a_plain_copy(world: World, seed: int) -> None:
    chance = random.Random(seed)
    for shape in SHAPES * 3:
        table = chance.choice(["sales", "sales_history"])
        question = shape.format(table=table, condition=conditions(chance))
        ours, theirs = world.both(question)
        assert ours == theirs, question


WHOLE = [
    "SELECT count(*) FROM sales",
    "SELECT count(*) FROM sales_history",
    "SELECT * FROM sales",
    "SELECT * FROM sales_history",
    "SELECT s FROM sales s WHERE n = 3",
    "SELECT COLUMNS('n|t') FROM sales WHERE n = 3",
    "SELECT * EXCLUDE (n) FROM sales WHERE n = 4",
    "DESCRIBE sales",
    "SELECT count(*) FROM sales NATURAL JOIN (SELECT DISTINCT n FROM sales_history)",
    "SELECT n FROM sales WHERE n = 3 UNION ALL SELECT n FROM sales_history WHERE n = 4",
]


@pytest.mark.parametrize("question", WHOLE)
def test_a_question_has_the_answer_of_a_plain_copy(world: World, question: str) -> None:
    ours, theirs = world.both(question)
    assert ours == theirs


def test_other_orders_of_columns_are_united_by_name(tmp_path: Path) -> None:
    """A topic that has moved from one sink to another is read from both."""
    before, now = Place("parquet", tmp_path / "a"), Place("sqlite", tmp_path / "b")
    first = before.show(before.sealed({"a": [1], "t": ["x"]}, 1))
    second = now.show(now.sealed({"t": ["y", "z"], "c": [0.5, None]}, 2))
    with answer("SELECT t, a, c FROM sales ORDER BY t", [*map(listed, first + second)]) as reader:
        assert reader.read_all().to_pylist() == [
            {"t": "x", "a": 1, "c": None}, {"t": "y", "a": None, "c": 0.5},
            {"t": "z", "a": None, "c": None},
        ]  # fmt: skip


def asked(question: str, outputs: Sequence[Output]) -> list[tuple[Any, ...]]:
    with answer(question, [*map(listed, outputs)]) as reader:
        return [tuple(row.values()) for row in reader.read_all().to_pylist()]


@pytest.mark.of_a_folder
def test_the_ledger_says_what_is_seen_and_not_the_sink(place: Place) -> None:
    states = (State.CURRENT, State.HIDDEN, State.RETRACTED)
    made = [place.sealed({"id": [job]}, job, state=state) for job, state in enumerate(states)]
    one, two, three = place.show(*made)
    assert asked("FROM sales SELECT id", [two, three]) == [(1,), (2,)]
    place.tell(State.HIDDEN, one)
    place.tell(State.CURRENT, two)
    assert asked("FROM sales SELECT id", [one, two]) == [(0,), (1,)]


def test_a_file_is_found_under_the_name_that_it_has_now(parquet: Place) -> None:
    """In mode replace the name of the older output becomes the newer one's."""
    (first,) = parquet.show(parquet.replacing(1, 1))
    past = msgspec.structs.replace(first, state=State.PAST)
    (second,) = parquet.show(parquet.replacing(2, 2), changes=[past])
    assert first.target == second.target
    history = [listed(first, latest=False), listed(second)]
    for table, ids in (("sales", [2]), ("sales_history", [1, 2])):
        with answer(f"SELECT id FROM {table} ORDER BY id", history) as reader:
            assert reader.read_all()["id"].to_pylist() == ids


@pytest.mark.of_a_folder
def test_an_output_that_the_sink_does_not_record_is_missed(place: Place) -> None:
    one, two = place.show(place.sealed({"id": [1]}, 1), place.sealed({"id": [2]}, 2))
    place.sink.delete([two])
    with pytest.raises(CasparianError, match="does not have 1 outputs"):
        asked("FROM sales", [one, two])


def test_only_the_columns_of_the_question_are_read(sqlite: Place) -> None:
    """A value that its column cannot have is met only by who asks for it."""
    outputs = sqlite.show(sqlite.sealed({"id": [1, 2], "t": ["a", "b"]}, 1))
    with closing(sqlite3.connect(sqlite.database)) as connection, connection:
        connection.execute("UPDATE _cf_rows_sales SET t = x'ff' WHERE id = 2")
    assert asked("SELECT count(*), sum(id)::INT FROM sales", outputs) == [(2, 3)]
    assert asked("SELECT count(*) FROM sales", outputs) == [(2,)]
    with pytest.raises(CasparianError, match="query failed"):
        asked("SELECT * FROM sales", outputs)
    with closing(sqlite3.connect(sqlite.database)) as connection, connection:
        connection.execute("UPDATE _cf_rows_sales SET t = CAST(x'ff' AS TEXT) WHERE id = 2")
    with pytest.raises(CasparianError, match="query failed"):
        asked("SELECT * FROM sales", outputs)


def test_columns_of_nulls_and_columns_that_became_wider_keep_their_types(sqlite: Place) -> None:
    outputs = sqlite.show(
        sqlite.sealed({"n": [1], "u": pa.nulls(1)}, 1), sqlite.sealed({"n": [0.5], "u": [7]}, 2)
    )
    described = {row[0]: row[1] for row in asked("DESCRIBE sales", outputs)}
    assert (described["n"], described["u"]) == ("DOUBLE", "BIGINT")
    assert asked("SELECT n, u FROM sales ORDER BY n", outputs) == [(0.5, 7), (1.0, None)]
    assert asked("SELECT n FROM sales WHERE n >= 1", outputs) == [(1.0,)]


def test_a_topic_without_rows_has_its_lineage_columns(sqlite: Place) -> None:
    outputs = sqlite.show(sqlite.sealed({"id": []}, 1))
    assert asked("SELECT count(*) FROM sales WHERE _cf_job_id > 0", outputs) == [(0,)]


def test_few_of_many_outputs_are_found_by_the_index(sqlite: Place) -> None:
    outputs = sqlite.show(*(sqlite.sealed({"id": [job]}, job) for job in range(1, 41)))
    assert asked("SELECT sum(id)::INT FROM sales", outputs[::10]) == [(1 + 11 + 21 + 31,)]
    assert asked("SELECT sum(id)::INT FROM sales", outputs[::2]) == [(sum(range(1, 41, 2)),)]
    keys = {output.output_key: 1 for output in outputs[::10]}
    (rows,) = query_sqlite.find_rows(sqlite.database, TOPIC, keys)
    with closing(sqlite3.connect(sqlite.database)) as connection:
        plan = str(connection.execute("EXPLAIN QUERY PLAN " + rows.select(["id"])).fetchall())
    assert "_cf_output_of_sales" in plan


def test_simple_filters_are_left_to_sqlite(sqlite: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = sqlite.show(sqlite.sealed({"n": [1, 2, 3], "t": ["a", "b", "b"]}, 1))
    told: list[Sequence[str]] = []

    class Listening(query_sqlite.Stream):
        def __arrow_c_stream__(self, requested_schema: object = None) -> Any:
            told.append(self.filters)
            return super().__arrow_c_stream__(requested_schema)

    monkeypatch.setattr(queries, "Stream", Listening)
    assert asked("SELECT n FROM sales WHERE t = 'b' AND n BETWEEN 2 AND 9", outputs) == [(2,), (3,)]
    assert sorted(told[0]) == [
        'r."n" >= 2 AND r."n" <= 9', """r."t" = 'b' COLLATE BINARY"""
    ]  # fmt: skip
    assert asked("SELECT a.n FROM sales a, sales b WHERE a.n = 1 AND b.n = 2", outputs) == [(1,)]
    assert told[1:] == [[], []]


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("(a = 1)", ["a = 1"]),
        ("((a = 1) AND (b < 2) AND ((c = 3) AND (d = 4)))", ["a = 1", "b < 2", "c = 3", "d = 4"]),
        ("((a = 1) OR ((b = 2) AND (c = 3)))", ["(a = 1) OR ((b = 2) AND (c = 3))"]),
        ("((a > 3) BETWEEN (b > 5) AND (c = 'x'))", ["(a > 3) BETWEEN (b > 5) AND (c = 'x')"]),
        ("((a = ') AND (') AND (b = 2))", ["a = ') AND ('", "b = 2"]),
        ("CASE WHEN (a AND b) THEN (c) END", ["CASE WHEN (a AND b) THEN (c) END"]),
    ],
)  # fmt: skip
def test_the_terms_of_a_conjunction(text: str, terms: list[str]) -> None:
    assert sorted(conjuncts(text)) == sorted(terms)


def test_what_needs_more_memory_is_asked_again_with_all_of_it(
    sqlite: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = sqlite.show(sqlite.sealed({"t": ["x" * 100] * 20_000}, 1))
    monkeypatch.setattr(queries, "MEMORY", "8MiB")
    question = "SELECT length(string_agg(t, '')) + len(list(t || 'y' || t)) FROM sales"
    assert asked(question, outputs) == [(2_020_000,)]


def test_a_scan_ends_when_its_rows_are_no_longer_asked_for(
    sqlite: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = sqlite.show(sqlite.sealed({"n": list(range(50_000))}, 1))
    monkeypatch.setattr(query_sqlite, "BATCH_ROWS", 64)
    read = []
    check = query_sqlite.Stream._check

    def counted(self: query_sqlite.Stream, batch: Any, schema: Any) -> None:
        read.append(len(batch))
        check(self, batch, schema)

    monkeypatch.setattr(query_sqlite.Stream, "_check", counted)
    assert asked("SELECT sum(n)::INT FROM (FROM sales LIMIT 3)", outputs) == [(3,)]
    assert 0 < sum(read) < 10_000
    with answer("FROM sales SELECT n", [*map(listed, outputs)]) as reader:
        assert len(next(iter(reader)))
    opened = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
              if os.path.lexists(f"/proc/self/fd/{fd}")]  # fmt: skip
    assert str(sqlite.database) not in opened


PATHS = {
    "SELECT id FROM sales WHERE _cf_path = 'inbox/2.csv' ORDER BY id": [(2,), (20,)],
    "SELECT * EXCLUDE (_cf_file_version_id, _cf_job_id, _cf_source_hash, _cf_plugin_version) "
    "FROM sales WHERE _cf_path >= 'inbox/2.csv' AND id > 2 ORDER BY id": [
        (3, "inbox/3.csv"), (20, "inbox/2.csv"),
    ],
    "SELECT _cf_path, count(*) FROM sales GROUP BY ALL ORDER BY ALL": [
        ("inbox/1.csv", 1), ("inbox/2.csv", 2), ("inbox/3.csv", 1),
    ],
    "SELECT a.id, b.id AS other FROM sales a JOIN sales_history b USING (_cf_path) "
    "WHERE a.id = 3": [(3, 3)],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["parquet", "sqlite", "earlier", "parts"])
def test_the_file_of_each_row(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its output, whatever ids the rows have: an earlier ledger may have given them."""
    place = Place("parquet" if kind in ("parquet", "parts") else "sqlite", tmp_path)
    ids = ([1], [2, 20], [3])
    if kind == "earlier":
        earlier = Earlier(place)
        earlier.topic(TOPIC, "id INTEGER")
        outputs = [
            earlier.add(place.output(job), [(n,) for n in of]) for job, of in enumerate(ids, 1)
        ]
    else:
        states = [State.CURRENT, State.HIDDEN, State.RETRACTED]
        stages = [
            place.stage(job, state=state, version_id=7, split_bytes=int(kind == "parts"))
            for job, state in enumerate(states, 1)
        ]
        monkeypatch.setattr(parts, "GROUP_ROWS", 1)
        for stage, of in zip(stages, ids, strict=True):
            for n in of:
                stage.write(pa.record_batch({"id": [n]}))
        outputs = place.show(*sinks.seal(stages))
        assert Path(outputs[1].target).is_dir() == (kind == "parts")
    paths = {output.output_key: f"inbox/{output.job_id}.csv" for output in outputs}
    for question, rows in PATHS.items():
        with answer(question, [*map(listed, outputs)], paths) as reader:
            assert [tuple(row.values()) for row in reader.read_all().to_pylist()] == rows
    assert "_cf_path" not in str(asked("DESCRIBE sales", outputs))


@pytest.mark.of_a_folder
def test_a_topic_without_rows_has_the_column_of_files_too(place: Place) -> None:
    outputs = place.show(place.sealed({"id": []}, 1))
    with answer("SELECT _cf_path FROM sales", [*map(listed, outputs)], {}) as reader:
        assert reader.read_all().to_pylist() == []


@pytest.mark.of_a_folder
def test_a_sink_on_a_read_only_disk(place: Place, tmp_path: Path) -> None:
    """SQLite may not make the files that it needs beside a database with a WAL."""
    with in_memory(tmp_path / "disk", "1m") as disk:
        place = Place(place.scheme, disk)
        outputs = place.show(place.sealed({"id": [1, 2]}))
        for file in disk.glob("out/*-shm"):
            file.unlink()
        remount(disk, "ro")
        assert asked("SELECT id FROM sales", outputs) == [(1,), (2,)]
        assert asked("SELECT count(*) FROM sales", outputs) == [(2,)]


def test_a_wal_on_a_read_only_disk(tmp_path: Path) -> None:
    with in_memory(tmp_path / "disk", "1m") as disk:
        place = Place("sqlite", disk)
        outputs = place.show(place.sealed({"id": [1, 2]}))
        with closing(sqlite3.connect(place.database)) as connection:
            connection.execute("PRAGMA wal_autocheckpoint = 0")
            connection.execute("UPDATE _cf_rows_sales SET id = 3 WHERE id = 2")
            connection.commit()
            wal = Path(f"{place.database}-wal").read_bytes()
        Path(f"{place.database}-wal").write_bytes(wal)
        remount(disk, "ro")
        with pytest.raises(CasparianError, match="WAL") as refused:
            asked("SELECT id FROM sales", outputs)
        assert f"sqlite3 {place.database}" in refused.value.hint


def test_a_file_that_changes_on_a_read_only_disk(
    sqlite: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be mounted elsewhere too, and be written there."""
    (output,) = sqlite.show(sqlite.sealed({"id": list(range(500))}))
    monkeypatch.setattr(query_sqlite, "BATCH_ROWS", 64)
    here = tmp_path / "here"
    here.mkdir()
    with or_skip(here, "--bind", sqlite.database.parent):
        remount(here, "bind,ro")
        database = here / sqlite.database.name
        (rows,) = query_sqlite.find_rows(database, TOPIC, {output.output_key: 500})
        reader = pa.RecordBatchReader.from_stream(query_sqlite.Stream(rows, ["id"], []))
        assert len(reader.read_next_batch()) > 0
        os.utime(sqlite.database)
        with pytest.raises(pa.ArrowInvalid, match="was changed"):
            reader.read_all()
