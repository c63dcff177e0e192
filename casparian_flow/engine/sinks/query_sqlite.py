"""The rows of outputs in a SQLite sink, as streams for DuckDB.

The sink's record says which rows belong to the outputs that are asked for; then each scan of DuckDB
is one SELECT, whose rows go to DuckDB in Arrow batches and are never kept. The columns that a
question does not need are not read. ADBC's driver, which is C, reads the rows: Python's sqlite3
would make an object of every value, which takes ten times as long.

The driver has a SQLite of its own. Two copies of SQLite in one process must not have a database
open at the same time, because closing it in one would drop the other's file locks. So `find_rows`
closes the database before the first scan opens it, and nothing else opens it in between.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from casparian_flow.engine.sinks.base import LINEAGE
from casparian_flow.errors import CasparianError

BATCH_ROWS = 64 << 10
"""The most rows in a batch."""

BATCH_BYTES = 16 << 20
"""About the most bytes in a batch, by the average size of a row in the database."""

FEW = 4
"""An index is used if less than one in this many rows is asked for."""

BUSY_SECONDS = 5.0
"""How long to wait for another program's lock."""

FIRST = "_cf_rows_"
"""How the name of a topic's first table begins."""

KEY = "_cf_key"
"""A column that names the output of each row: in a Parquet sink by its file."""

NO_COLUMN = "_cf_none"
"""A column of nulls: the only one of a stream of which just the number of rows is asked for."""


class Kind(NamedTuple):
    """What the values of a column are."""

    arrow: Any
    sample: str
    """A value of the kind, in SQL. The driver gives a column the type of its first value."""


_KINDS = {
    "INTEGER": Kind(pa.int64(), "0"),
    "REAL": Kind(pa.float64(), "0.0"),
    "TEXT": Kind(pa.string(), "''"),
    "BLOB": Kind(pa.binary(), "x''"),
}


class Column(NamedTuple):
    """A column of a topic."""

    name: str
    kind: str
    """A key of `_KINDS`."""
    value: str
    """SQL for its value; `r` is the row, `o` the entry of its output in the record."""


class File(NamedTuple):
    """A database that is only read."""

    path: Path
    uri: str
    seen: tuple[int, ...]
    """The status of a file that cannot change and is read as such; else empty."""

    def check(self) -> None:
        """Check that a file which cannot change has not: what was read before may be wrong.

        Raises:
            sqlite3.OperationalError: it was changed, through another mount, say.
        """
        if self.seen and self.seen != _status(self.path):
            raise sqlite3.OperationalError(f"{self.path} was changed while it was read; ask again")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[File, sqlite3.Connection]]:
    """Open a database to read it.

    To read one with a WAL, SQLite makes files beside it. Where the filesystem is read-only it reads
    the file alone, if no WAL is there.

    Raises:
        CasparianError: SQLite would have to make files where it may not.
    """
    file = File(path, f"{path.as_uri()}?mode=ro", ())
    with contextlib.suppress(OSError):  # it is reported below
        is_fixed = os.statvfs(path).f_flag & os.ST_RDONLY
        if is_fixed and not any(os.path.exists(f"{path}{end}") for end in ("-wal", "-journal")):
            file = File(path, f"{file.uri}&immutable=1", _status(path))
    try:
        with contextlib.closing(
            sqlite3.connect(file.uri, uri=True, timeout=BUSY_SECONDS)
        ) as connection:
            yield file, connection
            file.check()
    except sqlite3.OperationalError as error:
        if path.exists() and not os.access(path.parent, os.W_OK) and _is_denied(error):
            raise CasparianError(
                f"{path} cannot be read: SQLite must make files beside it to read its WAL, and may "
                f"not write in {path.parent}",
                "give the user that runs casparian write permission there; or, where the file can "
                f"be written: sqlite3 {shlex.quote(str(path))} 'PRAGMA journal_mode = DELETE'",
            ) from error
        raise


