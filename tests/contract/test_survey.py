"""What is proposed for files whose columns a person has typed before (invented look-alikes)."""

from __future__ import annotations

import csv
import datetime
import io
import json
import random
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from casparian_flow.contract import read
from casparian_flow.proposal import Proposal, Proposed, merge
from casparian_flow.sdk import column_names
from casparian_flow.survey import Survey
from casparian_flow.typed import Typed

MANY = 3000
CHANCE = random.Random(7)


def survey(text: str, delimiter: str = ",", hints: dict[str, Any] | None = None) -> dict[str, Any]:
    """The facts of one file, as they come back from a guest."""
    names, *rows = csv.reader(io.StringIO(text), delimiter=delimiter)
    found = Survey(column_names(names), hints or {})
    for start in range(0, len(rows), 700):
        batch = rows[start : start + 700]
        arrays = [pa.array(cells, pa.string()) for cells in zip(*batch, strict=True)]
        found.add(arrays, range(start + 2, start + 2 + len(batch)))
    facts: dict[str, Any] = json.loads(json.dumps(found.facts()))
    return facts | {"dialect": {"delimiter": delimiter}}


def propose(text: str, delimiter: str = ",", hints: dict[str, Any] | None = None) -> Proposal:
    return merge([survey(text, delimiter, hints)])


def of_column(cells: list[str], hints: dict[str, Any] | None = None) -> Proposed:
    (found,) = propose("\n".join(["a", *(f'"{cell}"' for cell in cells)]), ";", hints).columns
    return found


def words(column: Proposed) -> dict[str, Any]:
    return {key: value for key, value in column.words.items() if key != "name"}


def integer(low: int, high: int) -> str:
    return str(CHANCE.randint(low, high))


def day(form: str) -> str:
    return (datetime.date(2019, 1, 1) + datetime.timedelta(CHANCE.randint(0, 2500))).strftime(form)


def european() -> str:
    whole = f"{CHANCE.randint(0, 3 * 10**6):,}".replace(",", ".")
    return f"{whole},{CHANCE.randint(0, 99):02}"


def missing(text: str, token: str = "") -> str:
    return token if CHANCE.random() < 0.05 else text


FAMILIES: dict[str, tuple[str, dict[str, tuple[Any, dict[str, Any]]]]] = {
    "government": (
        ",",
        {
            "fips": (lambda n: f"{n % 60 + 1:02}{n % 7:03}", {"type": "text"}),
            "county": (lambda n: f"County {n}", {"type": "text"}),
            "population": (lambda n: f"{n * 977:,}", {"type": "integer", "groupChar": ","}),
            "founded": (lambda n: integer(1780, 1950), {"type": "integer"}),
            "median income": (
                lambda n: missing(integer(20_000, 99_000), "N/A"),
                {"type": "integer", "missingValues": ["", "N/A"]},
            ),
            "share": (lambda n: f"{n % 997 / 997:.3f}", {"type": "decimal(18,3)"}),
            "incorporated": (lambda n: day("%m/%d/%Y"), {"type": "date", "format": "%m/%d/%Y"}),
            "urban": (lambda n: CHANCE.choice(["TRUE", "FALSE"]), {"type": "boolean"}),
            "coastal": (lambda n: CHANCE.choice(["Yes", "No"]), {"type": "text"}),
            "remark": (lambda n: "", {"type": "text"}),
        },
    ),
    "finance": (
        ";",
        {
            "IBAN": (lambda n: f"DE{n:020}", {"type": "text"}),
            "Buchungstag": (lambda n: day("%d.%m.%Y"), {"type": "date", "format": "%d.%m.%Y"}),
            "Valuta": (lambda n: day("%d.%m.%y"), {"type": "text"}),
            "Betrag": (
                lambda n: CHANCE.choice(["", "-"]) + european(),
                {"type": "decimal(18,2)", "decimalChar": ",", "groupChar": "."},
            ),
            "Kurs": (
                lambda n: f"{n % 89},{n % 9973:04}", {"type": "decimal(18,4)", "decimalChar": ","},
            ),
            "PLZ": (lambda n: f"{n * 31 % 99_999:05}", {"type": "text"}),
            "Zweck": (lambda n: CHANCE.choice(["Miete", "Strom 12", "2026"]), {"type": "text"}),
            "Kontonummer": (lambda n: str(10**25 + n), {"type": "decimal(38,0)"}),
            "Saldo": (
                lambda n: missing(european(), "k.A."),
                {"type": "decimal(18,2)", "decimalChar": ",", "groupChar": ".",
                 "missingValues": ["", "k.A."]},
            ),
        },
    ),
    "sensors": (
        "\t",
        {
            "at": (lambda n: f"2026-01-{n % 28 + 1:02}T{n % 24:02}:10Z", {"type": "timestamp[tz]"}),
            "local": (lambda n: f"2026-01-02 {n % 24:02}:{n % 60:02}:00", {"type": "timestamp"}),
            "clock": (lambda n: f"{n % 24:02}:{n % 60:02}", {"type": "time"}),
            "station": (lambda n: CHANCE.choice(["A7", "B12", "C3"]), {"type": "text"}),
            "value": (lambda n: missing(f"{n % 60 - 20}.{n % 10}", "NaN"),
                      {"type": "decimal(18,1)", "missingValues": ["", "NaN"]}),
            "signal": (lambda n: f"{n % 9 + 1}.5e-{n % 9 + 1}", {"type": "double"}),
            "flag": (lambda n: str(n % 2), {"type": "integer"}),
            "epoch": (lambda n: str(1_700_000_000 + n), {"type": "integer"}),
            "stamp": (lambda n: day("%Y%m%d"), {"type": "integer"}),
        },
    ),
    "sports": (
        ",",
        {
            "player": (lambda n: f"Player {n}", {"type": "text"}),
            "average": (lambda n: f".{n % 400:03}", {"type": "decimal(18,3)"}),
            "goals": (lambda n: missing(integer(0, 60)), {"type": "integer"}),
            "plus minus": (lambda n: CHANCE.choice(["+3", "-2", "0"]), {"type": "text"}),
            "height": (lambda n: f"6-{n % 11}", {"type": "text"}),
            "born": (lambda n: day("%Y-%m-%d"), {"type": "date"}),
            "drafted": (
                lambda n: f"{n % 12 + 1}/{n % 28 + 1}/{2000 + n % 20}",
                {"type": "date", "format": "%-m/%-d/%Y"},
            ),
            "season": (lambda n: "2019-20", {"type": "text"}),
            "salary": (lambda n: f"${n * 1000:,}", {"type": "text"}),
            "time": (lambda n: f"{n % 90}:{n % 60:02}.{n % 10}", {"type": "text"}),
        },
    ),
}  # fmt: skip


