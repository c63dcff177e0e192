"""Run one read-only SQL query over committed outputs, in DuckDB.

A topic is a view over its Parquet files; rows in a SQLite sink are first copied into DuckDB, in
batches. Only the topics that the query names are opened. The query is checked to be read-only
(`reading`), and the connection itself can open no files but those of these topics' folders.
"""

from __future__ import annotations

import contextlib
import glob
import json
import re
import sqlite3
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from casparian_flow.engine.sinks import PREFIXES, SERVER, sqlite_tables
from casparian_flow.engine.sinks.base import LINEAGE
from casparian_flow.errors import CasparianError, NotFound

BATCH_ROWS = 16 << 10
"""Rows of a SQLite table converted at once."""

HISTORY = "_history"

COPIES = "copies"
"""The schema of the copied tables, so that SHOW TABLES lists only topics."""

Output = Mapping[str, Any]
"""A committed output; its keys are topic, location, target, output_key and latest."""

_TYPES = {"INTEGER": pa.int64(), "REAL": pa.float64(), "TEXT": pa.string(), "BLOB": pa.binary()}


@contextlib.contextmanager
def answer(question: str, outputs: Sequence[Output]) -> Iterator[Any]:
    """Run one SELECT. Yields its rows as a pyarrow RecordBatchReader, valid inside the block.

    Each topic is a table with the rows of the latest version of each file; `<topic>_history` has
    the rows of all versions.

    Raises:
        NotFound: the query names a table that does not exist; the message lists the topics.
        CasparianError: DuckDB is not installed, or the query is wrong or not read-only.
    """
    try:
        import duckdb
    except ImportError as error:
        raise CasparianError(
            "queries need DuckDB, which is not installed", "pip install 'casparian-flow[query]'"
        ) from error
    with tempfile.TemporaryDirectory(prefix="casparian-query-") as scratch:
        settings = {
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "python_enable_replacements": "false",
            "temp_directory": scratch,
        }
        with duckdb.connect(config=settings) as database:
            try:
                asked = reading(duckdb, database, question)
                database.execute("SET TimeZone = 'UTC'")
                database.execute(f"CREATE SCHEMA {COPIES}")
                folders = _define(database, question, outputs)
                _lock(database, folders)
                yield pa.RecordBatchReader.from_stream(database.sql(asked))
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
            except BrokenPipeError:  # raised by the caller's printing in the block
                raise
            except (duckdb.Error, pa.ArrowException, sqlite3.Error, OSError) as error:
                raise CasparianError(
                    f"the query failed: {_first_line(error)}",
                    "fix the SQL, or: casparian verify   (shows whether outputs are damaged)",
                ) from error


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


def _define(database: Any, question: str, outputs: Sequence[Output]) -> set[str]:
    """Create the tables that the query may use; returns the folders that they read.

    If the query asks for the catalog, the tables that it does not name are created without rows.
    """
    folders: set[str] = set()
    for lowered, (wanted, shown) in _tables(outputs).items():
        topic = wanted[0]["topic"]
        name = topic if topic.lower() == lowered else topic + HISTORY
        if asks_for_names(question):
            database.execute(f"CREATE TEMP VIEW {_quote(name)} AS SELECT NULL AS unopened")
        elif _names(question, name):
            folders |= _create(database, name, wanted, shown)
        elif asks_catalog(question) and not any(map(_on_server, wanted)):
            folders |= _create(database, name, wanted, False)
    return folders


def _lock(database: Any, folders: set[str]) -> None:
    """Restrict the connection to these folders, and forbid further changes of its settings."""
    paths = (path for folder in folders for path in (folder, glob.escape(folder)))
    allowed = ", ".join(map(_text, paths))
    database.execute(f"SET allowed_directories = [{allowed}]")
    database.execute("SET enable_external_access = false")
    database.execute("SET lock_configuration = true")


def _on_server(output: Output) -> bool:
    return bool(output["location"].startswith(SERVER))


def _names(question: str, table: str) -> bool:
    """Whether the query may name the table. A false positive is harmless."""
    return re.search(rf"(?<!\w){re.escape(table)}(?!\w)", question, re.IGNORECASE) is not None


