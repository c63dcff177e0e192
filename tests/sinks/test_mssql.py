"""What only the SQL Server sink does, over the double of proofs/tds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from casparian_flow.engine.sinks.mssql_session import Session
from casparian_flow.errors import SinkConflict, SinkUnavailable
from casparian_flow.protocol import State
from proofs.tds.catalog import HIDDEN
from proofs.tds.place import ServerPlace
from proofs.tds.server import Server
from tests.sinks.stages import TOPIC


@pytest.fixture
def here(tmp_path: Path, provider: str) -> Iterator[ServerPlace]:
    if not provider:
        pytest.skip("SQL SERVER IS NOT TESTED: mssql-python is not installed")
    with Server() as server:
        yield ServerPlace(server, tmp_path)


def send(here: ServerPlace, *statements: str) -> None:
    with closing(Session(here.settings.mssql)) as session, session.transaction():
        for sql in statements:
            session.send(sql)


def test_views_show_the_newest_and_every_version(here: ServerPlace) -> None:
    (first,) = here.show(here.replacing(1, 1))
    here.show(here.replacing(2, 2), changes=here.tell(State.PAST, first))
    shown = {name: sorted(row["id"] for row in here.rows(TOPIC + name))
             for name in ("", "_current", "_history")}  # fmt: skip
    assert shown == {"": [2], "_current": [2], "_history": [1, 2]}


def test_a_table_of_somebody_else_is_left_untouched(here: ServerPlace) -> None:
    send(here, f"CREATE TABLE [dbo].[{TOPIC}] ([theirs] bigint NULL)")
    (outcome,) = here.publish(here.sealed({"id": [1]}))
    assert isinstance(outcome, SinkConflict)
    assert "was not made by Casparian Flow" in outcome.message
    assert here.rows() == []
    assert "_cf_rows_sales" not in here.tables.names()


def test_a_view_that_may_be_ours_is_waited_for(here: ServerPlace) -> None:
    """The login lacks a right, or somebody has encrypted a view of their own."""
    send(here, f"CREATE OR ALTER VIEW [dbo].[{HIDDEN}] AS SELECT t.name AS [name] "
               "FROM sys.tables AS t")  # fmt: skip
    (outcome,) = here.publish(here.sealed({"id": [1]}, topic=HIDDEN))
    assert isinstance(outcome, SinkUnavailable)
    assert "may not see the definition of the view 'hidden'" in outcome.message
    assert "permissions" in outcome.hint


def test_a_table_named_like_a_view_stays(here: ServerPlace) -> None:
    send(here, f"CREATE TABLE [dbo].[{TOPIC}_history] ([theirs] bigint NULL)")
    here.show(here.sealed({"id": [1]}))
    assert [row["id"] for row in here.rows()] == [1]
    assert here.rows(f"{TOPIC}_history") == []


@pytest.mark.parametrize("order", [["", "_history"], ["_history", ""]])
def test_a_topic_named_like_anothers_view(here: ServerPlace, order: list[str]) -> None:
    for number, suffix in enumerate(order, start=1):
        here.show(here.sealed({"id": [number]}, number, topic=TOPIC + suffix))
    for number, suffix in enumerate(order, start=1):
        assert [row["id"] for row in here.rows(TOPIC + suffix)] == [number]
    here.show(here.sealed({"id": [3], "more": [1]}, 3))
    assert len(here.rows(f"{TOPIC}_history")) == 1


def test_a_table_takes_one_topic(here: ServerPlace) -> None:
    here.show(here.sealed({"id": [1]}))
    other = here.sealed({"id": [2]}, 2, topic="others", location=here.location_of(TOPIC))
    (outcome,) = here.publish(other)
    assert isinstance(outcome, SinkConflict)
    assert f"has the rows of topic {TOPIC!r}" in outcome.message
    assert [row["id"] for row in here.rows()] == [1]


def test_columns_of_nulls_wait_for_a_type(here: ServerPlace) -> None:
    def seen() -> list[Any]:
        return [(row.get("id"), row["_cf_job_id"]) for row in here.rows()]

    (made,) = here.show(here.sealed({"id": pa.nulls(2)}, 1))
    assert seen() == [(None, 1), (None, 1)]
    assert here.check([made]) == []
    here.show(here.sealed({"id": ["a"]}, 2))
    assert seen() == [(None, 1), (None, 1), ("a", 2)]


def test_schemas_have_ledgers_of_their_own(here: ServerPlace) -> None:
    """One job, tables in two schemas: one transaction."""
    far = {"topic": "far", "location": "mssql://other.far", "uri": "mssql://other.far"}
    made = here.show(here.sealed({"id": [1]}, 1), here.sealed({"id": [2]}, 1, **far))
    assert [output.target for output in made] == ["mssql://dbo.sales", "mssql://other.far"]
    assert here.check(made[:1]) == here.sink.check(made[1:]) == []
    assert [row["id"] for row in here.rows("other.far")] == [2]
    assert {"_cf_outputs", "other._cf_outputs"} <= {*here.tables.names()}
