"""Every statement that the SQL Server sink sends, as text and values.

SQLAlchemy builds most of them and compiles them for its dialect `mssql+mssqlpython`, which quotes
names in brackets; values are parameters. Locks, the catalog and new columns are plain T-SQL.
tests/sinks/mssql_statements.sql shows all statements as they are sent.

    <schema>._cf_outputs               the sink's ledger: an entry for each published output
    <schema>.<table>                   the topic's rows
    <schema>._cf_retracted_<table>     retracted rows
    <schema>.casparian_stage_<...>     staged rows
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    CHAR,
    BigInteger,
    Column,
    ColumnElement,
    DateTime,
    FromClause,
    Index,
    Integer,
    MetaData,
    Table,
    Unicode,
    delete,
    func,
    insert,
    literal_column,
    select,
    update,
)
from sqlalchemy.dialects.mssql import NVARCHAR
from sqlalchemy.dialects.mssql.mssqlpython import MSDialect_mssqlpython
from sqlalchemy.schema import CreateIndex, CreateTable, DropTable
from sqlalchemy.sql.elements import ClauseElement, quoted_name
from sqlalchemy.types import UserDefinedType

from casparian_flow.engine.sinks.base import LINEAGE

STAGE = "casparian_stage_"
"""How the name of every stage table begins."""

LEDGER = "_cf_outputs"

LINEAGE_TYPES = ("bigint", "bigint", "nvarchar(64)", "nvarchar(255)")
"""Types of the lineage columns, in their order: short enough to be compared and indexed."""

SHOWN, REPLACED, RETRACTED = "shown", "replaced", "retracted"
"""States of an output in the ledger; only the rows of a shown one are in its table."""

RECORDED = (
    "output_key", "topic", "rows", "digest", "mode", "state", "slot", "ordinal",
    "file_version_id", "job_id", "source_hash", "plugin_version", "facts",
)  # fmt: skip
"""The columns that are read of a ledger entry."""

_BINARY = "Latin1_General_BIN2"
"""The collation of keys: bytes are compared, whatever the database's own collation."""

_DIALECT = MSDialect_mssqlpython(paramstyle="qmark")  # type: ignore[no-untyped-call]


class Statement(NamedTuple):
    """SQL text and its parameters."""

    sql: str
    values: tuple[Any, ...] = ()


class Declared(NamedTuple):
    """A column by name and T-SQL type."""

    name: str
    type: str


_LINEAGE = [Declared(*column) for column in zip(LINEAGE, LINEAGE_TYPES, strict=True)]


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


def columns(schema: str, table: str) -> Statement:
    """Name, type, length, precision and scale of a table's columns; no row if it is missing."""
    sql = (
        "SELECT c.name, TYPE_NAME(c.system_type_id), c.max_length, c.precision, c.scale "
        "FROM sys.columns AS c WHERE c.object_id = OBJECT_ID(?, 'U') ORDER BY c.column_id"
    )
    return Statement(sql, (name(schema, table),))


def stage_tables(schema: str, tag: str) -> Statement:
    """The names of the stage tables of one ledger."""
    sql = (
        "SELECT t.name FROM sys.tables AS t WHERE t.schema_id = SCHEMA_ID(?) "
        "AND LEFT(t.name, ?) = ? ORDER BY t.name"
    )
    begin = f"{STAGE}{tag}-"
    return Statement(sql, (schema, len(begin), begin))


def create(schema: str, table: str, described: Sequence[Declared]) -> list[Statement]:
    """Create a table for a topic's rows, and an index on the job, by which outputs are found."""
    made = _table(schema, table, described)
    return [_compiled(CreateTable(made)), _compiled(CreateIndex(Index("_cf_job", made.c[_JOB])))]


def create_stage(schema: str, table: str, described: Sequence[Declared]) -> Statement:
    """Create a stage table."""
    return _compiled(CreateTable(_table(schema, table, described)))


