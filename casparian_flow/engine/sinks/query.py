"""Run one read-only SQL query over committed outputs, in DuckDB.

A topic is a view over its Parquet files and over streams of its rows in SQLite sinks
(`query_sqlite.py`). Nothing is copied, and only the topics that the query names are opened. The
query is checked to be read-only (`reading`), and the connection itself can open no files but those
of these topics' folders.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
import re
import sqlite3
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from casparian_flow.engine.sinks import PREFIXES, SERVER, parquet_record, path_of
from casparian_flow.engine.sinks.base import LINEAGE
from casparian_flow.engine.sinks.query_sqlite import (
    KEY,
    Blank,
    Needs,
    Rows,
    Stream,
    find_rows,
    literal,
    needs,
    planned_name,
    quote,
    unrecorded,
)
from casparian_flow.errors import CasparianError, NotFound

HISTORY = "_history"

PATH = "_cf_path"
"""A column of a query that names it: the file of each row, as `SOURCE/path`."""

MEMORY = "256MiB"
"""What DuckDB may use before it writes to disk. A query that it cannot answer so is run again with
DuckDB's own limit, which is most of the machine's memory."""

COLUMNS_FILE = "_common_metadata"
"""The file with a topic's columns in a Parquet sink: opening it takes the place of opening every
file of the topic, as DuckDB otherwise would to unite their columns."""

Output = Mapping[str, Any]
"""A committed output; its keys are topic, location, target, output_key, rows and latest."""

_LINEAGE_TYPES = dict(zip(LINEAGE, ("BIGINT", "BIGINT", "VARCHAR", "VARCHAR"), strict=True))
_TYPES = {
    pa.int8(): "TINYINT", pa.int64(): "BIGINT", pa.float64(): "DOUBLE", pa.string(): "VARCHAR",
    pa.binary(): "BLOB",
}  # fmt: skip
"""DuckDB's names of the types in a stream."""


@contextlib.contextmanager
def answer(
    question: str,
    outputs: Sequence[Output],
    paths: Mapping[str, str] | None = None,
) -> Iterator[Any]:
    """Run one SELECT. Yields its rows as a pyarrow RecordBatchReader, valid inside the block.

    Each topic is a table with the rows of the latest version of each file; `<topic>_history` has
    the rows of all versions.

    Args:
        paths: the file of each output, by output key; None if the query does not ask for them.

    Raises:
        NotFound: the query names a table that does not exist; the message lists the topics.
        CasparianError: DuckDB is not installed, or the query is wrong or not read-only.
    """
    try:
        import adbc_driver_sqlite  # noqa: F401  - reads SQLite sinks
        import duckdb
    except ImportError as error:
        raise CasparianError(
            f"queries need the package {error.name}, which is not installed",
            "pip install 'casparian-flow[query]'",
        ) from error
    with _in_words(duckdb, outputs), contextlib.ExitStack() as stack:
        try:
            reader = stack.enter_context(_answered(duckdb, question, outputs, paths, MEMORY))
        except duckdb.OutOfMemoryException:
            reader = stack.enter_context(_answered(duckdb, question, outputs, paths, ""))
        yield reader


@contextlib.contextmanager
def _answered(
    duckdb: Any, question: str, outputs: Sequence[Output], paths: Mapping[str, str] | None,
    memory: str,
) -> Iterator[Any]:  # fmt: skip
    """As `answer`, with DuckDB's errors.

    Args:
        memory: the limit; empty for DuckDB's own.
    """
    with tempfile.TemporaryDirectory(prefix="casparian-query-") as scratch:
        settings = {
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "python_enable_replacements": "false",
            "temp_directory": scratch,
            **({"memory_limit": memory} if memory else {}),
        }
        with contextlib.ExitStack() as after, duckdb.connect(config=settings) as database:
            asked = reading(duckdb, database, question)
            database.execute("SET TimeZone = 'UTC'")
            tables = _define(database, question, outputs, paths)
            for stream in _create_views(duckdb, database, asked, tables):
                after.callback(stream.close)  # once DuckDB has stopped its threads
            _lock(database, {folder for table in tables for folder in table.folders})
            yield _begun(pa.RecordBatchReader.from_stream(database.sql(asked)))


