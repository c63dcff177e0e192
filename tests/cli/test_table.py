"""`casparian table`: two folders' worth of files become typed tables, and nothing is lost."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from casparian_flow.services.tables import Judged
from tests.commands import Casparian, add_source, holds, initialized

PREAMBLE = "Bericht der Bank\nErstellt am 01.12.2026\n"
HEADER = "Auftrag;Datum;Betrag;Ort;PLZ"
FOOTER = "Summe;;;;\n"
CITIES = ("Köln", "Gröditz", "Zürich", "Bern")
BAD_LINE = 10
"""The line of the one bad date, in sales_2.csv."""


def sales(number: int, rows: int, more: str = "", cell: str = "") -> bytes:
    """A report of a bank, with a date in May and amounts with a decimal comma."""
    text = PREAMBLE + HEADER + more + "\n"
    for row in range(rows):
        amount = f"{1000 + row * 7.5:,.2f}".translate(str.maketrans(",.", ".,"))
        city, postal = CITIES[row % len(CITIES)], f"0{3000 + row}"
        text += (
            f"{number * 10_000 + row};{row % 28 + 1:02}.05.2026;{amount};{city};{postal}{cell}\n"
        )
    return (text + FOOTER).encode("cp1252")


def inventory(number: int) -> str:
    return "item,stock,seen\n" + "".join(
        f"part {number}-{row},{row},2026-05-{row % 28 + 1:02}T10:00:00\n" for row in range(30)
    )


def fill(source: Path) -> None:
    for number in (1, 2, 3):
        content = sales(number, 400)
        if number == 2:
            lines = content.split(b"\n")
            order, _, rest = lines[BAD_LINE - 1].split(b";", 2)
            lines[BAD_LINE - 1] = b";".join([order, b"30.02.2026", rest])
            content = b"\n".join(lines)
        (source / f"sales_{number}.csv").write_bytes(content)
        (source / f"inventory_{number}.csv").write_text(inventory(number))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Casparian:
    """Two tables, their files processed; to be looked at only."""
    casparian = initialized(tmp_path_factory.mktemp("shop") / "flow")
    fill(add_source(casparian))
    casparian.run("scan")
    casparian.run("table", "add", "sales", "sales_*.csv", "--yes")
    casparian.run("table", "add", "inventory", "inventory_*.csv", "--yes")
    casparian.run("scan", "--drain")
    return casparian


def rows(casparian: Casparian, sql: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = casparian.json("query", sql)
    return found


def types(casparian: Casparian, table: str) -> dict[str, str]:
    return {
        row["column_name"]: row["column_type"]
        for row in rows(casparian, f"DESCRIBE {table}")
        if not row["column_name"].startswith("_cf_")
    }


def test_columns_have_the_types_that_every_byte_speaks_for(shop: Casparian) -> None:
    assert types(shop, "sales") == {
        "Auftrag": "BIGINT", "Datum": "DATE", "Betrag": "DECIMAL(18,2)", "Ort": "VARCHAR",
        "PLZ": "VARCHAR",
    }  # fmt: skip
    assert types(shop, "inventory") == {"item": "VARCHAR", "stock": "BIGINT", "seen": "TIMESTAMP"}
    (first,) = rows(shop, 'SELECT * FROM sales WHERE "Auftrag" = 10001')
    assert first["Datum"] == "2026-05-02" and first["Betrag"] == "1007.50"
    assert first["Ort"] == "Gröditz" and first["PLZ"] == "03001"


def test_every_record_is_a_row_or_a_reject_with_its_line(shop: Casparian) -> None:
    assert rows(shop, "SELECT count(*) AS n FROM sales") == [{"n": 1199}]
    assert rows(shop, "SELECT count(*) AS n FROM inventory") == [{"n": 90}]
    (reject,) = rows(shop, 'SELECT line, "column", value, rule FROM sales_rejects')
    assert reject == {
        "line": BAD_LINE, "column": "Datum", "value": "30.02.2026", "rule": "date",
    }  # fmt: skip
    holds(shop)


def test_list_and_show_say_what_there_is(shop: Casparian) -> None:
    listed = {row["table"]: row for row in shop.json("table", "list")}
    assert listed["sales"]["columns"] == 5 and listed["sales"]["versions"] == 3
    shown = shop.json("table", "show", "sales")
    assert [row["version"] for row in shown["versions"]] == ["1.0.0"]
    counts = {row["rel_path"]: (row["rows"], row["rejects"]) for row in shown["files"]}
    assert counts == {
        "sales_1.csv": (400, 0), "sales_2.csv": (399, 1), "sales_3.csv": (400, 0),
    }  # fmt: skip
    assert "Betrag" in shop.out("table", "show", "sales")
    assert "decimal(18,2)" in shop.out("table", "show", "sales", "--toml")


def test_a_table_is_tried_like_any_plugin(shop: Casparian) -> None:
    found = shop.json("try", "sales", "in/sales_2.csv", "--rows", "1")
    balance = found["balance"]
    assert (balance["published"], balance["rejected"]) == (399, 1)
    assert balance["read"] == balance["published"] + balance["rejected"] + balance["skipped"]
    assert found["topics"]["sales"]["columns"]["Betrag"] == "decimal128(18, 2)"


def test_a_contract_that_fits_differs_in_nothing_but_the_bad_date(shop: Casparian) -> None:
    found = shop.json("table", "diff", "inventory")
    assert all(row["contract"] == row["files"] for row in found["columns"])
    assert found["balance"]["published"] == 90 and not found["not_taken"]


def test_a_name_that_is_taken_is_refused(shop: Casparian) -> None:
    said = shop.err("table", "add", "sales", "sales_*.csv", "--yes", code=65)
    assert "casparian table set sales" in said
    said = shop.err("table", "add", "sales_rejects", "sales_*.csv", "--yes", code=65)
    assert "sales" in said
    shop.err("table", "show", "absent", code=66)
    shop.err("table", "accept", "sales", code=66)


def test_nothing_is_asked_and_nothing_changed_without_a_terminal(shop: Casparian) -> None:
    before = shop.json("plugins", "list")
    said = shop.err("table", "add", "again", "sales_*.csv", code=1)
    assert "--yes" in said
    assert "dry run" in shop.out("table", "add", "again", "sales_*.csv", "--dry-run")
    assert shop.json("plugins", "list") == before


def test_what_does_not_match_is_told_what_to_type(casparian: Casparian) -> None:
    said = casparian.err("table", "add", "sales", "../in/sales_*.csv", "--yes", code=66)
    assert "casparian source add ../in" in said
    source = add_source(casparian)
    (source / "stock_1.csv").write_text(inventory(1))
    said = casparian.err("table", "add", "stock", "../in/stock_*.csv", "--yes", code=66)
    assert "casparian scan; casparian table add NAME 'stock_*.csv'" in said
    casparian.run("scan")
    said = casparian.err("table", "add", "stock", "*.csv", "--type", "stock=money", code=65)
    assert "money" in said
    casparian.err("table", "add", "stock", "*.csv", "--format", "seen=%Q", "--yes", code=65)
    said = casparian.err("table", "add", "stock", "*.csv", "--header", "(", "--yes", code=65)
    assert "missing ): (\n" in said
    for option, value in (("--decimal", "xx"), ("--drift", "keep"), ("--max-rejects", "few")):
        said = casparian.err("table", "add", "stock", "*.csv", option, value, "--dry-run", code=65)
        assert repr(value) in said and "surveyed" not in said
    said = casparian.err("table", "add", "my stock", "*.csv", "--dry-run", code=65)
    assert "the table's name is 'my stock'" in said
    casparian.err("table", "add", "stock", "*.csv", "--to", "ftp://out", "--yes", code=78)
    assert "casparian scan" in casparian.err("table", "add", "sales", "sales_*.csv", code=66)
    casparian.err("table", "add", "sales", code=2)
    casparian.err("table", "add", "sales", "*.csv", "--type", "amount", code=2)


def test_empty_files_are_left_out_and_said(casparian: Casparian) -> None:
    source = add_source(casparian)
    for name, text in (("a", ""), ("b", inventory(1)), ("c", "\n\n")):
        (source / f"stock_{name}.csv").write_text(text)
    casparian.run("scan")
    said = casparian.out("table", "add", "stock", "stock_*.csv", "--yes")
    for name in ("a", "c"):
        assert f"stock_{name}.csv has no rows: it is left out" in said
    assert "integer" in casparian.out("table", "diff", "stock")
    (source / "none_1.csv").write_text("")
    casparian.run("scan")
    said = casparian.err("table", "add", "none", "none_*.csv", "--yes", code=1)
    assert "all of these files are empty" in said


def test_a_file_that_fails_for_its_rejects_shows_them(casparian: Casparian) -> None:
    source = add_source(casparian)
    (source / "stock_1.csv").write_text(inventory(1))
    casparian.run("scan")
    options = ("--type", "item=integer", "--max-rejects", "3")
    done = casparian.run("table", "add", "stock", "stock_*.csv", *options, "--yes", code=1)
    assert "of 0 read" not in done.stdout and "nothing would be published" in done.stdout
    assert "30 of 30 records are rejected" in done.stdout
    assert "30  item: 'part 1-0' is no integer" in done.stdout


def test_a_document_wins_over_what_the_files_say(
    shop: Casparian, casparian: Casparian, tmp_path: Path
) -> None:
    document = shop.out("table", "show", "inventory", "--toml")
    assert "timestamp" in document
    file = tmp_path / "inventory.toml"
    file.write_text(document.replace("integer", "decimal(18,2)"))
    source = add_source(casparian)
    fill(source)
    casparian.run("scan")
    casparian.run("table", "add", "--from", file, "--yes")
    casparian.run("scan", "--drain")
    assert types(casparian, "inventory")["stock"] == "DECIMAL(18,2)"
    assert rows(casparian, "SELECT count(*) AS n FROM inventory") == [{"n": 90}]


def test_a_held_file_is_taken_once_a_person_agrees(casparian: Casparian) -> None:
    source = add_source(casparian)
    fill(source)
    casparian.run("scan")
    casparian.run("table", "add", "sales", "sales_*.csv", "--yes")
    casparian.run("scan", "--drain")
    (source / "sales_4.csv").write_bytes(sales(4, 30, ";Rabatt", ";5"))
    casparian.run("scan", "--drain", code=1)
    assert rows(casparian, "SELECT count(*) AS n FROM sales") == [{"n": 1199}]
    (held,) = casparian.json("jobs", "--held")
    assert "Rabatt" in held["reason"]
    said = casparian.out("table", "accept", "sales", "in/sales_4.csv", "--dry-run")
    assert "Rabatt" in said and "integer" in said
    # Killed between the new version and its jobs, it is done by the same command.
    assert casparian.killed("architect.deployed", "table", "accept", "sales", "--yes")
    assert len(casparian.json("jobs", "--held")) == 1
    casparian.run("table", "accept", "sales", "--yes")
    assert len(casparian.json("table", "show", "sales")["versions"]) == 2
    casparian.run("scan", "--drain")
    assert rows(casparian, "SELECT count(*) AS n FROM sales") == [{"n": 1229}]
    assert types(casparian, "sales")["Rabatt"] == "BIGINT"
    assert casparian.json("jobs", "--held") == []
    (source / "sales_5.csv").write_bytes(sales(5, 10))  # the earlier form is still taken
    casparian.run("scan", "--drain")
    casparian.run("table", "set", "sales", "--type", "Auftrag=text", "--redo", "--yes")
    casparian.run("scan", "--drain")
    assert types(casparian, "sales")["Auftrag"] == "VARCHAR"
    assert rows(casparian, "SELECT count(*) AS n FROM sales") == [{"n": 1239}]
    holds(casparian)


@pytest.fixture
def daily(casparian: Casparian) -> Path:
    """The source of a table p, whose columns are of the file and of its path; the key is a text."""
    source = add_source(casparian)
    (source / "p_2026-05-01.csv").write_text("k;note;n\na;x;1\nb;;2\n;y;3\nk.A.;z;4\n")
    casparian.run("scan")
    casparian.run("table", "add", "p", "p_{day:%Y-%m-%d}.csv", "--key", "k", "--yes")
    casparian.run("scan", "--drain")
    return source


def keys(casparian: Casparian) -> list[str]:
    return [row["k"] for row in rows(casparian, "SELECT k FROM p ORDER BY k")]


def test_what_is_missing_stays_missing(casparian: Casparian, daily: Path) -> None:
    assert keys(casparian) == ["a", "b", "k.A."]
    casparian.run("table", "set", "p", "--missing", "k.A.", "--redo", "--yes")
    casparian.run("scan", "--drain")
    assert keys(casparian) == ["a", "b"]
    assert rows(casparian, "SELECT count(*) AS n FROM p_rejects WHERE rule = 'required'") == [
        {"n": 2}
    ]
    casparian.run("table", "set", "p", "--key", "n", "--redo", "--yes")
    casparian.run("scan", "--drain")
    assert rows(casparian, "SELECT n FROM p WHERE k IS NULL ORDER BY n") == [{"n": 3}, {"n": 4}]
    holds(casparian)


def test_a_path_without_its_value_is_held(casparian: Casparian, daily: Path) -> None:
    (daily / "p_draft.csv").write_text("k;note;n\nc;;5\n")
    casparian.run("scan", "--drain", code=1)
    (held,) = casparian.json("jobs", "--held")
    assert "column day is not in the path" in held["reason"]
    said = casparian.err("table", "accept", "p", "--yes", code=1)
    assert "casparian table set p --from" in said
    assert keys(casparian) == ["a", "b", "k.A."]


def test_a_placeholder_of_some_patterns_is_optional(casparian: Casparian) -> None:
    source = add_source(casparian)
    (source / "p_eu.csv").write_text("n\n1\n")
    (source / "old.csv").write_text("n\n2\n")
    casparian.run("scan")
    casparian.run("table", "add", "p", "p_{region}.csv", "old.csv", "--yes")
    casparian.run("scan", "--drain")
    assert rows(casparian, "SELECT n, region FROM p ORDER BY n") == [
        {"n": 1, "region": "eu"}, {"n": 2, "region": None},
    ]  # fmt: skip


def test_columns_that_no_contract_takes_are_named(casparian: Casparian, daily: Path) -> None:
    (daily / "p_2026-05-02.csv").write_text("k;note;N\nc;;5\n")
    (daily / "p_2026-05-03.csv").write_text("note;n\nz;6\n")
    casparian.run("scan", "--drain", code=1)
    for path, conflict in (
        ("in/p_2026-05-02.csv", "column N differs from n in case only"),
        ("in/p_2026-05-03.csv", "column k is missing, and it is in the key"),
    ):
        said = casparian.err("table", "accept", "p", path, "--yes", code=1)
        assert conflict in said
        assert "casparian table show p --toml" in said and "table set p --from" in said
    assert len(casparian.json("jobs", "--held")) == 2


def test_a_column_that_need_not_be_there_keeps_what_is_missing(
    casparian: Casparian, tmp_path: Path
) -> None:
    source = add_source(casparian)
    (source / "p_1.csv").write_text("k;n\na;1\n;2\n")
    document = tmp_path / "p.toml"
    document.write_text(
        'table = "p"\nfiles = ["p_*.csv"]\n'
        '[columns]\nk = { type = "text", required = true }\nn = "integer"\n'
    )
    casparian.run("scan")
    casparian.run("table", "add", "--from", document, "--yes")
    (source / "p_2.csv").write_text("n\n3\n")
    casparian.run("scan", "--drain", code=1)
    casparian.run("table", "accept", "p", "--yes")
    (source / "p_3.csv").write_text("k;n\n;4\n")
    casparian.run("scan", "--drain")
    assert rows(casparian, "SELECT n FROM p WHERE k IS NULL ORDER BY n") == [{"n": 3}, {"n": 4}]


def letters(casparian: Casparian) -> str:
    """A table `p` of two files with the columns a and b, done; its contract without b."""
    source = add_source(casparian)
    for number in (1, 2):
        (source / f"p_{number}.csv").write_text(f"a,b\n{number},x\n{number + 10},y\n")
    casparian.run("scan")
    casparian.run("table", "add", "p", "p_*.csv", "--yes")
    casparian.run("scan", "--drain")
    document = casparian.out("table", "show", "p", "--toml")
    (casparian.folder / "p.toml").write_text(document)
    lines = document.splitlines(keepends=True)
    narrow = "".join(line for line in lines if not line.startswith("b = "))
    (casparian.folder / "narrow.toml").write_text(narrow)
    return narrow


def test_a_rebuild_that_ends_in_held_files_begins_again_once_a_person_agrees(
    casparian: Casparian,
) -> None:
    letters(casparian)
    assert rows(casparian, "SELECT count(*) AS n FROM p") == [{"n": 4}]
    casparian.run("table", "set", "p", "--from", "narrow.toml", "--redo", "--yes")
    casparian.run("scan", "--drain", code=1)
    assert len(casparian.json("jobs", "--held")) == 2
    for point in ("rebuild.restart_written", "rebuild.restarted"):
        assert casparian.killed(point, "table", "accept", "p", "p_1.csv", "--yes"), point
        holds(casparian)
        if point == "rebuild.restart_written":  # one transaction: nothing has changed
            assert len(casparian.json("jobs", "--held")) == 2
    casparian.run("scan", "--drain")
    assert casparian.run("status", "--check").stderr == ""
    assert casparian.json("jobs", "--held") == []
    assert "rebuild of" not in casparian.out("status")
    assert rows(casparian, "SELECT count(*) AS n, count(b) AS b FROM p") == [{"n": 4, "b": 4}]
    holds(casparian)


def test_a_held_rebuild_ends_by_another_redo_and_the_same_one_is_refused(
    casparian: Casparian,
) -> None:
    letters(casparian)
    casparian.run("table", "set", "p", "--from", "narrow.toml", "--redo", "--yes")
    casparian.run("scan", "--drain", code=1)
    said = casparian.err("table", "set", "p", "--redo", "--yes", code=1)
    assert "0 of 2 jobs ended well" in said
    assert "try: casparian table accept p, or: casparian rebuild p --cancel" in said
    said = casparian.out("table", "set", "p", "--from", "p.toml", "--redo", "--yes")
    assert "it is cancelled, for the contract is another now" in said
    casparian.run("scan", "--drain")
    assert casparian.run("status", "--check").stderr == ""
    assert rows(casparian, "SELECT count(*) AS n, count(b) AS b FROM p") == [{"n": 4, "b": 4}]
    holds(casparian)


def test_a_version_that_two_contracts_have_held_counts_once(casparian: Casparian) -> None:
    letters(casparian)
    source = casparian.folder.parent / "in"
    (source / "p_3.csv").write_text("a,b,c\n3,x,1\n")
    casparian.run("scan", "--drain", code=1)
    casparian.run("table", "set", "p", "--from", "narrow.toml", "--yes")
    casparian.run("backfill", "p", "--redo", "--path", "p_3.csv")
    casparian.run("scan", "--drain", code=1)
    assert len(casparian.json("jobs", "--held")) == 1  # held by two contracts, it is one version
    assert "1 version held" in casparian.out("table", "accept", "p", "--dry-run")
    (listed,) = casparian.json("table", "list")
    assert listed["held"] == 1
    casparian.run("table", "accept", "p", "--yes")
    casparian.run("scan", "--drain")
    assert casparian.json("jobs", "--held") == []
    assert rows(casparian, "SELECT count(*) AS n FROM p") == [{"n": 5}]
    holds(casparian)


def test_a_held_version_is_queued_again_for_a_contract_that_has_had_it(
    casparian: Casparian,
) -> None:
    letters(casparian)
    (casparian.folder.parent / "in" / "p_3.csv").write_text("a,b,c\n3,x,1\n")
    casparian.run("scan", "--drain", code=1)
    casparian.run("table", "accept", "p", "--yes")
    (job,) = casparian.json("jobs", "--status", "QUEUED")
    casparian.run("jobs", "abort", str(job["id"]))
    casparian.run("table", "set", "p", "--from", "p.toml", "--yes")
    assert len(casparian.json("jobs", "--held")) == 1
    assert "1 held job queued" in casparian.out("table", "accept", "p", "--yes")
    casparian.run("scan", "--drain")
    assert casparian.json("jobs", "--held") == []
    assert rows(casparian, "SELECT count(*) AS n FROM p") == [{"n": 5}]
    holds(casparian)


def test_a_redo_without_another_change_is_asked_for(casparian: Casparian) -> None:
    letters(casparian)
    assert "--yes" in casparian.err("table", "set", "p", "--redo", code=1)
    assert "rebuild of" not in casparian.out("status")
    casparian.run("table", "set", "p", "--redo", "--yes")
    casparian.run("scan", "--drain")
    assert rows(casparian, "SELECT count(*) AS n FROM p") == [{"n": 4}]


def test_rejects_of_a_large_file_are_remembered_in_little_memory() -> None:
    judged = Judged("p", records=True)
    number = 200_000
    names = ("record", "column", "rule", "line", "value", "reason")
    columns = [pa.array(range(number), pa.int64())]
    columns += [pa.array(["a"] * number) for _ in names[1:]]
    judged.see("p_rejects", pa.record_batch(columns, list(names)))
    assert judged.records is not None
    assert len(judged.records) == number
    assert sys.getsizeof(judged.records) < 10 * number


def test_a_removed_table_takes_no_more_files_and_keeps_its_rows(casparian: Casparian) -> None:
    source = add_source(casparian)
    (source / "inventory_1.csv").write_text(inventory(1))
    casparian.run("scan")
    casparian.run("table", "add", "inventory", "inventory_*.csv", "--yes")
    casparian.run("scan", "--drain")
    assert "retract" in casparian.out("table", "remove", "inventory")
    (source / "inventory_2.csv").write_text(inventory(2))
    casparian.run("scan", "--drain")
    assert rows(casparian, "SELECT count(*) AS n FROM inventory") == [{"n": 30}]


@pytest.mark.slow
def test_thirty_seven_of_a_million_are_rejects_until_their_type_is_mended(
    casparian: Casparian, seed: int
) -> None:
    total, bad = 1_000_000, 37
    source = add_source(casparian)
    odd = set(random.Random(seed).sample(range(total), bad))
    with (source / "stock_1.csv").open("w") as file:
        file.write("item,pieces,day\n")
        for row in range(total):
            pieces = f"{row} pcs" if row in odd else str(row)
            file.write(f"part {row},{pieces},2026-05-{row % 28 + 1:02}\n")
    casparian.run("scan")
    said = casparian.out("table", "add", "stock", "stock_*.csv", "--yes")
    assert f"{total - bad:,} would be published, {bad} rejected" in said
    casparian.run("scan", "--drain")
    assert types(casparian, "stock")["pieces"] == "BIGINT"
    assert rows(casparian, "SELECT count(*) AS n FROM stock") == [{"n": total - bad}]
    lines = {row["line"] for row in rows(casparian, "SELECT line FROM stock_rejects")}
    assert lines == {row + 2 for row in odd}
    said = casparian.out("table", "set", "stock", "--type", "pieces=text", "--redo", "--yes")
    assert f"{bad} records would move from the rejects to the table" in said
    casparian.run("scan", "--drain")
    assert rows(casparian, "SELECT count(*) AS n FROM stock") == [{"n": total}]
    assert rows(casparian, "SELECT count(*) AS n FROM stock_rejects") == [{"n": 0}]
    holds(casparian)