def _create(database: Any, name: str, outputs: Sequence[Output], shown: bool) -> set[str]:
    """Create a view over the outputs' files and copied rows, with columns united by name.

    Args:
        shown: whether the view has rows.

    Returns:
        The folders of its files.
    """
    for output in outputs:
        if _on_server(output):
            raise CasparianError(
                f"topic {output['topic']!r} is in SQL Server, which `casparian query` does not "
                "read",
                f"query the server itself, table {output['target'].removeprefix(SERVER)}",
            )
    parts = []
    targets = [o["target"] for o in outputs if o["location"].startswith(PREFIXES["parquet"])]
    if targets:
        listed = ", ".join(map(_text, map(_files, targets)))
        options = "union_by_name = true, hive_partitioning = false"
        parts.append(f"SELECT * FROM read_parquet([{listed}], {options})")  # noqa: S608
    for location, keys in _databases(outputs).items():
        copy = f"{COPIES}.{_quote(f'{name} in {location}')}"
        path = Path(location.removeprefix(PREFIXES["sqlite"]))
        with _table_rows(path, outputs[0]["topic"], keys) as rows:
            database.register("_incoming", rows)
            some = "" if shown else " LIMIT 0"
            database.execute(f"CREATE TABLE {copy} AS SELECT * FROM _incoming{some}")  # noqa: S608
            database.unregister("_incoming")
        parts.append(f"SELECT * FROM {copy}")  # noqa: S608
    rows_of_all = " UNION ALL BY NAME ".join(f"({part})" for part in parts)
    limit = "" if shown else " LIMIT 0"
    view = f"SELECT * FROM ({rows_of_all}){limit}"  # noqa: S608
    database.execute(f"CREATE TEMP VIEW {_quote(name)} AS {view}")
    return {str(Path(target).parent) for target in targets}


def _files(target: str) -> str:
    """A glob for the files of an output; a large output is a folder of parts."""
    return glob.escape(target) + ("" if target.endswith(".parquet") else "/*.parquet")


def _databases(outputs: Sequence[Output]) -> dict[str, list[str]]:
    """Location of each SQLite database -> keys of the outputs in it."""
    found: dict[str, list[str]] = defaultdict(list)
    for output in outputs:
        if output["location"].startswith(PREFIXES["sqlite"]):
            found[output["location"]].append(output["output_key"])
    return found


@contextlib.contextmanager
def _table_rows(path: Path, topic: str, keys: Sequence[str]) -> Iterator[Any]:
    """The rows of these outputs in a SQLite sink, as a RecordBatchReader.

    They are found by output key, because an adopted output has the job id of an earlier ledger.
    """
    uri = f"{path.as_uri()}?mode=ro"
    # DuckDB reads the rows from its own threads, one thread at a time.
    opened = sqlite3.connect(uri, uri=True, check_same_thread=False)
    with contextlib.closing(opened) as connection:
        columns = list(sqlite_tables.column_types(connection, topic).items())
        if not columns and not _rows_promised(connection, topic, keys):
            schema = pa.schema([(name, pa.string()) for name in LINEAGE])
            yield pa.RecordBatchReader.from_batches(schema, [])
            return
        # A column without a type may hold values of several types, so it is read as text.
        chosen = ", ".join(
            _quote(name) if kind in _TYPES else f"CAST({_quote(name)} AS TEXT)"
            for name, kind in columns
        )
        schema = pa.schema([(name, _TYPES.get(kind, pa.string())) for name, kind in columns])
        cursor = connection.execute(
            f"""
            SELECT {chosen} FROM {_quote(topic)} WHERE _cf_job_id IN (
                SELECT job_id FROM _cf_outputs WHERE {_OF_THESE})
            """,  # noqa: S608
            [topic, json.dumps(keys)],
        )

        def batches() -> Iterator[Any]:
            while rows := cursor.fetchmany(BATCH_ROWS):
                arrays = [
                    pa.array(values, field.type)
                    for values, field in zip(zip(*rows, strict=True), schema, strict=True)
                ]
                yield pa.record_batch(arrays, schema=schema)

        yield pa.RecordBatchReader.from_batches(schema, batches())


_OF_THESE = "topic = ? AND output_key IN (SELECT value FROM json_each(?))"


def _rows_promised(connection: sqlite3.Connection, topic: str, keys: Sequence[str]) -> int:
    """How many rows these outputs have in the sink's ledger. Empty outputs create no table."""
    query = f"SELECT total(rows) FROM _cf_outputs WHERE {_OF_THESE}"  # noqa: S608
    return int(connection.execute(query, [topic, json.dumps(keys)]).fetchone()[0])


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


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
