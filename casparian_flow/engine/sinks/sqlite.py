"""The SQLite sink: a table for each topic, and the sink's ledger `_cf_outputs`.

One call of `publish` is one transaction: the rows of every output, their entries in the sink's
ledger, and the removal of what they replace. Each job has a savepoint in it, so a job that is
refused undoes only its own changes. The ledger has the state of each output: `shown`, `replaced` or
`retracted`. `sqlite_tables.py` has the topics' tables, `columns.py` the conversion of values.
"""

from __future__ import annotations

import contextlib
import glob
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from casparian_flow import durable
from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks import sqlite_tables as tables
from casparian_flow.engine.sinks.base import (
    KEY_DIGITS,
    Claim,
    Found,
    Lineage,
    facts_of,
    found,
    unavailable,
)
from casparian_flow.engine.sinks.sqlite_tables import Rows, check_table, check_values, declared
from casparian_flow.engine.sinks.stage import Stage, reading
from casparian_flow.errors import JobError, OutputRefused, SinkConflict, SinkUnavailable
from casparian_flow.protocol import OutputPlan, Published, StagedOutput

BUSY_SECONDS = 5.0
"""How long to wait for another program's lock before the sink counts as unavailable."""

_PASSING = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_PROTOCOL,
}  # fmt: skip
"""Result codes after which the same rows may be accepted later."""