def _begun(reader: Any) -> Any:
    """A reader whose first batch is there, with whatever DuckDB collects before it."""
    first = list(itertools.islice(reader, 1))
    return pa.RecordBatchReader.from_batches(reader.schema, itertools.chain(first, reader))


@contextlib.contextmanager
def _in_words(duckdb: Any, outputs: Sequence[Output]) -> Iterator[None]:
    """Turn the errors of the libraries into ones for people."""
    try:
        yield
    except duckdb.CatalogException as error:
        known = ", ".join(sorted({o["topic"] for o in outputs})) or "none yet"
        raise NotFound(
            f"{_first_line(error)}; topics with output: {known}",
            'casparian topics   (write a name that has - or . as "my-topic")',
        ) from error
    except duckdb.PermissionException as error:
        raise CasparianError(
            f"the query failed: {_first_line(error)}",
            "a query can read the topics that it names, but no other files",
        ) from error
    except duckdb.ParserException as error:
        raise CasparianError(
            f"the query failed: {_first_line(error)}",
            'fix the SQL; a name that has - or . or is a word of SQL is written in quotes: "order"',
        ) from error
    except BrokenPipeError:  # raised by the caller's printing in the block
        raise
    except duckdb.OutOfMemoryException as error:
        raise CasparianError(
            f"the query failed: {_first_line(error)}",
            "ask for fewer rows or columns at once",
        ) from error
    except (duckdb.Error, pa.ArrowException, sqlite3.Error, OSError) as error:
        raise CasparianError(
            f"the query failed: {_first_line(error)}",
            "fix the SQL, or: casparian verify   (shows whether outputs are damaged)",
        ) from error


class _Part(NamedTuple):
    """Some rows of a table."""

    select: str
    columns: Mapping[str, str]
    """Name -> DuckDB type."""


@dataclass
class _Table:
    """A table that a query may name."""

    name: str
    shown: bool
    """Whether it has rows."""
    paths: dict[str, str] | None = None
    """The file of the rows with a key (`KEY`), if the query asks."""
    parts: list[_Part] = field(default_factory=list)
    """What its files have."""
    stored: list[Rows] = field(default_factory=list)
    """Its rows in SQLite sinks."""
    folders: set[str] = field(default_factory=set)
    """The folders of its files."""

    def view(self, streams: Sequence[str]) -> str:
        """The SELECT that unites the columns by name.

        Args:
            streams: the SELECTs from `stored`.
        """
        stored = zip(streams, map(_types_of, self.stored), strict=True)
        parts = [*self.parts, *(_Part(*each) for each in stored)] or [_empty(_LINEAGE_TYPES)]
        parts += [] if self.paths is None else [_empty({KEY: "VARCHAR"})]
        united = " UNION ALL BY NAME ".join(f"({part})" for part in _alike(self.name, parts))
        united = f"SELECT * FROM ({united})"  # noqa: S608
        if self.paths is not None:
            united = (
                f"SELECT r.* EXCLUDE ({KEY}), f.path AS {PATH} FROM ({united}) r "  # noqa: S608
                f"LEFT JOIN {quote(self.paths_name)} f ON f.key = r.{KEY}"
            )
        return united + ("" if self.shown else " LIMIT 0")

    @property
    def paths_name(self) -> str:
        """What `paths` are registered as."""
        return f"files of {self.name}"


def _types_of(rows: Rows) -> dict[str, str]:
    return {column.name: _TYPES[column.type] for column in rows.schema(rows.names())}


