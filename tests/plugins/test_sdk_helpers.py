"""The helpers of `casparian_flow.sdk` that readers of files share."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from pathlib import Path

import pytest

from casparian_flow.sdk import (
    batches,
    column_names,
    foreign_kind,
    open_bytes,
    own_publish,
    printable,
)


def test_column_names() -> None:
    cells = [" a \n b", "", None, "A B", "_CF_x", "sheet", "a\0", "\udcff", "y" * 200]
    assert column_names(cells, taken=["Sheet"]) == [
        "a b", "column_2", "column_3", "A B_2", "x_CF_x", "sheet_2", "a\\x00", "\\udcff", "y" * 100
    ]  # fmt: skip


def test_printable_leaves_what_can_be_stored() -> None:
    assert printable("é\n\U0001f600") == "é\n\U0001f600"


def test_gzip_is_unpacked_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    for data, read in ((gzip.compress(b"a"), b"a"), (b"\x1f", b"\x1f"), (b"", b"")):
        file.write_bytes(data)
        with open_bytes(str(file)) as opened:
            assert opened.read() == read


@pytest.mark.parametrize("cut", [3, 12, -4, -9])
def test_damaged_gzip_is_named(cut: int, tmp_path: Path) -> None:
    file = tmp_path / "a.gz"
    file.write_bytes(gzip.compress(b"text" * 100)[:cut])
    with (
        pytest.raises(ValueError, match="the gzip file is damaged"),
        open_bytes(str(file)) as opened,
    ):
        opened.read()


def test_batches_are_bounded_by_rows_and_by_size() -> None:
    assert list(batches([1, 2, 3, 9, 1], lambda item: item, rows=3, total=8)) == [
        [1, 2, 3],
        [9],
        [1],
    ]


def packed(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, "text")
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a,b.csv"))
    return file.getvalue()


@pytest.mark.parametrize(
    ("start", "word"),
    [
        (packed("xl/workbook.xml"), "Excel"),
        (packed("word/document.xml"), "Word"),
        (gzip.compress(b"a,b", mtime=0), "gzip"),
        (bz2.compress(b"a,b"), "bzip2"),
        (lzma.compress(b"a,b"), "xz"),
        (tar(), "tar"),
        (b"%PDF-1.7\n", "PDF"),
        (b"SQLite format 3\0", "SQLite"),
        (b"\0\x05\x16\x07\0\x02\0\0Mac OS X", "AppleDouble"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html>", "HTML"),
        (b"<!-- saved -->\n<TABLE border=1><tr>", "HTML"),
        ("<html><body>".encode("utf-16"), "HTML"),
        (b"MSH|^~\\&|ADT1|\r", "HL7"),
        (b"ISA*00*          *01*SECRET    *ZZ*SUB", "X12"),
        (b"BEGIN:VCALENDAR\r\n", "iCalendar"),
        (b"<?xml version='1.0'?><a/>", "XML"),
        (b"<rows><row a='1'/></rows>", "XML"),
    ],
)
def test_foreign_content_is_named_by_its_first_bytes(start: bytes, word: str) -> None:
    assert word in foreign_kind(start)


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"a,b\n1,2\n",
        b"<TICKER>,<PER>,<DATE>\n",
        b"<TITLE>;<A>\n",
        b"PK,name\n",
        b"<b",
        b"\0" * 9,
        b"ORC,PAR1\n",
        b"GIF8;BZh\n",
        b"<id>,<t>\n1,<b>x</b>\n",
    ],
)
def test_text_and_what_nobody_knows_has_no_name(start: bytes) -> None:
    assert foreign_kind(start) == ""


@pytest.mark.parametrize(
    ("name", "own", "pattern"),
    [
        ("bank_2024.csv", "bank_2024", "'bank_*.csv'"),
        ("Umsätze (2).csv", "ums_tze_2", "'Umsätze ?*?*.csv'"),
        ("20240131.csv.gz", "20240131", "20240131.csv.gz"),
        ("delimited.txt", "delimited_files", "'delimited*.txt'"),
        ("[1].csv", "1", "'?1?.csv'"),
    ],
)
def test_the_command_that_settles_gives_such_files_their_own_topics(
    name: str, own: str, pattern: str
) -> None:
    assert own_publish("delimited", name) == (
        f"casparian publish delimited --name {own} --pattern {pattern} "
        f"--topic {own} --topic {own}_rejects"
    )


def test_the_command_names_each_option_that_settles() -> None:
    command = own_publish("delimited", "t.csv", "delimiter=;", "delimiter=none")
    assert command.endswith(
        "--topic t_rejects --option 'delimiter=;', or with --option delimiter=none"
    )


def test_many_equal_cells_are_named_in_time() -> None:
    assert column_names(["a"] * 50_000)[-1] == "a_50000"
    assert column_names(["a", "a_2", "a", "A", "a"]) == ["a", "a_2", "a_3", "A_4", "a_5"]