def _status(path: Path) -> tuple[int, ...]:
    look = os.stat(path)
    return look.st_ino, look.st_size, look.st_mtime_ns, os.path.exists(f"{path}-wal")


def _is_denied(error: sqlite3.Error) -> bool:
    return error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)


@dataclass(frozen=True)
class Rows:
    """The rows of some outputs of a topic in one table."""

    file: File
    table: str
    columns: Sequence[Column]
    condition: str
    """SQL that selects the outputs' rows."""
    batch_rows: int
    keys: Mapping[str, str]
    """The output key for each value of the column `KEY`, if there is one."""

    def names(self) -> list[str]:
        """The names of the columns."""
        return [column.name for column in self.columns]

    def schema(self, names: Sequence[str]) -> Any:
        """The Arrow schema of a stream of these columns."""
        kinds = {column.name: _KINDS[column.kind].arrow for column in self.columns}
        return pa.schema([(name, kinds[name]) for name in names] or [(NO_COLUMN, pa.int8())])

    def select(self, names: Sequence[str], filters: Sequence[str] = ()) -> str:
        """The SELECT for some columns; without any, it counts the rows."""
        by_name = {column.name: column for column in self.columns}
        values = [by_name[name].value for name in names]
        source = f"{quote(self.table)} r"
        if any(used.startswith("o.") for used in (*values, *filters)):
            source += " CROSS JOIN _cf_outputs o ON o.id = r._cf_output"  # r is the outer loop
        rest = f" FROM {source} WHERE {' AND '.join((self.condition, *filters))}"
        if not names:
            return "SELECT count(*)" + rest
        samples = ", ".join(_KINDS[by_name[name].kind].sample for name in names)
        return f"SELECT {samples} UNION ALL SELECT {', '.join(values)}{rest}"


def find_rows(
    path: Path, topic: str, promised: Mapping[str, int], *, keyed: bool = False
) -> list[Rows]:
    """Find the rows of outputs in a SQLite sink, those of each of the topic's tables; if they have
    no rows, the newest table, for its columns; nothing if there is no table.

    They are found by output key, because an adopted output has the job id of an earlier ledger.

    Args:
        promised: output key -> how many rows the ledger says it has.
        keyed: whether the rows have the column `KEY`.

    Raises:
        CasparianError: the sink does not record an output that has rows.
        sqlite3.Error: the database is absent or damaged, or not a sink.
    """
    with _opened(path) as (file, connection):
        is_old = "table_number" not in _declared(connection, "_cf_outputs")  # of an earlier release
        owner, number = ("job_id", "1") if is_old else ("id", "table_number")
        recorded = connection.execute(
            f"SELECT output_key, {owner}, rows, {number} FROM _cf_outputs "  # noqa: S608
            "WHERE topic = ? COLLATE NOCASE AND rows > 0",
            [topic],
        ).fetchall()
        if lost := promised.keys() - {key for key, *_ in recorded}:
            raise unrecorded(path, topic, len(lost))
        by_table: dict[int, list[tuple[str, int, int]]] = defaultdict(list)
        for key, which, rows, table_number in recorded:
            by_table[table_number].append((key, which, rows))
        with_ours = sorted(n for n, of in by_table.items() if any(k in promised for k, *_ in of))
        found = []
        for table_number in with_ours or [max(by_table, default=1)]:
            table = topic if is_old else _rows_table(topic, table_number)
            kinds = _kinds(connection, table)
            of = by_table[table_number]
            ours = [(which, rows) for key, which, rows in of if key in promised]
            others = [(which, rows) for key, which, rows in of if key not in promised]
            if not kinds and ours:
                raise sqlite3.OperationalError(f"no such table: {table}")
            column = "r._cf_job_id" if is_old else "r._cf_output"
            columns, prefix = _columns(kinds, is_old), f"{file.uri} {table} "
            if keyed:
                columns.append(Column(KEY, "TEXT", f"{literal(prefix)} || {column}"))
            keys = {f"{prefix}{which}": key for key, which, _ in of if keyed}
            condition = _condition(column, ours, others)
            found += [
                Rows(file, table, columns, condition, _batch_rows(connection), keys)
            ] if kinds else []  # fmt: skip
        return found


