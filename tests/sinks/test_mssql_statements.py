"""What the SQL Server sink sends, word for word: tests/sinks/mssql_statements.sql is approved.

After a change: python -m tests.sinks.test_mssql_statements, and read the diff.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.dialects.mssql.mssqlpython import MSDialect_mssqlpython

from casparian_flow.engine.sinks import mssql_statements as statements
from casparian_flow.engine.sinks.base import LINEAGE
from casparian_flow.engine.sinks.mssql_statements import Declared, Statement, Statements

APPROVED = Path(__file__).parent / "mssql_statements.sql"

KEY, SLOT = "<output key>", "<slot>"
ROWS = (101, 7, "<source hash>", "1.2.3")
NAMES = ["id", "a ]] b", *LINEAGE]


def sent() -> Iterator[tuple[str, Statement]]:
    """Every statement under the name of the function that makes it."""
    ask = Statements("dbo", "sales")
    described = [Declared("id", "bigint"), Declared("a ]] b", "nvarchar(max)")]
    made = {
        "begin_session": [statements.begin_session(30.0)],
        "default_schema": [statements.default_schema()],
        "lock": [statements.lock("casparian:<output key>", 30.0)],
        "lock, of a session": [statements.lock("casparian_stage_x", 0, session=True)],
        "unlock": [statements.unlock("casparian_stage_x")],
        "columns": [statements.columns("dbo", "sales")],
        "stage_tables": [statements.stage_tables("dbo", "0a1b2c3d")],
        "create": statements.create("dbo", "sales", [*described, *statements._LINEAGE]),
        "create_stage": [statements.create_stage("dbo", "casparian_stage_x", described)],
        "drop": [statements.drop("dbo", "casparian_stage_x")],
        "add_columns": [statements.add_columns("dbo", "sales", described)],
        "create_ledger": ask.create_ledger(),
        "recorded": [ask.recorded(KEY)],
        "in_table": [ask.in_table()],
        "in_slot": [ask.in_slot(SLOT)],
        "others": [ask.others("sales")],
        "record": [ask.record({"output_key": KEY, "topic": "sales", "state": "shown"})],
        "mark": [ask.mark(KEY, "replaced")],
        "forget": [ask.forget(KEY)],
        "insert_staged": [ask.insert_staged("casparian_stage_x", NAMES)],
        "delete_rows": [ask.delete_rows(ROWS)],
        "move_out": ask.move_out(ROWS, NAMES),
        "move_back": ask.move_back(ROWS, NAMES),
        "delete_retracted": [ask.delete_retracted(ROWS)],
        "counts": [ask.counts("sales")],
    }
    for name, of_name in made.items():
        for statement in of_name:
            yield name, statement


def page() -> str:
    """All of them, as a person reads them."""
    texts = []
    for name, statement in sent():
        values = f"\n-- ? = {statement.values}" if statement.values else ""
        lines = "\n".join(line.rstrip() for line in statement.sql.splitlines())
        texts.append(f"-- {name}{values}\n{lines};\n")
    return "\n".join(texts)


def test_they_are_the_approved_ones() -> None:
    assert page() == APPROVED.read_text("utf-8")


def test_each_value_has_its_mark() -> None:
    for name, statement in sent():
        assert statement.sql.count("?") == len(statement.values), name


def test_all_that_there_are_is_on_the_page() -> None:
    public = {n for n in vars(Statements) if not n.startswith("_")} | {
        n
        for n, value in vars(statements).items()
        if getattr(value, "__module__", "") == statements.__name__ and n[0].islower()
    }
    shown = {name.partition(",")[0] for name, _ in sent()}
    assert public - shown <= {"name", "retracted_name"}


@pytest.mark.parametrize(
    "name", ["]", "a]b", "]]", "x'; DROP TABLE t; --", "a\nb", "%s", ":x", "?", "🐟", "[", " "]
)
def test_names_are_quoted_as_the_dialect_quotes_them(name: str) -> None:
    quoted = MSDialect_mssqlpython().identifier_preparer.quote_identifier(name)
    assert quoted == "[" + name.replace("]", "]]") + "]"
    assert statements.name("dbo", name) == f"[dbo].{quoted}"
    (copy,) = [Statements("dbo", "t").insert_staged(name, [name])]
    assert (
        copy.sql == f"INSERT INTO [dbo].[t] ({quoted}) SELECT r.{quoted} \nFROM [dbo].{quoted} AS r"
    )
    assert copy.values == ()


@pytest.mark.parametrize("table", ["sales", "x" * 128, "🐟" * 64, "ü" * 115])
def test_what_is_retracted_has_a_table_of_its_own(table: str) -> None:
    name = statements.retracted_name(table)
    assert name.startswith("_cf_retracted_")
    assert len(name.encode("utf-16-le")) <= 256
    assert name != statements.retracted_name(table[:-1] + "y")


if __name__ == "__main__":
    APPROVED.write_text(page(), "utf-8")
