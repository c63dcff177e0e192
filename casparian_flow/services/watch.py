"""Scout inside the daemon: each source root is scanned when an event or its schedule says.

Events are hints, the scan is the truth. watchdog can lose events without an error, so every root
is also scanned in full on a schedule, and at once when events were lost or its observer was
replaced.

    async for folders in changes:       # held back until they are settled; None: the whole root
        scan(ledger, root, folders)

Each root has a task of its own, so that no root waits for the large files of another.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import math
import os
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from watchdog.events import (
    DirModifiedEvent,
    FileClosedNoWriteEvent,
    FileOpenedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver
from watchdog.utils import BaseThread

from casparian_flow import durable
from casparian_flow.config import ScanSettings
from casparian_flow.db import versions
from casparian_flow.db.access import Ledger
from casparian_flow.errors import LedgerError, counted
from casparian_flow.services.scan import Root, ScanReport, scan
from casparian_flow.services.scout import roots, run_in_thread

log = logging.getLogger(__name__)

WATCHING = "watching"

CHECK_SECONDS = 5.0
"""The list of roots and the observers are checked this often."""

REST_FACTOR = 10
"""A root is scanned in full for at most a tenth of the time, however long its scan takes."""

BUSY_FACTOR = 3
"""A folder in which files are written all the time is scanned for at most a quarter of the time."""

TOGETHER_SECONDS = 0.02
"""Events of one folder this close together are waited for together: a file that is created,
written and closed is found by one scan."""

GRACE_SECONDS = 5.0
"""How long after a scan an event may still announce what the scan has found."""

LONGEST_PAUSE_SECONDS = 300.0
"""An observer that fails is replaced after 1, 2, 4, ... seconds, at most after this."""

STEADY_SECONDS = 60.0
"""An observer that has lasted this long begins with a pause of 1 second again."""

_EVENTS = [
    kind
    for kind in FileSystemEvent.__subclasses__()
    # Scans open and list; a directory is `modified` with everything in it.
    if kind not in (FileOpenedEvent, FileClosedNoWriteEvent, DirModifiedEvent)
]


class Watch:
    """Watches and scans every active source root until cancelled.

    Args:
        ledger: where roots are read and findings recorded.
        settings: how often to scan.
        on_jobs: called after a scan that queued jobs.
        on_change: called after a scan since which readers are to see something else.
    """

    def __init__(
        self,
        ledger: Ledger,
        settings: ScanSettings,
        on_jobs: Callable[[], None],
        on_change: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._settings = settings
        self._on_jobs = on_jobs
        self._on_change = on_change
        self._rung = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.last: dict[str, ScanReport] = {}
        """The last full scan of each root, by name."""

    def ring(self) -> None:
        """Read the list of roots again and scan them all in full, now. From any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._rung.set)

    async def run(self) -> None:
        """Watch and scan until cancelled."""
        self._loop = asyncio.get_running_loop()
        # watchdog warns, at length, when a new folder is announced twice; that does no harm.
        warnings.filterwarnings("ignore", "Callback with id", RuntimeWarning)
        watched: dict[Root, tuple[Changes, asyncio.Task[None]]] = {}
        with _overflows(self.ring):
            async with asyncio.TaskGroup() as group:
                while True:
                    rung = self._rung.is_set()
                    self._rung.clear()
                    try:
                        active = set(await asyncio.to_thread(roots, self._ledger))
                    except LedgerError as error:
                        log.error("cannot scan the source roots: %s", error.message)
                        await asyncio.sleep(self._settings.rescan_seconds)
                        self._rung.set()
                        continue
                    for root in watched.keys() - active:  # removed, or its options changed
                        watched[root][1].cancel()
                        await asyncio.wait([watched.pop(root)[1]])
                    if rung:
                        for changes, _ in watched.values():
                            changes.scan_within(0.0)
                    for root in active - watched.keys():
                        changes = Changes(root, self._settings)
                        watched[root] = changes, group.create_task(self._follow(changes))
                    await _set_within(self._rung, CHECK_SECONDS)

    async def _follow(self, changes: Changes) -> None:
        """Scan one root whenever something changes in it."""
        state = ""
        try:
            async for folders in changes:
                try:
                    if state != changes.state:
                        state = await self._save_state(changes)
                    if folders is None:
                        await self._scan_in_full(changes)
                    else:
                        await self._scan(changes, folders)
                except LedgerError as error:
                    log.error("%s: %s", changes.root.name, error.message)
                    changes.scan_within(self._settings.rescan_seconds)
        finally:
            changes.stop.set()
            await asyncio.to_thread(changes.close)

    async def _scan(self, changes: Changes, folders: set[bytes] | None) -> ScanReport:
        """Scan these folders of a root, or all of it.

        Folders with files that are still being written are due again when the first of them may be
        at rest.
        """
        started = time.monotonic()
        work = partial(scan, self._ledger, changes.root, folders, changes.stop)
        report = await run_in_thread(changes.stop, work)
        busy = BUSY_FACTOR * (time.monotonic() - started) if folders is not None else 0.0
        for path in report.unsettled:
            changes.add(path, max(report.settles_first, busy))
        if report.job_ids:
            self._on_jobs()
        if report.change.any:
            self._on_change()
        return report

    async def _scan_in_full(self, changes: Changes) -> None:
        """Scan all of a root, and count the changes in it that no event has announced."""
        root = changes.root
        missed, since = changes.begin()
        if missed:
            some = counted(missed, "change")
            log.warning("%s: %s found by a full scan, not by file events", root.name, some)
            count = partial(versions.count_up, root_id=root.id, missed=missed)
            await self._ledger.write_soon(count)
        newest = await self._ledger.read_soon(versions.newest)
        report = await self._scan(changes, None)
        if report.versions and since < math.inf:
            found = partial(versions.found_since, root_id=root.id, after=newest, since=since)
            changes.suspect(await self._ledger.read_soon(found))
        before = self.last.get(root.name)
        if report.problem and (before is None or before.problem != report.problem):
            log.warning("%s; its files count as unchanged until it is back", report.problem)
        self.last[root.name] = report

    async def _save_state(self, changes: Changes) -> str:
        """Write into the ledger how a root is watched."""
        state, root = changes.state, changes.root
        if state != WATCHING:
            log.warning("source root %s is %s", root.name, state)
        save = partial(versions.save_scan_state, root_id=root.id, watch=state)
        await self._ledger.write_soon(save)
        return state


