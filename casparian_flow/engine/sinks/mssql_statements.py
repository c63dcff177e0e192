"""The statements that only SQL Server has, as text and values; the others are those of `sql.py`.

tests/sinks/mssql_statements.sql shows all statements of the sink as they are sent.

    <schema>._cf_outputs               the sink's ledger: a row for each output
    <schema>._cf_rows_<table>          the topic's rows
    <schema>.<table>                   view of the rows that stand; <table>_current, <table>_history
    <schema>.casparian_stage_<...>     staged rows
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from casparian_flow.engine.sinks.sql import LEDGER

STAGE = "casparian_stage_"
"""How the name of every stage table begins."""

_BINARY = "COLLATE Latin1_General_BIN2"
"""The collation of keys: bytes are compared, whatever the database's own collation."""

_LEDGER = f"""
    [id] bigint IDENTITY NOT NULL PRIMARY KEY,
    [output_key] nvarchar(64) {_BINARY} NOT NULL UNIQUE,
    [topic] nvarchar(400) {_BINARY} NOT NULL,
    [view_name] nvarchar(128) NOT NULL,
    [mode] nvarchar(10) NOT NULL,
    [state] nvarchar(10) NOT NULL,
    [rows] bigint NOT NULL,
    [digest] nvarchar(64) NOT NULL,
    [published_at] nvarchar(40) NOT NULL,
    [shown_at] nvarchar(40) NOT NULL,
    [hidden_at] nvarchar(40) NOT NULL,
    [job_id] bigint NULL,
    [file_version_id] bigint NULL,
    [source_hash] nvarchar(64) NULL,
    [plugin_version] nvarchar(255) NULL,
    [facts] nvarchar(max) NOT NULL,
    [table_number] bigint NOT NULL
"""


class Statement(NamedTuple):
    """SQL text and its parameters."""

    sql: str
    values: tuple[Any, ...] = ()


class Declared(NamedTuple):
    """A column by name and T-SQL type."""

    name: str
    type: str


def quote(name: str) -> str:
    """A name in brackets."""
    return "[" + name.replace("]", "]]") + "]"


def text(value: str) -> str:
    """A text in quotes."""
    return "N'" + value.replace("'", "''") + "'"


def qualified(schema: str, name: str) -> str:
    """The name of a table or view with its schema, in brackets."""
    return f"{quote(schema)}.{quote(name)}"


def begin_session(lock_seconds: float) -> Statement:
    """Settings of a connection: errors roll back the transaction, statements report how many rows
    they changed, messages are in English, and waiting for a lock has a timeout."""
    wait = round(lock_seconds * 1000)
    return Statement(
        f"SET XACT_ABORT ON; SET NOCOUNT OFF; SET LANGUAGE us_english; SET LOCK_TIMEOUT {wait}"
    )


def default_schema() -> Statement:
    """The login's default schema."""
    return Statement("SELECT SCHEMA_NAME()")


def lock(resource: str, wait_seconds: float, *, session: bool = False) -> Statement:
    """Take an application lock; the result is 0 or 1 if it is granted, else negative.

    Args:
        session: hold it until the connection ends, instead of the transaction.
    """
    owner = "Session" if session else "Transaction"
    sql = (
        "SET NOCOUNT ON; DECLARE @given int; EXEC @given = sp_getapplock @Resource = ?, "
        f"@LockMode = 'Exclusive', @LockOwner = '{owner}', @LockTimeout = ?; SELECT @given"
    )
    return Statement(sql, (resource, round(wait_seconds * 1000)))


def unlock(resource: str) -> Statement:
    """Release a session's lock."""
    sql = "EXEC sp_releaseapplock @Resource = ?, @LockOwner = 'Session'"
    return Statement(sql, (resource,))


# Tables are given by the name that `qualified` returned.


def columns(table: str) -> Statement:
    """Name, type, length, precision and scale of the columns of a table or view; no row if there
    is none."""
    sql = (
        "SELECT c.name, TYPE_NAME(c.system_type_id), c.max_length, c.precision, c.scale "
        "FROM sys.columns AS c WHERE c.object_id = OBJECT_ID(?) ORDER BY c.column_id"
    )
    return Statement(sql, (table,))


def object_id(name: str) -> Statement:
    """The number of a table, view or another object; NULL if there is none."""
    return Statement("SELECT OBJECT_ID(?)", (name,))