def _tables(outputs: Sequence[Output]) -> dict[str, tuple[list[Output], bool]]:
    """Lower-case table name -> the outputs that define its columns, and whether it has their rows.

    A topic whose latest versions have no outputs gets the columns of its history and no rows. A
    topic with the name of another topic's history hides that history.
    """
    history: dict[str, list[Output]] = defaultdict(list)
    for output in outputs:
        history[output["topic"].lower()].append(output)
    latest = {name: [o for o in group if o["latest"]] for name, group in history.items()}
    return {
        **{name + HISTORY: (group, True) for name, group in history.items()},
        **{name: (group or history[name], bool(group)) for name, group in latest.items()},
    }


def _define(
    database: Any, question: str, outputs: Sequence[Output], paths: Mapping[str, str] | None
) -> list[_Table]:
    """Find what the tables consist of that the query may use.

    If the query asks for the catalog, the tables that it does not name have no rows.
    """
    found = []
    for lowered, (wanted, shown) in _tables(outputs).items():
        topic = wanted[0]["topic"]
        name = topic if topic.lower() == lowered else topic + HISTORY
        if asks_for_names(question):
            found.append(_Table(name, False, parts=[_empty({"unopened": _NULL})]))
        elif _names(question, name):
            found.append(_opened(database, name, wanted, shown, paths))
        elif asks_catalog(question) and not any(map(_on_server, wanted)):
            found.append(_opened(database, name, wanted, False, paths))
    return found


def _lock(database: Any, folders: set[str]) -> None:
    """Restrict the connection to these folders, and forbid further changes of its settings."""
    paths = (path for folder in folders for path in (folder, glob.escape(folder)))
    allowed = ", ".join(map(literal, paths))
    database.execute(f"SET allowed_directories = [{allowed}]")
    database.execute("SET enable_external_access = false")
    database.execute("SET lock_configuration = true")


def _on_server(output: Output) -> bool:
    return bool(output["location"].startswith(SERVER))


def _names(question: str, table: str) -> bool:
    """Whether the query may name the table. A false positive is harmless."""
    return re.search(rf"(?<!\w){re.escape(table)}(?!\w)", question, re.IGNORECASE) is not None


def _opened(
    database: Any, name: str, outputs: Sequence[Output], shown: bool,
    paths: Mapping[str, str] | None,
) -> _Table:  # fmt: skip
    """Look up the columns of a topic and where its rows are."""
    table = _Table(name, shown, None if paths is None else {})
    by_place: dict[tuple[str, str], list[Output]] = defaultdict(list)
    for output in outputs:
        by_place[output["location"], output["topic"]].append(output)
        if _on_server(output):
            raise CasparianError(
                f"topic {output['topic']!r} is in SQL Server, which `casparian query` does not "
                "read",
                f"query the server itself, table {output['target'].removeprefix(SERVER)}",
            )
    for (location, topic), group in by_place.items():
        with_rows = [output for output in group if output["rows"]]
        keys: dict[str, str] = {}
        if location.startswith(PREFIXES["parquet"]):
            root = path_of(location)
            keys = _targets(root, topic, with_rows)
            table.parts += _files(database, table, root, topic, list(keys))
            table.folders |= {str(Path(target).parent) for target in keys}
        else:
            promised = {output["output_key"]: output["rows"] for output in with_rows}
            for rows in find_rows(path_of(location), topic, promised, keyed=paths is not None):
                table.stored += [rows] if shown else []
                table.parts += [] if shown else [_empty(_types_of(rows))]
                keys |= rows.keys
        if paths is not None and table.paths is not None:
            table.paths |= {key: paths.get(output, "") for key, output in keys.items()}
    return table


def _targets(root: Path, topic: str, outputs: Sequence[Output]) -> dict[str, str]:
    """The files, or folders of parts, of outputs in a Parquet sink, with their output keys.

    The sink's record says where they are: a file gets another name when what it shows changes, and
    its name may then be that of another output. A sink of an earlier release has no record.

    Raises:
        CasparianError: the record does not have one of them, or it cannot be read.
    """
    with parquet_record.opened(root, write=False) as record:
        if not record:
            return {output["target"]: output["output_key"] for output in outputs}
        places = record.places(topic)
    if lost := [o for o in outputs if o["output_key"] not in places]:
        raise unrecorded(root, topic, len(lost))
    keys = [output["output_key"] for output in outputs]
    return {str(root / _on_disk(root, *places[key])): key for key in keys}


