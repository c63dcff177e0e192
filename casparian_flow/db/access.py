"""Access to the ledger: a SQLAlchemy engine, and `Ledger`, whose one thread does all writes.

`get_engine` is for users' scripts: a SQLAlchemy engine over the ledger, safe beside a running
daemon. `Ledger` is for the system: coroutines and threads hand it functions, and all that wait
share one transaction (group commit), because an fsync costs more than the work. Each transaction
ends with its seal (see `db.seals`).
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import json
import queue
import re
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from sqlalchemy import URL, Connection, CursorResult, Engine, create_engine, event, text
from sqlalchemy.exc import DBAPIError, OperationalError

from casparian_flow.config import DatabaseSettings
from casparian_flow.db import schema, seals
from casparian_flow.db.audit import Event, actor, append
from casparian_flow.db.schema import LedgerConnection, check_place, identity
from casparian_flow.errors import LedgerError, LedgerLost

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
    r"(?:(?:SELECT|VALUES|EXPLAIN|PRAGMA|BEGIN|COMMIT|END|ROLLBACK|SAVEPOINT|RELEASE)\b"
    r"|WITH\b(?!.*\b(?:INSERT|UPDATE|DELETE|REPLACE)\b))",
    re.IGNORECASE | re.DOTALL,
)
"""Statements that do not write. A read that this misses waits for the gate, and nothing worse."""


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
    return engine


def _on_begin(connection: Connection) -> None:
    # sqlite3's own implicit BEGIN would leave DDL and SELECT outside the transaction.
    raw = driver(connection)
    if connection.get_execution_options().get("writes"):
        raw.begin_writing()
    else:
        raw.execute("BEGIN")


def _on_execute(_c: Connection, cursor: Any, statement: str, *_rest: object) -> None:
    if not _READS.match(statement):
        cursor.connection.begin_writing()


def driver(connection: Connection) -> LedgerConnection:
    """The sqlite3 connection under SQLAlchemy's."""
    return cast(LedgerConnection, connection.connection.dbapi_connection)


def execute_many(
    connection: Connection,
    statement: str,
    rows: Sequence[tuple[Any, ...]] | Sequence[dict[str, Any]],
) -> int:
    """Run a driver-level statement for each row; how many rows it changed.

    Tuples are for `?`, dicts for `:name`. Do not use `?1`: Python 3.12.0 to 3.12.3 take it for a
    name (gh-117995).
    """
    return connection.exec_driver_sql(statement, list(rows)).rowcount if rows else 0


def execute(connection: Connection, statement: str, **values: Any) -> CursorResult[Any]:
    """Run one statement; collections are bound as JSON, for `json_each`."""
    bound = {
        name: json.dumps(list(value))
        if isinstance(value, Collection) and not isinstance(value, str | bytes)
        else value
        for name, value in values.items()
    }
    return connection.execute(text(statement), bound)


def returned_ids(connection: Connection, statement: str, **values: Any) -> list[int]:
    """Run one statement; the ids it returns."""
    return list(execute(connection, statement, **values).scalars())