def _rows_table(topic: str, number: int) -> str:
    """The same as `Schema.rows_table`."""
    return f"_cf_rows{number if number > 1 else ''}_{topic}"


def quote(name: str) -> str:
    """A name quoted for a statement of SQLite or DuckDB."""
    return '"' + name.replace('"', '""') + '"'


def literal(value: str) -> str:
    """A text in a statement of SQLite or DuckDB."""
    return "'" + value.replace("'", "''") + "'"


def _folded(name: str) -> str:
    """The same as `columns.fold`, whose module imports pyarrow.compute, which takes long."""
    return name.encode().lower().decode()


def _declared(connection: sqlite3.Connection, table: str) -> dict[str, str]:
    """Name -> declared type of a table's columns; empty if there is no such table."""
    return dict(connection.execute("SELECT name, type FROM pragma_table_info(?)", [table]))


def unrecorded(place: Path, topic: str, number: int) -> CasparianError:
    """The error to report for outputs that a sink does not record."""
    return CasparianError(
        f"{place} does not have {number} outputs of topic {topic!r} that the ledger lists",
        "casparian verify   (says which)",
    )


def _kinds(connection: sqlite3.Connection, table: str) -> dict[str, tuple[str, str]]:
    """Name -> declared and current type of a table's columns."""
    owner = _folded(table).removeprefix(FIRST)
    declared = _declared(connection, table)
    found = {name: (kind, kind) for name, kind in declared.items()}
    if _declared(connection, "_cf_columns"):
        by_name = {_folded(name): name for name in declared}
        for name, before, kind in connection.execute(
            "SELECT name, declared, type FROM _cf_columns WHERE topic = ?", [owner]
        ):
            if (mine := by_name.get(name)) and declared[mine] == before:
                found[mine] = (before, kind)
    return found


def _columns(kinds: Mapping[str, tuple[str, str]], is_old: bool) -> list[Column]:
    """The columns of a topic; the lineage columns are the last ones.

    Args:
        is_old: whether the lineage columns are read from the table, not from the record.
    """
    columns = []
    for name, (declared, kind) in kinds.items():
        value = f"r.{quote(name)}"
        if kind not in _KINDS:  # it may hold values of several types, so it is read as text
            columns.append(Column(name, "TEXT", f"CAST({value} AS TEXT)"))
        elif kind != declared and kind == "REAL":
            columns.append(Column(name, kind, f"CAST({value} AS REAL)"))
        else:
            columns.append(Column(name, kind, value))
    if is_old:
        return columns
    lineage = [
        Column(name, kind, f"o.{name.removeprefix('_cf_')}")
        for name, kind in zip(LINEAGE, ("INTEGER", "INTEGER", "TEXT", "TEXT"), strict=True)
    ]
    return [c for c in columns if c.name not in ("_cf_output", *LINEAGE)] + lineage


def _condition(
    column: str, ours: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]
) -> str:
    """SQL that selects the rows of outputs.

    Args:
        column: has an output's number in each row.
        ours: number and rows of the outputs that are asked for.
        others: the same for all others of the topic.
    """
    if not ours:
        return "0"
    numbers = sorted({int(number) for number, _ in ours})
    listed = f"(SELECT value FROM json_each('{json.dumps(numbers)}'))"  # noqa: S608
    wanted, rest = (sum(rows for _, rows in each) for each in (ours, others))
    if wanted + rest > wanted * FEW:
        return f"{column} IN {listed}"
    # The plus sign keeps SQLite from using an index: it would look up almost every row.
    spans = _spans(numbers, sorted({number for number, _ in others}))
    if len(spans) > 8:
        return f"+{column} IN {listed}"
    return "(" + " OR ".join(f"+{column} BETWEEN {a} AND {b}" for a, b in spans) + ")"