class Changes:
    """The changes below one source root, as an asynchronous iterator of folders to scan.

    It replaces an observer that has failed. On network filesystems, where the changes of other
    machines give no event, there is no observer.

    Attributes:
        state: `watching`, `polling: why` or `degraded: why`.
        stop: set when nobody iterates any more.
    """

    def __init__(self, root: Root, settings: ScanSettings) -> None:
        self.root = root
        self.stop = threading.Event()
        self.state = WATCHING
        self._settings = settings
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        self._scan_at = 0.0
        """When the root is scanned in full, as all times here in monotonic seconds."""
        self._lock = threading.Lock()
        self._due: dict[bytes, tuple[float, float]] = {}
        """Folder -> when it is scanned, and until when further events may put that off."""
        self._announced: set[bytes] = set()
        """Folders of the events since the last full scan began."""
        self._earlier: set[bytes] = set()
        """Folders of the events between that full scan and the one before."""
        self._suspects: list[tuple[float, bytes]] = []
        """When a full scan found a change that no event had announced, and in which folder."""
        self._since = self._observed_since = math.inf
        """When the last full scan, and the observer, started; seconds since the epoch."""
        self._observer: BaseObserver | None = None
        self._identity: tuple[int, int] | None = None
        self._started = self._start_at = 0.0
        self._failures = 0
        if kind := durable.misses_events(Path(root.path)):
            self.state = f"polling: {kind} sends no events for changes made on other machines"
            self._start_at = math.inf

    async def __aiter__(self) -> AsyncIterator[set[bytes] | None]:
        self._loop = asyncio.get_running_loop()
        check_at = 0.0
        while True:
            self._wake.clear()
            now = time.monotonic()
            if now >= check_at:
                if await run_in_thread(self.stop, self._check):
                    self._scan_at = now
                check_at = now + CHECK_SECONDS
            if self._scan_at <= now:
                self._scan_at = math.inf
                yield None
                rest = REST_FACTOR * (time.monotonic() - now)
                self.scan_within(max(self._interval(), rest))
            elif folders := self._take(now):
                yield folders
            else:
                await _set_within(self._wake, min(self._next_due(), self._scan_at, check_at) - now)

    def scan_within(self, seconds: float) -> None:
        """Have the whole root scanned after this time, or before. Called on the event loop."""
        self._scan_at = min(self._scan_at, time.monotonic() + seconds)
        self._wake.set()

    def add(self, folder: bytes, after_seconds: float) -> None:
        """Have a folder scanned after a while; called on any thread.

        What happens in a folder all the time does not put off its scan: the time counts from the
        first event that no scan has seen.
        """
        due = time.monotonic() + after_seconds
        with self._lock:
            self._announced.add(folder)
            before, latest = self._due.get(folder, (math.inf, 0.0))
            if due < before:
                self._due[folder] = due, due + TOGETHER_SECONDS
            else:
                self._due[folder] = min(due, latest), latest
        if due < before and self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake.set)

    def begin(self) -> tuple[int, float]:
        """A full scan begins.

        Returns:
            How many changes that earlier full scans found no event has announced until now; and
            since when the observer has had to announce changes, in seconds since the epoch.
        """
        with self._lock:
            self._earlier, self._announced = self._announced, set()
            late = [each for each in self._suspects if each[1] not in self._earlier]
        recent = time.monotonic() - GRACE_SECONDS
        self._suspects = [each for each in late if each[0] > recent]
        since, self._since = max(self._since, self._observed_since), time.time()
        return len(late) - len(self._suspects), since

    def suspect(self, paths: Iterable[bytes]) -> None:
        """A full scan found these files changed, since the time that `begin` gave."""
        now = time.monotonic()
        folders = (path.rpartition(b"/")[0] for path in paths)
        self._suspects += [(now, folder) for folder in folders if folder not in self._earlier]

    def close(self) -> None:
        """End the observer and its threads."""
        observer, self._observer = self._observer, None
        self._observed_since = math.inf
        if observer is not None:
            observer.stop()
            with contextlib.suppress(RuntimeError):  # it was never started
                observer.join()

    def _take(self, now: float) -> set[bytes]:
        with self._lock:
            ready = {folder for folder, (due, _) in self._due.items() if due <= now}
            for folder in ready:
                del self._due[folder]
        return ready

    def _next_due(self) -> float:
        with self._lock:
            return min((due for due, _ in self._due.values()), default=math.inf)

    def _interval(self) -> float:
        """Seconds between full scans: fewer where events cannot be relied on."""
        slow, fast = self._settings.rescan_seconds, self._settings.poll_seconds
        return slow if self.state == WATCHING else min(slow, fast)

    def _check(self) -> bool:
        """Replace an observer that has failed; it may block.

        Returns:
            Whether changes may have gone unannounced.
        """
        now = time.monotonic()
        if self._observer is not None:
            if fault := self._fault():
                self.close()
                self._fail(fault)
                return True
            if limit := _used_up(self.root.path):
                was_whole = self.state == WATCHING
                if was_whole:
                    self._fail(limit)
                return was_whole
            if self.state == WATCHING:
                if now - self._started > STEADY_SECONDS:
                    self._failures = 0
                return False
        return now >= self._start_at and self._start()

    def _fault(self) -> str:
        """What is wrong with the observer or its root; empty where nothing is."""
        assert self._observer is not None
        parts = (self._observer, *self._observer.emitters)
        threads = [each for part in parts for each in (part, *vars(part).values())]
        if not all(each.is_alive() for each in threads if isinstance(each, BaseThread)):
            return "a watcher thread ended"
        if self._identity != _identity(self.root.path):
            return "the directory was deleted or replaced"
        return ""

    def _start(self) -> bool:
        self.close()
        try:
            self._observer = Observer()
            self._observer.start()
            self._identity = _identity(self.root.path)
            self._observer.schedule(
                EventHandler(self), self.root.path, recursive=True, event_filter=_EVENTS
            )
        except (OSError, RecursionError) as error:
            # watchdog walks the tree by recursion, where Python's os.walk does.
            why = error.strerror if isinstance(error, OSError) else "too many levels deep"
            self.close()
            self._fail(f"it cannot be watched ({why})")
            return False
        self._started, self._observed_since = time.monotonic(), time.time()
        self.state = WATCHING
        return True

    def _fail(self, why: str) -> None:
        self.state = f"degraded: {why}"
        self._start_at = time.monotonic() + min(2.0**self._failures, LONGEST_PAUSE_SECONDS)
        self._failures += 1


