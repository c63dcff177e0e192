"""The tables of the SQLite sink: a topic's own, and the one that keeps what was retracted of it.

The rows of an output are found by their lineage; the first time that rows are taken out of a
table, it gets an index for that. What is retracted waits in `_cf_retracted_<topic>`, whose columns
have no types: there every value stays what it is.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks.base import LINEAGE, facts_of, own_topic
from casparian_flow.engine.sinks.columns import Column, columns_of, fold, pieces
from casparian_flow.engine.sinks.sqlite_columns import RETRACTED, declared, fitted, quote
from casparian_flow.errors import OutputRefused, SinkConflict

BATCH_ROWS = 16 << 10
"""Rows converted to Python values at once, at most."""


class Rows(NamedTuple):
    """Rows of an output: their lineage, and how many there should be.

    Two ledgers that share a table may give the same ids to the same content. Then their rows are
    alike, and each ledger takes as many as are its own.
    """

    job_id: int
    file_version_id: int = 0
    """0, as what follows where it is empty: not known."""
    source_hash: str = ""
    plugin_version: str = ""
    number: int = -1
    """No more than so many; -1 for all."""


_THESE = """
_cf_job_id = :job_id
AND _cf_file_version_id = coalesce(nullif(:file_version_id, 0), _cf_file_version_id)
AND _cf_source_hash = coalesce(nullif(:source_hash, ''), _cf_source_hash)
AND _cf_plugin_version = coalesce(nullif(:plugin_version, ''), _cf_plugin_version)
"""


def is_ours(connection: sqlite3.Connection, table: str) -> bool:
    """Whether there is such a table, and it has the lineage columns."""
    return declared(connection, table).keys() >= set(LINEAGE)


def count(connection: sqlite3.Connection, topic: str) -> dict[int, int]:
    """How many rows of each job a topic's table holds.

    Raises:
        sqlite3.OperationalError: there is no such table, or it is not one of ours.
    """
    query = f"SELECT _cf_job_id, COUNT(*) FROM {quote(topic)} GROUP BY 1"  # noqa: S608
    return dict(map(tuple, connection.execute(query)))


def insert(connection: sqlite3.Connection, topic: str, staged: Any) -> None:
    """Add the rows of a staged file (`pyarrow.parquet.ParquetFile`).

    An empty output of mode replace has no columns but the lineage ones, and needs no table.

    Raises:
        SinkConflict: the topic's table is not one of ours.
        OutputRefused: the columns are not those of the table, or a value would change in it.
    """
    incoming = columns_of(staged.schema_arrow)
    if len(incoming) == len(LINEAGE):
        return
    try:
        taken = _fit_table(connection, topic, staged, incoming)
        crashpoint("sqlite.table_fitted")
        names = ", ".join(quote(column.name) for column in taken)
        marks = ", ".join("?" * len(taken))
        statement = f"INSERT INTO {quote(topic)} ({names}) VALUES ({marks})"  # noqa: S608
        for batch in chain.from_iterable(map(pieces, staged.iter_batches(BATCH_ROWS))):
            values = [c.values(a) for c, a in zip(taken, batch.columns, strict=True)]
            connection.executemany(statement, zip(*values, strict=True))
            crashpoint("sqlite.rows_written")
    except OutputRefused as error:
        raise type(error)(f"topic {topic!r}: {error.message}", error.hint) from error


def create(connection: sqlite3.Connection, topic: str, incoming: Sequence[Column]) -> None:
    """Make a topic's table."""
    described = ", ".join(f"{quote(column.name)} {column.declared}" for column in incoming)
    connection.execute(f"CREATE TABLE {quote(topic)} ({described})")


def delete(connection: sqlite3.Connection, topic: str, rows: Rows) -> int:
    """Take an output's rows out of a topic's table; how many there were."""
    if not is_ours(connection, topic):
        return 0
    chosen = _chosen(connection, topic)
    return connection.execute(f"DELETE FROM {quote(topic)} {chosen}", rows._asdict()).rowcount  # noqa: S608


