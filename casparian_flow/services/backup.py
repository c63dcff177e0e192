"""A backup: a copy of the ledger that was checked before it got its name."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, cast

from sqlalchemy import URL, Connection, create_engine, select
from sqlalchemy.exc import DBAPIError

from casparian_flow import durable
from casparian_flow.config import Settings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import audit, jobs, seals
from casparian_flow.db.access import Ledger
from casparian_flow.db.models import JobStatus, ProcessingJob
from casparian_flow.db.schema import configure
from casparian_flow.errors import CasparianError, LedgerError
from casparian_flow.services.verify import check_ledger

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}


class Backup(NamedTuple):
    """What a backup holds."""

    path: str
    size_bytes: int
    head: str
    """The audit's head in it, as `casparian audit verify --head` takes it."""
    holds: dict[str, int]
    """What -> how many of it."""


def make(settings: Settings, ledger: Ledger, target: str, *, force: bool = False) -> Backup:
    """Copy the ledger to `target`, while work goes on.

    The copy is written beside its place, checked as `casparian verify` checks the ledger itself,
    and made durable; then it gets its name. Outputs are not copied.

    Args:
        force: replace a file that is there.

    Raises:
        LedgerError: the ledger is damaged, or the copy cannot be written; no backup was made.
        CasparianError: the target is taken, or cannot be written; what was there is untouched.
    """
    path = Path(os.path.abspath(target))
    _check_target(settings, path, force)
    try:
        durable.make_folder(path.parent)
        # A scan of that folder must not take the backup for a file that was dropped there.
        durable.own(path.parent, glob.escape(path.name))
        with _temporary(path) as made:
            copy(ledger, made)
            crashpoint("backup.copied")
            found = _checked(made, path)
            durable.fsync_path(made)
            crashpoint("backup.durable")
            _name(made, path, force)
        crashpoint("backup.named")
    except OSError as error:
        raise CasparianError(
            f"cannot write the backup {path}: {error.strerror}; no backup was made",
            "name a file on a disk that has room, and that you may write",
        ) from error
    return found


def _check_target(settings: Settings, path: Path, force: bool) -> None:
    database = settings.database.path
    beside = {database.with_name(f"{database.name}{end}") for end in ("", "-wal", "-shm")}
    if path in beside or (path.exists() and any(b.exists() and b.samefile(path) for b in beside)):
        raise CasparianError(f"{path} is the ledger itself", "name another file")
    if path.is_dir():
        raise CasparianError(f"{path} is a folder", f"casparian backup {path}/ledger.sqlite3")
    if os.path.lexists(path) and not force:
        raise CasparianError(
            f"{path} exists; it was left untouched", "name another file, or say --force"
        )


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside the target that is gone at the end, whatever happened."""
    made = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        made.unlink(missing_ok=True)
        yield made
    finally:
        for end in ("", "-wal", "-shm", "-journal"):
            made.with_name(f"{made.name}{end}").unlink(missing_ok=True)


def _checked(made: Path, path: Path) -> Backup:
    """What the copy holds, if all of it holds together."""
    with reading(made) as connection:
        verdict, claims = check_ledger(connection)
        head = str(audit.head(connection))
    if verdict.problems:
        raise LedgerError(
            f"the copy does not hold: {verdict.problems[0]} ({len(verdict.problems)} problems); "
            "no backup was made",
            "casparian verify   (names all of them; docs/disaster.md says what to do)",
        )
    outputs = sum(map(len, claims.values()))
    return Backup(str(path), made.stat().st_size, head, {**verdict.checked, "outputs": outputs})


def _name(made: Path, path: Path, force: bool) -> None:
    """Give the copy its name; without `force` never that of a file that is there."""
    if force:
        os.replace(made, path)
    else:
        try:
            os.link(made, path)
        except FileExistsError:
            raise CasparianError(
                f"{path} appeared meanwhile; it was left untouched", "name another file"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LINKS or os.path.lexists(path):
                raise
            os.rename(made, path)  # FAT has no links
    durable.fsync_path(path.parent)


# A copy of the ledger as one file, made while others write, and opened to be checked.
#
# SQLite's backup API reads within one transaction: the copy is the ledger as it was when the copy
# began. Readers need no gate, so no writer waits. What the copy says is RUNNING does not run there:
# those jobs are put back into its queue, without cost to them.


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
