"""Every statement that the SQL Server sink sends, as text and values.

They are put together by SQLAlchemy and compiled for its dialect `mssql+mssqlpython`, which quotes
names in brackets; values are parameters. What it has no words for (locks, the catalog, new columns)
is T-SQL here. tests/sinks/mssql_statements.sql shows them all as they are sent.

    <schema>._cf_outputs               the ledger: a row an output; what stands in it was published
    <schema>.<table>                   the topic's rows
    <schema>._cf_retracted_<table>     rows that somebody retracted
    <schema>.casparian_stage_<...>     rows on their way
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
"""Begins the name of every stage table."""

LEDGER = "_cf_outputs"

LINEAGE_TYPES = ("bigint", "bigint", "nvarchar(64)", "nvarchar(255)")
"""Of the lineage columns, in their order: short enough to be compared and indexed."""

SHOWN, REPLACED, RETRACTED = "shown", "replaced", "retracted"
"""States of an output in the ledger; only the rows of a shown one are in its table."""

RECORDED = (
    "output_key", "topic", "rows", "digest", "mode", "state", "slot", "ordinal",
    "file_version_id", "job_id", "source_hash", "plugin_version", "facts",
)  # fmt: skip
"""What is read of the ledger's row of an output."""

_BINARY = "Latin1_General_BIN2"
"""Keys are compared byte by byte, whatever the database's collation."""

_DIALECT = MSDialect_mssqlpython(paramstyle="qmark")  # type: ignore[no-untyped-call]


class Statement(NamedTuple):
    """What is sent to the server."""

    sql: str
    values: tuple[Any, ...] = ()


class Declared(NamedTuple):
    """A column by name and T-SQL type."""

    name: str
    type: str


_LINEAGE = [Declared(*each) for each in zip(LINEAGE, LINEAGE_TYPES, strict=True)]


def begin_session(lock_seconds: float) -> Statement:
    """What holds for a whole connection: an error undoes the transaction, statements tell how many
    rows they changed, messages are in English, and no lock is waited for without end."""
    wait = round(lock_seconds * 1000)
    return Statement(
        f"SET XACT_ABORT ON; SET NOCOUNT OFF; SET LANGUAGE us_english; SET LOCK_TIMEOUT {wait}"
    )


def default_schema() -> Statement:
    """The schema of a table that was named without one."""
    return Statement("SELECT SCHEMA_NAME()")


def lock(resource: str, wait_seconds: float, *, session: bool = False) -> Statement:
    """Take a lock that only programs know of; answers 0 or 1 where it was given, else below 0.

    Args:
        session: hold it until the connection ends, not the transaction.
    """
    owner = "Session" if session else "Transaction"
    sql = (
        "SET NOCOUNT ON; DECLARE @given int; EXEC @given = sp_getapplock @Resource = ?, "
        f"@LockMode = 'Exclusive', @LockOwner = '{owner}', @LockTimeout = ?; SELECT @given"
    )
    return Statement(sql, (resource, round(wait_seconds * 1000)))


def unlock(resource: str) -> Statement:
    """Give back a session's lock."""
    sql = "EXEC sp_releaseapplock @Resource = ?, @LockOwner = 'Session'"
    return Statement(sql, (resource,))


def columns(schema: str, table: str) -> Statement:
    """Name, type, length, precision and scale of a table's columns; no row where it is not."""
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
    """A table for a topic's rows; found by job, since outputs come and go by it."""
    made = _table(schema, table, described)
    return [_compiled(CreateTable(made)), _compiled(CreateIndex(Index("_cf_job", made.c[_JOB])))]


def create_stage(schema: str, table: str, described: Sequence[Declared]) -> Statement:
    """A table for rows on their way."""
    return _compiled(CreateTable(_table(schema, table, described)))


def drop(schema: str, table: str) -> Statement:
    """Remove a stage table, if it is there."""
    return _compiled(DropTable(_table(schema, table, []), if_exists=True))


def add_columns(schema: str, table: str, described: Sequence[Declared]) -> Statement:
    """New columns; null in the rows that are there."""
    added = ", ".join(f"{_quoted(each.name)} {each.type} NULL" for each in described)
    return Statement(f"ALTER TABLE {name(schema, table)} ADD {added}")


def retracted_name(table: str) -> str:
    """The table of what was retracted from a table; it has 128 characters at most."""
    whole = f"_cf_retracted_{table}"
    digest = hashlib.sha256(table.encode()).hexdigest()[:16]
    return whole if len(whole.encode("utf-16-le")) <= 256 else f"_cf_retracted_{digest}"


def name(schema: str, table: str) -> str:
    """A table's name, quoted."""
    return f"{_quoted(schema)}.{_quoted(table)}"


