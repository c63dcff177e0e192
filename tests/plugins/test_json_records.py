"""`plugins/json_records.py`: which documents become which rows, and of what types."""

from __future__ import annotations

import gzip
import json
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from proofs import written_json
from tests.plugins.conftest import Run, runner

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
    text, exact = pa.string(), pa.decimal128
    assert table.schema.types == [
        pa.bool_(), pa.int64(), pa.float64(), text, text, exact(38, 0), exact(38, 18), pa.null(),
    ]  # fmt: skip
    assert table.column("m").to_pylist() == ["1", '"1"']
    assert table.column("big").to_pylist() == [2**70, 1]
    assert table.column("lf").to_pylist() == [2**60, Decimal("0.5")]


NUMBERS: list[tuple[list[str], Any, list[Any]]] = [
    (["12345678901234567.89", "0.1", "100.10"], pa.decimal128(38, 18),
     [Decimal("12345678901234567.89"), Decimal("0.1"), Decimal("100.1")]),
    (["0.1", "1e3", "100.10", "-0.0", "2"], pa.float64(), [0.1, 1000.0, 100.1, -0.0, 2.0]),
    (["0.10000000000000001"], pa.decimal128(38, 18), [Decimal("0.10000000000000001")]),
    (["1e-20", "1.00000000000000000001"], pa.decimal128(38, 20),
     [Decimal("1e-20"), Decimal("1.00000000000000000001")]),
    (["18446744073709551615", "1E+20"], pa.decimal128(38, 0), [2**64 - 1, 10**20]),
    (["9" * 39, "1"], pa.string(), ["9" * 39, "1"]),
    (["1" * 5000], pa.string(), ["1" * 5000]),
    (["1e300", "12345678901234567.89"], pa.string(), ["1e300", "12345678901234567.89"]),
    (["1", "9007199254740993", "0.5"], pa.decimal128(38, 18), [1, 2**53 + 1, Decimal("0.5")]),
    (['{"a": [1.10, 1e400, 12345678901234567.89]}'], pa.string(),
     ['{"a":[1.10,1e400,12345678901234567.89]}']),
]  # fmt: skip


@pytest.mark.parametrize(("written", "kind", "values"), NUMBERS, ids=lambda each: str(each)[:30])
def test_a_number_is_what_was_written(
    written: list[str], kind: Any, values: list[Any], json_records: Run, tmp_path: Path
) -> None:
    file = tmp_path / "numbers.jsonl"
    file.write_text("".join(f'{{"n": {each}}}\n' for each in written))
    out = json_records(file)
    assert out.keys() == {"json"}
    assert out["json"].schema.field("n").type == kind
    assert out["json"].column("n").to_pylist() == values


@pytest.mark.parametrize("number", ["1e400", "-1e400", "1e-400", "1e99999999999999999999", "NaN",
                                    "Infinity", "[1, -Infinity]"])  # fmt: skip
def test_a_number_that_nothing_holds_is_a_reject(
    number: str, json_records: Run, tmp_path: Path
) -> None:
    lines, document = tmp_path / "numbers.jsonl", tmp_path / "numbers.json"
    lines.write_text(f'{{"n": 1.5}}\n{{"n": {number}}}\n')
    out = json_records(lines)
    assert out["json"].to_pylist() == [{"n": 1.5}]
    (reject,) = out["json_rejects"].to_pylist()
    assert (reject["line"], reject["raw"]) == (2, f'{{"n": {number}}}')
    assert "'n'" in reject["reason"]
    document.write_text(f'[{{"n": 1.5}}, {{"n": {number}}}]')
    out = json_records(document)
    assert out["json"].to_pylist() == [{"n": 1.5}]
    (reject,) = out["json_rejects"].to_pylist()
    assert (reject["line"], reject["raw"]) == (None, f'{{"n":{number}}}'.replace(", ", ","))
    assert reject["reason"].startswith("record 2: ")


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("empty.json", "[]", 0),
        ("page.json", '{"total": 0, "items": []}', 0),
        ("only.json", '{"tags": []}', 0),
        ("features.json", '{"type": "FeatureCollection", "features": []}', 0),
        ("one.json", '{"name": "x", "tags": []}', 1),
        ("lines.jsonl", '[{"a": 1}, {"a": 2}]\n', 2),
        ("empty_line.jsonl", '[]\n{"a": 1}\n', 1),
        ("cells.jsonl", '["a", "b"]\n[1, 2]\n', 2),
        ("some.json", '[{"a": 1}, 5, null]', 3),
        ("arrays.json", '[{"a": 1}]\n[{"a": 2}, {"a": 3}]', 3),
        ("joined.jsonl", '{"a": 1}{"a": 2} {"a": 3}\n', 3),
        ("joined.json", '{\n"a": 1}\n{"a":\n 2}', 2),
        ("zero.json", "", 0),
        ("zero.jsonl", "", 0),
        ("blank.json", " \n", 0),
        ("mark.json", "\ufeff", 0),
    ],
)
def test_how_many_rows(name: str, text: str, rows: int, json_records: Run, tmp_path: Path) -> None:
    for packed in (False, True):
        file = tmp_path / (f"{name}.gz" if packed else name)
        file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        out = json_records(file)
        assert "json_rejects" not in out
        assert (out["json"].num_rows if "json" in out else 0) == rows


