"""One pass over one source root: compare with the ledger, hash what differs, record it.

A directory's digest is compared first, then the stat identity of each file in it; only a file
that differs is read. What was found is written in batches, each with the jobs it gives in the
same transaction.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from stat import S_ISREG
from typing import Any, NamedTuple

from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import versions
from casparian_flow.db.access import Connection, Ledger
from casparian_flow.db.routing import Routing
from casparian_flow.db.versions import (
    UNKNOWN,
    LocationState,
    NewDigest,
    PresentLocation,
    Sighting,
    Stat,
)
from casparian_flow.db.visibility import Change
from casparian_flow.services import inventory, walk
from casparian_flow.services.store import NOTHING, Capture, Store
from casparian_flow.services.vanished import Settled, Vanished
from casparian_flow.services.walk import Ignore, Listing

BATCH_FILES = 1000
"""Sightings in one transaction, at most."""

LARGE_BYTES = 64 << 20
"""What was found before a file of this size is recorded before it is read."""

BATCH_SECONDS = 0.5
"""A slow scan (large files) records what it has found this often."""

TORN_SECONDS = 0.05
"""Pause before a file that changed while it was read is read again, at least."""

_UNMOUNTED = "is empty and on another device than before (unmounted?)"


def scan(
    ledger: Ledger,
    root: Root,
    only: Iterable[bytes] | None = None,
    stop: threading.Event | None = None,
    *,
    believe: bool = False,
) -> ScanReport:
    """Scan a root once, and record the files that are settled.

    Args:
        only: directories (relative paths) to scan, with those of their subdirectories that the
            ledger does not have. None for a full scan.
        stop: ends the scan early when set; what was found so far is recorded.
        believe: mark missing files as deleted, however many (`services.vanished`).

    Raises:
        LedgerError: the ledger could not be written; finished batches stay recorded.
    """
    state = ledger.read(lambda c: versions.scan_state(c, root.id))
    if only is None and (state is None or not state.finished):
        inventory.before_first_scan(ledger)
    vanished = Vanished(root.id, root.name, full=only is None, believe=believe)
    with contextlib.closing(Store(ledger)) as store, ledger.reading() as reads:
        scan_of = _Scan(ledger, reads, root, stop or threading.Event(), vanished, store)
        return scan_of.run(only)


class _Scan:
    """The state of one pass over one root."""

    def __init__(
        self,
        ledger: Ledger,
        reads: Connection,
        root: Root,
        stop: threading.Event,
        vanished: Vanished,
        store: Store,
    ) -> None:
        self.ledger = ledger
        self.reads = reads
        self.root = root
        self.stop = stop
        self.vanished = vanished
        self.store = store
        self.report = ScanReport(root.name)
        self.started = time.time()
        self._sightings: dict[bytes, Sighting] = {}
        self._folders: dict[bytes, NewDigest] = {}
        self._mark = os.urandom(8)
        """Stands for the digest of a directory until it is compared to its end."""
        self._looked: set[bytes] = set()
        self._flushed = time.monotonic()

    def run(self, only: Iterable[bytes] | None) -> ScanReport:
        try:
            self.ignore = Ignore(self.root.ignore, self.root.done_file)
        except ValueError as error:
            return self._freeze(f"has an invalid ignore pattern ({error})")
        try:
            descriptor = os.open(self.root.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            return self._freeze(f"cannot be read ({error.strerror})")
        try:
            device = Stat.of(os.fstat(descriptor)).device
            try:
                if self._looks_unmounted(descriptor, device):
                    return self._freeze(_UNMOUNTED)
            except OSError as error:
                return self._freeze(f"cannot be read ({error.strerror})")
            for listing in self._listings(descriptor, only):
                if self.stop.is_set():
                    break
                crashpoint("scan.listed")
                if only is not None:
                    self._looked.add(listing.path)
                self._compare(listing)
            self._flush()
        finally:
            os.close(descriptor)
        if not self.stop.is_set():  # what is missing is known only at the end
            self._end(device, full=only is None)
        return self.report

    def _end(self, device: int, *, full: bool) -> None:
        """Record what is missing, what is unsettled, and, of a full scan, that it has ended.

        A scan of a few directories that changes nothing of this writes nothing.
        """
        ended, began = self._note_writing(full=full)
        if not (full or ended or began or self.vanished.is_due(self.reads)):
            return
        # Two scans at once, of a folder that is away now, may have left these.
        unlinked = versions.unlinked_directories(self.reads, self.root.id) if full else []

        def work(connection: Connection) -> Settled:
            settled = self.vanished.settle(connection)
            crashpoint("scan.vanished")
            versions.change_unsettled(connection, self.root.id, ended, began)
            if full:
                versions.link_directories(connection, self.root.id, unlinked)
                self._finish(connection, device)
            return settled

        report = self.report
        settled = self.ledger.change(work, self.vanished.events)
        report.gone, report.moved = settled.gone, report.moved + settled.moved
        report.held, report.passed_over = settled.held, settled.passed_over
        report.change = report.change.plus(settled.change)
        if report.unsettled:
            report.unsettled.update(self.vanished.again)
        crashpoint("scan.finished")
        if full:
            self._route_all()

    def _listings(self, root: int, only: Iterable[bytes] | None) -> Iterator[Listing]:
        if only is None:
            yield from walk.walk(root, self.ignore)
            return
        wanted = {walk.nearest(root, path, self.ignore) for path in only}
        seen: set[bytes] = set()
        for path in sorted(path for path in wanted if path is not None):
            # Events often name a new folder together with folders inside it.
            for listing in self._shallow(root, path) if path not in seen else ():
                seen.add(listing.path)
                yield listing

    def _shallow(self, root: int, path: bytes) -> Iterator[Listing]:
        """One directory, with those of its subdirectories that the ledger does not have."""
        try:
            descriptor = walk.open_folder(root, path)
        except OSError:
            return
        try:
            listing = walk.list_directory(descriptor, path, self.ignore)
            known: list[bytes] = []
            if there := versions.directory(self.reads, self.root.id, path):
                known = versions.child_directories(self.reads, there.directory_id)
            yield listing
        finally:
            os.close(descriptor)
        for child in {walk.join(path, name) for name in listing.folders}.difference(known):
            try:
                yield from walk.walk(root, self.ignore, child)
            except OSError:
                continue

    def _compare(self, listing: Listing) -> None:
        """Bring the ledger up to date with one directory."""
        if listing.problem:
            self._unreadable(listing.path, listing.problem)
            self._folders[listing.path] = NewDigest(UNKNOWN, self._mark)
            return
        self.report.files += listing.files
        there = versions.directory(self.reads, self.root.id, listing.path)
        if there is not None and there.is_linked and there.digest == listing.digest:
            return
        # A folder's row must exist before its files' rows refer to it.
        self._folders[listing.path] = NewDigest(there.digest if there else UNKNOWN, self._mark)
        try:
            quiet = self._compare_files(listing, is_new=there is None)
            missing = there is not None and self._find_gone(listing, there.directory_id)
        except OSError as error:
            self._unreadable(listing.path, str(error.strerror))
            return
        # A flush marks the folder as unsettled where another scan recorded a file first.
        if not quiet or listing.path in self.report.unsettled:
            return
        if missing:
            self.vanished.when_believed(listing.path, NewDigest(self._mark, listing.digest))
        else:
            waits = self._folders.get(listing.path)
            before = waits.before if waits else self._mark
            self._folders[listing.path] = NewDigest(before, listing.digest)

    def _compare_files(self, listing: Listing, *, is_new: bool) -> bool:
        """Record the files that changed; True if no file here must be read again.

        Args:
            is_new: the ledger does not have the directory, so it has no file in it.
        """
        quiet = True
        prefix = walk.join(listing.path, b"")
        for chunk in walk.chunks(listing, self.ignore):
            found = [(prefix + name, name, Stat.of_identity(status)) for name, status in chunk]
            known: dict[bytes, LocationState] = {}
            if not is_new:
                paths = [path for path, _, _ in found]
                known = versions.known(self.reads, self.root.id, paths)
            for path, name, stat in found:
                quiet &= self._compare_file(listing, name, path, stat, known.get(path))
                self._flush_if_due()
        return quiet

    def _compare_file(
        self, listing: Listing, name: bytes, path: bytes, stat: Stat, known: LocationState | None
    ) -> bool:
        """Record a file if it changed and is settled; True if it need not be read again."""
        same = known is not None and known.present and known.stat == stat
        if known is not None and same and not known.racy:
            return True
        if self.stop.is_set():
            return False
        root = self.root
        if root.settle_seconds or root.min_age_seconds or root.done_file:
            now = time.time_ns()
            if self._lacks_marker(listing, name) or unrest(stat, now, root.min_age_seconds) > 0:
                self.report.waiting += 1
                self.vanished.may_move(stat)
                return False
            wait = unrest(stat, now, root.settle_seconds)
            if wait > 0:
                self._mark_unsettled(listing, path, wait)
                self.vanished.may_move(stat)
                return False
        if stat.size >= LARGE_BYTES:
            self._flush()
        try:
            content = hash_and_capture(
                name, listing.descriptor, self.stop, self.store,
                known.content_hash if known and same and known.captured else None, stat,
            )  # fmt: skip
        except FileNotFoundError:
            return False
        except OSError as error:
            self._unreadable(path, str(error.strerror))
            self._sightings[path] = _unread(path, listing.path, stat, known, str(error.strerror))
            return False
        if content is None or self._was_written(stat, content[1]):
            self._mark_unsettled(listing, path, max(root.settle_seconds, TORN_SECONDS))
            return False
        crashpoint("scan.hashed")
        digest, looked = content
        racy = is_racy(looked, self.started)
        if known and known.content_hash and known.content_hash != digest:
            self.store.outdated.add(known.content_hash)
        compared = known.version_id if known else None
        self._sightings[path] = Sighting(path, listing.path, looked, digest, racy, compared)
        return not racy

    def _mark_unsettled(self, listing: Listing, path: bytes, wait: float) -> None:
        self.report.unsettled.add(listing.path)
        self.report.writing[path] = time.time()
        self.report.settles_in = max(self.report.settles_in, wait)
        self.report.settles_first = min(self.report.settles_first or wait, wait)

    def _note_writing(self, *, full: bool) -> tuple[list[bytes], list[bytes]]:
        """Since when files have been unsettled; which are not any more, and which now are."""
        writing = self.report.writing
        known = self.ledger.read(lambda c: versions.known_unsettled(c, self.root.id))
        looked = (path for path in known if full or path.rpartition(b"/")[0] in self._looked)
        ended = [path for path in looked if path not in writing]
        room = versions.UNSETTLED_KEPT - len(known) + len(ended)
        began = sorted(writing.keys() - known.keys())[: max(0, room)]
        writing.update({path: known[path] for path in writing.keys() & known.keys()})
        return ended, began

    def _was_written(self, stat: Stat, looked: Stat) -> bool:
        """Whether a file was written after it was found settled and before it was read."""
        root = self.root
        return looked != stat and bool(
            root.settle_seconds or root.min_age_seconds or root.done_file
        )

    def _lacks_marker(self, listing: Listing, name: bytes) -> bool:
        if not self.root.done_file:
            return False
        try:
            marker = walk.marker(self.root.done_file, name)
            os.stat(marker, dir_fd=listing.descriptor, follow_symlinks=False)
        except OSError as error:
            # A marker whose name would be too long cannot exist.
            if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
                return True
            raise
        return False

    def _find_gone(self, listing: Listing, directory_id: int) -> bool:
        """Collect what is missing in a directory; whether anything is.

        Raises:
            OSError: a filesystem seems to be mounted here, or not any more; nothing is inferred.
        """
        names = {name for name, _ in listing.entries}
        gone: list[PresentLocation] = []
        ignored: list[PresentLocation] = []
        for location in versions.present_in(self.reads, directory_id):
            name = location.path.rpartition(b"/")[2]
            if name not in names and not walk.is_candidate(listing, name, self.ignore):
                is_here = walk.is_passed_over(listing, name, folder=False)
                (ignored if is_here else gone).append(location)
        known_folders = versions.child_directories(self.reads, directory_id)
        folders = {walk.join(listing.path, name) for name in listing.folders}
        lost: list[bytes] = []
        hidden: list[bytes] = []
        for folder in (path for path in known_folders if path not in folders):
            below = versions.present_under(self.reads, self.root.id, folder)
            is_here = walk.is_passed_over(listing, folder.rpartition(b"/")[2], folder=True)
            (ignored if is_here else gone).extend(below)
            (hidden if is_here else lost).append(folder)
        if gone and not self.vanished.believe and not listing.files and not listing.folders:
            device = Stat.of(os.fstat(listing.descriptor)).device
            if all(location.device not in (None, device) for location in gone):
                raise OSError(errno.ENODEV, _UNMOUNTED)
        found = (gone, ignored, lost, hidden)
        if any(found):
            self.vanished.add(*found)
        return any(found)

    def _unreadable(self, path: bytes, why: str) -> None:
        self.report.unreadable.append(f"{self.root.name}/{versions.display(path)}: {why}")

    def _flush_if_due(self) -> None:
        found = len(self._sightings)
        full = found >= BATCH_FILES or len(self._folders) >= BATCH_FILES or self.store.is_full
        if full or (found and time.monotonic() - self._flushed > BATCH_SECONDS):
            self._flush()

    def _flush(self) -> None:
        """Record what was found so far, in one transaction."""
        self._flushed = time.monotonic()
        if not (self._sightings or self._folders or self.store.small or self.store.files):
            return
        sightings, folders = list(self._sightings.values()), self._folders
        self._sightings, self._folders = {}, {}
        root_id = self.root.id

        def work(connection: Connection) -> tuple[versions.RecordResult, Settled]:
            fresh = versions.save_directories(connection, root_id, folders)
            # Read here, not when the scan begins: a change of the rules routes only the versions
            # that were recorded before it.
            routing = Routing(connection)
            recorded = versions.record(connection, root_id, sightings, routing, fresh)
            versions.invalidate_directories(connection, root_id, recorded.stale)
            moved = self.vanished.follow(connection, sightings)
            placed.record(connection)
            crashpoint("scan.batch_written")
            return recorded, moved

        with self.store.placing() as placed:
            recorded, moved = self.ledger.change(work, lambda done: self.vanished.events(done[1]))
            crashpoint("scan.batch_committed")
        self.report.versions += recorded.versions
        self.report.job_ids += recorded.job_ids
        self.report.unsettled.update(recorded.stale)
        self.report.moved += moved.moved
        self.report.change = self.report.change.plus(recorded.change).plus(moved.change)

    def _route_all(self) -> None:
        """After a change of rules or plugins, queue the jobs that present versions lack."""
        state = self.ledger.read(lambda c: versions.scan_state(c, self.root.id))
        routing = self.ledger.read(Routing)
        if state is None or state.routed != routing.fingerprint:
            self.report.job_ids += route_root(self.ledger, self.root.id, routing)

    def _finish(self, connection: Connection, device: int) -> None:
        state = versions.scan_state(connection, self.root.id)
        values = {
            "started": self.started, "finished": time.time(), "files": self.report.files,
            "unreadable": len(self.report.unreadable), "waiting": self.report.waiting,
            "unsettled": len(self.report.unsettled), "problem": "", "device": device,
        }  # fmt: skip
        if state is None or not state.finished:
            values["scrubbed"] = time.time()  # a first scan has read every file
        versions.save_scan_state(connection, self.root.id, **values)

    def _looks_unmounted(self, descriptor: int, device: int) -> bool:
        state = self.ledger.read(lambda c: versions.scan_state(c, self.root.id))
        if self.vanished.believe or state is None or state.device in (None, device):
            return False
        with os.scandir(descriptor) as entries:
            return next(entries, None) is None

    def _freeze(self, why: str) -> ScanReport:
        """Record that the root cannot be read; no deletion is inferred from that."""
        self.report.problem = f"source root {self.root.name} ({self.root.path}) {why}"
        problem = self.report.problem
        self.ledger.write(lambda c: versions.save_scan_state(c, self.root.id, problem=problem))
        return self.report


def route_root(ledger: Ledger, root_id: int, routing: Routing) -> list[int]:
    """Queue the jobs that present versions of a root lack; then record that this is done."""
    job_ids: list[int] = []
    after: int | None = 0
    begun = f"{os.urandom(8).hex()} {routing.fingerprint}"
    ledger.write(lambda c: versions.save_scan_state(c, root_id, routed=begun))
    while after is not None:
        last = after
        chunk = partial(versions.route_chunk, root_id=root_id, after=last, routing=routing)
        after, queued = ledger.write(chunk)
        job_ids += queued
        crashpoint("scan.routed")
    ledger.write(lambda c: versions.end_routing(c, root_id, begun, routing))
    crashpoint("scan.routing_noted")
    return job_ids


def _unread(
    path: bytes, folder: bytes, stat: Stat, known: LocationState | None, why: str
) -> Sighting:
    return Sighting(path, folder, stat, "", False, known.version_id if known else None, why)


# What a scan takes and returns.


class Root(NamedTuple):
    """A source root, without the ORM."""

    id: int
    path: str
    name: str
    ignore: str
    settle_seconds: float
    done_file: str = ""
    min_age_seconds: float = 0.0

    @classmethod
    def of(cls, row: Any) -> Root:
        """From a `SourceRoot`, or a row of its table."""
        return cls(*(getattr(row, name) for name in cls._fields))


@dataclass
class ScanReport:
    """What a scan found."""

    source: str
    files: int = 0
    """Files compared, unchanged ones included."""
    versions: int = 0
    """New versions recorded."""
    job_ids: list[int] = field(default_factory=list)
    """Jobs queued."""
    gone: int = 0
    """Locations marked deleted."""
    moved: int = 0
    """Locations whose files are elsewhere now."""
    held: int = 0
    """Missing locations that are not marked deleted yet, since so many vanished at once."""
    passed_over: int = 0
    """Recorded locations that are still on the disk, and that scans now pass over."""
    change: Change = field(default_factory=Change)
    """What deleted files took along from readers, and files that are back brought again."""
    untold: list[str] = field(default_factory=list)
    """A sentence for each sink that does not know of a change yet (one-shot scans)."""
    waiting: int = 0
    """Files that lack their done file or their minimum age."""
    unreadable: list[str] = field(default_factory=list)
    """`path: why`, for each file or directory that could not be read."""
    unsettled: set[bytes] = field(default_factory=set)
    """Directories with files that were not settled, or that another scan recorded first."""
    writing: dict[bytes, float] = field(default_factory=dict)
    """Unsettled files -> when they were first found so, seconds since the epoch."""
    settles_in: float = 0.0
    """Seconds until all of them could be settled."""
    settles_first: float = 0.0
    """Seconds until the first of them could be settled."""
    problem: str = ""
    """Why the root is frozen, else empty; nothing is inferred from a frozen root."""


# Hashing one file, and whether its timestamps rule out a later write.


GRANULARITY_NS = 20_000_000
"""Two writes this close may leave the same timestamps on a filesystem with a fine clock."""

COARSE_NS = 2_000_000_000
"""The same where timestamps have whole seconds only (FAT, SMB, ext3, small inodes)."""

READ_BYTES = 1 << 20

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def hash_file(
    name: bytes,
    folder: int,
    stop: threading.Event | None = None,
    on_block: Callable[[int], None] | None = None,
    capture: Capture = NOTHING,
) -> tuple[str, Stat] | None:
    """Read a file once and hash it.

    Args:
        name: its name in the directory.
        folder: descriptor of the directory.
        stop: gives up when set.
        on_block: called after each block with its length; it may block.
        capture: takes the bytes that are hashed; the caller keeps it if the hash is good.

    Returns:
        SHA-256 and the stat, or None when the file changed while it was read, is not a regular
        file any more, or `stop` was set.

    Raises:
        OSError: it cannot be opened or read.
    """
    descriptor = os.open(name, _OPEN, dir_fd=folder)
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not S_ISREG(status.st_mode):
            return None
        before = Stat.of(status)
        content = capture.begin(file, status)
        digest = hashlib.sha256()
        length = 0
        # A file that grows as fast as it is read has no end.
        while length <= before.size and (block := content.read(READ_BYTES)):
            digest.update(block)
            capture.write(block)
            length += len(block)
            if on_block:
                on_block(len(block))
            if stop and stop.is_set():
                return None
        torn = Stat.of(os.fstat(descriptor)) != before or length != before.size
    return None if torn else (digest.hexdigest(), before)


def hash_and_capture(
    name: bytes,
    folder: int,
    stop: threading.Event,
    store: Store,
    captured: str | None,
    listed: Stat | None = None,
) -> tuple[str, Stat] | None:
    """`hash_file` that also captures the bytes for the store.

    Args:
        store: the store, which may be switched off.
        captured: the recorded hash of a file that is read again only for its recent timestamps,
            and whose bytes the store has or had. It has seldom changed, so it is captured only if
            it has, which reads it twice.
        listed: the stat that the directory's listing had for it.

    Returns, Raises:
        As `hash_file`.
    """
    if listed and listed.size < len(store.block):
        small = _hash_small(name, folder, store, captured, listed)
        if small:
            return small, listed
    if captured:
        content = hash_file(name, folder, stop)
        if content is None or content[0] == captured:
            return content
    capture = store.capture()
    try:
        content = hash_file(name, folder, stop, capture=capture)
        if content:
            capture.keep(content[0])
    finally:
        capture.close()
    return content


def _hash_small(
    name: bytes, folder: int, store: Store, captured: str | None, listed: Stat
) -> str | None:
    """The hash of a small file that is still as it was listed after it was read; else None.

    It is read at once, and captured from there.
    """
    descriptor = os.open(name, _OPEN, dir_fd=folder)
    try:
        length = os.readv(descriptor, [store.block])
        if length != listed.size or versions.identity(os.fstat(descriptor)) != listed:
            return None
    except OSError:  # what it is then, the long way says
        return None
    finally:
        os.close(descriptor)
    content = store.block[:length]
    digest = hashlib.sha256(content).hexdigest()
    if digest == captured or store.take_small(digest, content):
        return digest
    return None


def newest_stamp(stat: Stat, now_ns: int) -> int:
    """When the file last changed by its timestamps, without an mtime in the future."""
    return stat.ctime_ns if stat.mtime_ns > now_ns else max(stat.mtime_ns, stat.ctime_ns)


def is_racy(stat: Stat, started: float) -> bool:
    """Whether a write after this stat could leave the same timestamps.

    The rule is git's (Documentation/technical/racy-git.txt), with the scan's start as the time of
    the stat and a margin for the granularity of the filesystem's clock.
    """
    coarse = stat.ctime_ns % 1_000_000_000 == 0
    started_ns = int(started * 1e9)
    granularity = COARSE_NS if coarse else GRANULARITY_NS
    return newest_stamp(stat, started_ns) + granularity >= started_ns


def unrest(stat: Stat, now_ns: int, seconds: float) -> float:
    """Seconds until a file with these timestamps has not changed for `seconds`; 0 if it has not.

    A ctime in the future means that the clock was set back. The file's age is unknown then, so the
    file is taken, and is racy until the clock has passed its timestamps. A clock that is set
    forward makes every file look old; only the next write shows that a file was not settled.
    """
    if seconds == 0 or stat.ctime_ns > now_ns + COARSE_NS:
        return 0.0
    return max(0.0, seconds - (now_ns - newest_stamp(stat, now_ns)) / 1e9)
