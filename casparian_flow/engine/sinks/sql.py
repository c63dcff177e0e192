"""What all sinks in SQL databases do: rows never move, and a state says who sees them.

    _cf_rows_<topic>     the topic's rows; `_cf_output` in each names its output
    _cf_rows2_<topic>    rows of a rebuild whose columns have other types; `_cf_rows3_` and so on
    _cf_outputs          the sink's ledger: each output's facts and state
    <topic>              view: the rows of current outputs, and of past ones unless the mode is
                         `replace`, with the lineage columns of their outputs
    <topic>_current      view: the rows of current outputs
    <topic>_history      view: the rows of current and past outputs

So a change of what readers see is an UPDATE of a few rows in `_cf_outputs`. A topic with several
tables of rows has views that unite them by column name, the newest first; a table without an output
that stands is left out, so its types do not count. A further table goes with its last output; the
first one stays, with what other people made on it. `Schema` does this on top of what a dialect
supplies: `sqlite.py` and `mssql.py`. The statements here are in the SQL that
both have, with `?` for values.
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import (
    Callable,
    Collection,
    Container,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from msgspec import structs

from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks.base import facts_in, output_of
from casparian_flow.engine.sinks.sql_views import united
from casparian_flow.errors import JobError, SinkConflict, SinkUnavailable
from casparian_flow.protocol import Output, Publication, State

LEDGER = "_cf_outputs"

ROWS = "_cf_rows_"
"""How the name of a topic's first table begins; see `rows_prefix`."""

RECORDED = (
    "id", "output_key", "topic", "view_name", "mode", "state", "rows", "digest", "published_at",
    "shown_at", "hidden_at", "job_id", "file_version_id", "source_hash", "plugin_version", "facts",
    "table_number",
)  # fmt: skip
"""The columns of the ledger. Times are ISO 8601 in UTC, empty for never. The database gives `id`;
`view_name` is the topic's view, which the location of a SQL Server sink names; `table_number` says
which of the topic's tables has the rows, 0 if none has. An index over view_name, table_number and
state finds the tables."""

VIEWS = {
    "": "(o.state = 'current' OR o.state = 'past' AND o.mode <> 'replace')",
    "_current": "o.state = 'current'",
    "_history": "o.state IN ('current', 'past')",
}
"""What follows the topic in a view's name, and which outputs the view shows."""

_JOINED = "ON o.id = r._cf_output"
"""A view with these words in it is one of ours."""

_PAGE = 5000
"""How many outputs of the ledger are read at once."""

_SEEN = (State.CURRENT, State.PAST)
"""States of outputs whose rows some view shows."""

_SINCE = {"shown": (*_SEEN, State.HIDDEN), "replaced": (State.PAST, State.HIDDEN)}
"""What earlier releases wrote -> the states that the ledger may have for the output."""

Record = dict[str, Any]
"""A row of the ledger, by column."""

SchemaOf = Callable[[str], "Schema"]
"""The schema of a location, in the open transaction."""


