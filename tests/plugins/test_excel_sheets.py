"""`plugins/excel_sheets.py`: every row of every sheet, as text."""

from __future__ import annotations

import datetime
import random
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import openpyxl
import pytest
import xlsxwriter
import xlwt
from openpyxl import Workbook
from python_calamine import CalamineWorkbook

from proofs.written_workbooks import check, text_of, write_ods
from tests.plugins.conftest import Run, load, runner, running


def written(folder: Path, rows: list[list[Any]], merges: tuple[str, ...] = ()) -> Path:
    """A workbook of one sheet, by openpyxl; formulas get no value."""
    book = Workbook()
    for number, row in enumerate(rows, start=1):
        for column, value in enumerate(row, start=1):
            book.worksheets[0].cell(number, column, value)
    for cells in merges:
        book.worksheets[0].merge_cells(cells)
    file = folder / "book.xlsx"
    book.save(file)
    return file


def with_options(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Run:
    """The plugin, published with options."""
    module = load("excel_sheets")
    run = running(module)
    for name, value in options.items():
        monkeypatch.setitem(module.MANIFEST.options, name, value)
    return run


def cells(out: dict[str, Any]) -> list[list[Any]]:
    """The rows without the name of their sheet."""
    return [list(row.values())[1:] for row in out["excel"].to_pylist()]


def header(out: dict[str, Any]) -> list[str]:
    return list(out["excel"].column_names[2:])


def test_sheets_are_united(excel_sheets: Run, tmp_path: Path) -> None:
    book = Workbook()
    first, second = book.worksheets[0], book.create_sheet("Second")
    second.sheet_state = "hidden"
    book.create_sheet("Empty")
    for row in (
        [],
        ["Name", "When", None, "name", "row"],
        [5, datetime.datetime(2025, 2, 3, 10, 30), 0.1, True, "x"],
        [],
        ["a\nb", datetime.timedelta(hours=26, seconds=1), 1e20, datetime.time(7, 5), None],
    ):
        first.append(row)
    for row in (["when", "Other"], [datetime.date(2025, 2, 3), None]):
        second.append(row)
    file = tmp_path / "book.xlsx"
    book.save(file)
    table = excel_sheets(file)["excel"]
    assert table.column_names == [
        "sheet", "row", "Name", "When", "column_3", "name_2", "row_2", "Other"
    ]  # fmt: skip
    assert [list(row.values()) for row in table.to_pylist()] == [
        ["Sheet", 3, "5", "2025-02-03T10:30:00", "0.1", "true", "x", None],
        ["Sheet", 5, "a\nb", "26:00:01", "100000000000000000000", "07:05:00", None, None],
        ["Second", 2, None, "2025-02-03", None, None, None, None],
    ]


@pytest.mark.slow
def test_random_workbooks(excel_sheets: Run, tmp_path: Path, seed: int) -> None:
    for number in range(seed, seed + 100):
        check(number, excel_sheets, tmp_path)


# Where the header is

TABLE = [["region", "q1", "q2", "total"], ["North", 1, 2, 3], ["South", 4, 5, 9]]


@pytest.mark.parametrize(
    ("above", "first"),
    [
        ([], 1),
        ([["Quarterly report"]], 2),
        ([["Quarterly report"], ["by finance"], []], 4),
        ([[], ["Quarterly report"], [None, "draft"], []], 5),
        ([["Account", 4711], []], 3),
    ],
)
def test_titles_are_skipped_and_told(
    above: list[list[Any]],
    first: int,
    excel_sheets: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [*above, *TABLE, [], ["Note: preliminary"]]
    out = excel_sheets(written(tmp_path, rows))
    assert header(out) == TABLE[0]
    assert cells(out) == [
        [first + 1, "North", "1", "2", "3"],
        [first + 2, "South", "4", "5", "9"],
        [first + 4, "Note: preliminary", None, None, None],
    ]
    said = capsys.readouterr().out
    for row in above:
        assert all(str(value) in said for value in row if value)
    assert ("guessed: " in said) == bool(above)


def test_a_report_without_rows(excel_sheets: Run, tmp_path: Path) -> None:
    out = excel_sheets(written(tmp_path, [["Report"], [], TABLE[0]]))
    assert header(out) == TABLE[0]
    assert cells(out) == []


def test_merged_title(excel_sheets: Run, tmp_path: Path) -> None:
    out = excel_sheets(written(tmp_path, [["Report"], *TABLE], ("A1:D1",)))
    assert header(out) == TABLE[0]


@pytest.mark.parametrize(
    ("rows", "merges"),
    [
        (
            [["region", 2023, None, 2024], [None, "q1", "q2", "q1", "q2"]],
            ("B1:C1", "D1:E1", "A1:A2"),
        ),
        ([[None, "2023", None, "2024"], ["region", "q1", "q2", "q1", "q2"]], ("B1:C1", "D1:E1")),
        (
            [["Report"], [None, "2023", None, "2024"], ["region", "q1", "q2", "q1", "q2"]],
            ("A1:E1", "B2:C2", "D2:E2"),
        ),
        ([["region", "2023", None, "2024"], [None, "q1", "q2", "q1", "q2"]], ("B1:C1", "D1:E1")),
    ],
)
def test_merged_header(
    rows: list[list[Any]], merges: tuple[str, ...], excel_sheets: Run, tmp_path: Path
) -> None:
    out = excel_sheets(written(tmp_path, [*rows, ["North", 1, 2, 3, 4]], merges))
    assert header(out) == ["region", "2023 q1", "2023 q2", "2024 q1", "2024 q2"]
    assert cells(out) == [[len(rows) + 1, "North", "1", "2", "3", "4"]]


def test_years_are_names(excel_sheets: Run, tmp_path: Path) -> None:
    rows = [["region", 2023, 2024, datetime.date(2025, 1, 1)], ["North", 10, 20, 30]]
    assert header(excel_sheets(written(tmp_path, rows))) == ["region", "2023", "2024", "2025-01-01"]


def test_a_column_without_a_name_keeps_its_cells(excel_sheets: Run, tmp_path: Path) -> None:
    rows = [[None, "name", "size"], [0, "a", 1.5], [1, "b", 2.5]]
    out = excel_sheets(written(tmp_path, rows))
    assert header(out) == ["column_1", "name", "size"]
    assert cells(out) == [[2, "0", "a", "1.5"], [3, "1", "b", "2.5"]]


def test_a_text_without_a_header_is_no_header(excel_sheets: Run, tmp_path: Path) -> None:
    rows = [["supplier", "article"], ["Lee", "hinge", "preferred"], ["Orr", "screw"]]
    out = excel_sheets(written(tmp_path, rows))
    assert header(out) == ["supplier", "article", "column_3"]
    assert cells(out) == [[2, "Lee", "hinge", "preferred"], [3, "Orr", "screw", None]]


def test_pairs_above_a_table_are_told(
    excel_sheets: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [["holder", "Jane"], ["iban", "DE00"], ["day", "text", "in", "out"], [1, "a", 2, 3]]
    out = excel_sheets(written(tmp_path, rows))
    assert header(out) == ["day", "text", "in", "out"]
    assert "iban | DE00" in capsys.readouterr().out


UNCLEAR = [
    [["North", 1, 2], ["South", 3, 4]],  # no header
    [["Alien", 1979], ["Brazil", 1985]],  # years that are data
    [["1", "english"], ["2", "german"]],  # numbers as text
    [
        ["holder", "Jane", "x"],
        ["iban", "DE00", "y"],
        [],
        ["day", "text", "in", "out"],
        [1, "a", 2, 3],
    ],
    [["a", "b", "c"], ["x", 1, 2], [], ["d", "e", "f", "g", "h", "i"], ["y", 1, 2, 3, 4, 5]],
    [["Turnout"], ["sheet", "https://a"], ["results", "https://b"], [], ["Votes"], ["c", "d"]],
]


@pytest.mark.parametrize("rows", UNCLEAR)
def test_an_unclear_header_fails_with_what_settles_it(
    rows: list[list[Any]], excel_sheets: Run, tmp_path: Path
) -> None:
    file = written(tmp_path, rows)
    words = "casparian publish excel_sheets .* --option header_row=[1-9].* header_row=0"
    with pytest.raises(ValueError, match=words) as refused:
        excel_sheets(file)
    for row in re.findall("header_row=([1-9]+)", str(refused.value)):
        out = runner("excel_sheets", header_row=int(row))(file)
        assert "excel" in out, row


def test_an_unclear_sheet_beside_a_clear_one_becomes_rejects(
    excel_sheets: Run, tmp_path: Path
) -> None:
    file = written(tmp_path, TABLE)
    book = openpyxl.load_workbook(file)
    for row in UNCLEAR[0]:
        book.create_sheet("Other") if "Other" not in book.sheetnames else None
        book["Other"].append(row)
    book.save(file)
    out = excel_sheets(file)
    assert header(out) == TABLE[0]
    rejects = out["excel_rejects"].to_pylist()
    assert [(row["sheet"], row["row"], row["raw"]) for row in rejects] == [
        ("Other", 1, '{"A": "North", "B": "1", "C": "2"}'),
        ("Other", 2, '{"A": "South", "B": "3", "C": "4"}'),
    ]


def test_options_settle_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, UNCLEAR[3])
    out = with_options(monkeypatch, header_row=4)(file)
    assert header(out) == ["day", "text", "in", "out"]
    assert cells(out) == [[5, "1", "a", "2", "3"]]
    out = with_options(monkeypatch, header_row=0)(file)
    assert header(out) == ["column_1", "column_2", "column_3", "column_4"]
    assert len(cells(out)) == 4
    assert with_options(monkeypatch, header_row=1, sheets="No*, She?t")(file)["excel"].num_rows == 3
    with pytest.raises(ValueError, match="nothing in row 3"):
        with_options(monkeypatch, header_row=3)(file)
    with pytest.raises(ValueError, match="no sheet is named 'Data'; the sheets are: 'Sheet'"):
        with_options(monkeypatch, sheets="Data")(file)


def test_a_header_that_comes_again_is_a_reject(excel_sheets: Run, tmp_path: Path) -> None:
    out = excel_sheets(written(tmp_path, [*TABLE, TABLE[0], ["West", 1, 1, 2]]))
    assert [row[0] for row in cells(out)] == [2, 3, 5]
    assert [(row["row"], row["reason"]) for row in out["excel_rejects"].to_pylist()] == [
        (4, "the header again")
    ]


# What a cell holds

SHEET = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006/relationships"
STYLES = (
    f'<styleSheet xmlns="{SHEET}"><numFmts><numFmt numFmtId="170" formatCode="[h]:mm:ss"/>'
    '<numFmt numFmtId="171" formatCode="0 &quot;days&quot;"/></numFmts><cellXfs>'
    '<xf numFmtId="0"/><xf numFmtId="14"/><xf numFmtId="22"/><xf numFmtId="21"/>'
    '<xf numFmtId="170"/><xf numFmtId="171"/><xf numFmtId="10"/></cellXfs></styleSheet>'
)


def hand_made(
    path: Path,
    rows: str,
    *,
    workbook: str = "",
    strings: str = "",
    more: dict[str, str] | None = None,
) -> Path:
    """An XLSX of one sheet, from the XML of its rows."""
    links = "".join(
        f'<Relationship Id="r{i}" Type="{OFFICE}/{kind}" Target="{target}"/>'
        for i, (kind, target) in enumerate(
            [("worksheet", "sheet.xml"), ("styles", "s.xml"), ("sharedStrings", "t.xml")]
        )
    )
    parts = {
        "_rels/.rels": f'<Relationships xmlns="{PACKAGE}"><Relationship Id="r" '
        f'Type="{OFFICE}/officeDocument" Target="xl/book.xml"/></Relationships>',
        "xl/book.xml": f'<workbook xmlns="{SHEET}" xmlns:r="{OFFICE}">{workbook}<sheets>'
        '<sheet name="S" sheetId="1" r:id="r0"/></sheets></workbook>',
        "xl/_rels/book.xml.rels": f'<Relationships xmlns="{PACKAGE}">{links}</Relationships>',
        "xl/sheet.xml": f'<worksheet xmlns="{SHEET}"><sheetData>{rows}</sheetData></worksheet>',
        "xl/s.xml": STYLES,
        "xl/t.xml": f'<sst xmlns="{SHEET}">{strings}</sst>',
        **(more or {}),
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as pack:
        for name, text in parts.items():
            pack.writestr(name, text)
    return path


HEAD = "<row r='1'>{}{}</row>".format(
    *(f"<c t='inlineStr'><is><t>{name}</t></is></c>" for name in ("what", "x"))
)


def one_cell(run: Run, folder: Path, cell: str, **book: Any) -> Any:
    """What is published of a cell, or the reason of its reject."""
    rows = f'{HEAD}<row r="2"><c r="A2"><v>1</v></c>{cell}</row>'
    out = run(hand_made(folder / "cell.xlsx", rows, **book))
    if "excel_rejects" in out:
        (reject,) = out["excel_rejects"].to_pylist()
        assert (reject["cell"], reject["row"]) == ("B2", 2)
        return reject["reason"]
    (row,) = out["excel"].to_pylist()
    return row.get("x")


@pytest.mark.parametrize(
    ("stored", "text"),
    [
        ("4111111111111110", "4111111111111110"),
        ("1E+16", "10000000000000000"),
        ("1e20", "100000000000000000000"),
        ("12345678901234567890", "12345678901234567890"),
        ("-12", "-12"),
        ("5.0", "5"),
        ("-0", "0"),
        ("0.1", "0.1"),
        ("0.10000000000000001", "0.1"),
        ("0.30000000000000004", "0.30000000000000004"),
        ("4.0000000000000001E+0", "4"),
        ("1.2E-07", "1.2e-07"),
        ("0.12345678901234567891", "0.12345678901234567891"),
        ("1E-400", "1E-400"),
    ],
)
def test_numbers_stay_what_they_are(
    stored: str, text: str, excel_sheets: Run, tmp_path: Path
) -> None:
    assert one_cell(excel_sheets, tmp_path, f"<c><v>{stored}</v></c>") == text


@pytest.mark.parametrize("stored", ["1E+400", "nan", "INF", "1,5", "1E+999999999", "9" * 5000])
def test_what_is_no_number_is_a_reject(stored: str, excel_sheets: Run, tmp_path: Path) -> None:
    assert "is not a number" in one_cell(excel_sheets, tmp_path, f"<c><v>{stored}</v></c>")


@pytest.mark.parametrize(
    ("style", "stored", "text", "text_1904"),
    [
        (1, "45296", "2024-01-05", "2028-01-06"),
        (1, "45296.5", "2024-01-05T12:00:00", "2028-01-06T12:00:00"),
        (2, "45296", "2024-01-05T00:00:00", "2028-01-06T00:00:00"),
        (2, "43831.49998842592", "2020-01-01T11:59:59", "2024-01-02T11:59:59"),
        (1, "59", "1900-02-28", "1904-02-29"),
        (1, "60", "60", "1904-03-01"),
        (1, "61", "1900-03-01", "1904-03-02"),
        (1, "0", "0", "1904-01-01"),
        (1, "-1", "-1", "-1"),
        (1, "2958466", "2958466", "2958466"),
        (3, "0.7863310185185185", "18:52:19", "18:52:19"),
        (3, "0", "00:00:00", "00:00:00"),
        (4, "1.5", "36:00:00", "36:00:00"),
        (4, "-0.25", "-06:00:00", "-06:00:00"),
        (4, "0.00001736111111111111", "00:00:01.500000", "00:00:01.500000"),
        (5, "0.5", "0.5", "0.5"),
        (6, "0.125", "0.125", "0.125"),
    ],
)
def test_dates_times_and_durations(
    style: int, stored: str, text: str, text_1904: str, excel_sheets: Run, tmp_path: Path
) -> None:
    cell = f'<c s="{style}"><v>{stored}</v></c>'
    assert one_cell(excel_sheets, tmp_path, cell) == text
    base = '<workbookPr date1904="1"/>'
    assert one_cell(excel_sheets, tmp_path, cell, workbook=base) == text_1904


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ('<c t="b"><v>0</v></c>', "false"),
        ('<c t="e"><v>#N/A</v></c>', "#N/A"),
        ('<c t="e"><f>1/0</f><v>#DIV/0!</v></c>', "#DIV/0!"),
        ('<c t="s"><v>0</v></c>', "00123"),
        ('<c t="s"><v>1</v></c>', "base bold"),
        ('<c t="s"><v>2</v></c>', "a\\x00b\r_x"),
        ('<c t="str"><f>A1</f><v> text </v></c>', " text "),
        ('<c t="str"><f>A1</f><v></v></c>', None),
        ('<c t="str"><f>A1</f><v/></c>', None),
        ('<c t="d"><v>2024-01-05T00:00:00</v></c>', "2024-01-05T00:00:00"),
        ("<c><v></v></c>", None),
        ('<c s="1"/>', None),
    ],
)
def test_other_cells(cell: str, text: Any, excel_sheets: Run, tmp_path: Path) -> None:
    strings = (
        "<si><t>00123</t></si>"
        "<si><r><t>base </t></r><r><t>bold</t></r><rPh><t>reading</t></rPh></si>"
        "<si><t>a_x0000_b_x000D__x005F_x</t></si>"
    )
    assert one_cell(excel_sheets, tmp_path, cell, strings=strings) == text


# Formulas without a value


def test_formulas_without_a_stored_value(
    excel_sheets: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path, [["qty", "price", "total"], [2, 10, "=A2*B2"], [3, 10, 30]])
    out = excel_sheets(file)
    assert cells(out) == [[3, "3", "10", "30"]]
    (reject,) = out["excel_rejects"].to_pylist()
    assert (reject["sheet"], reject["row"], reject["cell"]) == ("Sheet", 2, "C2")
    assert reject["raw"] == '{"A": "2", "B": "10"}'
    out = with_options(monkeypatch, formulas="empty")(file)
    assert cells(out) == [[2, "2", "10", None], [3, "3", "10", "30"]]


@pytest.mark.parametrize(("values", "rejected"), [((0, 0), 2), ((0, 5), 0)])
def test_zeros_that_nobody_calculated(
    values: tuple[int, int], rejected: int, excel_sheets: Run, tmp_path: Path
) -> None:
    """xlsxwriter stores 0 for a formula, and asks for a calculation when the file is opened."""
    file = tmp_path / "book.xlsx"
    with xlsxwriter.Workbook(str(file)) as book:
        sheet = book.add_worksheet()
        sheet.write_row(0, 0, ["qty", "total"])
        for row, value in enumerate(values, start=1):
            sheet.write(row, 0, row)
            sheet.write_formula(row, 1, "=A2*2", None, value)
    out = excel_sheets(file)
    assert out["excel"].num_rows == 2 - rejected
    assert (out["excel_rejects"].num_rows if rejected else 0) == rejected


def test_formulas_of_an_xls_that_nobody_calculated(excel_sheets: Run, tmp_path: Path) -> None:
    book = xlwt.Workbook()
    sheet = book.add_sheet("S")
    for column, value in enumerate(["qty", "total", 2, xlwt.Formula("A2*2")]):
        sheet.write(column // 2, column % 2, value)
    book.save(str(tmp_path / "book.xls"))
    (reject,) = excel_sheets(tmp_path / "book.xls")["excel_rejects"].to_pylist()
    assert (reject["cell"], reject["raw"]) == ("B2", '{"A": "2"}')


# XLSB and ODS


def wide(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode("utf-16-le")


def record(kind: int, data: bytes = b"") -> bytes:
    """A record of a binary workbook."""
    first = struct.pack("B", kind) if kind < 128 else struct.pack("BB", kind & 127 | 128, kind >> 7)
    size, length = len(data), b""
    while True:
        length += struct.pack("B", size & 127 | (128 if size > 127 else 0))
        size >>= 7
        if not size:
            return first + length + data


def test_xlsb(excel_sheets: Run, tmp_path: Path) -> None:
    def cell(kind: int, column: int, value: bytes, style: int = 0) -> bytes:
        return record(kind, struct.pack("<II", column, style) + value)

    def row(number: int, *parts: bytes) -> bytes:
        return record(0, struct.pack("<I", number) + bytes(13)) + b"".join(parts)

    names = [cell(6, column, wide(name)) for column, name in enumerate("abcdefg")]
    values = [
        cell(2, 0, struct.pack("<i", 123 << 2 | 3)),  # 1.23, as a whole number of hundredths
        cell(5, 1, struct.pack("<d", 1e16)),
        cell(7, 2, struct.pack("<I", 0)),
        cell(4, 3, b"\1"),
        cell(3, 4, b"\x2a"),
        cell(5, 5, struct.pack("<d", 1.5), style=1),
        cell(9, 6, struct.pack("<d", 45296) + bytes(8), style=2),
    ]
    styles = (
        record(44, struct.pack("<H", 170) + wide("[h]:mm"))
        + record(617)
        + b"".join(record(47, struct.pack("<HH", 0, kind)) for kind in (0, 170, 14))
        + record(618)
    )
    book = record(153, bytes(8)) + record(156, bytes(8) + wide("r0") + wide("S"))
    links = (
        f'<Relationships xmlns="{PACKAGE}">'
        f'<Relationship Id="r0" Type="{OFFICE}/worksheet" Target="sheet.bin"/>'
        f'<Relationship Id="r1" Type="{OFFICE}/styles" Target="s.bin"/>'
        f'<Relationship Id="r2" Type="{OFFICE}/sharedStrings" Target="t.bin"/></Relationships>'
    )
    file = tmp_path / "book.xlsb"
    with zipfile.ZipFile(file, "w") as pack:
        pack.writestr(
            "_rels/.rels",
            f'<Relationships xmlns="{PACKAGE}"><Relationship Id="r" '
            f'Type="{OFFICE}/officeDocument" Target="xl/workbook.bin"/></Relationships>',
        )
        pack.writestr("xl/workbook.bin", book)
        pack.writestr("xl/_rels/workbook.bin.rels", links)
        pack.writestr("xl/sheet.bin", row(0, *names) + row(4, *values))
        pack.writestr("xl/s.bin", styles)
        pack.writestr("xl/t.bin", record(19, b"\0" + wide("shared")))
    out = excel_sheets(file)
    assert header(out) == list("abcdefg")
    assert cells(out) == [
        [5, "1.23", "10000000000000000", "shared", "true", "#N/A", "36:00:00", "2024-01-05"]
    ]


def ods(path: Path, rows: str) -> Path:
    """An ODS of one sheet, from the XML of its rows."""
    write_ods(path, [])
    with zipfile.ZipFile(path) as pack:
        text = pack.read("content.xml").decode()
    table = f'<table:table table:name="O">{rows}</table:table></office:spreadsheet>'
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as pack:
        pack.writestr("content.xml", text.replace("</office:spreadsheet>", table))
    return path


def ods_text(text: str, attributes: str = "") -> str:
    return (
        f'<table:table-cell office:value-type="string" {attributes}>'
        f"<text:p>{text}</text:p></table:table-cell>"
    )


ODS_HEAD = f"<table:table-row>{ods_text('a')}{ods_text('b')}</table:table-row>"


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ('office:value-type="time" office:time-value="PT26H00M00S"', "26:00:00"),
        ('office:value-type="time" office:time-value="-PT06H30M00S"', "-06:30:00"),
        ('office:value-type="time" office:time-value="PT00H00M01.500000000S"', "00:00:01.500000"),
        ('office:value-type="time" office:time-value="P1DT2H"', "26:00:00"),
        ('office:value-type="float" office:value="1E+16"', "10000000000000000"),
        ('office:value-type="percentage" office:value="0.125"', "0.125"),
        ('office:value-type="currency" office:value="1200"', "1200"),
        ('office:value-type="date" office:date-value="2024-01-05T11:59:59.250000000"',
         "2024-01-05T11:59:59.250000"),
        ('office:value-type="date" office:date-value="1899-12-30"', "1899-12-30"),
        ('table:formula="of:=1" office:value-type="string" office:string-value=""', None),
    ],
)  # fmt: skip
def test_ods_values(cell: str, text: Any, excel_sheets: Run, tmp_path: Path) -> None:
    row = f"<table:table-row>{ods_text('1')}<table:table-cell {cell}/></table:table-row>"
    out = excel_sheets(ods(tmp_path / "book.ods", ODS_HEAD + row))
    assert cells(out) == [[2, "1", text]]


def test_ods_errors_are_text(excel_sheets: Run, tmp_path: Path) -> None:
    for kind in ('office:value-type="float" office:value="0"', 'office:value-type="string"'):
        cell = f"<table:table-cell table:formula='of:=1/0' {kind}><text:p>#DIV/0!</text:p>"
        row = f"<table:table-row>{ods_text('1')}{cell}</table:table-cell></table:table-row>"
        out = excel_sheets(ods(tmp_path / "book.ods", ODS_HEAD + row))
        assert cells(out) == [[2, "1", "#DIV/0!"]]


@pytest.mark.parametrize(
    "cell",
    [
        'table:formula="of:=[.A2]*2"',
        'office:value-type="time" office:time-value="26:00"',
        'office:value-type="date" office:date-value="5.1.24"',
        'office:value-type="float"',
    ],
)
def test_ods_cells_that_cannot_be_read(cell: str, excel_sheets: Run, tmp_path: Path) -> None:
    row = f"<table:table-row>{ods_text('1')}<table:table-cell {cell}/></table:table-row>"
    (reject,) = excel_sheets(ods(tmp_path / "b.ods", ODS_HEAD + row))["excel_rejects"].to_pylist()
    assert (reject["cell"], reject["raw"]) == ("B2", '{"A": "1"}')


def test_ods_rows_and_cells_that_are_repeated(excel_sheets: Run, tmp_path: Path) -> None:
    twice = ods_text(
        "x<office:annotation><text:p>a note</text:p></office:annotation>",
        "table:number-columns-repeated='2'",
    )
    lines = ods_text("p</text:p><text:p>q <text:s text:c='2'/>r")
    rows = (
        f"{ODS_HEAD}<table:table-row table:number-rows-repeated='2'><table:table-cell/>"
        "</table:table-row><table:table-row table:number-rows-repeated='3'>"
        f"{twice}</table:table-row><table:table-row>{lines}"
        "</table:table-row><table:table-row table:number-rows-repeated='1048000'>"
        "<table:table-cell table:number-columns-repeated='1024'/></table:table-row>"
    )
    assert cells(excel_sheets(ods(tmp_path / "book.ods", rows))) == [
        [4, "x", "x"], [5, "x", "x"], [6, "x", "x"], [7, "p\nq   r", None]
    ]  # fmt: skip


# What is too large, damaged, or no workbook


def far_apart(end: str) -> str:
    row = end.lstrip("ABCDEFX")
    far = f'<row r="{row}"><c r="{end}"><v>9</v></c></row>'
    return f'{HEAD}<row r="2"><c r="A2"><v>1</v></c></row>{far}'


def test_a_sparse_sheet_is_refused_by_its_dimensions(excel_sheets: Run, tmp_path: Path) -> None:
    file = hand_made(tmp_path / "book.xlsx", far_apart("XFD1048576"))
    with pytest.raises(ValueError, match=r"A1:XFD1048576, 1,048,576 rows by 16,384 columns"):
        excel_sheets(file)


def test_far_rows_of_few_columns_are_rows(excel_sheets: Run, tmp_path: Path) -> None:
    out = excel_sheets(hand_made(tmp_path / "book.xlsx", far_apart("B1048576")))
    assert cells(out) == [[2, "1", None], [1048576, None, "9"]]


def test_a_repeated_row_of_an_ods_that_fills_the_memory_is_refused(
    excel_sheets: Run, tmp_path: Path
) -> None:
    row = ods_text("x", "table:number-columns-repeated='16384'")
    rows = f"<table:table-row table:number-rows-repeated='1048576'>{row}</table:table-row>"
    with pytest.raises(ValueError, match="1,048,576 times"):
        excel_sheets(ods(tmp_path / "book.ods", rows))


@pytest.mark.slow
def test_a_workbook_that_unpacks_to_too_much_is_refused(excel_sheets: Run, tmp_path: Path) -> None:
    file = hand_made(tmp_path / "book.xlsx", HEAD + " " * (300 << 20))
    with pytest.raises(ValueError, match="or made to fill the memory"):
        excel_sheets(file)


@pytest.mark.parametrize("part", ["<!DOCTYPE x [<!ENTITY a 'b'>]>", "<a b='" + "c" * (9 << 20)])
def test_xml_that_is_made_to_hurt_is_refused(part: str, excel_sheets: Run, tmp_path: Path) -> None:
    file = hand_made(tmp_path / "book.xlsx", HEAD, more={"xl/sheet.xml": part})
    with pytest.raises(ValueError, match="may be damaged"):
        excel_sheets(file)


@pytest.mark.parametrize("name", ["book.xlsx", "book.xls", "book.ods"])
@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"PK\x03\x04 and no more", "may be damaged"),
        (b"a\tb\n1\t2\n", "this is text, not a workbook"),
        (bytes(600), "not a workbook: it is neither"),
        (b"<html><body><table><tr><td>a</td></tr></table>", "HTML"),
        (b"%PDF-1.7\n", "PDF"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "may be damaged"),
        (
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
            + bytes(600)
            + "EncryptedPackage".encode("utf-16-le"),
            "password",
        ),
    ],
)
def test_what_is_no_workbook_fails(
    data: bytes, what: str, name: str, excel_sheets: Run, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(ValueError, match=what):
        excel_sheets(file)


def test_zip_archives_that_are_no_workbooks(excel_sheets: Run, tmp_path: Path) -> None:
    for target, what in (("word/document.xml", "a Word document"), ("", "a ZIP archive")):
        file = tmp_path / "book.xlsx"
        with zipfile.ZipFile(file, "w") as pack:
            pack.writestr("readme.txt", "x")
            if target:
                pack.writestr(
                    "_rels/.rels",
                    f'<Relationships xmlns="{PACKAGE}"><Relationship Id="r" '
                    f'Type="{OFFICE}/officeDocument" Target="{target}"/></Relationships>',
                )
        with pytest.raises(ValueError, match=what):
            excel_sheets(file)


def test_a_workbook_without_a_worksheet_fails(excel_sheets: Run, tmp_path: Path) -> None:
    file = tmp_path / "book.xlsx"
    with xlsxwriter.Workbook(str(file)) as book:
        chart = book.add_chart({"type": "line"})
        chart.add_series({"values": "={1,2}"})
        book.add_chartsheet().set_chart(chart)
    with pytest.raises(ValueError, match="no worksheet"):
        excel_sheets(file)


def test_sheets_without_a_cell_publish_nothing(excel_sheets: Run, tmp_path: Path) -> None:
    assert excel_sheets(written(tmp_path, [])) == {}


def test_an_empty_file_publishes_nothing(excel_sheets: Run, tmp_path: Path) -> None:
    (tmp_path / "book.xlsx").touch()
    assert excel_sheets(tmp_path / "book.xlsx") == {}


def test_what_a_file_is_shows_in_its_bytes(excel_sheets: Run, tmp_path: Path) -> None:
    file = written(tmp_path, TABLE)
    file = file.rename(tmp_path / "book.xls")
    assert header(excel_sheets(file)) == TABLE[0]


@pytest.mark.parametrize("kind", ["xlsx", "xls", "ods"])
def test_damaged_workbooks_fail_in_words(
    kind: str, excel_sheets: Run, tmp_path: Path, seed: int
) -> None:
    """Whatever byte is changed or missing: rows, or a ValueError."""
    rng = random.Random(seed)
    file = tmp_path / f"book.{kind}"
    if kind == "xlsx":
        written(tmp_path, TABLE)
    elif kind == "ods":
        ods(file, ODS_HEAD)
    else:
        book = xlwt.Workbook()
        book.add_sheet("S").write(0, 0, "x")
        book.save(str(file))
    whole = file.read_bytes()
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(data[: rng.randrange(1, len(data))] if rng.random() < 0.3 else data)
        try:
            excel_sheets(file)
        except ValueError:
            continue


# Real files


def test_real_workbooks(excel_sheets: Run, shared_files: Path) -> None:
    rows, rejects, failed = {}, {}, []
    for name in ("*.xlsx", "*.xls", "*.ods"):
        for file in sorted(shared_files.rglob(name)):
            try:
                out = excel_sheets(file)
            except ValueError as error:
                assert "header" in str(error)
                failed.append(file.name)
                continue
            rows[file.name] = out["excel"].num_rows
            rejects[file.name] = out["excel_rejects"].num_rows if "excel_rejects" in out else 0
    # A page of notes with tables on it, and one cell.
    assert failed == ["lebron.xlsx", "merged-cells-boolean.xls"]
    assert rows["table.ods"] == rows["table.xls"] == 2
    assert rows["off-year-turnout-2023.xlsx"] == 134 + 120 + 88 + 67 + 21
    # A sheet of links without a header, and one without a header.
    assert {name: n for name, n in rejects.items() if n} == {
        "off-year-turnout-2023.xlsx": 19,
        "table.xlsx": 2,
    }


def other_reader(file: Path) -> dict[tuple[str, int, int], Any]:
    """The cells of a workbook as openpyxl or calamine reads them."""
    if file.suffix == ".xlsx":
        return {
            (sheet.title, cell.row, cell.column): cell.value
            for sheet in openpyxl.load_workbook(file, data_only=True)
            for row in sheet.iter_rows()
            for cell in row
            if cell.value not in (None, "")
        }
    book = CalamineWorkbook.from_path(str(file))
    return {
        (name, number, column): value
        for name in book.sheet_names
        for number, row in enumerate(book.get_sheet_by_name(name).iter_rows(), start=1)
        for column, value in enumerate(row, start=1)
        if value != ""
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.slow
def test_real_workbooks_as_other_readers_read_them(
    shared_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cell by cell; openpyxl has no dates, only midnights, and calamine no midnights."""
    run = with_options(monkeypatch, header_row=0)
    compared = 0
    for name in ("*.xlsx", "*.xls", "*.ods"):
        for file in sorted(shared_files.rglob(name)):
            found = {
                (row["sheet"], row["row"], int(column.removeprefix("column_"))): text
                for row in run(file)["excel"].to_pylist()
                for column, text in row.items()
                if column.startswith("column_") and text is not None
            }
            wanted = {key: text_of(value) for key, value in other_reader(file).items()}
            midnight = "T00:00:00"
            assert {key: text.removesuffix(midnight) for key, text in found.items()} == {
                key: str(text).removesuffix(midnight) for key, text in wanted.items()
            }, file.name
            compared += len(found)
    assert compared > 20_000
