# /// script
# requires-python = ">=3.11"
# dependencies = ["pyarrow>=23.0.1", "xlrd>=2.0.1"]
# ///
"""Workbooks (XLSX, XLSM, XLSB, XLS, ODS) become rows of topic `excel`: every row of every sheet.

The kind of a file is found from its bytes, not from its name. The topic's columns are `sheet`,
`row` (its number on the sheet, from 1) and the headers of all sheets, in the order of their first
appearance. A column that a sheet does not have is null in its rows. Empty rows, and columns with
neither a header nor a cell, are left out. Hidden sheets are read; charts and macro sheets are not.

The header is the first row of names above the table: the rows below it have cells only in its
columns. Narrow rows above it are titles. Titles and guesses are logged. Header cells merged over
rows or columns give one name. If a sheet's header is not clear, its rows become rejects, and the
log has the command that settles it; if no sheet's header is clear, the job fails.
`--option header_row=4` sets the header's row, 0 means no header, and `--option sheets="Data,20*"`
selects sheets.

Cells become text as they are stored, not as they are displayed: numbers exactly (`5`, `0.1`,
`10000000000000000`), dates and times in ISO format (without the time of day if the cell's format
shows none), durations as `26:00:00`, `true` and `false`, the stored values of formulas, errors as
`#N/A`. An empty cell is null. A number with a date format that is not a date stays a number (60
would be 29 February 1900).

Topic `excel_rejects` has rows that cannot be read, with the cells, the reason and the whole row as
JSON: a formula without a stored value (`--option formulas=empty` makes it null), an invalid number,
a repeated header. The job fails if the file is damaged, protected by a password, or not a workbook,
and if a sheet is almost empty between cells that are far apart. An empty file publishes nothing.
With a contract (`casparian table add`) the rows of its sheets are typed. A cell that is a number, a
date or a boolean in the workbook converts exactly, whatever notation the contract has for texts, or
rejects its row. `header`, `footer` and `control` see a row as its cells with `;` between them.
Column names: runs of white space become one space, an empty header cell becomes `column_3` (its
position), one that is repeated on its sheet `name_2` (case is ignored), `_cf_x` becomes `x_cf_x`,
and names are cut to 100 characters; a header `sheet` or `row` becomes `sheet_2` or `row_2`.
"""

from __future__ import annotations

import datetime
import io
import json
import lzma
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal, InvalidOperation
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import PurePath
from typing import IO, Any, NamedTuple
from xml.parsers import expat

import pyarrow as pa
import xlrd

from casparian_flow.contract import Column, kind_of
from casparian_flow.intake import Intake, label
from casparian_flow.sdk import (
    BasePlugin,
    PluginMetadata,
    batches,
    column_names,
    foreign_kind,
    own_publish,
    printable,
)

MANIFEST = PluginMetadata(
    pattern=["*.xlsx", "*.xlsm", "*.xlsb", "*.xls", "*.ods"],
    topic=["excel", "excel_rejects"],
    catch_all=True,
    version="1.2.0",
    options={
        "header_row": -1,  # -1: detect; 0: there is none; N: row N of every sheet
        "sheets": "",  # names or globs, separated by commas; empty: all sheets
        "formulas": "reject",  # or "empty": for formulas without a stored value
    },
)

REJECTS = pa.schema(
    [
        ("sheet", pa.string()),
        ("row", pa.int64()),
        ("cell", pa.string()),
        ("reason", pa.string()),
        ("raw", pa.string()),
    ]
)
HEAD_ROWS = 50  # rows in which the header is searched
TITLE_ROWS = 20
KEPT_CELLS = 1_500_000  # a sheet with fewer cells is kept in memory instead of being read twice
PATTERNS = 20_000  # different patterns of filled cells that are counted
STRINGS_BYTES = 384 << 20
CELL_CHARACTERS = 4 << 20  # Excel's own limit is 32,767
UNPACKED_BYTES = 4 << 30
SPARSE_CELLS = 10_000_000
COLUMNS, ROWS = 16_384, 1_048_576  # of the largest possible sheet
CHUNK = 1 << 16

HOW = "open the workbook in a spreadsheet program and save it, or --option formulas=empty"
UNCALCULATED = f"a formula without a stored value: {HOW}"
AGAIN = "the header again"
EMPTY = "only formulas without a stored value"
NEVER = f"a formula that was never calculated (0 is stored for every formula): {HOW}"

Merge = tuple[int, int, int, int]
"""First row, first column, last row, last column: rows from 1, columns from 0."""


class Row(NamedTuple):
    """A row that is not wholly empty."""

    number: int
    cells: dict[int, str]
    """By column, from 0."""
    filled: int
    """Bit mask of the columns with a cell or a fault."""
    typed: int
    """Bit mask of the columns whose cell is not text."""
    bad: dict[int, str]
    """Column -> why its cell cannot be read."""
    zeros: tuple[int, ...]
    """Columns of formulas whose stored value is 0."""


class Sheet:
    """A worksheet. Its counts and merges are complete once its rows have been read."""

    def __init__(self, name: str, read: Callable[[Sheet], Iterator[Row]]) -> None:
        self.name = name
        self._read = read
        self._clear()

    def rows(self) -> Iterator[Row]:
        """Read the sheet from its beginning; may be called more than once."""
        self._clear()
        yield from self._read(self)

    def _clear(self) -> None:
        self.merges: list[Merge] = []
        self.formulas = 0
        self.zeros = 0
        self.noted: dict[str, list[str]] = {}
        """Notes for the log: what is noted -> the cells; all but the first five are empty."""

    def note(self, what: str, row: int, column: int, text: str) -> None:
        cells = self.noted.setdefault(what, [])
        cells.append(f"{place(row, column)} {text}" if len(cells) < 5 else "")

    def print_notes(self) -> None:
        for what, cells in self.noted.items():
            shown = ", ".join(filter(None, cells))
            more = " ..." if len(cells) > 5 else ""
            print(f"sheet {self.name!r}: {len(cells)} {what}: {shown}{more}")


class Book:
    """A workbook: its sheets, and whether it asks for a recalculation when it is opened."""

    def __init__(self, sheets: list[Sheet]) -> None:
        self.sheets = sheets
        self.recalculate = False


class Shape:
    """What the search for the header needs of a sheet, collected while reading it once."""

    def __init__(self) -> None:
        self.head: list[Row] = []
        self.kept: list[Row] | None = []
        self.patterns: Counter[tuple[int, int]] = Counter()
        """(`filled`, `typed`) of rows -> how many rows have this pattern."""
        self.rest = 0
        """Bit mask of the columns filled in rows whose pattern is not counted."""
        self.rows = 0
        self.cells = 0
        self.last = 0


class Header(NamedTuple):
    """Where a sheet's table begins, and its columns."""

    last: int
    """The last row of the header; 0 if there is no header."""
    places: list[int]
    names: list[str]
    cells: dict[int, str]
    """The cells of the last header row, to recognise a repetition."""
    unnamed: list[int]
    rows: list[Row]
    """The header itself."""


class Unclear(Exception):
    """The header cannot be determined.

    Args:
        rows: numbers of the rows that may be the header.
    """

    def __init__(self, text: str, *rows: int) -> None:
        super().__init__(text)
        self.rows = rows


DAMAGE = (
    expat.ExpatError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    struct.error,
    IndexError,
    NotImplementedError,
    UnicodeDecodeError,
)
"""Errors that reading a damaged file may raise."""


