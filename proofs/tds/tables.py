"""Tables, transactions and locks in memory.

A table never changes: a statement makes another, which stays its transaction's own until commit.
A transaction that writes a table keeps it locked until its end, so that two never write one; who
waits in a circle is the victim of a deadlock. Readers see what is committed and their own.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from proofs.tds.values import SqlType

LOCK_SECONDS = 20.0
"""Longer than any test waits on purpose; a lock that is not free by then is a bug of ours."""


class SqlError(Exception):
    """An error as the server answers it.

    Args:
        number: as in `sys.messages`.
        words: what it says.
        severity: 20 and above end the connection.
    """

    def __init__(self, number: int, words: str, severity: int = 16, state: int = 1) -> None:
        super().__init__(words)
        self.number, self.words, self.severity, self.state = number, words, severity, state


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    name: str
    kind: SqlType
    declared: str
    """As the statement that made it says."""
    nullable: bool = True
    is_key: bool = False
    """No two rows have the same value in it."""
    default: Any = None
    counts: bool = False
    """`IDENTITY`: each row gets the next number."""


@dataclass(frozen=True)
class Table:
    """A table at one moment, or a view."""

    name: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...] = ()
    numbered: int = 0
    """Numbers that were given to its rows."""
    definition: str = ""
    """Of a view: the statement that made it. A view has no rows of its own."""
    select: Any = None
    """Of a view: what it selects, a `queries.Select`."""

    def at(self, name: str) -> int:
        """Where a column stands.

        Raises:
            SqlError: there is none of that name.
        """
        for number, column in enumerate(self.columns):
            if column.name.casefold() == name.casefold():
                return number
        raise SqlError(207, f"Invalid column name '{name}'.")

    def with_rows(self, rows: Iterable[tuple[Any, ...]]) -> Table:
        """The table with these rows and no others.

        Raises:
            SqlError: two of them have one key.
        """
        table = replace(self, rows=tuple(rows))
        for place, column in enumerate(self.columns):
            if column.is_key and len({row[place] for row in table.rows}) < len(table.rows):
                raise SqlError(2627, f"Violation of a key constraint of '{self.name}'.", 14)
        return table


class Transaction:
    """What one connection has changed and holds since its last commit."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.changed: dict[str, Table | None] = {}
        self.held: set[str] = set()
        self.wants = ""


class Database:
    """All tables, and who holds what.

    Args:
        patience: seconds that a lock is waited for at the most, whatever is asked for.
    """

    def __init__(self, patience: float = LOCK_SECONDS) -> None:
        self._patience = patience
        self._tables: dict[str, Table] = {}
        self._holders: dict[str, Transaction] = {}
        self._freed = threading.Condition()
        self._numbers = itertools.count(1)
        self._commits = 0

    def begin(self) -> Transaction:
        return Transaction(next(self._numbers))

    def copy(self) -> Database:
        """Another database with the same committed tables."""
        other = Database(self._patience)
        with self._freed:
            other._tables = dict(self._tables)
        return other

    def wait(self, commits: int, seconds: float) -> int:
        """Wait until there were more commits than so many, or no longer; how many there were."""
        with self._freed:
            self._freed.wait_for(lambda: self._commits > commits, seconds)
            return self._commits

    def committed(self, name: str) -> Table | None:
        """A table as everybody sees it."""
        with self._freed:
            return self._tables.get(fold(name))

    def snapshot(self) -> Transaction:
        """A transaction that sees all tables as they are committed now, and is never ended."""
        transaction = self.begin()
        with self._freed:
            transaction.changed = dict(self._tables)
        return transaction

    def names(self) -> list[str]:
        """All committed tables and views."""
        with self._freed:
            return sorted(table.name for table in self._tables.values())

    def seen(self, transaction: Transaction) -> list[Table]:
        """All tables as a transaction sees them."""
        with self._freed:
            tables = {**self._tables, **transaction.changed}
        return [table for table in tables.values() if table is not None]

    def find(self, transaction: Transaction, name: str) -> Table | None:
        """A table as a transaction sees it."""
        key = fold(name)
        return transaction.changed[key] if key in transaction.changed else self.committed(name)

    def read(self, transaction: Transaction, name: str) -> Table:
        """The same, where it must be there.

        Raises:
            SqlError: it is not.
        """
        table = self.find(transaction, name)
        if table is None:
            raise SqlError(208, f"Invalid object name '{name}'.")
        return table

    def lock(self, transaction: Transaction, name: str) -> Table | None:
        """Keep others from writing a table; what it is by then."""
        self.acquire(transaction, f"table {fold(name)}")
        return self.find(transaction, name)

    def write(self, transaction: Transaction, name: str, table: Table | None) -> None:
        """Make a table, change it, or drop it (None), for this transaction until its commit."""
        self.acquire(transaction, f"table {fold(name)}")
        transaction.changed[fold(name)] = table

    def acquire(
        self, transaction: Transaction, resource: str, seconds: float = LOCK_SECONDS
    ) -> None:
        """Hold a resource until the transaction's end.

        Raises:
            SqlError: 1205 where waiting would never end, 1222 where it took too long.
        """
        with self._freed:
            transaction.wants = resource
            try:
                while self._holders.get(resource, transaction) is not transaction:
                    if self._is_circle(transaction):
                        raise SqlError(1205, "Transaction was deadlocked on lock resources.", 13)
                    if not self._freed.wait(min(seconds, self._patience)):
                        raise SqlError(1222, "Lock request time out period exceeded.")
            finally:
                transaction.wants = ""
            self._holders[resource] = transaction
            transaction.held.add(resource)

    def commit(self, transaction: Transaction) -> None:
        """Let everybody see what it changed."""
        with self._freed:
            for name, table in transaction.changed.items():
                if table is None:
                    self._tables.pop(name, None)
                else:
                    self._tables[name] = table
            self._commits += 1
        self.roll_back(transaction)

    def roll_back(self, transaction: Transaction) -> None:
        """Forget what it changed, and let go what it holds."""
        with self._freed:
            transaction.changed = {}
            for resource in transaction.held:
                del self._holders[resource]
            transaction.held = set()
            self._freed.notify_all()

    def _is_circle(self, transaction: Transaction) -> bool:
        """Whether who holds what it wants waits, over any number of others, for it."""
        seen, other = {transaction.number}, self._holders.get(transaction.wants)
        while other is not None and other.wants:
            other = self._holders.get(other.wants)
            if other is not None and other.number in seen:
                return other is transaction
            if other is not None:
                seen.add(other.number)
        return False


def fold(name: str) -> str:
    """A name as a server compares it: without case."""
    return name.casefold()
