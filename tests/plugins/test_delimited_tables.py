"""`plugins/delimited.py` with a contract: rows are typed, and all that is read is accounted for."""

from __future__ import annotations

import datetime
import logging
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from casparian_flow.contract import Held
from casparian_flow.typed import Typed
from tests.plugins.conftest import table_of

BANK = (
    "Kontoauszug;;;\r\nvom;01.02.2026;;\r\n\r\n"
    "Auftrag;Datum;Betrag;Aktiv\r\n"
    "1;01.02.2026;1.234,50;ja\r\n"
    "2;30.02.2026;1,00;ja\r\n"
    "Auftrag;Datum;Betrag;Aktiv\r\n"
    '3;02.02.2026;"0,50";nein\r\n'
    "4;02.02.2026;1234.50;nein\r\n"
    "5;02.02.2026;7,00\r\n"
    "\r\n"
    "6;03.02.2026;k.A.;vielleicht\r\n"
    "Summe;7;1.243,00;\r\n"
    "erstellt am 03.02.2026\r\n"
)
COLUMNS: dict[str, Any] = {
    "Auftrag": {"type": "integer", "required": True},
    "Datum": {"type": "date", "format": "%d.%m.%Y"},
    "Betrag": {"type": "decimal(18,2)", "decimalChar": ",", "groupChar": ".",
               "missingValues": ["", "k.A."]},
    "Aktiv": {"type": "boolean", "trueValues": ["ja"], "falseValues": ["nein"]},
}  # fmt: skip
DIALECT = {"header": "^Auftrag;Datum", "footer": "^Summe;"}


def contract(columns: dict[str, Any] = COLUMNS, **words: Any) -> dict[str, Any]:
    return {"table": "sales", "files": ["*.csv"], "columns": columns, **words}


