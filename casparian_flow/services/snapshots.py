"""The snapshot store: the bytes of recorded versions, so that they outlive their files.

    <state folder>/snapshots/<database>/ab/ab12...    a content, read-only, named by its SHA-256
                                       /tmp/<owner>/  contents that one scan has captured
                                       /lock          held from naming a content to recording it

A scan captures a file's bytes while it hashes them: where the filesystem shares blocks it hashes a
clone, else it writes what it reads. Captured contents become durable and get their names before the
transaction that records the versions, and the references to them are part of that transaction
(`db.snapshots`): a referenced content is always in the store. Eviction deletes the reference first.
A crash in between leaves an unreferenced file, which the next start of the daemon deletes.

A content that the store cannot take is recorded without a snapshot; the scan goes on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from casparian_flow.config import DatabaseSettings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import snapshots as references
from casparian_flow.db.access import Ledger
from casparian_flow.db.snapshots import StoredContent
from casparian_flow.durable import exclusive, fsync_path, make_folder
from casparian_flow.engine import inbox
from casparian_flow.errors import LedgerError, counted
from casparian_flow.security import kernel
from casparian_flow.trees import clear_away, remove_tree

log = logging.getLogger(__name__)


RESERVE_BYTES = 1 << 30
"""Left free on the store's disk, or a twentieth of a small one: the ledger is on it too."""

FSYNCS = 8
"""Concurrent fsyncs: they share the commits of the filesystem's journal."""

MANY = 64
"""From so many files on, their whole filesystem is synced: btrfs takes 2 s for the fsyncs of a
thousand clones, and 20 ms for that."""

CANNOT_SHARE = (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS)
"""Errors of a clone between two places where cloning never works."""


class Capture:
    """Takes a file's bytes while they are hashed. This one takes nothing."""

    def begin(self, source: FileIO) -> FileIO:
        """The file to read and hash: `source` or its clone."""
        return source

    def write(self, block: bytes) -> None:
        """Take a block that was read."""

    def keep(self, content_hash: str) -> None:
        """Keep what was taken: the file was read to its end and did not change meanwhile."""

    def close(self) -> None:
        """Drop what was taken, unless it was evictions."""


NOTHING = Capture()


class _Taking(Capture):
    """Takes them into a new file of the store, as a clone or block by block.

    An error of the store ends the capture, but not the reading.
    """

    def __init__(self, store: Store, file: FileIO, copies: bool) -> None:
        self._store = store
        self._file = file
        self._copies = copies
        self._shared = False

    def begin(self, source: FileIO) -> FileIO:
        self._shared = self._store.clone(source, self._file)
        if self._shared:
            return self._file
        if not self._copies:
            self.close()
        elif not _has_room(self._file, os.fstat(source.fileno()).st_size):
            self._fail("its disk is nearly full")
        return source

    def write(self, block: bytes) -> None:
        rest = memoryview(block)
        try:
            while rest and not self._shared and not self._file.closed:
                rest = rest[os.write(self._file.fileno(), rest) :]
        except OSError as error:
            self._fail(error.strerror or str(error))

    def keep(self, content_hash: str) -> None:
        if self._file.closed or content_hash in self._store.captured:
            return
        size = os.fstat(self._file.fileno()).st_size
        self._store.captured[content_hash] = (Path(str(self._file.name)), size)
        self._file.close()
        crashpoint("snapshot.written")

    def close(self) -> None:
        if not self._file.closed:
            with contextlib.suppress(OSError):
                os.unlink(self._file.name)
            self._file.close()

    def _fail(self, why: str) -> None:
        self._store.failed(why)
        self.close()


