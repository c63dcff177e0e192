"""Records become rows or rejects, none gets lost, and drift waits for a person."""

from __future__ import annotations

import datetime
import random
import time
import tracemalloc
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from casparian_flow.contract import Held, read
from casparian_flow.typed import REJECTS, Typed, reject_table

COLUMNS: dict[str, Any] = {
    "order": {"type": "integer", "required": True, "unique": True},
    "day": {"type": "date", "format": "%d.%m.%Y"},
    "amount": {"type": "decimal(18,2)", "decimalChar": ",", "groupChar": ".", "minimum": 0},
    "zip": "text",
}
NAMES = list(COLUMNS)


def typed(names: Sequence[str] = NAMES, path: dict[str, str] | None = None, **words: Any) -> Typed:
    given = {"table": "sales", "files": ["*.csv"], "columns": COLUMNS} | words
    return Typed(read(given), names, path or {})


def records(*lines: str, first: int = 2) -> list[tuple[int, int, list[str], str]]:
    return [(at, at, line.split(";"), line) for at, line in enumerate(lines, start=first)]


def test_a_record_is_a_row_or_a_reject_with_all_its_faults() -> None:
    sales = typed()
    table, rejects = sales.rows(
        records(
            "1;31.12.2026;1.234,50;03044",
            "2;30.02.2026;-7,25;",
            ";01.02.2026;1234.50;x",
            "1;01.02.2026;5,00;x",
            "3;;;",
        )
    )
    assert table.schema == sales.schema
    assert table.to_pylist() == [
        dict(zip(NAMES, row, strict=True))
        for row in (
            (1, datetime.date(2026, 12, 31), Decimal("1234.5"), "03044"),
            (3, None, None, ""),
        )
    ]
    assert [(each.line, each.column, each.value, each.rule) for each in rejects] == [
        (3, "day", "30.02.2026", "date"),
        (4, "order", "", "required"),
        (5, "order", "1", "unique"),
    ]
    assert "amount: '-7,25' is below 0" in rejects[0].reason
    assert "day: '30.02.2026' is no date" in rejects[0].reason
    assert "'1234.50' is no decimal(18,2)" in rejects[1].reason
    assert rejects[0].raw == "2;30.02.2026;-7,25;"
    assert reject_table(rejects).schema == REJECTS
    assert reject_table([]).num_rows == 0
    assert (sales.published, sales.rejects) == (2, 3)


def test_what_no_sink_can_store_is_escaped() -> None:
    _, rejects = typed().rows([(1, 1, ["\0", "", "", "\ud800"], "\0;;;\ud800")][:0])
    assert rejects == []
    reject = typed().structure(7, 3, "4 fields where the header has 5", "a\0\udce9")
    assert (reject.raw, reject.rule, reject.column) == ("a\\x00\\udce9", "structure", None)


def test_columns_go_by_name() -> None:
    table, _ = typed(["zip", "amount", "day", "order"]).rows(records("x;1,00;01.01.2026;5"))
    assert table.column_names == NAMES
    assert table.to_pylist()[0]["order"] == 5


@pytest.mark.parametrize(
    ("names", "drift", "told"),
    [
        ([*NAMES, "rabatt"], "hold", "column rabatt is new"),
        (NAMES[:3], "hold", "column zip is missing"),
        (["order", "day", "amount", "plz"], "hold", "column plz is new; column zip is missing"),
        (NAMES[1:], "rescue", "column order is missing"),
        (NAMES[1:], "evolve", "column order is missing"),
        (["order", "x"], "rescue", "the file has 1 of the contract's 4 columns; column x is in it"),
        (["order", "x"], "evolve", "the file has 1 of the contract's 4 columns; column x is in it"),
        ([*NAMES, "ZIP"], "evolve", "column ZIP is new"),
        (["Order", "Day", "Amount", "Zip"], "hold", "columns Order, Day, Amount, Zip are new"),
    ],
)
def test_a_version_with_other_columns_is_held(names: list[str], drift: str, told: str) -> None:
    with pytest.raises(Held) as caught:
        typed(names, drift=drift)
    assert str(caught.value).startswith("held: ")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("name", "delimiter", "told"),
    [
        ("order,day,amount,zip", ";", "delimited by ',', and the contract by ';'"),
        ('"order";"day";"amount";"zip"', ",", "delimited by ';', and the contract by ','"),
        ("order day amount zip", ",", "delimited by a tab, and the contract by ','"),
        ("order,day,amount,zip", "", ""),
        ("report of the day", ";", ""),
    ],
)
def test_a_held_file_with_another_delimiter_says_so(name: str, delimiter: str, told: str) -> None:
    with pytest.raises(Held) as caught:
        typed([name], dialect={"delimiter": delimiter})
    assert told in str(caught.value)
    assert bool(told) == ("seems to be delimited" in str(caught.value))


