"""`plugins/delimited.py`: every record is a row or a reject, and the same ones csv finds."""

from __future__ import annotations

import csv
import gzip
import logging
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.plugins.conftest import Run, load

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
    rejects = [tuple(row.values()) for row in out["delimited_rejects"].to_pylist()]
    assert rejects == [
        (3, 3, "3 fields where the header has 2", "1,2,3\n"),
        (6, 5, "3 fields where the header has 2", '4,"two\nlines",6\n'),
        (8, 6, "',' expected after '\"'", '"a"b,c\n'),
        (9, 7, "a NUL character", "n\\x00ul,2\n"),
        (11, 9, "bytes that are not in the encoding of the file", "bad\\udcff,2\n"),
        (12, 10, "the text ends within quotes or after an escape", 'last,"open\n'),
    ]
    assert out["delimited"].column("b").to_pylist() == ["2", "'y", "über"]


def test_an_empty_file_has_no_rows(delimited: Run, tmp_path: Path) -> None:
    file = tmp_path / "empty.csv"
    file.write_bytes(b"")
    assert delimited(file) == {}


def test_a_header_that_cannot_be_read_fails(delimited: Run, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_bytes(b'"a,b\n1,2\n')
    with pytest.raises(ValueError, match=r"line 1, the header, .* ends within quotes"):
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
    assert "field limit" in out["delimited_rejects"].column("reason")[0].as_py()


def real_files(folder: Path) -> list[Path]:
    names = ("*.csv", "*.tsv", "*.tab", "*.csv.gz", "*.tsv.gz")
    return sorted(file for name in names for file in folder.rglob(name) if file.is_file())


class Read(NamedTuple):
    """What the plugin made of a real file."""

    rows: dict[str, int]
    """Topic -> how many; empty where it refused the file."""
    reason: str
    seconds: float
    """Of processor time."""
    dialect: tuple[Any, ...]
    """Encoding, and what csv is told to read it so."""


@pytest.fixture(scope="module")
def reads(delimited: Run, shared_files: Path) -> dict[Path, Read]:
    """Every real file, read once for all who look at it."""
    said = logging.getLogger("delimited")
    made, lines = {}, Lines()
    said.addHandler(lines)
    said.setLevel(logging.INFO)
    for file in real_files(shared_files):
        started, rows, reason = time.process_time(), {}, ""
        try:
            rows = {topic: table.num_rows for topic, table in delimited(file).items()}
        except ValueError as error:
            assert type(error) is ValueError, f"{file}: {error!r}"
            reason = str(error)
        made[file] = Read(rows, reason, time.process_time() - started, lines.last)
    said.setLevel(logging.NOTSET)
    said.removeHandler(lines)
    return made


class Lines(logging.Handler):
    """The arguments of the last line that was logged."""

    last: tuple[Any, ...] = ()

    def emit(self, record: logging.LogRecord) -> None:
        assert isinstance(record.args, tuple)
        self.last = record.args


def test_real_files_end_in_rows_or_in_a_reason(reads: dict[Path, Read], shared_files: Path) -> None:
    """And good and rejected rows are together as many as a strict csv reader meets."""
    open_text = load("delimited").open_text
    failed = {file: read.reason for file, read in reads.items() if read.reason}
    for file in reads.keys() - failed.keys():
        encoding, dialect = reads[file].dialect
        with open_text(str(file), encoding) as text:
            records = count_strictly(csv.reader(text, strict=True, **dialect))
        assert sum(reads[file].rows.values()) == max(records - 1, 0), file
    print(*(f"{file.relative_to(shared_files)}: {why}" for file, why in failed.items()), sep="\n")
    assert not [file for file, read in reads.items() if read.seconds > 20]
    assert len(failed) < 25


def count_strictly(reader: object) -> int:
    """Records that csv finds, those it cannot read among them, without wholly empty lines."""
    records = 0
    while True:
        try:
            records += bool(next(reader))  # type: ignore[call-overload]
        except StopIteration:
            return records
        except csv.Error:
            records += 1


NOT_SO_WELL_FORMED = {
    "page_namespacepage_title_sample.csv": "titles begin with a quote as text; csv merges lines",
    "thijs_unquoted.csv": "so do names, in the first line",
    "unquoted/basic.csv": "text after a closing quote",
    "unquoted/unquoted_new_line.csv": "the same",
}


def test_well_formed_real_files_have_every_row(reads: dict[Path, Read], shared_files: Path) -> None:
    """As many rows as the plain csv reading that came with the files, and no rejects."""
    with (shared_files / "MANIFEST.csv").open(encoding="utf-8", newline="") as file:
        facts = [row for row in csv.DictReader(file) if row["path"].endswith((".csv", ".tsv"))]
    messy = ("ragged", "NUL", "not-UTF-8", "UTF-16", "blank-lines")
    unusual = ("/afl/", "/fuzzing/", *NOT_SO_WELL_FORMED)
    tried = 0
    for row in facts:
        width, _, count = row["shape"].partition(":")
        well_formed = count.isdigit() and not any(word in row["flags"] for word in messy)
        if not well_formed or width == "1" or any(part in row["path"] for part in unusual):
            continue
        tried += 1
        assert reads[shared_files / row["path"]].rows == {"delimited": int(row["plain_rows"]) - 1}
    assert tried > 200
