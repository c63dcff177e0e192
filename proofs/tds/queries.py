"""Where statements run, and SELECT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proofs.tds import catalog
from proofs.tds.sql import Expression, Scope, Words
from proofs.tds.tables import Database, SqlError, Table, Transaction, fold
from proofs.tds.values import BIGINT, INT, NVARCHAR_MAX, SqlType


@dataclass
class Batch:
    """Where statements run."""

    database: Database
    session: Transaction
    """Holds the locks that outlive a transaction."""
    transaction: Transaction
    """The connection's, or that of the statement in hand."""
    variables: dict[str, Any]

    def scope(self, row: Mapping[str, Any]) -> Scope:
        return Scope(self.variables, row, catalog.functions(self.database, self.transaction))

    def table(self, name: str) -> Table:
        """A table, or a view of the catalog.

        Raises:
            SqlError: there is none of that name.
        """
        made = catalog.VIEWS.get(fold(name))
        if made:
            return made(self.database, self.transaction)
        return self.database.read(self.transaction, name)

    def matching(self, table: Table, where: Expression | None) -> list[tuple[int, Scope]]:
        """The rows for which a condition holds, with their numbers."""
        names = [fold(column.name) for column in table.columns]
        scope = self.scope({})
        scopes = [scope._replace(row=dict(zip(names, row, strict=True))) for row in table.rows]
        return [(n, each) for n, each in enumerate(scopes) if where is None or where(each)]


@dataclass(frozen=True)
class Item:
    """One column of a result."""

    name: str
    value: Expression
    column: str = ""
    """The table's column that it is; empty for anything else."""
    counts: SqlType | None = None
    """It is the number of rows, in this type."""


@dataclass(frozen=True)
class Select:
    """`SELECT items FROM table WHERE condition GROUP BY columns`."""

    items: list[Item]
    """None for `*`, which has no condition."""
    table: str = ""
    where: Expression | None = None
    groups: Sequence[Expression] = ()

    def evaluate(self, batch: Batch) -> tuple[list[str], list[SqlType], list[tuple[Any, ...]]]:
        """Names, types and rows of the result."""
        if not self.table:
            row = tuple(item.value(batch.scope({})) for item in self.items)
            return [item.name for item in self.items], [_kind(value) for value in row], [row]
        table = batch.table(self.table)
        if self.where is None and all(item.column for item in self.items):
            return self._whole(table)
        scopes = [scope for _, scope in batch.matching(table, self.where)]
        if any(item.counts for item in self.items):
            rows = [self._counted(group) for group in self._grouped(scopes)]
        else:
            rows = [tuple(item.value(scope) for item in self.items) for scope in scopes]
        kinds = [
            item.counts
            or (
                table.columns[table.at(item.column)].kind
                if item.column
                else _kind(rows[0][number] if rows else None)
            )
            for number, item in enumerate(self.items)
        ]
        return [item.name for item in self.items], kinds, rows

    def _whole(self, table: Table) -> tuple[list[str], list[SqlType], list[tuple[Any, ...]]]:
        """Columns of all rows, which may be many; of every column for `*`."""
        places = [table.at(item.column) for item in self.items] or [*range(len(table.columns))]
        taken = [table.columns[place] for place in places]
        rows = [tuple([row[place] for place in places]) for row in table.rows]
        return [column.name for column in taken], [column.kind for column in taken], rows

    def _grouped(self, scopes: list[Scope]) -> list[list[Scope]]:
        groups: dict[tuple[Any, ...], list[Scope]] = {} if self.groups else {(): []}
        for scope in scopes:
            groups.setdefault(tuple(by(scope) for by in self.groups), []).append(scope)
        return list(groups.values())

    def _counted(self, group: list[Scope]) -> tuple[Any, ...]:
        return tuple(len(group) if item.counts else item.value(group[0]) for item in self.items)


def read_select(words: Words) -> Select:
    """What comes after SELECT.

    Raises:
        Unknown: it is not one of ours.
    """
    items = [] if words.accept("*") else words.listed(lambda: _item(words))
    table = words.names() if words.accept("FROM") else ""
    if table and words.accept("AS"):
        words.name()
    where = words.expression() if words.accept("WHERE") else None
    groups = words.listed(words.expression) if words.accept("GROUP", "BY") else []
    if words.accept("ORDER", "BY"):  # they have the order in which they came: nobody asks another
        words.listed(words.expression)
    return Select(items, table, where, groups)


def insert(
    batch: Batch, name: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]
) -> None:
    """Put rows into a table.

    Raises:
        SqlError: there is no such table or column, or a value may not be NULL, or a key is there.
    """
    batch.database.lock(batch.transaction, name)
    table = batch.database.read(batch.transaction, name)
    places = [table.at(column) for column in columns]
    blank = [column.default for column in table.columns]
    needed = [place for place, column in enumerate(table.columns) if not column.nullable]
    added = []
    for row in rows:
        whole = blank.copy()
        for place, value in zip(places, row, strict=True):
            whole[place] = value
        added.append(tuple(whole))
        if any(whole[place] is None for place in needed):
            raise SqlError(515, f"Cannot insert the value NULL into table '{name}'.")
    batch.database.write(batch.transaction, name, table.with_rows((*table.rows, *added)))


def _item(words: Words) -> Item:
    for count, kind in (("COUNT", INT), ("COUNT_BIG", BIGINT)):
        if words.accept(count, "(", "*", ")"):
            name = words.name() if words.accept("AS") else ""
            return Item(name, lambda scope: None, counts=kind)
    start = words.place
    value = words.expression()
    column = _only_name(words.text(start))
    return Item(words.name() if words.accept("AS") else column, value, column)


def _only_name(text: str) -> str:
    """The column that an expression names, if it is nothing but its name."""
    words = Words(text)
    while words.is_a("quoted") or words.is_a("name"):
        name = words.name()
        if words.over:
            return "" if name.upper() == "NULL" else name
        if not words.accept("."):
            return ""
    return ""


def _kind(value: Any) -> SqlType:
    """The type of a value that is no column's."""
    if isinstance(value, int):
        return BIGINT if abs(value) >= 2**31 else INT
    return NVARCHAR_MAX
