"""One connection to SQL Server: statements, transactions, locks, bulk loads, and errors.

    pooling off, autocommit off     closing the connection ends it, with its transaction and locks
    ConnectRetryCount=0             the driver never silently replaces a lost connection
    Encrypt=yes                     unless the configuration sets it otherwise

The driver runs a bulk load on a connection of its own, outside of our transaction; it goes to a
stage table that no other process reads. Errors raised here never contain a connection's secrets.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from enum import Enum, auto
from itertools import chain
from typing import Any, NamedTuple

from casparian_flow.config import MssqlSettings
from casparian_flow.engine.sinks.sql import LEDGER
from casparian_flow.errors import (
    ConfigError,
    JobError,
    OutputRefused,
    SinkConflict,
    SinkUnavailable,
)

LOGIN_SECONDS = 15
"""Timeout for opening a connection."""


# The driver reports errors in two forms, and drops the server's error number in the first:
#
#     a statement, a login    the name of the SQLSTATE (`Serialization failure`), and the message
#     a bulk load             `Sql Error: 1205: Class 13: ...`, or a message of the driver itself
#
# So an error is known by its number if it has one, else by its SQLSTATE, else by its message, which
# is in English (`Session`). Exactly-once does not depend on this: after any error, the next try
# begins by reading the ledger. An unknown error pauses the sink, and the server's own message is
# shown.


class Kind(Enum):
    """What to do about an error."""

    RETRY = auto()
    """The transaction was rolled back and may be run again at once, as after a deadlock."""
    LOST = auto()
    """The connection is lost, and whether the transaction was committed is unknown."""
    PAUSE = auto()
    """The server cannot accept the rows now."""
    CONFLICT = auto()
    """Something that is not ours has the name."""
    REFUSE = auto()
    """The server will never accept these rows."""


class Fault(NamedTuple):
    """An error of the server or the driver, with our message and hint."""

    kind: Kind
    words: str
    hint: str = ""


_SPACE = "free some space on the server, or let it grow; the jobs then continue by themselves"
RIGHTS = (
    "docs/sinks_mssql.md lists the permissions that the login needs; the jobs then "
    "continue by themselves"
)
_LOGIN = "see [mssql] in the configuration, CASPARIAN_MSSQL and CASPARIAN_MSSQL_PASSWORD"

_LOCKED = Fault(Kind.PAUSE, "another program holds a lock for too long",
                "find it (sys.dm_tran_locks); the jobs then continue by themselves")  # fmt: skip
_GONE = Fault(Kind.LOST, "the connection is lost",
              "make sure it can be reached; the jobs then continue by themselves")  # fmt: skip
_SLOW = Fault(Kind.PAUSE, "it took too long",
              "find out what it waits for, or raise mssql.timeout_seconds; the jobs then continue "
              "by themselves")  # fmt: skip

_UNFIT = Fault(Kind.REFUSE, "the rows do not fit into the table",
               "convert the column in the plugin, or widen it in the table")  # fmt: skip

_FAULTS: list[tuple[Fault, set[int], set[str], str]] = [
    (Fault(Kind.RETRY, "it cancelled this transaction because of a deadlock"),
     {1205, 3960}, {"Serialization failure"}, r"deadlock"),
    (_LOCKED, {1222}, set(), r"Lock request time ?out"),
    (Fault(Kind.PAUSE, "its disk or its transaction log is full", _SPACE),
     {1101, 1105, 9002, 1121, 40544}, set(),
     r"transaction log for database .* is full|Could not allocate"),
    (Fault(Kind.PAUSE, "the login lacks the permission", RIGHTS),
     {229, 230, 262, 297, 300, 916, 1088, 2557, 2760, 3704, 15247}, set(),
     r"permission (was )?denied|not have permission|permissions? .* denied|"
     r"does not exist or you do not have permission"),
    (Fault(Kind.PAUSE, "it refuses this login", _LOGIN),
     {4060, 18452, 18456, 18470, 18486, 18487, 18488, 40615},
     {"Server rejected the connection", "Invalid authorization specification"},
     r"Login failed|Cannot open database"),
    (Fault(Kind.PAUSE, "the database is not writable now",
           "make it online and writable; the jobs then continue by themselves"),
     {924, 927, 942, 945, 976, 978, 983, 3906, 3908, 701, 802, 8645, 8651, 823, 824,
      10928, 10929, 40197, 40501, 40613, 49918, 49919, 49920}, set(),
     r"read-only|not currently available|cannot be opened|single-user|middle of a restore"),
    (Fault(Kind.CONFLICT, "another object has that name; it was left untouched",
           "rename it, or give the topic another table"),
     {2714}, {"Base table or view already exists"}, r"already an object named"),
    (_UNFIT,
     {220, 232, 241, 242, 245, 248, 257, 2628, 4863, 4864, 4815, 7339, 8023, 8114, 8115, 8152,
      9420},
     {"String data, right-truncated", "Numeric value out of range", "Invalid datetime format",
      "Datetime field overflow", "Invalid character value for cast specification"},
     r"would be truncated"),
    (Fault(Kind.REFUSE, "a row has more than the 8060 bytes of a page",
           "publish fewer columns, or a column of lists"),
     {511, 1701, 1702, 1708}, set(), r"Cannot create a row of size|row size"),
    (Fault(Kind.REFUSE, "a constraint of the table forbids the rows",
           "change the table's constraints and triggers, or the plugin"),
     {515, 547, 2601, 2627, 3609, 271, 273}, {"Integrity constraint violation"}, r"(?!)"),
    (_SLOW, set(), {"Timeout expired", "Operation canceled"}, r"timed out|Timeout Error"),
    (_GONE,
     {64, 121, 233, 596, 6005, 10053, 10054, 10060},
     {"Connection timeout expired", "Client unable to establish connection", "Connection not open",
      "Connection failure during transaction", "Communication link failure",
      "Statement completion unknown"},
     r"\b(IO error|Io error|Connection Error|Connection closed|TLS Error|Protocol Error): |"
     r"connection (has been|was|is) (closed|reset|broken|lost)|closed connection|10054|"
     r"Broken pipe"),
    (_UNFIT, set(), set(), r"Usage Error|Type Conversion Error|Cannot map Arrow"),
]  # fmt: skip
"""Faults and how each is known: error numbers of the server, the driver's names of SQLSTATEs, a
pattern of messages; the first match counts."""

_SQL_ERROR = re.compile(r"Sql Error: (\d+): Class \d+: State \d+: (.*?) on \S* in ", re.DOTALL)

_UNKNOWN = Fault(Kind.PAUSE, "it cannot take the rows", "the jobs then continue by themselves")


def fault_of(error: Exception) -> Fault:
    """Classify an error of the driver; the server's own message follows ours."""
    own, state = _said(error), getattr(error, "driver_error", "")
    numbers = [int(found[1]) for found in _SQL_ERROR.finditer(str(error))]
    known = chain(
        (fault for n in numbers for fault, has, _, _ in _FAULTS if n in has),
        (fault for fault, _, has, _ in _FAULTS if state in has),
        (fault for fault, _, _, words in _FAULTS if re.search(words, own)),
    )
    fault = next(known, _UNKNOWN)
    if fault is _SLOW and re.search(r"[Ll]ock request time ?out", own):
        fault = _LOCKED  # both are HYT00
    if fault.kind is Kind.REFUSE and LEDGER in own:
        # Another process has just published this key: read the ledger again.
        fault = fault._replace(kind=Kind.RETRY)
    return fault._replace(words=f"{fault.words}: {own}")