class Ledger:
    """The ledger: reads on the caller's thread, writes on one thread of its own.

    Use it as a context manager, or call `close`.

    Args:
        wake: what `wake` and `change` call. It comes from outside, because this layer knows no
            daemon. None: nothing is woken, as in the daemon itself.
    """

    def __init__(self, engine: Engine, wake: Wake | None = None) -> None:
        self.engine = engine
        self._wake = wake
        self._path = Path(str(engine.url.database))
        self._place = identity(self._path)
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

    @property
    def database(self) -> DatabaseSettings:
        """The settings the engine was made with."""
        return cast(DatabaseSettings, self.engine.get_execution_options()["database"])

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
        """Finish what was submitted, then stop the thread; the engine stays open.

        A read in progress goes on, and closes its connection itself.
        """
        with self._lock:
            self._closed = True
            self._requests.put(None)
        self._thread.join()

    def check_place(self) -> None:
        """Return if the database is still the file that was opened.

        Raises:
            LedgerLost: it was deleted or replaced.
        """
        check_place(self._path, self._place)

    @property
    def broken(self) -> bool:
        """Whether an fsync has failed, so that nothing is written any more."""
        return self._broken.done()

    async def until_broken(self) -> None:
        """Wait until an fsync of the database fails: the process must end then.

        Raises:
            LedgerError: that has happened.
        """
        await asyncio.shield(asyncio.wrap_future(self._broken))

    def read(self, work: Work[T]) -> T:
        """Run `work` on a connection of this thread's, in one read transaction.

        Raises:
            LedgerError: the database cannot be read (its disk is gone, for one).
            LedgerLost: it is damaged.
        """
        pool = self.engine.pool
        try:
            with self.engine.connect() as connection:
                return work(connection)
        except (DBAPIError, sqlite3.Error, OSError) as error:
            raise _unread(error) from error
        finally:
            if self._closed:
                # This connection may be back in the pool after the engine was disposed of, which
                # closed the connections that were in it then.
                pool.dispose()

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection of this thread's for many reads on the driver, each of the newest commit.

        Raises:
            LedgerError, LedgerLost: as `read`.
        """
        try:
            with self.engine.connect() as connection:
                yield connection
        except (DBAPIError, sqlite3.Error) as error:
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
        return await asyncio.wrap_future(self._submit(work))

    async def read_soon(self, work: Work[T]) -> T:
        """`read`, for coroutines: on a thread of the pool."""
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
            with contextlib.closing(self.engine.raw_connection()) as connection:
                connection.cursor().execute("VACUUM INTO ?", (str(target),))
            with contextlib.closing(sqlite3.connect(target)) as copy, copy:
                copy.execute("DELETE FROM cf_asked_sink")
        except (sqlite3.Error, DBAPIError, OSError) as error:
            cause = getattr(error, "orig", error)
            raise LedgerError(
                f"the ledger could not be copied to {target.parent}: {cause}",
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
                    connection = connection or stack.enter_context(self._connect())
                    self._commit(connection, group)
                except Exception as error:  # noqa: BLE001 - given to every request of the group
                    self._refuse(group, error)

    def _connect(self) -> Connection:
        connection = self.engine.connect().execution_options(writes=True)
        # In the pool, its triggers would note what its next user writes.
        connection.detach()
        return connection

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
        with connection.begin():
            marks = seals.begin(driver(connection))
            for work, future in group:
                try:
                    # One request's error must not undo the others'.
                    with connection.begin_nested():
                        outcomes.append((future, work(connection), None))
                except (OperationalError, sqlite3.OperationalError):
                    raise
                except Exception as error:  # noqa: BLE001 - given to the caller
                    outcomes.append((future, None, error))
            seals.seal(driver(connection), marks)
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
        code = getattr(getattr(error, "orig", error), "sqlite_errorcode", None)
        if code in _UNSYNCED and not self.broken:
            self._broken.set_exception(refusal)
        for _work, future in group:
            future.set_exception(refusal)


@contextlib.contextmanager
def open_ledger(database: DatabaseSettings, wake: Wake | None = None) -> Iterator[Ledger]:
    """The ledger, for as long as the block runs.

    Args:
        wake: see `Ledger`.

    Raises:
        LedgerError: the database cannot be used; nothing was changed.
    """
    engine = get_engine(database)
    try:
        with Ledger(engine, wake) as ledger:
            yield ledger
    finally:
        engine.dispose()


@contextlib.contextmanager
def read_copy(file: Path) -> Iterator[Connection]:
    """Open a ledger that nobody writes, and leave no file beside it."""
    immutable = {"mode": "ro", "immutable": "1", "uri": "true"}
    engine = create_engine(URL.create("sqlite", database=file.as_uri(), query=immutable))
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


@contextlib.contextmanager
def write_copy(file: Path) -> Iterator[Connection]:
    """Change a copy of a ledger that nobody else knows yet, in one transaction."""
    engine = create_engine(URL.create("sqlite", database=str(file)))
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def _damage(error: BaseException) -> LedgerLost | None:
    """A LedgerLost where the database is damaged; None for any other error."""
    cause = getattr(error, "orig", error)
    if getattr(cause, "sqlite_errorcode", 0) & 0xFF not in schema.NOT_A_DATABASE:
        return None
    return LedgerLost(
        f"the ledger is damaged: {cause}",
        "keep the file aside, restore a backup, then: casparian verify   (docs/disaster.md)",
    )


def _unread(error: Exception) -> LedgerError:
    return _damage(error) or LedgerError(
        f"the ledger could not be read: {getattr(error, 'orig', error)}",
        "make sure its disk is mounted and has room, then: casparian verify",
    )


def _refusal(error: Exception) -> Exception:
    if isinstance(error, DBAPIError | sqlite3.Error | OSError):
        refusal = _damage(error) or LedgerError(
            f"the ledger could not be written: {getattr(error, 'orig', error)}",
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
    total = text(f"SELECT count(*) FROM ({counted or query})")  # noqa: S608  ours
    return Page(first[:limit], connection.execute(total, values).scalar_one())


def rows(connection: Connection, query: str, **values: Any) -> list[Row]:
    """Every row of a query."""
    mappings = connection.execute(text(query), values).mappings()
    return [{name: _value(name, value) for name, value in row.items()} for row in mappings]


def _value(name: str, value: Any) -> Any:
    """SQLite has neither times nor booleans; our columns say by their names which they are."""
    if name in _BOOLEANS:
        return bool(value)
    if value is None or not name.endswith("_at"):
        return value
    return f"{str(value).replace(' ', 'T')}Z"
