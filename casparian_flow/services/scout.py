"""Scout: find what changed under a source root and record it, with its jobs, in one transaction.

A scan compares the stat of every file with the ledger's, a directory's digest first. Where it
differs the file is hashed, and a new hash is a new version. Events only choose which directories
are scanned sooner.

Every content that is settled at a scan becomes a version. A file that changed less than the settle
window ago is not settled; a file whose timestamps are too recent for the clock's granularity is
hashed again at the next scan (git's racy rule). docs/detection.md says what a scan cannot detect.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

from casparian_flow.config import ScanSettings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import versions
from casparian_flow.db.access import Connection, Ledger
from casparian_flow.db.routing import Routing
from casparian_flow.db.versions import ScrubTarget
from casparian_flow.errors import LedgerError, SourceError
from casparian_flow.services import inventory, outputs, walk
from casparian_flow.services.scan import Root, ScanReport, hash_file, scan
from casparian_flow.services.store import NOTHING, Store

if TYPE_CHECKING:
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session

    from casparian_flow.db.models import SourceRoot

log = logging.getLogger(__name__)


SETTLE_ROUNDS = 5
"""Scans that a one-shot scan spends on files that keep changing."""


class Scout:
    """Scans source roots on behalf of a script that has a Session."""

    def __init__(self, db: Session) -> None:
        """Bind to a session over `get_engine(...)`."""
        self._db = db

    def scan_source(self, root: SourceRoot) -> ScanReport:
        """Scan one root: when this returns, versions are recorded and their jobs queued.

        It works beside a daemon and without one, and waits for files to settle. What the session
        has pending is committed first, and its objects are expired after the scan, so that they
        show what it recorded.

        Raises:
            SourceError: the root is missing or unreadable; nothing was changed.
            LedgerError: the ledger could not be written; finished batches stay recorded.
        """
        self._db.add(root)
        self._db.commit()
        known = Root.of(root)
        self._db.commit()
        with Ledger(cast("Engine", self._db.get_bind())) as ledger:
            inventory.before_scan(ledger.database, ledger)
            report = scan_until_settled(ledger, known)
        self._db.expire_all()
        if report.problem:
            raise SourceError(
                report.problem, "mount or restore it, then scan again; nothing was changed"
            )
        return report


def scan_until_settled(
    ledger: Ledger, root: Root, stop: threading.Event | None = None, *, believe: bool = False
) -> ScanReport:
    """A full scan, then further scans of the directories whose files were not settled.

    What deleted files took along from readers, and files that are back brought again, the sinks
    are told; a daemon does that if one runs.

    Args:
        believe: mark missing files as deleted, however many (`services.scan`).
    """
    stop = stop or threading.Event()
    report = scan(ledger, root, believe=believe)
    for _ in range(SETTLE_ROUNDS):
        if not report.unsettled or report.problem or stop.wait(report.settles_in):
            break
        again = scan(ledger, root, only=report.unsettled)
        report.versions += again.versions
        report.job_ids += again.job_ids
        report.gone += again.gone
        report.moved += again.moved
        report.change = report.change.plus(again.change)
        report.unreadable = list(dict.fromkeys([*report.unreadable, *again.unreadable]))
        report.unsettled, report.settles_in = again.unsettled, again.settles_in
        report.writing = again.writing
        report.problem = again.problem
        left = len(again.unsettled)
        ledger.write(partial(versions.save_scan_state, root_id=root.id, unsettled=left))
    report.untold = outputs.tell_without_daemon(ledger)
    return report


def roots(ledger: Ledger, names: Sequence[str] = ()) -> list[Root]:
    """The active source roots, or those named.

    Raises:
        SourceError: a name that is no active root.
    """
    active = [Root.of(row) for row in ledger.read(versions.active_roots)]
    unknown = set(names) - {root.name for root in active}
    if unknown:
        known = ", ".join(root.name for root in active) or "none"
        raise SourceError(
            f"no active source root is named {', '.join(sorted(unknown))}; the active ones "
            f"are: {known}",
            "casparian source list",
        )
    return [root for root in active if not names or root.name in names]


# Scrub: read every file again, whatever its timestamps say.
#
# A write through mmap into a page that is dirty already, a decaying disk, or a clock that was set
# back to the tick of an earlier edit leave a file's timestamps as they were. Only reading the file
# detects that. A scrub reads the locations in order of their ids, saves how far it has come, and
# keeps to a number of bytes a second; scans go on beside it. What it reads and the store has never
# had, it captures: what was recorded while keeping was paused, switched off, or not yet invented.


LOOKS = 5
"""Other bytes are recorded once two readings in a row agree; readings of a file, at most."""

LOOK_SECONDS = 60.0
"""Pause between two checks whether a scrub is due."""


@dataclass
class ScrubReport:
    """What a scrub found."""

    source: str
    files: int = 0
    """Files read."""
    hidden: list[str] = field(default_factory=list)
    """Files with other bytes than their version's, and the same timestamps."""
    unreadable: list[str] = field(default_factory=list)
    """`path: why`, for each file that could not be read."""
    job_ids: list[int] = field(default_factory=list)
    """Jobs queued."""
    finished: bool = False
    """Whether it has read every file."""