def retract(connection: sqlite3.Connection, topic: str, rows: Rows) -> int:
    """Move an output's rows to where nobody looks for them; how many there were."""
    if not is_ours(connection, topic):
        return 0
    kept = RETRACTED + topic
    known = {fold(name) for name in declared(connection, kept)}
    lacking = [name for name in declared(connection, topic) if fold(name) not in known]
    if not known:
        described = ", ".join(map(quote, lacking))
        connection.execute(f"CREATE TABLE {quote(kept)} ({described})")
    else:
        for name in lacking:
            connection.execute(f"ALTER TABLE {quote(kept)} ADD COLUMN {quote(name)}")
    return _move(connection, topic, kept, declared(connection, topic), rows)


def reinstate(connection: sqlite3.Connection, topic: str, rows: Rows) -> int:
    """Move an output's rows back; how many there were.

    Raises:
        SinkConflict: the topic's table is gone, or lacks a column that the rows have.
    """
    kept = RETRACTED + topic
    if not is_ours(connection, kept):
        return 0
    there = {fold(name) for name in declared(connection, topic)}
    if lost := [name for name in declared(connection, kept) if fold(name) not in there]:
        raise SinkConflict(
            f"table {topic!r} has no column {lost[0]!r}, which rows retracted from it have",
            f"put that column back; the rows wait in the table {kept!r}",
        )
    return _move(connection, kept, topic, declared(connection, kept), rows)


def forget(connection: sqlite3.Connection, topic: str, rows: Rows) -> int:
    """Delete an output's rows from where `retract` has put them; how many there were."""
    return delete(connection, RETRACTED + topic, rows)


def check_all_ours(connection: sqlite3.Connection, topic: str, promised: dict[int, int]) -> None:
    """Return if a topic's table is not there, or every row of it is accounted for.

    Args:
        promised: job -> how many rows of it there should be.

    Raises:
        SinkConflict: it holds what is not ours.
    """
    if not declared(connection, topic):
        return
    if not is_ours(connection, topic) or count(connection, topic) != promised:
        raise SinkConflict(
            f"table {topic!r} holds rows that are not ours, and the topic's mode is error; it was "
            "left untouched",
            "rename that table, or: casparian topics set ... --mode append",
        )


def _move(
    connection: sqlite3.Connection, source: str, target: str, names: Sequence[str] | dict[str, str],
    rows: Rows,
) -> int:  # fmt: skip
    listed = ", ".join(map(quote, names))
    connection.execute(
        f"INSERT INTO {quote(target)} ({listed}) "  # noqa: S608
        f"SELECT {listed} FROM {quote(source)} {_chosen(connection, source)}",
        rows._asdict(),
    )
    crashpoint("sqlite.rows_copied")
    return delete(connection, source, rows)


def _chosen(connection: sqlite3.Connection, table: str) -> str:
    """The condition that picks `Rows` in a table, with the index it needs."""
    index = quote(f"_cf_job_of_{table}")
    connection.execute(f"CREATE INDEX IF NOT EXISTS {index} ON {quote(table)} (_cf_job_id)")
    taken = {fold(name) for name in declared(connection, table)}
    rowid = next((name for name in ("rowid", "_rowid_", "oid") if name not in taken), None)
    if rowid is None:
        raise SinkConflict(f"table {table!r} has columns for every name of SQLite's row number")
    these = f"SELECT {rowid} FROM {quote(table)} WHERE {_THESE} LIMIT :number"  # noqa: S608
    return f"WHERE {rowid} IN ({these})"


def _fit_table(
    connection: sqlite3.Connection, topic: str, staged: Any, incoming: Sequence[Column]
) -> list[Column]:
    """Create the topic's table, or add the columns it lacks; the columns as the table has them.

    Raises:
        SinkConflict: the table is not one of ours.
        OutputRefused: a column has another type in the table.
    """
    table = quote(topic)
    existing = {fold(name): kind for name, kind in declared(connection, topic).items()}
    if not existing:
        create(connection, topic, incoming)
        return list(incoming)
    if not existing.keys() >= set(LINEAGE):
        raise SinkConflict(
            f"table {topic!r} is not one of ours; it was left untouched",
            "rename that table, or give the topic another sink",
        )
    for column in incoming:
        if fold(column.name) not in existing:
            connection.execute(
                f"ALTER TABLE {table} ADD COLUMN {quote(column.name)} {column.declared}"
            )
    settles = own_topic(topic, facts_of(staged.metadata.metadata))
    return fitted(connection, topic, staged, incoming, settles)