class SqliteSink:
    """A SQLite database.

    Args:
        path: the database; created, in WAL mode, with the first output.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stage_folder = path.parent / durable.STATE_FOLDER / "stage"

    def open_stage(self, plan: OutputPlan, lineage: Lineage, attempt: str) -> Stage:
        """See `Sink.open_stage`."""
        return Stage(
            self.stage_folder, plan, lineage, attempt,
            admit=partial(check_table, plan.topic), check=check_values,
            known=partial(self._names, plan.topic),
        )  # fmt: skip

    def _names(self, topic: str) -> list[str]:
        """The columns of a topic's table; none if the database cannot be read now."""
        try:
            with self._reading() as connection:
                return list(declared(connection, topic))
        except sqlite3.Error:
            return []

    def publish(self, outputs: Sequence[StagedOutput]) -> list[Published | JobError]:
        """See `Sink.publish`. One transaction for all jobs, and a savepoint in it for each."""
        jobs: dict[int, list[StagedOutput]] = {}
        for output in outputs:
            jobs.setdefault(output.job_id, []).append(output)
        try:
            with self._writing() as connection:
                ended = {job: iter(self._publish(connection, of)) for job, of in jobs.items()}
                outcomes = [next(ended[output.job_id]) for output in outputs]
                if not any(isinstance(outcome, Published) for outcome in outcomes):
                    connection.rollback()  # if nothing was published, no ledger is created either
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
                faults += [f"{claim.target} cannot be read: {error}" for claim in claimed]
        return faults

    def inventory(self, known: Container[str]) -> Iterator[Found]:
        """See `Sink.inventory`. Reads the ledger in the database."""
        if not self.path.exists():
            return
        try:
            with self._reading() as connection:
                if declared(connection, "_cf_outputs"):
                    for row in connection.execute("SELECT * FROM _cf_outputs ORDER BY rowid"):
                        output = found_as(dict(row), f"{self.path}:{row['topic']}")
                        if output.retracted or output.output_key[:KEY_DIGITS] not in known:
                            yield output
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_NOTADB:
                raise self._refusal(error) from error

    def withdraw(self, claim: Claim) -> None:
        """See `Sink.withdraw`. Deletes the output's ledger entry and the rows left of it."""
        if not self.path.exists():
            return
        with self._changing(claim) as (connection, record):
            connection.execute("DELETE FROM _cf_outputs WHERE output_key = ?", [claim.output_key])
            rows = rows_of(record) if record else Rows(claim.job_id)
            tables.delete_rows(connection, claim.topic, rows._replace(number=-1))

    def retract(self, claim: Claim) -> None:
        """See `Sink.retract`. The rows move to another table as the ledger entry changes."""
        if not self.path.exists():
            return
        with self._changing(claim) as (connection, record):
            if record and record["state"] == "shown":
                move_output(connection, record, "retracted", tables.retract_rows)

    def reinstate(self, claim: Claim) -> None:
        """See `Sink.reinstate`."""
        if not self.path.exists():
            raise SinkConflict(f"{claim.target}: the database is gone")
        with self._changing(claim) as (connection, record):
            if record is None:
                raise SinkConflict(
                    f"{claim.target}: its table _cf_outputs does not list the output"
                )
            if record["state"] == "retracted":
                if record["mode"] == "replace" and is_late_output(connection, record):
                    move_output(connection, record, "replaced", tables.forget_rows)
                else:
                    move_output(connection, record, "shown", tables.reinstate_rows)

    @contextlib.contextmanager
    def _changing(self, claim: Claim) -> Iterator[tuple[sqlite3.Connection, dict[str, Any] | None]]:
        """A transaction that changes an output's state; yields its ledger entry too."""
        try:
            with self._writing() as connection:
                yield connection, ledger_row(connection, claim.output_key)
                crashpoint("sqlite.change_written")
            crashpoint("sqlite.changed")
        except (OSError, sqlite3.Error) as error:
            raise self._refusal(error, claim.topic) from error

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        uri = f"{self.path.as_uri()}?mode=ro"
        opened = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)
        with contextlib.closing(opened) as connection:
            connection.row_factory = sqlite3.Row
            yield connection

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction in a database that has our ledger; rolled back if the block raises."""
        with self._open() as connection, connection:
            connection.row_factory = sqlite3.Row
            connection.execute("BEGIN IMMEDIATE")
            crashpoint("sqlite.begun")
            make_ledger(connection)
            crashpoint("sqlite.ledger_ready")
            yield connection
            crashpoint("sqlite.all_written")
        crashpoint("sqlite.committed")

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection for writing, under a lock that all our processes take.

        SQLite before 3.51.3 may corrupt a WAL database when two connections write or checkpoint
        at the same time.
        """
        folder, name = self.path.parent, self.path.name
        durable.own(folder, glob.escape(name) + "*")
        with (
            durable.exclusive(folder / durable.STATE_FOLDER / f"{name}.gate"),
            contextlib.closing(
                sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
            ) as connection,
        ):
            if not self.path.stat().st_size:  # new: in WAL mode readers never block the writer
                connection.execute("PRAGMA journal_mode = WAL")
                crashpoint("sqlite.created")
            connection.execute("PRAGMA synchronous = FULL")
            yield connection

    def _publish(
        self, connection: sqlite3.Connection, outputs: Sequence[StagedOutput]
    ) -> list[Published | JobError]:
        """Publish all outputs of one job; after an error none but those already published."""
        connection.execute("SAVEPOINT job")
        try:
            outcomes: list[Published | JobError] = []
            for output in outputs:
                outcomes.append(self._adopted(connection, output) or self._add(connection, output))
        except (JobError, sqlite3.Error) as error:
            if not connection.in_transaction:  # SQLite has rolled back the whole transaction
                raise
            connection.execute("ROLLBACK TO job")
            fault = error if isinstance(error, JobError) else self._refusal(error, output.topic)
            outcomes = [self._adopted(connection, output) or fault for output in outputs]
        connection.execute("RELEASE job")
        crashpoint("sqlite.job_written")
        return outcomes

    def _adopted(self, connection: sqlite3.Connection, output: StagedOutput) -> Published | None:
        """The outcome of an output that the ledger already has."""
        known = ledger_row(connection, output.output_key)
        if known is None:
            return None
        retracted = known["state"] == "retracted"
        return self._published(output, known["rows"], known["digest"], True, retracted)

    def _add(self, connection: sqlite3.Connection, output: StagedOutput) -> Published:
        """Write the ledger entry, then the rows; delete the rows that they replace."""
        place = {"slot": output.slot, "ordinal": output.ordinal, "job_id": output.job_id}
        replaces = output.mode == "replace"
        is_late = replaces and is_late_output(connection, place)
        if output.mode == "error":
            promised = shown_outputs(connection, output.topic)
            tables.check_all_ours(connection, output.topic, promised)
        with reading(output) as staged:
            footer = staged.metadata.metadata
            record = {
                **place, "output_key": output.output_key, "topic": output.topic,
                "file_version_id": int(footer[b"casparian.file_version_id"]),
                "rows": output.rows, "digest": output.digest, "mode": output.mode,
                "published_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "facts": json.dumps(facts_of(footer)), "state": "replaced" if is_late else "shown",
            }  # fmt: skip
            if replaces and not is_late:
                self._replace(connection, output)
            marks = ", ".join(f":{name}" for name in record)
            connection.execute(
                f"INSERT INTO _cf_outputs ({', '.join(record)}) VALUES ({marks})",  # noqa: S608
                record,
            )
            crashpoint("sqlite.ledger_written")
            if not is_late:
                tables.insert_rows(connection, output.topic, staged)
        return self._published(output, output.rows, output.digest, False, False)

    def _replace(self, connection: sqlite3.Connection, output: StagedOutput) -> None:
        """Delete the rows shown in the output's slot; retracted rows stay."""
        earlier = connection.execute(
            "UPDATE _cf_outputs SET state = 'replaced' WHERE slot = ? AND mode = 'replace' "
            "AND state = 'shown' RETURNING *",
            [output.slot],
        ).fetchall()
        for record in earlier:
            tables.delete_rows(connection, output.topic, rows_of(dict(record)))
            crashpoint("sqlite.replaced")

    def _published(
        self, output: StagedOutput, rows: int, digest: str, adopted: bool, retracted: bool
    ) -> Published:
        return Published(
            target=f"{self.path}:{output.topic}", rows=rows, digest=digest, adopted=adopted,
            retracted=retracted,
        )  # fmt: skip

    def _refusal(self, error: OSError | sqlite3.Error, topic: str = "") -> JobError:
        """The error to report for one of the disk or SQLite."""
        if isinstance(error, OSError):
            return unavailable(error, self.path)
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code in _PASSING:
            return SinkUnavailable(
                f"cannot write {self.path}: {error}",
                "make it writable, and close programs that lock it; the jobs then continue by "
                "themselves",
            )
        if code == sqlite3.SQLITE_NOTADB:
            return SinkConflict(f"{self.path} is not a SQLite database; it was left untouched")
        return OutputRefused(f"topic {topic!r}: {self.path} does not accept the rows: {error}")

    def _faults(self, topic: str, claims: Sequence[Claim]) -> Iterator[str]:
        with self._reading() as connection:
            ledger = {
                row["output_key"]: {"state": "shown", **dict(row)}
                for row in connection.execute("SELECT * FROM _cf_outputs WHERE topic = ?", [topic])
            }
            has_rows = any(r["rows"] and r["state"] == "shown" for r in ledger.values())
            counted = tables.count_rows(connection, topic) if has_rows else {}
        promised: Counter[int] = Counter()
        for record in ledger.values():
            promised[record["job_id"]] += record["rows"] * (record["state"] == "shown")
        for claim in claims:
            record = ledger.get(claim.output_key, {})
            if [record.get("rows"), record.get("digest")] != [claim.rows, claim.digest]:
                yield (
                    f"{claim.target}: its table _cf_outputs does not list the output of "
                    f"job {claim.job_id}"
                )
            elif record["state"] != "shown":
                yield (
                    f"{claim.target}: its table _cf_outputs has the output of job "
                    f"{claim.job_id} as {record['state']}"
                )
            elif counted.get(record["job_id"], 0) != promised[record["job_id"]]:
                yield (
                    f"{claim.target}: {counted.get(record['job_id'], 0)} rows of job "
                    f"{record['job_id']} instead of the {promised[record['job_id']]} published"
                )


