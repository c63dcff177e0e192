"""The tables and views of a SQL database: rows never move, and a state says who sees them.

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
first one stays, with what other people made on it.

`Schema` has the statements, in the SQL that SQLite and SQL Server both have, with `?` for values.
`sqlite_tables.py` and `mssql_tables.py` supply where the two differ.
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine.sinks.base import LINEAGE, facts_in, output_of
from casparian_flow.errors import SinkConflict, SinkUnavailable
from casparian_flow.protocol import Output, State

LEDGER = "_cf_outputs"

ROWS = "_cf_rows_"
"""How the name of a topic's first table begins; see `Schema.rows_table`."""

_COLUMNS = {
    "id": "{serial} NOT NULL PRIMARY KEY",
    "output_key": "{key} NOT NULL UNIQUE",
    "topic": "{topic} NOT NULL",
    "view_name": "{name} NOT NULL",
    "mode": "{word} NOT NULL",
    "state": "{word} NOT NULL",
    "rows": "{number} NOT NULL",
    "digest": "{hash} NOT NULL",
    "published_at": "{time} NOT NULL",
    "shown_at": "{time} NOT NULL",
    "hidden_at": "{time} NOT NULL",
    "job_id": "{number} NULL",
    "file_version_id": "{number} NULL",
    "source_hash": "{hash} NULL",
    "plugin_version": "{label} NULL",
    "facts": "{text} NOT NULL",
    "table_number": "{number} NOT NULL",
}
"""The columns of the ledger; a dialect has the types. Times are ISO 8601 in UTC, empty for never.
The database gives `id`; `view_name` is the topic's view, which the location of a SQL Server sink
names; `facts` is empty for rows of other programs, which an upgrade found; `table_number` says
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

SEEN = (State.CURRENT, State.PAST)
"""States of outputs whose rows some view shows."""

EARLIER = {"shown": State.CURRENT, "replaced": State.HIDDEN, "retracted": State.RETRACTED}
"""What earlier releases wrote as the state, and what it is today."""

_SINCE = {"shown": (*SEEN, State.HIDDEN), "replaced": (State.PAST, State.HIDDEN)}
"""What earlier releases wrote -> the states that the ledger may have for the output."""

Record = dict[str, Any]
"""A row of the ledger, by column."""


def now() -> str:
    """The time as the ledger has it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