def definition(view: str) -> Statement:
    """The number of a view and its text: NULL if there is none, or if the login may not see it."""
    sql = "SELECT OBJECT_ID(?, 'V'), OBJECT_DEFINITION(OBJECT_ID(?, 'V'))"
    return Statement(sql, (view, view))


def stage_tables(schema: str, tag: str) -> Statement:
    """The names of the stage tables of one ledger."""
    sql = (
        "SELECT t.name FROM sys.tables AS t WHERE t.schema_id = SCHEMA_ID(?) "
        "AND LEFT(t.name, ?) = ? ORDER BY t.name"
    )
    begin = f"{STAGE}{tag}-"
    return Statement(sql, (schema, len(begin), begin))


def other_topics(ledger: str, view: str, topic: str) -> Statement:
    """Other topics that have outputs in a view."""
    sql = f"SELECT topic FROM {ledger} WHERE view_name = ? AND topic <> ?"  # noqa: S608
    return Statement(sql, (view, topic))


def create_ledger(schema: str) -> list[Statement]:
    """Create the sink's ledger, an index with all that views read of it, so that readers of one
    view do not wait for who changes outputs of another, and one that finds a view's tables."""
    ledger = qualified(schema, LEDGER)
    read = "state, mode, file_version_id, job_id, source_hash, plugin_version"
    return [
        Statement(f"CREATE TABLE {ledger} ({_LEDGER})"),
        Statement(f"CREATE INDEX _cf_view ON {ledger} (view_name, topic) INCLUDE ({read})"),
        Statement(f"CREATE INDEX _cf_table ON {ledger} (view_name, table_number, state)"),
    ]


def create(table: str, described: Sequence[Declared]) -> Statement:
    """Create a table."""
    return Statement(f"CREATE TABLE {table} ({_listed(described)})")


def create_rows(table: str, described: Sequence[Declared]) -> list[Statement]:
    """Create a table for a topic's rows, and the index by which an output's are found."""
    all_columns = ", ".join(filter(None, ["_cf_output bigint NOT NULL", _listed(described)]))
    return [Statement(f"CREATE TABLE {table} ({all_columns})"), index_outputs(table)]


def index_outputs(table: str) -> Statement:
    """Create the index by which the rows of an output are found."""
    return Statement(f"CREATE INDEX _cf_output_of ON {table} (_cf_output)")


def drop_job_index(table: str) -> Statement:
    """Drop the index by which earlier releases found the rows of an output."""
    return Statement(f"DROP INDEX IF EXISTS _cf_job ON {table}")


def drop(table: str) -> Statement:
    """Drop a table if it exists."""
    return Statement(f"DROP TABLE IF EXISTS {table}")


def add_columns(table: str, described: Sequence[Declared]) -> Statement:
    """Add columns; they are null in existing rows."""
    return Statement(f"ALTER TABLE {table} ADD {_listed(described)}")


def rename(table: str, name: str) -> Statement:
    """Give a table another name in its schema."""
    return Statement("EXEC sp_rename @objname = ?, @newname = ?", (table, name))


def rights(table: str) -> Statement:
    """Rights on a table itself, not on its schema: whether granted or denied, what, and to whom."""
    sql = (
        "SELECT p.state_desc, p.permission_name, USER_NAME(p.grantee_principal_id) "
        "FROM sys.database_permissions AS p WHERE p.class = 1 AND p.major_id = OBJECT_ID(?)"
    )
    return Statement(sql, (table,))


def put_view(view: str, query: str) -> Statement:
    """Create a view, or give it this query; its grants and triggers stay."""
    return Statement(f"CREATE OR ALTER VIEW {view} AS {query}")


def insert_staged(table: str, stage: str, names: Sequence[str], number: int) -> Statement:
    """Copy the rows of a stage table into a topic's table, as those of an output."""
    # Without parameters: a name may have a question mark in it.
    listed = "".join(f", {quote(name)}" for name in names)
    chosen = "".join(f", s.{quote(name)}" for name in names)
    return Statement(
        f"INSERT INTO {table} (_cf_output{listed}) SELECT {number}{chosen} FROM {stage} AS s"  # noqa: S608
    )


def _listed(described: Sequence[Declared]) -> str:
    return ", ".join(f"{quote(column.name)} {column.type} NULL" for column in described)
