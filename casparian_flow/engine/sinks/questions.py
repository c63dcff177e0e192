"""What `casparian query` runs: one statement that reads, told from all that does more.

The type of a statement is not enough: DuckDB 2.0 runs `COPY` and `INSERT` inside a SELECT's `WITH`,
`EXPLAIN ANALYZE` runs the statement behind it, and some table functions run other SQL or write
files. So the syntax tree is looked through, and what is not known to read is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from casparian_flow.errors import CasparianError

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
