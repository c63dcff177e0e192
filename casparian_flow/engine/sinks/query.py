"""Committed outputs as tables of DuckDB, for one question that only reads.

A topic is a view over its Parquet files; what a SQLite sink holds of it is copied into DuckDB
first, in batches. Only the topics that the question names are opened, and DuckDB can open no file
but those of their folders: what is asked must only read (`questions`), and where that fails the
connection itself refuses.
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
"""A schema of its own, so that SHOW TABLES has the topics and nothing else."""

Output = Mapping[str, Any]
"""A committed output: topic, location, target, output_key, latest."""

_TYPES = {"INTEGER": pa.int64(), "REAL": pa.float64(), "TEXT": pa.string(), "BLOB": pa.binary()}


@contextlib.contextmanager
def answer(question: str, outputs: Sequence[Output]) -> Iterator[Any]:
    """Ask one SELECT; its rows as a pyarrow RecordBatchReader, valid inside the block.

    Each topic is a table with what the latest version of each location gave; `<topic>_history`
    has what every version gave.

    Raises:
        NotFound: no table has that name; the message lists the topics.
        CasparianError: DuckDB is not installed, or the question is wrong.
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
                    "a query sees the topics that it names, and no other file",
                ) from error
            except BrokenPipeError:  # of whoever prints the rows
                raise
            except (duckdb.Error, pa.ArrowException, sqlite3.Error, OSError) as error:
                raise CasparianError(
                    f"the query failed: {_first_line(error)}",
                    "mend the SQL; casparian verify tells whether outputs are damaged",
                ) from error


def _tables(outputs: Sequence[Output]) -> dict[str, tuple[list[Output], bool]]:
    """Name in small letters -> outputs that give a table its columns; whether it has their rows.

    A topic whose latest versions gave nothing has the columns of its history and no row. A topic
    that is itself named like another one's history wins.
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
    """Create the tables that the question may ask for; the folders that they read from.

    For a question about the tables themselves those that it does not name are there without rows.
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
    """From here on nothing but these folders can be opened, and no setting can be changed."""
    allowed = ", ".join(_text(each) for folder in folders for each in (folder, glob.escape(folder)))
    database.execute(f"SET allowed_directories = [{allowed}]")
    database.execute("SET enable_external_access = false")
    database.execute("SET lock_configuration = true")


def _on_server(output: Output) -> bool:
    return bool(output["location"].startswith(SERVER))


def _names(question: str, table: str) -> bool:
    """Whether the question may name the table; too often is harmless."""
    return re.search(rf"(?<!\w){re.escape(table)}(?!\w)", question, re.IGNORECASE) is not None


