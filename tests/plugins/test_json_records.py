"""`plugins/json_records.py`: which documents become which rows, and of what types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.plugins.conftest import Run

DOCUMENTS: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "an array of objects": ([{"a": 1}, {"b": "x"}], [{"a": 1, "b": None}, {"a": None, "b": "x"}]),
    "an object with one array of objects": (
        {"count": 2, "meta": {"page": 1}, "rows": [{"a": 1}, {"a": 2}]},
        [
            {"a": 1, "document_count": 2, "document_meta": '{"page":1}'},
            {"a": 2, "document_count": 2, "document_meta": '{"page":1}'},
        ],
    ),
    "an object with two": (
        {"nodes": [{"a": 1}], "links": [{"b": 2}]},
        [{"nodes": '[{"a":1}]', "links": '[{"b":2}]'}],
    ),
    "an object": ({"a": 1, "b": [1, "é"], "c": None}, [{"a": 1, "b": '[1,"é"]', "c": None}]),
    "a scalar": (5, [{"value": 5}]),
    "an array of scalars": ([1, 2], [{"value": "[1,2]"}]),
    "an empty object": ({}, [{"value": "{}"}]),
    "features": (
        {
            "type": "FeatureCollection",
            "features": [
                {"type": "Feature", "id": 7, "properties": {"id": "p"}, "geometry": None},
                {
                    "type": "Feature",
                    "properties": {"id": "q"},
                    "geometry": {"type": "Point", "coordinates": [1, 2.5]},
                },
            ],
        },
        [
            {
                "id": "p",
                "feature_id": 7,
                "feature_geometry": None,
                "document_type": "FeatureCollection",
            },
            {
                "id": "q",
                "feature_id": None,
                "feature_geometry": '{"type":"Point","coordinates":[1,2.5]}',
                "document_type": "FeatureCollection",
            },
        ],
    ),
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_documents(case: str, json_records: Run, tmp_path: Path) -> None:
    document, rows = DOCUMENTS[case]
    file = tmp_path / "document.json"
    file.write_text(json.dumps(document, indent=1))
    assert json_records(file)["json"].to_pylist() == rows


def test_a_column_has_the_type_its_values_agree_on(json_records: Run, tmp_path: Path) -> None:
    rows = [
        {"b": True, "i": 2**62, "f": 1, "s": "x", "m": 1, "big": 2**70, "lf": 2**60, "n": None},
        {"b": None, "i": 1, "f": 0.5, "s": "", "m": "1", "big": 1, "lf": 0.5, "n": None},
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    table = json_records(file)["json"]
    text = pa.string()
    assert table.schema.types == [pa.bool_(), pa.int64(), pa.float64(), *[text] * 5]
    assert table.column("m").to_pylist() == ["1", '"1"']
    assert table.column("big").to_pylist() == [str(2**70), "1"]
    assert table.column("lf").to_pylist() == [str(2**60), "0.5"]


def test_a_bad_line_is_a_reject(json_records: Run, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf{"a": 1}\n\n{"a": \n{"a": 1, "a": 2}\n"x\xff"\n[1]\n{"a": "\\ud800"}\n'
    )
    out = json_records(file)
    assert [tuple(row.values()) for row in out["json_rejects"].to_pylist()] == [
        (3, "not JSON: Expecting value: column 6 (char 5)", '{"a": '),
        (4, "the key 'a' stands twice in one object", '{"a": 1, "a": 2}'),
        (5, "not utf-8: invalid start byte at byte 2", '"x\\xff"'),
    ]
    assert out["json"].to_pylist() == [
        {"a": "1", "value": None},
        {"a": None, "value": "[1]"},
        {"a": '"\\ud800"', "value": None},
    ]


def test_types_come_from_the_whole_file(json_records: Run, tmp_path: Path) -> None:
    file = tmp_path / "long.ndjson"
    file.write_text('{"a": 1}\n' * 12_000 + '{"a": 1.5, "b": "late"}\n')
    table = json_records(file)["json"]
    assert table.schema == pa.schema([("a", pa.float64()), ("b", pa.string())])
    assert table.num_rows == 12_001


def test_lines_in_a_json_file_and_a_document_in_a_jsonl_file(
    json_records: Run, tmp_path: Path
) -> None:
    lines = tmp_path / "lines.json"
    lines.write_text('{"a": 1}\n{"a": 2}\n')
    assert json_records(lines)["json"].to_pylist() == [{"a": 1}, {"a": 2}]
    document = tmp_path / "document.jsonl"
    document.write_text('[\n {"a": 1},\n {"a": 2}\n]\n')
    assert json_records(document)["json"].to_pylist() == [{"a": 1}, {"a": 2}]


def test_names_and_too_many_of_them(json_records: Run, tmp_path: Path) -> None:
    file = tmp_path / "names.json"
    file.write_text('{"": 1, "Id": 2, "ID": 3, "_cf_job_id": 4}')
    assert json_records(file)["json"].to_pylist() == [
        {"column_1": 1, "Id": 2, "ID_2": 3, "x_cf_job_id": 4}
    ]
    wide = {f"k{number}": number for number in range(1001)}
    file.write_text(json.dumps(wide))
    (row,) = json_records(file)["json"].to_pylist()
    assert json.loads(row["value"]) == wide


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not JSON: Expecting value: line 1 column 1"),
        (b"{\n 'a': 1}", "line 2 column 2"),
        (b'{"a": "\xff"}', "not utf-8: invalid start byte at byte 7"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_not_json_fails(
    data: bytes, reason: str, json_records: Run, tmp_path: Path
) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        json_records(file)


def test_real_files_end_in_rows_or_in_a_reason(json_records: Run, shared_files: Path) -> None:
    failed = {}
    for name in ("*.json", "*.jsonl", "*.ndjson", "*.geojson", "*.geojsonl"):
        for file in sorted(shared_files.rglob(name)):
            try:
                json_records(file)
            except ValueError as error:
                assert type(error) is ValueError, f"{file}: {error!r}"
                failed[str(file.relative_to(shared_files))] = str(error)
    print(*(f"{name}: {reason}" for name, reason in failed.items()), sep="\n")
    assert len(failed) < 10
    movies = json_records(shared_files / "json" / "vega-datasets" / "movies.json")
    assert movies["json"].num_rows == 3201