def _on_disk(root: Path, path: str, source: str) -> str:
    """Where a file is. If a move was interrupted it has one of two names; one that readers see may
    be another output's."""
    if not source:
        return path
    names = sorted((source, path), key=parquet_record.is_visible)
    return next((name for name in names if os.path.lexists(root / name)), path)


def _files(
    database: Any, table: _Table, root: Path, topic: str, targets: Sequence[str]
) -> list[_Part]:
    """What the files of a topic in a Parquet sink have; nothing if there is nothing to tell.

    All files in the topic's folder can be read with its `_common_metadata`. One that is not visible
    there may have other types: a rebuilt one that the folder cannot show, or one that a rebuild has
    left behind.

    Args:
        root: the sink's folder.
        targets: the files, or folders of parts.
    """
    common = root / topic / COLUMNS_FILE
    columns = _schemas(database, [str(common)])[str(common)] if os.path.exists(common) else {}
    if columns and not (targets and table.shown):
        return [_empty(columns)]
    kept = [target for target in targets if target.startswith(f"{root / parquet_record.KEPT}/")]
    own = _schemas(database, list(map(_first, kept))) if kept else {}
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {tuple(columns.items()): []}
    for target in targets:
        types = own.get(_first(target), columns)
        is_common = types.items() <= columns.items()
        groups.setdefault(tuple((columns if is_common else types).items()), []).append(target)
    return [
        _read(database, table, f"{table.name} in {root}, {number}", of, dict(types))
        for number, (types, of) in enumerate(groups.items())
        if of
    ]


def _read(
    database: Any, table: _Table, listed: str, targets: Sequence[str], columns: Mapping[str, str]
) -> _Part:
    """What files have.

    Args:
        listed: a name for the list of files.
        columns: name -> type; empty if they are to be found out.
    """
    # Not in the text of the view, which DuckDB parses each time the view is used.
    database.execute(f"SET VARIABLE {quote(listed)} = ?", [list(map(_pattern, targets))])
    types = ", ".join(
        f"{literal(name)}: {{name: {literal(name)}, type: {literal(kind)}, default_value: NULL}}"
        for name, kind in columns.items()
    )
    # DuckDB takes names that differ only in case for one, and renames the second in each file.
    is_plain = len({name.casefold() for name in columns}) == len(columns) > 0
    how = f"schema = MAP {{{types}}}" if is_plain else "union_by_name = true"
    files = f"getvariable({literal(listed)})"
    source = f"read_parquet({files}, {how}, hive_partitioning = false"
    if not is_plain:
        described = f"DESCRIBE SELECT * FROM {source})"  # noqa: S608
        told = database.execute(described).fetchall()
        columns = {row[0]: row[1] for row in told}
    if table.paths is None:
        return _Part(f"SELECT * FROM {source})", columns)  # noqa: S608
    key = rf"regexp_replace({KEY}, '/part-[0-9]+\.parquet$', '')"
    select = f"SELECT * REPLACE ({key} AS {KEY}) FROM {source}, filename = '{KEY}')"  # noqa: S608
    return _Part(select, columns)


def _schemas(database: Any, files: Sequence[str]) -> dict[str, dict[str, str]]:
    """File -> name -> DuckDB type of its columns."""
    query = "SELECT file_name, name, coalesce(num_children, 0), duckdb_type FROM parquet_schema(?)"
    rows = database.execute(query, [[*map(glob.escape, files)]]).fetchall()
    found: dict[str, dict[str, str]] = {}
    inside = 0
    """How many of the next rows describe the inside of a column."""
    for file, name, children, kind in rows:
        if file not in found:  # the first row of a file is its root
            found[file], inside = {}, 0
        elif inside:
            inside += children - 1
        else:
            found[file][name], inside = kind, children
    return found