class Schema(ABC):
    """The ledger, tables and views of one schema, in an open transaction."""

    # What a dialect supplies.

    place: str
    """For messages: the database or schema."""
    own_topic_hint = "rename that table, or give the topic another sink"
    types: Mapping[str, str]
    """The types of the ledger's columns."""
    ledger_indexes: Sequence[str]
    """The statements that make the ledger's indexes; `{}` is the ledger."""
    number_of_rows = "COUNT(*)"
    """Counts rows, however many."""
    null = "NULL"
    """A null of a type, `{}`, for a view over tables that lack a column."""
    dirty_hint = ""
    """What follows the ledger's name where tables are looked up: no lock is waited for."""

    @abstractmethod
    def ask(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows that a statement returns."""

    @abstractmethod
    def send(self, sql: str, *values: Any) -> int:
        """Send a statement; returns how many rows it changed."""

    @abstractmethod
    def quote(self, name: str) -> str:
        """The name of a column, quoted."""

    @abstractmethod
    def table(self, name: str) -> str:
        """The name of a table or view of the schema, quoted and qualified."""

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

    @abstractmethod
    def index_outputs(self, table: str) -> None:
        """Create the index by which the rows of an output are counted and deleted."""

    def kinds(self, table: str) -> dict[str, str]:
        """Name, folded -> type of the columns of a table of rows; empty for one without a type."""
        return {self.fold(name): kind for name, kind in self.columns(table).items()}

    def view_of(self, output: Output) -> str:
        """The view that shows an output."""
        return output.topic

    def named(self, prefix: str, view: str) -> str:
        """The name of a table that belongs to a view."""
        return prefix + view

    def rows_table(self, view: str, number: int = 1) -> str:
        """The n-th table with a view's rows. No other topic's table has such a name, which
        `_cf_rows_<topic>_2` might be."""
        return self.named(ROWS if number == 1 else f"_cf_rows{number}_", view)

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
        """A further condition on the outputs `o` that a view reads; it begins with AND."""
        return ""

    # What it supplies for `sql_upgrade.upgrade`.

    @abstractmethod
    def hold(self) -> None:
        """Wait for others who make tables, until the end of the transaction."""

    @abstractmethod
    def rename(self, table: str, name: str) -> None:
        """Give a table another name; it keeps its indexes and triggers, and other people's views
        go on naming what they name."""

    @abstractmethod
    def set_apart(self, table: str) -> tuple[list[str], list[str]]:
        """Take from a table what minds that its rows are numbered.

        Returns:
            the statements to send afterwards, and sentences on what others should know.
        """

    @abstractmethod
    def number(self, table: str, lineage: Sequence[Any], output: int, most: int = 0) -> None:
        """Give rows of a lineage that have no `_cf_output` this one; at most so many, if not 0.

        Raises:
            SinkConflict: the table's columns do not allow to choose some.
        """

    @abstractmethod
    def compared(self, view: str) -> Iterator[Any]:
        """What readers of a view must see as before, in any order."""

    # The ledger.

    _ledger: Collection[str] = ()
    """The ledger's columns, once it is there."""

    def has_ledger(self) -> bool:
        """Whether the schema has a ledger, of any release."""
        self._ledger = self._ledger or list(self.columns(LEDGER))
        return bool(self._ledger)

    def create_ledger(self) -> None:
        """Create the sink's ledger and its indexes."""
        ledger = self.table(LEDGER)
        kinds = {name: kind.format_map(self.types) for name, kind in _COLUMNS.items()}
        described = ", ".join(f"{self.quote(name)} {kind}" for name, kind in kinds.items())
        self.send(f"CREATE TABLE {ledger} ({described})")
        for index in self.ledger_indexes:
            self.send(index.format(ledger))
        self._ledger = list(_COLUMNS)

    def widen(self, table: str, wanted: Sequence[Any]) -> None:
        """Create a table of rows, or add the columns that it lacks.

        Args:
            wanted: the dialect's columns, with `name` and `declared`.
        """
        existing = self.kinds(table)
        described = [
            f"{self.quote(column.name)} {column.declared} NULL"
            for column in wanted
            if self.fold(column.name) not in existing
        ]
        if existing:
            for column in described:
                self.send(f"ALTER TABLE {self.table(table)} ADD {column}")
        else:
            listed = ", ".join([f"_cf_output {self.types['number']} NOT NULL", *described])
            self.send(f"CREATE TABLE {self.table(table)} ({listed})")
            self.index_outputs(table)

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
        found = self._select(_COLUMNS, f"WHERE {self.quote('output_key')} = ?", key)
        return found[0] if found else None

    def records(self, view: str = "") -> Iterator[Record]:
        """What is recorded of all outputs of a view, or of all. Records of earlier releases are in
        today's form, without `id` and with their own word for the state."""
        if not self.has_ledger():
            return
        for record in self._earlier_records() if self.is_earlier() else self._all_records():
            if not view or self.fold(record["view_name"]) == self.fold(view):
                yield record

    def _all_records(self) -> Iterator[Record]:
        ((last,),) = self.ask(f"SELECT MAX(id) FROM {self.table(LEDGER)}")  # noqa: S608
        for start in range(0, last or 0, _PAGE):
            page = self._select(_COLUMNS, "WHERE id > ? AND id <= ?", start, start + _PAGE)
            yield from sorted(page, key=lambda record: record["id"])

    def _earlier_records(self) -> Iterator[Record]:
        for earlier in self._select(self._ledger):
            time = earlier["published_at"]
            with contextlib.suppress(ValueError):  # one whose facts are damaged is left out
                facts = {name: str(value) for name, value in earlier.items() if name != "facts"}
                facts |= json.loads(earlier.get("facts") or "{}")
                yield {
                    "output_key": earlier["output_key"], "topic": earlier["topic"],
                    "view_name": earlier.get("table_name") or earlier["topic"],
                    "mode": earlier.get("mode", "append"), "state": earlier.get("state", "shown"),
                    "rows": earlier["rows"], "digest": earlier["digest"],
                    "published_at": time if isinstance(time, str)
                    else time.replace(tzinfo=UTC).isoformat(timespec="microseconds"),
                    "shown_at": "", "hidden_at": "", "job_id": earlier["job_id"],
                    "file_version_id": earlier["file_version_id"],
                    "source_hash": facts.get("source_hash"),
                    "plugin_version": facts.get("plugin_version"), "facts": json.dumps(facts),
                    "table_number": 1 if earlier["rows"] else 0,
                }  # fmt: skip

    def output(self, record: Record, location: str) -> Output:
        """A recorded output.

        Raises:
            ValueError, KeyError: it lacks facts, as the records of other programs' rows do.
        """
        state = record["state"]
        return output_of(
            location, {**json.loads(record["facts"]), "mode": record["mode"]},
            rows=int(record["rows"]), digest=record["digest"],
            target=self.target(record["view_name"]), state=EARLIER.get(state) or State(state),
            shown_at=record["shown_at"], hidden_at=record["hidden_at"],
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
            "table_number": 0,
        }  # fmt: skip
        return self.insert(record)

    def insert(self, record: Record) -> Record:
        """Insert a row into the ledger; returns it with its `id`."""
        # SQL Server's driver would ask the server for the type of a NULL.
        told = {name: value for name, value in record.items() if value is not None}
        names, marks = ", ".join(map(self.quote, told)), ", ".join("?" * len(told))
        insert = f"INSERT INTO {self.table(LEDGER)} ({names}) VALUES ({marks})"  # noqa: S608
        self.send(insert, *told.values())
        where = f"WHERE {self.quote('output_key')} = ?"
        (made,) = self._select(["id"], where, record["output_key"])
        return {**record, **made}

    def assign(self, record: Record, number: int) -> Record:
        """Record which table has an output's rows."""
        if number:
            statement = f"UPDATE {self.table(LEDGER)} SET table_number = ? WHERE id = ?"  # noqa: S608
            self.send(statement, number, record["id"])
        return {**record, "table_number": number}

    def mark(self, record: Record, output: Output) -> Record:
        """Give a recorded output the state and mode of `output`."""
        shown_at, hidden_at, time = record["shown_at"], record["hidden_at"], now()
        if output.visible:
            shown_at, hidden_at = shown_at or time, ""
        elif shown_at and not hidden_at:
            hidden_at = time
        told = {"state": str(output.state), "mode": output.mode}
        changed = {**record, **told, "shown_at": shown_at, "hidden_at": hidden_at}
        if changed != record:
            names = ("state", "mode", "shown_at", "hidden_at")
            assigned = ", ".join(f"{self.quote(name)} = ?" for name in names)
            self.send(
                f"UPDATE {self.table(LEDGER)} SET {assigned} WHERE id = ?",  # noqa: S608
                *(changed[name] for name in names), record["id"],
            )  # fmt: skip
        return changed

    def delete(self, record: Record) -> None:
        """Delete an output's rows and its record, and a further table with its last output."""
        view, number = record["view_name"], record["table_number"]
        rows = self.rows_table(view, number)
        if number and self.has(rows):
            self.send(f"DELETE FROM {self.table(rows)} WHERE _cf_output = ?", record["id"])  # noqa: S608
        self.send(f"DELETE FROM {self.table(LEDGER)} WHERE id = ?", record["id"])  # noqa: S608
        if number > 1 and number not in self.tables(view)[0] and self.has(self.rows_table(view)):
            self.make_views(view)
            self.drop(rows)
            crashpoint("sql.table_dropped")

    def _select(self, names: Collection[str], where: str = "", *values: Any) -> list[Record]:
        listed = ", ".join(map(self.quote, names))
        query = f"SELECT {listed} FROM {self.table(LEDGER)} {where}"  # noqa: S608
        return [dict(zip(names, row, strict=True)) for row in self.ask(query, *values)]

    # Rows and views.

    def tables(self, view: str) -> tuple[list[int], list[int]]:
        """The numbers of a view's tables that have outputs, from the first one on; and of those
        that have outputs that stand, or if none has, of the newest one."""
        if not self.has_ledger():
            return [], [1]
        ledger = f"{self.table(LEDGER)}{self.dirty_hint} WHERE view_name = ?"
        after = f"SELECT MIN(table_number) FROM {ledger} AND table_number > ?"  # noqa: S608
        stands = f"SELECT MIN(id) FROM {ledger} AND table_number = ? AND state = ?"  # noqa: S608
        numbers: list[int] = []
        ((number,),) = self.ask(after, view, 0)
        while number is not None:
            numbers.append(number)
            ((number,),) = self.ask(after, view, number)
        if len(numbers) < 2:
            return numbers, numbers or [1]
        standing = [
            number
            for number in numbers
            if any(self.ask(stands, view, number, str(state))[0][0] for state in SEEN)
        ]
        return numbers, standing or numbers[-1:]

    def choose_table(
        self, output: Output, columns: Sequence[Any], fits: Callable[[str], bool]
    ) -> int:
        """The number of the table for an output's rows.

        The newest table that takes them; none that is older than all tables that stand, or its
        types would come back. What is rebuilt leaves a table that stands unless the types are the
        same, and opens a new one if no table takes it; so does the first output of a topic that
        has no other.

        Args:
            columns: its columns, with `name` and `declared`.
            fits: whether a table takes its values.
        """
        view, is_rebuilt = self.view_of(output), output.generation > 0
        numbers, standing = self.tables(view)
        may_open = is_rebuilt or not numbers
        open_ones = [n for n in reversed(numbers or [1]) if n >= standing[0]]
        if not may_open and len(open_ones) == 1:
            return open_ones[0]
        for number in open_ones:
            table = self.rows_table(view, number)
            kinds = self.kinds(table)
            is_alike = all(
                kinds.get(self.fold(column.name)) in (None, "", column.declared)
                for column in columns
                if column.declared
            )
            must_be_alike = is_rebuilt and number in standing
            takes = is_alike if must_be_alike else not kinds or fits(table)
            if takes:
                return number
        return open_ones[0] + 1 if may_open else open_ones[0]

    def check_whole(self, record: Record) -> None:
        """Check that an output has as many rows as were published.

        Raises:
            SinkConflict: it has not.
        """
        view, count = record["view_name"], 0
        rows = self.rows_table(view, record["table_number"])
        if record["rows"] and self.has(rows):
            query = f"SELECT {self.number_of_rows} FROM {self.table(rows)} WHERE _cf_output = ?"  # noqa: S608
            ((count,),) = self.ask(query, record["id"])
        if count != record["rows"]:
            raise SinkConflict(
                f"{self.target(view)} has {count} rows of job {record['job_id']} instead of the "
                f"{record['rows']} published; nothing was changed",
                f"casparian outputs restore {record['job_id']}",
            )

    def check_only_ours(self, view: str) -> None:
        """Check that a topic, for mode `error`, has no rows but those of recorded outputs.

        Raises:
            SinkConflict: it has.
        """
        theirs, ledger = 0, self.table(LEDGER)
        for name in (self.rows_table(view, number) for number in {1, *self.tables(view)[0]}):
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
        numbers, standing = self.tables(view)
        if numbers in ([], [1]):
            return
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
        _, standing = self.tables(view)
        for suffix, shown in VIEWS.items():
            name = view + suffix
            is_taken = self.has(self.rows_table(name)) or (
                self.has(name) and not self._is_our_view(name)
            )
            if not suffix or (self.is_name(name) and not is_taken):
                self.put_view(name, self._query(view, standing, shown))
                crashpoint("sql.view_made")

    def _query(self, view: str, numbers: Sequence[int], shown: str) -> str:
        """What a view selects from its tables, whose columns are united by name: those of the
        newest come first. A table of an earlier release has the lineage columns too, and they keep
        their place."""
        tables = [self.rows_table(view, number) for number in reversed(numbers)]
        columns = [self.columns(table) for table in tables]
        united: dict[str, tuple[str, str]] = {}
        for name, kind in (pair for each in columns for pair in each.items()):
            united.setdefault(self.fold(name), (name, kind))
        del united["_cf_output"]
        queries = []
        for table, each in zip(tables, columns, strict=True):
            own = {self.fold(name): f"r.{self.quote(name)}" for name in each}
            chosen = {
                folded: f"{own.get(folded) or self.null.format(kind)} AS {self.quote(name)}"
                for folded, (name, kind) in united.items()
            }
            for name in LINEAGE:
                chosen[name] = f"o.{self.quote(name.removeprefix('_cf_'))} AS {self.quote(name)}"
            queries.append(
                f"SELECT {', '.join(chosen.values())} FROM {self.table(table)} AS r "  # noqa: S608
                f"JOIN {self.table(LEDGER)} AS o {_JOINED} WHERE {shown}{self.scope(view)}"
            )
        return " UNION ALL ".join(queries)

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
            for number in {1, *self.tables(view)[0]}:
                totals.update(self._counts(self.rows_table(view, number), "_cf_output"))
            counted, by = totals, "id"
        promised: Counter[int] = Counter()
        for each in self.records(view):
            if not is_earlier or each["state"] == "shown":
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
    state, mode = record["state"], record["mode"]
    expected = _SINCE.get(state, (state,))
    if output.state in expected and (state != State.PAST or mode == output.mode):
        return ""
    return (
        f"its table {LEDGER} has the output of job {output.job_id} as {state}, mode {mode}, "
        f"instead of {output.state}, mode {output.mode}"
    )
