"""The real driver over the double: what it sends arrives whole, and faults arrive as told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from proofs.tds.faults import Faults, Refusal
from proofs.tds.packets import Cut
from proofs.tds.server import Server
from proofs.tds.tables import SqlError
from proofs.tds.values import Finer

COLUMNS: dict[str, list[Any]] = {
    "bit": [True, False, None],
    "tinyint": [0, 255, None],
    "smallint": [-(2**15), 2**15 - 1, None],
    "int": [-(2**31), 2**31 - 1, None],
    "bigint": [-(2**63), 2**63 - 1, None],
    "real": [1.5, -(2.0**-126), None],
    "float": [-0.1, 1.7976931348623157e308, None],
    "decimal(38,10)": [Decimal("-9999999999999999999999999999.0123456789"), Decimal(0), None],
    "decimal(20,0)": [Decimal(2**64 - 1), Decimal(7), None],
    "nvarchar(max)": ["", "naïve 🐟 \0 שלום" * 3000, None],
    "varbinary(max)": [b"", bytes(range(256)) * 40, None],
    "date": [date(1, 1, 1), date(9999, 12, 31), None],
    "time(7)": [time(0), time(23, 59, 59, 999999), None],
    "datetime2(7)": [datetime(1, 1, 1), datetime(9999, 12, 31, 23, 59, 59, 999999), None],
    "datetimeoffset(7)": [datetime(1, 1, 1, tzinfo=UTC), datetime(2024, 2, 29, tzinfo=UTC), None],
}  # fmt: skip
"""Every type of the sink's mapping, with values at its ends."""

ARROW = {
    "bit": pa.bool_(), "tinyint": pa.uint8(), "smallint": pa.int16(), "int": pa.int32(),
    "bigint": pa.int64(), "real": pa.float32(), "float": pa.float64(),
    "decimal(38,10)": pa.decimal128(38, 10), "decimal(20,0)": pa.decimal128(20, 0),
    "nvarchar(max)": pa.large_string(), "varbinary(max)": pa.large_binary(), "date": pa.date32(),
    "time(7)": pa.time64("ns"), "datetime2(7)": pa.timestamp("us"),
    "datetimeoffset(7)": pa.timestamp("us", "UTC"),
}  # fmt: skip