def scrub(
    ledger: Ledger,
    root: Root,
    stop: threading.Event | None = None,
    *,
    bytes_per_second: float | None = None,
    anew: bool = False,
) -> ScrubReport:
    """Read the present files of a root again, from where the last scrub of it stopped.

    Args:
        stop: ends it when set; the next scrub goes on from there.
        bytes_per_second: None for no limit.
        anew: begin with the first file.

    Raises:
        LedgerError: the ledger could not be written; what was found before is recorded.
    """
    with contextlib.closing(Store(ledger)) as store:
        return _Scrub(ledger, root, stop or threading.Event(), bytes_per_second, store).run(anew)


class _Scrub:
    """The state of one scrub of one root."""

    def __init__(
        self,
        ledger: Ledger,
        root: Root,
        stop: threading.Event,
        bytes_per_second: float | None,
        store: Store,
    ) -> None:
        self.ledger = ledger
        self.root = root
        self.stop = stop
        self.bytes_per_second = bytes_per_second
        self.store = store
        self.report = ScrubReport(root.name)

    def run(self, anew: bool) -> ScrubReport:
        state = self.ledger.read(lambda c: versions.scan_state(c, self.root.id))
        after = 0 if anew or state is None else state.scrub_after
        try:
            descriptor = os.open(self.root.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            self.report.unreadable.append(f"{self.root.name}: {error.strerror}")
            return self.report
        try:
            while targets := self._next(after):
                for target in targets:
                    self._read_again(descriptor, target)
                    if self.store.is_full:
                        self._place()
                    if self.stop.is_set():
                        return self.report
                    after = target.location_id
                self._place()
                self._note(scrub_after=after)
                crashpoint("scrub.noted")
        finally:
            os.close(descriptor)
        self._note(scrub_after=0, scrubbed=time.time())
        self.report.finished = True
        return self.report

    def _next(self, after: int) -> list[ScrubTarget]:
        return self.ledger.read(lambda c: versions.scrub_batch(c, self.root.id, after))

    def _note(self, **values: float) -> None:
        self.ledger.write(lambda c: versions.save_scan_state(c, self.root.id, **values))

    def _read_again(self, root: int, target: ScrubTarget) -> None:
        """Compare one file with its version; a file with another stat is left to the next scan."""
        folder, _, name = target.path.rpartition(b"/")
        try:
            descriptor = walk.open_folder(root, folder)
            try:
                content_hash = self._at_rest(name, descriptor, target)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            return
        except OSError as error:
            self.report.unreadable.append(f"{self._subject(target)}: {error.strerror}")
            return
        self.report.files += 1
        if content_hash is not None:
            self._record(target, content_hash)

    def _at_rest(self, name: bytes, folder: int, target: ScrubTarget) -> str | None:
        """The file's hash, where its bytes differ from the version's and stay the same; else None.

        The timestamps do not show whether the file is still being written, so it is read until two
        readings, a settle window apart, agree.
        """
        last = target.content_hash
        for _ in range(LOOKS):
            _drop_cached(name, folder)
            is_new = not target.captured or last != target.content_hash
            capture = self.store.capture() if is_new else NOTHING
            with contextlib.closing(capture):
                content = hash_file(name, folder, self.stop, self._pace, capture)
                if content and content[0] == last:
                    capture.keep(last)
            if content is None or content[1] != target.stat or content[0] == target.content_hash:
                return None
            if content[0] == last:
                return last
            last = content[0]
            if self.stop.wait(self.root.settle_seconds):
                return None
        return None

    def _place(self) -> None:
        """Put what was captured of unchanged files into the store."""
        if self.store.small or self.store.files:
            with self.store.placing() as placed:
                self.ledger.write(placed.record)
                crashpoint("scrub.placed")

    def _pace(self, length: int) -> None:
        if self.bytes_per_second is not None:
            self.stop.wait(length / self.bytes_per_second)

    def _record(self, target: ScrubTarget, content_hash: str) -> None:
        subject = f"file {self._subject(target)}"
        routing = self.ledger.read(Routing)

        def work(connection: Connection) -> versions.RecordResult:
            recorded = versions.record_scrubbed(
                connection, self.root.id, subject, target, content_hash, routing
            )
            placed.record(connection)
            return recorded

        with self.store.placing() as placed:
            recorded = self.ledger.write(work)
            crashpoint("scrub.recorded")
        if recorded.versions:
            self.report.hidden.append(self._subject(target))
            self.report.job_ids += recorded.job_ids

    def _subject(self, target: ScrubTarget) -> str:
        return f"{self.root.name}/{versions.display(target.path)}"


def _drop_cached(name: bytes, folder: int) -> None:
    """Drop a file's clean pages from the cache, so that the disk is read."""
    if not hasattr(os, "posix_fadvise"):
        return
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=folder)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


