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
    and_,
    delete,
    exists,
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


def begin_session(lock_seconds: float) -> Statement:
    """What holds for a whole connection: an error undoes the transaction, no lock is waited for
    without end, and statements that count no rows say nothing."""
    wait = round(lock_seconds * 1000)
    return Statement(f"SET XACT_ABORT ON; SET NOCOUNT OFF; SET LOCK_TIMEOUT {wait}")


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
    return whole if len(whole.encode("utf-16-le")) <= 256 else f"{whole[:100]}_{digest}"


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
        self._outputs = self._ledger.alias("o")

    def create_ledger(self) -> list[Statement]:
        """The ledger; by slot it is asked at every publish under `replace`."""
        slot = Index("_cf_slot", self._ledger.c.slot)
        return [_compiled(CreateTable(self._ledger)), _compiled(CreateIndex(slot))]

    def recorded(self, keys: Sequence[str]) -> Statement:
        """What the ledger says of these output keys: key, rows, digest, state."""
        c = self._outputs.c
        chosen = select(c.output_key, c.rows, c.digest, c.state)
        return _compiled(chosen.where(c.output_key.in_(keys)))

    def others(self, topic: str) -> Statement:
        """The topics, other than this one, that have rows in the table."""
        c = self._outputs.c
        here = c.table_name == self.table
        return _compiled(select(c.topic).distinct().where(here, c.topic != topic))

    def strangers(self) -> Statement:
        """One row if the table has rows that no output in the ledger has brought."""
        rows = self._rows().alias("r")
        known = exists(literal_column("1")).select_from(self._outputs).where(self._brought(rows))
        return _compiled(select(literal_column("1")).select_from(rows).where(~known).limit(1))

    def record(self, facts: Mapping[str, Any]) -> Statement:
        """The ledger's row of an output; refused by its primary key if there is one."""
        return _compiled(insert(self._ledger).values(table_name=self.table, **facts))

    def in_slot(self, slot: str) -> Statement:
        """A slot's outputs under `replace`, the greatest first: key, ordinal, job id, state."""
        c = self._outputs.c
        chosen = select(c.output_key, c.ordinal, c.job_id, c.state)
        mine = chosen.where(c.slot == slot, c.mode == "replace", c.table_name == self.table)
        return _compiled(mine.order_by(c.ordinal.desc(), c.job_id.desc()))

    def mark(self, keys: Sequence[str], state: str) -> Statement:
        """Change the state of outputs."""
        return _compiled(
            update(self._ledger).where(self._ledger.c.output_key.in_(keys)).values(state=state)
        )

    def delete_rows(self, keys: Sequence[str]) -> Statement:
        """Take the rows of outputs out of the table."""
        rows = self._rows()
        return _compiled(delete(rows).where(self._of(rows, keys)))

    def forget(self, keys: Sequence[str]) -> Statement:
        """Take outputs out of the ledger."""
        return _compiled(delete(self._ledger).where(self._ledger.c.output_key.in_(keys)))

    def insert_staged(self, stage: str, names: Sequence[str]) -> Statement:
        """Bring the rows of a stage table into the table."""
        return self._copy(stage, self.table, names)

    def move_out(self, keys: Sequence[str], names: Sequence[str]) -> list[Statement]:
        """Take the rows of outputs to the table of what was retracted."""
        aside = retracted_name(self.table)
        return [self._copy(self.table, aside, names, keys), self.delete_rows(keys)]

    def move_back(self, keys: Sequence[str], names: Sequence[str]) -> list[Statement]:
        """Take them back from there."""
        aside = retracted_name(self.table)
        return [self._copy(aside, self.table, names, keys), self.drop_retracted(keys)]

    def drop_retracted(self, keys: Sequence[str]) -> Statement:
        """Throw away what was retracted of outputs."""
        rows = self._rows(retracted_name(self.table))
        return _compiled(delete(rows).where(self._of(rows, keys)))

    def counted(self, keys: Sequence[str]) -> Statement:
        """What the ledger says of outputs, and how many of their rows are in the table."""
        rows, c = self._rows().alias("r"), self._outputs.c
        there = (
            select(func.count_big(literal_column("*")))
            .select_from(rows)
            .where(self._brought(rows))
            .correlate(self._outputs)
            .scalar_subquery()
        )
        chosen = select(c.output_key, c.rows, c.digest, c.state, there.label("there"))
        return _compiled(chosen.where(c.output_key.in_(keys)))

    def inventory(self) -> Statement:
        """Every output of the table that the ledger has: key, topic, rows, digest, state, facts."""
        c = self._outputs.c
        chosen = select(c.output_key, c.topic, c.rows, c.digest, c.state, c.facts)
        return _compiled(chosen.where(c.table_name == self.table).order_by(c.output_key))

    def _rows(self, table: str = "") -> Table:
        lineage = [Declared(*each) for each in zip(LINEAGE, LINEAGE_TYPES, strict=True)]
        return _table(self.schema, table or self.table, lineage)

    def _brought(self, rows: FromClause) -> ColumnElement[bool]:
        """Whether a row is one that an output of the ledger has brought."""
        c = self._outputs.c
        same = (rows.c[column] == c[column.removeprefix("_cf_")] for column in LINEAGE)
        return and_(c.table_name == self.table, *same)

    def _of(self, rows: FromClause, keys: Sequence[str]) -> ColumnElement[bool]:
        """Whether a row is one of these outputs."""
        mine = exists(literal_column("1")).select_from(self._outputs)
        return mine.where(self._outputs.c.output_key.in_(keys), self._brought(rows))

    def _copy(self, of: str, to: str, names: Sequence[str], keys: Sequence[str] = ()) -> Statement:
        """Rows of one table to another: all of them, or those of some outputs."""
        described = [Declared(each, "") for each in names]
        source = _table(self.schema, of, described).alias("r")
        chosen = select(*source.c)
        if keys:
            chosen = chosen.where(self._of(source, keys))
        return _compiled(insert(_table(self.schema, to, described)).from_select(names, chosen))


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