class SqlSink(ABC):
    """A sink in a SQL database.

    Args:
        location: as `sinks.resolve` returned it.
        view: the only topic's view that belongs to the sink; empty if all of the database do.
    """

    def __init__(self, location: str, view: str = "") -> None:
        self.location = location
        self.view = view

    @abstractmethod
    def publish_jobs(self, jobs: Sequence[Publication]) -> list[list[Output] | JobError]:
        """Publish each job with `publish_job`, wholly or not at all."""

    @abstractmethod
    def writing(self, outputs: Sequence[Output]) -> AbstractContextManager[SchemaOf]:
        """A transaction that changes these outputs; committed unless the block raises.

        Raises:
            JobError: the database's own errors, classified.
        """

    @abstractmethod
    def reading(self) -> AbstractContextManager[SchemaOf | None]:
        """A connection for reading; None if the database does not exist.

        Raises:
            SinkConflict: it is no database.
            SinkUnavailable: it cannot be read.
        """

    def publish(self, jobs: Sequence[Publication]) -> list[list[Output] | JobError]:
        """See `Sink.publish`."""
        outcomes = self.publish_jobs(jobs)
        for job, outcome in zip(jobs, outcomes, strict=True):
            if not isinstance(outcome, JobError):
                for output in job.outputs:
                    if output.stage:
                        with contextlib.suppress(OSError):
                            Path(output.stage).unlink()
                        crashpoint("sql.unstaged")
        return outcomes

    def change(self, outputs: Sequence[Output]) -> None:
        """See `Sink.change`. One transaction."""
        if not outputs:
            return
        with self.writing(outputs) as schema_of:
            change_outputs(schema_of, outputs)
            crashpoint("sql.change_written")
        crashpoint("sql.changed")

    def delete(self, outputs: Sequence[Output]) -> None:
        """See `Sink.delete`. One transaction."""
        if not outputs:
            return
        with self.writing(outputs) as schema_of:
            for output in outputs:
                schema = schema_of(output.location)
                schema.check_form()
                if record := schema.record(output.output_key):
                    schema.delete(record)
                    crashpoint("sql.rows_deleted")
            crashpoint("sql.deletion_written")
        crashpoint("sql.deleted")

    def check(self, outputs: Sequence[Output]) -> list[str]:
        """See `Sink.check`. Counts each table's rows once, for all of its outputs."""
        targets: dict[str, list[Output]] = defaultdict(list)
        for output in outputs:
            targets[output.target].append(output)
        faults: list[str] = []
        for target, of in targets.items():
            try:
                with self.reading() as schema_of:
                    schema = schema_of and schema_of(of[0].location)
                    found = schema.faults(of) if schema else ["the database is gone"] * len(of)
                    faults += [f"{target}: {fault}" for fault in found]
            except JobError as error:
                faults += [f"{target}: {error.message}" for _ in of]
        return faults

    def records(self, known: Container[str]) -> Iterator[Output]:
        """See `Sink.records`. Reads the ledger in the database, of any release."""
        try:
            with self.reading() as schema_of:
                if schema_of:
                    schema = schema_of(self.location)
                    for record in schema.records(self.view):
                        is_known = record["output_key"] in known
                        if not is_known or record.get("state") == State.RETRACTED:
                            with contextlib.suppress(ValueError, KeyError):
                                yield schema.output(record, self.location)
        except SinkConflict as error:  # it is no database: not the same as one without outputs
            raise SinkUnavailable(error.message, error.hint or "put the database back") from error


def rows_prefix(number: int) -> str:
    """How the name of a topic's n-th table begins. No other topic's table has such a name, which
    `_cf_rows_<topic>_2` might be."""
    return ROWS if number == 1 else f"_cf_rows{number}_"


def lock_keys(outputs: Sequence[Output]) -> list[str]:
    """What a dialect locks to change these outputs: their keys and location slots."""
    return sorted({key for o in outputs for key in (o.output_key, o.location_slot)})


def publish_job(schema_of: SchemaOf, job: Publication) -> list[Output]:
    """Record a job's outputs and load their rows, then change the states of others; within one
    transaction, which the caller commits, or rolls back if this raises.

    Raises:
        JobError: the rows cannot be read, or the database cannot hold them.
        Exception: the driver's own errors.
    """
    published = []
    for output in job.outputs:
        schema = schema_of(output.location)
        schema.check_form()
        found = schema.record(output.output_key)
        if found is None:
            if output.mode == "error":
                schema.check_only_ours(schema.view_of(output))
            record = schema.add(output)
            crashpoint("sql.recorded")
            if output.stage:
                record = schema.assign(record, schema.load(output, record["id"]))
                crashpoint("sql.rows_loaded")
        else:
            record = schema.mark(found, output)
        published.append(schema.as_published(output, record))
    change_outputs(schema_of, job.changes, fitted=job.outputs)
    crashpoint("sql.job_written")
    return published


