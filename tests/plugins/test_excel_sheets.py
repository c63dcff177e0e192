"""`plugins/excel_sheets.py`: every row of every sheet, as text."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from openpyxl import Workbook

from tests.plugins.conftest import Run


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
    for row in (["when", "Other"], [datetime.date(2025, 2, 3), "=1+1"]):
        second.append(row)
    file = tmp_path / "book.xlsx"
    book.save(file)
    table = excel_sheets(file)["excel"]
    assert table.column_names == [
        "sheet", "row", "Name", "When", "column_3", "name_2", "row_2", "Other"
    ]  # fmt: skip
    assert [list(row.values()) for row in table.to_pylist()] == [
        ["Sheet", 3, "5", "2025-02-03T10:30:00", "0.1", "true", "x", None],
        ["Sheet", 5, "a\nb", "26:00:01", "1e+20", "07:05:00", None, None],
        ["Second", 2, None, "2025-02-03", None, None, None, None],
    ]


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 and no more", b"plain text"])
@pytest.mark.parametrize("name", ["book.xlsx", "book.xls", "book.ods"])
def test_what_is_no_workbook_fails(
    data: bytes, name: str, excel_sheets: Run, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(ValueError, match="the workbook cannot be read, it may be damaged"):
        excel_sheets(file)


def test_real_workbooks(excel_sheets: Run, shared_files: Path) -> None:
    rows = {}
    for name in ("*.xlsx", "*.xls", "*.ods"):
        for file in sorted(shared_files.rglob(name)):
            rows[file.name] = excel_sheets(file)["excel"].num_rows
    assert len(rows) > 10
    assert rows["table.ods"] == rows["table.xls"] == 2
    # Six sheets of 134, 120, 88, 67, 21 rows, and one of 24 with gaps.
    assert rows["off-year-turnout-2023.xlsx"] >= 134 + 120 + 88 + 67 + 21