def _said(error: Exception) -> str:
    """The server's message, without the driver's prefixes."""
    text = str(getattr(error, "ddbc_error", "")) or str(error)
    if found := _SQL_ERROR.search(text):
        text = found[2]
    return re.sub(r"^(\[[^]]*\])+", "", text).strip()


def refusal(fault: Fault, place: str) -> JobError:
    """The error to report for a fault.

    Args:
        place: name of the table, for the message.
    """
    match fault.kind:
        case Kind.REFUSE:
            return OutputRefused(f"{place}: {fault.words}", fault.hint)
        case Kind.CONFLICT:
            return SinkConflict(f"{place}: {fault.words}", fault.hint)
        case _:
            return SinkUnavailable(f"cannot write {place}: {fault.words}", fault.hint)


_BRACED = re.compile(r"\{(?:[^}]|\}\})*\}")
_ENCRYPTS = re.compile(r"(?:^|;)\s*encrypt\s*=", re.IGNORECASE)

_GIVEN = {
    -1: Fault(Kind.PAUSE, "another program has been publishing the same for too long",
              "the jobs then continue by themselves"),
    -3: Fault(Kind.RETRY, "it cancelled this transaction because of a deadlock"),
}  # fmt: skip
"""Results of `sp_getapplock` when it does not grant the lock."""


