"""Where statements run, and SELECT."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from proofs.tds import catalog
from proofs.tds.sql import Expression, Scope, Words
from proofs.tds.tables import Column, Database, SqlError, Table, Transaction, fold
from proofs.tds.values import BIGINT, INT, NVARCHAR_MAX, SqlType, declared


@dataclass
class Batch:
    """Where statements run."""

    database: Database
    transaction: Transaction
    """The connection's, or that of the statement in hand."""
    variables: dict[str, Any]

    def scope(self, row: Mapping[str, Any]) -> Scope:
        return Scope(self.variables, row, catalog.functions(self.database, self.transaction))

    def table(self, name: str) -> Table:
        """A table, or the rows that a view shows, or a view of the catalog.

        Raises:
            SqlError: there is none of that name.
        """
        made = catalog.VIEWS.get(fold(name))
        if made:
            return made(self.database, self.transaction)
        table = self.database.read(self.transaction, name)
        return table.select.shown(self) if table.definition else table

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
    of: str = ""
    """The table that is written before the column."""
    counts: SqlType | None = None
    """It is the number of rows, in this type."""
    extreme: Callable[..., Any] | None = None
    """It is the largest or smallest of the values."""
    kind: SqlType | None = None
    """The type that it is cast to."""

    @property
    def gathers(self) -> bool:
        """Whether it is one value of many rows."""
        return self.extreme is not None or self.counts is not None


@dataclass(frozen=True)
class Join:
    """`JOIN table AS alias ON alias.column = alias.column`."""

    table: str
    alias: str
    on: tuple[str, str]
    outer: bool
    """`LEFT JOIN`: rows without a partner are there, too."""

    def of(self, batch: Batch, left: Table, alias: str) -> Table:
        """The joined rows; the columns have their table's alias before them."""
        right = batch.table(self.table)
        columns = [
            replace(column, name=f"{name}.{column.name}")
            for name, table in ((alias, left), (self.alias, right))
            for column in table.columns
        ]
        joined = Table("", tuple(columns))
        at, by = sorted(map(joined.at, self.on))
        by -= len(left.columns)
        partners: dict[Any, list[tuple[Any, ...]]] = {}
        for row in right.rows:
            partners.setdefault(row[by], []).append(row)
        nobody = [(None,) * len(right.columns)] if self.outer else []
        rows = (row + other for row in left.rows for other in partners.get(row[at], nobody))
        return replace(joined, rows=tuple(rows))


@dataclass(frozen=True)
class Select:
    """`SELECT items FROM table WHERE condition GROUP BY columns`."""

    items: list[Item]
    """None for `*`, which has no condition."""
    table: str = ""
    alias: str = ""
    join: Join | None = None
    where: Expression | None = None
    groups: Sequence[Expression] = ()
    united: Select | None = None
    """`UNION ALL`: its rows follow. The double gives no column a type of both."""

    def shown(self, batch: Batch) -> Table:
        """The result as a table, for a view."""
        names, kinds, rows = self.evaluate(batch)
        columns = (Column(name, kind, "") for name, kind in zip(names, kinds, strict=True))
        return Table("", tuple(columns), tuple(rows))

    def evaluate(self, batch: Batch) -> tuple[list[str], list[SqlType], list[tuple[Any, ...]]]:
        """Names, types and rows of the result."""
        names, kinds, rows = self._evaluated(batch)
        if self.united:
            _, others, more = self.united.evaluate(batch)
            if len(kinds) != len(others):
                raise SqlError(205, "All queries combined using UNION must have equal lists.")
            rows = [*rows, *more]
        return names, kinds, rows

    def _evaluated(self, batch: Batch) -> tuple[list[str], list[SqlType], list[tuple[Any, ...]]]:
        if not self.table:
            row = tuple(item.value(batch.scope({})) for item in self.items)
            return [item.name for item in self.items], [_kind(value) for value in row], [row]
        table = batch.table(self.table)
        if self.join:
            table = self.join.of(batch, table, self.alias)
        if not self.groups and all(item.column for item in self.items):
            return self._taken(batch, table)
        scopes = [scope for _, scope in batch.matching(table, self.where)]
        if any(item.gathers for item in self.items):
            rows = [self._counted(group) for group in self._grouped(scopes)]
        else:
            rows = [tuple(item.value(scope) for item in self.items) for scope in scopes]
        kinds = [
            item.counts
            or item.kind
            or (
                table.columns[self._at(table, item)].kind
                if item.column
                else _kind(rows[0][number] if rows else None)
            )
            for number, item in enumerate(self.items)
        ]
        return [item.name for item in self.items], kinds, rows

    def _taken(
        self, batch: Batch, table: Table
    ) -> tuple[list[str], list[SqlType], list[tuple[Any, ...]]]:
        """Columns of rows, which may be many; every column for `*`."""
        places = [self._at(table, item) for item in self.items] or [*range(len(table.columns))]
        taken = [table.columns[place] for place in places]
        found: Iterable[tuple[Any, ...]] = table.rows
        if self.where:
            found = (table.rows[number] for number, _ in batch.matching(table, self.where))
        rows = [tuple([row[place] for place in places]) for row in found]
        names = [item.name for item in self.items] or [column.name for column in taken]
        return names, [column.kind for column in taken], rows

    def _at(self, table: Table, item: Item) -> int:
        """Where a column stands."""
        return table.at(f"{item.of}.{item.column}" if self.join else item.column)

    def _grouped(self, scopes: list[Scope]) -> list[list[Scope]]:
        groups: dict[tuple[Any, ...], list[Scope]] = {} if self.groups else {(): []}
        for scope in scopes:
            groups.setdefault(tuple(by(scope) for by in self.groups), []).append(scope)
        return list(groups.values())

    def _counted(self, group: list[Scope]) -> tuple[Any, ...]:
        return tuple(
            len(group) if item.counts
            else item.extreme((item.value(scope) for scope in group), default=None)
            if item.extreme
            else item.value(group[0])
            for item in self.items
        )  # fmt: skip


