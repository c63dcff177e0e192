"""What a server says of its own tables: `sys.columns`, `sys.tables`, and the functions around them,
and what the driver asks before a bulk load."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from proofs.tds import tokens
from proofs.tds.sql import parts_of, schema_of
from proofs.tds.tables import Column, Database, Table, Transaction, fold
from proofs.tds.tokens import Answer
from proofs.tds.values import COLLATION, INT, declared

SCHEMA = "dbo"
"""Of a login that names none."""

HIDDEN = "hidden"
"""A view whose text nobody may see."""

GIVEN, READER = "given", "reader"
"""A table that somebody was given the right to read, and who."""

BULK_COLUMNS = re.compile(
    r"SELECT @@TRANCOUNT;.*SET FMTONLY ON;.*EXEC sp_tablecollations_100 N'(.*)';", re.DOTALL
)
"""The batch by which the driver asks for a table's columns before it loads rows into it."""

_COLLATION = "SQL_Latin1_General_CP1_CI_AS"
_TEXT = declared("sysname")


def functions(database: Database, transaction: Transaction) -> Mapping[str, Callable[..., Any]]:
    """The functions that the sink calls, by their names."""

    def object_id(name: str, kind: str = "") -> str | None:
        table = database.find(transaction, parts_of(name))
        kinds = {"", "U"} if table and not table.definition else {"", "V"}
        return table.name if table and kind in kinds else None

    def definition(name: str | None) -> str | None:
        table = database.find(transaction, name) if name and fold(name) != HIDDEN else None
        return table.definition if table else None

    return {
        "OBJECT_ID": object_id,
        "OBJECT_DEFINITION": definition,
        "USER_NAME": lambda number: number,
        "SCHEMA_ID": lambda name: name.casefold(),
        "SCHEMA_NAME": lambda: SCHEMA,
        "TYPE_NAME": lambda number: number,
        "LEFT": lambda text, count: text[:count],
    }


def _columns(database: Database, transaction: Transaction) -> Table:
    """`sys.columns`. What a server numbers, objects and types, stands here by its name."""
    rows = [
        (table.name, column.name, number, *_told(column))
        for table in database.seen(transaction)
        for number, column in enumerate(table.columns, start=1)
    ]
    return _view(
        rows, object_id=_TEXT, name=_TEXT, column_id=INT, system_type_id=_TEXT,
        max_length=INT, precision=INT, scale=INT,
    )  # fmt: skip


def _told(column: Column) -> tuple[str, int, int, int]:
    """Type, length (-1 for `max`), precision and scale."""
    kind = column.kind
    base = column.declared.partition("(")[0].strip().lower()
    size = -1 if kind.chunked else kind.size
    return {"integer": "int"}.get(base, base), size, kind.precision, kind.scale


def _tables(database: Database, transaction: Transaction) -> Table:
    """`sys.tables`."""
    rows = []
    for table in database.seen(transaction):
        schema, name = schema_of(table.name)
        if not table.definition:
            rows.append((table.name, name, (schema or SCHEMA).casefold()))
    return _view(sorted(rows), object_id=_TEXT, name=_TEXT, schema_id=_TEXT)


def _permissions(database: Database, transaction: Transaction) -> Table:
    """`sys.database_permissions`: somebody may read each table of that name."""
    rows = [
        (1, table.name, "GRANT", "SELECT", READER)
        for table in database.seen(transaction)
        if fold(table.name).endswith(GIVEN)  # whatever it is renamed to
    ]
    return _view(
        rows, **{"class": INT}, major_id=_TEXT, state_desc=_TEXT, permission_name=_TEXT,
        grantee_principal_id=_TEXT,
    )  # fmt: skip


VIEWS: dict[str, Callable[[Database, Transaction], Table]] = {
    "sys.columns": _columns,
    "sys.tables": _tables,
    "sys.database_permissions": _permissions,
}


def bulk_columns(database: Database, transaction: Transaction, name: str) -> list[Answer]:
    """Three answers: the depth of transactions, the table's columns, and their collations."""
    table = database.read(transaction, name)
    kinds = [column.kind for column in table.columns]
    described = [
        (number, column.name, *((COLLATION, _COLLATION) if column.kind.is_text else (None, None)))
        for number, column in enumerate(table.columns, start=1)
    ]
    return [
        tokens.table([""], [INT], [(0,)]),
        Answer(tokens.columns([column.name for column in table.columns], kinds)),
        tokens.table(
            ["colid", "name", "tds_collation", "collation"],
            [INT, _TEXT, declared("binary(5)"), _TEXT],
            described,
        ),
    ]


def _view(rows: list[tuple[Any, ...]], **kinds: Any) -> Table:
    return Table("", tuple(Column(name, kind, "") for name, kind in kinds.items()), tuple(rows))
