# /// script
# requires-python = ">=3.11"
# dependencies = ["pyarrow>=23.0.1", "python-calamine>=0.9"]
# ///
"""Workbooks (XLSX, XLS, ODS) become rows of topic `excel`: every row of every worksheet.

The first row of a sheet that is not wholly empty is its header. The columns of the topic are
`sheet`, `row` (as the sheet numbers it, from 1) and the headers of all sheets together, in the
order they first appear; a row is null where its sheet has no such column. Wholly empty rows are
skipped; no other row is ever left out, so there are no rejects. Hidden sheets are read; charts
and macro sheets are not.

Cells are text, as they are stored rather than as they are shown: a number exactly (`5`, `0.1`),
a date or time in ISO format (a date without time is midnight), a duration as `26:00:00`, `true`
and `false`, a formula's last value; an empty cell is null, and so is an error such as `#N/A`.
A workbook that is damaged, protected by a password, or no workbook fails the job.
Columns: white space in a header cell is folded, an empty one becomes `column_3` (its position),
one repeated within its sheet `name_2` (case does not count), `_cf_x` becomes `x_cf_x`, and 100
characters are kept; a header `sheet` or `row` becomes `sheet_2` or `row_2`.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
from python_calamine import (
    CalamineError,
    CalamineSheet,
    CalamineWorkbook,
    PasswordError,
    SheetTypeEnum,
)

from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(pattern=["*.xlsx", "*.xls", "*.ods"], topic="excel", version="1.0.0")

BATCH_ROWS = 2000

Row = tuple[int, list[str | None]]
"""A row's number on its sheet, and its cells."""


class Sheet(NamedTuple):
    """A worksheet with something on it."""

    name: str
    columns: list[str]
    rows: Iterator[Row]


class Handler(BasePlugin):
    """Publishes the rows of one workbook."""

    def execute(self, file_path: str) -> None:
        sheets = list(read_sheets(file_path))
        columns: dict[str, str] = {}
        for sheet in sheets:
            for name in sheet.columns:
                columns.setdefault(name.casefold(), name)
        fields = [(name, pa.string()) for name in columns.values()]
        schema = pa.schema([("sheet", pa.string()), ("row", pa.int64()), *fields])
        self.publish("excel", schema.empty_table())
        for sheet in sheets:
            own = {name.casefold(): place for place, name in enumerate(sheet.columns)}
            places = [own.get(key) for key in columns]
            while batch := list(islice(sheet.rows, BATCH_ROWS)):
                self.publish("excel", table(sheet.name, batch, places, schema))


def table(sheet: str, rows: list[Row], places: list[int | None], schema: Any) -> Any:
    """The rows, with each column taken from its place on the sheet, or null."""
    cells: list[Sequence[Any]] = [
        [None if place is None else row[place] for _, row in rows] for place in places
    ]
    columns = [[sheet] * len(rows), [number for number, _ in rows], *cells]
    arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def read_sheets(path: str) -> Iterator[Sheet]:
    """The worksheets that are not empty, in the order of the workbook.

    Raises:
        ValueError: the workbook cannot be read.
    """
    try:
        book = CalamineWorkbook.from_path(path)
        for sheet in book.sheets_metadata:
            if sheet.typ == SheetTypeEnum.WorkSheet:
                rows = read_rows(book.get_sheet_by_name(sheet.name))
                if header := next(rows, None):
                    yield Sheet(sheet.name, column_names(header[1]), rows)
    except PasswordError as error:
        raise ValueError("the workbook is protected by a password") from error
    except CalamineError as error:
        raise ValueError(f"the workbook cannot be read, it may be damaged: {error}") from error


def read_rows(sheet: CalamineSheet) -> Iterator[Row]:
    """The rows that are not wholly empty."""
    for number, values in enumerate(sheet.iter_rows(), start=1):
        cells = [text_of(value) for value in values]
        if any(cell is not None for cell in cells):
            yield number, cells


def text_of(value: Any) -> str | None:
    """A cell's text."""
    match value:
        case str():
            text = printable(value)
        case bool():
            text = str(value).lower()
        case float() if value.is_integer() and abs(value) < 1e15:
            text = str(int(value))
        case datetime.timedelta():
            hours, rest = divmod(value, datetime.timedelta(hours=1))
            text = f"{hours}{str(rest)[1:]}"
        case datetime.date() | datetime.time():
            text = value.isoformat()
        case _:
            text = str(value)
    return text or None


def column_names(cells: Iterable[str | None]) -> list[str]:
    """Names that every sink takes: not empty, not repeated in any case, not reserved."""
    names: list[str] = []
    seen = {"sheet", "row"}
    for position, cell in enumerate(cells, start=1):
        base = " ".join((cell or "").split())[:100] or f"column_{position}"
        base = f"x{base}" if base.lower().startswith("_cf_") else base
        name, count = base, 1
        while name.casefold() in seen:
            count += 1
            name = f"{base}_{count}"
        seen.add(name.casefold())
        names.append(name)
    return names


def printable(text: str) -> str:
    """The text as Unicode that can be stored: NUL and lone surrogates are escaped."""
    return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")