def drop(schema: str, table: str) -> Statement:
    """Drop a stage table if it exists."""
    return _compiled(DropTable(_table(schema, table, []), if_exists=True))


def add_columns(schema: str, table: str, described: Sequence[Declared]) -> Statement:
    """Add columns; they are null in existing rows."""
    added = ", ".join(f"{_quoted(column.name)} {column.type} NULL" for column in described)
    return Statement(f"ALTER TABLE {name(schema, table)} ADD {added}")


def retracted_name(table: str) -> str:
    """The name of the table for a table's retracted rows; at most 128 characters."""
    whole = f"_cf_retracted_{table}"
    digest = hashlib.sha256(table.encode()).hexdigest()[:16]
    return whole if len(whole.encode("utf-16-le")) <= 256 else f"_cf_retracted_{digest}"


def name(schema: str, table: str) -> str:
    """A table's name, quoted."""
    return f"{_quoted(schema)}.{_quoted(table)}"


class Statements:
    """The statements for one table, its ledger and its stage tables.

    Args:
        schema: the schema of all these tables.
        table: name of the table with the topic's rows.
    """

    def __init__(self, schema: str, table: str) -> None:
        self.schema = schema
        self.table = table
        self._ledger = _ledger(schema)

    def create_ledger(self) -> list[Statement]:
        """Create the ledger, with indexes for the other columns that every publish searches."""
        c = self._ledger.c
        found_by = [Index("_cf_slot", c.slot), Index("_cf_table", c.table_name, c.topic)]
        return [_compiled(CreateTable(self._ledger)), *map(_compiled, map(CreateIndex, found_by))]

    def recorded(self, key: str) -> Statement:
        """The `RECORDED` columns of an output key's ledger entry."""
        o = self._ledger.alias("o")
        return _compiled(select(*(o.c[column] for column in RECORDED)).where(o.c.output_key == key))

    def in_table(self) -> Statement:
        """The same of all outputs of the table."""
        o = self._ledger.alias("o")
        chosen = select(*(o.c[column] for column in RECORDED))
        return _compiled(chosen.where(o.c.table_name == self.table))

    def in_slot(self, slot: str) -> Statement:
        """The same of a slot's outputs in mode `replace`."""
        o = self._ledger.alias("o")
        chosen = select(*(o.c[column] for column in RECORDED)).where(o.c.table_name == self.table)
        return _compiled(chosen.where(o.c.slot == slot, o.c.mode == "replace"))

    def others(self, topic: str) -> Statement:
        """Other topics that have outputs in the table."""
        o = self._ledger.alias("o")
        another = o.c.topic.bool_op("<>")(topic)
        return _compiled(select(o.c.topic).where(o.c.table_name == self.table, another))

    def record(self, facts: Mapping[str, Any]) -> Statement:
        """Insert a ledger entry; the primary key refuses a second one for the same output."""
        return _compiled(insert(self._ledger).values(table_name=self.table, **facts))

    def mark(self, key: str, state: str) -> Statement:
        """Change the state of an output."""
        ledger = self._ledger
        return _compiled(update(ledger).where(ledger.c.output_key == key).values(state=state))

    def forget(self, key: str) -> Statement:
        """Delete an output's ledger entry."""
        return _compiled(delete(self._ledger).where(self._ledger.c.output_key == key))

    def insert_staged(self, stage: str, names: Sequence[str]) -> Statement:
        """Copy the rows of a stage table into the table."""
        return self._copy(stage, self.table, names)

    def delete_rows(self, lineage: Sequence[Any]) -> Statement:
        """Delete an output's rows, found by their lineage."""
        return self._delete(self.table, lineage)

    def move_out(self, lineage: Sequence[Any], names: Sequence[str]) -> list[Statement]:
        """Move an output's rows to the table of retracted rows."""
        aside = retracted_name(self.table)
        return [self._copy(self.table, aside, names, lineage), self.delete_rows(lineage)]

    def move_back(self, lineage: Sequence[Any], names: Sequence[str]) -> list[Statement]:
        """Move an output's rows back from the table of retracted rows."""
        aside = retracted_name(self.table)
        return [self._copy(aside, self.table, names, lineage), self._delete(aside, lineage)]

    def delete_retracted(self, lineage: Sequence[Any]) -> Statement:
        """Delete an output's retracted rows."""
        return self._delete(retracted_name(self.table), lineage)

    def counts(self, table: str) -> Statement:
        """The lineage of each output with rows in a table, and the number of rows."""
        rows = _table(self.schema, table, _LINEAGE).alias("r")
        counted = select(*rows.c, func.count_big(literal_column("*")).label("there"))
        return _compiled(counted.group_by(*rows.c))

    def _copy(
        self, of: str, to: str, names: Sequence[str], lineage: Sequence[Any] = ()
    ) -> Statement:
        """Copy rows from one table to another: all of them, or those of one output."""
        described = [Declared(column, "") for column in names]
        rows = _table(self.schema, of, described).alias("r")
        chosen = select(*rows.c)
        if lineage:
            chosen = chosen.where(*_brought(rows, lineage))
        return _compiled(insert(_table(self.schema, to, described)).from_select(names, chosen))

    def _delete(self, table: str, lineage: Sequence[Any]) -> Statement:
        rows = _table(self.schema, table, _LINEAGE)
        return _compiled(delete(rows).where(*_brought(rows, lineage)))