def test_what_is_guessed_is_said(
    json_records: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "page.json"
    file.write_text('{"total": 1, "rows": [{"a": 1, "b": 1}, {"a": "x", "b": 2}]}')
    json_records(file)
    page, column = capsys.readouterr().out.splitlines()
    assert page.startswith("guessed: ")
    assert "'rows'" in page
    assert column == "guessed: column 'a' is JSON text: it has numbers, text"


@pytest.mark.parametrize(
    ("records", "rows"),
    [(".", [{"id": 1, "lines": '[{"a":1}]', "more": "[]"}]), ("more", []),
     ("lines", [{"a": 1, "document_id": 1, "document_more": "[]"}])],
)  # fmt: skip
def test_option_records_says_where_they_are(records: str, rows: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "order.json"
    file.write_text('{"id": 1, "lines": [{"a": 1}], "more": []}')
    out = runner("json_records", records=records)(file)
    assert (out["json"].to_pylist() if "json" in out else []) == rows


TYPES: list[tuple[str, Any, list[Any], int]] = [
    ("text", pa.string(), ["7", "A7", "1.50", "true", None, "1e400", "[1]"], 0),
    ("n:text", pa.string(), ["7", "A7", "1.50", "true", None, "1e400", "[1]"], 0),
    ("n:double,other:text", pa.float64(), [7.0, 1.5, None], 4),
    ("n:decimal", pa.decimal128(38, 18), [7, Decimal("1.5"), None], 4),
]


@pytest.mark.parametrize(("option", "kind", "values", "rejects"), TYPES)
def test_option_types_settles_a_column(
    option: str, kind: Any, values: list[Any], rejects: int, tmp_path: Path
) -> None:
    file = tmp_path / "mixed.jsonl"
    written = ["7", '"A7"', "1.50", "true", "null", "1e400", "[1]"]
    file.write_text("".join(f'{{"n": {each}}}\n' for each in written))
    out = runner("json_records", types=option)(file)
    assert out["json"].schema.field("n").type == kind
    assert out["json"].column("n").to_pylist() == values
    assert ("json_rejects" in out) == bool(rejects)
    assert not rejects or out["json_rejects"].num_rows == rejects


def test_option_double_takes_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "digits.jsonl"
    file.write_text('{"n": 0.10000000000000001}\n{"n": 1}\n{"n": 1e400}\n{"n": null, "i": 1}\n')
    out = runner("json_records", types="double")(file)
    assert out["json"].schema == pa.schema([("n", pa.float64()), ("i", pa.int64())])
    assert out["json"].column("n").to_pylist() == [0.1, 1.0, None]
    assert out["json_rejects"].num_rows == 1
    with pytest.raises(ValueError, match="option types has 'n:date'"):
        runner("json_records", types="n:date")(file)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "an HTML page"),
        (b"PK\x03\x04" + b"\0" * 60, "a ZIP file"),
        (b'<?xml version="1.0"?><a/>', "XML"),
        (b"%PDF-1.7\n%\xe2\xe3", "PDF"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_what_is_something_else_fails_by_its_first_bytes(
    data: bytes, kind: str, name: str, json_records: Run, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(ValueError, match=f"this is .*{kind}.*, not JSON"):
        json_records(file)


def test_gzip_is_read_whatever_its_name_and_its_damage_fails(
    json_records: Run, tmp_path: Path
) -> None:
    file = tmp_path / "lines.jsonl"
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    file.write_bytes(whole)
    assert json_records(file)["json"].num_rows == 1000
    file.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="gzip file is damaged"):
        json_records(file)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_in_any_encoding(encoding: str, end: str, json_records: Run, tmp_path: Path) -> None:
    texts = ["ਊ", "\u0a0d", "x" * 40_000, "é"]
    file = tmp_path / "lines.jsonl"
    text = end.join(json.dumps({"t": each}, ensure_ascii=False) for each in texts) + end
    file.write_bytes(text.encode(encoding))
    assert json_records(file)["json"].column("t").to_pylist() == texts


def test_zeros_alone_are_no_utf_16(json_records: Run, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b'{\0"a": 1}\n' + b'{"a": 2}\n' * 20 + b"\0" * 4096 + b'\n{"a": 3}\n')
    out = json_records(file)
    assert out["json"].column("a").to_pylist() == [*[2] * 20, 3]
    assert out["json_rejects"].column("line").to_pylist() == [1, 22]


def test_a_file_written_as_lines_whose_first_is_cut(json_records: Run, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b'{\n{"a": 2}\n{"a": 3}\n')
    out = json_records(file)
    assert out["json"].column("a").to_pylist() == [2, 3]
    assert out["json_rejects"].column("line").to_pylist() == [1]


SEED = random.SystemRandom().randrange(1 << 32)


def test_what_is_published_is_what_was_written(json_records: Run, tmp_path: Path) -> None:
    print("seed", SEED)
    tallies = [written_json.check(SEED + n, tmp_path, json_records) for n in range(102)]
    rows, rejects, values = (sum(each) for each in zip(*tallies, strict=True))
    assert rows > 100
    assert rejects > 10
    assert values > rows


def test_a_bad_line_is_a_reject(json_records: Run, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf{"a": 1}\n\n{"a": \n{"a": 1, "a": 2}\n"x\xff"\n[1]\n{"a": "\\ud800"}\n'
    )
    out = json_records(file)
    assert [tuple(row.values()) for row in out["json_rejects"].to_pylist()] == [
        (3, "not JSON: Expecting value: column 6 (char 5)", '{"a": '),
        (4, "the key 'a' appears twice in one object", '{"a": 1, "a": 2}'),
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
        (b"x", "not JSON: Expecting value: line 1 column 1"),
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