def _spans(numbers: Sequence[int], others: Sequence[int]) -> list[tuple[int, int]]:
    """The ranges that hold all numbers and none of the others."""
    spans: list[tuple[int, int]] = []
    apart = set(others)
    before = 0
    for number, is_ours in sorted([*((n, True) for n in numbers), *((n, False) for n in apart)]):
        if is_ours and before and spans:
            spans[-1] = (spans[-1][0], number)
        elif is_ours:
            spans.append((number, number))
        before = is_ours and number not in apart
    return spans


def _batch_rows(connection: sqlite3.Connection) -> int:
    """How many rows a batch may have."""
    (pages,), (size,) = (
        connection.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size")
    )
    (rows,) = connection.execute("SELECT total(rows) FROM _cf_outputs").fetchone()
    return max(64, min(BATCH_ROWS, int(BATCH_BYTES * max(rows, 1) / (pages * size or 1))))


@dataclass(frozen=True)
class Stream:
    """Some columns of rows, for DuckDB, which may scan them several times."""

    rows: Rows
    names: Sequence[str]
    filters: Sequence[str]
    """Conditions, in SQL, that every row which the question needs meets."""
    opened: list[_Scan] = field(default_factory=list)
    """The scans so far; `close` ends them."""

    def __arrow_c_schema__(self) -> Any:
        return self.rows.schema(self.names).__arrow_c_schema__()

    def __arrow_c_stream__(self, requested_schema: object = None) -> Any:
        schema = self.rows.schema(self.names)
        scan = _Scan(self._scan(schema))
        self.opened.append(scan)
        return pa.RecordBatchReader.from_batches(schema, scan).__arrow_c_stream__(requested_schema)

    def close(self) -> None:
        """End the scans that were not read to their ends."""
        for scan in self.opened:
            scan.close()

    def _scan(self, schema: Any) -> Generator[Any, None, None]:
        with _asked(self.rows, self.rows.select(self.names, self.filters)) as reader:
            if not self.names:
                count = reader.read_all().column(0)[0].as_py()
                self.rows.file.check()
                yield from _nulls(schema, count)
                return
            begin = 1  # the first row is the one of samples
            for batch in reader:
                self.rows.file.check()
                self._check(batch, schema)
                yield pa.RecordBatch.from_arrays(batch.slice(begin).columns, schema=schema)
                begin = 0

    def _check(self, batch: Any, schema: Any) -> None:
        for array, column in zip(batch.columns, schema, strict=True):
            if array.type != column.type:
                raise pa.ArrowInvalid(
                    f"column {column.name!r} of {self.rows.table} has values of another type"
                )
            if array.type == pa.string():
                array.validate(full=True)


class _Scan:
    """The batches of one scan. A thread of DuckDB may still read when the question is over: `close`
    waits for its batch, and it gets no other."""

    def __init__(self, batches: Generator[Any, None, None]) -> None:
        self._batches = batches
        self._reading = threading.Lock()
        self._over = False

    def __iter__(self) -> _Scan:
        return self

    def __next__(self) -> Any:
        with self._reading:
            if self._over:
                raise StopIteration
            return next(self._batches)

    def close(self) -> None:
        with self._reading:
            self._over = True
            self._batches.close()


