"""What the SQL Server sink sends, word for word: tests/sinks/mssql_statements.sql is approved.

After a change: python -m tests.sinks.test_mssql_statements, and read the diff.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
from sqlalchemy.dialects.mssql.mssqlpython import MSDialect_mssqlpython

from casparian_flow.engine import sinks
from casparian_flow.engine.sinks import mssql
from casparian_flow.engine.sinks.mssql_session import Session
from casparian_flow.engine.sinks.mssql_tables import named_after, qualified, quote
from casparian_flow.engine.sinks.sql import ROWS
from casparian_flow.protocol import Output, State
from proofs.tds import driver
from proofs.tds.place import ServerPlace
from proofs.tds.server import Server
from tests.sinks.earlier_mssql import COLUMNS, Earlier
from tests.sinks.stages import TOPIC

APPROVED = Path(__file__).parent / "mssql_statements.sql"

Sent = list[tuple[str, tuple[Any, ...]]]
"""Statements and their values."""


@contextmanager
def listening() -> Iterator[Sent]:
    """The statements that are sent while the block runs."""
    sent: Sent = []

    def noting(method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(session: Session, sql: str, *values: Any) -> Any:
            sent.append((sql, values))
            return method(session, sql, *values)

        return noted

    with (
        mock.patch.object(Session, "ask", noting(Session.ask)),
        mock.patch.object(Session, "send", noting(Session.send)),
    ):
        yield sent


def acts(folder: Path) -> Iterator[tuple[str, Sent]]:
    """What is done with the sink, and what it sends."""
    with Server() as server:
        here = ServerPlace(server, folder / "sink")
        named = {"mode": "replace", "slot": "one.csv"}
        first = here.sealed({"id": [1], "a ]] b": ["x"]}, 1, attempt="tag-1", **named)
        with listening() as sent:
            (made,) = here.show(first)
        yield "the first output of a topic", sent
        second = here.sealed({"id": [2], "more": [0.5]}, 2, attempt="tag-2", ordinal=2, **named)
        with listening() as sent:
            (later,) = here.show(second, changes=[told(made, State.PAST)])
        yield "one with another column, that takes its place", sent
        alone = here.sealed({"id": [3]}, 3, mode="error", attempt="tag-3")
        with listening() as sent:
            here.show(alone)
        yield "one in mode error", sent
        with listening() as sent:
            here.sink.change([told(later, State.HIDDEN), told(made, State.CURRENT)])
        yield "another version is shown", sent
        with listening() as sent:
            here.sink.delete([later])
        yield "one is deleted", sent
        with listening() as sent:
            assert here.sink.check([made]) == []
        yield "what is there is compared with the ledger", sent
        with listening() as sent:
            assert len([*here.sink.records(())]) == 2
        yield "the records are listed", sent
        dead = here.sealed({"id": [4]}, 4, attempt="tag-4")
        with closing(Session(here.settings.mssql)) as session, session.transaction():
            table = qualified("dbo", mssql.stage_table(dead.stage))
            session.send(f"CREATE TABLE {table} ([id] bigint NULL)")
        with listening() as sent:
            sinks.drop_stages(here.location_of(TOPIC), here.settings, "tag", [])
        yield "stage tables of the dead are dropped", sent
    with Server() as server:
        here = ServerPlace(server, folder / "earlier")
        here.home.mkdir()
        earlier = Earlier(here.settings)
        earlier.topic(TOPIC, COLUMNS)
        earlier.add(here.output(1), [(1, "a")])
        earlier.add(here.output(2), [(2, "b")], "retracted")
        with listening() as sent:
            here.sink.upgrade()
        yield "tables of an earlier release are converted", sent


def told(output: Output, state: State) -> Output:
    return msgspec.structs.replace(output, state=state)


def page() -> str:
    """All of them, as a person reads them; each is shown where it is first sent."""
    texts, shown = [], set[str]()
    with tempfile.TemporaryDirectory() as folder:
        for act, sent in acts(Path(folder)):
            texts.append(f"-- {act}\n")
            for sql, _ in sent:
                if sql not in shown:
                    shown.add(sql)
                    texts.append("\n".join(line.rstrip() for line in sql.splitlines()) + ";\n")
    return "\n".join(texts)


def test_they_are_the_approved_ones(provider: str) -> None:
    if not provider:
        pytest.skip("STATEMENTS TO SQL SERVER ARE NOT COMPARED: mssql-python is not installed")
    assert page() == APPROVED.read_text("utf-8")


def test_each_value_has_its_mark(tmp_path: Path, provider: str) -> None:
    if not provider:
        pytest.skip("STATEMENTS TO SQL SERVER ARE NOT COMPARED: mssql-python is not installed")
    for _, sent in acts(tmp_path):
        for sql, values in sent:
            assert sql.count("?") == len(values), sql
            assert None not in values, sql


@pytest.mark.parametrize(
    "name", ["]", "a]b", "]]", "x'; DROP TABLE t; --", "a\nb", "%s", ":x", "?", "🐟", "[", " "]
)
def test_names_are_quoted_as_the_dialect_quotes_them(name: str) -> None:
    dialect = MSDialect_mssqlpython()  # type: ignore[no-untyped-call]
    quoted = dialect.identifier_preparer.quote_identifier(name)
    assert quoted == "[" + name.replace("]", "]]") + "]" == quote(name)


@pytest.mark.parametrize("table", ["sales", "x" * 128, "🐟" * 64, "ü" * 119, "ü" * 120])
def test_rows_have_a_table_of_their_own(table: str) -> None:
    name = named_after(ROWS, table)
    assert name.startswith(ROWS)
    assert len(name.encode("utf-16-le")) <= 256
    assert name != named_after(ROWS, table[:-1] + "y")


if __name__ == "__main__":
    driver.choose()
    APPROVED.write_text(page(), "utf-8")
