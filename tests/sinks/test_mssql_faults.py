"""Errors of SQL Server and of its driver, told apart."""

from __future__ import annotations

import pytest

from casparian_flow.engine.sinks.mssql_session import Kind, fault_of, refusal
from casparian_flow.errors import OutputRefused, SinkConflict, SinkUnavailable

mssql_python = pytest.importorskip(
    "mssql_python", reason="THE DRIVER'S ERRORS ARE NOT TESTED: mssql-python is not installed"
)


def bulk(number: int, words: str = "Some words.") -> RuntimeError:
    """As the driver tells of an error of a bulk load."""
    return RuntimeError(f"Sql Error: {number}: Class 16: State 1: {words} on host in  at line 1")


def statement(state: str, words: str) -> Exception:
    """As it tells of one of a statement."""
    told = f"[Microsoft][ODBC Driver 18 for SQL Server][SQL Server]{words}"
    found = mssql_python.exceptions.sqlstate_to_exception(state, told)
    if found:
        return found
    said = f"An error occurred with SQLSTATE code: {state}"
    return mssql_python.exceptions.DatabaseError(said, told)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (Kind.RETRY, bulk(1205)),
        (Kind.RETRY, statement("40001", "Transaction (Process ID 5) was deadlocked on lock")),
        (Kind.PAUSE, bulk(1222)),
        (Kind.PAUSE, statement("HYT00", "Lock request time out period exceeded.")),
        (Kind.PAUSE, bulk(9002)),
        (Kind.PAUSE, statement("42000", "The transaction log for database 'x' is full due to")),
        (Kind.PAUSE, statement("42000", "Could not allocate space for object 'x' in database")),
        (Kind.PAUSE, statement("42000", "The INSERT permission was denied on the object 'x'")),
        (Kind.PAUSE, statement("42000", "CREATE TABLE permission denied in database 'x'.")),
        (Kind.PAUSE, statement("28000", "Login failed for user 'x'.")),
        (Kind.PAUSE, statement("42000", 'Cannot open database "x" requested by the login.')),
        (Kind.PAUSE, statement("25000", "Failed to update database because it is read-only.")),
        (Kind.PAUSE, statement("HYT00", "Query timeout expired")),
        (Kind.PAUSE, RuntimeError("Bulk copy operation timed out after 5 seconds")),
        (Kind.LOST, statement("08S01", "TCP Provider: Error code 0x2746")),
        (Kind.LOST, statement("08001", "TCP Provider: Error code 0x2749")),
        (Kind.LOST, statement("08007", "Connection failure during transaction")),
        (Kind.LOST, statement("40003", "Statement completion unknown")),
        (Kind.LOST, bulk(10054)),
        (Kind.LOST, RuntimeError("IO error: Connection reset by peer (os error 104)")),
        (Kind.LOST, RuntimeError("Connection closed: by the server")),
        (Kind.LOST, RuntimeError("Failed to retrieve destination metadata: IO error: broken")),
        (Kind.REFUSE, bulk(2628)),
        (Kind.REFUSE, bulk(8152)),
        (Kind.REFUSE, statement("22001", "String or binary data would be truncated in table")),
        (Kind.REFUSE, statement("22003", "Arithmetic overflow error converting expression")),
        (Kind.REFUSE, statement("22018", "Conversion failed when converting the varchar value")),
        (Kind.REFUSE, statement("23000", "The INSERT statement conflicted with the CHECK")),
        (Kind.REFUSE, statement("42000", "Cannot create a row of size 8070 which is greater")),
        (Kind.REFUSE, RuntimeError("Usage Error: Cannot map Arrow column 'x' (Null)")),
        (Kind.CONFLICT, statement("42S01", "There is already an object named 'x'")),
        # Another program published the key just now: the ledger's primary key says so.
        (Kind.RETRY, statement("23000", "Violation of PRIMARY KEY in object 'dbo._cf_outputs'.")),
        # Nobody knows these.
        (Kind.PAUSE, bulk(64_321)),
        (Kind.PAUSE, statement("42000", "Something new.")),
        (Kind.PAUSE, statement("42S02", "Invalid object name 'casparian_stage_x'.")),
        (Kind.PAUSE, RuntimeError("whatever")),
    ],
    ids=str,
)
def test_kinds(kind: Kind, error: Exception) -> None:
    fault = fault_of(error)
    assert fault.kind is kind
    assert "[Microsoft]" not in fault.words
    assert "Driver Error" not in fault.words


def test_the_first_number_that_is_known_tells() -> None:
    """A statement that ends comes with `The statement has been terminated`."""
    error = RuntimeError(f"{bulk(3621)}\n{bulk(1205)}")
    assert fault_of(error).kind is Kind.RETRY


def test_the_servers_own_words_are_kept() -> None:
    fault = fault_of(bulk(9002, "The log is full."))
    assert fault.words == "its disk or its transaction log is full: The log is full."
    error = refusal(fault, "mssql://sales")
    assert isinstance(error, SinkUnavailable)
    assert error.message == f"cannot write mssql://sales: {fault.words}"
    assert "by themselves" in error.hint


def test_what_a_job_is_told() -> None:
    assert isinstance(refusal(fault_of(bulk(2714)), "t"), SinkConflict)
    refused = refusal(fault_of(bulk(8115)), "t")
    assert type(refused) is OutputRefused
    for number in (1205, 1222, 10054, 18456, 229, 1):
        assert isinstance(refusal(fault_of(bulk(number)), "t"), SinkUnavailable)
