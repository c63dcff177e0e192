"""The connection that functions of `db` are given: SQL strings on a plain sqlite3 connection.

Statements of SQLAlchemy are taken too, which is imported with the first of them.
"""

from __future__ import annotations

import copy
import functools
import json
import sqlite3
import threading
from collections.abc import Collection, Iterator, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, cast, overload

if TYPE_CHECKING:
    import sqlalchemy
    from sqlalchemy import CursorResult, Executable
    from sqlalchemy.sql.selectable import TypedReturnsRows
    from typing_extensions import TypeVarTuple

    Ts = TypeVarTuple("Ts")

Values = dict[str, Any] | Sequence[Any]
"""For `:name` a dict, for `?` a tuple."""


class Row(tuple[Any, ...]):
    """A row whose columns are attributes too."""

    __slots__ = ()
    _fields: tuple[str, ...] = ()

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def _asdict(self) -> dict[str, Any]:
        return dict(zip(self._fields, self, strict=True))


@functools.lru_cache(512)
def _row_class(names: tuple[str, ...]) -> type[Row]:
    columns = {name: property(itemgetter(place)) for place, name in enumerate(names)}
    return cast(type[Row], type("Row", (Row,), {"__slots__": (), **columns, "_fields": names}))


class Result:
    """The rows that a statement gives."""

    def __init__(self, cursor: sqlite3.Cursor) -> None:
        self._cursor = cursor

    @property
    def rowcount(self) -> int:
        """How many rows it changed."""
        return self._cursor.rowcount

    def keys(self) -> tuple[str, ...]:
        """The names of its columns."""
        return tuple(column[0] for column in self._cursor.description or ())

    def __iter__(self) -> Iterator[Row]:
        return map(_row_class(self.keys()), self._cursor)

    def all(self) -> list[Row]:
        """Every row."""
        return list(self)

    def first(self) -> Row | None:
        """The first row, or None."""
        row = self._cursor.fetchone()
        found = None if row is None else _row_class(self.keys())(row)
        self.close()
        return found

    def one(self) -> Row:
        """The only row.

        Raises:
            LookupError: there is none, or there are more.
        """
        found = self._cursor.fetchmany(2)
        if len(found) != 1:
            self.close()
            raise LookupError(f"one row was expected, and the query gives {len(found) or 'none'}")
        row = _row_class(self.keys())(found[0])
        self.close()
        return row

    def scalar(self) -> Any:
        """The first column of the first row; None where there is no row."""
        row = self.first()
        return None if row is None else row[0]

    def scalar_one(self) -> Any:
        """The first column of the only row."""
        return self.one()[0]

    def scalars(self) -> Iterator[Any]:
        """The first column of each row."""
        return map(itemgetter(0), self._cursor)

    def mappings(self) -> Iterator[dict[str, Any]]:
        """Each row by the names of its columns."""
        names = self.keys()
        return (dict(zip(names, row, strict=True)) for row in self._cursor)

    def close(self) -> None:
        """Give up the rows that were not fetched."""
        self._cursor.close()


class Connection:
    """A connection in a transaction of `Ledger`, or to a copy."""

    def __init__(self, driver: sqlite3.Connection) -> None:
        self.driver = driver
        self._other: sqlalchemy.Connection | None = None

    @overload
    def execute(self, statement: str, values: Values = ()) -> Result: ...

    @overload
    def execute(
        self, statement: TypedReturnsRows[*Ts], values: Any = None
    ) -> CursorResult[*Ts]: ...

    @overload
    def execute(
        self, statement: Executable, values: Any = None
    ) -> CursorResult[*tuple[Any, ...]]: ...

    def execute(self, statement: Any, values: Any = ()) -> Any:
        """Run one statement."""
        if isinstance(statement, str):
            return Result(self.driver.execute(statement, values))
        if self._other is None:
            self._other = _lend(self.driver)
        return self._other.execute(statement, values or None)

    def exec_driver_sql(self, statement: str, values: Any = ()) -> Result:
        """Run one statement; for each of the rows, where values are a list of them."""
        if isinstance(values, list):
            return Result(self.driver.executemany(statement, values))
        return self.execute(statement, values or ())


class _Lent:
    """A sqlite3 connection for SQLAlchemy, which is not to end its transaction."""

    def __init__(self, driver: sqlite3.Connection) -> None:
        self._driver = driver

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)

    def leave(self) -> None:
        """Nothing: the transaction is its lender's, as is the connection."""

    commit = rollback = close = leave


_lending = threading.local()


@functools.cache
def _engine() -> sqlalchemy.Engine:
    from sqlalchemy import NullPool, create_engine, event

    # One for all connections, since it keeps the statements that it has compiled.
    engine = create_engine("sqlite://", creator=lambda: _Lent(_lending.driver), poolclass=NullPool)

    @event.listens_for(engine, "handle_error")
    def unwrap(context: sqlalchemy.engine.ExceptionContext) -> BaseException:
        # Whoever asks need not care how a statement was written.
        return copy.copy(context.original_exception)

    return engine


def _lend(driver: sqlite3.Connection) -> sqlalchemy.Connection:
    _lending.driver = driver
    try:
        return _engine().connect()
    finally:
        del _lending.driver


def execute(connection: Connection, statement: str, **values: Any) -> Result:
    """Run one statement; collections are bound as JSON, for `json_each`."""
    bound = {
        name: json.dumps(list(value))
        if isinstance(value, Collection) and not isinstance(value, str | bytes)
        else value
        for name, value in values.items()
    }
    return connection.execute(statement, bound)


def execute_many(
    connection: Connection,
    statement: str,
    rows: Sequence[tuple[Any, ...]] | Sequence[dict[str, Any]],
) -> int:
    """Run a statement for each row; how many rows it changed.

    Tuples are for `?`, dicts for `:name`. Do not use `?1`: Python 3.12.0 to 3.12.3 take it for a
    name (gh-117995).
    """
    return connection.driver.executemany(statement, rows).rowcount if rows else 0


def returned_ids(connection: Connection, statement: str, **values: Any) -> list[int]:
    """Run one statement; the ids it returns."""
    return list(execute(connection, statement, **values).scalars())