class Store:
    """The store for one scan; it creates nothing until there is something to capture.

    Args:
        database: the ledger that the store belongs to.
    """

    def __init__(self, database: DatabaseSettings) -> None:
        self._database = database
        self._settings = database.snapshots
        self._folder = database.snapshots_folder
        self._scratch = contextlib.ExitStack()
        self._own: Path | None = None
        self._number = 0
        self._unshared: set[int] = set()
        """Devices whose files cannot share blocks with the store."""
        self._warned = False
        self._fault = ""
        self._missed = 0
        self.captured: dict[str, tuple[Path, int]] = {}
        """Content hash -> temporary file and size, since the last `placing`."""

    def close(self) -> None:
        """Delete captured contents that got no name."""
        self._scratch.close()

    def holds(self, content_hash: str) -> bool:
        """Whether a content need not be captured."""
        return self._settings.mode == "off" or self._database.snapshot(content_hash).exists()

    @contextlib.contextmanager
    def capture(self, size: int, device: int) -> Iterator[Capture]:
        """Capture a file's bytes while the block reads it; without a `keep`, they are dropped.

        Args:
            size: of the file, in bytes.
            device: of its filesystem.
        """
        copies = self._settings.mode == "copy" and size <= self._settings.copy_limit_bytes
        capture = NOTHING
        if self._settings.mode != "off" and (copies or device not in self._unshared):
            try:
                capture = _Taking(self, self._new_file(), copies)
            except OSError as error:
                self.failed(error.strerror or str(error))
        with contextlib.closing(capture):
            yield capture

    def clone(self, source: FileIO, target: FileIO) -> bool:
        """Have `target` share the blocks of `source`; False where that fails."""
        try:
            fcntl.ioctl(target, inbox.FICLONE, source.fileno())
        except OSError as error:
            if error.errno in CANNOT_SHARE:
                self._unshared.add(os.fstat(source.fileno()).st_dev)
            return False
        return True

    def failed(self, why: str, files: int = 1) -> None:
        """Note that contents could not be taken, and warn once."""
        if not self._warned:
            log.warning("versions are recorded without a snapshot: %s: %s", self._folder, why)
        self._warned = True
        self._fault = why
        self._missed += files

    @contextlib.contextmanager
    def placing(self) -> Iterator[PendingSnapshots]:
        """Give captured contents their names; the block adds the references, in a transaction.

        The lock is held meanwhile, so that no other process evicts a content before that.
        """
        captured, self.captured = self.captured, {}
        placed: list[StoredContent] = []
        with contextlib.ExitStack() as stack:
            if captured:
                try:
                    stack.enter_context(exclusive(self._folder / "lock"))
                    placed = self._place(captured)
                except OSError as error:
                    self.failed(error.strerror or str(error), len(captured))
            batch = PendingSnapshots(placed, self._settings.keep_bytes, self._fault, self._missed)
            self._fault, self._missed = "", 0
            yield batch
            crashpoint("snapshot.claimed")
            for content_hash in batch.evicted:
                with contextlib.suppress(OSError):  # unreferenced: the next sweep deletes it
                    self._database.snapshot(content_hash).unlink()
                crashpoint("snapshot.unlinked")

    def _place(self, captured: dict[str, tuple[Path, int]]) -> list[StoredContent]:
        """Make the contents durable under their names; existing files stay."""
        targets = {content_hash: self._database.snapshot(content_hash) for content_hash in captured}
        folders = sorted({target.parent for target in targets.values()})
        for folder in folders:
            folder.mkdir(mode=0o700, exist_ok=True)
        fsync_path(self._folder)
        fresh: dict[Path, Path] = {}
        for content_hash, (file, size) in captured.items():
            if _size(targets[content_hash]) == size:
                file.unlink()
            else:
                fresh[file] = targets[content_hash]
        _make_durable(list(fresh))
        crashpoint("snapshot.fsynced")
        for file, target in fresh.items():
            file.rename(target)
            crashpoint("snapshot.renamed")
        # After a crash, the name of an existing file may not be durable yet.
        _make_durable(folders)
        crashpoint("snapshot.placed")
        return [StoredContent(content_hash, size) for content_hash, (_, size) in captured.items()]

    def _new_file(self) -> FileIO:
        if self._own is None:
            self._own = self._scratch.enter_context(_scratch(self._folder))
        self._number += 1
        file = FileIO(str(self._own / str(self._number)), "x+b")
        os.fchmod(file.fileno(), 0o400)
        return file


