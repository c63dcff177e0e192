"""A backup: a copy of the ledger, and of the store if asked, checked before it gets its name."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from casparian_flow import durable
from casparian_flow.config import Settings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import audit, kept
from casparian_flow.db.access import Ledger, read_copy
from casparian_flow.engine import contents
from casparian_flow.errors import CasparianError, LedgerError, counted
from casparian_flow.services import store_upkeep
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
    store: str
    """The folder with the bytes of the versions; empty where they were not copied."""
    bytes_kept: int
    """Contents whose bytes it has; without it, whose bytes stay in the store here."""


def make(
    settings: Settings,
    ledger: Ledger,
    target: str,
    *,
    force: bool = False,
    with_bytes: bool = False,
) -> Backup:
    """Copy the ledger to `target`, while work goes on.

    The copy is written beside its place, checked as `casparian verify` checks the ledger itself,
    and made durable; then it gets its name. Outputs are not copied. A job that is RUNNING in the
    copy is queued again by the first daemon that starts from it.

    The store is copied after the ledger. What it has evicted meanwhile is evicted in the copy too.

    Args:
        force: replace a file that is there.
        with_bytes: copy the store to the folder `<target>.store` as well.

    Raises:
        LedgerError: the ledger is damaged, or the copy cannot be written; no backup was made.
        CasparianError: the target is taken, or cannot be written; what was there is untouched.
    """
    path = Path(os.path.abspath(target))
    bytes_path = path.with_name(f"{path.name}.store")
    _check_target(settings, path, force)
    if with_bytes and os.path.lexists(bytes_path) and not force:
        raise CasparianError(
            f"{bytes_path} already exists; it was left untouched",
            "name another file, or use --force",
        )
    try:
        durable.make_folder(path.parent)
        # A scan of that folder must not take the backup for a file that was dropped there.
        for each in (path, *([bytes_path] if with_bytes else [])):
            durable.own(path.parent, glob.escape(each.name))
        with _temporary(path) as made, _temporary(bytes_path) as made_bytes:
            ledger.copy(made)
            crashpoint("backup.copied")
            if with_bytes:
                store_upkeep.copy(ledger.database, made, made_bytes)
                crashpoint("backup.bytes_copied")
            found = _checked(made, path)
            durable.fsync_path(made)
            crashpoint("backup.durable")
            if with_bytes:
                _name_folder(made_bytes, bytes_path)
                found = found._replace(store=str(bytes_path))
            _name(made, path, force)
        crashpoint("backup.named")
    except contents.FAULTS as error:
        raise CasparianError(
            f"cannot write the backup {path}: {contents.words(error)}; no backup was made",
            "choose a file that you may write, on a disk with room",
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
            f"{path} already exists; it was left untouched", "name another file, or use --force"
        )


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside the target that is gone at the end, whatever happened."""
    made = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        durable.remove(made)
        yield made
    finally:
        for end in ("", "-journal"):
            durable.remove(made.with_name(f"{made.name}{end}"))


def _checked(made: Path, path: Path) -> Backup:
    """What the copy holds, if all of it holds together."""
    with read_copy(made) as connection:
        verdict, claims = check_ledger(connection)
        head = str(audit.head(connection))
        kept_contents = kept.state(connection).contents
    if verdict.problems:
        raise LedgerError(
            f"the ledger has {counted(len(verdict.problems), 'problem')}, first: "
            f"{verdict.problems[0]}; no backup was made",
            "casparian verify   (lists all of them; see docs/disaster.md)",
        )
    outputs = sum(map(len, claims.values()))
    holds = {**verdict.checked, "outputs": outputs}
    return Backup(str(path), made.stat().st_size, head, holds, "", kept_contents)


def _name_folder(made: Path, path: Path) -> None:
    """Give the copied store its name; an earlier one, which `--force` replaces, goes first."""
    durable.remove(path)
    crashpoint("backup.store_removed")
    os.rename(made, path)
    durable.fsync_path(path.parent)
    crashpoint("backup.store_named")


def _name(made: Path, path: Path, force: bool) -> None:
    """Give the copy its name; without `force` never that of a file that is there."""
    if force:
        os.replace(made, path)
    else:
        try:
            os.link(made, path)
        except FileExistsError:
            raise CasparianError(
                f"another program created {path} meanwhile; it was left untouched",
                "name another file",
            ) from None
        except OSError as error:
            if error.errno not in _NO_LINKS or os.path.lexists(path):
                raise
            os.rename(made, path)  # FAT has no links
    durable.fsync_path(path.parent)
