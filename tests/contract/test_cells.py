"""Every cell is exact or rejected: compared with what Python's own types say, cell by cell."""

from __future__ import annotations

import base64
import datetime
import math
import random
import re
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casparian_flow.contract import ContractError, read
from casparian_flow.typed import Typed

REJECTED = "rejected"


def convert(cells: list[str | None], **words: Any) -> list[Any]:
    """What a column makes of cells: values, None, or REJECTED."""
    typed = Typed(read({"table": "t", "files": ["*"], "columns": {"a": words}}), ["a"], {})
    table, rejects = typed.rows(
        [(line, line, [cell], cell or "") for line, cell in enumerate(cells, start=1)]
    )
    assert typed.published + typed.rejects == len(cells)
    gone = {reject.line: reject for reject in rejects}
    for line, reject in gone.items():
        assert (reject.column, reject.value, reject.raw) == ("a", cells[line - 1], cells[line - 1])
        assert reject.rule == words["type"]
    values = iter(table.column("a").to_pylist())
    return [REJECTED if line in gone else next(values) for line in range(1, len(cells) + 1)]


def no(*cells: str) -> dict[str, str]:
    """Cells that are rejected."""
    return dict.fromkeys(cells, REJECTED)


UTC = datetime.UTC
LISTED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {"type": "integer"},
        {"1": 1, "-12": -12, "0": 0, "-0": 0, "9223372036854775807": 2**63 - 1,
         "-9223372036854775808": -(2**63), "": None}
        | no("1.5", "1.0", "007", "-07", "0x10", "1e3", "+5", "1_000", " 7", "7 ", "nan",
                         "1,234", "9223372036854775808", "\u0667", "--1", "-"),
    ),
    (
        {"type": "integer", "groupChar": "."},
        {"1.234": 1234, "1234": 1234, "1.234.567": 1234567, "12": 12}
        | no("1.23", "1.2345", "0.123", "12.34.567", ".123", "1.234,5", "1.234."),
    ),
    (
        {"type": "decimal(18,2)"},
        {"1.23": Decimal("1.23"), "1.230": Decimal("1.23"), "5": Decimal(5), ".5": Decimal("0.5"),
         "-0.00": Decimal(0), "9" * 16: Decimal("9" * 16),
         "-1.2000000000000000000000": Decimal("-1.2")}
        | no("1.239", "1e2", "1.", "nan", "inf", "1,234", "1" * 17, "1" * 40, "00.5", "+1",
                         "1 000", "-", ".", "1.2.3", "1" * 39 + ".00", "1_0", "$1", "12%"),
    ),
    (
        {"type": "decimal(38,0)"},
        {"1" * 38: Decimal("1" * 38), "5.00": Decimal(5)}
        | no(*("1" * n for n in range(39, 90, 7))),
    ),
    (
        {"type": "decimal(4,4)"},
        {"0.1234": Decimal("0.1234"), ".5": Decimal("0.5"), "0": Decimal(0)}
        | no("1.0", "0.12345"),
    ),
    (
        {"type": "decimal(18,2)", "decimalChar": ",", "groupChar": "."},
        {"1.234,50": Decimal("1234.5"), "1234,50": Decimal("1234.5"), "1.234": Decimal(1234),
         "-1.234.567,8": Decimal("-1234567.8"), "7,25": Decimal("7.25")}
        | no("1234.50", "1,234.50", "1,999", "12.34,5", "1.2345", "1.234.5"),
    ),
    (
        {"type": "decimal(18,2)", "groupChar": "\u00a0"},
        {"1\u00a0234.5": Decimal("1234.5")} | no("1 234.5", "1\u00a023"),
    ),
    (
        {"type": "double"},
        {"0.1": 0.1, "1e5": 1e5, "-1.5E-3": -0.0015, ".5": 0.5, "0.10000000000000001": 0.1,
         "1.7976931348623157e308": 1.7976931348623157e308, "5e-324": 5e-324, "-0.0": -0.0,
         "5.960464477539063e-08": 2.0**-24,
         "100000000000000000000000": 1e23, "0.30000000000000004": 0.30000000000000004}
        | no("1e400", "1e-400", "nan", "NaN", "inf", "-Infinity", "0x1p3", "1.", "007.5",
                         "0.1234567890123456789", "9007199254740993", "1,5", "1e5.0", "3e-324"),
    ),
    (
        {"type": "boolean"},
        {"true": True, "False": False, "TRUE": True, "": None}
        | no("tRUE", "0", "1", "yes", "t", " true"),
    ),
    (
        {"type": "date"},
        {"2026-01-02": datetime.date(2026, 1, 2), "2024-02-29": datetime.date(2024, 2, 29),
         "0001-01-01": datetime.date.min, "9999-12-31": datetime.date.max}
        | no("2026-02-30", "2026-02-29", "2026-1-2", "2026-01-02 10:00", "26-01-02",
                         "0000-12-31", "2026-13-01", "02.01.2026", "20260102"),
    ),
    (
        {"type": "date", "format": "%d.%m.%Y"},
        {"31.12.2026": datetime.date(2026, 12, 31)}
        | no("30.02.2026", "31.04.2026", "1.2.2026", "31.12.26", "31/12/2026"),
    ),
    (
        {"type": "date", "format": "%d/%m/%y"},
        {"31/12/68": datetime.date(2068, 12, 31), "31/12/69": datetime.date(1969, 12, 31)}
        | no("31/12/2026", "12/31/26"),
    ),
    (
        {"type": "date", "format": "%-d-%b-%Y"},
        {"1-Feb-2026": datetime.date(2026, 2, 1), "28-FEB-2026": datetime.date(2026, 2, 28)}
        | no("30-Feb-2026", "1-Feby-2026", "1-02-2026", "1-Mai-2026"),
    ),
    (
        {"type": "timestamp"},
        {"2026-01-02 10:00": datetime.datetime(2026, 1, 2, 10),
         "2026-01-02T10:00:00.123456": datetime.datetime(2026, 1, 2, 10, 0, 0, 123456)}
        | no("2026-01-02 10:00:00+02", "2026-01-02T10:00:00Z", "2026-01-02",
                         "2026-01-02 10:00:00.1234567", "2026-01-02 24:00:00",
                         "2026-01-02 10:00:60",
                         "2026-02-30 10:00:00", "2026-01-02  10:00"),
    ),
    (
        {"type": "timestamp", "format": "%-m/%-d/%Y %-I:%M:%S %p"},
        {"1/2/2026 12:00:01 AM": datetime.datetime(2026, 1, 2, 0, 0, 1),
         "11/12/2026 12:30:00 pm": datetime.datetime(2026, 11, 12, 12, 30),
         "1/2/2026 1:00:00 PM": datetime.datetime(2026, 1, 2, 13)}
        | no("1/2/2026 13:00:00 PM", "1/2/2026 0:00:00 AM", "2/30/2026 1:00:00 AM"),
    ),
    (
        {"type": "timestamp[tz]"},
        {"2026-01-02 10:00:00+02": datetime.datetime(2026, 1, 2, 8, tzinfo=UTC),
         "2026-01-02T10:00:00.5-03:30": datetime.datetime(2026, 1, 2, 13, 30, 0, 500000,
         tzinfo=UTC),
         "2026-01-02T10:00Z": datetime.datetime(2026, 1, 2, 10, tzinfo=UTC)}
        | no("2026-01-02 10:00:00", "2026-01-02 10:00:00 CET", "2026-01-02 10:00:00+25:00",
                         "0001-01-01 00:00:00+02:00", "9999-12-31 23:59:59-02:00"),
    ),
    (
        {"type": "time"},
        {"10:00": datetime.time(10), "23:59:59.000001": datetime.time(23, 59, 59, 1)}
        | no("24:00", "9:00", "10:60", "10:00:00.1234567", "10"),
    ),
    (
        {"type": "binary(hex)"},
        {"00fF": b"\x00\xff", "": None} | no("0", "0x00", "zz"),
    ),
    (
        {"type": "binary(base64)"},
        {"QQ==": b"A", "QUJD": b"ABC"} | no("QR==", "QQ", "Q Q==", "*"),
    ),
    ({"type": "text"}, {"": "", "NULL": "NULL", " 007 ": " 007 ", "\u00df\n": "\u00df\n"}),
    ({"type": "integer", "trim": True}, {" 7\t": 7, "  ": None, "7 7": REJECTED}),
    (
        {"type": "integer", "missingValues": ["", "-1", "k.A."]},
        {"k.A.": None, "-1": None, "": None, "-2": -2, "n/a": REJECTED},
    ),
    ({"type": "integer", "missingValues": ["NULL"]}, {"NULL": None, "": REJECTED}),
]  # fmt: skip