def _create(database: Any, name: str, outputs: Sequence[Output], shown: bool) -> set[str]:
    """One view over the files and the copied tables, their columns united by name.

    Args:
        shown: whether it has their rows.

    Returns:
        The folders that its files are in.
    """
    for output in outputs:
        if _on_server(output):
            raise CasparianError(
                f"topic {output['topic']!r} is in SQL Server, where this does not look",
                f"ask the server itself, for table {output['target'].removeprefix(SERVER)}",
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
    """A pattern for the files of an output; a large one is a folder of parts."""
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
    """The rows of these outputs, as a RecordBatchReader.

    They are found by output key: an adopted output carries the job id of an earlier ledger.
    """
    uri = f"{path.as_uri()}?mode=ro"
    # DuckDB pulls the rows from threads of its own, one at a time.
    opened = sqlite3.connect(uri, uri=True, check_same_thread=False)
    with contextlib.closing(opened) as connection:
        columns = list(sqlite_tables.column_types(connection, topic).items())
        if not columns and not _rows_promised(connection, topic, keys):
            schema = pa.schema([(name, pa.string()) for name in LINEAGE])
            yield pa.RecordBatchReader.from_batches(schema, [])
            return
        # A column without a type may hold a mixture, which Arrow has no type for.
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
    """How many rows the sink's ledger has of these outputs; empty ones alone make no table."""
    query = f"SELECT total(rows) FROM _cf_outputs WHERE {_OF_THESE}"  # noqa: S608
    return int(connection.execute(query, [topic, json.dumps(keys)]).fetchone()[0])


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


# What `casparian query` runs: one statement that reads, told from all that does more.
#
# The type of a statement is not enough: DuckDB 2.0 runs `COPY` and `INSERT` inside a SELECT's
# `WITH`, `EXPLAIN ANALYZE` runs the statement behind it, and some table functions run other SQL or
# write files. So the syntax tree is looked through, and what is not known to read is refused.


_READING_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
"""Every kind of query that a SELECT may have in it and that changes nothing."""

_TABLE_FUNCTIONS = re.compile(
    r"range|generate_series|unnest|repeat|repeat_row|json_each|json_tree|summary|histogram"
    r"|histogram_values|query_table|glob|sniff_csv|test_all_types|test_vector_types"
    r"|icu_calendar_names|pg_timezone_names|duckdb_\w+|pragma_\w+|parquet_\w+"
    r"|read_(?:parquet|csv|csv_auto|json|json_auto|json_objects|json_objects_auto"
    r"|ndjson|ndjson_auto|ndjson_objects|text|blob)"
)
"""They only read, and of files only those that the connection allows. `query` and
`json_execute_serialized_sql` are not among them: they run SQL that nobody has looked through."""

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
    """The question as it is to be run, if it is one statement that only reads.

    Args:
        duckdb: the module.
        database: a connection of it, which parses.

    Raises:
        CasparianError: it is anything else.
        duckdb.Error: it is no SQL.
    """
    statements = duckdb.extract_statements(question)
    if len(statements) != 1:
        raise _refused("these are several statements" if statements else "this is none")
    kind = statements[0].type
    if kind == duckdb.StatementType.MULTI and re.search(r"\bPIVOT", question, re.IGNORECASE):
        raise _refused("a PIVOT must name its values: PIVOT t ON column IN ('a', 'b') USING sum(n)")
    if kind == duckdb.StatementType.SELECT:
        _check_tree(database, question)
        return question
    explained = _EXPLAIN.fullmatch(question)
    if kind != duckdb.StatementType.EXPLAIN or not explained:
        raise _refused(f"this is {str(kind).rpartition('.')[2]}")
    # What is run is put together from what was looked through, so no reading of ours can differ.
    rest = explained["rest"]
    inner = duckdb.extract_statements(rest)
    if len(inner) != 1 or inner[0].type != duckdb.StatementType.SELECT:
        raise _refused("this explains something else")
    _check_tree(database, rest)
    return f"EXPLAIN {explained['how']} {rest}"


def asks_for_names(question: str) -> bool:
    """Whether it is `SHOW TABLES`, which is answered without opening anything."""
    return _SHOW_TABLES.fullmatch(question) is not None


def asks_catalog(question: str) -> bool:
    """Whether it may ask which tables or columns there are."""
    return _CATALOG.search(question) is not None


def _check_tree(database: Any, question: str) -> None:
    """
    Raises:
        CasparianError: some part of the statement is not known to read only.
    """
    serialized = database.execute("SELECT json_serialize_sql(?::VARCHAR)", [question]).fetchone()
    tree = json.loads(serialized[0])
    if tree.get("error"):
        raise _refused(str(tree.get("error_message")))
    for node in _nodes(tree):
        kind = node.get("type")
        if isinstance(kind, str) and kind.endswith("_NODE") and kind not in _READING_NODES:
            raise _refused(f"there is {kind.partition('_')[0]} in it")
        if kind == "TABLE_FUNCTION":
            name = str(node.get("function", {}).get("function_name")).lower()
            if not _TABLE_FUNCTIONS.fullmatch(name):
                raise _refused(f"the table function {name[:60]!r} may do more")


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON document; without recursion, for SQL nests deeply."""
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
        f"a query is one SELECT: it reads, and changes nothing; {what}",
        'casparian query "SELECT * FROM <topic>"   (casparian query "SHOW TABLES" lists them)',
    )
