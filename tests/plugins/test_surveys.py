"""What the readers of tables say of a file that nobody has described yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.plugins.conftest import Table
from tests.plugins.test_excel_tables import book


def facts(
    plugin: str, folder: Path, data: bytes, name: str, dialect: dict[str, str] | None = None
) -> dict[str, Any]:
    orders = {"survey": {"dialect": dialect or {}}}
    out = Table(plugin, orders, ["survey", "survey_rejects"]).run(folder, data, name)
    if not out:
        return {}
    (text,) = out["survey"].column("facts").to_pylist()
    made: dict[str, Any] = json.loads(text)
    return made


BANK = (
    "Kontoauszug;\nKonto: DE00 0000;\n\nDatum;Text;Betrag;Saldo\n01.03.2024;Miete;-800,00;1200,00\n"
    + "02.03.2024;Lohn;2500,00;3700,00\n" * 20
    + "03.03.2024;Öl\n03.03.2024;Strom;-60,10;3639,90\nSumme 2024;22\n"
)
ORDERS = (
    "id,customer,amount\n1,Ann,10.00\n2,Bob,20.00\n3,Cyd,30.00\nTotal,,60.00\n3 rows exported,,\n"
)


def test_a_bank_statement(tmp_path: Path) -> None:
    said = facts("delimited", tmp_path, BANK.encode("cp1252"), "bank.csv")
    assert (said["encoding"], said["dialect"], said["header_line"]) == (
        "cp1252", {"delimiter": ";"}, 4,
    )  # fmt: skip
    assert said["names"] == ["Datum", "Text", "Betrag", "Saldo"]
    assert (said["read"], said["records"]) == (26, 22)
    assert said["skipped"]["preamble"] == 2
    assert said["structure"] == {
        "count": 2,
        "examples": [
            [26, "2 fields where the header has 4", "03.03.2024;Öl"],
            [28, "2 fields where the header has 4", "Summe 2024;22"],
        ],
    }
    assert said["suggest"] == {"header": "^Datum;Text;", "footer": "^Summe [0-9]+;"}
    again = facts("delimited", tmp_path, BANK.encode("cp1252"), "bank.csv", said["suggest"])
    assert again["structure"]["count"] == 1
    assert again["skipped"] == {"preamble": 2, "footer": 1, "header": 0, "comment": 0}
    assert again["suggest"] == {"header": "^Datum;Text;"}


def test_totals_of_the_table_s_width(tmp_path: Path) -> None:
    said = facts("delimited", tmp_path, ORDERS.encode(), "orders.csv")
    assert said["records"] == 5
    assert said["suggest"] == {}  # `3 rows exported` may be a row
    alone = ORDERS.replace("3 rows exported,,\n", "")
    assert facts("delimited", tmp_path, alone.encode(), "o.csv")["suggest"] == {"footer": "^Total,"}
    above = alone.replace("2,Bob", "Total,,10.00\n2,Bob")
    assert facts("delimited", tmp_path, above.encode(), "o.csv")["suggest"] == {}


def test_a_file_that_was_cut_suggests_nothing(tmp_path: Path) -> None:
    data = b"name;v;w\n" + b"Ann;1;2\nBob;3;4\n" * 10 + b"Cyd;5"
    said = facts("delimited", tmp_path, data, "cut.csv")
    assert said["structure"]["count"] == 1
    assert said["suggest"] == {}


@pytest.mark.parametrize(
    ("data", "name", "dialect"),
    [
        (b"a\tb\n1\t2\n", "t.tsv", {"delimiter": "tab"}),
        (b"a\x01b\n1\x012\n", "t.txt", {"delimiter": "\\x01"}),
        (b"name\nAnn\nBob\n", "t.csv", {"delimiter": "none"}),
        (b"1,2024-01-01,x\n2,2024-01-02,y\n", "t.csv", {"delimiter": ",", "header_line": "none"}),
        (b'a,b\n1, "Lee, Ann"\n2, "Bo"\n', "t.csv", {"delimiter": ",", "blanks": "skip"}),
        (b"a||b\n1||2\n3||4\n", "t.txt", {"delimiter": "||"}),
        (b'size\tname\n5"\tdisc\n3"\thub\n', "t.tsv", {"delimiter": "tab", "quote": "none"}),
    ],
    ids=str,
)
def test_the_dialect_is_one_that_the_contract_takes(
    data: bytes, name: str, dialect: dict[str, str], tmp_path: Path
) -> None:
    said = facts("delimited", tmp_path, data, name)
    assert said["dialect"] == dialect
    again = facts("delimited", tmp_path, data, name, dialect)
    assert again | {"dialect": dialect} == said


def test_every_byte_is_looked_at(tmp_path: Path) -> None:
    rows = "".join(f"{place},x\n" for place in range(150_000))
    said = facts("delimited", tmp_path, f"id,v\n{rows}late,y\n{rows}".encode(), "long.csv")
    column = said["columns"]["columns"][0]
    assert column["candidates"]["integer"]["misfits"] == 1
    assert column["candidates"]["integer"]["first"] == [150_002, "late"]
    assert said["records"] == said["columns"]["records"] == 300_001


@pytest.mark.parametrize(("name", "data"), [("e.csv", b""), ("e.csv", b"\n\n"), ("e.xlsx", b"")])
def test_an_empty_file_has_no_columns(name: str, data: bytes, tmp_path: Path) -> None:
    said = facts("delimited" if name == "e.csv" else "excel_sheets", tmp_path, data, name)
    assert (said["records"], said["names"], said["dialect"]) == (0, [], {})
    assert said["columns"] == {"records": 0, "columns": []}


NAMES = "name,amount\n" + "".join(f"Ann {place}.,{place}.5\n" for place in range(1, 5))


@pytest.mark.parametrize(
    ("last", "footer"),
    [
        ("Total Energies,102579", ""),
        ("Total,102579", ""),
        ("Total,12.00", "^Total,"),
        ("Total:,12.0", "^Total:,"),
        ("Total,", "^Total,"),
        ("Total Energies,1,2", "^Total Energies,"),
    ],
)
def test_a_row_that_begins_like_totals_is_no_footer(last: str, footer: str, tmp_path: Path) -> None:
    suggest = facts("delimited", tmp_path, f"{NAMES}{last}\n".encode(), "t.csv")["suggest"]
    assert suggest.get("footer", "") == footer


def test_a_workbook(tmp_path: Path) -> None:
    rows = [["Orders of 2026"], [], ["id", "amount"], [1, 1.5], [2, "n/a"], ["Total 2026", 1.5]]
    said = facts("excel_sheets", tmp_path, book(rows), "book.xlsx")
    assert (said["header_line"], said["names"], said["sheets"]) == (3, ["id", "amount"], ["Sheet"])
    assert (said["read"], said["records"]) == (4, 3)
    assert said["suggest"] == {"header": "^id;amount", "footer": "^Total [0-9]+;"}
    again = facts("excel_sheets", tmp_path, book(rows), "book.xlsx", said["suggest"])
    assert (again["records"], again["skipped"]["footer"]) == (2, 1)