def _first(target: str) -> str:
    """The first file of an output."""
    return target if target.endswith(".parquet") else f"{target}/part-00000.parquet"


def _pattern(target: str) -> str:
    """A glob for the files of an output; a large output is a folder of parts."""
    return glob.escape(target) + ("" if target.endswith(".parquet") else "/*.parquet")


def _empty(columns: Mapping[str, str]) -> _Part:
    """Columns without rows.

    Args:
        columns: name -> type.
    """
    nulls = ", ".join(f"NULL::{kind} AS {quote(name)}" for name, kind in columns.items())
    return _Part(f"SELECT {nulls} WHERE false", columns)


# What one table unites may have a column in several types: DuckDB would cast some to the type of
# others, also where values change. So those that do not fit each other exactly are cast here.

_WHOLE = {"TINYINT": 3, "SMALLINT": 5, "INTEGER": 10, "BIGINT": 19, "HUGEINT": 39,
          "UTINYINT": 3, "USMALLINT": 5, "UINTEGER": 10, "UBIGINT": 20, "BOOLEAN": 1}  # fmt: skip
"""Types of whole numbers -> how many digits they may have. SQLite has booleans as numbers."""
_FLOATING = {"FLOAT", "DOUBLE"}
_DECIMAL = re.compile(r"DECIMAL\((\d+),(\d+)\)")
_NULL = '"NULL"'


def _alike(table: str, parts: Sequence[_Part]) -> list[str]:
    """The SELECTs of parts, cast where a column has several types."""
    kinds: dict[str, set[str]] = defaultdict(set)
    for part in parts:
        for name, kind in part.columns.items():
            kinds[name.casefold()].add(kind)
    targets = {name: _common(of) for name, of in kinds.items()}
    selects = []
    for part in parts:
        casts = {
            name: _cast(table, name, kind, targets[name.casefold()], kinds[name.casefold()])
            for name, kind in part.columns.items()
            if targets[name.casefold()] not in ("", kind)
        }
        listed = ", ".join(f"{cast} AS {quote(name)}" for name, cast in casts.items())
        replaced = f"SELECT * REPLACE ({listed}) FROM ({part.select})"  # noqa: S608
        selects.append(replaced if casts else part.select)
    return selects


def _common(kinds: set[str]) -> str:
    """The type that all values of these types are to be cast to; empty if DuckDB unites them
    exactly."""
    kinds = kinds - {_NULL}
    if len(kinds) < 2 or kinds <= _WHOLE.keys() or kinds <= _FLOATING:
        return ""
    if kinds <= (_WHOLE.keys() | _FLOATING) - {"BOOLEAN"}:
        return "DOUBLE"
    decimals = [_DECIMAL.fullmatch(kind) for kind in kinds - _WHOLE.keys()]
    if all(decimals) and "BOOLEAN" not in kinds:
        sizes = [(int(found[1]), int(found[2])) for found in decimals if found]
        sizes += [(_WHOLE[kind], 0) for kind in kinds & _WHOLE.keys()]
        if max(width - scale for width, scale in sizes) + max(s for _, s in sizes) <= 38:
            return ""
    return _NULL if "BLOB" in kinds else "VARCHAR"


def _cast(table: str, name: str, kind: str, target: str, kinds: set[str]) -> str:
    """A column's values as another type, exactly; an error for who asks for one that cannot be."""
    told = f"column {name} of {table} is {' and '.join(sorted(kinds))} in different outputs"
    column = quote(name)
    if target == _NULL:
        return f"error({literal(f'{told}, which cannot be shown together: casparian rebuild')})"
    if target == "DOUBLE" and kind in _WHOLE:
        fault = f"error({literal(f'{told}, and no DOUBLE is exactly ')} || {column})"
        exact = f"{column} IS NULL OR TRY_CAST({column}::DOUBLE AS {kind}) = {column}"
        return f"CASE WHEN {exact} THEN {column}::DOUBLE ELSE {fault} END"
    if kind.endswith("]") or kind.startswith(("STRUCT", "MAP")):
        return f"to_json({column})::VARCHAR"
    return f"{column}::{target}"