class Handler(BasePlugin):
    """Publishes the rows of one workbook."""

    def execute(self, file_path: str) -> None:
        with open(file_path, "rb") as file:
            intake = Intake(self, MANIFEST) if MANIFEST.contract else None
            if not file.peek(1):
                if intake:
                    intake.finish(0, {})
                return
            try:
                self.publish_sheets(open_book(file), PurePath(file_path).name, intake)
            except DAMAGE as error:
                raise damaged(error) from error

    def publish_sheets(self, book: Book, file: str, intake: Intake | None) -> None:
        sheets = wanted(book, intake)
        shapes = [read_shape(sheet, file) for sheet in sheets]
        formulas = sum(sheet.formulas for sheet in sheets)
        never = book.recalculate and formulas == sum(sheet.zeros for sheet in sheets)
        headers: list[Header | str | None] = []
        unclear: list[str] = []
        for sheet, shape in zip(sheets, shapes, strict=True):
            try:
                headers.append(header_of(sheet, shape, intake) if shape.rows else None)
            except Unclear as error:
                headers.append("the header of the sheet is not clear: --option header_row=N")
                unclear.append(f"{error}; {how_to_settle(sheet, file, error.rows, intake)}")
        if unclear and not any(isinstance(header, Header) for header in headers):
            raise ValueError("\n".join(unclear))
        for text in unclear:
            print(f"rejected: {text}")
        if intake:
            Taking(intake, sheets, shapes, headers, never).all()
            return
        columns: dict[str, str] = {}
        for header in headers:
            if isinstance(header, Header):
                for name in header.names:
                    columns.setdefault(name.casefold(), name)
        fields = [(name, pa.string()) for name in columns.values()]
        schema = pa.schema([("sheet", pa.string()), ("row", pa.int64()), *fields])
        if any(headers):
            self.publish(MANIFEST.topic[0], schema.empty_table())
        for sheet, shape, found in zip(sheets, shapes, headers, strict=True):
            if found:
                rows = shape.kept if shape.kept is not None else sheet.rows()
                self.publish_sheet(sheet, judged(rows, found, never), found, columns, schema)
            sheet.print_notes()

    def publish_sheet(
        self,
        sheet: Sheet,
        rows: Iterator[tuple[Row, str]],
        header: Header | str,
        columns: dict[str, str],
        schema: pa.Schema,
    ) -> None:
        """Publish a sheet's rows; topic columns that the sheet does not have are null."""
        own: dict[str, int] = {}
        if isinstance(header, Header):
            own = {n.casefold(): p for n, p in zip(header.names, header.places, strict=True)}
        places = [own.get(key, -1) for key in columns]
        name = printable(sheet.name)

        def size(item: tuple[Row, str]) -> int:
            return sum(map(len, item[0].cells.values())) + 8 * len(places)

        for batch in batches(rows, size, rows=2000):
            good = [row for row, reason in batch if not reason]
            if good:
                cells = [[row.cells.get(p) for row in good] for p in places]
                data = [[name] * len(good), [row.number for row in good], *cells]
                arrays = [pa.array(*column) for column in zip(data, schema.types, strict=True)]
                self.publish(MANIFEST.topic[0], pa.Table.from_arrays(arrays, schema=schema))
            rejects = [reject(name, row, reason) for row, reason in batch if reason]
            if rejects:
                self.publish(MANIFEST.topic[1], pa.Table.from_pylist(rejects, schema=REJECTS))


class Taking:
    """Hands a workbook's sheets to the intake, which types and publishes them by the contract."""

    def __init__(
        self,
        intake: Intake,
        sheets: list[Sheet],
        shapes: list[Shape],
        headers: list[Header | str | None],
        never: bool,
    ) -> None:
        self._intake = intake
        self._parts = [
            (sheet, shape, header)
            for sheet, shape, header in zip(sheets, shapes, headers, strict=True)
            if header
        ]
        self._headers = [header for *_, header in self._parts if isinstance(header, Header)]
        self._never = never
        self._columns = intake.contract.columns if intake.contract else ()
        self._last: list[tuple[str, list[str | None] | None]] = []
        """The last rows as lines, and the cells of those that look like rows of the table."""

    def all(self) -> None:
        """Take in all sheets; columns that a sheet does not have are null in its rows."""
        intake = self._intake
        for header in self._headers:
            intake.check(header.names)
        names = list(dict.fromkeys(name for header in self._headers for name in header.names))
        if not names:
            intake.finish(0, {})
            return
        intake.start(names)
        count, record = 0, 0
        for sheet, shape, header in self._parts:
            rows = shape.kept if shape.kept is not None else sheet.rows()
            if isinstance(header, Header):
                first = header.rows[0].number if header.rows else 0
                above = [row for row in shape.head if row.number < first]
                intake.skip("preamble", [line_of(row) for row in above])
                of_name = {column.name: column for column in self._columns}
                own = dict(zip(header.names, header.places, strict=True))
                places = [(own.get(name, -1), of_name.get(name)) for name in names]
                intake.check_above(
                    [(line_of(row), [cell_of(row, *place) for place in places]) for row in above],
                    first,
                )
                count -= sum(first <= row.number <= header.last for row in shape.head)
            count += shape.rows
            record = self._take(rows, header, names, record)
            sheet.print_notes()
        intake.finish(count, self._facts(names))

    def _take(
        self, rows: Iterable[Row], header: Header | str, names: list[str], record: int
    ) -> int:
        """Take in a sheet's rows; returns how many records there are so far."""
        intake, ended = self._intake, False
        of_name = {column.name: column for column in self._columns}
        own = (
            dict(zip(header.names, header.places, strict=True))
            if isinstance(header, Header)
            else {}
        )
        places = [(own.get(name, -1), of_name.get(name)) for name in names]
        pairs = judged(rows, header, self._never, every=True)
        for some in batches(pairs, lambda pair: sum(map(len, pair[0].cells.values())), rows=2000):
            end = 0 if ended else intake.first("footer", [line_of(row) for row, _ in some])
            ended = end >= 0
            batch = some[:end] if ended else some
            below = [row for row, _ in some[len(batch) :]]
            intake.skip("footer", [line_of(row) for row in below])
            below = [row for row, reason in some[len(batch) :] if reason != AGAIN]
            cells = [[cell_of(row, at, column) for row in below] for at, column in places]
            intake.check_below(
                [pa.array(column, pa.string()) for column in cells],
                [row.number for row in below],
                [line_of(row) for row in below],
            )
            good, faults = [], []
            for number, (row, reason) in enumerate(batch, start=record + 1):
                raw = raw_of(row)
                if reason in (AGAIN, EMPTY):
                    intake.skip("header" if reason == AGAIN else "empty", [line_of(row)])
                elif reason:
                    where = ", ".join(place(row.number, column) for column in row.bad)
                    faults.append(
                        (row.number, number, f"{where}: {reason}" if where else reason, raw)
                    )
                else:
                    cells = [cell_of(row, at, column) for at, column in places]
                    good.append((row.number, number, cells, raw))
            intake.rows(len(names), good, faults)
            record += len(batch)
            last = [
                (
                    line_of(row),
                    [cell_of(row, at, column) for at, column in places]
                    if len(row.cells) > 1 or len(names) < 3
                    else None,
                )
                for row, _ in batch
            ]
            self._last = last or self._last
        return record

    def _facts(self, names: list[str]) -> dict[str, Any]:
        """What a survey tells of the workbook besides its rows."""
        first = self._headers[0]
        dialect = {} if first.rows else {"header_line": "none"}
        suggest = {}
        if self._intake.skipped["preamble"] and first.rows:
            suggest["header"] = label(line_of(first.rows[-1]), ";", 2)
        suggest["footer"] = self._intake.footer_of(self._last, ";")
        return {
            "reader": "excel_sheets",
            "encoding": "",
            "dialect": dialect,
            "header_line": first.last,
            "names": names,
            "sheets": [sheet.name for sheet, *_ in self._parts],
            "suggest": {word: text for word, text in suggest.items() if text},
        }


def line_of(row: Row) -> str:
    """A row as a contract's regular expressions see it: its cells, with `;` between them."""
    return ";".join(row.cells.get(column, "") for column in range(row.filled.bit_length()))


def cell_of(row: Row, place: int, column: Column | None) -> str | None:
    """A cell as its column's text: a number or a date is written in the column's notation.

    What cannot be written so without a change stays as it is stored, and the column rejects it.
    """
    text = row.cells.get(place)
    if text is None or column is None or not row.typed >> place & 1:
        return text
    kind = kind_of(column.type)
    if kind in ("integer", "decimal", "double") and NUMBERISH.fullmatch(text) and text[-1] != "e":
        plain = format(Decimal(text), "f") if kind == "decimal" else text
        return plain.replace(".", column.decimal)
    if kind == "boolean" and text in ("true", "false"):
        said = column.true if text == "true" else column.false
        return said[0] if said else text
    if kind not in ("date", "time", "timestamp"):
        return text
    try:
        moment = (
            datetime.time.fromisoformat(text) if kind == "time"
            else datetime.datetime.fromisoformat(text)
        )  # fmt: skip
    except ValueError:
        return text
    if kind == "date" and text.endswith("T00:00:00"):
        text = text[:10]
    elif kind == "timestamp" and len(text) == 10:
        text += "T00:00:00"
    return in_format(moment, column.format) or text if column.format else text


def in_format(moment: datetime.datetime | datetime.time, form: str) -> str:
    """The moment in a format of strftime; empty if the format leaves something of it out."""
    text = moment.strftime(form)
    again = datetime.datetime.strptime(text, form.replace("%-", "%"))
    same = again.time() if isinstance(moment, datetime.time) else again
    return text if same == moment else ""


