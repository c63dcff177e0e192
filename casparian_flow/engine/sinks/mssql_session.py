"""One connection to SQL Server: statements, transactions, locks, and the transfer of rows.

    pooling off, autocommit off     a connection is a transaction's own, and ends with it
    ConnectRetryCount=0             a connection that is lost is never replaced behind our back
    Encrypt=yes                     unless the configuration says otherwise

A bulk load runs on a connection of the driver's own and is not in our transaction: it goes to a
stage table that nobody else reads. The secrets of a connection are nowhere in what is raised here.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from casparian_flow.engine.sinks import mssql_statements as statements
from casparian_flow.engine.sinks.mssql_faults import Fault, Kind, fault_of, unreached
from casparian_flow.engine.sinks.mssql_statements import Statement
from casparian_flow.errors import ConfigError, SinkUnavailable
from casparian_flow.sections import MssqlSettings

LOGIN_SECONDS = 15
"""How long a connection may take to be made."""

_BRACED = re.compile(r"\{(?:[^}]|\}\})*\}")
_ENCRYPTS = re.compile(r"(?:^|;)\s*encrypt\s*=", re.IGNORECASE)

_GIVEN = {
    -1: Fault(Kind.PAUSE, "another program publishes the same for too long",
              "the jobs go on by themselves"),
    -3: Fault(Kind.RETRY, "it chose this transaction as a deadlock's victim"),
}  # fmt: skip
"""What `sp_getapplock` answers where it does not give the lock."""


class Refused(Exception):
    """The server or the driver said no.

    Args:
        fault: what it is.
    """

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.words)
        self.fault = fault


def check_configured(settings: MssqlSettings) -> None:
    """Return if there is a server, and the driver for it.

    Raises:
        ConfigError: there is not.
    """
    if not (settings.connection or settings.server):
        raise ConfigError(
            "no SQL Server is configured",
            "set server and database in [mssql], or CASPARIAN_MSSQL to a connection string "
            "(docs/sinks_mssql.md)",
        )
    _driver()


def connection_string(settings: MssqlSettings) -> str:
    """What the driver is told, secrets and all."""
    if text := settings.connection:
        encrypts = _ENCRYPTS.search(_BRACED.sub("", text))
        return text if encrypts else f"{text.rstrip('; ')};Encrypt=yes"
    words = {
        "Server": settings.server,
        "Database": settings.database,
        "UID": settings.user,
        "PWD": settings.password,
        "Authentication": settings.authentication,
        "Encrypt": settings.encrypt,
        "TrustServerCertificate": "yes" if settings.trust_server_certificate else "no",
        "Trusted_Connection": "" if settings.user or settings.authentication else "yes",
    }
    braced = {key: "{" + word.replace("}", "}}") + "}" for key, word in words.items() if word}
    return ";".join(f"{key}={word}" for key, word in braced.items())


class Session:
    """A connection; to be closed.

    Args:
        settings: where, as whom, and how long to wait.

    Raises:
        SinkUnavailable: nothing is configured, or the driver is not installed.
        Refused: the server does not let us in.
    """

    def __init__(self, settings: MssqlSettings) -> None:
        self._settings = settings
        self._connection = _connect(settings)
        with self.transaction():
            self.execute(statements.begin_session(settings.lock_seconds))

    def close(self) -> None:
        """End it; what is not committed is rolled back, and its locks are given back."""
        with contextlib.suppress(Exception):  # it may be gone already
            self._connection.close()

    def execute(self, *sent: Statement) -> list[tuple[Any, ...]]:
        """Send statements one after another; the rows of the last.

        Raises:
            Refused: one was not executed, and those before it are to be rolled back.
        """
        rows: list[tuple[Any, ...]] = []
        for statement in sent:
            with _told(), contextlib.closing(self._connection.cursor()) as cursor:
                cursor.execute(statement.sql, statement.values)
                rows = [tuple(row) for row in cursor.fetchall()] if cursor.description else []
        return rows

    def change(self, statement: Statement) -> int:
        """Send one that changes rows; how many.

        Raises:
            Refused: as `execute`.
        """
        with _told(), contextlib.closing(self._connection.cursor()) as cursor:
            cursor.execute(statement.sql, statement.values)
            return int(cursor.rowcount)

    @contextlib.contextmanager
    def transaction(self, locks: Sequence[str] = ()) -> Iterator[None]:
        """Commit what the block sends, or undo it.

        Args:
            locks: taken first, in one order for all programs, and held until the end.

        Raises:
            Refused: a statement or a lock was; or LOST: whether it was committed, the ledger knows.
        """
        try:
            for resource in sorted(set(locks)):
                self.lock(resource)
            yield
        except BaseException:
            with contextlib.suppress(Exception):  # the server undoes it when we are gone
                self._connection.rollback()
            raise
        try:
            with _told():
                self._connection.commit()
        except Refused as refused:
            raise Refused(refused.fault._replace(kind=Kind.LOST)) from None

    def lock(self, resource: str, *, session: bool = False) -> None:
        """Take a lock that only programs know of.

        Args:
            session: hold it until the connection ends, not the transaction.

        Raises:
            Refused: another holds it for too long.
        """
        wait = self._settings.lock_seconds
        ((given,),) = self.execute(statements.lock(resource, wait, session=session))
        if given < 0:
            unknown = Fault(Kind.PAUSE, f"a lock is not to be had (sp_getapplock says {given})")
            raise Refused(_GIVEN.get(given, unknown))

    def try_lock(self, resource: str) -> bool:
        """Take a session's lock if nobody has it."""
        ((given,),) = self.execute(statements.lock(resource, 0, session=True))
        return bool(given >= 0)

    def load(self, schema: str, table: str, rows: Any) -> int:
        """Send a pyarrow RecordBatchReader into a table, column by column; how many rows went.

        Raises:
            Refused: they did not all go.
        """
        # The driver waits as long for its second connection as the cursor does for a statement.
        self._connection.timeout = LOGIN_SECONDS
        try:
            with _told(), contextlib.closing(self._connection.cursor()) as cursor:
                done = cursor.bulkcopy_arrow(
                    statements.name(schema, table), rows, table_lock=True,
                    timeout=self._settings.timeout_seconds,
                )  # fmt: skip
            return int(done["rows_copied"])
        finally:
            self._connection.timeout = self._settings.timeout_seconds


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turn what the driver raises into our words: its ODBC half its own, its other RuntimeError."""
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
        # Its words may repeat a piece of a password that has a semicolon in it.
        raise SinkUnavailable(
            "the connection string of SQL Server cannot be read",
            "see docs/sinks_mssql.md; a value with one of ;{}= belongs in braces: PWD={a;b}",
        ) from None
    connection.timeout = settings.timeout_seconds
    return connection
