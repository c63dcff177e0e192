"""What becomes of each error of the server (docs/faults.md F82, F83 and F85 among them)."""

from __future__ import annotations

from pathlib import Path

import pytest

from casparian_flow.engine.sinks import mssql_session
from casparian_flow.engine.sinks.mssql_tables import MssqlSchema
from casparian_flow.engine.sinks.sql import LEDGER, ROWS
from casparian_flow.errors import JobError, OutputRefused, SinkUnavailable
from casparian_flow.protocol import Output
from proofs.tds import cuts, order
from proofs.tds.faults import Entry, Faults, Refusal
from proofs.tds.packets import Cut, Kind
from proofs.tds.place import ServerPlace
from proofs.tds.server import Server
from proofs.tds.tables import SqlError
from tests.sinks.stages import TOPIC

INSERT = f"insert {ROWS}{TOPIC}"


def deadlock() -> SqlError:
    words = "Transaction (Process ID 52) was deadlocked on lock resources with another process."
    return SqlError(1205, words, 13)


ERRORS = {
    1222: SqlError(1222, "Lock request time out period exceeded."),
    9002: SqlError(9002, "The transaction log for database 'x' is full due to 'LOG_BACKUP'.", 17),
    1105: SqlError(1105, "Could not allocate space for object 'dbo.sales' in database 'x'.", 17),
    229: SqlError(229, "The INSERT permission was denied on the object 'sales'.", 14),
    2628: SqlError(2628, "String or binary data would be truncated in table 'x', column 'name'."),
    8115: SqlError(8115, "Arithmetic overflow error converting numeric to data type int."),
}


def sealed(place: ServerPlace, attempt: str = "first") -> Output:
    return place.sealed({"id": [1, 2, 3], "name": ["a", None, "ü"]}, attempt=attempt)


def publish(place: ServerPlace, output: Output) -> Output | JobError:
    (outcome,) = place.publish(output)
    place.server.settle()
    return outcome


def in_order(server: Server) -> bool:
    return [*order.faults(server.log.entries, TOPIC)] == []


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (1222, SinkUnavailable, "holds a lock for too long"),
        (9002, SinkUnavailable, "log is full"),
        (1105, SinkUnavailable, "disk or its transaction log is full"),
        (229, SinkUnavailable, "lacks the permission"),
        (2628, OutputRefused, "do not fit into the table"),
        (8115, OutputRefused, "do not fit into the table"),
    ],
)
@pytest.mark.parametrize("where", [INSERT, "bulk rows"])
def test_what_becomes_of_an_error(
    tmp_path: Path, number: int, kind: type[JobError], words: str, where: str
) -> None:
    """In the statement that brings the rows in, and in the bulk load."""
    refusals = [Refusal(where, ERRORS[number])]
    with Server(faults=Faults(refusals=refusals)) as server:
        place = ServerPlace(server, tmp_path)
        output = sealed(place)
        outcome = publish(place, output)
        assert type(outcome) is kind
        assert words in outcome.message
        assert ERRORS[number].words in outcome.message
        assert place.rows() == place.rows(LEDGER) == []
        assert not order.committed(server.log.entries, output.output_key)
        outcome = publish(place, output)
        assert isinstance(outcome, Output)
        assert order.committed(server.log.entries, output.output_key)
        assert len(place.rows()) == 3
        assert in_order(server)


@pytest.mark.parametrize("where", [INSERT, f"insert {LEDGER}", "bulk rows"])
def test_f83_a_deadlocks_victim_begins_again(tmp_path: Path, where: str) -> None:
    with Server(faults=Faults(refusals=[Refusal(where, deadlock())])) as server:
        place = ServerPlace(server, tmp_path)
        assert isinstance(publish(place, sealed(place)), Output)
        assert len(place.rows()) == 3
        assert in_order(server)
        assert "error 1205" in [entry.outcome for entry in server.log.entries]


def test_f83_a_deadlock_without_end_pauses_the_sink(tmp_path: Path) -> None:
    with Server(faults=Faults(refusals=[Refusal(INSERT, deadlock(), times=99)])) as server:
        place = ServerPlace(server, tmp_path)
        outcome = publish(place, sealed(place))
        assert isinstance(outcome, SinkUnavailable)
        assert "deadlock" in outcome.message
        assert place.rows() == []