def raw_of(row: Row) -> str:
    """The row's cells as JSON."""
    raw = {letters(column): text for column, text in sorted(row.cells.items())}
    return json.dumps(raw, ensure_ascii=False)


def reject(sheet: str, row: Row, reason: str) -> dict[str, Any]:
    return {
        "sheet": sheet,
        "row": row.number,
        "cell": ", ".join(place(row.number, column) for column in row.bad),
        "reason": reason,
        "raw": raw_of(row),
    }


def judged(
    rows: Iterable[Row], header: Header | str, never: bool, *, every: bool = False
) -> Iterator[tuple[Row, str]]:
    """The rows below the header, each with the reason to reject it, or an empty string.

    Args:
        every: also those of which nothing remains.
    """
    empty = MANIFEST.options["formulas"] == "empty"
    for row in rows:
        if isinstance(header, str):
            yield row._replace(bad={}), header
        elif row.number > header.last:
            bad = {**row.bad, **dict.fromkeys(row.zeros if never else (), NEVER)}
            cells = row.cells
            if empty:
                drop = {column for column, why in bad.items() if why in (NEVER, UNCALCULATED)}
                cells = {column: text for column, text in cells.items() if column not in drop}
                bad = {column: why for column, why in bad.items() if column not in drop}
            reason = "; ".join(dict.fromkeys(bad.values()))
            if not reason and len(cells) > 1 and cells == header.cells:
                reason = AGAIN
            if every and not cells and not reason:
                reason = EMPTY
            if cells or reason:
                yield row._replace(cells=cells, bad=bad), reason


def wanted(book: Book, intake: Intake | None) -> list[Sheet]:
    """The sheets that are to be read.

    Raises:
        ValueError: there are none.
    """
    if not book.sheets:
        raise ValueError("the workbook has no worksheet")
    chosen = intake.dialect.get("sheet", "") if intake else str(MANIFEST.options["sheets"])
    globs = [chosen] if intake else [glob.strip() for glob in chosen.split(",")]
    sheets = [
        sheet for sheet in book.sheets
        if not chosen or any(sheet.name == glob or fnmatchcase(sheet.name, glob) for glob in globs)
    ]  # fmt: skip
    if not sheets:
        names = ", ".join(repr(sheet.name) for sheet in book.sheets[:20]) or "none"
        raise ValueError(f"no sheet is named {chosen!r}; the sheets are: {names}")
    return sheets


def how_to_settle(sheet: Sheet, file: str, rows: tuple[int, ...], intake: Intake | None) -> str:
    if intake:
        lines = " or ".join(f"header_line={row}" for row in rows or ("N",))
        return f"the table's dialect can say it: {lines}, header_line=none, or sheet={sheet.name!r}"
    choices = [f"header_row={row}" for row in (*(rows or ("N",)), 0)]
    return (
        f"say which row it is: {own_publish('excel_sheets', file, *choices)}, where there is no "
        f"header; if {sheet.name!r} is not a table, say which sheets are: --option sheets=..."
    )


@cache
def letters(column: int) -> str:
    text, column = "", column + 1
    while column:
        column, rest = divmod(column - 1, 26)
        text = chr(65 + rest) + text
    return text


def place(row: int, column: int) -> str:
    return f"{letters(column)}{row}"


# Where the table begins


def read_shape(sheet: Sheet, file: str) -> Shape:
    """Read a sheet once, to learn its shape.

    Raises:
        ValueError: its cells are too far apart to be a table.
    """
    shape = Shape()
    low = high = 0
    for row in sheet.rows():
        shape.rows += 1
        shape.cells += len(row.cells)
        shape.last = max(shape.last, row.number)
        low, high = min(low or row.number, row.number), high | row.filled
        if shape.rows <= HEAD_ROWS:
            shape.head.append(row)
        if shape.kept is not None:
            shape.kept.append(row)
            if shape.cells > KEPT_CELLS:
                shape.kept = None
        pattern = (row.filled, row.typed)
        if pattern not in shape.patterns and len(shape.patterns) >= PATTERNS:
            shape.rest |= row.filled
            pattern = (0, 0)
        shape.patterns[pattern] += 1
    left, right = (high & -high).bit_length() - 1, high.bit_length() - 1
    height, width = shape.last - low + 1, right - left + 1
    if height * width > max(SPARSE_CELLS, 100 * shape.cells):
        raise ValueError(
            f"sheet {sheet.name!r} spans {place(low, left)}:{place(shape.last, right)}, "
            f"{height:,} rows by {width:,} columns, and only {shape.cells:,} of these "
            f"{height * width:,} cells have a value: that is not a table. Delete the cells far "
            "from the table, or say which sheets to read: "
            f"{own_publish('excel_sheets', file, 'sheets=...')}"
        )
    return shape


def header_of(sheet: Sheet, shape: Shape, intake: Intake | None) -> Header:
    """Find where a sheet's table begins and name its columns; guesses are logged.

    Raises:
        Unclear: several rows may be the header, or no row looks like one.
    """
    chosen = said_row(shape, intake) if intake else int(MANIFEST.options["header_row"])
    if chosen == 0:
        return columns_of(sheet, shape, [])
    if chosen > 0:
        start = end = next((i for i, row in enumerate(shape.head) if row.number == chosen), -1)
        if start < 0:
            raise Unclear(f"sheet {sheet.name!r} has nothing in row {chosen}, or too much above it")
        why = ""
    else:
        start, why = find_header(sheet, shape)
        end = header_end(sheet, shape, start)
        start = group_start(sheet, shape, start)
    rows = shape.head[start : end + 1]
    header = columns_of(sheet, shape, rows)
    if chosen < 0 and (why or start or len(rows) > 1):
        merged = f" to {rows[-1].number}, by merged cells" if len(rows) > 1 else ""
        why = f" ({why})" if why else ""
        print(f"guessed: the header of sheet {sheet.name!r} is row {rows[0].number}{merged}{why}")
    for row in shape.head[:start]:
        print(
            f"skipped: sheet {sheet.name!r} row {row.number}, above the header: {shown(row, 300)}"
        )
    if header.unnamed:
        columns = ", ".join(letters(column) for column in header.unnamed[:10])
        print(f"sheet {sheet.name!r} has {len(header.unnamed)} columns without a header: {columns}")
    return header


def said_row(shape: Shape, intake: Intake) -> int:
    """The row of the header by the contract, or by its columns; 0: there is none; -1: not said."""
    if line := intake.dialect.get("header_line", ""):
        return 0 if line == "none" else int(line)
    if "header" in intake.dialect:
        found = intake.first("header", [line_of(row) for row in shape.head])
        if found < 0:
            raise Unclear(f"none of its first {HEAD_ROWS} rows matches the header")
        return shape.head[found].number
    known = intake.known_names()
    for row in shape.head if known else ():
        names = column_names([row.cells.get(place) for place in range(row.filled.bit_length())])
        if known <= set(names):
            return row.number
    return -1


def find_header(sheet: Sheet, shape: Shape) -> tuple[int, str]:
    """The index of the header among the first rows, and the reason if it is a guess."""
    if len(shape.head) == 1 and header_like(shape, 0):
        return 0, ""
    start, why = candidate(sheet, shape)
    if start is None:
        raise Unclear(
            f"the header of sheet {sheet.name!r} is not clear: no row near its top holds "
            f"names, and only names, for the columns below it (row {shape.head[0].number}: "
            f"{shown(shape.head[0])})",
            shape.head[0].number,
        )
    header = shape.head[start]
    width = covers(sheet, header).bit_count()
    for row in shape.head[: group_start(sheet, shape, start)]:
        if len(row.cells) > min(2, width / 2):
            raise Unclear(
                f"the header of sheet {sheet.name!r} is not clear: it may be row {row.number} "
                f"({shown(row)}) or row {header.number} ({shown(header)})",
                row.number,
                header.number,
            )
    differs = contrast(shape, start)
    if start and not why and not differs and not apart(sheet, shape, start, width):
        raise Unclear(
            f"the header of sheet {sheet.name!r} is not clear: row {header.number} "
            f"({shown(header)}) looks like the rows around it",
            header.number,
        )
    if not why and start:
        why = f"{start} narrow rows above it"
    if not differs and shape.rows > 1:
        why += f"{why and '; '}below it is text too, so it may be a row like the others"
    return start, why