@contextlib.contextmanager
def _asked(rows: Rows, query: str) -> Iterator[Any]:
    """The batches of a query, from a connection of its own."""
    import adbc_driver_manager as manager
    import adbc_driver_sqlite

    with (
        adbc_driver_sqlite.connect(rows.file.uri) as database,
        manager.AdbcConnection(database) as connection,
        manager.AdbcStatement(connection) as statement,
    ):
        statement.set_sql_query(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
        statement.execute_update()
        statement.set_options(**{"adbc.sqlite.query.batch_rows": str(rows.batch_rows)})
        statement.set_sql_query(query)
        stream, _ = statement.execute_query()
        with pa.RecordBatchReader.from_stream(stream) as reader:
            yield reader


def _nulls(schema: Any, count: int) -> Iterator[Any]:
    whole = pa.nulls(min(count, BATCH_ROWS), schema.field(0).type)
    for begin in range(0, count, BATCH_ROWS):
        part = whole.slice(0, min(BATCH_ROWS, count - begin))
        yield pa.RecordBatch.from_arrays([part], schema=schema)


# What a question needs of each table, according to DuckDB's plan for it. The plan is made over
# tables whose columns have unmistakable names, so that its text is searched for these names and
# nothing else has to be understood. Only the filters are parsed: a filter that is not understood is
# not passed on, and DuckDB applies every filter itself.


class Needs(NamedTuple):
    """What a question needs of a table."""

    columns: list[str]
    filters: list[str]


def planned_name(table: int, column: int) -> str:
    """The unmistakable name of a column."""
    return f"_cfq_{table}_{column}"


@dataclass(frozen=True)
class Blank:
    """A table of unmistakable columns, to be planned with and never scanned."""

    rows: Rows
    number: int

    def schema(self) -> Any:
        """The schema that DuckDB sees. The first column is the one read for `count(*)`."""
        kinds = (_KINDS[column.kind].arrow for column in self.rows.columns)
        named = [(planned_name(self.number, n), kind) for n, kind in enumerate(kinds)]
        return pa.schema([(NO_COLUMN, pa.int8()), *named])

    def __arrow_c_schema__(self) -> Any:
        return self.schema().__arrow_c_schema__()

    def __arrow_c_stream__(self, requested_schema: object = None) -> Any:
        reader = pa.RecordBatchReader.from_batches(self.schema(), [])
        return reader.__arrow_c_stream__(requested_schema)


def needs(plan: str, question: str, tables: Sequence[Rows]) -> list[Needs]:
    """What a question needs of each table.

    Args:
        plan: DuckDB's, as JSON.
        question: its SQL.
    """
    nodes = list(_nodes(json.loads(plan)))
    return [
        Needs(_columns_in(plan, number, rows), _filters_in(nodes, question, number, rows))
        for number, rows in enumerate(tables)
    ]


def _columns_in(plan: str, number: int, rows: Rows) -> list[str]:
    found = {int(column) for column in re.findall(rf"_cfq_{number}_(\d+)", plan)}
    return [column.name for n, column in enumerate(rows.columns) if n in found]


def _nodes(tree: Any) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Every node of a plan with the one above it. Not recursive: a plan may nest deeply."""
    waiting: list[tuple[Any, Any]] = [(node, None) for node in tree]
    while waiting:
        node, above = waiting.pop()
        yield node, above
        waiting.extend((below, node) for below in node.get("children", []))


def _filters_in(
    nodes: Sequence[tuple[dict[str, Any], dict[str, Any] | None]],
    question: str,
    number: int,
    rows: Rows,
) -> list[str]:
    """Conditions in SQL from the filter above a table's scan, if there is one scan."""
    scans = [
        above
        for node, above in nodes
        if "SCAN" in str(node.get("name")) and not node.get("children")
        and rf"_cfq_{number}_" in json.dumps(node)
    ]  # fmt: skip
    if len(scans) != 1 or scans[0] is None or scans[0].get("name") != "FILTER":
        return []
    told = scans[0].get("extra_info", {}).get("Expression", "")
    terms = [told] if isinstance(told, str) else [str(each) for each in told]
    filters = (
        _condition_of(term, question, number, rows.columns)
        for text in terms
        for term in conjuncts(text)
    )
    return [condition for condition in filters if condition]


def conjuncts(text: str) -> list[str]:
    """The terms of an expression that all must hold: `((a) AND ((b) AND (c)))` has three.

    A term is given without the parentheses around it.
    """
    found: list[str] = []
    waiting = [text]
    while waiting:
        term = _bare(waiting.pop())
        parts = _split(term)
        # `x BETWEEN y AND (z)` is one term: a part of it is not in parentheses.
        if len(parts) > 1 and all(_bare(part) != part for part in parts):
            waiting.extend(parts)
        else:
            found.append(term)
    return found


def _bare(text: str) -> str:
    """An expression without the parentheses around the whole of it."""
    while text.startswith("(") and text.endswith(")") and _split(text[1:-1]):
        text = text[1:-1]
    return text


def _split(text: str) -> list[str]:
    """Split an expression at each AND outside of parentheses and quotes.

    Returns:
        an empty list if its parentheses do not match.
    """
    depth = begin = 0
    parts: list[str] = []
    for token in re.finditer(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|[()]| AND ", text):
        depth += {"(": 1, ")": -1}.get(token[0], 0)
        if depth < 0:
            return []
        if token[0] == " AND " and depth == 0:
            parts.append(text[begin : token.start()])
            begin = token.end()
    return [*parts, text[begin:]] if depth == 0 else []


_COMPARISON = re.compile(
    r"_cfq_(?P<table>\d+)_(?P<column>\d+) (?P<sign>=|<|>|<=|>=) "
    r"(?:'(?P<text>[ -&(-~]*)'|(?P<number>-?\d{1,15}(?:\.\d{1,15})?))"
)
"""A comparison of a column with a constant that SQLite and DuckDB read alike."""

_BETWEEN = re.compile(r"(_cfq_\d+_\d+) BETWEEN (.*) AND (.*)")


def _condition_of(term: str, question: str, number: int, columns: Sequence[Column]) -> str:
    """The condition in SQL for a term of a filter; empty if there is none.

    The condition may hold for more rows than the term, never for fewer.
    """
    if between := _BETWEEN.fullmatch(term):
        name, low, high = between.groups()
        ends = (f"{name} >= {low}", f"{name} <= {high}")
        conditions = [_condition_of(end, question, number, columns) for end in ends]
        return " AND ".join(filter(None, conditions))
    found = _COMPARISON.fullmatch(term)
    if not found or int(found["table"]) != number:
        return ""
    column = columns[int(found["column"])]
    if column.value.startswith("CAST") or column.kind not in _CONDITIONS:
        return ""
    return _CONDITIONS[column.kind](column.value, found, question)


def _on_text(value: str, found: re.Match[str], question: str) -> str:
    text = found["text"]
    # A plan might show a long text shortened.
    if text is None or f"'{text}'" not in question:
        return ""
    return f"{value} {found['sign']} '{text}' COLLATE BINARY"


def _on_integer(value: str, found: re.Match[str], _question: str) -> str:
    number = found["number"]
    return f"{value} {found['sign']} {number}" if number and "." not in number else ""


def _on_real(value: str, found: re.Match[str], _question: str) -> str:
    """A wider range, as SQLite may read a decimal fraction as the double beside DuckDB's."""
    if found["number"] is None:
        return ""
    number = float(found["number"])
    low, high = number - abs(number) * 1e-9 - 1e-300, number + abs(number) * 1e-9 + 1e-300
    conditions = []
    if found["sign"] in ("=", ">", ">="):
        conditions.append(f"{value} >= {low!r}")
    if found["sign"] in ("=", "<", "<="):
        conditions.append(f"{value} <= {high!r}")
    return " AND ".join(conditions)


_CONDITIONS: dict[str, Callable[[str, re.Match[str], str], str]] = {
    "TEXT": _on_text,
    "INTEGER": _on_integer,
    "REAL": _on_real,
}
