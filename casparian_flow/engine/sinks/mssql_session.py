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
from typing import Any, NamedTuple

from casparian_flow.config import MssqlSettings
from casparian_flow.engine.sinks import mssql_statements as statements
from casparian_flow.engine.sinks.mssql_statements import Statement
from casparian_flow.engine.sinks.sql import LEDGER
from casparian_flow.errors import (
    ConfigError,
    JobError,
    OutputRefused,
    SinkConflict,
    SinkUnavailable,
)

# Classification of errors. The driver reports them in two forms, and drops the server's error
# number in the first:
#
#     a statement, a login    the name of the SQLSTATE (`Serialization failure`), and the message
#     a bulk load             `Sql Error: 1205: Class 13: ...`, or a message of the driver itself
#
# So an error is known by its number if it has one, else by its SQLSTATE, else by its message, which
# is in English (`mssql_statements.begin_session`). Exactly-once does not depend on this: after any
# error, the next try begins by reading the ledger. An unknown error pauses the sink, and the
# server's own message is shown.


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
_CONVERT = "convert the column in the plugin, or widen it in the table"

_DEADLOCK = Fault(Kind.RETRY, "it cancelled this transaction because of a deadlock")
_LOCKED = Fault(Kind.PAUSE, "another program holds a lock for too long",
                "find it (sys.dm_tran_locks); the jobs then continue by themselves")  # fmt: skip
_FULL = Fault(Kind.PAUSE, "its disk or its transaction log is full", _SPACE)
_DENIED = Fault(Kind.PAUSE, "the login lacks the permission", RIGHTS)
_NO_LOGIN = Fault(Kind.PAUSE, "it refuses this login", _LOGIN)
_AWAY = Fault(Kind.PAUSE, "the database is not writable now",
              "make it online and writable; the jobs then continue by themselves")  # fmt: skip
_GONE = Fault(Kind.LOST, "the connection is lost",
              "make sure it can be reached; the jobs then continue by themselves")  # fmt: skip
_SLOW = Fault(Kind.PAUSE, "it took too long",
              "find out what it waits for, or raise mssql.timeout_seconds; the jobs then continue "
              "by themselves")  # fmt: skip
_TAKEN = Fault(Kind.CONFLICT, "another object has that name; it was left untouched",
               "rename it, or give the topic another table")  # fmt: skip
_UNFIT = Fault(Kind.REFUSE, "the rows do not fit into the table", _CONVERT)
_RULE = Fault(Kind.REFUSE, "a constraint of the table forbids the rows",
              "change the table's constraints and triggers, or the plugin")  # fmt: skip
_WIDE = Fault(Kind.REFUSE, "a row has more than the 8060 bytes of a page",
              "publish fewer columns, or a column of lists")  # fmt: skip

_NUMBERS = {
    1205: _DEADLOCK, 3960: _DEADLOCK,
    1222: _LOCKED,
    1101: _FULL, 1105: _FULL, 9002: _FULL, 1121: _FULL, 40544: _FULL,
    229: _DENIED, 230: _DENIED, 262: _DENIED, 297: _DENIED, 300: _DENIED, 916: _DENIED,
    1088: _DENIED, 2557: _DENIED, 2760: _DENIED, 3704: _DENIED, 15247: _DENIED,
    4060: _NO_LOGIN, 18452: _NO_LOGIN, 18456: _NO_LOGIN, 18470: _NO_LOGIN, 18486: _NO_LOGIN,
    18487: _NO_LOGIN, 18488: _NO_LOGIN, 40615: _NO_LOGIN,
    924: _AWAY, 927: _AWAY, 942: _AWAY, 945: _AWAY, 976: _AWAY, 978: _AWAY, 983: _AWAY, 3906: _AWAY,
    3908: _AWAY, 701: _AWAY, 802: _AWAY, 8645: _AWAY, 8651: _AWAY, 823: _AWAY, 824: _AWAY,
    10928: _AWAY, 10929: _AWAY, 40197: _AWAY, 40501: _AWAY, 40613: _AWAY, 49918: _AWAY,
    49919: _AWAY, 49920: _AWAY,
    64: _GONE, 121: _GONE, 233: _GONE, 596: _GONE, 6005: _GONE, 10053: _GONE, 10054: _GONE,
    10060: _GONE,
    2714: _TAKEN,
    220: _UNFIT, 232: _UNFIT, 241: _UNFIT, 242: _UNFIT, 245: _UNFIT, 248: _UNFIT, 257: _UNFIT,
    2628: _UNFIT, 4863: _UNFIT, 4864: _UNFIT, 4815: _UNFIT, 7339: _UNFIT, 8023: _UNFIT,
    8114: _UNFIT, 8115: _UNFIT, 8152: _UNFIT, 9420: _UNFIT,
    515: _RULE, 547: _RULE, 2601: _RULE, 2627: _RULE, 3609: _RULE,
    271: _RULE, 273: _RULE,
    511: _WIDE, 1701: _WIDE, 1702: _WIDE, 1708: _WIDE,
}  # fmt: skip
"""Error number of the server -> fault."""