def candidate(sheet: Sheet, shape: Shape) -> tuple[int | None, str]:
    """The first row of names whose columns contain all cells below it, or else the first row of
    names that is wide enough; and the reason if it is the second."""
    whole, wide = None, None
    half = middle_width(shape) / 2
    for i, row in enumerate(shape.head[: TITLE_ROWS + 1]):
        cover = covers(sheet, row).bit_count()
        if cover < half or not header_like(shape, i):
            continue
        if whole is None and below(shape, i) and fits(sheet, shape, i) == below(shape, i):
            whole = i
        if wide is None and len(row.cells) >= max(2, half):
            wide = i
    if wide is None or (whole is not None and whole <= wide):
        return whole, ""
    if whole is not None:
        first, second = shape.head[wide], shape.head[whole]
        joined = second.number - first.number == whole - wide and not contrast(shape, whole)
        narrower = len(second.cells) <= len(first.cells)
        if not joined and not narrower and fits(sheet, shape, wide) < 0.9 * below(shape, wide):
            return whole, ""
    return wide, "some cells lie outside its columns" if below(shape, wide) else "no row follows"


def middle_width(shape: Shape) -> int:
    """The median number of cells of a row."""
    widths = Counter[int]()
    for (filled, _), count in shape.patterns.items():
        widths[filled.bit_count()] += count
    before = 0
    for width in sorted(widths):
        before += widths[width]
        if before * 2 >= shape.rows:
            return width
    return 0


def shown(row: Row, limit: int = 100) -> str:
    return " | ".join(row.cells[column] for column in sorted(row.cells))[:limit]


NUMBERISH = re.compile(r"[-+]?[\d.,]*\d[\d.,]*([eE][-+]?\d+)?%?|true|false")
YEARISH = re.compile(r"(19|20)\d\d|\d{4}-\d\d-\d\d(T00:00:00)?|Q[1-4]")


def header_like(shape: Shape, i: int) -> bool:
    """Whether a row has only names. Years and dates count as names unless the next row has one
    in the same column."""
    row = shape.head[i]
    follows = shape.head[i + 1] if i + 1 < len(shape.head) else None
    if row.bad:
        return False
    for column, text in row.cells.items():
        if len(text) > 500:
            return False
        if row.typed >> column & 1 or NUMBERISH.fullmatch(text):
            after = follows.cells.get(column, "") if follows else ""
            if not YEARISH.fullmatch(text) or YEARISH.fullmatch(after):
                return False
    return bool(row.cells)


def covers(sheet: Sheet, row: Row) -> int:
    """Bit mask of the columns that a header row names, including those of its merged cells."""
    bits = row.filled
    if len(row.cells) > 1:
        for top, left, _, right in sheet.merges:
            if top == row.number:
                bits |= (2 << right) - (1 << left)
    return bits


def below(shape: Shape, i: int) -> int:
    return shape.rows - i - 1


def fits(sheet: Sheet, shape: Shape, i: int) -> int:
    """How many of the rows below a row have cells only in the columns that it names."""
    outside = ~covers(sheet, shape.head[i])
    count = sum(n for (filled, _), n in shape.patterns.items() if not filled & outside)
    return count - sum(not row.filled & outside for row in shape.head[: i + 1])


def contrast(shape: Shape, start: int) -> bool:
    """Whether a column with a text header has mostly numbers, dates or similar below it."""
    header = shape.head[start]
    for column in header.cells:
        if header.typed >> column & 1:
            continue
        above = shape.head[: start + 1]
        bit = 1 << column
        filled = sum(n for (f, _), n in shape.patterns.items() if f & bit)
        typed = sum(n for (_, t), n in shape.patterns.items() if t & bit)
        filled -= sum(bool(row.filled & bit) for row in above)
        typed -= sum(bool(row.typed & bit) for row in above)
        if typed and typed * 2 >= filled:
            return True
    return False


def apart(sheet: Sheet, shape: Shape, start: int, width: int) -> bool:
    """Whether rows above the header are separated from it by a gap, a merge, or their width."""
    above = shape.head[:start]
    if shape.head[start].number - above[-1].number > 1:
        return True
    numbers = {row.number for row in above}
    if any(top in numbers and right > left for top, left, _, right in sheet.merges):
        return True
    narrow = sum(n for (filled, _), n in shape.patterns.items() if filled.bit_count() == 1)
    ones = sum(len(row.cells) == 1 for row in above)
    return width > 2 and ones == len(above) and (narrow - ones) * 5 <= below(shape, start)


def group_start(sheet: Sheet, shape: Shape, start: int) -> int:
    """The first of the rows directly above the header whose merged cells group its columns."""
    whole = covers(sheet, shape.head[start])
    while start and any(
        top == bottom == shape.head[start - 1].number == shape.head[start].number - 1
        and left < right
        and left in shape.head[start - 1].cells
        and whole & ~((2 << right) - (1 << left))
        for top, left, bottom, right in sheet.merges
    ):
        start -= 1
    return start


def header_end(sheet: Sheet, shape: Shape, start: int) -> int:
    """The index of the header's last row; merged cells may extend it over several rows."""
    row = shape.head[start]
    if len(row.cells) < 2:
        return start
    first = end = row.number
    for top, _, bottom, _ in sorted(sheet.merges):
        if first <= top <= end and bottom < first + TITLE_ROWS:
            end = max(end, bottom)
    follows = shape.head[start + 1] if start + 1 < len(shape.head) else None
    if follows and end == first and follows.number == first + 1:
        spans = [(left, right) for top, left, _, right in sheet.merges if top == first]
        spans = [(a, b) for a, b in spans if len({*range(a, b + 1)} & follows.cells.keys()) > 1]
        if spans and header_like(shape, start + 1):
            if not contrast(shape, start + 1):
                raise Unclear(
                    f"where the header of sheet {sheet.name!r} ends is not clear: row {first} has "
                    f"merged cells, and row {first + 1} ({shown(follows)}) may be names or data"
                )
            end = first + 1
    return max(i for i, row in enumerate(shape.head) if row.number <= end)


def columns_of(sheet: Sheet, shape: Shape, rows: list[Row]) -> Header:
    """The columns that have a name in the header's rows, or a cell below them."""
    last = rows[-1].number if rows else 0
    patterns = Counter(shape.patterns)
    patterns.subtract((row.filled, row.typed) for row in shape.head if row.number <= last)
    used = shape.rest
    for (filled, _), count in patterns.items():
        used |= filled if count > 0 else 0
    texts = header_texts(sheet, shape, rows)
    for column in texts:
        used |= 1 << column
    cells = [texts.get(column) for column in range(used.bit_length())]
    names = column_names(cells, taken=("sheet", "row"))
    places = [column for column in range(len(names)) if used >> column & 1]
    unnamed = [column for column in places if rows and not texts.get(column)]
    shown = rows[-1].cells if rows else {}
    return Header(last, places, [names[place] for place in places], shown, unnamed, rows)


def header_texts(sheet: Sheet, shape: Shape, rows: list[Row]) -> dict[int, str]:
    """The header text of each column; a merged cell's text counts in all its rows and columns."""
    grid = {row.number: dict(row.cells) for row in rows}
    anchors = {row.number: row.cells for row in shape.head}
    for top, left, bottom, right in sheet.merges:
        text = anchors.get(top, {}).get(left)
        reached = [number for number in grid if top <= number <= bottom]
        if text and (len(rows) > 1 or top < bottom):
            for number in reached:
                grid[number].update(dict.fromkeys(range(left, right + 1), text))
    texts: dict[int, dict[str, None]] = {}
    for number in sorted(grid):
        for column, text in grid[number].items():
            texts.setdefault(column, {})[" ".join(text.split())] = None
    return {column: " ".join(filter(None, lines)) for column, lines in texts.items()}


# Cell values


def number_text(raw: str) -> str:
    """A stored number as text: whole numbers in digits, fractions in the shortest exact form.

    Raises:
        ValueError: the text is not a number, or not one that a workbook can hold.
    """
    if raw.isascii() and raw.isdigit() and len(raw) < 300:
        return raw.lstrip("0") or "0"
    try:
        value = Decimal(raw.strip())
    except InvalidOperation:
        raise ValueError(f"{raw[:40]!r} is not a number") from None
    if not value.is_finite() or len(raw) > 400 or value.adjusted() > 308:
        raise ValueError(f"{raw[:40]!r} is not a number that a workbook can contain")
    if value.adjusted() >= -1 and value == int(value):
        return str(int(value))
    if not value:
        return "0"
    short = float(value)
    if len(value.as_tuple().digits) > 17 or not short:
        return raw.strip()
    return str(int(short)) if short.is_integer() else repr(short)