def file_of(family: str, rows: int) -> str:
    delimiter, columns = FAMILIES[family]
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(columns)
    writer.writerows([make(n) for make, _ in columns.values()] for n in range(rows))
    return out.getvalue()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_proposal_is_what_a_person_would_say(family: str) -> None:
    delimiter, columns = FAMILIES[family]
    text = file_of(family, MANY)
    proposal = propose(text, delimiter)
    assert {each.name: words(each) for each in proposal.columns} == {
        name: said for name, (_, said) in columns.items()
    }
    assert all(each.misfits == 0 for each in proposal.columns)
    contract = {"table": "t", "files": ["*"], "columns": [each.words for each in proposal.columns]}
    rows = list(csv.reader(io.StringIO(text), delimiter=delimiter))
    typed = Typed(read(contract), rows[0], {})
    table, rejects = typed.rows([(at, at, row, "") for at, row in enumerate(rows[1:], start=2)])
    assert (len(table), rejects) == (MANY, []), "what the survey found is what is published"


CASES: list[tuple[list[str], dict[str, Any], str]] = [
    (["03044", "12345"], {"type": "text"}, "03044: a number would lose its zero"),
    (["01/02/2026", "03/04/2026"], {"type": "text"}, "01/02/2026 may be %d/%m/%Y or %m/%d/%Y"),
    (["01/02/2026", "13/04/2026"], {"type": "date", "format": "%d/%m/%Y"},
     "13/04/2026 rules out %m/%d/%Y"),
    (["1/2/26", "3/4/26"], {"type": "text"}, "two digits"),
    (["1-Feb-2026"], {"type": "text"}, "--format a=%-d-%b-%Y"),
    (["ja", "nein"], {"type": "text"}, "--type a=boolean:ja/nein"),
    (["0", "1"], {"type": "integer"}, "--type a=boolean:1/0"),
    (["20260102", "20261231"], {"type": "integer"}, "--format a=%Y%m%d"),
    (["1.234", "5.678"], {"type": "text"}, "--decimal"),
    (["1.234", "5.67"], {"type": "decimal(18,3)"}, "3 digits behind the point"),
    (["1.234", "5.678.900"], {"type": "integer", "groupChar": "."}, "groups of three"),
    (["1,234.5"], {"type": "decimal(18,1)", "groupChar": ","}, "behind the point"),
    (["1 234,5", "7"], {"type": "decimal(18,1)", "decimalChar": ",", "groupChar": " "}, "comma"),
    (["99999999999999999999"], {"type": "decimal(38,0)"}, "64 bits"),
    (["9" * 39], {"type": "text"}, "38"),
    (["123456789012345678.1"], {"type": "decimal(38,1)"}, "point"),
    ([" 7", "8 "], {"type": "integer", "trim": True}, "blanks"),
    (["", ""], {"type": "text"}, "no values"),
    (["NA", "-"], {"type": "text"}, "no values"),
    (["1", "x", "3"], {"type": "text"}, "1 of 3 values are no integer, first 'x' in line 3"),
    (["2026-01-02 10:00:00", "2026-01-02T10:00:00Z"], {"type": "text"}, ""),
    (["2026-01-02", "2026-01-02 10:00"], {"type": "text"}, ""),
    (["30.02.2026", "01.02.2026"], {"type": "text"}, "'30.02.2026' in line 2"),
    (["5/19/2006 0:00:00", "5/6/2006 1:00:00"],
     {"type": "timestamp", "format": "%-m/%-d/%Y %-H:%M:%S"}, "5/19/2006 0:00:00 rules out"),
    (["10.1.2.3", "10.1.2.4"], {"type": "text"}, ""),
    (["1e400"], {"type": "text"}, ""),
    (["1e3", "1014.5"], {"type": "double"}, "exponents"),
]  # fmt: skip


