"""One pass over one source root: compare with the ledger, hash what differs, record it.

A directory's digest is compared first, then the stat identity of each file in it; only a file
that differs is read. What was found is written in batches, each with the jobs it gives in the
same transaction.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from sqlalchemy import Connection

from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import doubts, files, presence, roots, unsettled
from casparian_flow.db.access import Ledger
from casparian_flow.db.files import Known, Sighting, Stat
from casparian_flow.db.presence import Present
from casparian_flow.db.routing import Routing
from casparian_flow.services import walk
from casparian_flow.services.look import hash_and_capture, is_racy, unrest
from casparian_flow.services.root import Heard, Root, ScanReport
from casparian_flow.services.snapshots import Store
from casparian_flow.services.vanished import Vanished
from casparian_flow.services.walk import Ignore, Listing

BATCH_FILES = 1000
"""Sightings in one transaction, at the most."""

BATCH_SECONDS = 0.5
"""A slow scan (large files) records what it has this often."""

TORN_SECONDS = 0.05
"""Pause before a file that changed under our eyes is looked at again, at the least."""

PATH_MAX = 4096
"""Bytes of a path that the kernel takes, with the NUL at its end; no watcher gets beyond it."""

_UNMOUNTED = "is empty and on another device than before (unmounted?)"


def scan(
    ledger: Ledger,
    root: Root,
    only: Iterable[bytes] | None = None,
    stop: threading.Event | None = None,
    *,
    heard: Heard | None = None,
    believe: bool = False,
) -> ScanReport:
    """Look once, recording what is at rest.

    Args:
        only: directories (relative paths) to look at; those among their subdirectories that the
            ledger does not know are walked too. None is a full scan.
        stop: ends the scan early when set; what was found so far is recorded.
        heard: what the watcher watches, for the report to say what that leaves out.
        believe: mark what is missing as deleted, however much it is (`services.vanished`).

    Raises:
        LedgerError: the ledger could not be written; finished batches stay recorded.
    """
    vanished = Vanished(root, full=only is None, believe=believe)
    with contextlib.closing(Store(ledger.database)) as snapshots:
        scan_of = _Scan(ledger, root, stop or threading.Event(), heard, vanished, snapshots)
        return scan_of.run(only)


class _Scan:
    """The state of one pass over one root."""

    def __init__(
        self,
        ledger: Ledger,
        root: Root,
        stop: threading.Event,
        heard: Heard | None,
        vanished: Vanished,
        snapshots: Store,
    ) -> None:
        self.ledger = ledger
        self.root = root
        self.stop = stop
        self.heard = heard
        self.vanished = vanished
        self.snapshots = snapshots
        self.report = ScanReport(root.name)
        self.started = time.time()
        self._sightings: dict[bytes, Sighting] = {}
        self._folders: list[tuple[bytes, bytes | None]] = []
        self._looked: set[bytes] = set()
        self._flushed = time.monotonic()

    def run(self, only: Iterable[bytes] | None) -> ScanReport:
        try:
            self.ignore = Ignore(self.root.ignore, self.root.done_file)
        except ValueError as error:
            return self._freeze(f"has an ignore pattern that is none ({error})")
        try:
            descriptor = os.open(self.root.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            return self._freeze(f"cannot be read ({error.strerror})")
        try:
            device = Stat.of(os.fstat(descriptor)).device
            if self._looks_unmounted(descriptor, device):
                return self._freeze(_UNMOUNTED)
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
        if not self.stop.is_set():  # a part of a root says nothing of what is missing
            found = self.report
            found.gone, found.held, found.passed_over = self._write(self.vanished.settle)
            crashpoint("scan.vanished")
            self._note_writing(full=only is None)
        if only is None and not self.stop.is_set():
            self._route_all()
            self._finish(device)
        return self.report

    def _listings(self, root: int, only: Iterable[bytes] | None) -> Iterator[Listing]:
        if only is None:
            yield from walk.walk(root, self.ignore)
            return
        wanted = {walk.nearest(root, path, self.ignore) for path in only}
        seen: set[bytes] = set()
        for path in sorted(path for path in wanted if path is not None):
            # A new folder and one inside it are often named together.
            for listing in self._shallow(root, path) if path not in seen else ():
                seen.add(listing.path)
                yield listing

    def _shallow(self, root: int, path: bytes) -> Iterator[Listing]:
        """One directory, and those of its subdirectories that nobody has walked yet."""
        try:
            descriptor = walk.open_folder(root, path)
        except OSError:
            return
        try:
            listing = walk.look(descriptor, path, self.ignore)
            known = self._read(files.child_directories, path)
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
            self._folders.append((listing.path, None))
            return
        self.report.files += listing.files
        self._note_unheard(listing)
        if self._read(files.directory_digest, listing.path) == listing.digest:
            return
        # A folder's row must be there before its files' rows point to it.
        self._folders.append((listing.path, None))
        try:
            quiet = self._compare_files(listing)
            missing = self._find_gone(listing)
        except OSError as error:
            self._unreadable(listing.path, str(error.strerror))
            return
        # A sighting that lost a race was recorded as unsettled when its batch was flushed.
        if not quiet or listing.path in self.report.unsettled:
            return
        if missing:
            self.vanished.when_believed(listing.path, listing.digest)
        else:
            self._folders.append((listing.path, listing.digest))

    def _note_unheard(self, listing: Listing) -> None:
        if self.heard is not None and self.heard.inodes is not None:
            if len(os.fsencode(self.root.path)) + 1 + len(listing.path) >= PATH_MAX:
                self.report.too_deep += 1
                return
            inode = os.fstat(listing.descriptor).st_ino
            if inode not in self.heard.inodes:
                self.report.unheard.add(inode)

    def _compare_files(self, listing: Listing) -> bool:
        """Record what changed; True if no file here needs a further look."""
        quiet = True
        for chunk in walk.chunks(listing, self.ignore):
            paths = [walk.join(listing.path, name) for name, _ in chunk]
            known = self._read(files.known, paths)
            for (name, status), path in zip(chunk, paths, strict=True):
                quiet &= self._compare_file(listing, name, path, Stat.of(status), known.get(path))
            self._flush_if_due()
        return quiet

    def _compare_file(
        self, listing: Listing, name: bytes, path: bytes, found: Stat, known: Known | None
    ) -> bool:
        """Record a file if it changed and is at rest; True if it needs no further look."""
        same = known is not None and known.present and known.stat == found
        if known is not None and same and not known.racy:
            return True
        if self.stop.is_set():
            return False
        if not same and self.heard is not None and found.ctime_ns > self.heard.since * 1e9:
            self.report.fresh.append(path)
        now = time.time_ns()
        if self._lacks_marker(listing, name) or unrest(found, now, self.root.min_age_seconds) > 0:
            self.report.waiting += 1
            return False
        wait = unrest(found, now, self.root.settle_seconds)
        if wait > 0:
            self._is_written(listing, path, wait)
            return False
        try:
            content = hash_and_capture(
                name, listing.descriptor, self.stop, self.snapshots, found,
                known.content_hash if known and same else None,
            )  # fmt: skip
        except FileNotFoundError:
            return False
        except OSError as error:
            self._unreadable(path, str(error.strerror))
            self._sightings[path] = _unread(path, listing.path, found, known, str(error.strerror))
            return False
        if content is None or self._was_written(found, content[1]):
            self._is_written(listing, path, max(self.root.settle_seconds, TORN_SECONDS))
            return False
        crashpoint("scan.hashed")
        digest, looked = content
        racy = is_racy(looked, self.started)
        compared = known.version_id if known else None
        self._sightings[path] = Sighting(path, listing.path, looked, digest, racy, compared)
        return not racy

    def _is_written(self, listing: Listing, path: bytes, wait: float) -> None:
        self.report.unsettled.add(listing.path)
        self.report.writing[path] = time.time()
        self.report.settles_in = max(self.report.settles_in, wait)

    def _note_writing(self, *, full: bool) -> None:
        """Remember since when the files that are not at rest have been so."""
        writing = self.report.writing
        known = self.ledger.read(lambda c: unsettled.known(c, self.root.id))
        looked = (path for path in known if full or path.rpartition(b"/")[0] in self._looked)
        ended = [path for path in looked if path not in writing]
        room = unsettled.KEPT - len(known) + len(ended)
        began = sorted(writing.keys() - known.keys())[: max(0, room)]
        writing.update({path: known[path] for path in writing.keys() & known.keys()})
        if ended or began:
            self._write(lambda c: unsettled.change(c, self.root.id, ended, began))

    def _was_written(self, found: Stat, looked: Stat) -> bool:
        """Whether what was read is not what was found to be at rest: it was written in between."""
        root = self.root
        return looked != found and bool(
            root.settle_seconds or root.min_age_seconds or root.done_file
        )

    def _lacks_marker(self, listing: Listing, name: bytes) -> bool:
        if not self.root.done_file:
            return False
        try:
            marker = walk.marker(self.root.done_file, name)
            os.stat(marker, dir_fd=listing.descriptor, follow_symlinks=False)
        except OSError as error:
            # A marker whose name would be too long cannot be there.
            if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
                return True
            raise
        return False

    def _find_gone(self, listing: Listing) -> bool:
        """Remember what is no longer here; whether there is any.

        Raises:
            OSError: it looks as if a filesystem had been mounted here; nothing is inferred.
        """
        here = {name for name, _ in listing.entries}
        gone: list[Present] = []
        ignored: list[Present] = []
        for found in self._read(presence.present_in, listing.path):
            name = found.path.rpartition(b"/")[2]
            if name not in here and not walk.is_candidate(listing, name, self.ignore):
                (ignored if walk.is_there(listing, name) else gone).append(found)
        known_folders = self._read(files.child_directories, listing.path)
        folders = {walk.join(listing.path, name) for name in listing.folders}
        lost = [path for path in known_folders if path not in folders]
        for folder in lost:
            below = self._read(presence.present_under, folder)
            is_there = walk.is_there(listing, folder.rpartition(b"/")[2])
            (ignored if is_there else gone).extend(below)
        if gone and not self.vanished.believe and not listing.files and not listing.folders:
            device = Stat.of(os.fstat(listing.descriptor)).device
            if all(found.device not in (None, device) for found in gone):
                raise OSError(errno.ENODEV, _UNMOUNTED)
        if gone or ignored or lost:
            self.vanished.add(gone, ignored, lost)
        return bool(gone or ignored or lost)

    def _unreadable(self, path: bytes, why: str) -> None:
        self.report.unreadable.append(f"{self.root.name}/{files.display(path)}: {why}")

    def _flush_if_due(self) -> None:
        late = time.monotonic() - self._flushed > BATCH_SECONDS
        if len(self._sightings) >= BATCH_FILES or (self._sightings and late):
            self._flush()

    def _flush(self) -> None:
        """Record what was found so far; directories first, their digests last."""
        self._flushed = time.monotonic()
        if not self._sightings and not self._folders:
            return
        sightings, folders = list(self._sightings.values()), self._folders
        self._sightings, self._folders = {}, []

        def work(connection: Connection) -> files.Recorded:
            files.save_directories(connection, self.root.id, folders)
            # Of this transaction: rules that changed since the scan began route what was queued
            # for nobody when they did.
            recorded = files.record(connection, self.root.id, sightings, Routing(connection))
            if recorded.stale:
                lost = [(path, None) for path in recorded.stale]
                files.save_directories(connection, self.root.id, lost)
            doubts.uphold(connection, self.root.id, [path for path, digest in folders if digest])
            placed.claim(connection)
            crashpoint("scan.batch_written")
            return recorded

        with self.snapshots.placing() as placed:
            recorded = self._write(work)
            crashpoint("scan.batch_committed")
        self.report.versions += recorded.versions
        self.report.job_ids += recorded.job_ids
        self.report.unsettled.update(recorded.stale)

    def _route_all(self) -> None:
        """After a change of rules or plugins, give every present version the jobs it lacks."""
        state = self.ledger.read(lambda c: roots.scan_state(c, self.root.id))
        routing = self.ledger.read(Routing)
        if state is not None and state.routed == routing.fingerprint:
            return
        self.report.job_ids += route_root(self.ledger, self.root.id, routing)

    def _finish(self, device: int) -> None:
        def work(connection: Connection) -> None:
            state = roots.scan_state(connection, self.root.id)
            found = {
                "started": self.started, "finished": time.time(), "files": self.report.files,
                "unreadable": len(self.report.unreadable), "waiting": self.report.waiting,
                "unsettled": len(self.report.unsettled), "problem": "", "device": device,
            }  # fmt: skip
            if state is None or not state.finished:
                found["scrubbed"] = time.time()  # a first scan has read every file
            roots.save_scan_state(connection, self.root.id, **found)

        self._write(work)
        crashpoint("scan.finished")

    def _looks_unmounted(self, descriptor: int, device: int) -> bool:
        state = self.ledger.read(lambda c: roots.scan_state(c, self.root.id))
        if self.vanished.believe or state is None or state.device in (None, device):
            return False
        with os.scandir(descriptor) as entries:
            return next(entries, None) is None

    def _freeze(self, why: str) -> ScanReport:
        """Remember that the root cannot be seen; no deletion is inferred from that."""
        self.report.problem = f"source root {self.root.name} ({self.root.path}) {why}"
        self._write(lambda c: roots.save_scan_state(c, self.root.id, problem=self.report.problem))
        return self.report

    def _read(self, query: Any, argument: Any) -> Any:
        return self.ledger.read(lambda c: query(c, self.root.id, argument))

    def _write(self, work: Any) -> Any:
        return self.ledger.write(work)


def route_root(ledger: Ledger, root_id: int, routing: Routing) -> list[int]:
    """Queue what every present version of a root lacks; then remember that it was done."""
    job_ids: list[int] = []
    after: int | None = 0
    while after is not None:
        last = after
        chunk = partial(files.route_chunk, root_id=root_id, after=last, routing=routing)
        after, queued = ledger.write(chunk)
        job_ids += queued
        crashpoint("scan.routed")
    ledger.write(lambda c: roots.save_scan_state(c, root_id, routed=routing.fingerprint))
    crashpoint("scan.routing_noted")
    return job_ids


def _unread(path: bytes, folder: bytes, found: Stat, known: Known | None, why: str) -> Sighting:
    return Sighting(path, folder, found, "", False, known.version_id if known else None, why)