class Statements:
    """What is asked of one table, its ledger and its stage tables.

    Args:
        schema: of all of them.
        table: of the topic's rows.
    """

    def __init__(self, schema: str, table: str) -> None:
        self.schema = schema
        self.table = table
        self._ledger = _ledger(schema)

    def create_ledger(self) -> list[Statement]:
        """The ledger, and what it is asked by at every publish besides the output key."""
        c = self._ledger.c
        found_by = [Index("_cf_slot", c.slot), Index("_cf_table", c.table_name, c.topic)]
        return [_compiled(CreateTable(self._ledger)), *map(_compiled, map(CreateIndex, found_by))]

    def recorded(self, key: str) -> Statement:
        """The ledger's row of an output key: `RECORDED`."""
        o = self._ledger.alias("o")
        return _compiled(select(*(o.c[each] for each in RECORDED)).where(o.c.output_key == key))

    def in_table(self) -> Statement:
        """The ledger's rows of all outputs of the table: `RECORDED`."""
        o = self._ledger.alias("o")
        chosen = select(*(o.c[each] for each in RECORDED))
        return _compiled(chosen.where(o.c.table_name == self.table))

    def in_slot(self, slot: str) -> Statement:
        """The same of a slot's outputs under `replace`."""
        o = self._ledger.alias("o")
        chosen = select(*(o.c[each] for each in RECORDED)).where(o.c.table_name == self.table)
        return _compiled(chosen.where(o.c.slot == slot, o.c.mode == "replace"))

    def others(self, topic: str) -> Statement:
        """The topics of outputs in the table that are not this one's."""
        o = self._ledger.alias("o")
        another = o.c.topic.bool_op("<>")(topic)
        return _compiled(select(o.c.topic).where(o.c.table_name == self.table, another))

    def record(self, facts: Mapping[str, Any]) -> Statement:
        """The ledger's row of an output; refused by its primary key if there is one."""
        return _compiled(insert(self._ledger).values(table_name=self.table, **facts))

    def mark(self, key: str, state: str) -> Statement:
        """Change the state of an output."""
        ledger = self._ledger
        return _compiled(update(ledger).where(ledger.c.output_key == key).values(state=state))

    def forget(self, key: str) -> Statement:
        """Take an output out of the ledger."""
        return _compiled(delete(self._ledger).where(self._ledger.c.output_key == key))

    def insert_staged(self, stage: str, names: Sequence[str]) -> Statement:
        """Bring the rows of a stage table into the table."""
        return self._copy(stage, self.table, names)

    def delete_rows(self, lineage: Sequence[Any]) -> Statement:
        """Take the rows of an output, known by their lineage, out of the table."""
        return self._delete(self.table, lineage)

    def move_out(self, lineage: Sequence[Any], names: Sequence[str]) -> list[Statement]:
        """Take them to the table of what was retracted."""
        aside = retracted_name(self.table)
        return [self._copy(self.table, aside, names, lineage), self.delete_rows(lineage)]

    def move_back(self, lineage: Sequence[Any], names: Sequence[str]) -> list[Statement]:
        """Bring them back from there."""
        aside = retracted_name(self.table)
        return [self._copy(aside, self.table, names, lineage), self._delete(aside, lineage)]

    def delete_retracted(self, lineage: Sequence[Any]) -> Statement:
        """Throw away what was retracted of an output."""
        return self._delete(retracted_name(self.table), lineage)

    def counts(self, table: str) -> Statement:
        """The lineage of each output that has rows in a table, and how many."""
        rows = _table(self.schema, table, _LINEAGE).alias("r")
        counted = select(*rows.c, func.count_big(literal_column("*")).label("there"))
        return _compiled(counted.group_by(*rows.c))

    def _copy(
        self, of: str, to: str, names: Sequence[str], lineage: Sequence[Any] = ()
    ) -> Statement:
        """Rows of one table to another: all of them, or those of one output."""
        described = [Declared(each, "") for each in names]
        rows = _table(self.schema, of, described).alias("r")
        chosen = select(*rows.c)
        if lineage:
            chosen = chosen.where(*_brought(rows, lineage))
        return _compiled(insert(_table(self.schema, to, described)).from_select(names, chosen))

    def _delete(self, table: str, lineage: Sequence[Any]) -> Statement:
        rows = _table(self.schema, table, _LINEAGE)
        return _compiled(delete(rows).where(*_brought(rows, lineage)))


def _brought(rows: FromClause, lineage: Sequence[Any]) -> list[ColumnElement[bool]]:
    """Whether a row is one that an output brought."""
    return [rows.c[name] == value for name, value in zip(LINEAGE, lineage, strict=True)]


class _Type(UserDefinedType[Any]):
    """A type in T-SQL's own words."""

    cache_ok = True

    def __init__(self, declared: str) -> None:
        self.declared = declared

    def get_col_spec(self, **_: Any) -> str:
        return self.declared


def _table(schema: str, table: str, described: Sequence[Declared]) -> Table:
    made = (Column(quoted_name(each.name, True), _Type(each.type)) for each in described)
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
    return Statement(str(compiled).strip(), tuple(compiled.params[each] for each in order))