class Refused(Exception):
    """The server or the driver reported an error.

    Args:
        fault: the error, classified.
    """

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.words)
        self.fault = fault


def check_configured(settings: MssqlSettings) -> None:
    """Check that a server is configured and the driver is installed.

    Raises:
        ConfigError: one of them is missing.
    """
    if not (settings.connection or settings.server):
        raise ConfigError(
            "no SQL Server is configured",
            "set server and database in [mssql], or CASPARIAN_MSSQL to a connection string "
            "(docs/sinks_mssql.md)",
        )
    _driver()


def connection_string(settings: MssqlSettings) -> str:
    """The connection string for the driver. It contains the password."""
    if text := settings.connection:
        encrypts = _ENCRYPTS.search(_BRACED.sub("", text))
        return text if encrypts else f"{text.rstrip('; ')};Encrypt=yes"
    parts = {
        "Server": settings.server,
        "Database": settings.database,
        "UID": settings.user,
        "PWD": settings.password,
        "Authentication": settings.authentication,
        "Encrypt": settings.encrypt,
        "TrustServerCertificate": "yes" if settings.trust_server_certificate else "no",
        "Trusted_Connection": "" if settings.user or settings.authentication else "yes",
    }
    braced = {key: "{" + value.replace("}", "}}") + "}" for key, value in parts.items() if value}
    return ";".join(f"{key}={value}" for key, value in braced.items())


