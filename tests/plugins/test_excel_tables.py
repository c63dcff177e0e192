"""`plugins/excel_sheets.py` with a contract: cells become their columns' types, exactly."""

from __future__ import annotations

import datetime
import io
import json
import logging
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from openpyxl import Workbook

from casparian_flow.contract import Held
from tests.plugins.conftest import table_of

WHEN = datetime.datetime(2026, 2, 1, 10, 30)
DAY = datetime.date(2026, 2, 1)
COLUMNS: dict[str, Any] = {
    "id": {"type": "integer", "required": True},
    "amount": {"type": "decimal(18,2)", "decimalChar": ",", "groupChar": "."},
    "day": {"type": "date", "format": "%d.%m.%Y"},
    "at": "timestamp",
    "paid": {"type": "boolean", "trueValues": ["ja"], "falseValues": ["nein"]},
    "zip": "text",
}
HEADER = ["id", "amount", "day", "at", "paid", "zip"]


def book(*sheets: list[list[Any]]) -> bytes:
    """A workbook with sheets named `Sheet`, `B`, `C`."""
    made = Workbook()
    for name, rows in zip("ABC", sheets, strict=False):
        sheet = made.worksheets[0] if name == "A" else made.create_sheet(name)
        for row in rows:
            sheet.append(row)
    data = io.BytesIO()
    made.save(data)
    return data.getvalue()


def contract(columns: dict[str, Any] = COLUMNS, **words: Any) -> dict[str, Any]:
    return {
        "table": "t",
        "reader": "excel_sheets",
        "files": ["*.xlsx"],
        "columns": columns,
        **words,
    }


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def balance(log: pytest.LogCaptureFixture) -> str:
    return next(text for text in log.messages if text.startswith("read "))


def test_cells_convert_exactly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        ["Orders of February"], [],
        HEADER,
        [1, 1234.5, DAY, WHEN, True, 3044],
        [2.0, "1.234,50", "01.02.2026", DAY, "nein", "03044"],
        [10**15, 10, datetime.datetime(2026, 2, 1), None, None, 0.1],
        HEADER,
        [1.5, 1, DAY, WHEN, True, "x"],
        [3, 1.239, DAY, WHEN, True, "x"],
        [4, 1, WHEN, WHEN, True, "x"],
        [5, 1, 46054, WHEN, 1, "x"],
        [True, "1234.50", DAY, WHEN, "true", "x"],
        [None, 1, DAY, WHEN, True, "x"],
        ["Total", 7],
    ]  # fmt: skip
    table = table_of("excel_sheets", contract(dialect={"footer": "^Total;"}, lines=True))
    out = table.run(tmp_path, book(rows), "book.xlsx")
    assert [tuple(row.values()) for row in out["t"].to_pylist()] == [
        (1, Decimal("1234.50"), DAY, WHEN, True, "3044", 4),
        (2, Decimal("1234.50"), DAY, datetime.datetime(2026, 2, 1), False, "03044", 5),
        (10**15, Decimal("10.00"), DAY, None, None, "0.1", 6),
    ]
    rejects = out["t_rejects"].to_pylist()
    assert [(r["line"], r["column"], r["value"]) for r in rejects] == [
        (8, "id", "1.5"),
        (9, "amount", "1,239"),
        (10, "day", "2026-02-01T10:30:00"),
        (11, "day", "46054"),
        (12, "id", "true"),
        (13, "id", None),
    ]
    assert json.loads(rejects[0]["raw"])["A"] == "1.5"
    assert balance(caplog) == (
        "read 12 = 3 published + 6 rejected + 3 skipped (preamble 1, header 1, footer 1)"
    )