@pytest.mark.parametrize(("cells", "said", "why"), CASES, ids=lambda each: str(each)[:40])
def test_what_can_be_read_in_two_ways_is_not_guessed(
    cells: list[str], said: dict[str, Any], why: str
) -> None:
    found = of_column(cells)
    assert words(found) == said, found.why
    assert why in found.why


def test_one_column_settles_the_decimal_sign_of_another() -> None:
    us = propose('a,b\n"1,234",0.5\n"5,678",1.25\n')
    assert words(us.columns[0]) == {"type": "integer", "groupChar": ","}
    german = propose("a;b\n1.234;0,5\n5.678;1,25\n", ";")
    assert words(german.columns[0]) == {"type": "integer", "groupChar": "."}
    lists = propose('a,b\n"1,7",0.5\n"2,6",1.25\n')
    assert (lists.columns[0].type, lists.columns[0].is_question) == ("text", True)


def test_what_a_person_says_is_tried_as_it_is_said() -> None:
    hints = {"columns": {"a": {"format": "%d.%m.%y"}}}
    found = of_column(["31.12.26", "30.02.26", ""], hints)
    assert words(found) == {"type": "date", "format": "%d.%m.%y"}
    assert (found.misfits, found.first) == (1, (0, 3, "30.02.26"))
    hints = {"columns": {"a": {"type": "boolean", "trueValues": ["ja"], "falseValues": ["nein"]}}}
    assert of_column(["ja", "nein"], hints).misfits == 0
    assert words(of_column(["1.234", "5.678"], {"decimalChar": "."}))["type"] == "decimal(18,3)"
    assert words(of_column(["1.234"], {"decimalChar": ","})) == {
        "type": "integer",
        "groupChar": ".",
    }
    found = of_column(["1", "weg"], {"missingValues": ["weg"]})
    assert words(found) == {"type": "integer", "missingValues": ["", "weg"]}


def test_a_very_few_of_very_many_would_be_rejects() -> None:
    cells = [str(n) for n in range(100_000)]
    for at in range(0, 100_000, 2_703):
        cells[at] = f"bad {at}"
    found = of_column(cells)
    assert (found.type, found.misfits) == ("integer", 37)
    assert found.first == (0, 2, "bad 0")
    assert of_column([*map(str, range(5000)), "12A"]).type == "text", (
        "codes, of which few have letters"
    )
    assert of_column([*map(str, range(500)), "x"]).type == "text", "one of 500 is not very few"
    assert of_column([*map(str, range(5000)), "1.5"]).type == "decimal(18,1)", "which fits all"
    hopeless = [*(f"x{n}" for n in range(1500)), *map(str, range(3_000_0))]
    assert of_column(hopeless).type == "text"