@pytest.mark.parametrize(("words", "cells"), LISTED, ids=lambda each: str(each.get("type", "")))
def test_a_cell_is_exact_or_rejected(words: dict[str, Any], cells: dict[str, Any]) -> None:
    assert dict(zip(cells, convert([*cells], **words), strict=True)) == cells
    seed = random.randrange(10**9)
    print("seed", seed)
    many = random.Random(seed).choices([*cells, None], k=3 * len(cells) + 50)  # each, many times
    expected = [None if cell is None else cells[cell] for cell in many]
    assert convert(many, **words) == expected


NUMBER_LIKE = st.text("0123456789.,-+eE_ x", max_size=9) | st.from_regex(
    r"\A-?(0|[1-9][0-9]{0,20}|[0-9]{1,3}(,[0-9]{3}){1,3})([.][0-9]{1,6})?\Z"
)


@given(st.lists(NUMBER_LIKE, max_size=12))
def test_integers_are_what_python_reads(cells: list[str]) -> None:
    for cell, value in zip(cells, convert([*cells], type="integer"), strict=True):
        is_one = re.fullmatch("-?(0|[1-9][0-9]*)", cell) and -(2**63) <= int(cell) < 2**63
        assert value == (None if cell == "" else int(cell) if is_one else REJECTED)