class Session:
    """A connection. Must be closed.

    Args:
        settings: the server, the login and the timeouts.
        place: for messages: what it is opened for.

    Raises:
        SinkUnavailable: no server is configured, the driver is not installed, or the server
            refuses the login or cannot be reached.
    """

    def __init__(self, settings: MssqlSettings, place: str = "SQL Server") -> None:
        self._settings = settings
        wait = round(settings.lock_seconds * 1000)
        try:
            self._connection = _connect(settings)
            # Errors roll back the transaction, statements report how many rows they changed,
            # messages are in English, and waiting for a lock has a timeout.
            with self.transaction():
                self.send(
                    "SET XACT_ABORT ON; SET NOCOUNT OFF; SET LANGUAGE us_english; "
                    f"SET LOCK_TIMEOUT {wait}"
                )
        except Refused as refused:
            words = refused.fault.words
            if refused.fault.kind is Kind.LOST:  # it was not opened: nothing was lost with it
                words = words.replace(_GONE.words, "it cannot be reached")
            fault = refused.fault._replace(kind=Kind.PAUSE, words=words)
            raise refusal(fault, place) from None

    def close(self) -> None:
        """Close the connection; the server rolls back and releases its locks."""
        with contextlib.suppress(Exception):  # it may be lost already
            self._connection.close()

    def ask(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows that a statement returns.

        Raises:
            Refused: it failed; the caller must roll back what came before.
        """
        with _told(), contextlib.closing(self._connection.cursor()) as cursor:
            cursor.execute(sql, values)
            return [tuple(row) for row in cursor.fetchall()]

    def send(self, sql: str, *values: Any) -> int:
        """Send a statement; returns how many rows it changed.

        Raises:
            Refused: as `ask`.
        """
        with _told(), contextlib.closing(self._connection.cursor()) as cursor:
            cursor.execute(sql, values)
            return int(cursor.rowcount)

    @contextlib.contextmanager
    def transaction(self, locks: Sequence[str] = ()) -> Iterator[None]:
        """Commit what the block sends, or roll back if it raises.

        Args:
            locks: locks to hold until the end. They are taken first and in sorted order, so that
                two transactions cannot deadlock on them.

        Raises:
            Refused: a statement, a lock or the commit failed. After a failed commit its kind is
                LOST: only the ledger shows whether the transaction was committed.
        """
        try:
            for resource in sorted(set(locks)):
                self.lock(resource)
            yield
        except BaseException:
            with contextlib.suppress(Exception):  # the server rolls back a lost connection
                self._connection.rollback()
            raise
        try:
            with _told():
                self._connection.commit()
        except Refused as refused:
            raise Refused(refused.fault._replace(kind=Kind.LOST)) from None

    def lock(self, resource: str) -> None:
        """Take an application lock (`sp_getapplock`) until the end of the transaction.

        Raises:
            Refused: another session held it for longer than `lock_seconds`.
        """
        ((given,),) = self.ask(
            "SET NOCOUNT ON; DECLARE @given int; EXEC @given = sp_getapplock @Resource = ?, "
            "@LockMode = 'Exclusive', @LockOwner = 'Transaction', @LockTimeout = ?; SELECT @given",
            resource, round(self._settings.lock_seconds * 1000),
        )  # fmt: skip
        if given < 0:
            unknown = Fault(Kind.PAUSE, f"cannot get a lock (sp_getapplock returned {given})")
            raise Refused(_GIVEN.get(given, unknown))

    def load(self, table: str, rows: Any) -> int:
        """Bulk load a pyarrow RecordBatchReader into a table, named as `qualified` returned it;
        returns the number of rows.

        Raises:
            Refused: not all rows were loaded.
        """
        # The driver uses the statement timeout for opening its second connection.
        self._connection.timeout = LOGIN_SECONDS
        try:
            with _told(), contextlib.closing(self._connection.cursor()) as cursor:
                done = cursor.bulkcopy_arrow(
                    table, rows, table_lock=True, timeout=self._settings.timeout_seconds
                )
            return int(done["rows_copied"])
        finally:
            self._connection.timeout = self._settings.timeout_seconds


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turn the driver's errors into Refused; its bulk load raises RuntimeError."""
    try:
        yield
    except (_driver().exceptions.Exception, RuntimeError) as error:
        raise Refused(fault_of(error)) from None


def _driver() -> Any:
    try:
        import mssql_python
    except ImportError as error:
        raise ConfigError(
            "SQL Server needs the driver mssql-python, which is not installed",
            "pip install 'casparian-flow[mssql]'",
        ) from error
    return mssql_python


def _connect(settings: MssqlSettings) -> Any:
    try:
        check_configured(settings)
    except ConfigError as error:
        raise SinkUnavailable(error.message, error.hint) from error
    driver = _driver()
    driver.pooling(enabled=False)
    try:
        with _told():
            connection = driver.connect(
                connection_string(settings), timeout=LOGIN_SECONDS, ConnectRetryCount="0"
            )
    except (ValueError, driver.ConnectionStringParseError):
        # Its message may quote a part of a password that has a semicolon in it.
        raise SinkUnavailable(
            "the connection string for SQL Server is not valid",
            "see docs/sinks_mssql.md; put a value with one of ;{}= into braces: PWD={a;b}",
        ) from None
    connection.timeout = settings.timeout_seconds
    return connection
