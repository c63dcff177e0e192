"""The store: the bytes of versions, so that they outlive their files.

A scan captures a file's bytes while it hashes them: small ones in memory, larger ones in a clone
where the filesystem shares blocks, else block by block. What was captured becomes durable in the
store (`engine.contents`) before the transaction that records the versions, and that transaction
also records that the store has them (`db.kept`). Eviction is the other way round. A crash in
between leaves bytes that no row names; the next start of the daemon deletes them.

A version whose bytes the store cannot take is recorded without them; the scan goes on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import FileIO
from pathlib import Path

from casparian_flow import durable
from casparian_flow.config import DatabaseSettings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import kept
from casparian_flow.db.access import Connection, Ledger
from casparian_flow.db.kept import Content
from casparian_flow.durable import exclusive, fsync_path, make_folder
from casparian_flow.engine import inbox
from casparian_flow.engine.contents import FAULTS, SMALL_BYTES, SmallContents, content_file, words
from casparian_flow.security import kernel

log = logging.getLogger(__name__)


LARGEST_BYTES = 32 << 30
"""Size of the store, at most, where `keep_bytes` leaves it to us."""

RESERVE_BYTES = 1 << 30
"""Left free on the store's disk, or a twentieth of a small one: the ledger is on it too."""

SLACK = 20
"""An eviction makes a twentieth of the store free: choosing looks at every content."""

BATCH_BYTES = 8 << 20
"""Small contents in memory, at most, before they are written."""

BLOCK_BYTES = 64 << 10
"""A smaller file is read at once."""

CHUNK = 10_000
"""Contents looked at, or evicted, in one transaction."""

FSYNCS = 8
"""Concurrent fsyncs: they share the commits of the filesystem's journal."""

MANY = 64
"""From so many files on, their whole filesystem is synced: btrfs takes 2 s for the fsyncs of a
thousand clones, and 20 ms for that."""

CANNOT_SHARE = (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS)
"""Errors of a clone between two places where cloning never works."""


class Capture:
    """Takes a file's bytes while they are hashed. This one takes nothing."""

    def begin(self, source: FileIO, status: os.stat_result) -> FileIO:
        """The file to read and hash: `source` or its clone.

        Args:
            status: of `source`.
        """
        return source

    def write(self, block: bytes) -> None:
        """Take a block that was read."""

    def keep(self, content_hash: str) -> None:
        """Keep what was taken: the file was read to its end and did not change meanwhile."""

    def close(self) -> None:
        """Drop what was taken, unless it is kept."""


NOTHING = Capture()