TABLE = "[dbo].[a]] table]"
CREATE = f"CREATE TABLE {TABLE} ({', '.join(f'[{name}] {name} NULL' for name in COLUMNS)})"
"""A table with a column of each type, named after it."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


def connect(server: Server) -> Any:
    import mssql_python

    return mssql_python.connect(server.connection_string)


@pytest.mark.slow
def test_rows_and_types_of_a_bulk_load_are_exact(server: Server) -> None:
    """50,000 rows of every type the sink sends."""
    few = pa.table({name: pa.array(values, ARROW[name]) for name, values in COLUMNS.items()})
    short = few.slice(1).drop_columns(["nvarchar(max)"]).append_column("nvarchar(max)", [["x", ""]])
    short = short.select(few.column_names)
    many = pa.concat_tables([short] * 25_000).combine_chunks()
    with closing(connect(server)) as connection:
        connection.cursor().execute(CREATE)
        connection.commit()
        cursor = connection.cursor()
        assert cursor.bulkcopy_arrow(TABLE, few)["rows_copied"] == 3
        assert cursor.bulkcopy_arrow(TABLE, many, timeout=0)["rows_copied"] == 50_000
    table = server.database.committed("a] table")
    assert table
    columns = {**COLUMNS, "nvarchar(max)": [None, "x", ""]}
    assert table.rows[:3] == tuple(zip(*COLUMNS.values(), strict=True))
    assert table.rows[3:] == tuple(zip(*columns.values(), strict=True))[1:] * 25_000


def test_a_hundred_nanoseconds_arrive(server: Server) -> None:
    nanoseconds = pa.table({"t": pa.array([1_234_567_800], pa.time64("ns")),
                            "m": pa.array([1_000_000_100], pa.timestamp("ns"))})  # fmt: skip
    with closing(connect(server)) as connection:
        connection.cursor().execute("CREATE TABLE fine (t time(7) NULL, m datetime2(7) NULL)")
        connection.commit()
        connection.cursor().bulkcopy_arrow("fine", nanoseconds)
    table = server.database.committed("fine")
    assert table
    moment = Finer(datetime(1970, 1, 1, 0, 0, 1), 1)
    assert table.rows == ((Finer(time(0, 0, 1, 234567), 8), moment),)


@pytest.mark.parametrize("name", COLUMNS)
def test_parameters_and_results_are_exact(server: Server, name: str) -> None:
    with closing(connect(server)) as connection:
        cursor = connection.cursor()
        cursor.execute(f"CREATE TABLE t (number int NOT NULL, a {name} NULL)")
        values = COLUMNS[name][:2]
        if name == "date":  # the driver itself refuses an earlier one as a parameter
            values[0] = date(1753, 1, 1)
        for number, value in enumerate(values):
            cursor.execute("INSERT INTO t (number, a) VALUES (?, ?)", (number, value))
            assert cursor.rowcount == 1
        cursor.execute("INSERT INTO t (number) VALUES (?)", (2,))
        cursor.execute("SELECT t.a FROM t WHERE t.number <> ?", (9,))
        assert [row[0] for row in cursor.fetchall()] == [*values, None]


def test_what_is_not_committed_is_seen_by_its_owner_only(server: Server) -> None:
    with closing(connect(server)) as connection:
        cursor = connection.cursor()
        cursor.execute("CREATE TABLE t (a int NULL)")
        cursor.execute("INSERT INTO t (a) VALUES (?)", (1,))
        assert cursor.execute("SELECT COUNT(*) FROM t").fetchone()[0] == 1
        assert server.database.names() == []
        connection.commit()
        assert server.database.names() == ["t"]
        cursor.execute("DELETE FROM t WHERE a = ?", (1,))
        connection.rollback()
        assert [tuple(row) for row in cursor.execute("SELECT * FROM t").fetchall()] == [(1,)]


def test_two_that_wait_for_each_other_end_with_a_victim(server: Server) -> None:
    with closing(connect(server)) as one, closing(connect(server)) as other:
        for name in ("t", "u"):
            one.cursor().execute(f"CREATE TABLE {name} (a int NULL)")
        one.commit()
        one.cursor().execute("INSERT INTO t (a) VALUES (?)", (1,))
        other.cursor().execute("INSERT INTO u (a) VALUES (?)", (1,))
        failed: list[Exception] = []

        def write(connection: Any, table: str) -> None:
            try:
                connection.cursor().execute(f"INSERT INTO {table} (a) VALUES (?)", (2,))
                connection.commit()
            except Exception as error:
                failed.append(error)

        threads = [threading.Thread(target=write, args=pair) for pair in ((one, "u"), (other, "t"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(failed) == 1
    assert "deadlocked" in str(failed[0])
    tables = [server.database.committed(name) for name in ("t", "u")]
    assert [len(table.rows) for table in tables if table] == [1, 1]


def test_a_login_is_decoded_and_refused(server: Server) -> None:
    import mssql_python

    with pytest.raises(mssql_python.OperationalError, match="Login failed for user 'casparian'"):
        mssql_python.connect(server.connection_string.replace("geheim", "offen"))
    assert [entry.outcome for entry in server.log.entries] == ["done", "error 18456"]


def test_a_statement_nobody_foresaw_fails_its_test(server: Server) -> None:
    with closing(connect(server)) as connection, pytest.raises(Exception, match="not understand"):
        connection.cursor().execute("MERGE t USING u ON 1 = 1")
    with pytest.raises(AssertionError, match="MERGE t USING u"):
        server.check()
    server.surprises.clear()


@pytest.mark.parametrize("abrupt", [False, True])
@pytest.mark.parametrize(
    ("message", "inbound", "at", "stage", "is_there"),
    [
        (2, True, 40, "connect", False),
        (2, False, 20, "connect", False),
        (4, True, 30, "execute", False),
        (4, False, 0, "execute", False),
        (5, True, 20, "commit", False),
        (5, True, 10**6, "commit", False),
        (5, False, 0, "commit", True),
        (5, False, 15, "commit", True),
    ],
)
def test_a_line_can_be_cut_anywhere(
    message: int, inbound: bool, at: int, stage: str, is_there: bool, abrupt: bool
) -> None:
    """PRELOGIN, LOGIN, BEGIN, CREATE and COMMIT are the messages, from 1 to 5."""
    cuts = [Cut(1, message, inbound, at, abrupt)]
    reached = "connect"
    with Server(faults=Faults(cuts)) as server:
        with pytest.raises(Exception, match=r"link failure|Connection|connection|reset"):
            connection = connect(server)
            reached = "execute"
            connection.cursor().execute("CREATE TABLE t (a int NULL)")
            reached = "commit"
            connection.commit()
        server.settle()
        assert reached == stage
        assert (server.database.names() == ["t"]) is is_there


def test_an_error_is_told_and_the_transaction_is_undone() -> None:
    refusals = [Refusal("insert t", SqlError(9002, "The transaction log is full.", 17))]
    with Server(faults=Faults(refusals=refusals)) as server, closing(connect(server)) as connection:
        cursor = connection.cursor()
        cursor.execute("SET XACT_ABORT ON")
        cursor.execute("CREATE TABLE t (a int NULL)")
        with pytest.raises(Exception, match="log is full"):
            cursor.execute("INSERT INTO t (a) VALUES (?)", (1,))
        connection.commit()
        assert server.database.names() == []
        assert "error 9002" in [entry.outcome for entry in server.log.entries]