FORMATS = {
    "%d.%m.%y": "date", "%-d/%-m/%Y": "date", "%b %d, %Y": "date", "%Y%m%d": "date",
    "%d.%m.%Y %H:%M": "timestamp", "%I:%M:%S %p %d %B %Y": "timestamp", "%H:%M": "time",
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
def test_a_moment_comes_in_any_format(form: str, tmp_path: Path) -> None:
    values = {"date": DAY, "timestamp": WHEN, "time": WHEN.time()}
    value = values[FORMATS[form]]
    late = datetime.datetime(2026, 2, 1, 10, 30, 1)
    columns = {"v": {"type": FORMATS[form], "format": form}, "w": "text"}
    out = table_of("excel_sheets", contract(columns)).run(
        tmp_path,
        book([["v", "w"], [value, "a"], [value.strftime(form), "b"], [late, "c"]]),
        "b.xlsx",
    )
    assert out["t"].column("v").to_pylist()[:2] == [value, value]
    exact = "%S" in form
    assert out["t"].column("w").to_pylist() == ["a", "b"] + ["c"] * exact
    assert (len(out["t_rejects"]) > 0) != exact


def test_sheets_are_one_table(tmp_path: Path) -> None:
    columns = {"id": {"type": "integer", "unique": True}, "v": "text"}
    first, second = [["id", "v"], [1, "a"], [2, "b"]], [["v", "id"], ["c", 3], ["d", 1]]
    run = table_of("excel_sheets", contract(columns)).run
    out = run(tmp_path, book(first, second), "book.xlsx")
    assert out["t"].to_pylist() == [
        {"id": 1, "v": "a"}, {"id": 2, "v": "b"}, {"id": 3, "v": "c"},
    ]  # fmt: skip
    assert [(r["line"], r["rule"]) for r in out["t_rejects"].to_pylist()] == [(3, "unique")]
    with pytest.raises(Held, match="column w is new"):
        run(tmp_path, book(first, [["id", "w"], [4, "x"]]), "book.xlsx")
    for name in ("B", "[BC]"):
        run = table_of("excel_sheets", contract(columns, dialect={"sheet": name})).run
        out = run(tmp_path, book([["x"], [1]], second), "book.xlsx")
        assert out["t"].column("v").to_pylist() == ["c", "d"]
    run = table_of("excel_sheets", contract(columns, dialect={"sheet": "D"})).run
    with pytest.raises(ValueError, match="no sheet is named 'D'; the sheets are: 'Sheet', 'B'"):
        run(tmp_path, book(first, second), "book.xlsx")


def test_the_header_is_where_the_contract_says(tmp_path: Path) -> None:
    columns = {"a": "text", "b": "text"}
    rows = [["x", "y"], ["a", "b"], ["u", "v"]]
    for dialect, count in (
        ({"header": "^a;b$"}, 1), ({"header_line": "2"}, 1), ({}, 1), ({"header": "^[ux]"}, 0),
    ):  # fmt: skip
        run = table_of("excel_sheets", contract(columns, dialect=dialect)).run
        if count:
            assert run(tmp_path, book(rows), "book.xlsx")["t"].num_rows == count
        else:
            with pytest.raises(Held, match="columns x, y are new"):
                run(tmp_path, book(rows), "book.xlsx")
    numbers = {"a": "integer", "b": "text", "c": "integer"}
    run = table_of("excel_sheets", contract(numbers, dialect={"header": "^a;b;c"})).run
    above, under = [["a", "b"], [1, "x"], [2, "y"]], [["a", "b", "c"], [3, "z", 4]]
    with pytest.raises(Held, match="above the header in line 4 are rows of another table"):
        run(tmp_path, book([*above, *under]), "book.xlsx")
    assert run(tmp_path, book([["Of", DAY], *under]), "book.xlsx")["t"].num_rows == 1
    none = {"column_1": "text", "column_2": "text"}
    run = table_of("excel_sheets", contract(none, dialect={"header_line": "none"})).run
    assert run(tmp_path, book(rows), "book.xlsx")["t"].num_rows == 3
    run = table_of("excel_sheets", contract(columns, dialect={"header": "^Auftrag"})).run
    with pytest.raises(ValueError, match="matches the header"):
        run(tmp_path, book(rows), "book.xlsx")


def test_control_totals_of_a_sheet(tmp_path: Path) -> None:
    dialect = {"footer": "^Total;", "control": r"^Total;(?P<sum_v>[\d.]+)"}
    run = table_of("excel_sheets", contract({"k": "text", "v": "integer"}, dialect=dialect)).run
    rows = [["k", "v"], ["a", 1], ["b", 2], ["Total", 3]]
    assert run(tmp_path, book(rows), "book.xlsx")["t"].num_rows == 2
    rows[-1][1] = 4
    with pytest.raises(ValueError, match=r"sum_v.*'4'.*3"):
        run(tmp_path, book(rows), "book.xlsx")
    with pytest.raises(ValueError, match="below the footer"):
        run(tmp_path, book([["k", "v"], ["a", 3], ["Total", 3], ["b", 2]]), "book.xlsx")
    with pytest.raises(ValueError, match="empty"):
        run(tmp_path, b"", "book.xlsx")
    texts = {"k": "text", "v": "text"}
    run = table_of("excel_sheets", contract(texts, dialect={"footer": "^T"})).run
    again = [["k", "v"], ["a", "b"], ["Total", 3], ["k", "v"]]
    with pytest.raises(ValueError, match="below the footer"):
        run(tmp_path, book([*again, ["c", "d"]]), "book.xlsx")
    assert run(tmp_path, book(again), "book.xlsx")["t"].num_rows == 1