@pytest.mark.parametrize(("connection", "message"), [(1, 8), (2, 5)])
def test_f83_a_failover_is_waited_for(tmp_path: Path, connection: int, message: int) -> None:
    """The line goes, and then the database lets nobody in for a while."""
    closed = SqlError(18456, "Login failed for user 'casparian'.", 14)
    cut = Cut(connection, message, inbound=True, at=20)
    faults = Faults([cut], [Refusal("login", closed, after=connection)])
    with Server(faults=faults) as server:
        place = ServerPlace(server, tmp_path)
        output = sealed(place)
        outcome = publish(place, output)
        assert isinstance(outcome, SinkUnavailable)
        assert "login" in outcome.message
        assert place.rows() == []
        assert isinstance(publish(place, output), Output)
        assert len(place.rows()) == 3


def test_a_login_that_is_refused_tells_no_secret(tmp_path: Path) -> None:
    with Server() as server:
        place = ServerPlace(server, tmp_path, user="nobody")
        outcome = publish(place, sealed(place))
    assert isinstance(outcome, SinkUnavailable)
    assert "Login failed for user 'nobody'" in outcome.message
    for secret in ("geheim", "Wörd"):
        assert secret not in outcome.message + outcome.hint


def test_a_server_that_is_gone_is_asked_once_for_all_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver goes on trying until its time-out, and other sinks wait."""
    monkeypatch.setattr(mssql_session, "LOGIN_SECONDS", 1)
    with Server() as server:
        place = ServerPlace(server, tmp_path)
    outputs = [place.sealed({"id": [job]}, job) for job in (1, 2, 3)]
    asked: list[object] = []
    monkeypatch.setattr(mssql_session, "check_configured", asked.append)
    found = place.publish(*outputs)
    assert len(asked) == 1
    for outcome in found:
        assert isinstance(outcome, SinkUnavailable)
        assert "it cannot be reached" in outcome.message


def said_at(home: Path, statement: str, then: str = "") -> Entry:
    """The request with a statement, or the next one after it with another; nothing is cut."""
    with Server() as server:
        place = ServerPlace(server, home)
        assert isinstance(publish(place, sealed(place)), Output)
        entries = iter(server.log.entries)
    for name in filter(None, (statement, then)):
        found = next(e for e in entries if any(said.name == name for said in e.said))
    return found


@pytest.mark.parametrize("abrupt", [False, True])
@pytest.mark.parametrize("executed", [False, True])
def test_f82_a_commit_nobody_knows_of_is_looked_up(
    tmp_path: Path, executed: bool, abrupt: bool
) -> None:
    """The whole request arrives; it is executed and its answer is lost, or it is not executed."""
    commit = said_at(tmp_path / "whole", INSERT, "commit")
    at = 0 if executed else commit.received
    cut = Cut(commit.connection, commit.message, not executed, at, abrupt)
    with Server(faults=Faults([cut])) as server:
        place = ServerPlace(server, tmp_path)
        assert isinstance(publish(place, sealed(place)), Output)
        assert len(place.rows()) == 3
        assert in_order(server)
        after = [entry for entry in server.log.entries if entry.connection > 2]
        record = f"insert {LEDGER}"
        said = [
            "lookup" if order.is_lookup(said) else said.name
            for entry in after
            for said in entry.said
            if said.name in {"applock", "bulk rows", record, INSERT} or order.is_lookup(said)
        ]
        # Locks are taken on the key and the file's slot. The record's number is asked for when it
        # is written.
        asked = ["applock", "applock", "lookup"]
        again = ["bulk rows", *asked, record, "lookup", INSERT]
        assert said == [*asked, *(asked if executed else again)]


def test_f85_a_bulk_load_that_is_killed_is_begun_again(tmp_path: Path) -> None:
    """KILL ends the connection in the midst of the rows: none of them stays, all come again."""
    rows = said_at(tmp_path / "whole", "bulk rows")
    cut = Cut(rows.connection, rows.message, inbound=True, at=rows.received // 2)
    with Server(faults=Faults([cut])) as server:
        place = ServerPlace(server, tmp_path)
        assert isinstance(publish(place, sealed(place)), Output)
        assert len(place.rows()) == 3
        loads = [entry.outcome for entry in server.log.entries if entry.kind is Kind.BULK]
        assert loads == ["cut", "done"]
        assert in_order(server)


def test_publishes_over_lines_that_are_cut(tmp_path: Path, seed: int) -> None:
    """Two cuts in each phase; `python -m proofs.tds cuts` does hundreds."""
    tally = cuts.run(tmp_path, 12, seed, rows=40)
    print(tally.summary())
    assert not tally.violations


def test_the_harness_notices_a_sink_that_does_not_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sink that does not look into the ledger is caught by the order alone."""
    monkeypatch.setattr(MssqlSchema, "record", lambda self, key: None)
    with Server() as server:
        place = ServerPlace(server, tmp_path)
        publish(place, sealed(place))
        assert not in_order(server)