_STATES = {
    "Serialization failure": _DEADLOCK,                              # 40001
    "Timeout expired": _SLOW,                                        # HYT00
    "Operation canceled": _SLOW,                                     # HY008
    "Connection timeout expired": _GONE,                             # HYT01
    "Client unable to establish connection": _GONE,                  # 08001
    "Connection not open": _GONE,                                    # 08003
    "Server rejected the connection": _NO_LOGIN,                     # 08004
    "Connection failure during transaction": _GONE,                  # 08007
    "Communication link failure": _GONE,                             # 08S01
    "Statement completion unknown": _GONE,                           # 40003
    "Invalid authorization specification": _NO_LOGIN,                # 28000
    "String data, right-truncated": _UNFIT,                          # 22001: 2628, 8152
    "Numeric value out of range": _UNFIT,                            # 22003: 220, 8115
    "Invalid datetime format": _UNFIT,                               # 22007: 241
    "Datetime field overflow": _UNFIT,                               # 22008: 242
    "Invalid character value for cast specification": _UNFIT,        # 22018: 245
    "Integrity constraint violation": _RULE,                         # 23000: 515, 547, 2627
    "Base table or view already exists": _TAKEN,                     # 42S01: 2714
}  # fmt: skip
"""The driver's name of an SQLSTATE -> fault."""

_SAID = [
    (r"deadlock", _DEADLOCK),
    (r"Lock request time ?out", _LOCKED),
    (r"transaction log for database .* is full|Could not allocate", _FULL),
    (r"permission (was )?denied|not have permission|permissions? .* denied|"
     r"does not exist or you do not have permission", _DENIED),
    (r"Login failed|Cannot open database", _NO_LOGIN),
    (r"read-only|not currently available|cannot be opened|single-user|middle of a restore", _AWAY),
    (r"already an object named", _TAKEN),
    (r"would be truncated", _UNFIT),
    (r"Cannot create a row of size|row size", _WIDE),
    (r"timed out|Timeout Error", _SLOW),
    (r"\b(IO error|Io error|Connection Error|Connection closed|TLS Error|Protocol Error): |"
     r"connection (has been|was|is) (closed|reset|broken|lost)|closed connection|10054|Broken pipe",
     _GONE),
    (r"Usage Error|Type Conversion Error|Cannot map Arrow", _UNFIT),
]  # fmt: skip
"""Patterns of messages and their faults; the first match counts."""

_SQL_ERROR = re.compile(r"Sql Error: (\d+): Class \d+: State \d+: (.*?) on \S* in ", re.DOTALL)

UNKNOWN = Fault(Kind.PAUSE, "it cannot take the rows", "the jobs then continue by themselves")