class EventHandler(FileSystemEventHandler):
    """Adds the folder of each event to the changes of a root."""

    def __init__(self, changes: Changes) -> None:
        self._changes = changes
        self._prefix = len(os.fsencode(changes.root.path).rstrip(b"/")) + 1

    def dispatch(self, event: FileSystemEvent) -> None:
        """Called by watchdog, on its thread."""
        for path in filter(None, (event.src_path, event.dest_path)):
            name = os.fsencode(str(path))[self._prefix :]
            folders = {name.rpartition(b"/")[0]} | ({name} if event.is_directory else set())
            for folder in folders:
                self._changes.add(folder, self._changes.root.settle_seconds)


async def _set_within(event: asyncio.Event, seconds: float) -> None:
    """Wait until the event is set, at most this long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, seconds)):
            await event.wait()


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _used_up(path: str) -> str:
    """Says that the kernel refuses one more watch; watchdog skips what is beyond the limit."""
    try:
        from watchdog.observers.inotify_c import inotify_add_watch, inotify_init

        probe = inotify_init()
        if probe < 0:
            return ""
        added = inotify_add_watch(probe, os.fsencode(path), 0x100)  # IN_CREATE
        is_full = added < 0 and ctypes.get_errno() == errno.ENOSPC
        os.close(probe)
        if not is_full:
            return ""
        limit = int(Path("/proc/sys/fs/inotify/max_user_watches").read_text())
        return f"fs.inotify.max_user_watches ({limit} for all programs together) is used up"
    except (OSError, ImportError):  # there is no inotify here
        return ""


@contextlib.contextmanager
def _overflows(react: Callable[[], None]) -> Iterator[None]:
    """Call `react` when watchdog has lost events.

    It only logs that: as `Inotify queue overflowed`, beside other warnings, or as an error where it
    cannot watch directories again after one.
    """

    class _Overflow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if record.levelno >= logging.ERROR or "overflow" in message.lower():
                log.warning("file events were lost (%s): scanning everything", message)
                react()

    handler = _Overflow(logging.WARNING)
    logger = logging.getLogger("watchdog")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
