"""Random workbooks, and what must be published of them: what was written, cell by cell.

`python -m proofs.written_workbooks --count N --seed S` tries more than the suite does.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import random
import tempfile
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape, quoteattr

import openpyxl
import xlsxwriter
import xlwt
from openpyxl.utils.datetime import CALENDAR_MAC_1904

from proofs import arguments
from tests.plugins.conftest import Run, runner

WRITERS = ("openpyxl", "openpyxl_1904", "xlsxwriter", "constant_memory", "xlwt", "ods")
WORDS = ("Zürich", "00123", "a\nb", "  padded ", "=1+1", "2024-01-05", "日本語", "x" * 300, "1e5")
"""Texts that a careless reader changes."""


class Written(NamedTuple):
    """A sheet as it was written: what stands above the header, the header and the rows."""

    name: str
    titles: list[list[Any]]
    header: list[str]
    rows: list[list[Any]]


def text_of(value: Any) -> str | None:
    """What must be published of a value that was written."""
    match value:
        case None | "":
            return None
        case bool():
            return str(value).lower()
        case float():
            return str(int(Decimal(repr(value)))) if value.is_integer() else repr(value)
        case datetime.timedelta():
            micros = value // datetime.timedelta(microseconds=1)
            seconds, rest = divmod(abs(micros), 1_000_000)
            text = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
            return f"{'-' if micros < 0 else ''}{text}{f'.{rest:06}' if rest else ''}"
        case datetime.date() | datetime.time():
            return value.isoformat()
    return str(value)


def random_value(rng: random.Random, kind: str) -> Any:
    """A value of one kind; now and then none, or a text in its place."""
    if rng.random() < 0.15:
        return None
    if kind == "text" or rng.random() < 0.05:
        return rng.choice(WORDS) if rng.random() < 0.5 else f"word {rng.randrange(1000)}"
    day = datetime.date(1904, 1, 2) + datetime.timedelta(days=rng.randrange(60_000))
    second = rng.randrange(86_400)
    time = (datetime.datetime.min + datetime.timedelta(seconds=second)).time()
    match kind:
        case "integer":
            return rng.choice([rng.randrange(-50, 2000), rng.randrange(10**15), 4111111111111110])
        case "float":
            # 15 digits: xlsxwriter and openpyxl write no more than 16 of a number's 17.
            wide = float(f"{rng.uniform(-1e3, 1e3):.15g}")
            return rng.choice([wide, round(rng.random(), 2), 1e20, 1.5e-7])
        case "boolean":
            return rng.random() < 0.5
        case "date":
            return day
        case "datetime":
            milli = rng.choice([0, 0, rng.randrange(1000)])
            return datetime.datetime.combine(day, time.replace(microsecond=milli * 1000))
        case "time":
            return time
    return datetime.timedelta(seconds=rng.choice([second, second + 86_400 * rng.randrange(1, 90)]))


KINDS = ("text", "integer", "float", "boolean", "date", "datetime", "time", "duration")


def random_sheets(rng: random.Random) -> list[Written]:
    """One to three sheets; the first column of each is whole numbers, so that its header shows."""
    sheets = []
    for number in range(rng.randint(1, 3)):
        kinds = ["integer", *(rng.choice(KINDS) for _ in range(rng.randint(2, 8)))]
        header = [f"{kind} {place}" for place, kind in enumerate(kinds)]
        rows = [
            [rng.randrange(-5, 10_000), *(random_value(rng, kind) for kind in kinds[1:])]
            for _ in range(rng.randint(1, 40))
        ]
        if rng.random() < 0.3:
            rows.insert(rng.randrange(len(rows)), [None] * len(kinds))
        titles: list[list[Any]] = []
        if rng.random() < 0.4 and len(rows) > 3:
            titles = [[f"Report {number}"], *([["as of 2024"]] if rng.random() < 0.5 else []), []]
        sheets.append(Written(f"Sheet {number}", titles, header, rows))
    return sheets


def write(writer: str, path: Path, sheets: list[Written], rng: random.Random) -> None:
    if writer.startswith("openpyxl"):
        write_openpyxl(path, sheets, writer.endswith("1904"))
    elif writer == "xlwt":
        write_xlwt(path, sheets)
    elif writer == "ods":
        write_ods(path, sheets)
    else:
        write_xlsxwriter(path, sheets, writer == "constant_memory", rng)


def lines(sheet: Written) -> list[list[Any]]:
    return [*sheet.titles, sheet.header, *sheet.rows]


def write_openpyxl(path: Path, sheets: list[Written], base_1904: bool) -> None:
    book = openpyxl.Workbook()
    book.remove(book.worksheets[0])
    if base_1904:
        book.epoch = CALENDAR_MAC_1904
    for sheet in sheets:
        target = book.create_sheet(sheet.name)
        for number, row in enumerate(lines(sheet), start=1):
            for column, value in enumerate(row, start=1):
                cell = target.cell(number, column, value)
                if isinstance(value, str):
                    cell.data_type = "s"
    book.save(path)


FORMATS = {
    datetime.datetime: "yyyy-mm-dd hh:mm:ss.000",
    datetime.date: "dd/mm/yyyy",
    datetime.time: "hh:mm:ss",
    datetime.timedelta: "[h]:mm:ss",
}


def write_xlsxwriter(
    path: Path, sheets: list[Written], constant_memory: bool, rng: random.Random
) -> None:
    """With formulas, whose value is stored."""
    options = {"constant_memory": constant_memory, "date_1904": rng.random() < 0.3}
    with xlsxwriter.Workbook(str(path), options) as book:
        formats = {kind: book.add_format({"num_format": code}) for kind, code in FORMATS.items()}
        for sheet in sheets:
            target = book.add_worksheet(sheet.name)
            for number, row in enumerate(lines(sheet)):
                for column, value in enumerate(row):
                    if value is None:
                        continue
                    if isinstance(value, str):
                        target.write_string(number, column, value)
                    elif type(value) in formats:
                        target.write_datetime(number, column, value, formats[type(value)])
                    elif type(value) is int and value and rng.random() < 0.2:
                        target.write_formula(number, column, f"={value}", None, value)
                    else:
                        target.write(number, column, value)


def write_xlwt(path: Path, sheets: list[Written]) -> None:
    book = xlwt.Workbook()
    styles = {kind: xlwt.easyxf(num_format_str=code) for kind, code in FORMATS.items()}
    for sheet in sheets:
        target = book.add_sheet(sheet.name)
        for number, row in enumerate(lines(sheet)):
            for column, value in enumerate(row):
                if isinstance(value, datetime.timedelta | datetime.datetime):
                    # It would write whole seconds only.
                    began = datetime.datetime(1899, 12, 30)
                    span = value if isinstance(value, datetime.timedelta) else value - began
                    days = span / datetime.timedelta(days=1)
                    target.write(number, column, days, styles[type(value)])
                elif type(value) in styles:
                    target.write(number, column, value, styles[type(value)])
                elif value is not None:
                    target.write(number, column, value)
    book.save(str(path))


def ods_cell(value: Any) -> str:
    kind, attribute = "string", ""
    match value:
        case None:
            return "<table:table-cell/>"
        case bool():
            kind, attribute = "boolean", f'boolean-value="{str(value).lower()}"'
        case int() | float():
            kind, attribute = "float", f'value="{value!r}"'
        case datetime.date():
            kind, attribute = "date", f'date-value="{value.isoformat()}"'
        case datetime.time():
            kind, attribute = "time", f'time-value="PT{value:%HH%MM%SS}"'
        case datetime.timedelta():
            seconds = value // datetime.timedelta(seconds=1)
            span = f"PT{seconds // 3600}H{seconds // 60 % 60:02}M{seconds % 60:02}S"
            kind, attribute = "time", f'time-value="{span}"'
        case str():
            attribute = f"string-value={quoteattr(value)}"
    shown = escape(str(value)).replace("  ", ' <text:s text:c="1"/>')
    return (
        f'<table:table-cell office:value-type="{kind}" office:{attribute}>'
        f"<text:p>{shown}</text:p></table:table-cell>"
    )


def write_ods(path: Path, sheets: list[Written]) -> None:
    names = "".join(
        f' xmlns:{name}="urn:oasis:names:tc:opendocument:xmlns:{name}:1.0"'
        for name in ("office", "table", "text")
    )
    tables = "".join(
        f"<table:table table:name={quoteattr(sheet.name)}>"
        + "".join(
            f"<table:table-row>{''.join(map(ods_cell, row)) or '<table:table-cell/>'}"
            "</table:table-row>"
            for row in lines(sheet)
        )
        + '<table:table-row table:number-rows-repeated="1048000">'
        '<table:table-cell table:number-columns-repeated="1024"/></table:table-row></table:table>'
        for sheet in sheets
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as pack:
        pack.writestr("mimetype", "application/vnd.oasis.opendocument.spreadsheet")
        pack.writestr(
            "content.xml",
            f"<office:document-content{names}><office:body><office:spreadsheet>{tables}"
            "</office:spreadsheet></office:body></office:document-content>",
        )


def expected(sheets: list[Written]) -> list[dict[str, Any]]:
    """The rows that must be published; a column that holds nothing is none."""
    columns = list(dict.fromkeys(name for sheet in sheets for name in sheet.header))
    rows = []
    for sheet in sheets:
        for number, row in enumerate(sheet.rows, start=len(sheet.titles) + 2):
            cells = dict(zip(sheet.header, map(text_of, row), strict=True))
            if any(cell is not None for cell in cells.values()):
                own = {name: cells.get(name) for name in columns}
                rows.append({"sheet": sheet.name, "row": number, **own})
    return rows


def check(seed: int, run: Run, folder: Path) -> None:
    """Write one workbook, read it with the plugin, and compare."""
    rng = random.Random(seed)
    writer = rng.choice(WRITERS)
    sheets = random_sheets(rng)
    suffix = {"xlwt": ".xls", "ods": ".ods"}.get(writer, ".xlsx")
    path = folder / f"{seed}{suffix}"
    write(writer, path, sheets, rng)
    with contextlib.redirect_stdout(io.StringIO()):  # what it guesses is not asked here
        out = run(path)
    assert out.keys() == {"excel"}, (seed, writer, out.get("excel_rejects"))
    found, wanted = out["excel"].to_pylist(), expected(sheets)
    assert len(found) == len(wanted), (seed, writer)
    for got, want in zip(found, wanted, strict=True):
        assert got == want, (seed, writer, dict(got.items() - want.items()), want)
    path.unlink()


def main() -> None:
    parser = arguments.parser("written_workbooks", __doc__)
    parser.add_argument("--count", type=int, default=1000)
    arguments.add_seed(parser)
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.count} workbooks")
    run = runner("excel_sheets")
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seed, options.seed + options.count):
            check(seed, run, Path(folder))
    print("no cell differs")


if __name__ == "__main__":
    main()