def change_outputs(
    schema_of: SchemaOf, outputs: Sequence[Output], fitted: Sequence[Output] = ()
) -> None:
    """Give outputs the state and mode that they have here, and views the tables of those that
    stand; within one transaction.

    Args:
        fitted: outputs that were published in the same transaction.

    Raises:
        SinkConflict: rows that are to be visible are not whole, or not all can be shown together.
    """
    for output in outputs:
        schema = schema_of(output.location)
        if schema.has_ledger():
            schema.check_form()
            if record := schema.record(output.output_key):
                if output.state in _SEEN and record["state"] not in _SEEN:
                    schema.check_whole(record)
                schema.mark(record, output)
                crashpoint("sql.marked")
    # The views of one location and topic once, after all of its outputs have their states.
    for output in {(o.location, o.topic): o for o in (*outputs, *fitted)}.values():
        schema = schema_of(output.location)
        if schema.has_ledger():
            schema.fit_views(schema.view_of(output))


def now() -> str:
    """The time as the ledger has it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


class Schema(ABC):
    """The ledger, tables and views of one schema, in an open transaction."""

    place: str
    """For messages: the database or schema."""
    own_topic_hint = "rename that table, or give the topic another sink"

    # What a dialect supplies.

    @abstractmethod
    def ask(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows that a statement returns."""

    @abstractmethod
    def send(self, sql: str, *values: Any) -> int:
        """Send a statement; returns how many rows it changed."""

    @abstractmethod
    def quote(self, name: str) -> str:
        """The name of a column, quoted."""

    def table(self, name: str) -> str:
        """The name of a table or view of the schema, quoted and qualified."""
        return self.quote(name)

    @abstractmethod
    def fold(self, name: str) -> str:
        """A name as the database compares it."""

    @abstractmethod
    def columns(self, name: str) -> Mapping[str, str]:
        """Name -> declared type of the columns of a table or view; empty if there is none."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether a table or view has this name."""

    @abstractmethod
    def definition(self, view: str) -> str:
        """The text of a view; empty if there is no such view."""

    @abstractmethod
    def put_view(self, view: str, query: str) -> None:
        """Create a view, or give it this query; grants and triggers stay."""

    @abstractmethod
    def load(self, output: Output, number: int) -> int:
        """Insert the staged rows of an output into one of the topic's tables (`choose_table`),
        with this `_cf_output`. Have the table and its columns first (and `make_views`), unless
        that is done already.

        Returns:
            the table's number; 0 if the output has no columns and needs none.

        Raises:
            JobError: the rows cannot be read, or the database cannot hold them.
        """

    @abstractmethod
    def target(self, view: str) -> str:
        """`Output.target` of the view's outputs."""

    def view_of(self, output: Output) -> str:
        """The view that shows an output."""
        return output.topic

    def rows_table(self, view: str, number: int = 1) -> str:
        """The n-th table with a view's rows."""
        return rows_prefix(number) + view

    def null(self, kind: str) -> str:
        """A null of a declared type, for a view over tables that lack a column."""
        return "NULL"

    def drop(self, table: str) -> None:
        """Drop a table of rows."""
        self.send(f"DROP TABLE {self.table(table)}")

    def misfit(self, view: str, numbers: Sequence[int]) -> str:
        """Why the rows of these tables of a view cannot be shown together; empty if they can, as
        where each value has a type of its own."""
        return ""

    def is_name(self, view: str) -> bool:
        """Whether a view may have this name; too long ones are not created."""
        return True

    def scope(self, view: str) -> str:
        """A further condition on the outputs `o` that a view reads, such as that it reads no locked
        ones; it begins with AND."""
        return ""

    dirty_hint = ""
    """What follows the ledger's name where tables are looked up: no lock is waited for."""

    number_of_rows = "COUNT(*)"
    """Counts rows, however many."""

    # The ledger.

    _ledger: Collection[str] = ()
    """The ledger's columns, once it is there."""

    def has_ledger(self) -> bool:
        """Whether the schema has a ledger, of any release."""
        self._ledger = self._ledger or list(self.columns(LEDGER))
        return bool(self._ledger)

    def forget_ledger(self) -> None:
        """Look at the ledger again: it was exchanged."""
        self._ledger = ()

    def check_form(self) -> None:
        """Check that the ledger, if there is one, is in today's form.

        Raises:
            SinkUnavailable: an earlier release made it.
        """
        if self.is_earlier():
            raise SinkUnavailable(
                f"{self.place} was written by an earlier release; it is read, but not written",
                "casparian upgrade",
            )

    def is_earlier(self) -> bool:
        """Whether an earlier release made the ledger."""
        return self.has_ledger() and "id" not in self._ledger

    def record(self, key: str) -> Record | None:
        """What is recorded of an output."""
        if not self.has_ledger():
            return None
        found = self._select(RECORDED, f"WHERE {self.quote('output_key')} = ?", key)
        return found[0] if found else None

    def records(self, view: str = "") -> Iterator[Record]:
        """What is recorded of all outputs of a view, or of all; in the form of any release."""
        if not self.has_ledger():
            return
        names = [*self._ledger]
        column = next((name for name in ("view_name", "table_name") if name in names), "topic")
        pages: Iterable[list[Record]]
        if self.is_earlier():
            pages = [self._select(names)]
        else:
            ((last,),) = self.ask(f"SELECT MAX(id) FROM {self.table(LEDGER)}")  # noqa: S608
            pages = (
                self._select(names, "WHERE id > ? AND id <= ?", start, start + _PAGE)
                for start in range(0, last or 0, _PAGE)
            )
        for page in pages:
            page.sort(key=lambda record: record.get("id", 0))
            for record in page:
                if not view or self.fold(record[column]) == self.fold(view):
                    yield record

    def output(self, record: Record, location: str) -> Output:
        """A recorded output.

        Raises:
            ValueError, KeyError: it lacks facts.
        """
        if "id" in record and not record["facts"]:
            raise KeyError("facts")  # rows of another program, which `upgrade` found
        told = {name: str(value) for name, value in record.items() if value is not None}
        facts = {**told, **json.loads(record.get("facts") or "{}")}
        state = told.get("state", "shown")
        view = told.get("view_name") or told.get("table_name") or told["topic"]
        return output_of(
            location, {**facts, "mode": told.get("mode", "append")}, rows=int(record["rows"]),
            digest=record["digest"], target=self.target(view),
            state={"shown": State.CURRENT, "replaced": State.HIDDEN}.get(state) or State(state),
            shown_at=told.get("shown_at", ""), hidden_at=told.get("hidden_at", ""),
        )  # fmt: skip

    def add(self, output: Output) -> Record:
        """Record an output."""
        time = now()
        record = {
            "output_key": output.output_key, "topic": output.topic,
            "view_name": self.view_of(output), "mode": output.mode, "state": str(output.state),
            "rows": output.rows, "digest": output.digest, "published_at": time,
            "shown_at": time if output.visible else "", "hidden_at": "", "job_id": output.job_id,
            "file_version_id": output.version_id, "source_hash": output.content_hash,
            "plugin_version": output.plugin_version, "facts": json.dumps(facts_in(output)),
            "table_number": 1 if output.stage else 0,
        }  # fmt: skip
        return self.insert(record)

    def insert(self, record: Record) -> Record:
        """Insert a row into the ledger; returns it with its `id`."""
        names = ", ".join(map(self.quote, record))
        marks = ", ".join("?" * len(record))
        self.send(
            f"INSERT INTO {self.table(LEDGER)} ({names}) VALUES ({marks})",  # noqa: S608
            *record.values(),
        )
        (made,) = self._select(["id"], f"WHERE {self.quote('output_key')} = ?",
                               record["output_key"])  # fmt: skip
        return {**record, **made}

    def assign(self, record: Record, number: int) -> Record:
        """Record which table has an output's rows."""
        if record["table_number"] != number:
            statement = f"UPDATE {self.table(LEDGER)} SET table_number = ? WHERE id = ?"  # noqa: S608
            self.send(statement, number, record["id"])
        return {**record, "table_number": number}

    def mark(self, record: Record, output: Output) -> Record:
        """Give a recorded output the state and mode of `output`."""
        was, time = self._is_visible(record), now()
        changed = {**record, "state": str(output.state), "mode": output.mode}
        is_visible = self._is_visible(changed)
        if is_visible:
            changed |= {"shown_at": record["shown_at"] or time, "hidden_at": ""}
        elif was:
            changed["hidden_at"] = time
        if changed != record:
            names = ("state", "mode", "shown_at", "hidden_at")
            assigned = ", ".join(f"{self.quote(name)} = ?" for name in names)
            self.send(
                f"UPDATE {self.table(LEDGER)} SET {assigned} WHERE id = ?",  # noqa: S608
                *(changed[name] for name in names), record["id"],
            )  # fmt: skip
        return changed

    def as_published(self, output: Output, record: Record) -> Output:
        """An output as `Sink.publish` returns it."""
        return structs.replace(
            output, rows=int(record["rows"]), digest=record["digest"],
            target=self.target(record["view_name"]), shown_at=record["shown_at"],
            hidden_at=record["hidden_at"],
        )  # fmt: skip

    def delete(self, record: Record) -> None:
        """Delete an output's rows and its record, and a further table with its last output."""
        view, number = record["view_name"], record["table_number"]
        rows = self.rows_table(view, number)
        if number and self.has(rows):
            self.send(f"DELETE FROM {self.table(rows)} WHERE _cf_output = ?", record["id"])  # noqa: S608
        self.send(f"DELETE FROM {self.table(LEDGER)} WHERE id = ?", record["id"])  # noqa: S608
        if number > 1 and number not in self.tables(view) and self.has(self.rows_table(view)):
            self.make_views(view)
            self.drop(rows)
            crashpoint("sql.table_dropped")

    def _select(self, names: Sequence[str], where: str = "", *values: Any) -> list[Record]:
        listed = ", ".join(map(self.quote, names))
        query = f"SELECT {listed} FROM {self.table(LEDGER)} {where}"  # noqa: S608
        return [dict(zip(names, row, strict=True)) for row in self.ask(query, *values)]

    def _is_visible(self, record: Record) -> bool:
        state, mode = record["state"], record["mode"]
        return bool(state == State.CURRENT or (state == State.PAST and mode != "replace"))

    # Rows and views.

    def tables(self, view: str, apart_from: int = 0) -> list[int]:
        """The numbers of a view's tables that have outputs, from the first one on.

        Args:
            apart_from: `id` of an output that does not count.
        """
        query = (
            f"SELECT MIN(table_number) FROM {self.table(LEDGER)}{self.dirty_hint} "  # noqa: S608
            "WHERE view_name = ? AND table_number > ? AND id <> ?"
        )
        found: list[int] = []
        while self.has_ledger():
            ((number,),) = self.ask(query, view, found[-1] if found else 0, apart_from)
            if number is None:
                break
            found.append(number)
        return found

    def _standing(self, view: str, apart_from: int = 0) -> list[int]:
        """Those of its tables that have outputs that stand; if none has, the newest one."""
        query = (
            f"SELECT MIN(id) FROM {self.table(LEDGER)}{self.dirty_hint} WHERE view_name = ? "  # noqa: S608
            "AND table_number = ? AND state = ? AND id <> ?"
        )
        numbers = self.tables(view, apart_from)
        if len(numbers) < 2:
            return numbers or [1]
        return [
            number
            for number in numbers
            if any(self.ask(query, view, number, str(s), apart_from)[0][0] for s in _SEEN)
        ] or numbers[-1:]

    def choose_table(
        self, view: str, own: int, *, is_rebuilt: bool, is_alike: Callable[[int], bool],
        fits: Callable[[int], bool],
    ) -> int:  # fmt: skip
        """The number of the table for an output's rows.

        The newest table that takes them; none that is older than all tables that stand, or its
        types would come back. What is rebuilt leaves a table that stands unless the types are the
        same, and opens a new one if no table takes it; so does the first output of a topic that
        has no other.

        Args:
            own: `id` of the output; 0 if it is not recorded yet.
            is_rebuilt: whether the output's generation is above 0.
            is_alike: whether a table's types are exactly the output's.
            fits: whether a table takes the output's values.
        """
        numbers, standing = self.tables(view, own), self._standing(view, own)
        may_open = is_rebuilt or not numbers
        open_ones = [n for n in reversed(numbers or [1]) if n >= standing[0]]
        if not may_open and len(open_ones) == 1:
            return open_ones[0]
        for number in open_ones:
            takes = is_alike if is_rebuilt and number in standing else fits
            if not self.columns(self.rows_table(view, number)) or takes(number):
                return number
        return open_ones[0] + 1 if may_open else open_ones[0]

    def count(self, record: Record) -> int:
        """How many rows of an output there are."""
        rows = self.rows_table(record["view_name"], record["table_number"])
        if not self.has(rows):
            return 0
        query = f"SELECT {self.number_of_rows} FROM {self.table(rows)} WHERE _cf_output = ?"  # noqa: S608
        return int(self.ask(query, record["id"])[0][0])

    def check_whole(self, record: Record) -> None:
        """Check that an output has as many rows as were published.

        Raises:
            SinkConflict: it has not.
        """
        if record["rows"] and (count := self.count(record)) != record["rows"]:
            raise SinkConflict(
                f"{self.target(record['view_name'])} has {count} rows of job {record['job_id']} "
                f"instead of the {record['rows']} published; nothing was changed",
                f"casparian outputs restore {record['job_id']}",
            )

    def check_only_ours(self, view: str) -> None:
        """Check that a topic, for mode `error`, has no rows but those of recorded outputs.

        Raises:
            SinkConflict: it has.
        """
        theirs, ledger = 0, self.table(LEDGER)
        for name in (self.rows_table(view, number) for number in {1, *self.tables(view)}):
            if self.has(name):
                theirs += self.ask(
                    f"SELECT {self.number_of_rows} FROM {self.table(name)} AS r "  # noqa: S608
                    f"LEFT JOIN {ledger} AS o {_JOINED} WHERE o.id IS NULL OR o.facts = ''"
                )[0][0]
        if theirs:
            raise SinkConflict(
                f"{self.target(view)} has {theirs} rows that Casparian Flow did not write, and the "
                "topic's mode is error; it was left untouched",
                "move those rows elsewhere, or: casparian topics set ... --mode append",
            )

    def check_ours(self, view: str) -> None:
        """Check that a topic's name is free, or names our view.

        Raises:
            SinkConflict: another table or view has it.
        """
        if self.has(view) and not self._is_our_view(view):
            raise SinkConflict(
                f"table {view!r} of {self.place} was not made by Casparian Flow; it was left "
                "untouched",
                self.own_topic_hint,
            )

    def fit_views(self, view: str) -> None:
        """Let the views of a topic with several tables show those that stand now.

        Raises:
            SinkConflict: their rows cannot be shown together.
        """
        if self.tables(view) in ([], [1]):
            return
        standing = self._standing(view)
        if fault := self.misfit(view, standing):
            query = (
                f"SELECT job_id FROM {self.table(LEDGER)} WHERE view_name = ? "  # noqa: S608
                "AND table_number > 0 AND table_number < ? AND state IN ('current', 'past')"
            )
            found = sorted({job for (job,) in self.ask(query, view, standing[-1]) if job})
            jobs = ", ".join(map(str, found))
            raise SinkConflict(
                f"{self.target(view)} cannot show what was rebuilt beside the rows of jobs {jobs}, "
                f"which stay: {fault}; nothing was changed",
                "retract those versions, or keep their files so that they can be rebuilt as well",
            )
        self.make_views(view)

    def make_views(self, view: str) -> None:
        """Create the views of a topic, or give them the columns that its tables have now.

        Another topic's view, or another program's table, keeps its name.
        """
        standing = self._standing(view)
        for suffix, shown in VIEWS.items():
            name = view + suffix
            is_taken = self.has(self.rows_table(name)) or (
                self.has(name) and not self._is_our_view(name)
            )
            if not suffix or (self.is_name(name) and not is_taken):
                self.put_view(name, self._query(view, standing, shown))
                crashpoint("sql.view_made")

    def _query(self, view: str, numbers: Sequence[int], shown: str) -> str:
        """What a view selects from its tables, the newest first."""
        names = [self.rows_table(view, number) for number in reversed(numbers)]
        rest = f"JOIN {self.table(LEDGER)} AS o {_JOINED} WHERE {shown}{self.scope(view)}"
        tables = {self.table(name): self.columns(name) for name in names}
        return united(tables, rest, self.quote, self.fold, self.null)

    def _is_our_view(self, name: str) -> bool:
        return _JOINED in self.definition(name)

    # Comparison with what the ledger says.

    def _counts(self, table: str, by: str) -> dict[int, int]:
        """The values of a column -> how many rows have them."""
        if by not in self.columns(table):
            return {}
        counted = f"{by}, {self.number_of_rows}"
        query = f"SELECT {counted} FROM {self.table(table)} GROUP BY {by}"  # noqa: S608
        return dict(map(tuple, self.ask(query)))

    def faults(self, outputs: Sequence[Output]) -> list[str]:
        """What is wrong with outputs of one view: at most a sentence for each."""
        view = self.view_of(outputs[0])
        asked, known = {output.output_key for output in outputs}, dict[str, Record]()
        if is_earlier := self.is_earlier():  # rows name their job; only those shown are there
            counted, by = self._counts(view, "_cf_job_id"), "job_id"
        else:
            totals: Counter[int] = Counter()
            for number in {1, *self.tables(view)}:
                totals.update(self._counts(self.rows_table(view, number), "_cf_output"))
            counted, by = totals, "id"
        promised: Counter[int] = Counter()
        for each in self.records(view):
            if not is_earlier or each.get("state", "shown") == "shown":
                promised[each[by]] += each["rows"]
            if each["output_key"] in asked:
                known[each["output_key"]] = each
        text = self.definition(view)
        found = []
        for output in outputs:
            record = known.get(output.output_key, {})
            fault, number = _unlike(output, record), record.get(by, 0)
            if not fault and counted.get(number, 0) != promised[number]:
                fault = (
                    f"{counted.get(number, 0)} rows of job {record['job_id']} instead of the "
                    f"{promised[number]} published"
                )
            if not fault and output.visible and output.rows and not is_earlier:
                table = self.table(self.rows_table(view, record["table_number"]))
                if _JOINED not in text or f"FROM {table} AS r" not in text:
                    fault = f"the view {view!r} is gone, or another program's"
            found.append(fault)
        return list(filter(None, found))


def _unlike(output: Output, record: Record) -> str:
    """What a record does not have as the ledger has it."""
    if (record.get("rows"), record.get("digest")) != (output.rows, output.digest):
        return f"its table {LEDGER} does not list the output of job {output.job_id}"
    state, mode = record.get("state", "shown"), record.get("mode", "")
    expected = _SINCE.get(state, (state,))
    if output.state in expected and (state != State.PAST or mode == output.mode):
        return ""
    return (
        f"its table {LEDGER} has the output of job {output.job_id} as {state}, mode {mode}, "
        f"instead of {output.state}, mode {output.mode}"
    )
