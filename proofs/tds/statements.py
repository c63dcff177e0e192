"""The statements that are understood: those of the sink, and what the driver asks of its own.

Each has a name, by which the log and a plan of faults call it: `insert sales`, `applock`,
`select _cf_outputs`. Stage tables, whose names are new each time, are all called `stage`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from proofs.tds import catalog, tokens
from proofs.tds.queries import Batch, Item, Select, insert, read_select
from proofs.tds.requests import Bulk
from proofs.tds.sql import Expression, Words, parts_of, schema_of, table_name
from proofs.tds.tables import Column, SqlError, Table, fold
from proofs.tds.tokens import Answer
from proofs.tds.values import declared

Run = Callable[[Batch], list[Answer]]

_STAGE = re.compile(r"casparian_stage_\S+")


@dataclass(frozen=True)
class Statement:
    """A statement that was understood."""

    name: str
    """What it is, as the log calls it."""
    text: str
    run: Run


@dataclass(frozen=True)
class InsertBulk:
    """`INSERT BULK`: rows will come in a message of their own."""

    name: str
    text: str
    table: str
    columns: tuple[str, ...]

    def load(self, batch: Batch, bulk: Bulk) -> None:
        """Put the rows that came into the table.

        Raises:
            SqlError: the table cannot take them.
        """
        assert [fold(name) for name in bulk.names] == [fold(name) for name in self.columns]
        insert(batch, self.table, self.columns, bulk.rows)


def read(text: str) -> list[Statement | InsertBulk]:
    """The statements of a batch.

    Raises:
        Unknown: one of them is none that the sink has.
    """
    if asked := catalog.BULK_COLUMNS.fullmatch(text):
        table = parts_of(asked[1].replace("''", "'"))
        return [
            Statement(
                _named("bulk columns", table),
                text,
                lambda batch: catalog.bulk_columns(batch.database, batch.transaction, table),
            )
        ]
    words = Words(text)
    found = []
    while not words.over:
        if not words.accept(";"):
            found.append(_statement(words))
    return found


def _statement(words: Words) -> Statement | InsertBulk:
    start = words.place
    if words.accept("INSERT", "BULK"):
        table, columns = words.names(), _described(words)
        if words.accept("WITH", "("):  # TABLOCK: locks are a table each, whatever is asked for
            words.listed(words.name)
            words.expect(")")
        names = tuple(column.name for column in columns)
        if words.accept("WITH", "("):
            words.listed(words.name)
            words.expect(")")
        return InsertBulk(_named("insert bulk", table), words.text(start), table, names)
    for opening, reader in _READERS.items():
        if words.accept(*opening.split()):
            name, run = reader(words)
            return Statement(name, words.text(start), run)
    raise words.unknown("a statement of the sink")


def _named(verb: str, table: str) -> str:
    return f"{verb} {_STAGE.sub('stage', table)}".strip()


def _read_select(words: Words) -> tuple[str, Run]:
    select = read_select(words)

    def run(batch: Batch) -> list[Answer]:
        return [tokens.table(*select.evaluate(batch))]

    return _named("select", select.table), run


def _read_create(words: Words) -> tuple[str, Run]:
    table = words.names()
    columns = _described(words)

    def run(batch: Batch) -> list[Answer]:
        if batch.database.lock(batch.transaction, table):
            raise SqlError(2714, f"There is already an object named '{table}' in the database.")
        batch.database.write(batch.transaction, table, Table(table, tuple(columns)))
        return [Answer()]

    return _named("create", table), run


def _read_index(words: Words) -> tuple[str, Run]:
    words.name()
    words.expect("ON")
    table = words.names()
    words.expect("(")
    columns = words.listed(words.name)
    words.expect(")")
    if words.accept("INCLUDE", "("):
        columns += words.listed(words.name)
        words.expect(")")

    def run(batch: Batch) -> list[Answer]:
        for column in columns:
            batch.table(table).at(column)
        return [Answer()]

    return _named("index", table), run


def _read_view(words: Words) -> tuple[str, Run]:
    """A view; it is alone in its batch."""
    start = words.place
    view = words.names()
    words.expect("AS", "SELECT")
    select = read_select(words)
    if not words.over:
        raise words.unknown("the end of the batch")
    text = f"CREATE VIEW {words.text(start)}"

    def run(batch: Batch) -> list[Answer]:
        there = batch.database.lock(batch.transaction, view)
        if there and not there.definition:
            raise SqlError(2714, f"There is already an object named '{view}' in the database.")
        columns = select.shown(batch).columns
        made = Table(view, columns, definition=text, select=select)
        batch.database.write(batch.transaction, view, made)
        return [Answer()]

    return _named("view", view), run


def _read_alter(words: Words) -> tuple[str, Run]:
    table = words.names()
    if words.accept("ALTER", "COLUMN"):
        return _named("alter", table), _altering(table, _column(words))
    words.expect("ADD")
    columns = words.listed(lambda: _column(words))

    def run(batch: Batch) -> list[Answer]:
        batch.database.lock(batch.transaction, table)
        old = batch.database.read(batch.transaction, table)
        there = {fold(column.name) for column in old.columns}
        for column in columns:
            if fold(column.name) in there:
                raise SqlError(2705, f"Column name '{column.name}' is specified more than once.")
        room = (None,) * len(columns)
        new = replace(old, columns=(*old.columns, *columns), rows=())
        new = new.with_rows(row + room for row in old.rows)
        batch.database.write(batch.transaction, table, new)
        return [Answer()]

    return _named("alter", table), run


def _altering(table: str, column: Column) -> Run:
    """Give a column another type, or forbid NULL in it."""

    def run(batch: Batch) -> list[Answer]:
        batch.database.lock(batch.transaction, table)
        old = batch.database.read(batch.transaction, table)
        place = old.at(column.name)
        if not column.nullable and any(row[place] is None for row in old.rows):
            raise SqlError(515, f"Cannot insert the value NULL into table '{table}'.")
        columns = (*old.columns[:place], column, *old.columns[place + 1 :])
        batch.database.write(batch.transaction, table, replace(old, columns=columns))
        return [Answer()]

    return run


def _read_drop(words: Words) -> tuple[str, Run]:
    silent = words.accept("IF", "EXISTS")
    table = words.names()

    def run(batch: Batch) -> list[Answer]:
        if batch.database.lock(batch.transaction, table):
            batch.database.write(batch.transaction, table, None)
        elif not silent:
            raise SqlError(3701, f"Cannot drop the table '{table}', because it does not exist.", 11)
        return [Answer()]

    return _named("drop", table), run


def _read_drop_index(words: Words) -> tuple[str, Run]:
    """Indexes are nothing here but names."""
    words.name()
    words.expect("ON")
    table = words.names()

    def run(batch: Batch) -> list[Answer]:
        batch.table(table)
        return [Answer()]

    return _named("drop index", table), run


def _read_insert(words: Words) -> tuple[str, Run]:
    table = words.names()
    words.expect("(")
    names = words.listed(words.name)
    words.expect(")")
    if words.accept("VALUES", "("):
        select = Select([Item("", value) for value in words.listed(words.expression)])
        words.expect(")")
    else:
        words.expect("SELECT")
        select = read_select(words)

    def run(batch: Batch) -> list[Answer]:
        *_, rows = select.evaluate(batch)
        insert(batch, table, names, rows)
        return [tokens.counted(tokens.INSERT, len(rows))]

    return _named("insert", table), run


def _read_update(words: Words) -> tuple[str, Run]:
    most = None
    if words.accept("TOP", "("):
        most = int(words.take("number"))
        words.expect(")")
    table = words.names()
    words.expect("SET")
    changes = dict(words.listed(lambda: _change(words)))
    where = words.expression() if words.accept("WHERE") else None

    def run(batch: Batch) -> list[Answer]:
        batch.database.lock(batch.transaction, table)
        old = batch.database.read(batch.transaction, table)
        rows = list(old.rows)
        changed = batch.matching(old, where)[:most]
        for number, scope in changed:
            row = list(rows[number])
            for name, value in changes.items():
                row[old.at(name)] = value(scope)
            rows[number] = tuple(row)
        batch.database.write(batch.transaction, table, old.with_rows(rows))
        return [tokens.counted(tokens.UPDATE, len(changed))]

    return _named("update", table), run


def _change(words: Words) -> tuple[str, Expression]:
    name = words.name()
    words.expect("=")
    return name, words.expression()


def _read_delete(words: Words) -> tuple[str, Run]:
    table = words.names()
    where = words.expression() if words.accept("WHERE") else None

    def run(batch: Batch) -> list[Answer]:
        batch.database.lock(batch.transaction, table)
        old = batch.database.read(batch.transaction, table)
        gone = {number for number, _ in batch.matching(old, where)}
        kept = [row for number, row in enumerate(old.rows) if number not in gone]
        batch.database.write(batch.transaction, table, old.with_rows(kept))
        return [tokens.counted(tokens.DELETE, len(gone))]

    return _named("delete", table), run


def _read_set(words: Words) -> tuple[str, Run]:
    """An option; the session looks at those that matter here."""
    option = words.name()
    value = str(int(words.take("number"))) if words.is_a("number") else words.name()
    return f"set {option} {value}".lower(), lambda batch: [Answer()]


def _read_declare(words: Words) -> tuple[str, Run]:
    variable = words.take("variable")
    words.name()

    def run(batch: Batch) -> list[Answer]:
        batch.variables[variable] = None
        return [Answer()]

    return "declare", run


def _read_execute(words: Words) -> tuple[str, Run]:
    """`sp_getapplock` and `sp_rename`."""
    result = ""
    if words.is_a("variable"):
        result = words.take("variable")
        words.expect("=")
    procedure = words.name().lower()
    arguments = dict(words.listed(lambda: _argument(words)))
    if procedure == "sp_rename":
        return "rename", lambda batch: _rename(batch, arguments)
    if procedure != "sp_getapplock":
        raise words.unknown("a procedure of the sink")

    def run(batch: Batch) -> list[Answer]:
        scope = batch.scope({})
        given = {name: value(scope) for name, value in arguments.items()}
        resource = f"applock {given.pop('@resource')}"
        assert given.pop("@lockowner") == "Transaction"
        assert given.pop("@lockmode") == "Exclusive"
        seconds = given.pop("@locktimeout") / 1000
        batch.variables[result] = _applock(batch, resource, seconds)
        assert not given, given
        return [Answer()]

    return "applock", run


def _rename(batch: Batch, arguments: Mapping[str, Expression]) -> list[Answer]:
    given = {name: value(batch.scope({})) for name, value in arguments.items()}
    old = parts_of(given["@objname"])
    schema, _ = schema_of(old)
    new = table_name([schema, given["@newname"]] if schema else [given["@newname"]])
    batch.database.lock(batch.transaction, old)
    if batch.database.lock(batch.transaction, new):
        raise SqlError(15335, f"The new name '{new}' is already in use as a OBJECT name.", 11)
    table = batch.database.read(batch.transaction, old)
    batch.database.write(batch.transaction, old, None)
    batch.database.write(batch.transaction, new, replace(table, name=new))
    return [Answer()]


def _applock(batch: Batch, resource: str, seconds: float) -> int:
    """Its return code: 0 given, -1 not in time, -3 the victim of a deadlock."""
    try:
        batch.database.acquire(batch.transaction, resource, seconds)
    except SqlError as error:
        return {1222: -1, 1205: -3}[error.number]
    return 0


def _argument(words: Words) -> tuple[str, Expression]:
    name = words.take("variable").lower()
    words.expect("=")
    return name, words.expression()


_READERS: dict[str, Callable[[Words], tuple[str, Run]]] = {
    "SET": _read_set,
    "DECLARE": _read_declare,
    "EXEC": _read_execute,
    "SELECT": _read_select,
    "CREATE TABLE": _read_create,
    "CREATE OR ALTER VIEW": _read_view,
    "CREATE INDEX": _read_index,
    "ALTER TABLE": _read_alter,
    "DROP TABLE": _read_drop,
    "DROP INDEX IF EXISTS": _read_drop_index,
    "INSERT INTO": _read_insert,
    "UPDATE": _read_update,
    "DELETE FROM": _read_delete,
}


def _described(words: Words) -> list[Column]:
    """Columns and their types, and the primary key, in brackets."""
    words.expect("(")
    columns = [_column(words)]
    keys: set[str] = set()
    while words.accept(","):
        if words.accept("PRIMARY", "KEY", "("):
            keys = {fold(name) for name in words.listed(words.name)}
            words.expect(")")
        else:
            columns.append(_column(words))
    words.expect(")")
    return [
        replace(column, is_key=column.is_key or fold(column.name) in keys) for column in columns
    ]


def _column(words: Words) -> Column:
    name, start = words.name(), words.place
    words.name()
    if words.accept("("):
        words.listed(lambda: words.name() if words.is_a("name") else words.take("number"))
        words.expect(")")
    kind = words.text(start)
    column = Column(name, declared(kind), kind)
    if words.accept("COLLATE"):
        words.name()
    column = replace(column, counts=words.accept("IDENTITY"))
    if words.accept("NOT", "NULL"):
        column = replace(column, nullable=False)
    else:
        words.accept("NULL")
    if words.accept("PRIMARY", "KEY") or words.accept("UNIQUE"):
        column = replace(column, is_key=True)
    if words.accept("DEFAULT", "sysutcdatetime", "(", ")"):
        column = replace(column, default=datetime.now(UTC).replace(tzinfo=None))
    return column