# The sink's ledger, `_cf_outputs`: an entry for each published output.


_LEDGER = """
CREATE TABLE IF NOT EXISTS _cf_outputs (
    output_key TEXT PRIMARY KEY, topic TEXT NOT NULL, job_id INTEGER NOT NULL,
    file_version_id INTEGER NOT NULL, rows INTEGER NOT NULL, digest TEXT NOT NULL,
    published_at TEXT NOT NULL
)"""

_LATER = {
    "facts": "TEXT NOT NULL DEFAULT ''",
    "slot": "TEXT NOT NULL DEFAULT ''",
    "ordinal": "INTEGER NOT NULL DEFAULT 0",
    "mode": "TEXT NOT NULL DEFAULT 'append'",
    "state": "TEXT NOT NULL DEFAULT 'shown'",
}
"""Columns that later releases added to the ledger, and their values for older entries."""


def make_ledger(connection: sqlite3.Connection) -> None:
    """Create the ledger, or add the columns that it lacks."""
    connection.execute(_LEDGER)
    for name in _LATER.keys() - declared(connection, "_cf_outputs").keys():
        connection.execute(f"ALTER TABLE _cf_outputs ADD COLUMN {name} {_LATER[name]}")
    connection.execute("CREATE INDEX IF NOT EXISTS _cf_slots ON _cf_outputs (slot)")