def _create_views(duckdb: Any, database: Any, asked: str, tables: Sequence[_Table]) -> list[Stream]:
    """Create the tables as views, with streams of the columns that the query needs.

    DuckDB plans the query twice: first over tables without rows, which shows what it needs.
    """
    stored = [rows for table in tables for rows in table.stored]
    needed = [Needs(rows.names(), []) for rows in stored]
    if stored:
        _put_views(database, tables, [Blank(rows, n) for n, rows in enumerate(stored)], _planned)
        explained = _EXPLAIN.fullmatch(asked)
        query = explained["rest"] if explained else asked
        with contextlib.suppress(duckdb.Error):  # what is wrong with the query is reported later
            (plan,) = database.execute(f"EXPLAIN (FORMAT JSON) {query}").fetchall()
            needed = needs(plan[1], query, stored)
    streams = [Stream(rows, *need) for rows, need in zip(stored, needed, strict=True)]
    _put_views(database, tables, streams, _streamed)
    return streams


def _put_views(
    database: Any, tables: Sequence[_Table], sources: Sequence[Any],
    select: Callable[[int, Any], str],
) -> None:  # fmt: skip
    """Create or replace the views of the tables.

    Args:
        sources: for each of the tables' `stored` what to read instead.
        select: the SELECT from such a source, which is registered under its number.
    """
    numbers = itertools.count()
    for table in tables:
        if table.paths is not None:
            files = {"key": list(table.paths), "path": list(table.paths.values())}
            kinds = pa.schema([("key", pa.string()), ("path", pa.string())])
            database.register(table.paths_name, pa.table(files, kinds))
        selects = []
        for number in itertools.islice(numbers, len(table.stored)):
            database.register(_registered(number), sources[number])
            selects.append(select(number, sources[number]))
        view = f"CREATE OR REPLACE TEMP VIEW {quote(table.name)} AS {table.view(selects)}"
        database.execute(view)


def _registered(number: int) -> str:
    return f"_cfq_{number}"


def _planned(number: int, blank: Blank) -> str:
    columns = ", ".join(
        f"{planned_name(number, n)} AS {quote(column.name)}"
        for n, column in enumerate(blank.rows.columns)
    )
    return f"SELECT {columns} FROM {_registered(number)}"  # noqa: S608


def _streamed(number: int, stream: Stream) -> str:
    """The SELECT from a stream. A column that is not in it would raise an error if it were used
    after all, instead of giving a wrong answer."""
    rows = stream.rows
    columns = ", ".join(
        quote(name) if name in stream.names
        else f"error('column was not read')::{_TYPES[kind]} AS {quote(name)}"
        for name, kind in ((c.name, c.type) for c in rows.schema(rows.names()))
    )  # fmt: skip
    return f"SELECT {columns} FROM {_registered(number)}"  # noqa: S608


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


# The check that a query is one read-only statement.
#
# The type of a statement is not enough: DuckDB 2.0 runs `COPY` and `INSERT` inside a SELECT's
# `WITH`, `EXPLAIN ANALYZE` runs the statement it explains, and some table functions run other SQL
# or write files. So the syntax tree is searched, and everything not known to be read-only is
# refused.


_READING_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
"""The read-only kinds of queries that a SELECT may contain."""

_TABLE_FUNCTIONS = re.compile(
    r"range|generate_series|unnest|repeat|repeat_row|json_each|json_tree|summary|histogram"
    r"|histogram_values|query_table|glob|sniff_csv|test_all_types|test_vector_types"
    r"|icu_calendar_names|pg_timezone_names|duckdb_\w+|pragma_\w+|parquet_\w+"
    r"|read_(?:parquet|csv|csv_auto|json|json_auto|json_objects|json_objects_auto"
    r"|ndjson|ndjson_auto|ndjson_objects|text|blob)"
)
"""Read-only table functions; they open only files that the connection allows. `query` and
`json_execute_serialized_sql` are missing, because they run SQL that is not checked."""