@settings(max_examples=50)
@given(st.lists(NUMBER_LIKE, max_size=12), st.integers(1, 38), st.integers(0, 38))
def test_decimals_are_what_python_reads(cells: list[str], precision: int, scale: int) -> None:
    scale = min(scale, precision)
    kind = f"decimal({precision},{scale})"
    for cell, value in zip(cells, convert([*cells], type=kind, groupChar=","), strict=True):
        whole = "(?:0|[1-9][0-9]*|[1-9][0-9]{0,2}(?:,[0-9]{3})+)"
        if re.fullmatch(rf"-?(?:{whole}(?:\.[0-9]+)?|\.[0-9]+)", cell):
            number = Decimal(cell.replace(",", ""))
            behind = cell.partition(".")[2].rstrip("0")
            fits = len(behind) <= scale and abs(number) < Decimal(10) ** (precision - scale)
            assert value == (number if fits else REJECTED)
        else:
            assert value == (None if cell == "" else REJECTED)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=12), st.integers(1, 20))
def test_doubles_come_back(numbers: list[float], digits: int) -> None:
    assert convert([repr(number) for number in numbers], type="double") == numbers
    cells = [f"{number:.{digits}e}" for number in numbers]
    for cell, value in zip(cells, convert([*cells], type="double"), strict=True):
        assert value == REJECTED or Decimal(f"{value:.{digits}e}") == Decimal(cell)
        if digits < 15 and 1e-300 < abs(float(cell)) < math.inf:
            assert value == float(cell)


FORMATS = {
    "": "%Y-%m-%d", "%d.%m.%Y": "%d.%m.%Y", "%-m/%-d/%Y": "%m/%d/%Y", "%d %B %Y": "%d %B %Y",
    "%b %-d, %Y": "%b %d, %Y",
}  # fmt: skip