def found_as(row: dict[str, Any], target: str) -> Found:
    """A ledger entry of any release as a `Found`."""
    columns = {name: str(value) for name, value in row.items()}
    facts = {**columns, **json.loads(columns.get("facts") or "{}")}
    retracted = row.get("state") == "retracted"
    return found(target, row["rows"], row["digest"], facts, retracted=retracted)


def ledger_row(connection: sqlite3.Connection, output_key: str) -> dict[str, Any] | None:
    """The ledger entry of an output."""
    row = connection.execute(
        "SELECT * FROM _cf_outputs WHERE output_key = ?", [output_key]
    ).fetchone()
    return dict(row) if row else None


def rows_of(record: dict[str, Any]) -> Rows:
    facts = json.loads(record["facts"] or "{}")
    return Rows(
        record["job_id"], record["file_version_id"], facts.get("source_hash", ""),
        facts.get("plugin_version", ""), record["rows"],
    )  # fmt: skip


def is_late_output(connection: sqlite3.Connection, place: dict[str, Any]) -> bool:
    """Whether the slot already has a greater output."""
    greater = connection.execute(
        "SELECT 1 FROM _cf_outputs WHERE slot = :slot AND mode = 'replace' "
        "AND (ordinal, job_id) > (:ordinal, :job_id)",
        place,
    )
    return greater.fetchone() is not None


def shown_outputs(connection: sqlite3.Connection, topic: str) -> dict[int, int]:
    """Job id -> how many rows of it a topic's table must have, according to the ledger."""
    promised = connection.execute(
        "SELECT job_id, SUM(rows) AS n FROM _cf_outputs "
        "WHERE topic = ? AND state = 'shown' GROUP BY 1 HAVING n > 0",
        [topic],
    )
    return dict(map(tuple, promised))


def move_output(
    connection: sqlite3.Connection,
    record: dict[str, Any],
    state: str,
    take: Callable[[sqlite3.Connection, str, Rows], int],
) -> None:
    """Change an output's state: move or delete its rows with `take`, and update its ledger entry.

    Raises:
        SinkConflict: their number is not the number that was published.
    """
    moved = take(connection, record["topic"], rows_of(record))
    if moved != record["rows"]:
        raise SinkConflict(
            f"{record['topic']!r} has {moved} rows of job {record['job_id']} instead of the "
            f"{record['rows']} published; nothing was changed",
            f"casparian outputs restore {record['job_id']}",
        )
    connection.execute(
        "UPDATE _cf_outputs SET state = ? WHERE output_key = ?", [state, record["output_key"]]
    )
