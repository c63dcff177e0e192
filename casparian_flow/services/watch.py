"""Scout inside the daemon: scans on a schedule, and sooner where a watcher heard something.

Events are hints, the scan is the truth. watchdog can lose events without a word, so every source
root is scanned in full again and again, and at once when the watcher says that it lost some.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator

from watchdog.events import (
    EVENT_TYPE_CLOSED_NO_WRITE,
    EVENT_TYPE_OPENED,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver, ObservedWatch

from casparian_flow.db.access import Ledger
from casparian_flow.errors import LedgerError
from casparian_flow.services.scan import Root, ScanReport, scan
from casparian_flow.services.scout import roots

log = logging.getLogger(__name__)

REST_FACTOR = 10
"""A root whose scan takes long is scanned less often: at most a tenth of the time."""


class Watch:
    """Watches every active source root until cancelled.

    Args:
        ledger: where roots are read and findings recorded.
        rescan_seconds: pause between full scans of a root.
        on_jobs: called after a scan that queued jobs.
    """

    def __init__(self, ledger: Ledger, rescan_seconds: float, on_jobs: Callable[[], None]) -> None:
        self._ledger = ledger
        self._rescan_seconds = rescan_seconds
        self._on_jobs = on_jobs
        self._full: dict[int, float] = {}
        """Root id -> when its next full scan is due (monotonic seconds)."""
        self._hints = _Hints()
        self._watchers: dict[int, tuple[Root, ObservedWatch | None]] = {}
        self._rung = True
        self._stop = threading.Event()
        self.last: dict[str, ScanReport] = {}
        """The last full scan of each root, by name."""

    def ring(self) -> None:
        """Read the list of roots again and scan them all in full, now."""
        self._rung = True
        self._hints.wake()

    async def run(self) -> None:
        """Scan what is due; sleep until something is."""
        self._hints.bind(asyncio.get_running_loop())
        # watchdog warns, at length, when a new folder is announced twice; that does no harm.
        warnings.filterwarnings("ignore", "Callback with id", RuntimeWarning)
        observer = Observer()
        observer.start()
        try:
            with _overflows(self.ring):
                while True:
                    self._hints.changed.clear()
                    await self._turn(observer)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._pause()):
                            await self._hints.changed.wait()
        finally:
            observer.stop()
            await asyncio.to_thread(observer.join)

    async def _turn(self, observer: BaseObserver) -> None:
        rung, self._rung = self._rung, False
        try:
            known = await asyncio.to_thread(roots, self._ledger)
        except LedgerError as error:
            log.error("no source root is scanned: %s", error.message)
            await asyncio.sleep(self._rescan_seconds)
            return
        self._follow(observer, known)
        for root in known:
            if rung or self._full.get(root.id, 0.0) <= time.monotonic():
                await self._scan(root, None)
            elif hinted := self._hints.due(root.id):
                await self._scan(root, hinted)

    async def _scan(self, root: Root, only: set[bytes] | None) -> None:
        started = time.monotonic()
        if only is None:
            self._hints.due(root.id, everything=True)
        scanning = asyncio.create_task(
            asyncio.to_thread(scan, self._ledger, root, only, self._stop)
        )
        try:
            report = await asyncio.shield(scanning)
        except asyncio.CancelledError:
            # The thread goes on without us: it must be gone before the ledger is.
            self._stop.set()
            await asyncio.wait([scanning])
            raise
        except LedgerError as error:
            log.error("%s: %s", root.name, error.message)
            self._full[root.id] = time.monotonic() + self._rescan_seconds
            return
        for path in report.unsettled:
            self._hints.add(root.id, path, report.settles_in)
        if report.problem:
            log.warning("%s; nothing is inferred from that", report.problem)
        if only is None:
            self.last[root.name] = report
            took = time.monotonic() - started
            pause = max(self._rescan_seconds, REST_FACTOR * took)
            self._full[root.id] = time.monotonic() + pause
        if report.job_ids:
            self._on_jobs()

    def _pause(self) -> float:
        """Seconds until something is due."""
        due = [*self._full.values(), *self._hints.times()]
        return max(
            0.0, min(due, default=time.monotonic() + self._rescan_seconds) - time.monotonic()
        )

    def _follow(self, observer: BaseObserver, known: list[Root]) -> None:
        """Watch new roots, and stop watching those that were removed or changed."""
        current = {root.id: root for root in known}
        for root_id, (root, watch) in list(self._watchers.items()):
            if current.get(root_id) != root:
                if watch:
                    observer.unschedule(watch)
                del self._watchers[root_id]
                self._full.pop(root_id, None)
                self._hints.due(root_id, everything=True)
        for root in known:
            if root.id not in self._watchers:
                self._watchers[root.id] = (root, self._watch(observer, root))

    def _watch(self, observer: BaseObserver, root: Root) -> ObservedWatch | None:
        try:
            return observer.schedule(_Handler(root, self._hints), root.path, recursive=True)
        except OSError as error:
            log.warning(
                "source root %s cannot be watched (%s): new files are found by the scan every "
                "%g s", root.name, error.strerror, self._rescan_seconds,
            )  # fmt: skip
            return None


class _Hints:
    """Directories to look at, and when; filled by the watcher's thread."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self._due: dict[int, dict[bytes, float]] = {}
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def wake(self) -> None:
        if self._loop:
            self._loop.call_soon_threadsafe(self.changed.set)

    def add(self, root_id: int, path: bytes, after_seconds: float) -> None:
        """Look at a directory after a while; an earlier time that is set already stays."""
        with self._lock:
            paths = self._due.setdefault(root_id, {})
            fresh = path not in paths
            paths.setdefault(path, time.monotonic() + after_seconds)
        if fresh:
            self.wake()

    def due(self, root_id: int, everything: bool = False) -> set[bytes]:
        """Take the directories whose time has come."""
        now = time.monotonic()
        with self._lock:
            paths = self._due.get(root_id, {})
            ready = {path for path, due in paths.items() if everything or due <= now}
            for path in ready:
                del paths[path]
        return ready

    def times(self) -> list[float]:
        with self._lock:
            return [due for paths in self._due.values() for due in paths.values()]


class _Handler(FileSystemEventHandler):
    """Turns events into hints: the directory in which something happened."""

    def __init__(self, root: Root, hints: _Hints) -> None:
        self._root = root
        self._hints = hints
        self._prefix = len(os.fsencode(root.path).rstrip(b"/")) + 1

    def dispatch(self, event: FileSystemEvent) -> None:
        if event.event_type in (EVENT_TYPE_OPENED, EVENT_TYPE_CLOSED_NO_WRITE):
            return
        for path in filter(None, (event.src_path, event.dest_path)):
            relative = os.fsencode(str(path))[self._prefix :]
            self._hints.add(self._root.id, relative.rpartition(b"/")[0], self._root.settle_seconds)


@contextlib.contextmanager
def _overflows(react: Callable[[], None]) -> Iterator[None]:
    """watchdog says in its log, and nowhere else, that it lost events: scan everything then."""

    class _Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.warning("the watcher lost events (%s): scanning everything", record.getMessage())
            react()

    ear = _Ear(logging.WARNING)
    logger = logging.getLogger("watchdog")
    logger.addHandler(ear)
    try:
        yield
    finally:
        logger.removeHandler(ear)