class PendingSnapshots:
    """Contents in the store without a reference yet, for the transaction that adds it.

    Args:
        placed: the contents.
        limit: bytes that the store may hold.
        fault: why other contents were not taken; empty where none failed.
        missed: how many were not taken.
    """

    def __init__(self, placed: list[StoredContent], limit: int, fault: str, missed: int) -> None:
        self._placed = placed
        self._limit = limit
        self._fault = fault
        self._missed = missed
        self.evicted: list[str] = []
        """Hashes of contents that the transaction evicts."""

    def add_references(self, connection: Connection) -> None:
        """Reference the contents, after the versions and jobs that need them are written."""
        if not self._placed and not self._missed:
            return
        fault, missed = self._fault, self._missed
        evictions = references.add(connection, self._placed, self._limit)
        self.evicted = evictions.evicted
        if evictions.refused:
            fault = (
                f"the store is full ({self._limit} bytes, [snapshots] keep_bytes), and "
                "unfinished jobs need all of it"
            )
            missed += evictions.refused
        references.set_fault(connection, fault, missed)


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A locked folder for one scan's captured contents; those of dead scans are deleted.

    The kernel drops the lock on a folder when the process that holds it ends.
    """
    make_folder(folder.parent, mode=0o700)
    make_folder(folder, mode=0o700)
    make_folder(folder / "tmp", mode=0o700)
    with contextlib.ExitStack() as stack:
        with exclusive(folder / "lock"):
            clear_dead(folder)
            own = Path(tempfile.mkdtemp(dir=folder / "tmp"))
            stack.enter_context(_locked(own))
        stack.callback(clear_away, own)
        yield own


def clear_dead(folder: Path) -> None:
    """Delete the captured contents of dead scans; the caller holds the store's lock.

    Args:
        folder: the store.
    """
    for left in (folder / "tmp").glob("*"):
        with contextlib.suppress(OSError), _locked(left):
            remove_tree(left)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder.

    Raises:
        BlockingIOError: another scan, in this process or another, has the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _make_durable(paths: Sequence[Path]) -> None:
    """Sync these files or folders of the store.

    Raises:
        OSError: some may not be on the disk. (syncfs reports that since Linux 5.8.)
    """
    if len(paths) >= MANY and sys.platform == "linux":
        kernel.sync_filesystem(paths[0])
        return
    with ThreadPoolExecutor(FSYNCS) as pool:
        list(pool.map(fsync_path, paths))


def _has_room(file: FileIO, size: int) -> bool:
    """Whether the disk keeps its reserve with `size` more bytes in a file."""
    disk = os.fstatvfs(file.fileno())
    reserve = min(RESERVE_BYTES, disk.f_blocks * disk.f_frsize // 20)
    return disk.f_bavail * disk.f_frsize - size >= reserve


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None


# Maintenance of the store: sweep, check, report.


def sweep(ledger: Ledger) -> None:
    """Delete files without a reference, and references without a file.

    Raises:
        OSError: the store cannot be read or written.
        LedgerError: the ledger cannot be.
    """
    folder = ledger.database.snapshots_folder
    with exclusive(folder / "lock") if folder.is_dir() else contextlib.nullcontext():
        clear_dead(folder)
        referenced = set(ledger.read(references.hashes))
        existing = {file.name: file for file in folder.glob("??/*")}
        for content_hash in existing.keys() - referenced:
            existing[content_hash].unlink()
        if lost := sorted(referenced - existing.keys()):
            log.warning("%s missing in %s", counted(len(lost), "snapshot"), folder)
            ledger.write(partial(references.delete, hashes=lost))


def problems(ledger: Ledger) -> Iterator[str]:
    """A sentence for each snapshot that is missing or damaged; reads every byte of the store."""
    try:
        hashes = ledger.read(references.hashes)
    except LedgerError as error:
        yield f"the snapshots cannot be checked: {error.message}"
        return
    for content_hash in hashes:
        file = ledger.database.snapshot(content_hash)
        fault = _fault(file, content_hash)
        # A content that was evicted meanwhile is not missing.
        if fault and ledger.read(partial(references.is_referenced, content_hash=content_hash)):
            yield (
                f"snapshot {file} {fault}; jobs of that version read the file itself (delete "
                "the snapshot, then start the daemon)"
            )


def _fault(file: Path, content_hash: str) -> str:
    try:
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if digest == content_hash else f"is damaged (its content is {digest[:12]})"


def report(ledger: Ledger) -> dict[str, Any]:
    """The mode, and what the store holds, for `casparian status`.

    Whether blocks can be shared depends on filesystems, their settings and mounts, so it is tried
    with one file of each source root.
    """
    number, size = ledger.read(references.total)
    fault = ledger.read(references.fault)
    return {
        "mode": ledger.database.snapshots.mode,
        "store": str(ledger.database.snapshots_folder),
        "shares": _shares(ledger),
        "sources": {
            sample.name: _shares(ledger, os.path.join(os.fsencode(sample.root_path), sample.path))
            for sample in ledger.read(references.samples)
        },
        "snapshots": number,
        "bytes": size,
        "keep_bytes": ledger.database.snapshots.keep_bytes,
        "unprotected_jobs": ledger.read(references.unprotected),
        "fault": f"{counted(fault.files, 'version')} since {fault.since[:16]}: {fault.words}"
        if fault
        else "",
    }


def _shares(ledger: Ledger, sample: bytes = b"") -> bool | None:
    """Whether a file's blocks can be shared with the store; None where that cannot be tried.

    Args:
        sample: the file; without one, a scratch file beside the store.
    """
    folder = ledger.database.state_folder
    with contextlib.suppress(OSError), contextlib.ExitStack() as files:
        target, other = (files.enter_context(_scratch_file(folder)) for _ in range(2))
        if not sample:
            other.write(b"shared?")
            return inbox.clone(other, target)
        source = os.fdopen(inbox.open_any(sample, inbox.OPEN), "rb", buffering=0)
        return inbox.clone(files.enter_context(source), target)
    return None


def _scratch_file(folder: Path) -> FileIO:
    return tempfile.TemporaryFile(dir=folder, buffering=0)