@cache
def format_kind(code: str) -> str:
    """The kind of a number format: 'date', 'time', 'datetime', 'duration', or '' for others."""
    code = re.sub(r'"[^"]*"|\\.|_.|\*.', "", code).split(";")[0].lower()
    if re.search(r"\[(h+|m+|s+)\]", code):
        return "duration"
    code = re.sub(r"\[[^\]]*\]|general|am/pm|a/p", "", code)
    if re.search(r"[0#?]", re.sub(r"s\.0+|ss?0+", "s", code)):
        return ""
    time = bool(re.search("[hs]", code))
    date = bool(re.search("[dy]", code)) or ("m" in code and not time)
    return ("date" * date + "time" * time) or ""


BUILT_IN = {
    **dict.fromkeys([14, 15, 16, 17, *range(27, 32), 36, *range(50, 59)], "date"),
    **dict.fromkeys([18, 19, 20, 21, 32, 33, 34, 35, 45, 47], "time"),
    22: "datetime",
    46: "duration",
}


def moment_text(raw: str, kind: str, base_1904: bool) -> str | None:
    """A stored number as the date, time or duration that its format shows; None if out of range."""
    days = float(raw)
    micros = round_moment(Decimal(raw), days)
    if kind == "duration":
        return duration_text(micros)
    if kind == "time" and 0 <= micros < 86_400_000_000:
        return (datetime.datetime.min + datetime.timedelta(microseconds=micros)).time().isoformat()
    if not (0 if base_1904 else 1) <= days < 2_958_466 or (not base_1904 and 60 <= days < 61):
        return None
    base = datetime.datetime(1904, 1, 1) if base_1904 else datetime.datetime(1899, 12, 30)
    if not base_1904 and days < 60:
        base += datetime.timedelta(days=1)
    try:
        moment = base + datetime.timedelta(microseconds=micros)
    except OverflowError:
        return None
    whole = kind == "date" and not micros % 86_400_000_000
    return moment.date().isoformat() if whole else moment.isoformat()


def round_moment(stored: Decimal, days: float) -> int:
    """Days as microseconds: whole seconds or milliseconds if the stored digits allow it, because
    1/86400 has no finite decimal form.

    Programs write at least 15 digits, without trailing zeros.
    """
    exact = stored * 86_400_000_000
    digits = min(max(-int(stored.as_tuple().exponent), 14 - stored.adjusted()), 30)
    slack = (
        Decimal(5).scaleb(-digits - 1) + Decimal(abs(days)) * Decimal(2) ** -53
    ) * 86_400_000_000
    for step in (1_000_000, 1_000):
        micros = int((exact / step).to_integral_value()) * step
        if abs(micros - exact) <= slack:
            return micros
    return int(exact.to_integral_value())


def duration_text(micros: int) -> str:
    seconds, rest = divmod(abs(micros), 1_000_000)
    text = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return f"{'-' * (micros < 0)}{text}{f'.{rest:06}' if rest else ''}"


class Formats:
    """The cell formats of a workbook."""

    def __init__(self) -> None:
        self.codes: dict[int, str] = {}
        self.cells: list[int] = []
        self.kinds: dict[int, str] = {}
        self.base_1904 = False

    def kind(self, index: int) -> str:
        if index not in self.kinds:
            number = self.cells[index] if 0 <= index < len(self.cells) else 0
            code = self.codes.get(number)
            self.kinds[index] = BUILT_IN.get(number, "") if code is None else format_kind(code)
        return self.kinds[index]


class Cells:
    """Collects the cells of one row after another."""

    def __init__(self, sheet: Sheet, formats: Formats) -> None:
        self.sheet = sheet
        self.formats = formats
        self.start(0)

    def start(self, number: int) -> None:
        if number > ROWS:
            raise ValueError(f"sheet {self.sheet.name!r} has a row {number:,}: it is damaged")
        self.number = number
        self.cells: dict[int, str] = {}
        self.typed = 0
        self.bad: dict[int, str] = {}
        self.zeros: list[int] = []

    def row(self) -> Row | None:
        """The current row, or None if it is empty."""
        if not self.cells and not self.bad:
            return None
        filled = 0
        for column in (*self.cells, *self.bad):
            filled |= 1 << column
        return Row(self.number, self.cells, filled, self.typed, self.bad, tuple(self.zeros))

    def put(self, column: int, text: str, typed: bool = True) -> None:
        if not text:
            return
        self.check(column)
        if column in self.cells:
            self.fault(column, "the cell is defined twice")
        self.cells[column] = text
        if typed:
            self.typed |= 1 << column

    def text(self, column: int, text: str) -> None:
        self.put(column, printable(text), typed=False)

    def error(self, column: int, text: str) -> None:
        self.sheet.note("error values, as text", self.number, column, text)
        self.put(column, printable(text))

    def number_of(self, column: int, raw: str, style: int, formula: bool = False) -> None:
        try:
            text = number_text(raw)
        except ValueError as error:
            self.fault(column, str(error))
            return
        if formula:
            self.sheet.formulas += 1
            if text == "0":
                self.sheet.zeros += 1
                self.zeros.append(column)
        if kind := self.formats.kind(style):
            moment = moment_text(raw, kind, self.formats.base_1904)
            if moment is None:
                what = "numbers that are formatted as dates but are not dates, as numbers"
                self.sheet.note(what, self.number, column, text)
            text = moment or text
        self.put(column, text)

    def fault(self, column: int, reason: str) -> None:
        self.check(column)
        self.bad.setdefault(column, reason)

    def check(self, column: int) -> None:
        if not 0 <= column < COLUMNS:
            raise ValueError(
                f"sheet {self.sheet.name!r} has a column {column + 1:,}: it is damaged"
            )


# Opening a workbook


def open_book(file: IO[bytes]) -> Book:
    """Open a workbook of any format, which is recognised by its bytes.

    Raises:
        ValueError: the file is not a workbook, or cannot be read; the message says what it is.
    """
    start = file.read(4096)
    file.seek(0)
    if start.startswith(b"PK"):
        try:
            return open_zip(zipfile.ZipFile(file))
        except (zipfile.BadZipFile, KeyError, NotImplementedError, OSError) as error:
            raise damaged(error) from error
    if start.startswith((b"\xd0\xcf\x11\xe0", b"\x09\x08", b"\x09\x04", b"\x09\x02", b"\x09\x00")):
        return open_xls(file)
    what = foreign_kind(start)
    if not what and b"\0" not in start:
        what = (
            "text, not a workbook: the plugin `delimited` reads it if its name ends in .csv or .txt"
        )
    raise ValueError(f"this is {what or 'not a workbook: it is neither XLSX, XLSB, XLS nor ODS'}")


def damaged(error: object) -> ValueError:
    return ValueError(f"the workbook cannot be read; it may be damaged: {error}")


def open_zip(pack: zipfile.ZipFile) -> Book:
    entries = {
        info.filename.replace("\\", "/").lstrip("/").lower(): info for info in pack.infolist()
    }
    unpacked = sum(info.file_size for info in entries.values())
    packed = sum(info.compress_size for info in entries.values())
    if unpacked > UNPACKED_BYTES or (unpacked > 200 << 20 and unpacked > 300 * packed):
        raise ValueError(
            f"the workbook unpacks from {packed:,} to {unpacked:,} bytes: it is too large to read, "
            "or made to fill the memory"
        )
    if any(info.flag_bits & 1 for info in entries.values()):
        raise ValueError("the workbook is protected by a password")
    parts = Parts(pack, entries)
    if "content.xml" in entries:
        return open_ods(parts)
    for target in parts.related("", "/officedocument"):
        if target.endswith(".bin"):
            return open_xlsb(parts, target)
        if target.startswith("word/") or target.startswith("ppt/"):
            kind = "Word document" if target.startswith("word/") else "PowerPoint presentation"
            raise ValueError(f"this is a {kind}, not a workbook")
        return open_xlsx(parts, target)
    names = ", ".join(list(entries)[:3])
    raise ValueError(f"this is a ZIP archive, not a workbook; it holds {names or 'nothing'}")


class Parts:
    """The files in a workbook that is a ZIP archive."""

    def __init__(self, pack: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]) -> None:
        self.pack = pack
        self.entries = entries

    def open(self, name: str) -> IO[bytes]:
        info = self.entries.get(name.lower())
        if info is None:
            raise damaged(f"it has no {name}")
        return self.pack.open(info)

    def links(self, name: str) -> dict[str, tuple[str, str]]:
        """A part's relationships: id -> kind and target part, both in lower case."""
        folder, _, base = name.rpartition("/")
        rels = part_name(folder, f"_rels/{base}.rels").lower()
        links: dict[str, tuple[str, str]] = {}
        for tag, attrs in elements(self.open(rels)) if rels in self.entries else ():
            if tag == "Relationship" and attrs.get("TargetMode") != "External":
                path = part_name(folder, attrs.get("Target", "").replace("\\", "/"))
                links[attrs.get("Id", "")] = (attrs.get("Type", "").lower(), path.lower())
        return links

    def related(self, name: str, kind: str) -> list[str]:
        return [path for link, path in self.links(name).values() if link.endswith(kind)]