def test_rescue_keeps_the_cells_of_new_columns() -> None:
    sales = typed(["order", "rabatt", "amount", "note"], drift="rescue")
    table, rejects = sales.rows(records("1;5%;1,00;x", "2;;2,00;y", "z;1;1,00;gone"))
    assert [dict(each["_extra"]) for each in table.to_pylist()] == [
        {"rabatt": "5%", "note": "x"},
        {"rabatt": "", "note": "y"},
    ]
    assert table.column("zip").null_count == 2
    assert len(rejects) == 1
    same = typed(drift="rescue")
    assert same.schema == sales.schema
    assert same.rows(records("1;;1,00;x"))[0].column("_extra").null_count == 1


def test_evolve_adds_new_columns_as_text() -> None:
    sales = typed([*NAMES, "rabatt"], drift="evolve")
    table, _ = sales.rows(records("1;;1,00;x;05"))
    assert table.column_names == [*NAMES, "rabatt"]
    assert table.to_pylist()[0]["rabatt"] == "05"


@pytest.mark.parametrize("drift", ["hold", "rescue", "evolve"])
def test_a_file_without_a_header_is_held(drift: str) -> None:
    with pytest.raises(Held):
        typed(["7", "01.01.2026"], drift=drift, columns={"a": "integer", "b": "text"})


def test_columns_of_the_path() -> None:
    words: dict[str, Any] = {
        "files": ["{region}/{day:%Y-%m-%d}.csv"],
        "columns": {
            "n": "integer", "region": {"type": "text", "from": "path"},
            "day": {"type": "date", "from": "path", "required": True},
        },
    }  # fmt: skip
    path = {"region": "eu", "day": "2026-02-01"}
    table, _ = typed(["n"], path, **words).rows(records("1", "2"))
    assert table.to_pylist()[1] == {"n": 2, "region": "eu", "day": datetime.date(2026, 2, 1)}
    table, rejects = typed(["n"], path | {"day": "2026-02-30"}, **words).rows(records("1"))
    assert (len(table), rejects[0].column, rejects[0].value) == (0, "day", "2026-02-30")
    with pytest.raises(Held, match="day is not in the path"):
        typed(["n"], {"region": "eu"}, **words)
    with pytest.raises(Held, match="column region is not in the path"):
        typed(["n"], {"day": "2026-02-01"}, **words)
    with pytest.raises(Held, match="column region is not in the path"):
        typed(["n"], {"day": "2026-02-01"}, drift="rescue", **words)
    words["columns"]["region"]["optional"] = True
    table, _ = typed(["n"], {"day": "2026-02-01"}, **words).rows(records("1"))
    assert table.to_pylist()[0]["region"] is None
    with pytest.raises(Held, match="region is in the file and in the path"):
        typed(["n", "region"], path, drift="rescue", **words)


def test_lines_are_a_column() -> None:
    table, _ = typed(lines=True).rows(records("1;;;", "x;;;", "2;;;", first=10))
    assert table.column("_cf_line").to_pylist() == [10, 12]


def test_a_key_is_complete_and_once() -> None:
    sales = typed(columns=COLUMNS | {"order": "integer"}, key=["order", "zip"])
    table, rejects = sales.rows(records("1;;;a", "1;;;b", "1;;;a", "1;;;", ";;;a"))
    assert len(table) == 2
    assert [(each.line, each.rule) for each in rejects] == [
        (4, "key"), (5, "required"), (6, "required"),
    ]  # fmt: skip
    assert rejects[0].reason == "order, zip: was there before"


@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(0, 12), st.sampled_from("ab\u00fcx" * 40 + "\n")), max_size=8
        ),
        max_size=6,
    )
)
def test_what_is_unique_is_published_once(batches: list[list[tuple[int, str]]]) -> None:
    """Also where the first one is rejected for something else: then the next one counts."""
    columns = {"n": {"type": "integer", "unique": True}, "t": {"type": "text", "unique": True,
                                                               "pattern": "[^x]"}}  # fmt: skip
    sales = typed(["n", "t"], columns=columns)
    published: list[tuple[int, str]] = []
    expected: list[tuple[int, str]] = []
    for batch in batches:
        rows = [(1, 1, [str(number), text], "") for number, text in batch]
        published += [(row["n"], row["t"]) for row in sales.rows(rows)[0].to_pylist()]
        for number, text in batch:
            known = any(number == n or text == t for n, t in expected)
            if text != "x" and not known:
                expected.append((number, text))
    assert published == expected