@given(st.lists(st.dates(), max_size=8), st.sampled_from(sorted(FORMATS)))
def test_dates_come_back(days: list[datetime.date], form: str) -> None:
    def written(day: datetime.date) -> str:
        shown = (form or "%Y-%m-%d").replace("%Y", f"{day.year:04}")
        shown = shown.replace("%-d", str(day.day)).replace("%-m", str(day.month))
        return day.strftime(shown)

    assert convert([written(day) for day in days], type="date", format=form) == days


@given(st.lists(st.text("0123/.-", min_size=8, max_size=10), max_size=12))
def test_no_date_is_made_of_another(cells: list[str]) -> None:
    for form in ("%Y-%m-%d", "%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y"):
        for cell, value in zip(cells, convert([*cells], type="date", format=form), strict=True):
            try:
                day = datetime.datetime.strptime(cell, form).date()
                is_one = day.strftime(form.replace("%Y", f"{day.year:04}")) == cell
            except ValueError:
                is_one = False
            assert value == (day if is_one else REJECTED)


@given(st.lists(st.datetimes(), max_size=8), st.sampled_from([" ", "T"]))
def test_timestamps_come_back(times: list[datetime.datetime], between: str) -> None:
    assert convert([time.isoformat(between) for time in times], type="timestamp") == times


zones = st.integers(-14 * 60, 14 * 60).map(
    lambda n: datetime.timezone(datetime.timedelta(minutes=n))
)
within = st.datetimes(datetime.datetime(1, 1, 3), datetime.datetime(9999, 12, 29), timezones=zones)


@given(st.lists(within, max_size=8))
def test_zones_become_instants(times: list[datetime.datetime]) -> None:
    assert convert([time.isoformat() for time in times], type="timestamp[tz]") == times


@given(st.lists(st.binary(max_size=9).filter(bool), max_size=8))
def test_bytes_come_back(blobs: list[bytes]) -> None:
    assert convert([blob.hex() for blob in blobs], type="binary(hex)") == blobs
    encoded: list[str | None] = [base64.b64encode(blob).decode() for blob in blobs]
    assert convert(encoded, type="binary(base64)") == blobs


@given(st.lists(st.text(st.characters(codec="utf-8")) | st.none(), max_size=8))
def test_text_is_not_touched(cells: list[str | None]) -> None:
    assert convert(cells, type="text") == cells


@pytest.mark.parametrize(
    ("kind", "cell", "cause"),
    [
        ("integer", "99999999999999999999", "beyond 64 bits"),
        ("integer", "-007", "zeros in front"),
        ("integer", "x", ""),
        ("integer", "1.5", ""),
        ("decimal(18,2)", "1.239", "3 decimals, and 2 go"),
        ("decimal(18,2)", "-10000000000000000.1", "17 digits before the decimals, and 16 go"),
        ("decimal(2,2)", "1.5", "1 digits before the decimals, and 0 go"),
        ("decimal(18,2)", "00.5", "zeros in front"),
        ("decimal(18,2)", "1,5", ""),
        ("double", "9007199254740993", "no double is exactly this number"),
        ("double", "1.5.6", ""),
        ("date", "7", ""),
    ],
)
def test_a_number_that_does_not_fit_is_told_why(kind: str, cell: str, cause: str) -> None:
    columns = {"a": {"type": kind}}
    _, (reject,) = Typed(read({"table": "t", "files": ["*"], "columns": columns}), ["a"], {}).rows(
        [(1, 1, [cell], cell)]
    )
    said = f"a: {cell!r} is no {kind}"
    assert reject.reason.startswith(said)
    assert cause in reject.reason and bool(cause) == (reject.reason != said)


def test_what_re2_refuses_is_an_error() -> None:
    for pattern in ("(", "(?=a)", r"(a)\1", "(((a{100}){100}){100})"):
        with pytest.raises(ContractError, match="RE2"):
            convert(["a"], type="text", pattern=pattern)
    assert convert(["ab" * 5000], type="text", pattern="(a|b|ab)*(a|b)*") == ["ab" * 5000]
    with pytest.raises(ContractError, match=r"missing \): \($"):
        convert(["a"], type="text", pattern="(")
