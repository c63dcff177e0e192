"""The SQLite sink: a table a topic, and the ledger `_cf_outputs` that makes it exactly once.

Rows and the ledger's row for their output key are one transaction of the database. `columns.py`
says how values are kept.

A file with more columns adds them to the table; a column whose type would change is refused.
"""

from __future__ import annotations

import contextlib
import glob
import json
import sqlite3
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from casparian_flow import atomic
from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks.base import (
    KEY_DIGITS,
    LINEAGE,
    Claim,
    Found,
    Lineage,
    facts_of,
    found,
    is_disk_fault,
    lost,
    unavailable,
)
from casparian_flow.engine.sinks.columns import Column, columns_of, fit, fold
from casparian_flow.engine.sinks.stage import Stage
from casparian_flow.errors import JobError, OutputRefused, SinkConflict, SinkUnavailable
from casparian_flow.protocol import OutputPlan, Published, StagedOutput

BUSY_SECONDS = 5.0
"""How long another program's lock is waited for, before the sink counts as unavailable."""

BATCH_ROWS = 16 << 10
"""Rows converted to Python values at once."""

_LEDGER = """
CREATE TABLE IF NOT EXISTS _cf_outputs (
    output_key TEXT PRIMARY KEY, topic TEXT NOT NULL, job_id INTEGER NOT NULL,
    file_version_id INTEGER NOT NULL, rows INTEGER NOT NULL, digest TEXT NOT NULL,
    published_at TEXT NOT NULL, facts TEXT NOT NULL DEFAULT ''
)"""

_PASSING = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_PROTOCOL,
}  # fmt: skip
"""Result codes of a database that may take the same rows later."""


