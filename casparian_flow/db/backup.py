"""A copy of the ledger as one file, made while others write, and opened to be checked.

SQLite's backup API reads within one transaction: the copy is the ledger as it was when the copy
began. Readers need no gate, so no writer waits. What the copy says is RUNNING does not run there:
those jobs are put back into its queue, without cost to them.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from sqlalchemy import URL, Connection, create_engine, select
from sqlalchemy.exc import DBAPIError

from casparian_flow.db import jobs, seals
from casparian_flow.db.access import Ledger
from casparian_flow.db.connection import configure
from casparian_flow.db.models import JobStatus, ProcessingJob
from casparian_flow.errors import LedgerError

INTERRUPTED = "it was running when the backup was made"


def copy(ledger: Ledger, target: Path) -> None:
    """Write the ledger to a new file; what is there is overwritten.

    Raises:
        LedgerError: the ledger cannot be read, or the copy cannot be written.
    """

    def work(connection: Connection) -> None:
        source = _driver(connection)
        with contextlib.closing(sqlite3.connect(target)) as made:
            source.backup(made)

    try:
        ledger.read(work)
        with _opened(str(target)) as connection, connection.begin():
            marks = seals.begin(_driver(connection))
            _release(connection)
            seals.seal(_driver(connection), marks)
    except (sqlite3.Error, DBAPIError) as error:
        raise LedgerError(
            f"the ledger could not be copied to {target.parent}: {getattr(error, 'orig', error)}",
            "name a file on a disk that has room, and that you may write",
        ) from error


@contextlib.contextmanager
def reading(target: Path) -> Iterator[Connection]:
    """A copy that nobody else has open, to be read and left as it is: no file appears beside it."""
    immutable = {"mode": "ro", "immutable": "1", "uri": "true"}
    with _opened(target.absolute().as_uri(), immutable) as connection:
        yield connection


@contextlib.contextmanager
def _opened(database: str, options: Mapping[str, str] | None = None) -> Iterator[Connection]:
    engine = create_engine(URL.create("sqlite", database=database, query=options or {}))
    try:
        with engine.connect() as connection:
            configure(_driver(connection))
            yield connection
    finally:
        engine.dispose()


def _driver(connection: Connection) -> sqlite3.Connection:
    return cast(sqlite3.Connection, connection.connection.dbapi_connection)


def _release(connection: Connection) -> None:
    running = select(ProcessingJob.id, ProcessingJob.fence).where(
        ProcessingJob.status == JobStatus.RUNNING
    )
    for job_id, fence in connection.execute(running).all():
        jobs.requeue(connection, job_id, fence, reason=INTERRUPTED, refund=True)