def test_versions_are_judged_together() -> None:
    facts = [
        survey("id,day,zip,x\n1,01/02/2026,123,1\n"),
        survey("id,day,zip,x\n2.5,13/02/2026,045,\n"),
        survey("id,day,zip,neu\n,,,5\n"),
    ]
    proposal = merge(facts)
    assert [words(each) for each in proposal.columns] == [
        {"type": "decimal(18,1)"},
        {"type": "date", "format": "%d/%m/%Y"},
        {"type": "text"},
        {"type": "integer"},
    ]
    assert proposal.records == 3
    assert proposal.differs == {2: (["neu"], ["x"])}
    assert merge([]).columns == ()
    assert merge([survey("a,b\n")]).columns[0].type == "text"


def batches(rows: int) -> Iterator[list[Any]]:
    for start in range(0, rows, 5000):
        numbers = range(start, start + 5000)
        yield [
            pa.array([str(n) for n in numbers]),
            pa.array([f"{n * 7919 % 10**6}.{n % 100:02}" for n in numbers]),
            pa.array([f"text {n * 31}" for n in numbers]),
            pa.array([str(n * 104_729 % 10**9) for n in numbers]),
        ]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file() -> None:
    found = Survey(["a", "b", "c", "d"], {})
    kept = []
    tracemalloc.start()
    for at, arrays in enumerate(batches(150_000)):
        found.add(arrays, range(at * 5000, at * 5000 + 5000))
        if at in (9, 29):
            kept.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert kept[1] < kept[0] + (1 << 18)
    assert len(json.dumps(found.facts())) < 20_000


def test_nulls_of_a_workbook_are_missing() -> None:
    found = Survey(["a"], {})
    found.add([pa.array(["1", None, "3"])], [2, 3, 4])
    (column,) = merge([found.facts()]).columns
    assert words(column) == {"type": "integer"}
    assert column.missing == {"": 1}


def test_whole_numbers_beyond_64_bits_may_have_points_as_groups() -> None:
    found = of_column(["1.234.567", "12.345.678.901.234.567.890"])
    assert found.words["type"] == "decimal(38,0)"
    assert (found.words["groupChar"], found.words["decimalChar"]) == (".", ",")
    read({"table": "t", "files": ["*"], "columns": [found.words]})


POOLS = [
    ["1", "-5", "0", "12345678901234567890", "9223372036854775807", "99999999999999999999"],
    ["1.5", "2", ".25", "-0.125", "1e5", "0.10000000000000001", "1e400", "123456789.123456789"],
    ["1.234", "1.234.567", "1,5", "1234,5", "12", "0,5"],
    ["1,234", "1,234.5", "12", "1 234,5", "1 234"],
    ["01.02.2026", "1.2.2026", "30.02.2026", "31.12.2026", "31.12.26"],
    ["01/02/2026", "1/2/2026", "13/02/2026", "02/13/2026"],
    ["2026-01-02", "2026-1-2", "2026-02-30", "2026-01-02 10:00", "2026-01-02T10:00:00.5"],
    ["2026-01-02T10:00:00Z", "2026-01-02 10:00+02", "2026-01-02 10:00:00"],
    ["1/2/2026 1:05 PM", "01/02/2026 12:00 AM", "1/2/2026 13:05 PM", "1/2/2026 10:00"],
    ["10:00", "23:59:59", "25:00", "9:30"],
    ["true", "FALSE", "True", "yes"],
    ["", "NA", "-", "x", " 7", "007", "12A"],
]


@pytest.mark.slow
def test_what_would_be_rejected_is_rejected() -> None:
    """A proposal for random columns, and the same cells under the contract that it makes."""
    seed = random.randrange(10**9)
    print("seed", seed)
    chance = random.Random(seed)
    typed_ones = 0
    for _ in range(150):
        pools = chance.sample(POOLS, chance.choice([1, 1, 1, 2]))
        few = [chance.choice(pool) for pool in pools for _ in range(chance.randint(1, 4))]
        cells = chance.choices(few, k=chance.choice([1, 5, 30, 1500]))
        if len(cells) == 1500:
            cells[chance.randrange(1500)] = chance.choice(chance.choice(POOLS))
        found = of_column(cells)
        contract = read({"table": "t", "files": ["*"], "columns": [found.words]})
        table, rejects = Typed(contract, ["a"], {}).rows(
            [(line, line, [cell], cell) for line, cell in enumerate(cells, start=2)]
        )
        told = (seed, found, cells[:20])
        assert len(rejects) == found.misfits, told
        assert table.column("a").null_count == sum(found.missing.values()), told
        if rejects:
            assert found.first == (0, rejects[0].line, rejects[0].value), told
        typed_ones += found.type != "text"
    assert typed_ones > 15