class SqliteSink:
    """A SQLite database.

    Args:
        path: the database; created, in WAL mode, with the first output.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stage_folder = path.parent / atomic.STATE_FOLDER / "stage"

    def open_stage(self, plan: OutputPlan, lineage: Lineage, attempt: str) -> Stage:
        """See `Sink.open_stage`."""
        if plan.mode in ("replace", "error"):
            raise OutputRefused(f"topic {plan.topic!r}: mode {plan.mode!r} is not supported yet")
        return Stage(self.stage_folder, plan, lineage, attempt, admit=columns_of)

    def publish(self, outputs: Sequence[StagedOutput]) -> list[Published | JobError]:
        """See `Sink.publish`. One transaction an output."""
        try:
            with self._open() as connection:
                outcomes = [self._publish(connection, output) for output in outputs]
        except (OSError, sqlite3.Error) as error:
            return [self._refusal(error)] * len(outputs)
        for output, outcome in zip(outputs, outcomes, strict=True):
            if isinstance(outcome, Published):
                with contextlib.suppress(OSError):
                    Path(output.stage).unlink()
                crashpoint("sqlite.unstaged")
        return outcomes

    def check(self, claims: Sequence[Claim]) -> list[str]:
        """See `Sink.check`. Counts each table's rows once, for all claims on it."""
        topics = dict.fromkeys(claim.topic for claim in claims)
        faults: list[str] = []
        for topic in topics:
            claimed = [claim for claim in claims if claim.topic == topic]
            try:
                faults += self._faults(topic, claimed)
            except sqlite3.Error as error:
                faults += [f"{claim.target}: it cannot be read: {error}" for claim in claimed]
        return faults

    def inventory(self, known: Container[str]) -> Iterator[Found]:
        """See `Sink.inventory`. The ledger in the database says it all."""
        if not self.path.exists():
            return
        uri = f"{self.path.as_uri()}?mode=ro"
        try:
            with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)) as opened:
                opened.row_factory = sqlite3.Row
                if opened.execute("SELECT 1 FROM pragma_table_info('_cf_outputs')").fetchone():
                    for row in opened.execute("SELECT * FROM _cf_outputs ORDER BY rowid"):
                        if row["output_key"][:KEY_DIGITS] not in known:
                            yield self._found(row)
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_NOTADB:
                raise self._refusal(error) from error

    def withdraw(self, claim: Claim) -> None:
        """See `Sink.withdraw`. What a person left of its rows goes with the ledger's row."""
        if not self.path.exists():
            return
        try:
            with self._open() as connection, connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute(_LEDGER)
                found = connection.execute(
                    "DELETE FROM _cf_outputs WHERE output_key = ? RETURNING job_id",
                    [claim.output_key],
                ).fetchone()
                table = connection.execute(
                    "SELECT 1 FROM pragma_table_info(?) WHERE name = '_cf_job_id'", [claim.topic]
                ).fetchone()
                if table:
                    connection.execute(
                        f"DELETE FROM {_quote(claim.topic)} WHERE _cf_job_id = ?",  # noqa: S608
                        found or [claim.job_id],
                    )
        except (OSError, sqlite3.Error) as error:
            raise self._refusal(error, claim.topic) from error

    def _found(self, row: sqlite3.Row) -> Found:
        columns = {name: str(row[name]) for name in row.keys()}  # noqa: SIM118  a Row is no dict
        facts = {**columns, **json.loads(columns.get("facts") or "{}")}
        return found(f"{self.path}:{row['topic']}", row["rows"], row["digest"], facts)

    def retract(self, claim: Claim) -> None:
        """See `Sink.retract`."""
        raise SinkConflict(f"{claim.target}: cannot be retracted yet")

    def reinstate(self, claim: Claim) -> None:
        """See `Sink.reinstate`."""
        raise SinkConflict(f"{claim.target}: cannot be reinstated yet")

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection for writing.

        All our processes take turns, until the connection is closed: SQLite before 3.51.3 may
        corrupt a WAL database when two connections write or checkpoint at once.
        """
        folder, name = self.path.parent, self.path.name
        atomic.own(folder, glob.escape(name) + "*")
        with (
            atomic.exclusive(folder / atomic.STATE_FOLDER / f"{name}.gate"),
            contextlib.closing(
                sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
            ) as connection,
        ):
            if not self.path.stat().st_size:  # ours to choose: readers never block the writer
                connection.execute("PRAGMA journal_mode = WAL")
                crashpoint("sqlite.created")
            connection.execute("PRAGMA synchronous = FULL")
            yield connection

    def _publish(
        self, connection: sqlite3.Connection, output: StagedOutput
    ) -> Published | JobError:
        try:
            with connection:  # commits, or rolls back what raises
                connection.execute("BEGIN IMMEDIATE")
                crashpoint("sqlite.begun")
                published = self._adopt(connection, output) or self._insert(connection, output)
                crashpoint("sqlite.all_written")
            crashpoint("sqlite.committed")
            return published
        except JobError as error:
            return error
        except sqlite3.Error as error:
            return self._refusal(error, output.topic)

    def _adopt(self, connection: sqlite3.Connection, output: StagedOutput) -> Published | None:
        """What the ledger says of the output key, if anything."""
        connection.execute(_LEDGER)
        columns = connection.execute("SELECT name FROM pragma_table_info('_cf_outputs')")
        if ("facts",) not in columns.fetchall():  # an earlier release made it
            connection.execute("ALTER TABLE _cf_outputs ADD COLUMN facts TEXT NOT NULL DEFAULT ''")
        known = connection.execute(
            "SELECT rows, digest FROM _cf_outputs WHERE output_key = ?", [output.output_key]
        ).fetchone()
        return self._published(output, *known, adopted=True) if known else None

    def _insert(self, connection: sqlite3.Connection, output: StagedOutput) -> Published:
        """The ledger's row, then the table's; the caller commits both or none."""
        with _reading(output) as staged:
            footer = staged.metadata.metadata
            connection.execute(
                "INSERT INTO _cf_outputs VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    output.output_key, output.topic, int(footer[b"casparian.job_id"]),
                    int(footer[b"casparian.file_version_id"]), output.rows, output.digest,
                    datetime.now(UTC).isoformat(timespec="seconds"),
                    json.dumps(facts_of(footer)),
                ),
            )  # fmt: skip
            crashpoint("sqlite.ledger_written")
            columns = _fit_table(connection, output.topic, columns_of(staged.schema_arrow))
            crashpoint("sqlite.table_fitted")
            names = ", ".join(_quote(column.name) for column in columns)
            marks = ", ".join("?" * len(columns))
            insert = f"INSERT INTO {_quote(output.topic)} ({names}) VALUES ({marks})"  # noqa: S608
            for batch in staged.iter_batches(BATCH_ROWS):
                values = [c.values(a) for c, a in zip(columns, batch.columns, strict=True)]
                connection.executemany(insert, zip(*values, strict=True))
                crashpoint("sqlite.rows_written")
        return self._published(output, output.rows, output.digest, adopted=False)

    def _published(
        self, output: StagedOutput, rows: int, digest: str, *, adopted: bool
    ) -> Published:
        target = f"{self.path}:{output.topic}"
        return Published(target=target, rows=rows, digest=digest, adopted=adopted)

    def _refusal(self, error: OSError | sqlite3.Error, topic: str = "") -> JobError:
        """Say it in our words: wait, leave alone, or give up."""
        if isinstance(error, OSError):
            return unavailable(error, self.path)
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code in _PASSING:
            return SinkUnavailable(
                f"cannot write {self.path}: {error}",
                "see that it can be written and no program holds it; the jobs go on by themselves",
            )
        if code == sqlite3.SQLITE_NOTADB:
            return SinkConflict(f"{self.path} is not a SQLite database; it was left untouched")
        return OutputRefused(f"topic {topic!r}: {self.path} refuses the rows: {error}")

    def _faults(self, topic: str, claims: Sequence[Claim]) -> Iterator[str]:
        uri = f"{self.path.as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)) as connection:
            ledger = {
                key: record
                for key, *record in connection.execute(
                    "SELECT output_key, job_id, rows, digest FROM _cf_outputs WHERE topic = ?",
                    [topic],
                )
            }
            found = dict(
                connection.execute(
                    f"SELECT _cf_job_id, COUNT(*) FROM {_quote(topic)} GROUP BY 1"  # noqa: S608
                )
            )
        promised: Counter[int] = Counter()
        for job_id, rows, _ in ledger.values():
            promised[job_id] += rows
        for claim in claims:
            job_id, *told = ledger.get(claim.output_key, [0])
            if told != [claim.rows, claim.digest]:
                yield f"{claim.target}: its ledger does not have the output of job {claim.job_id}"
            elif found.get(job_id, 0) != promised[job_id]:
                yield (
                    f"{claim.target}: {found.get(job_id, 0)} rows of job {job_id}, "
                    f"where {promised[job_id]} were published"
                )


def _fit_table(
    connection: sqlite3.Connection, topic: str, columns: Sequence[Column]
) -> list[Column]:
    """Create the topic's table, or add the columns it lacks; the columns as the table has them.

    Raises:
        SinkConflict: the table is not one of ours.
        OutputRefused: a column has another type in the table.
    """
    table = _quote(topic)
    existing = {
        fold(name): declared
        for name, declared in connection.execute(
            "SELECT name, type FROM pragma_table_info(?)", [topic]
        )
    }
    if not existing:
        described = ", ".join(f"{_quote(column.name)} {column.declared}" for column in columns)
        connection.execute(f"CREATE TABLE {table} ({described})")
        return list(columns)
    if not existing.keys() >= set(LINEAGE):
        raise SinkConflict(
            f"table {topic!r} is not one of ours; it was left untouched",
            "rename that table, or give the topic another sink",
        )
    for column in columns:
        if fold(column.name) not in existing:
            connection.execute(
                f"ALTER TABLE {table} ADD COLUMN {_quote(column.name)} {column.declared}"
            )
    return [fit(column, existing.get(fold(column.name), column.declared)) for column in columns]


@contextlib.contextmanager
def _reading(output: StagedOutput) -> Iterator[Any]:
    """The staged Parquet file of an output.

    Raises:
        JobError: it is gone, damaged, or another one.
        SinkUnavailable: the disk refused to read it.
    """
    try:
        with pq.ParquetFile(output.stage) as staged:
            if staged.metadata.num_rows != output.rows:
                raise lost(output, f"it has {staged.metadata.num_rows} rows, not {output.rows}")
            yield staged
    except FileNotFoundError as error:
        raise lost(output, "it is gone") from error
    except (OSError, pa.ArrowException) as error:
        if is_disk_fault(error):
            raise unavailable(error, Path(output.stage)) from error
        raise lost(output, error) from error


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