def fault_of(error: Exception) -> Fault:
    """Classify an error of the driver; the server's own message follows ours."""
    own = said(error)
    known = _by_number(error) or _STATES.get(getattr(error, "driver_error", "")) or _by_words(own)
    kind, message, hint = known or UNKNOWN
    if message == _SLOW.words and re.search(r"[Ll]ock request time ?out", own):
        kind, message, hint = _LOCKED  # both are HYT00
    if kind is Kind.REFUSE and LEDGER in own:
        kind = Kind.RETRY  # another process has just published this key: read the ledger again
    return Fault(kind, f"{message}: {own}", hint)


def unreached(fault: Fault) -> Fault:
    """The fault of a connection that could not be opened: nothing was lost with it."""
    if fault.kind is not Kind.LOST:
        return fault
    message = fault.words.replace(_GONE.words, "it cannot be reached")
    return Fault(Kind.PAUSE, message, fault.hint)


def said(error: Exception) -> str:
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


def _by_number(error: Exception) -> Fault | None:
    """The fault of the first known number; one message may have several errors in it."""
    numbers = (int(found[1]) for found in _SQL_ERROR.finditer(str(error)))
    return next((_NUMBERS[number] for number in numbers if number in _NUMBERS), None)


def _by_words(message: str) -> Fault | None:
    return next((fault for pattern, fault in _SAID if re.search(pattern, message)), None)


LOGIN_SECONDS = 15
"""Timeout for opening a connection."""

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

    Raises:
        SinkUnavailable: no server is configured, or the driver is not installed.
        Refused: the server refuses the login, or cannot be reached.
    """

    def __init__(self, settings: MssqlSettings) -> None:
        self._settings = settings
        self._connection = _connect(settings)
        with self.transaction():
            self.execute(statements.begin_session(settings.lock_seconds))

    def close(self) -> None:
        """Close the connection; the server rolls back and releases its locks."""
        with contextlib.suppress(Exception):  # it may be lost already
            self._connection.close()

    def execute(self, *sent: Statement) -> list[tuple[Any, ...]]:
        """Send statements one after another; returns the rows of the last.

        Raises:
            Refused: one failed; the caller must roll back the earlier ones.
        """
        rows: list[tuple[Any, ...]] = []
        for statement in sent:
            with _told(), contextlib.closing(self._connection.cursor()) as cursor:
                cursor.execute(statement.sql, statement.values)
                rows = [tuple(row) for row in cursor.fetchall()] if cursor.description else []
        return rows

    def change(self, statement: Statement) -> int:
        """Send a statement that changes rows; returns their number.

        Raises:
            Refused: as `execute`.
        """
        with _told(), contextlib.closing(self._connection.cursor()) as cursor:
            cursor.execute(statement.sql, statement.values)
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

    def lock(self, resource: str, *, session: bool = False) -> None:
        """Take an application lock (`sp_getapplock`).

        Args:
            session: hold it until the connection ends, instead of the transaction.

        Raises:
            Refused: another session held it for longer than `lock_seconds`.
        """
        wait = self._settings.lock_seconds
        ((given,),) = self.execute(statements.lock(resource, wait, session=session))
        if given < 0:
            unknown = Fault(Kind.PAUSE, f"cannot get a lock (sp_getapplock returned {given})")
            raise Refused(_GIVEN.get(given, unknown))

    def try_lock(self, resource: str) -> bool:
        """Take a session's lock if it is free; returns whether it was taken."""
        ((given,),) = self.execute(statements.lock(resource, 0, session=True))
        return bool(given >= 0)

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
    except Refused as refused:
        raise Refused(unreached(refused.fault)) from None
    except (ValueError, driver.ConnectionStringParseError):
        # Its message may quote a part of a password that has a semicolon in it.
        raise SinkUnavailable(
            "the connection string for SQL Server is not valid",
            "see docs/sinks_mssql.md; put a value with one of ;{}= into braces: PWD={a;b}",
        ) from None
    connection.timeout = settings.timeout_seconds
    return connection