def _brought(rows: FromClause, lineage: Sequence[Any]) -> list[ColumnElement[bool]]:
    """The condition for the rows of an output."""
    return [rows.c[name] == value for name, value in zip(LINEAGE, lineage, strict=True)]


class _Type(UserDefinedType[Any]):
    """A type written in T-SQL."""

    cache_ok = True

    def __init__(self, declared: str) -> None:
        self.declared = declared

    def get_col_spec(self, **_: Any) -> str:
        return self.declared


def _table(schema: str, table: str, described: Sequence[Declared]) -> Table:
    made = (Column(quoted_name(column.name, True), _Type(column.type)) for column in described)
    return Table(
        quoted_name(table, True), MetaData(), *made, schema=quoted_name(schema, True),
        implicit_returning=False,
    )  # fmt: skip


def _ledger(schema: str) -> Table:
    key = CHAR(64, collation=_BINARY)
    return Table(
        LEDGER,
        MetaData(),
        Column("output_key", key, primary_key=True),
        Column("table_name", Unicode(128), nullable=False),
        Column("topic", Unicode(400, collation=_BINARY), nullable=False),
        Column("job_id", BigInteger, nullable=False),
        Column("file_version_id", BigInteger, nullable=False),
        Column("source_hash", Unicode(64), nullable=False),
        Column("plugin_version", Unicode(255), nullable=False),
        Column("rows", BigInteger, nullable=False),
        Column("digest", CHAR(64), nullable=False),
        Column("slot", key, nullable=False),
        Column("ordinal", Integer, nullable=False),
        Column("mode", Unicode(10), nullable=False),
        Column("state", Unicode(10), nullable=False),
        Column("published_at", DateTime, nullable=False, server_default=func.sysutcdatetime()),
        Column("facts", NVARCHAR(), nullable=False),
        schema=quoted_name(schema, True),
        implicit_returning=False,
    )


_JOB = "_cf_job_id"


def _quoted(word: str) -> str:
    return _DIALECT.identifier_preparer.quote_identifier(word)


def _compiled(statement: ClauseElement) -> Statement:
    compiled: Any = statement.compile(dialect=_DIALECT, compile_kwargs={"render_postcompile": True})
    order = getattr(compiled, "positiontup", None) or ()
    return Statement(str(compiled).strip(), tuple(compiled.params[name] for name in order))