@pytest.mark.slow
def test_rising_numbers_cost_little_memory() -> None:
    sales = typed(["n"], columns={"n": {"type": "integer", "unique": True}})
    tracemalloc.start()
    for start in range(0, 200_000, 5000):
        lines = range(start, start + 5000)
        texts = pa.array([str(2 * number) for number in lines])
        sales.columns([texts], lines, lines, str)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 5 << 20
    _, rejects = sales.rows(records("399998", "1", "1", "0", "399999"))
    assert [each.line for each in rejects] == [2, 4, 5]


@pytest.mark.parametrize(
    ("limit", "is_refused"),
    [("", False), ("2", False), ("1", True), ("20%", False), ("19.9%", True), ("0", True)],
)
def test_too_many_rejects_refuse_the_version(limit: str, is_refused: bool) -> None:
    sales = typed(max_rejects=limit)
    sales.rows(records("x;;;", *(f"{number};;;" for number in range(8))))
    sales.structure(11, 11, "3 fields where the header has 4", "a;b;c")
    if is_refused:
        with pytest.raises(ValueError, match=r"2 of 10 .* max_rejects is"):
            sales.finish()
    else:
        sales.finish()


CONTROL = r"^Summe;(?P<rows>[\d.]+);(?P<sum_amount>[-\d.,]+)"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("Summe;3;1.241,75;\r\n", ""),
        ("Summe;3;1241,75", ""),
        ("Summe;2;1.241,75", "'2', but it is 3"),
        ("Summe;3;1.241,76", "'1.241,76', but it is 1,241.75"),
        ("Summe;3;1241.75", "'1241.75', but it is 1,241.75"),
        ("Total;3;1.241,75", "no line"),
    ],
)
def test_control_totals_are_checked(line: str, told: str) -> None:
    """Cells that can be read count, also in a row that is rejected for something else."""
    sales = typed(dialect={"control": CONTROL})
    sales.rows(records("1;;1.234,50;", "x;;7,25;"))
    sales.structure(4, 4, "2 fields where the header has 4", "a;b")
    if told:
        with pytest.raises(ValueError, match=r"nothing of this version|no line") as caught:
            sales.finish(["Bericht", line])
        assert told in str(caught.value)
    else:
        sales.finish(["Bericht", line])


def test_totals_are_exact_beyond_any_column() -> None:
    columns = {"n": "integer", "d": "decimal(38,0)"}
    control = r"(?P<sum_n>-?\d+) (?P<sum_d>\d+)"
    sales = typed(["n", "d"], columns=columns, dialect={"control": control})
    sales.rows(records(*[f"{2**63 - 1};{10**37}"] * 5))
    sales.finish([f"{5 * (2**63 - 1)} {5 * 10**37}"])
    with pytest.raises(ValueError, match="sum_d"):
        sales.finish([f"{5 * (2**63 - 1)} {5 * 10**37 + 1}"])


BAD = ["1.5", "007", "0x10", "1e3", "+5", "1_000", "nan", " 7", "99999999999999999999", "x"]


@pytest.mark.slow
def test_37_bad_of_a_million_are_37_rejects() -> None:
    seed = random.randrange(10**9)
    print("seed", seed)
    chance = random.Random(seed)
    count = 1_000_000
    bad = dict.fromkeys(sorted(chance.sample(range(count), 37)))
    for at in bad:
        bad[at] = chance.choice(BAD)
    sales = typed(columns=COLUMNS | {"order": "integer"})
    start, rejects = time.process_time(), []
    for first in range(0, count, 5000):
        lines = range(first, first + 5000)
        numbers = [bad.get(at) or str(at) for at in lines]
        same = ("01.02.2026", "1.234,50", "03044")
        arrays = [pa.array(numbers), *(pa.array([text] * 5000) for text in same)]
        raws = [f"{number};01.02.2026;1.234,50;03044" for number in numbers]
        rejects += sales.columns(arrays, lines, lines, raws.__getitem__)[1]
    print("CPU seconds", time.process_time() - start)
    assert [(each.line, each.value) for each in rejects] == list(bad.items())
    assert all(each.raw == f"{each.value};01.02.2026;1.234,50;03044" for each in rejects)
    assert (sales.published, sales.rejects) == (count - 37, 37)