_GAP = r"(?:\s|--[^\n]*(?:\n|$)|/\*(?:[^*]|\*(?!/))*\*/)*"
_OPTION = r"(?:ANALYZE|FORMAT\s+\w+)"
_EXPLAIN = re.compile(
    rf"{_GAP}EXPLAIN\b{_GAP}(?P<how>(?:ANALYZE\b)?{_GAP}"
    rf"(?:\(\s*{_OPTION}(?:\s*,\s*{_OPTION})*\s*\))?)(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_SHOW_TABLES = re.compile(rf"{_GAP}SHOW{_GAP}(?:TABLES)?{_GAP};?{_GAP}", re.IGNORECASE)
_CATALOG = re.compile(
    r"\bSHOW\b|\binformation_schema\b|\bduckdb_\w+|\bpg_\w+|\bsqlite_master\b|\bpragma_\w+",
    re.IGNORECASE,
)


def reading(duckdb: Any, database: Any, question: str) -> str:
    """Check that a query is one read-only statement; returns the SQL to run.

    Args:
        duckdb: the module.
        database: a connection, used for parsing.

    Raises:
        CasparianError: the query is not read-only, or not one statement.
        duckdb.Error: the query is not SQL.
    """
    statements = duckdb.extract_statements(question)
    if len(statements) != 1:
        raise _refused("these are several statements" if statements else "this is not a statement")
    kind = statements[0].type
    if kind == duckdb.StatementType.MULTI and re.search(r"\bPIVOT", question, re.IGNORECASE):
        raise _refused("a PIVOT must name its values: PIVOT t ON column IN ('a', 'b') USING sum(n)")
    if kind == duckdb.StatementType.SELECT:
        _check_tree(database, question)
        return question
    explained = _EXPLAIN.fullmatch(question)
    if kind != duckdb.StatementType.EXPLAIN or not explained:
        raise _refused(f"this is {str(kind).rpartition('.')[2]}")
    # The SQL to run is built from the parts that were checked, so the two cannot differ.
    rest = explained["rest"]
    inner = duckdb.extract_statements(rest)
    if len(inner) != 1 or inner[0].type != duckdb.StatementType.SELECT:
        raise _refused("this explains something else")
    _check_tree(database, rest)
    return f"EXPLAIN {explained['how']} {rest}"


def asks_for_names(question: str) -> bool:
    """Whether the query is `SHOW TABLES`, which needs no file to be opened."""
    return _SHOW_TABLES.fullmatch(question) is not None


def asks_for_paths(question: str) -> bool:
    """Whether the query names `PATH`. If so, it is a column of each topic, also in `SELECT *`."""
    return _names(question, PATH)


def asks_catalog(question: str) -> bool:
    """Whether the query may ask for the catalog: which tables or columns there are."""
    return _CATALOG.search(question) is not None


def _check_tree(database: Any, question: str) -> None:
    """Raise CasparianError if a part of the statement is not known to be read-only."""
    serialized = database.execute("SELECT json_serialize_sql(?::VARCHAR)", [question]).fetchone()
    tree = json.loads(serialized[0])
    if tree.get("error"):
        raise _refused(str(tree.get("error_message")))
    for node in _nodes(tree):
        kind = node.get("type")
        if isinstance(kind, str) and kind.endswith("_NODE") and kind not in _READING_NODES:
            raise _refused(f"it contains {kind.partition('_')[0]}")
        if kind == "TABLE_FUNCTION":
            name = str(node.get("function", {}).get("function_name")).lower()
            if not _TABLE_FUNCTIONS.fullmatch(name):
                raise _refused(f"the table function {name[:60]!r} is not allowed")


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON document. Not recursive, because SQL may nest deeply."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


def _refused(what: str) -> CasparianError:
    return CasparianError(
        f"a query must be one SELECT that only reads; {what}",
        'casparian query "SELECT * FROM <topic>"   (casparian query "SHOW TABLES" lists them)',
    )
