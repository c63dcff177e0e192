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
from proofs.written_tables import Reader
from tests.plugins.conftest import Run, load, running

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
    for data in (b"", b"\n\r\n", b"\xef\xbb\xbf", b"sep=;\n", gzip.compress(b"")):
        file.write_bytes(data)
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


@pytest.mark.slow
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


FOUND = {
    "a hole in the middle": (
        "meter.csv",
        b"ts,kwh\n2024-01-01,5.1\n" + b"\0" * 512 + b"\n2024-01-02,5.3\n",
        ["ts", "kwh"],
        [["2024-01-01", "5.1"], ["2024-01-02", "5.3"]],
        ["a NUL character"],
    ),
    "a hole before the header": (
        "hole.csv",
        b"\0" * 2000 + b"h_ts,h_v\n2024,1\n2025,2\n",
        ["h_ts", "h_v"],
        [["2024", "1"], ["2025", "2"]],
        ["NUL characters in the header, left out of the names"],
    ),
    "single NULs": (
        "n.csv",
        b"a,b\n1,\0002\n3,4\n\0\n5,6\0\n",
        ["a", "b"],
        [["3", "4"]],
        ["a NUL character", "a NUL character", "a NUL character"],
    ),
    "UTF-16 without a mark, mostly Chinese": (
        "zh.csv",
        "名称,城市\n王小明,上海\n李雷,北京\n".encode("utf-16-be"),
        ["名称", "城市"],
        [["王小明", "上海"], ["李雷", "北京"]],
        [],
    ),
    "UTF-32 without a mark": (
        "u.csv",
        "a,b\nx,y\n".encode("utf-32-le"),
        ["a", "b"],
        [["x", "y"]],
        [],
    ),
    "backslashes are text": (
        "p.csv",
        b'id,path\n1,C:\\temp\\new\n2,\\N\n3,"\\\\server\\share"\n4,2020/05/11\n',
        ["id", "path"],
        [["1", "C:\\temp\\new"], ["2", "\\N"], ["3", "\\\\server\\share"], ["4", "2020/05/11"]],
        [],
    ),
    "an escape where quotes need one": (
        "e.csv",
        b'id,text,path\n1,"he said \\"x\\", ok",C:\\temp\n2,"a\\\\b",\\\\server\\d\n3,"y",\\N\n',
        ["id", "text", "path"],
        [["1", 'he said "x", ok', "C:\\temp"], ["2", "a\\b", "\\\\server\\d"], ["3", "y", "\\N"]],
        [],
    ),
    "slashes beside doubled quotes": (
        "d.tsv",
        b'name\tseen\nAnn\t2020/05/11\n"""a/b/"" / (see"\t2020/03/11\n',
        ["name", "seen"],
        [["Ann", "2020/05/11"], ['"a/b/" / (see', "2020/03/11"]],
        [],
    ),
    "a delimiter at the end": (
        "t.csv",
        b"sku,price\nA1,7.50,\nA2,8.00,\nA3,9,x\n"[:-7] + b"\n",
        ["sku", "price"],
        [["A1", "7.50"], ["A2", "8.00"]],
        [],
    ),
    "a preamble": (
        "bank.csv",
        b"Kontoauszug;\nKonto: DE00 0000;\n\nDatum;Text;Betrag\n01.03.2024;Miete;-800,00\n"
        b"02.03.2024;Lohn;2500,00\nSumme 1700,00\n" + b"03.03.2024;Strom;-6,00\n" * 4,
        ["Datum", "Text", "Betrag"],
        [
            ["01.03.2024", "Miete", "-800,00"],
            ["02.03.2024", "Lohn", "2500,00"],
            *[["03.03.2024", "Strom", "-6,00"]] * 4,
        ],
        ["1 field where the header has 3"],
    ),
    "a preamble filled up with delimiters": (
        "x.csv",
        b"Report,,\nFrom,2024,\n,,\nid,name,qty\n1,bolt,10\n2,nut,20\n"[:-1],
        ["id", "name", "qty"],
        [["1", "bolt", "10"], ["2", "nut", "20"]],
        [],
    ),
    "comments": (
        "c.csv",
        b'# by tool, "v1"\n# units: mm\nid,len\n1,10\n# late "one"\n2,20\n#3,30\n',
        ["id", "len"],
        [["1", "10"], ["2", "20"], ["#3", "30"]],
        [],
    ),
    "a header that is a comment": (
        "h.csv",
        b"#id,name\n1,a\n2,b\n",
        ["#id", "name"],
        [["1", "a"], ["2", "b"]],
        [],
    ),
    "no header": (
        "n.csv",
        b"1001,2024-01-01,5.00\n1002,2024-01-02,6.00\n",
        ["column_1", "column_2", "column_3"],
        [["1001", "2024-01-01", "5.00"], ["1002", "2024-01-02", "6.00"]],
        [],
    ),
    "no header above names": (
        "n.csv",
        b"1,AB-10,4.5\n2,AB-11,4.7\n3,AC-10,3.1\n",
        ["column_1", "column_2", "column_3"],
        [["1", "AB-10", "4.5"], ["2", "AB-11", "4.7"], ["3", "AC-10", "3.1"]],
        [],
    ),
    "years are names": (
        "y.csv",
        b"land,2019,2020\nDE,5,6\nFR,7,8\n",
        ["land", "2019", "2020"],
        [["DE", "5", "6"], ["FR", "7", "8"]],
        [],
    ),
    "a sep line": ("s.csv", b"sep=;\r\nid;name\r\n1;bolt\r\n", ["id", "name"], [["1", "bolt"]], []),
    "blanks before quotes": (
        "b.csv",
        b'id, name, n\n1, "Lee, Ann" , 5\n2, "Ray, Bo", 6\n',
        ["id", "name", "n"],
        [["1", "Lee, Ann", " 5"], ["2", "Ray, Bo", " 6"]],
        [],
    ),
    "a tab in quotes": ("q.tsv", b'a\t"x\t;"\tb\n', ["a", "x ;", "b"], [], []),
    "blanks after quotes": (
        "b.csv",
        b'"a" ,"b"\n"1" ,"2"\n',
        ["a", "b"],
        [["1", "2"]],
        [],
    ),
    "more lines above than in the table": (
        "kv.csv",
        b"".join(b"Key %d;Value\n" % i for i in range(9)) + b"id;name;n;m\n1;a;2,5;3\n2;b;2;4\n",
        ["id", "name", "n", "m"],
        [["1", "a", "2,5", "3"], ["2", "b", "2", "4"]],
        [],
    ),
    "blanks that nothing needs": (
        "b.csv",
        b'id, name\n1, "Lee"\n',
        ["id", "name"],
        [["1", ' "Lee"']],
        [],
    ),
    "the header again, with a mark": (
        "r.csv",
        b"id,v\n1,a\n\xef\xbb\xbfid,v\n\xef\xbb\xbf2,b\n",
        ["id", "v"],
        [["1", "a"], ["2", "b"]],
        ["the header again"],
    ),
    "an open quote": (
        "o.csv",
        b'id,note,q\n1,ok,5\n2,"never,6\n3,fine,3\n4,"fine, too",4\n5,fine,5\n',
        ["id", "note", "q"],
        [["1", "ok", "5"], ["3", "fine", "3"], ["4", "fine, too", "4"], ["5", "fine", "5"]],
        ["a quote that does not close"],
    ),
    "semicolons in cells": (
        "g.csv",
        b"ref,tags\n" + b"a;b,a;b;c\n" * 30,
        ["ref", "tags"],
        [["a;b", "a;b;c"]] * 30,
        [],
    ),
    "commas for decimals": (
        "z.csv",
        b"Zeit;Wert\n1.1.2024;1,5\n2.1.2024;1,7\n",
        ["Zeit", "Wert"],
        [["1.1.2024", "1,5"], ["2.1.2024", "1,7"]],
        [],
    ),
    "bars that are doubled": (
        "l.txt",
        b"id||name\n1||a|b\n2||\n",
        ["id", "name"],
        [["1", "a|b"], ["2", ""]],
        [],
    ),
    "one column": ("one.csv", b"name\nAnn Lee\nBob\n", ["name"], [["Ann Lee"], ["Bob"]], []),
    "UTF-16 without a mark, of Georgian": (
        "ka.csv",
        "სახელი,ქალაქი\nანა,თბილისი\nბექა,გორი\n".encode("utf-16-le"),
        ["სახელი", "ქალაქი"],
        [["ანა", "თბილისი"], ["ბექა", "გორი"]],
        [],
    ),
    "Spanish in cp1252": (
        "es.csv",
        "n,x\nEspañol,a\nniño,b\n".encode("cp1252"),
        ["n", "x"],
        [["Español", "a"], ["niño", "b"]],
        [],
    ),
    "French and quotes in cp1252": (
        "fr.csv",
        "n,x\n“q” €5,a\nnaïve,b\nGenève,c\n".encode("cp1252"),
        ["n", "x"],
        [["“q” €5", "a"], ["naïve", "b"], ["Genève", "c"]],
        [],
    ),
    "degrees in cp1252": (
        "t.csv",
        "t,x\n20 °C,a\n30 °C,b\n".encode("cp1252"),
        ["t", "x"],
        [["20 °C", "a"], ["30 °C", "b"]],
        [],
    ),
    "what may be Chinese, hardly": (
        "m.csv",
        b"n,x\nM\x9fller,1\nGr\x9a\xa7e,2\n",
        ["n", "x"],
        [["M\u0178ller", "1"], ["Gr\u0161\u00a7e", "2"]],
        [],
    ),
    "Japanese, a little": (
        "ja.csv",
        "名前,年齢\n山田,30\n佐藤,28\n鈴木,32\n田中,29\n高橋,22\n".encode("cp932"),
        ["名前", "年齢"],
        [["山田", "30"], ["佐藤", "28"], ["鈴木", "32"], ["田中", "29"], ["高橋", "22"]],
        [],
    ),
    "Polish in cp1250": (
        "pl.csv",
        "n,x\nŁódź,a\nWrocław,b\n".encode("cp1250"),
        ["n", "x"],
        [["Łódź", "a"], ["Wrocław", "b"]],
        [],
    ),
    "a header in other letters": (
        "h.csv",
        b"id,name\n1,a\nID,Name\n2,b\n id , name \n",
        ["id", "name"],
        [["1", "a"], ["2", "b"]],
        ["the header again", "the header again"],
    ),
    "files joined, each with its mark": (
        "joined.csv",
        b"\xef\xbb\xbfid,name\n1,a\n" * 3,
        ["id", "name"],
        [["1", "a"]] * 3,
        ["the header again", "the header again"],
    ),
    "an unusual delimiter": (
        "u.txt",
        "id§name§n\n1§a,b§2\n2§c§3\n".encode(),
        ["id", "name", "n"],
        [["1", "a,b", "2"], ["2", "c", "3"]],
        [],
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_finds(case: str, delimited: Run, tmp_path: Path) -> None:
    name, data, columns, rows, reasons = FOUND[case]
    file = tmp_path / name
    file.write_bytes(data)
    out = delimited(file)
    assert out["delimited"].column_names == columns
    assert [list(row.values()) for row in out["delimited"].to_pylist()] == rows
    assert [reason for _, _, reason, _ in (rejects(out) if "delimited_rejects" in out else [])] == (
        reasons
    )


@pytest.mark.parametrize("delimiter", [*",;\t|^~:\x01\x1f ", "||", "::", "~~", "|~|"])
@pytest.mark.parametrize("name", ["t.csv", "t.txt", "t.tsv", "t.psv"])
def test_every_usual_delimiter(delimiter: str, name: str, delimited: Run, tmp_path: Path) -> None:
    table = [["id", "name", "qty"], ["1", "bolt", "10"], ["2", "nut", "20"], ["3", "cog", "30"]]
    file = tmp_path / name
    file.write_text("".join(f"{delimiter.join(row)}\n" for row in table))
    out = delimited(file)
    assert out.keys() == {"delimited"}
    assert out["delimited"].column_names == table[0]
    assert [list(row.values()) for row in out["delimited"].to_pylist()] == table[1:]


@pytest.mark.slow
def test_the_whole_file_says_which_delimiter(delimited: Run, tmp_path: Path) -> None:
    """Commas fit for 300 KB, and then no more."""
    file = tmp_path / "long.csv"
    file.write_text("a,b;c\n" + "1,2;3\n" * 60_000 + "1;3\n" * 90_000)
    table = delimited(file)["delimited"]
    assert table.column_names == ["a,b", "c"]
    assert table.num_rows == 150_000


REFUSED = {
    "a workbook": ("a.csv", b"PK\x03\x04\x14\0\x06\0[Content_Types].xml", "ZIP file .an Excel"),
    "a web page": ("a.csv", b"<!DOCTYPE html>\n<html><body>", "an HTML page, not delimited text"),
    "JSON": ("a.csv", b'{"a": 1, "b": 2}\n{"a": 2, "b": 3}\n', "JSON, not delimited text"),
    "lines that end in a tilde": ("a.txt", b"A*1~\nB*2~\nC*3~\n", "--option"),
    "two that may be the header": (
        "a.csv",
        b"# by tool, v1\nname,city\nAnn,Rome\n",
        "or the comment above it",
    ),
    "NULs": ("a.csv", b"\0" * 4096, "only NUL bytes"),
    "prose": (
        "a.txt",
        b"This is prose.\nIt has, well, commas.\nOr not.\n",
        "--option delimiter=none",
    ),
    "one column in .txt": ("a.txt", b"alpha\nbeta\ngamma\n", "one column of text is not a table"),
    "two parts by blanks": ("a.csv", b"first last\nAnn Lee\nBob Ray\n", "--option delimiter=space"),
    "one record of data": ("a.csv", b"1001,2024-01-01\n", "--option header_line=none"),
    "a shorter header": (
        "a.csv",
        b"a,b\n1,x,y\n2,x,y\n3,x,y\n",
        "which one is the header.*--option",
    ),
    "a title above text": ("a.csv", b"Title\nAnn,Rome\nBob,Oslo\n", "--option header_line=2"),
    "as many records of one text": ("a.csv", b"a,b\n" * 9, "appears 8 more times"),
    "a title as wide as the table": (
        "a.csv",
        b"Report,Q1,2024\nid,name,qty\n1,a,2\n2,b,3\n",
        "is line 1 the header, or line 2",
    ),
    "a title with commas, and lines of other widths": (
        "a.csv",
        b"A, b, 2024, c\nBy, Ann\n\nid,name,qty,price\n1,a,2,3.5\n2,b,3,4.5\n",
        "or line 4",
    ),
    "names and values above": (
        "a.csv",
        b"Account:,123\nOwner:,Ann\nid,name\n1,a\n2,b\n",
        "or line 3",
    ),
    "two tables": (
        "a.csv",
        b"id,name,n\n1,a,2\n2,b,3\n\nsku,q,r,s\nA,1,2,3\nB,3,4,3\nC,3,4,4\nD,3,4,4\n",
        "look like another table",
    ),
    "numbers above text": ("a.csv", b"1,2,3\na,b,c\nd,e,f\n", "and those below are not"),
    "a letter": (
        "a.txt",
        b"Dear Ann,\n\nThank you for it, which I got, today.\nYours,\nBob\n",
        "no delimiter",
    ),
    "other quotes": ("a.csv", b"id,t\n1,'a, b'\n2,'c, d'\n", "--option 'quote="),
    "an escape everywhere": ("a.csv", b"a,b\n1,x\\,y\n2,z\\,w\n", "--option escape=backslash"),
    "two parts by an unusual sign": ("a.csv", b"a@b\nc@d\ne@f\n", "one column or two"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_clear_is_refused(case: str, delimited: Run, tmp_path: Path) -> None:
    name, data, words = REFUSED[case]
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(ValueError, match=words) as refused:
        delimited(file)
    assert str(refused.value).startswith(f"{name}: ")


SETTLED: dict[str, tuple[bytes, dict[str, str], list[str], list[list[str]]]] = {
    "header_line": (b"a,b\n1,x,y\n2,z\n", {"header_line": "1"}, ["a", "b"], [["2", "z"]]),
    "no header": (
        b"1001,2024-01-01\n",
        {"header_line": "none"},
        ["column_1", "column_2"],
        [["1001", "2024-01-01"]],
    ),
    "skip_lines": (
        b"x,y,z\n1,2\n3,4\n",
        {"skip_lines": "1", "header_line": "none"},
        ["column_1", "column_2"],
        [["1", "2"], ["3", "4"]],
    ),
    "delimiter": (
        b"a b,c d\nx y,z w\n",
        {"delimiter": "space"},
        ["a", "b,c", "d"],
        [["x", "y,z", "w"]],
    ),
    "one column": (b"a,b\n1,2\n", {"delimiter": "none"}, ["a,b"], [["1,2"]]),
    "a long delimiter": (
        b"a<>b\n1<>'<'\n",
        {"delimiter": "<>", "quote": "'"},
        ["a", "b"],
        [["1", "<"]],
    ),
    "quote": (b"a,b\n'x,y','it''s'\n", {"quote": "'"}, ["a", "b"], [["x,y", "it's"]]),
    "no quotes": (b'a,b\n"x,y"\n', {"quote": "none"}, ["a", "b"], [['"x', 'y"']]),
    "escape": (b"a,b\nx\\,y,\\N\\\\\n", {"escape": "backslash"}, ["a", "b"], [["x,y", "\\N\\"]]),
    "escape in quotes": (
        b'a,b\n"\\"x\\\\",y\\\\\n',
        {"escape": "in_quotes"},
        ["a", "b"],
        [['"x\\', "y\\\\"]],
    ),
    "blanks": (b'a, "b"\n1, "x"\n', {"blanks": "skip"}, ["a", "b"], [["1", "x"]]),
    "comment": (b"a,b\n1,2\n// c,d\n", {"comment": "//"}, ["a", "b"], [["1", "2"]]),
    "encoding": ("a,b\nж,я\n".encode("cp1251"), {"encoding": "cp1251"}, ["a", "b"], [["ж", "я"]]),
}


@pytest.mark.parametrize("case", SETTLED)
def test_an_option_settles(case: str, tmp_path: Path) -> None:
    data, options, columns, rows = SETTLED[case]
    out = Reader(tmp_path).read(data, "t.csv", options)
    assert out["delimited"].column_names == columns
    assert [list(row.values()) for row in out["delimited"].to_pylist()] == rows


def test_an_unknown_option_value_is_named(tmp_path: Path) -> None:
    for name, value in {
        "encoding": "utf-9",
        "header_line": "x",
        "skip_lines": "-1",
        "quote": "ab",
    }.items():
        with pytest.raises(ValueError, match=f"option {name} is '{value}'"):
            Reader(tmp_path).read(b"a,b\n1,2\n", "t.csv", {name: value})


def test_other_topics_get_the_rows(tmp_path: Path) -> None:
    module = load("delimited")
    module.MANIFEST.topic[:] = ["bank", "bank_rejects"]
    file = tmp_path / "bank.csv"
    file.write_bytes(b"a,b\n1,2\n3\n")
    out = running(module)(file)
    assert {topic: table.num_rows for topic, table in out.items()} == {"bank": 1, "bank_rejects": 1}


def test_the_log_says_what_was_guessed(
    delimited: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes("Straße;Ort\nGärtnerweg;Köln\n".encode("cp1252"))
    with caplog.at_level("INFO", logger="delimited"):
        delimited(file)
        guesses = [text for text in caplog.messages if text.startswith("guessed: ")]
        assert [text.split()[1] for text in guesses] == ["encoding", "delimiter"]
        caplog.clear()
        file.write_bytes(b"Report of Ann\nid,name\n1,a\n2,b\n")
        delimited(file)
        assert "skipped line 1, above the table: Report of Ann" in caplog.messages
        caplog.clear()
        file.write_bytes(b"t,v\ns,degC\n1,2.5\n2,2.5\n")
        delimited(file)
        assert any("though line 2 has text" in text for text in caplog.messages)
        caplog.clear()
        file.write_bytes(b"id,name\n1,a\n")
        delimited(file)
        assert not [text for text in caplog.messages if text.startswith("guessed: ")]


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


@pytest.mark.slow
def test_real_files_end_in_rows_or_in_a_reason(reads: dict[Path, Read], shared_files: Path) -> None:
    """A refusal names what to type, or what the file is instead."""
    failed = {file: read.reason for file, read in reads.items() if read.reason}
    print(*(f"{file.relative_to(shared_files)}: {why}" for file, why in failed.items()), sep="\n")
    assert not [file for file, read in reads.items() if read.seconds > 20]
    words = ("--option", "not delimited text", "only NUL", "gzip file is damaged")
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


@pytest.mark.slow
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


@pytest.mark.parametrize("delimiter", [*",;|^~", "\x01"])
def test_an_empty_column_makes_no_delimiter_of_two(
    delimiter: str, delimited: Run, tmp_path: Path
) -> None:
    rows = [["id", "note", "", "city"], ["1", "x", "", "Ulm"], ["2", "y", "", "Bonn"]]
    file = tmp_path / "a.txt"
    file.write_text("".join(f"{delimiter.join(row)}\n" for row in rows))
    out = delimited(file)["delimited"]
    assert out.column_names == ["id", "note", "column_3", "city"]
    assert [list(row.values()) for row in out.to_pylist()] == rows[1:]


def test_a_delimiter_of_two_may_have_its_half_in_cells(delimited: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text('"id"||"note"\n"1"||"x|"\n"2"||"|y"\n')
    out = delimited(file)["delimited"]
    assert out.to_pylist() == [{"id": "1", "note": "x|"}, {"id": "2", "note": "|y"}]


def test_a_delimiter_of_two_is_found_though_cells_have_lines(
    delimited: Run, tmp_path: Path
) -> None:
    rows = [["a", "b"], ["1\n2\n3\x85", "x\u2028"], ["4\n5\n6", "y"]]
    file = tmp_path / "a.txt"
    file.write_text("".join(f'"{one}"~~"{two}"\n' for one, two in rows))
    assert [list(row.values()) for row in delimited(file)["delimited"].to_pylist()] == rows[1:]