class _Taking(Capture):
    """Takes them into memory or into a new file of the store, as a clone or block by block.

    An error of the store ends the capture, but not the reading.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._blocks: list[bytes] | None = None
        self._file: FileIO | None = None
        self._shared = False

    def begin(self, source: FileIO, status: os.stat_result) -> FileIO:
        if not self._store.takes_more():
            return source
        if status.st_size <= SMALL_BYTES:
            self._blocks = []
            return source
        copies = status.st_size <= self._store.copy_limit
        if not copies and status.st_dev in self._store.unshared:
            return source
        try:
            self._file = self._store.new_file()
        except OSError as error:
            self._store.failed(words(error))
            return source
        self._shared = self._store.clone(source, self._file)
        if self._shared:
            return self._file
        if not copies:
            self.close()
        elif not _has_room(self._file.fileno(), status.st_size):
            self._fail("its disk is nearly full")
        return source

    def write(self, block: bytes) -> None:
        if self._blocks is not None:
            self._blocks.append(block)
        elif self._file is not None and not self._shared:
            rest = memoryview(block)
            try:
                while rest:
                    rest = rest[os.write(self._file.fileno(), rest) :]
            except OSError as error:
                self._fail(words(error))

    def keep(self, content_hash: str) -> None:
        if self._blocks is not None:
            self._store.take_small(content_hash, memoryview(b"".join(self._blocks)))
        elif self._file is not None and content_hash not in self._store.files:
            size = os.fstat(self._file.fileno()).st_size
            self._store.files[content_hash] = (Path(str(self._file.name)), size)
            self._file.close()
            self._file = None
            crashpoint("store.written")

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._file.name)
            self._file.close()
            self._file = None

    def _fail(self, why: str) -> None:
        self._store.failed(why)
        self.close()


class Store:
    """The store for one scan; it creates nothing until there is something to capture.

    Args:
        ledger: the ledger that the store belongs to.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._database = ledger.database
        self._folder = self._database.store_folder
        self._keeps = self._database.store.keep
        self._small = SmallContents(self._folder)
        self._scratch = contextlib.ExitStack()
        self._own: Path | None = None
        self._number = 0
        self._limit: int | None = None
        """Bytes that the store may hold; None until the first batch."""
        self._placed = 0
        self._warned = False
        self._fault = ""
        self._missed = 0
        self.copy_limit = self._database.store.copy_limit_bytes
        self.unshared: set[int] = set()
        """Devices whose files cannot share blocks with the store."""
        self.small: dict[str, bytes] = {}
        """Content hash -> small content captured since the last `placing`."""
        self.small_bytes = 0
        self.files: dict[str, tuple[Path, int]] = {}
        """Content hash -> temporary file and size of a large one."""
        self.block = memoryview(bytearray(BLOCK_BYTES))
        """What a scan reads small files into."""
        self.outdated: set[str] = set()
        """Contents that files had before those that `placing` comes with."""

    def close(self) -> None:
        """Delete captured contents that were not placed."""
        self._scratch.close()
        self._small.close()

    @property
    def is_full(self) -> bool:
        """Whether the captured contents should be placed soon."""
        return self.small_bytes >= BATCH_BYTES

    def capture(self) -> Capture:
        """Capture one file's bytes; the caller closes it."""
        return _Taking(self) if self._keeps else NOTHING

    def takes_more(self) -> bool:
        """Whether the scan may go on capturing: what it has placed would have to make room."""
        if self._limit is None or self._placed < self._limit:
            return True
        self.failed("this scan has filled the store ([store] keep_bytes) by itself")
        return False

    def take_small(self, content_hash: str, content: memoryview) -> bool:
        """Hold a small content until `placing`, where bytes are kept; False: it is not small."""
        if self._keeps and content_hash not in self.small and self.takes_more():
            size = len(content)
            if size > SMALL_BYTES:
                return False
            self.small[content_hash] = bytes(content)
            self.small_bytes += size
        return True

    def new_file(self) -> FileIO:
        """A new file for a large content."""
        if self._own is None:
            _make_folders(self._folder)
            own = durable.scratch(self._folder / "tmp", self._folder / "lock")
            self._own = self._scratch.enter_context(own)
        self._number += 1
        file = FileIO(str(self._own / str(self._number)), "x+b")
        os.fchmod(file.fileno(), 0o400)
        return file

    def clone(self, source: FileIO, target: FileIO) -> bool:
        """Have `target` share the blocks of `source`; False where that fails."""
        try:
            fcntl.ioctl(target, inbox.FICLONE, source.fileno())
        except OSError as error:
            if error.errno in CANNOT_SHARE:
                self.unshared.add(os.fstat(source.fileno()).st_dev)
            return False
        return True

    def failed(self, why: str, contents: int = 1) -> None:
        """Note that contents could not be taken, and warn once."""
        if not self._warned:
            log.warning("versions are recorded without their bytes: %s: %s", self._folder, why)
        self._warned = True
        self._fault = why
        self._missed += contents

    @contextlib.contextmanager
    def placing(self) -> Iterator[PlacedContents]:
        """Put what was captured into the store; the block records it, in a transaction.

        The lock is held meanwhile, so that no other process evicts a content before that.
        """
        small, files = self.small, self.files
        self.small, self.files, self.small_bytes = {}, {}, 0
        outdated, self.outdated = self.outdated, set()
        placed: list[Content] = []
        with contextlib.ExitStack() as stack:
            if small or files:
                try:
                    _make_folders(self._folder)
                    stack.enter_context(exclusive(self._folder / "lock"))
                    placed = self._place(small, files, outdated)
                except FAULTS as error:
                    self.failed(words(error), len(small) + len(files))
            batch = PlacedContents(placed, self._fault, self._missed)
            self._fault, self._missed = "", 0
            yield batch
            crashpoint("store.recorded")

    def _place(
        self,
        small: dict[str, bytes],
        files: dict[str, tuple[Path, int]],
        outdated: set[str],
    ) -> list[Content]:
        """Put those that the store lacks into it, as far as there is room."""

        def look(connection: Connection) -> tuple[set[str], int]:
            return kept.known(connection, [*small, *files]), kept.last_number(connection)

        known, last = self._ledger.read(look)
        small = {digest: content for digest, content in small.items() if digest not in known}
        for digest, (file, size) in list(files.items()):
            if digest in known and _size(content_file(self._folder, digest)) == size:
                file.unlink()
                del files[digest]
        self._fit(small, files, outdated)
        number = max(last, self._small.last() if small or files else 0)
        rows = [
            (number + n, digest, content) for n, (digest, content) in enumerate(small.items(), 1)
        ]
        number += len(rows)
        placed = self._place_files(files, number, known)
        if rows:
            try:
                self._small.add(rows)
            except FAULTS as error:
                self.failed(words(error), len(rows))
            else:
                placed += [Content(n, digest, len(content), False) for n, digest, content in rows]
        crashpoint("store.placed")
        self._placed += sum(content.size_bytes for content in placed)
        return placed

    def _fit(
        self,
        small: dict[str, bytes],
        files: dict[str, tuple[Path, int]],
        outdated: set[str],
    ) -> None:
        """Evict what may go, and drop captured contents for which there is no room even so."""
        sizes = {digest: len(content) for digest, content in small.items()}
        sizes |= {digest: size for digest, (_, size) in files.items()}  # dropped first
        held = self._ledger.read(kept.state).bytes
        self._limit = limit = budget(self._database, held)
        excess = held + sum(sizes.values()) - limit
        if excess > 0:
            excess -= evict(self._ledger, self._small, excess + limit // SLACK, outdated)
        dropped = 0
        while excess > 0 and sizes:
            digest, size = sizes.popitem()
            excess -= size
            dropped += 1
            small.pop(digest, None)
            if file := files.pop(digest, None):
                file[0].unlink()
        if dropped:
            self.failed(
                f"the store is full ({limit} bytes, [store] keep_bytes) of contents that "
                "unfinished jobs need, or that came with these",
                dropped,
            )
        if small and not _has_room(self._folder, sum(map(len, small.values()))):
            self.failed("its disk is nearly full", len(small))
            small.clear()

    def _place_files(
        self, files: dict[str, tuple[Path, int]], number: int, known: set[str]
    ) -> list[Content]:
        """Make large contents durable under their names; existing files stay."""
        targets = {digest: content_file(self._folder, digest) for digest in files}
        folders = sorted({target.parent for target in targets.values()})
        for folder in folders:
            folder.mkdir(mode=0o700, exist_ok=True)
        if folders:
            fsync_path(self._folder)
        fresh: dict[Path, Path] = {}
        for digest, (file, size) in files.items():
            if _size(targets[digest]) == size:
                file.unlink()
            else:
                fresh[file] = targets[digest]
        make_durable(list(fresh))
        crashpoint("store.fsynced")
        for file, target in fresh.items():
            file.rename(target)
            crashpoint("store.renamed")
        # After a crash, the name of an existing file may not be durable yet.
        make_durable(folders)
        return [
            Content(number + n, digest, size, True)
            for n, (digest, (_, size)) in enumerate(files.items(), 1)
            if digest not in known
        ]


class PlacedContents:
    """Contents in the store that the ledger does not name yet, for the transaction that does.

    Args:
        placed: the contents.
        fault: why other contents were not taken; empty where none failed.
        missed: how many were not taken.
    """

    def __init__(self, placed: list[Content], fault: str, missed: int) -> None:
        self._placed = placed
        self._fault = fault
        self._missed = missed

    def record(self, connection: Connection) -> None:
        """Record that the store has the contents, with the versions that have them."""
        if self._placed or self._missed:
            kept.add(connection, self._placed)
            kept.set_fault(connection, self._fault, self._missed)


def budget(database: DatabaseSettings, held: int) -> int:
    """Bytes that the store may hold.

    Args:
        held: what it holds now: the disk would be as much freer without it.
    """
    if database.store.keep_bytes:
        return database.store.keep_bytes
    folder = database.store_folder
    while not folder.exists():
        folder = folder.parent
    disk = os.statvfs(folder)
    return min(LARGEST_BYTES, (disk.f_bavail * disk.f_frsize + held) // 10)


def evict(ledger: Ledger, small: SmallContents, excess: int, outdated: Collection[str] = ()) -> int:
    """Evict contents of so many bytes, as far as they may go; the bytes that became free.

    The caller holds the store's lock.

    Args:
        outdated: as for `kept.evictable`.
    """
    chosen = ledger.read(partial(kept.evictable, excess=excess, outdated=outdated))
    freed = 0
    for start in range(0, len(chosen), CHUNK):
        numbers = chosen[start : start + CHUNK]
        evicted = ledger.write(partial(kept.evict, numbers=numbers))
        crashpoint("store.evicted")
        folder = ledger.database.store_folder
        for content in evicted:
            if content.in_file:
                with contextlib.suppress(OSError):  # no row names it: the next sweep deletes it
                    content_file(folder, content.content_hash).unlink()
                crashpoint("store.unlinked")
        with contextlib.suppress(*FAULTS):  # the same
            small.delete(content.id for content in evicted if not content.in_file)
        freed += sum(content.size_bytes for content in evicted)
    return freed


def _make_folders(folder: Path) -> None:
    make_folder(folder.parent, mode=0o700)
    make_folder(folder, mode=0o700)


def clear_dead(folder: Path) -> None:
    """Delete the captured contents of dead scans; the caller holds the store's lock.

    Args:
        folder: the store.
    """
    durable.clear_dead(folder / "tmp")


def make_durable(paths: Sequence[Path]) -> None:
    """Sync these files or folders of the store.

    Raises:
        OSError: some may not be on the disk. (syncfs reports that since Linux 5.8.)
    """
    if len(paths) >= MANY and sys.platform == "linux":
        kernel.sync_filesystem(paths[0])
        return
    if paths:
        with ThreadPoolExecutor(FSYNCS) as pool:
            list(pool.map(fsync_path, paths))


def _has_room(place: int | Path, size: int) -> bool:
    """Whether the disk of a file or folder keeps its reserve with `size` more bytes on it."""
    disk = os.statvfs(place)
    reserve = min(RESERVE_BYTES, disk.f_blocks * disk.f_frsize // 20)
    return disk.f_bavail * disk.f_frsize - size >= reserve


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None