def balance(log: pytest.LogCaptureFixture) -> str:
    (line,) = [text for text in log.messages if text.startswith("read ") and " = " in text]
    return line


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8-sig", "utf-16"])
def test_a_bank_statement(encoding: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = table_of("delimited", contract(dialect=DIALECT, lines=True)).run(
        tmp_path, BANK.encode(encoding)
    )
    assert out["sales"].to_pylist() == [
        {"Auftrag": 1, "Datum": datetime.date(2026, 2, 1), "Betrag": Decimal("1234.50"),
         "Aktiv": True, "_cf_line": 5},
        {"Auftrag": 3, "Datum": datetime.date(2026, 2, 2), "Betrag": Decimal("0.50"),
         "Aktiv": False, "_cf_line": 8},
    ]  # fmt: skip
    rejects = out["sales_rejects"].to_pylist()
    assert [(r["line"], r["record"], r["column"], r["rule"], r["value"]) for r in rejects] == [
        (6, 3, "Datum", "date", "30.02.2026"),
        (9, 6, "Betrag", "decimal(18,2)", "1234.50"),
        (10, 7, None, "structure", None),
        (12, 8, "Aktiv", "boolean", "vielleicht"),
    ]
    assert rejects[2]["reason"] == "3 fields where the header has 4"
    assert rejects[2]["raw"] == "5;02.02.2026;7,00\r\n"
    assert balance(caplog) == (
        "read 11 = 2 published + 4 rejected + 5 skipped (preamble 2, header 1, footer 2)"
    )


def test_control_totals(tmp_path: Path) -> None:
    control = r"^Summe;(?P<rows>\d+);(?P<sum_Betrag>[\d.,]+)"
    text = "Auftrag;Betrag\n1;1.000,00\n2;0,50\nSumme;2;1.000,50\n"
    columns = {name: COLUMNS[name] for name in ("Auftrag", "Betrag")}
    dialect = {**DIALECT, "header": "^Auftrag", "control": control}
    run = table_of("delimited", contract(columns, dialect=dialect)).run
    assert run(tmp_path, text.encode())["sales"].num_rows == 2
    for wrong, names in (
        (text.replace("1.000,50", "1.000,51"), "sum_Betrag.*1.000,51.*1,000.50"),
        (text.replace("Summe;2", "Summe;3"), "rows.*'3'.*2"),
        (text.replace("Summe;", "Sum;"), "control"),
        ("", "control|empty"),
    ):
        with pytest.raises(ValueError, match=names):
            run(tmp_path, wrong.encode())


def test_a_header_above_the_table_may_have_totals_too(tmp_path: Path) -> None:
    dialect = {"header": "^Auftrag", "control": r"^HDR;(?P<rows>\d+)"}
    run = table_of("delimited", contract({"Auftrag": "integer", "x": "text"}, dialect=dialect)).run
    assert run(tmp_path, b"HDR;1\nAuftrag;x\n1;y\n")["sales"].num_rows == 1
    with pytest.raises(ValueError, match="rows"):
        run(tmp_path, b"HDR;2\nAuftrag;x\n1;y\n")


SHAPES = {
    "sep= line": ("sep=;\nid;v\n1;a\n2;b\n", {}, "preamble 1", [(3, 1), (4, 2)]),
    "trailing delimiters": ("id;v\n1;a;\n2;b;\n", {}, "", [(2, 1), (3, 2)]),
    "comments above": ("# made by x\n# mm\nid;v\n1;a\n2;b\n", {}, "preamble 2", [(4, 1), (5, 2)]),
    "comments within": (
        "id;v\n1;a\n#2;c\n2;b\n", {"comment": "#"}, "comment 1", [(2, 1), (4, 2)],
    ),
    "header as a comment": ("#id;v\n1;1\n2;2\n", {}, "", [(2, 1), (3, 2)]),
    "totals of the same width": (
        "id;v\n1;a\n2;b\nTotal;;\n3 rows;\n", {"footer": "^(Total|[0-9]+ rows)"}, "footer 2",
        [(2, 1), (3, 2)],
    ),
    "a header that looks like data": ("2024;v\n1;a\n2;b\n", {}, "", [(2, 1), (3, 2)]),
    "only the header": ("id;v\n", {}, "", []),
    "the header far below": (
        "x\n" * 70_000 + "id;v\n1;a\n2;b\n", {"header": "^id;"}, "preamble 70,000",
        [(70_002, 1), (70_003, 2)],
    ),
    "cells of two lines": ('id;v\n1;"a\nb"\n2;b\n', {}, "", [(2, 1), (4, 2)]),
    "lone CR": ("id;v\r1;a\r2;b\r", {}, "", [(2, 1), (3, 2)]),
    "no header": ("1;a\n2;b\n", {"header_line": "none"}, "", [(1, 1), (2, 2)]),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
def test_shapes(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text, dialect, skipped, rows = SHAPES[case]
    names = (
        ("column_1", "column_2") if "header_line" in dialect
        else ("2024", "v") if text.startswith("2024")
        else (text[:3].strip(";") if text.startswith("#id") else "id", "v")
    )  # fmt: skip
    columns = {names[0]: "integer", names[1]: "text"}
    out = table_of("delimited", contract(columns, dialect=dialect, lines=True)).run(
        tmp_path, text.encode()
    )
    found = [(row["_cf_line"], row[names[0]]) for row in out["sales"].to_pylist()]
    assert found == rows
    assert len(out["sales_rejects"]) == 0
    assert re.findall(r"\((.*)\)", balance(caplog)) == ([skipped] if skipped else [])


def test_columns_of_the_path_and_of_another_order(tmp_path: Path) -> None:
    columns = {"id": "integer", "region": {"type": "text", "from": "path"}, "v": "text"}
    table = table_of("delimited", {**contract(columns), "files": ["{region}/sales*.csv"]})
    out = table.run(tmp_path, b"v,id\nx,1\n", "north/sales.csv")
    assert out["sales"].to_pylist() == [{"id": 1, "region": "north", "v": "x"}]


def test_another_column_holds_the_version(tmp_path: Path) -> None:
    table = table_of("delimited", contract({"id": "integer", "v": "text"}))
    with pytest.raises(Held, match="column rabatt is new"):
        table.run(tmp_path, b"id,v,rabatt\n1,x,2\n")
    with pytest.raises(Held, match="column v is missing"):
        table.run(tmp_path, b"id,w\n1,x\n")


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    columns = {"id": "integer", "v": "text"}
    run = table_of("delimited", contract(columns, dialect={"header": "^Auftrag"})).run
    with pytest.raises(ValueError, match="none of its 3 lines matches the header"):
        run(tmp_path, b"id,v\n1,x\n2,y\n")
    run = table_of("delimited", contract(columns, dialect={"footer": "^Summ"})).run
    rows = "".join(f"x{place},x\n" for place in range(2000))
    with pytest.raises(ValueError, match="that is no footer"):
        run(tmp_path, f"id,v\nSummer,x\n{rows}".encode())
    with pytest.raises(ValueError, match=r"below the footer.* in line 4"):
        run(tmp_path, b"id,v\n1,x\nSumm,x\n2,y\n")
    out = run(tmp_path, b"id,v\n1,x\nSumm,x\n2\nthree rows,\nSumm,2\n")
    assert out["sales"].num_rows == 1
    run = table_of("delimited", contract(columns, max_rejects="1%")).run
    with pytest.raises(ValueError, match="max_rejects"):
        run(tmp_path, b"id,v\n1,x\ntwo,y\n")


THREE = {"a": "integer", "b": "text", "c": "decimal(9,2)"}
UNDER = "a;b;c\n" + "".join(f"{place};x;{place}.5\n" for place in range(30))


@pytest.mark.parametrize("dialect", [{}, {"header": "^a;b;c"}], ids=str)
@pytest.mark.parametrize(
    "above",
    [
        "a;b\n1;x\n2;y\n3;z\n",
        "x;y\n1;x\n2;y\n",
        "old;b;c\n7;x;1.00\n",
        "7;x;1.00;9\n8;y;2.00;9\n",
        'made by;5" x\nold;b;c\n7;x;1.00\n',
    ],
    ids=repr,
)
def test_rows_above_the_header_hold_the_version(
    above: str, dialect: dict[str, str], tmp_path: Path
) -> None:
    run = table_of("delimited", contract(THREE, dialect=dialect)).run
    with pytest.raises(Held, match=r"above the header in line .* are rows of another table"):
        run(tmp_path, f"{above}{UNDER}".encode())
    chosen = {"delimiter": ";", "header_line": str(above.count("\n") + 1)}
    run = table_of("delimited", contract(THREE, dialect=chosen)).run
    assert run(tmp_path, f"{above}{UNDER}".encode())["sales"].num_rows == 30


@pytest.mark.parametrize(
    "above",
    [
        "Report of 2026\nby: Ann\n\n", "Account;12345\nBank;100200\nFrom;01.02.2026\n",
        "From: 01.02.2026;;\n;;\nTo: 28.02.2026;;\n", "number;name;price\n-;-;EUR\n",
        "Region;2025;2026\n", "No;12;\n", "2;\n3;\n", "# 1;x;2.00\n",
    ],
    ids=repr,
)  # fmt: skip
def test_lines_above_the_header_are_skipped(above: str, tmp_path: Path) -> None:
    run = table_of("delimited", contract(THREE, dialect={"header": "^a;b;c"})).run
    assert run(tmp_path, f"{above}{UNDER}".encode())["sales"].num_rows == 30


ALL_TEXT = {"id": "text", "b": "text", "c": "text"}


@pytest.mark.parametrize(
    ("columns", "lines", "is_row"),
    [
        (THREE, "Sum;;3.00\nx;y;4.00\n", True),  # one of its cells is at fault
        (THREE, "Sum;;3.00\n5;y;n/a\n", True),
        (THREE, "Sum;;3.00\nprinted;;01.02.2026\n", False),
        (THREE, "Sum;;3.00\nSum total;;4.00\nTotal;1;4.00\n", False),
        ({"a": "text", "c": "integer"}, "Summer;3\n", True),
        ({"a": "text", "c": "integer"}, "Sum;3\n", False),
        ({"a": "text", "c": "integer"}, "Sum 2026:;3\n", False),
        (ALL_TEXT, "Sum;;3\nx;y;z\n", True),
        (ALL_TEXT, "Sum;3;4\nx;y;\nend\n", False),
    ],
)
def test_a_row_at_or_below_the_footer_is_said(
    columns: dict[str, str], lines: str, is_row: bool, tmp_path: Path
) -> None:
    run = table_of("delimited", contract(columns, dialect={"footer": "^Sum"})).run
    row = {"text": "x", "integer": "1", "decimal(9,2)": "1.00"}
    data = ";".join(columns) + "\n" + ";".join(map(row.__getitem__, columns.values())) + "\n"
    data += lines
    if is_row:
        with pytest.raises(ValueError, match=r"(at|below) the footer '.Sum', in line"):
            run(tmp_path, data.encode())
    else:
        assert run(tmp_path, data.encode())["sales"].num_rows == 1


def test_an_empty_file_publishes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = table_of("delimited", contract({"id": "integer"})).run
    assert run(tmp_path, b"") == run(tmp_path, b"\n\n") == {}
    assert caplog.messages.count("read 0 = 0 published + 0 rejected + 0 skipped") == 2


def test_one_bad_cell_among_many(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All of it in blocks that Arrow splits, so lines and raw text come from there."""
    bad = {40_000: "x", 123_456: "1.5", 199_999: "007"}
    rows = (f'{bad.get(place, place)},"v {place}",é\n' for place in range(200_000))
    table = table_of("delimited", contract({"id": "integer", "v": "text", "w": "text"}, lines=True))
    out = table.run(tmp_path, ("id,v,w\n" + "".join(rows)).encode())
    rejects = out["sales_rejects"].to_pylist()
    assert [(r["line"], r["record"], r["value"], r["raw"]) for r in rejects] == [
        (place + 2, place + 2, value, f'{value},"v {place}",é\n') for place, value in bad.items()
    ]
    lines = out["sales"].column("_cf_line").to_pylist()
    ids = out["sales"].column("id").to_pylist()
    assert [line - 2 for line in lines] == ids == [n for n in range(200_000) if n not in bad]
    assert balance(caplog) == "read 200,000 = 199,997 published + 3 rejected + 0 skipped"


PAIR = {"id": "integer", "v": "text"}
ROWS = b"".join(b"%d,x\n" % place for place in range(1000))
HARM = {
    "NULs": (b"\0" * 200_000 + b"\n", "a NUL character"),
    "bytes of another encoding": (
        b"7,\xe4\xff\n", "bytes that are not in the encoding of the file",
    ),
    "a quote that does not close": (b'7,"x\n', "a quote that does not close"),
    "text after a quote": (b'7,"x"y\n', "text after a closing quote"),
    "a cell of 17 million characters": (
        b"7," + b"y" * (17 << 20) + b"\n", f"more than {16 << 20} characters",
    ),
    "ten thousand fields": (b"7" + b",y" * 9_999 + b"\n", "10000 fields where the header has 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", HARM)
def test_harm_stays_with_its_record(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, reason = HARM[case]
    table = table_of("delimited", contract(PAIR, dialect={"encoding": "utf-8"}, lines=True))
    out = table.run(tmp_path, b"id,v\n" + ROWS + data + ROWS)
    assert out["sales"].column("id").to_pylist() == [*range(1000), *range(1000)]
    rejects = out["sales_rejects"].to_pylist()
    assert rejects[0]["line"] == rejects[0]["record"] == 1002
    assert rejects[0]["reason"].startswith(reason)
    published, rejected = 2000, len(rejects)
    total = published + rejected
    assert balance(caplog) == (
        f"read {total:,} = {published:,} published + {rejected:,} rejected + 0 skipped"
    )


def test_ten_thousand_columns_hold_the_version(tmp_path: Path) -> None:
    header = b",".join(b"c%d" % place for place in range(10_000))
    data = header + b"\n" + (b"123" + b",123" * 9_999 + b"\n") * 20
    with pytest.raises(Held, match="c9 and 9990 more are new; columns id, v are missing"):
        table_of("delimited", contract(PAIR)).run(tmp_path, data)


# Not ru_maxrss: a process that is made by vfork inherits that of its parent.
MEASURED = r"""
import re, sys
from pathlib import Path
from tests.plugins.conftest import table_of
folder, rows = Path(sys.argv[1]), [0]
columns = {"id": "integer", "v": "text"}
table = table_of("delimited", {"table": "t", "files": ["*"], "columns": columns})
table.run_file(folder / "given.csv", "given.csv", lambda _, data: rows.append(data.num_rows))
peak = re.search("VmHWM: *([0-9]+)", Path("/proc/self/status").read_text().replace("\t", " "))
print(sum(rows), int(peak[1]) >> 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize("cell", [b"y", "\U0001f600".encode()], ids=["ascii", "emoji"])
def test_a_cell_of_100_megabytes_needs_no_such_memory(cell: bytes, tmp_path: Path) -> None:
    file = tmp_path / "given.csv"
    with file.open("wb") as out:
        out.write(b"id,v\n" + ROWS + b'5,"')
        for _ in range(100):
            out.write(cell * ((1 << 20) // len(cell)))
        out.write(b'"\n' + ROWS)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, tmp_path], capture_output=True, text=True, check=True
    )
    rows, megabytes = map(int, done.stdout.split())
    assert rows == 2001
    assert megabytes < 500


def test_a_row_that_is_lost_on_the_way_fails_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader counts before it judges, so the balance does not hold."""
    of = Typed.columns

    def lossy(self: Typed, arrays: Any, lines: Any, records: Any, raw_of: Any) -> Any:
        table, rejects = of(self, arrays, lines, records, raw_of)
        self.published -= len(table) - len(table[1:])
        return table[1:], rejects

    monkeypatch.setattr(Typed, "columns", lossy)
    table = table_of("delimited", contract(PAIR))
    with pytest.raises(AssertionError, match="balance"):
        table.run(tmp_path, b"id,v\n1,x\n2,y\n")


POLISH = "id,v\n1,Łódź\n2,Gdańsk\n"


def test_a_file_whose_bytes_may_be_of_two_encodings_is_held_until_one_is_said(
    tmp_path: Path,
) -> None:
    data = POLISH.encode("cp1250")
    with pytest.raises(Held, match="may be cp1252 or Windows-125"):
        table_of("delimited", contract(PAIR)).run(tmp_path, data)
    said = table_of("delimited", contract(PAIR, dialect={"encoding": "cp1250"}))
    assert [row["v"] for row in said.run(tmp_path, data)["sales"].to_pylist()] == ["Łódź", "Gdańsk"]
    with pytest.raises(Held, match="its bytes are UTF-8, and cp1250 is said"):
        said.run(tmp_path, POLISH.encode())
    assert len(said.run(tmp_path, b"id,v\n1,x\n")["sales"]) == 1


def test_letters_that_are_the_same_in_each_encoding_leave_no_doubt(tmp_path: Path) -> None:
    table = table_of("delimited", contract(PAIR))
    out = table.run(tmp_path, "id,v\n1,Köln\n2,Groß\n".encode("cp1252"))
    assert [row["v"] for row in out["sales"].to_pylist()] == ["Köln", "Groß"]


def test_rejects_have_their_columns_where_there_are_none(tmp_path: Path) -> None:
    out = table_of("delimited", contract(PAIR)).run(tmp_path, b"id,v\n1,x\n")
    assert out["sales_rejects"].column_names[:3] == ["line", "record", "column"]
    assert len(out["sales_rejects"]) == 0
