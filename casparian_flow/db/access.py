"""Access to the ledger: `Ledger`, whose one thread does all writes, and a SQLAlchemy engine.

`Ledger` is for the system: coroutines and threads hand it functions, and all that wait share one
transaction (group commit), because an fsync costs more than the work. Each transaction ends with
its seal (see `db.seals`). `get_engine` is for users' scripts: a SQLAlchemy engine over the ledger,
safe beside a running daemon; nothing else here needs SQLAlchemy.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import queue
import re
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from casparian_flow.config import DatabaseSettings
from casparian_flow.db import schema, seals
from casparian_flow.db.audit import Event, actor, append
from casparian_flow.db.connection import (
    Connection,
    Result,
    execute,
    execute_many,
    returned_ids,
)
from casparian_flow.db.schema import LedgerConnection, check_place, identity
from casparian_flow.errors import LedgerError, LedgerLost

if TYPE_CHECKING:
    import sqlalchemy
    from sqlalchemy import Engine

__all__ = [
    "Connection", "Ledger", "Page", "Result", "Row", "Wake", "Work", "driver", "execute",
    "execute_many", "get_engine", "open_ledger", "page", "read_copy", "returned_ids", "rows",
    "write_copy",
]  # fmt: skip

T = TypeVar("T")
Work = Callable[[Connection], T]
Wake = Callable[[DatabaseSettings, bool], None]
"""Tells the daemon of a database, if one runs, that the ledger has changed; True: and to scan."""

GROUP_LIMIT = 500
"""Requests in one transaction, at most, so that the first need not wait for ever."""

_UNSYNCED = frozenset({sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC})
"""An fsync failed. The kernel may drop what was written and report success for the next fsync
(PostgreSQL's fsyncgate, 2018), so nothing is written after it; a new process reads what the disk
has."""

_READS = re.compile(
    r"(?:\s|--[^\n]*(?:\n|$)|/\*.*?\*/)*"
    r"(?:(?:SELECT|VALUES|EXPLAIN|PRAGMA|BEGIN|COMMIT|END|ROLLBACK|RELEASE)\b"
    r"|WITH\b(?!.*\b(?:INSERT|UPDATE|DELETE|REPLACE)\b))",
    re.IGNORECASE | re.DOTALL,
)
"""Statements that do not write. A read that this misses waits for the gate, and nothing worse. A
savepoint counts as a write: `begin_writing` restarts a transaction, which would undo it."""


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_engines() -> None:
    """Close what a script left open; the garbage collector would close it without the gate."""
    for engine in list(_engines):
        engine.dispose()


def get_engine(database: DatabaseSettings) -> Engine:
    """An engine over the ledger, which is created and brought up to date first.

    Sessions over it may read and write at any time. A transaction that only reads takes no lock;
    its first write waits for the gate that all processes share (see `db.schema`).

    Raises:
        LedgerError: the database cannot be used; nothing was changed.
    """
    from sqlalchemy import URL, create_engine, event

    schema.bring_up_to_date(database)
    engine = create_engine(
        URL.create("sqlite", database=str(database.path)),
        connect_args={
            "factory": functools.partial(LedgerConnection, database.gate),
            "timeout": 30.0,
            "isolation_level": None,
        },
        execution_options={"database": database},
    )
    _engines.add(engine)
    event.listen(engine, "begin", _on_begin)
    event.listen(engine, "before_cursor_execute", _on_execute)
    event.listen(engine, "commit", _on_commit)
    return engine


def _on_begin(connection: sqlalchemy.Connection) -> None:
    if connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
        # Nothing would end the transaction, and what it wrote would be lost.
        raise LedgerError("the ledger takes no AUTOCOMMIT", "leave out isolation_level, and commit")
    # sqlite3's own implicit BEGIN would leave DDL and SELECT outside the transaction.
    connection.exec_driver_sql("BEGIN")


def _on_execute(
    _connection: sqlalchemy.Connection, cursor: Any, statement: str, *_rest: object
) -> None:
    if not _READS.match(statement) and not cursor.connection.writing:
        cursor.connection.begin_writing()
        seals.begin_session(cursor.connection)


def _on_commit(connection: sqlalchemy.Connection) -> None:
    """Seal what a user's session has changed; `Ledger` seals its own transactions."""
    raw = cast(LedgerConnection, connection.connection.driver_connection)
    if raw.writing:
        seals.seal_session(raw)


def driver(connection: Connection) -> LedgerConnection:
    """The sqlite3 connection."""
    return cast(LedgerConnection, connection.driver)


class Ledger:
    """The ledger: reads on the caller's thread, writes on one thread of its own.

    Use it as a context manager, or call `close`.

    Args:
        database: where it is; or an engine of `get_engine`, whose ledger it is then.
        wake: what `wake` and `change` call. It comes from outside, because this layer knows no
            daemon. None: nothing is woken, as in the daemon itself.
    """

    def __init__(self, database: DatabaseSettings | Engine, wake: Wake | None = None) -> None:
        if not isinstance(database, DatabaseSettings):
            database = cast(DatabaseSettings, database.get_execution_options()["database"])
        self.database = database
        self._wake = wake
        self._place = identity(database.path)
        self._readers = _Readers(database)
        self._requests: queue.SimpleQueue[tuple[Work[Any], Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        self._lock = threading.Lock()
        self._closed = False
        self._broken: Future[None] = Future()
        self.failing: tuple[float, LedgerError] | None = None
        """Since when (monotonic seconds) writes fail, and why; None where they do not."""
        self._thread = threading.Thread(target=self._serve, name="ledger-writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Finish what was submitted, then stop the thread and close the connections.

        A read in progress goes on, and closes its connection itself.
        """
        with self._lock:
            self._closed = True
            self._requests.put(None)
        self._thread.join()
        self._readers.close()

    def check_place(self) -> None:
        """Return if the database is still the file that was opened.

        Raises:
            LedgerLost: it was deleted or replaced.
        """
        check_place(self.database.path, self._place)

    @property
    def broken(self) -> bool:
        """Whether an fsync has failed, so that nothing is written any more."""
        return self._broken.done()

    async def until_broken(self) -> None:
        """Wait until an fsync of the database fails: the process must end then.

        Raises:
            LedgerError: that has happened.
        """
        import asyncio

        await asyncio.shield(asyncio.wrap_future(self._broken))

    def read(self, work: Work[T]) -> T:
        """Run `work` on a connection of this thread's, in one read transaction.

        Raises:
            LedgerError: the database cannot be read (its disk is gone, for one).
            LedgerLost: it is damaged.
        """
        try:
            with self._readers.one() as connection:
                driver(connection).execute("BEGIN")
                try:
                    return work(connection)
                finally:
                    driver(connection).rollback()
        except (sqlite3.Error, OSError) as error:
            raise _unread(error) from error

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection of this thread's for many reads on the driver, each of the newest commit.

        Raises:
            LedgerError, LedgerLost: as `read`.
        """
        try:
            with self._readers.one() as connection:
                yield connection
        except sqlite3.Error as error:
            raise _unread(error) from error

    def write(self, work: Work[T]) -> T:
        """Run `work` in a writing transaction and wait until it is durable.

        Raises:
            LedgerError: the database refused (full, read-only, damaged); nothing was written.
        """
        return self._submit(work).result()

    def change(
        self,
        work: Work[T],
        audit: Callable[[T], Iterable[Event]],
        *,
        scan: bool = False,
        wake: bool = True,
    ) -> T:
        """Run `work` in a writing transaction as a change that a person makes.

        Its audit rows are written in the same transaction, in the name of this process's user
        where an event names nobody else. Then the daemon, if one runs, is woken.

        Args:
            audit: the events of the audit, from the result of `work`. No event means that nothing
                was changed: the daemon is not woken.
            scan: the daemon is to scan its source roots as well.
            wake: False where the caller makes more changes and wakes the daemon after the last.

        Raises:
            LedgerError: the database refused; nothing was written. What `work` raises undoes the
                change too.
        """

        def audited(connection: Connection) -> tuple[T, bool]:
            result = work(connection)
            events = list(audit(result))
            append(connection, actor(), events)
            return result, bool(events)

        result, is_changed = self.write(audited)
        if is_changed and wake:
            self.wake(scan=scan)
        return result

    def wake(self, *, scan: bool = False) -> None:
        """Tell the daemon, if one runs, that there may be new jobs.

        Args:
            scan: ask it for a full scan as well.
        """
        if self._wake is not None:
            self._wake(self.database, scan)

    async def write_soon(self, work: Work[T]) -> T:
        """`write`, for coroutines."""
        import asyncio

        return await asyncio.wrap_future(self._submit(work))

    async def read_soon(self, work: Work[T]) -> T:
        """`read`, for coroutines: on a thread of the pool."""
        import asyncio

        return await asyncio.to_thread(self.read, work)

    def copy(self, target: Path) -> None:
        """Write the ledger as of one moment to a new file, while work goes on.

        VACUUM INTO reads within one transaction and takes no gate, so no writer waits for it. It
        keeps the ids of rows, the triggers, and the numbers that mark the file as a ledger.

        The copy does not have which sinks were asked: by the time somebody uses it they may have
        more, so that they are asked again (`db.asked`).

        Raises:
            LedgerError: the ledger is damaged, or the file cannot be written.
        """
        try:
            # VACUUM cannot run in a transaction
            with self._readers.one() as connection:
                driver(connection).execute("VACUUM INTO ?", (str(target),))
            with contextlib.closing(sqlite3.connect(target)) as copy, copy:
                copy.execute("DELETE FROM cf_asked_sink")
        except (sqlite3.Error, OSError) as error:
            raise LedgerError(
                f"the ledger could not be copied to {target.parent}: {error}",
                "choose a file that you may write, on a disk with room",
            ) from error

    def _submit(self, work: Work[T]) -> Future[T]:
        future: Future[T] = Future()
        # A coroutine that is cancelled while it waits must not cancel what is being written.
        future.set_running_or_notify_cancel()
        with self._lock:  # a request behind the None that ends the thread would get no answer
            if self._closed:
                future.set_exception(
                    LedgerError("the ledger is closed, since the daemon is stopping")
                )
            else:
                self._requests.put((work, future))
        return future

    def _serve(self) -> None:
        with contextlib.ExitStack() as stack:
            connection: Connection | None = None
            while group := self._next_group():
                try:
                    # If it cannot be opened, the next request tries again.
                    if connection is None:
                        raw = stack.enter_context(contextlib.closing(_open(self.database)))
                        connection = Connection(raw)
                    self._commit(connection, group)
                except Exception as error:  # noqa: BLE001 - given to every request of the group
                    self._refuse(group, error)

    def _next_group(self) -> list[tuple[Work[Any], Future[Any]]]:
        """Wait for one request, then take all that wait; empty when closed."""
        first = self._requests.get()
        group = [] if first is None else [first]
        while group and len(group) < GROUP_LIMIT:
            try:
                request = self._requests.get_nowait()
            except queue.Empty:
                break
            if request is None:
                self._requests.put(None)
                break
            group.append(request)
        return group

    def _commit(self, connection: Connection, group: list[tuple[Work[Any], Future[Any]]]) -> None:
        outcomes: list[tuple[Future[Any], Any, BaseException | None]] = []
        if self.broken:
            self._broken.result()
        with _writing(driver(connection)) as raw:
            marks = seals.begin(raw)
            is_alone = len(group) == 1
            for work, future in group:
                if not is_alone:  # a savepoint copies each page that is changed, to a file if many
                    raw.execute("SAVEPOINT request")
                try:
                    outcomes.append((future, work(connection), None))
                except sqlite3.OperationalError:
                    raise
                except Exception as error:  # noqa: BLE001 - given to the caller
                    # One request's error must not undo the others'.
                    if is_alone:
                        raw.execute("ROLLBACK")
                        raw.execute("BEGIN IMMEDIATE")
                        marks = seals.begin(raw)
                    else:
                        raw.execute("ROLLBACK TO request")
                    outcomes.append((future, None, error))
                if not is_alone:
                    raw.execute("RELEASE request")
            seals.seal(raw, marks)
        self.failing = None
        for future, result, failure in outcomes:
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(_damage(failure) or failure)

    def _refuse(self, group: list[tuple[Work[Any], Future[Any]]], error: Exception) -> None:
        """Fail every request of a group: nothing of it was written."""
        refusal = _refusal(error)
        if isinstance(refusal, LedgerError):
            self.failing = self.failing or (time.monotonic(), refusal)
        code = getattr(error, "sqlite_errorcode", None)
        if code in _UNSYNCED and not self.broken:
            self._broken.set_exception(refusal)
        for _work, future in group:
            future.set_exception(refusal)


IDLE_READERS = 5
"""Connections for reading that are kept open, at most."""


class _Readers:
    """Connections for reading: each is used by one thread at a time."""

    def __init__(self, database: DatabaseSettings) -> None:
        self._database = database
        self._idle: list[Connection] = []
        self._lock = threading.Lock()
        self._closed = False

    @contextlib.contextmanager
    def one(self) -> Iterator[Connection]:
        """A connection, outside a transaction."""
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        connection = connection or Connection(_open(self._database))
        try:
            yield connection
        finally:
            with self._lock:
                is_kept = not self._closed and len(self._idle) < IDLE_READERS
                if is_kept:
                    self._idle.append(connection)
            if not is_kept:
                connection.driver.close()

    def close(self) -> None:
        """Close them all; those in use when they are given back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.driver.close()


def _open(database: DatabaseSettings) -> LedgerConnection:
    return LedgerConnection(
        database.gate,
        str(database.path),
        timeout=30.0,
        isolation_level=None,
        check_same_thread=False,
    )


@contextlib.contextmanager
def _writing(raw: LedgerConnection) -> Iterator[LedgerConnection]:
    """A writing transaction."""
    try:
        raw.begin_writing()
        yield raw
        raw.commit()
    except BaseException:
        raw.rollback()
        raise


@contextlib.contextmanager
def open_ledger(database: DatabaseSettings, wake: Wake | None = None) -> Iterator[Ledger]:
    """The ledger, for as long as the block runs.

    Args:
        wake: see `Ledger`.

    Raises:
        LedgerError: the database cannot be used; nothing was changed.
    """
    schema.bring_up_to_date(database)
    with Ledger(database, wake) as ledger:
        yield ledger


@contextlib.contextmanager
def read_copy(file: Path) -> Iterator[Connection]:
    """Open a ledger that nobody writes, and leave no file beside it."""
    uri = f"{file.absolute().as_uri()}?mode=ro&immutable=1"
    with contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as raw:
        yield Connection(raw)


@contextlib.contextmanager
def write_copy(file: Path) -> Iterator[Connection]:
    """Change a copy of a ledger that nobody else knows yet, in one transaction."""
    with contextlib.closing(sqlite3.connect(file)) as raw, raw:
        yield Connection(raw)


def _damage(error: BaseException) -> LedgerLost | None:
    """A LedgerLost where the database is damaged; None for any other error."""
    if getattr(error, "sqlite_errorcode", 0) & 0xFF not in schema.NOT_A_DATABASE:
        return None
    return LedgerLost(
        f"the ledger is damaged: {error}",
        "keep the file aside, restore a backup, then: casparian verify   (docs/disaster.md)",
    )


def _unread(error: Exception) -> LedgerError:
    return _damage(error) or LedgerError(
        f"the ledger could not be read: {error}",
        "make sure its disk is mounted and has room, then: casparian verify",
    )


def _refusal(error: Exception) -> Exception:
    if isinstance(error, sqlite3.Error | OSError):
        refusal = _damage(error) or LedgerError(
            f"the ledger could not be written: {error}",
            "free disk space or fix permissions, then try again; this step was not recorded",
        )
        refusal.__cause__ = error
        return refusal
    return error


# Pages: the first rows of a query, and how many there are in all.


Row = dict[str, Any]

_BOOLEANS = {"active", "current", "is_table", "latest", "may_be_empty"}


class Page(list[Row]):
    """The first rows of a query.

    Attributes:
        total: how many rows it has without a limit.
    """

    def __init__(self, rows: list[Row], total: int) -> None:
        super().__init__(rows)
        self.total = total


def page(
    connection: Connection, query: str, limit: int | None, *, counted: str = "", **values: Any
) -> Page:
    """The first rows of a query; all are counted only where there are more.

    Args:
        limit: None for every row.
        counted: a query with as many rows that costs less.
    """
    if limit is None:
        every = rows(connection, query, **values)
        return Page(every, len(every))
    first = rows(connection, f"{query} LIMIT :page", page=limit + 1, **values)
    if len(first) <= limit:
        return Page(first, len(first))
    total = f"SELECT count(*) FROM ({counted or query})"  # noqa: S608  ours
    return Page(first[:limit], connection.execute(total, values).scalar_one())


def rows(connection: Connection, query: str, **values: Any) -> list[Row]:
    """Every row of a query."""
    mappings = connection.execute(query, values).mappings()
    return [{name: _value(name, value) for name, value in row.items()} for row in mappings]


def _value(name: str, value: Any) -> Any:
    """SQLite has neither times nor booleans; our columns say by their names which they are."""
    if name in _BOOLEANS:
        return bool(value)
    if value is None or not name.endswith("_at"):
        return value
    return f"{str(value).replace(' ', 'T')}Z"