def part_name(folder: str, target: str) -> str:
    """Resolve a part's name, which is relative to a folder or starts at the root."""
    parts: list[str] = []
    for part in target.split("/") if target.startswith("/") else f"{folder}/{target}".split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


class LocalNames(dict[str, str]):
    """Caches XML names without their namespace."""

    def __missing__(self, name: str) -> str:
        local = self[name] = name.rpartition("|")[2]
        return local


LOCAL = LocalNames()


def elements(stream: IO[bytes]) -> Iterator[tuple[str, dict[str, str]]]:
    """The elements of an XML part: tag and attributes at the start, `/tag` at the end."""
    found: list[tuple[str, dict[str, str]]] = []
    for _ in pieces(
        stream,
        lambda name, attrs: found.append((LOCAL[name], attrs)),
        lambda name: found.append((f"/{LOCAL[name]}", {})),
    ):
        yield from found
        found.clear()


def pieces(
    stream: IO[bytes],
    start: Callable[[str, dict[str, str]], None],
    end: Callable[[str], None],
    text: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Parse XML in pieces. Handlers get names with their namespace; LOCAL removes it."""
    LOCAL.clear()
    parser = expat.ParserCreate(namespace_separator="|")
    parser.buffer_text = True
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = refuse_doctype
    fed = 0
    with stream:
        while piece := stream.read(CHUNK):
            parser.Parse(piece, False)
            fed += len(piece)
            if fed - parser.CurrentByteIndex > CELL_CHARACTERS + CHUNK:
                raise damaged("a piece of its XML has no end")
            yield
        parser.Parse(b"", True)
        yield


def refuse_doctype(*_: Any) -> None:
    raise damaged("its XML declares a document type, which workbooks never do")


# XLSX and XLSM


def open_xlsx(parts: Parts, name: str) -> Book:
    formats, links, book = Formats(), parts.links(name), Book([])
    sheets: list[tuple[str, str]] = []
    for tag, attrs in elements(parts.open(name)):
        if tag == "workbookPr":
            formats.base_1904 = attrs.get("date1904") in ("1", "true")
        elif tag == "calcPr":
            book.recalculate = attrs.get("fullCalcOnLoad") in ("1", "true")
        elif tag == "sheet":
            link = next((attrs[key] for key in attrs if key.endswith("|id")), "")
            sheets.append((attrs.get("name", ""), link))
    for style in parts.related(name, "/styles"):
        read_styles(parts.open(style), formats)
    strings: list[str] = []
    for shared in parts.related(name, "/sharedstrings"):
        strings = shared_strings(parts.open(shared))
    for title, link in sheets:
        kind, path = links.get(link, ("", ""))
        if not kind:
            raise damaged(f"it has no part for its sheet {title!r}")
        if kind.endswith("/worksheet"):
            book.sheets.append(Sheet(title, partial(xlsx_rows, parts, path, formats, strings)))
    return book


def read_styles(stream: IO[bytes], formats: Formats) -> None:
    inside = False
    for tag, attrs in elements(stream):
        if tag in ("cellXfs", "/cellXfs"):
            inside = tag == "cellXfs"
        elif tag == "numFmt" and attrs.get("numFmtId", "").isdigit():
            formats.codes.setdefault(int(attrs["numFmtId"]), attrs.get("formatCode", ""))
        elif tag == "xf" and inside:
            number = attrs.get("numFmtId", "")
            formats.cells.append(int(number) if number.isdigit() else 0)


ESCAPE = re.compile(r"_x([0-9A-Fa-f]{4})_")


def unescaped(text: str) -> str:
    """Decode characters that XML cannot hold and that are written as `_x0007_`."""
    if "_x" not in text:
        return text
    text = ESCAPE.sub(lambda match: chr(int(match[1], 16)), text)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def too_many_strings() -> ValueError:
    return ValueError(
        f"the texts of the workbook take more than {STRINGS_BYTES:,} bytes of memory: split it"
    )


def shared_strings(stream: IO[bytes]) -> list[str]:
    strings: list[str] = []
    parts: list[str] = []
    on = phonetic = False
    size = 0

    def start(name: str, _: dict[str, str]) -> None:
        tag = LOCAL[name]
        nonlocal on, phonetic
        on = tag == "t" and not phonetic
        phonetic = phonetic or tag == "rPh"

    def text(data: str) -> None:
        nonlocal size
        if on:
            size += len(data)
            if size > STRINGS_BYTES:
                raise too_many_strings()
            parts.append(data)

    def end(name: str) -> None:
        tag = LOCAL[name]
        nonlocal on, phonetic, size
        on = False
        if tag == "rPh":
            phonetic = False
        elif tag == "si":
            strings.append(printable(unescaped("".join(parts))))
            parts.clear()
            size += 64
            if size > STRINGS_BYTES:
                raise too_many_strings()

    for _ in pieces(stream, start, end, text):
        pass
    return strings


@cache
def column_of(name: str) -> int:
    column = 0
    for letter in name.upper():
        column = column * 26 + ord(letter) - 64
    return column - 1


def xlsx_rows(
    parts: Parts, path: str, formats: Formats, strings: list[str], sheet: Sheet
) -> Iterator[Row]:
    reader = XlsxSheet(Cells(sheet, formats), strings)
    for _ in pieces(parts.open(path), reader.start, reader.end, reader.text):
        yield from reader.rows
        reader.rows.clear()


class XlsxSheet:
    """Handlers for an XML parser that turn a worksheet into rows."""

    def __init__(self, cells: Cells, strings: list[str]) -> None:
        self.cells = cells
        self.strings = strings
        self.rows: list[Row] = []
        self.column = -1
        self.cell: dict[str, str] | None = None
        self.formula = self.valued = self.on = self.phonetic = False
        self.parts: list[str] = []
        self.size = 0

    def start(self, name: str, attrs: dict[str, str]) -> None:
        tag = LOCAL[name]
        if tag == "c":
            self.cell = attrs
            ref = attrs.get("r", "").rstrip("0123456789")
            self.column = column_of(ref) if ref else self.column + 1
            self.formula = self.valued = False
            self.parts.clear()
            self.size = 0
        elif self.cell is not None:
            self.on = tag == "v" or (tag == "t" and not self.phonetic)
            self.valued = self.valued or tag in ("v", "is")
            self.formula = self.formula or tag == "f"
            self.phonetic = self.phonetic or tag == "rPh"
        elif tag == "row":
            number = attrs.get("r", "")
            self.cells.start(int(number) if number.isdigit() else self.cells.number + 1)
            self.column = -1
        elif tag == "mergeCell":
            match = re.fullmatch(
                r"([A-Z]{1,3})(\d{1,7}):([A-Z]{1,3})(\d{1,7})", attrs.get("ref", "")
            )
            if match:
                top, left = int(match[2]), column_of(match[1])
                self.cells.sheet.merges.append((top, left, int(match[4]), column_of(match[3])))

    def text(self, data: str) -> None:
        if self.on:
            self.parts.append(data)
            self.size += len(data)
            if self.size > CELL_CHARACTERS:
                raise damaged(f"cell {place(self.cells.number, self.column)} has no end")

    def end(self, name: str) -> None:
        tag = LOCAL[name]
        self.on = False
        if tag == "c":
            if self.cell is not None and (self.valued or self.formula):
                self.value(self.cell, "".join(self.parts))
            self.cell = None
        elif tag == "rPh":
            self.phonetic = False
        elif tag == "row" and (row := self.cells.row()):
            self.rows.append(row)

    def value(self, cell: dict[str, str], raw: str) -> None:
        cells, column = self.cells, self.column
        kind = cell.get("t", "n")
        if self.formula and kind != "n":
            cells.sheet.formulas += 1
        if self.formula and not raw and not (kind == "str" and self.valued):
            cells.fault(column, UNCALCULATED)
        elif kind == "s":
            index = int(raw) if raw.isascii() and raw.isdigit() else -1
            if not 0 <= index < len(self.strings):
                cells.fault(column, f"the workbook has no text {raw[:20]!r}")
            elif text := self.strings[index]:
                cells.put(column, text, typed=False)
        elif kind in ("str", "inlineStr"):
            cells.text(column, unescaped(raw))
        elif not raw.strip():
            return
        elif kind == "b":
            cells.put(column, "true" if raw.strip() in ("1", "true") else "false")
        elif kind == "e":
            cells.error(column, raw)
        elif kind == "d":
            cells.put(column, printable(raw))
        else:
            style = cell.get("s", "0")
            cells.number_of(column, raw, int(style) if style.isdigit() else 0, self.formula)


# XLSB


class Records:
    """The records of a part of a binary workbook."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        with self.stream as stream:
            while first := stream.read(1):
                kind = first[0]
                if kind & 0x80:
                    kind = kind & 0x7F | (self.byte() & 0x7F) << 7
                size = shift = 0
                while True:
                    byte = self.byte()
                    size |= (byte & 0x7F) << shift
                    shift += 7
                    if byte < 0x80 or shift == 28:
                        break
                if size > CELL_CHARACTERS:
                    raise damaged("a record of it has no end")
                data = stream.read(size)
                if len(data) < size:
                    raise damaged("a part of it ends within a record")
                yield kind, data

    def byte(self) -> int:
        data = self.stream.read(1)
        if not data:
            raise damaged("a part of it ends within a record")
        return data[0]


def wide(data: bytes, at: int) -> tuple[str, int]:
    """Read a text that is preceded by its length; returns it and the position after it."""
    (size,) = struct.unpack_from("<I", data, at)
    if size == 0xFFFFFFFF:
        return "", at + 4
    end = at + 4 + 2 * size
    if end > len(data):
        raise damaged("a text of it has no end")
    return data[at + 4 : end].decode("utf-16-le", "surrogatepass"), end


def open_xlsb(parts: Parts, name: str) -> Book:
    formats, links, book = Formats(), parts.links(name), Book([])
    strings = [
        text for part in parts.related(name, "/sharedstrings") for text in xlsb_strings(parts, part)
    ]
    for style in parts.related(name, "/styles"):
        xlsb_styles(parts, style, formats)
    for kind, data in Records(parts.open(name)):
        if kind == 153:  # BrtWbProp
            formats.base_1904 = bool(data[0] & 1)
        elif kind == 156:  # BrtBundleSh
            link, end = wide(data, 8)
            what, path = links.get(link, ("", ""))
            if what.endswith("/worksheet"):
                title = wide(data, end)[0]
                book.sheets.append(Sheet(title, partial(xlsb_rows, parts, path, formats, strings)))
    return book


def xlsb_strings(parts: Parts, name: str) -> Iterator[str]:
    size = 0
    for kind, data in Records(parts.open(name)):
        if kind == 19:  # BrtSSTItem
            yield printable(wide(data, 1)[0])
            size += len(data) + 64
            if size > STRINGS_BYTES:
                raise too_many_strings()


def xlsb_styles(parts: Parts, name: str, formats: Formats) -> None:
    inside = False
    for kind, data in Records(parts.open(name)):
        if kind == 44:  # BrtFmt
            formats.codes[struct.unpack_from("<H", data)[0]] = wide(data, 2)[0]
        elif kind in (617, 618):  # BrtBeginCellXFs, BrtEndCellXFs
            inside = kind == 617
        elif kind == 47 and inside:  # BrtXF
            formats.cells.append(struct.unpack_from("<H", data, 2)[0])


ERRORS = {
    0: "#NULL!", 7: "#DIV/0!", 15: "#VALUE!", 23: "#REF!", 29: "#NAME?", 36: "#NUM!", 42: "#N/A",
    43: "#GETTING_DATA",
}  # fmt: skip


def error_name(code: int) -> str:
    return ERRORS.get(code, f"#ERROR {code}")


def rk_number(data: bytes) -> str:
    """A number in the four bytes of the RK format."""
    (bits,) = struct.unpack("<i", data)
    if bits & 2:
        number: float = bits >> 2
    else:
        (number,) = struct.unpack("<d", b"\0\0\0\0" + struct.pack("<i", bits & ~3))
    return repr(number / 100 if bits & 1 else number)


def xlsb_rows(
    parts: Parts, path: str, formats: Formats, strings: list[str], sheet: Sheet
) -> Iterator[Row]:
    cells = Cells(sheet, formats)
    for kind, data in Records(parts.open(path)):
        if kind == 0:  # BrtRowHdr
            if row := cells.row():
                yield row
            cells.start(struct.unpack_from("<I", data)[0] + 1)
        elif 2 <= kind <= 11:
            column, style = struct.unpack_from("<II", data)
            xlsb_cell(cells, kind, column, style & 0xFFFFFF, data, strings)
        elif kind == 62:  # BrtCellRString
            cells.text(struct.unpack_from("<I", data)[0], wide(data, 9)[0])
        elif kind == 176:  # BrtMergeCell
            top, bottom, left, right = struct.unpack_from("<IIII", data)
            sheet.merges.append((top + 1, left, bottom + 1, right))
    if row := cells.row():
        yield row


def xlsb_cell(
    cells: Cells, kind: int, column: int, style: int, data: bytes, strings: list[str]
) -> None:
    """Read one cell, or a formula's stored value."""
    if kind == 2:
        cells.number_of(column, rk_number(data[8:12]), style)
    elif kind in (3, 11):
        cells.error(column, error_name(data[8]))
    elif kind in (4, 10):
        cells.put(column, "true" if data[8] else "false")
    elif kind in (5, 9):
        cells.number_of(column, repr(struct.unpack_from("<d", data, 8)[0]), style, kind == 9)
    elif kind in (6, 8):
        cells.text(column, wide(data, 8)[0])
    else:
        (index,) = struct.unpack_from("<I", data, 8)
        if index >= len(strings):
            cells.fault(column, f"the workbook has no text {index}")
        else:
            cells.put(column, strings[index], typed=False)


# XLS


def open_xls(file: IO[bytes]) -> Book:
    """Open a workbook of Excel 97 or older, in memory."""
    data = file.read()
    for stream, what in (
        ("EncryptedPackage", "the workbook is protected by a password"),
        ("WordDocument", "this is a Word document, not a workbook"),
        ("PowerPoint Document", "this is a PowerPoint presentation, not a workbook"),
    ):
        if data.startswith(b"\xd0\xcf\x11\xe0") and stream.encode("utf-16-le") in data:
            raise ValueError(what)
    try:
        book = xlrd.open_workbook(
            file_contents=data,
            formatting_info=True,
            ragged_rows=True,
            on_demand=True,
            logfile=io.StringIO(),
        )
        never = never_calculated(book)
        sources = [book.sheet_by_index(index) for index in range(book.nsheets)]
    except MemoryError:
        raise
    except Exception as error:  # for damaged files xlrd raises any exception
        if "encrypted" in str(error).lower():
            raise ValueError("the workbook is protected by a password") from error
        raise damaged(error) from error
    formats = Formats()
    formats.base_1904 = bool(book.datemode)
    formats.cells = [xf.format_key for xf in book.xf_list]
    formats.codes = {key: code.format_str for key, code in book.format_map.items()}
    return Book(
        [
            Sheet(source.name, partial(xls_rows, source, formats, cells))
            for source, cells in zip(sources, never, strict=True)
        ]
    )


def never_calculated(book: Any) -> list[set[tuple[int, int]]]:
    """(row, column) of each sheet's formulas if 0 or nothing is stored for all in the workbook.

    Programs that cannot calculate write such files, and without a RECALCID record, which names the
    program that calculated.
    """
    sheets: list[set[tuple[int, int]]] = [set() for _ in range(book.nsheets)]
    for index, start in enumerate(book._sh_abs_posn if book.biff_version >= 50 else ()):
        book._position = start
        depth = 0
        while True:
            code, _, data = book.get_record_parts()
            depth += (code == 0x0809) - (code == 0x000A)
            if code == 0x0006 and len(data) >= 14:
                row, column = struct.unpack_from("<HH", data)
                if data[6:14] not in (bytes(8), b"\3\0\0\0\0\0\xff\xff"):
                    return [set() for _ in sheets]
                sheets[index].add((row, column))
            if depth == 0:
                break
    if b"\xc1\x01\x08\x00\xc1\x01" in book.mem:  # RECALCID
        return [set() for _ in sheets]
    return sheets


def xls_rows(
    source: Any, formats: Formats, never: set[tuple[int, int]], sheet: Sheet
) -> Iterator[Row]:
    sheet.merges = [(top + 1, a, bottom, b - 1) for top, bottom, a, b in source.merged_cells]
    cells = Cells(sheet, formats)
    for index in range(source.nrows):
        cells.start(index + 1)
        values, kinds = source.row_values(index), source.row_types(index)
        for column, (value, kind) in enumerate(zip(values, kinds, strict=True)):
            if (index, column) in never:
                cells.fault(column, NEVER)
            elif kind == xlrd.XL_CELL_TEXT:
                cells.text(column, value)
            elif kind in (xlrd.XL_CELL_NUMBER, xlrd.XL_CELL_DATE):
                cells.number_of(column, repr(value), source.cell_xf_index(index, column))
            elif kind == xlrd.XL_CELL_BOOLEAN:
                cells.put(column, "true" if value else "false")
            elif kind == xlrd.XL_CELL_ERROR:
                cells.error(column, error_name(value))
        if row := cells.row():
            yield row


# ODS


def open_ods(parts: Parts) -> Book:
    if "meta-inf/manifest.xml" in parts.entries:
        with parts.open("meta-inf/manifest.xml") as stream:
            if b"encryption-data" in stream.read(CELL_CHARACTERS):
                raise ValueError("the workbook is protected by a password")
    names: list[str] = []
    sheets = False

    def start(name: str, attrs: dict[str, str]) -> None:
        tag = LOCAL[name]
        nonlocal sheets
        sheets = sheets or tag == "spreadsheet"
        reader.start(name, attrs)

    reader = OdsSheet(None, -1)
    for _ in pieces(parts.open("content.xml"), start, reader.end, reader.text):
        names = reader.names
    if not sheets:
        raise ValueError("this is an OpenDocument file, but not a workbook")
    return Book([Sheet(name, partial(ods_rows, parts, i)) for i, name in enumerate(names)])


def ods_rows(parts: Parts, index: int, sheet: Sheet) -> Iterator[Row]:
    reader = OdsSheet(sheet, index)
    unfolded = 0
    for _ in pieces(parts.open("content.xml"), reader.start, reader.end, reader.text):
        for row, times in reader.rows:
            unfolded += len(row.cells) * (times - 1)
            if row.number + times - 1 > ROWS or unfolded > 2 * SPARSE_CELLS:
                raise ValueError(
                    f"sheet {sheet.name!r} repeats row {row.number} of {len(row.cells):,} "
                    f"cells {times:,} times: that is not a table"
                )
            for more in range(times):
                yield row._replace(number=row.number + more)
        reader.rows.clear()
        if reader.over:
            return


OUTSIDE = {
    "annotation", "frame", "custom-shape", "rect", "line", "circle", "ellipse", "polygon",
    "polyline", "path", "g", "control", "object", "ruby-text", "table", "shapes", "detective",
}  # fmt: skip
"""Elements in a cell that are not part of its text: notes and drawings."""


ODS_ERROR = re.compile(r"#[A-Z0-9/]+[!?]?|Err:\d+")


class OdsSheet:
    """Handlers for an XML parser that turn one sheet of `content.xml` into rows."""

    def __init__(self, sheet: Sheet | None, index: int) -> None:
        self.cells = Cells(sheet or Sheet("", lambda _: iter(())), Formats())
        self.index = index
        self.names: list[str] = []
        self.rows: list[tuple[Row, int]] = []
        self.over = False
        self.inside = 0
        """Depth of nested tables; only the first level are sheets."""
        self.next = 1
        self.times = 1
        self.column = 0
        self.cell: dict[str, str] | None = None
        self.skipped = 0
        self.paragraphs = 0
        self.parts: list[str] = []
        self.size = 0

    def start(self, name: str, attrs: dict[str, str]) -> None:
        tag = LOCAL[name]
        if self.skipped or (self.cell is not None and tag in OUTSIDE):
            self.skipped += 1
            return
        if tag == "table":
            self.inside += 1
            if self.inside == 1:
                name = next((attrs[key] for key in attrs if key.endswith("table:1.0|name")), "")
                self.names.append(name)
        if self.inside != 1 or len(self.names) - 1 != self.index:
            return
        if tag in ("table-cell", "covered-table-cell"):
            self.cell = {
                ("calc:" if "calc" in key else "") + key.rpartition("|")[2]: text
                for key, text in attrs.items()
            }
            self.parts.clear()
            self.paragraphs = self.size = 0
        elif self.cell is not None:
            self.mark(tag, attrs)
        elif tag == "table-row":
            self.times = repeats(attrs, "number-rows-repeated")
            self.cells.start(min(self.next, ROWS))
            self.next += self.times
            self.column = 0

    def mark(self, tag: str, attrs: dict[str, str]) -> None:
        """Handle an element in a cell's text."""
        if tag in ("p", "h"):
            if self.paragraphs:
                self.parts.append("\n")
            self.paragraphs += 1
        elif tag == "s":
            self.parts.append(" " * min(repeats(attrs, "c"), 1000))
        elif tag in ("tab", "line-break"):
            self.parts.append("\t" if tag == "tab" else "\n")

    def text(self, data: str) -> None:
        if self.cell is not None and not self.skipped and self.paragraphs:
            self.parts.append(data)
            self.size += len(data)
            if self.size > CELL_CHARACTERS:
                raise damaged(f"cell {place(self.cells.number, self.column)} has no end")

    def end(self, name: str) -> None:
        tag = LOCAL[name]
        if self.skipped:
            self.skipped -= 1
        elif tag == "table":
            self.inside -= 1
            self.over = self.inside == 0 and len(self.names) - 1 == self.index
        elif self.inside != 1 or len(self.names) - 1 != self.index:
            return
        elif tag in ("table-cell", "covered-table-cell") and self.cell is not None:
            self.put(self.cell)
            self.cell = None
        elif tag == "table-row" and (row := self.cells.row()):
            self.rows.append((row, self.times))

    def put(self, cell: dict[str, str]) -> None:
        times = whole(cell.get("number-columns-repeated", "1"))
        across = whole(cell.get("number-columns-spanned", "1"))
        down = whole(cell.get("number-rows-spanned", "1"))
        if across > 1 or down > 1:
            top, left = self.cells.number, self.column
            self.cells.sheet.merges.append((top, left, top + down - 1, left + across - 1))
        text = "".join(self.parts)
        if text or "value-type" in cell or "formula" in cell:
            for column in range(self.column, self.column + times):
                if not self.put_one(column, cell, text):
                    break
        self.column += times

    def put_one(self, column: int, cell: dict[str, str], text: str) -> bool:
        """Put a cell into one of the columns that it fills; returns whether it has a value."""
        cells, kind = self.cells, cell.get("value-type", "")
        if cell.get("calc:value-type") == "error" or (
            "formula" in cell and ODS_ERROR.fullmatch(text)
        ):
            cells.error(column, text or "#ERROR")
        elif kind in ("float", "percentage", "currency"):
            cells.number_of(column, cell.get("value", ""), 0)
        elif kind == "boolean":
            cells.put(column, cell.get("boolean-value", text).lower())
        elif kind in ("date", "time"):
            raw = cell.get(f"{kind}-value", "")
            moment = ods_date(raw) if kind == "date" else ods_time(raw)
            if moment:
                cells.put(column, moment)
            else:
                cells.fault(column, f"{raw[:40]!r} is not a {kind}")
        elif kind in ("", "void") and "formula" in cell and not text:
            cells.fault(column, UNCALCULATED)
        else:
            cells.text(column, cell.get("string-value") or text)
        return column in cells.cells or column in cells.bad


def whole(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 1


def repeats(attrs: dict[str, str], name: str) -> int:
    return whole(next((text for key, text in attrs.items() if key.endswith(f"|{name}")), "1"))


def ods_date(raw: str) -> str:
    """A stored date in ISO format, with six digits of a fraction if it has one; '' if invalid."""
    match = re.fullmatch(r"(-?\d{4,}-\d\d-\d\d)(T\d\d:\d\d:\d\d)?(?:\.(\d+))?Z?", raw)
    if not match:
        return ""
    rest = (match[3] or "").rstrip("0")
    return match[1] + (match[2] or "") + (f".{rest:0<6}" if rest else "")


def ods_time(raw: str) -> str:
    """A duration such as PT26H00M00S as `26:00:00`; '' if invalid."""
    match = re.fullmatch(
        r"(-?)P(?:(\d{1,9})D)?(?:T(?:(\d{1,9})H)?(?:(\d{1,9})M)?(?:(\d{1,9})(?:[.,](\d+))?S)?)?",
        raw,
    )
    if not match or raw.endswith(("P", "T")):
        return ""
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups()[1:5])
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    rest = (match[6] or "").rstrip("0")
    text = f"{total // 3600:02}:{total // 60 % 60:02}:{total % 60:02}"
    return f"{match[1]}{text}{f'.{rest:0<6}' if rest else ''}"