def read_select(words: Words) -> Select:
    """What comes after SELECT.

    Raises:
        Unknown: it is not one of ours.
    """
    items = [] if words.accept("*") else words.listed(lambda: _item(words))
    table = words.names() if words.accept("FROM") else ""
    words.accept("WITH", "(", "READUNCOMMITTED", ")")  # what others have not committed is not seen
    alias = words.name() if table and words.accept("AS") else ""
    join = _join(words)
    where = words.expression() if words.accept("WHERE") else None
    groups = words.listed(words.expression) if words.accept("GROUP", "BY") else []
    if words.accept("ORDER", "BY"):  # they have the order in which they came: nobody asks another
        words.listed(words.expression)
    united = None
    if words.accept("UNION", "ALL"):
        words.expect("SELECT")
        united = read_select(words)
    return Select(items, table, alias, join, where, groups, united)


def _join(words: Words) -> Join | None:
    outer = words.accept("LEFT", "JOIN")
    if not outer and not words.accept("JOIN"):
        return None
    table = words.names()
    words.expect("AS")
    alias = words.name()
    words.expect("ON")
    one = _with_table(words)
    words.expect("=")
    return Join(table, alias, (one, _with_table(words)), outer)


def _with_table(words: Words) -> str:
    table = words.name()
    words.expect(".")
    return f"{table}.{words.name()}"


def rows_of(database: Database, name: str) -> list[dict[str, Any]]:
    """All rows of a table or view at one moment; none if it is not there."""
    now = database.snapshot()
    if database.find(now, name) is None:
        return []
    table = Batch(database, now, {}).table(name)
    names = [column.name for column in table.columns]
    return [dict(zip(names, row, strict=True)) for row in table.rows]


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
    counting = [place for place, column in enumerate(table.columns) if column.counts]
    numbered = table.numbered
    needed = [place for place, column in enumerate(table.columns) if not column.nullable]
    added = []
    for row in rows:
        whole = blank.copy()
        for place, value in zip(places, row, strict=True):
            whole[place] = value
        for place in counting:
            whole[place] = numbered = numbered + 1
        added.append(tuple(whole))
        if any(whole[place] is None for place in needed):
            raise SqlError(515, f"Cannot insert the value NULL into table '{name}'.")
    table = replace(table.with_rows((*table.rows, *added)), numbered=numbered)
    batch.database.write(batch.transaction, name, table)


def _item(words: Words) -> Item:
    for count, kind in (("COUNT", INT), ("COUNT_BIG", BIGINT)):
        if words.accept(count, "(", "*", ")"):
            name = words.name() if words.accept("AS") else ""
            return Item(name, lambda scope: None, counts=kind)
    for name, extreme in (("MAX", max), ("MIN", min)):
        if words.accept(name, "("):
            value = words.expression()
            words.expect(")")
            return Item("", value, extreme=extreme)
    if words.accept("CAST", "(", "NULL", "AS"):
        start = words.place
        words.name()
        if words.accept("("):
            words.listed(lambda: words.name() if words.is_a("name") else words.take("number"))
            words.expect(")")
        kind = declared(words.text(start))
        words.expect(")", "AS")
        return Item(words.name(), lambda scope: None, kind=kind)
    start = words.place
    value = words.expression()
    of, column = _only_name(words.text(start))
    return Item(words.name() if words.accept("AS") else column, value, column, of)


def _only_name(text: str) -> tuple[str, str]:
    """Table and column that an expression names, if it is nothing but a name."""
    words, of = Words(text), ""
    while words.is_a("quoted") or words.is_a("name"):
        name = words.name()
        if words.over:
            return (of, "" if name.upper() == "NULL" else name)
        if not words.accept("."):
            break
        of = name
    return "", ""


def _kind(value: Any) -> SqlType:
    """The type of a value that is no column's."""
    if isinstance(value, int):
        return BIGINT if abs(value) >= 2**31 else INT
    return NVARCHAR_MAX
