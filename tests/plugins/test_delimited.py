"""`plugins/delimited.py`: every record is a row or a reject, and the same ones csv finds."""

from __future__ import annotations

import csv
import gzip
import io
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest

from casparian_flow.sdk import column_names
from tests.plugins.conftest import Run

CASES = {
    "semicolons in cp1252": (
        "Straße;Ort\nKönigsallee;Düsseldorf\nGärtnerweg;Köln\n".encode("cp1252"),
        ["Straße", "Ort"],
        [["Königsallee", "Düsseldorf"], ["Gärtnerweg", "Köln"]],
    ),
    "UTF-8 with a mark": (b"\xef\xbb\xbfa,b\n1,2\n", ["a", "b"], [["1", "2"]]),
    "UTF-16 with a mark": ("a\tb\n1\t\u4e2d\n".encode("utf-16"), ["a", "b"], [["1", "\u4e2d"]]),
    "UTF-16 without": ("a,b\n1,2\n3,4\n".encode("utf-16-le"), ["a", "b"], [["1", "2"], ["3", "4"]]),
    "CR only": (b"a,b\r1,2\r3,4", ["a", "b"], [["1", "2"], ["3", "4"]]),
    "mixed line ends": (b"a,b\r\n1,2\n3,4\r5,6", ["a", "b"], [["1", "2"], ["3", "4"], ["5", "6"]]),
    "a line end in a field": (b'a,b\n1,"x\r\ny"\n', ["a", "b"], [["1", "x\r\ny"]]),
    "blank lines": (b"\n\na,b\n\n1,2\n\n", ["a", "b"], [["1", "2"]]),
    "header only": (b"a,b\n", ["a", "b"], []),
    "one byte": (b"a", ["a"], []),
    "what looks like numbers": (b"a,b\n007,\n1e5,NA\n", ["a", "b"], [["007", ""], ["1e5", "NA"]]),
    "one column": (b"name\nx\ny\n", ["name"], [["x"], ["y"]]),
    "quotes are text in tabbed text": (
        b'size\tname\n5"\tdisc\n"odd\trim\n3"\thub\n',
        ["size", "name"],
        [['5"', "disc"], ['"odd', "rim"], ['3"', "hub"]],
    ),
    "names": (
        b"id,,ID,_cf_job_id,two  words,id_2\n1,2,3,4,5,6\n",
        ["id", "column_2", "ID_2", "x_cf_job_id", "two words", "id_2_2"],
        [["1", "2", "3", "4", "5", "6"]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_reads(case: str, delimited: Run, tmp_path: Path) -> None:
    data, columns, rows = CASES[case]
    file = tmp_path / "table.csv"
    file.write_bytes(data)
    out = delimited(file)
    assert out.keys() == {"delimited"}
    assert out["delimited"].column_names == columns
    assert [list(row.values()) for row in out["delimited"].to_pylist()] == rows


def test_what_is_no_row_is_a_reject(delimited: Run, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_bytes(
        'é,b\n1,2\n1,2,3\n\n\'x\',\'y\n4,"two\nlines",6\n"a"b,c\nn\0ul,2\nñandú,über\n'.encode()
        + b'bad\xff,2\nlast,"open\n'
    )
    out = delimited(file)
    assert rejects(out) == [
        (3, 3, "3 fields where the header has 2", "1,2,3\n"),
        (6, 5, "3 fields where the header has 2", '4,"two\nlines",6\n'),
        (8, 6, "text after a closing quote", '"a"b,c\n'),
        (9, 7, "a NUL character", "n\\x00ul,2\n"),
        (11, 9, "bytes that are not in the encoding of the file", "bad\\udcff,2\n"),
        (12, 10, "a quote that does not close before the end", 'last,"open\n'),
    ]
    assert out["delimited"].column("b").to_pylist() == ["2", "'y", "über"]


def rejects(out: dict[str, pa.Table]) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in out["delimited_rejects"].to_pylist()]


def test_an_empty_file_has_no_rows(delimited: Run, tmp_path: Path) -> None:
    file = tmp_path / "empty.csv"
    file.write_bytes(b"")
    assert delimited(file) == {}


def test_a_header_that_cannot_be_read_fails(delimited: Run, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_bytes(b'"a,b\n1,2\n')
    with pytest.raises(ValueError, match=r"line 1, the header, .* quote that does not close"):
        delimited(file)


def test_gzip(delimited: Run, tmp_path: Path) -> None:
    file = tmp_path / "table.tsv.gz"
    file.write_bytes(gzip.compress(b"a\tb\n1\t2\n"))
    assert delimited(file)["delimited"].to_pylist() == [{"a": "1", "b": "2"}]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="the gzip file is damaged"):
        delimited(file)


def test_the_first_accent_may_come_late(delimited: Run, tmp_path: Path) -> None:
    file = tmp_path / "long.csv"
    file.write_bytes(b"id,name\n" + b"1,plain\n" * 100_000 + "2,Müller\n3,Größe\n".encode("cp1252"))
    names = delimited(file)["delimited"].column("name")
    assert len(names) == 100_002
    assert names[-2:].to_pylist() == ["Müller", "Größe"]


def test_a_field_too_long_is_a_reject_and_reading_goes_on(delimited: Run, tmp_path: Path) -> None:
    file = tmp_path / "wide.csv"
    file.write_bytes(b"a,b\n1," + b"x" * ((16 << 20) + 1) + b"\n2,y\n")
    out = delimited(file)
    assert out["delimited"].to_pylist() == [{"a": "2", "b": "y"}]
    (reject,) = out["delimited_rejects"].to_pylist()
    assert reject["reason"] == f"more than {16 << 20} characters"
    assert reject["raw"] == "1," + "x" * ((1 << 20) - 2)


def real_files(folder: Path) -> list[Path]:
    names = ("*.csv", "*.tsv", "*.tab", "*.csv.gz", "*.tsv.gz")
    return sorted(file for name in names for file in folder.rglob(name) if file.is_file())


class Read(NamedTuple):
    """What the plugin made of a real file."""

    tables: dict[str, pa.Table]
    """By topic; empty where it refused the file."""
    reason: str
    seconds: float
    """Of processor time."""


@pytest.fixture(scope="module")
def reads(delimited: Run, shared_files: Path) -> dict[Path, Read]:
    """Every real file, read once for all who look at it."""
    made = {}
    for file in real_files(shared_files):
        started, tables, reason = time.process_time(), {}, ""
        try:
            tables = delimited(file)
        except ValueError as error:
            assert type(error) is ValueError, f"{file}: {error!r}"
            reason = str(error)
        made[file] = Read(tables, reason, time.process_time() - started)
    return made


def test_real_files_end_in_rows_or_in_a_reason(reads: dict[Path, Read], shared_files: Path) -> None:
    """A refusal names what to type, or what the file is instead."""
    failed = {file: read.reason for file, read in reads.items() if read.reason}
    print(*(f"{file.relative_to(shared_files)}: {why}" for file, why in failed.items()), sep="\n")
    assert not [file for file, read in reads.items() if read.seconds > 20]
    words = ("--option", "not delimited text", "nothing but NUL", "gzip file is damaged")
    assert not [why for why in failed.values() if not any(word in why for word in words)]
    ours = [f for f in failed if not any(part in str(f) for part in ("/afl/", "fuzz", "/duckdb/"))]
    assert len(ours) < 6


def strictly(data: bytes) -> dict[str, list[list[str]]]:
    """The tables that the csv module reads of well-formed text, by delimiter."""
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        return {}
    tables = {}
    for delimiter in ",;\t|" if "\0" not in text else "":
        lines = io.StringIO(text, newline="")
        try:
            rows = [row for row in csv.reader(lines, delimiter=delimiter, strict=True) if row]
        except csv.Error:
            continue
        if rows and len(rows[0]) > 1 and {len(row) for row in rows} == {len(rows[0])}:
            tables[delimiter] = rows
    return tables


NOT_AS_CSV_READS = {
    "csv/duckdb/csv/17451/extra/3.csv": "the header stands twice: a reject",
    "csv/duckdb/csv/test/blob.csv": "one line of all bytes, with nine delimiters",
}


def test_well_formed_real_files_are_read_cell_by_cell(
    reads: dict[Path, Read], shared_files: Path
) -> None:
    """As the csv module reads them, with the first record as the header or as a row."""
    count: Counter[str] = Counter()
    for file, read in reads.items():
        if "is damaged" in read.reason:
            continue
        data = file.read_bytes()
        packed = data.startswith(b"\x1f\x8b")
        tables = strictly(gzip.decompress(data) if packed else data)
        if not tables or str(file.relative_to(shared_files)) in NOT_AS_CSV_READS:
            continue
        usual = "\t" if re.search(r"\.(tsv|tab)", file.name) else ","
        table = tables.get(usual) or max(tables.values(), key=lambda rows: len(rows) * len(rows[0]))
        if read.reason:
            print(file.relative_to(shared_files), read.reason)
            assert len(table) < 3, read.reason  # too little to tell a header from a row
            count["refused"] += 1
            continue
        assert read.tables.keys() == {"delimited"}, file
        found = read.tables["delimited"]
        rows = [list(row.values()) for row in found.to_pylist()]
        headed = found.column_names == column_names(table[0])
        assert rows == (table[1:] if headed else table), file
        count["with a header" if headed else "without"] += 1
    print(count)
    assert count["with a header"] > 200
    assert count["without"] < 30
    assert count["refused"] < 10