class Scrubber:
    """Scrubs every active source root when it is due, until cancelled.

    Args:
        on_jobs: called after a scrub that queued jobs.
    """

    def __init__(self, ledger: Ledger, settings: ScanSettings, on_jobs: Callable[[], None]) -> None:
        self._ledger = ledger
        self._settings = settings
        self._on_jobs = on_jobs
        self._stop = threading.Event()

    async def run(self) -> None:
        """Scrub the roots that are due, one at a time; none with `scrub_days = 0`."""
        import asyncio

        while self._settings.scrub_days:
            try:
                for root in await asyncio.to_thread(self._due):
                    await self._scrub(root)
            except LedgerError as error:
                log.error("cannot read files again to find hidden changes: %s", error.message)
            await asyncio.sleep(LOOK_SECONDS)

    async def _scrub(self, root: Root) -> None:
        pace = float(self._settings.scrub_bytes_per_second)
        work = partial(scrub, self._ledger, root, self._stop, bytes_per_second=pace)
        report = await run_in_thread(self._stop, work)
        for path in report.hidden:
            log.warning("%s changed, but its size and timestamps did not", path)
        for problem in report.unreadable:
            log.warning("reading files again: %s", problem)
        if report.job_ids:
            self._on_jobs()

    def _due(self) -> list[Root]:
        return [root for root in roots(self._ledger) if self._is_due(root)]

    def _is_due(self, root: Root) -> bool:
        state = self._ledger.read(lambda c: versions.scan_state(c, root.id))
        if state is None or not state.finished or state.problem:
            return False
        # A time in the future means that the clock has been set back since.
        rested = 0 <= time.time() - state.scrubbed < self._settings.scrub_days * 86_400
        return bool(state.scrub_after) or not rested


T = TypeVar("T")

_THREADS = ThreadPoolExecutor(64, "scout")
"""Not the event loop's, which others need: a scan may hash for minutes. Made when needed."""


async def run_in_thread(stop: threading.Event, work: Callable[[], T]) -> T:
    """Run `work` on one of Scout's threads, and raise what it raises.

    On cancellation `stop` is set and the thread is waited for, since what it uses is closed next.
    """
    import asyncio

    working = asyncio.get_running_loop().run_in_executor(_THREADS, work)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([working])
        raise
