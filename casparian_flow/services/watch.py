"""Scout inside the daemon: each source root is scanned when an event or its schedule says.

Events are hints, the scan is the truth. watchdog can lose events without an error, so every root
is also scanned in full on a schedule, and at once when its observer is replaced.

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
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

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
"""An observer that fails is replaced at once, then after 1, 3, 7, ... seconds, at most after this.
One that has lasted for STEADY_SECONDS is replaced at once again."""

STEADY_SECONDS = 60.0

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
                except (LedgerError, OSError) as error:
                    log.error("%s: %s", changes.root.name, error)
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
            changes.put_off(path, max(report.settles_first, busy))
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


class _Suspect(NamedTuple):
    """A change that a full scan found and no event had announced."""

    found: float
    folder: bytes
    after: float
    """It happened after this."""


class Changes:
    """The changes below one source root, as an asynchronous iterator of folders to scan.

    It replaces an observer that has failed, or that did not announce what a scan then found. On
    network filesystems, where the changes of other machines give no event, there is no observer.
    All times are in monotonic seconds, except where they are said to be seconds since the epoch.

    Attributes:
        state: `watching`, `polling: why` or `degraded: why`; empty before the first check.
        stop: set when nobody iterates any more.
    """

    def __init__(self, root: Root, settings: ScanSettings) -> None:
        self.root = root
        self.stop = threading.Event()
        self.state = ""
        self._settings = settings
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        self._scan_at = self._check_at = 0.0
        """When the root is scanned in full, and when its observer is checked."""
        self._lock = threading.Lock()
        self._due: dict[bytes, tuple[float, float]] = {}
        """Folder -> when it is scanned, and until when further events may put that off."""
        self._sleeps_until = 0.0
        self._announced: set[bytes] = set()
        """Folders of the events since the last full scan began."""
        self._earlier: set[bytes] = set()
        """Folders of the events between that full scan and the one before."""
        self._suspects: list[_Suspect] = []
        self._begun = self._before = 0.0
        """When the last full scan began, and the one before it."""
        self._since = self._observed_since = math.inf
        """When the last full scan began, and the root was first observed without a break; seconds
        since the epoch."""
        self._observer: BaseObserver | None = None
        self._identity: tuple[int, int] | None = None
        self._lost = ""
        """Why the observer is not trusted any more."""
        self._loss_handler = _LossHandler(self)
        self._started = self._retry_at = self._pause = 0.0

    async def __aiter__(self) -> AsyncIterator[set[bytes] | None]:
        self._loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            now = time.monotonic()
            if now >= self._check_at:
                self._check_at = now + CHECK_SECONDS
                if await run_in_thread(self.stop, self._check):
                    self._scan_at = now
            if self._scan_at <= now:
                self._scan_at = math.inf
                yield None
                rest = REST_FACTOR * (time.monotonic() - now)
                self.scan_within(max(self._interval(), rest))
            elif folders := self._take(now):
                yield folders
            else:
                await _set_within(self._wake, self._next_at() - now)

    def scan_within(self, seconds: float) -> None:
        """Have the whole root scanned after this time, or before. Called on the event loop."""
        self._scan_at = min(self._scan_at, time.monotonic() + seconds)
        self._wake.set()

    def announce(self, folder: bytes) -> None:
        """An event says that something changed in a folder; called on any thread.

        What happens in a folder all the time does not put off its scan: the settle window counts
        from the first event that no scan has seen.
        """
        due = time.monotonic() + self.root.settle_seconds
        with self._lock:
            self._announced.add(folder)
            first, latest = self._due.get(folder, (due, due + TOGETHER_SECONDS))
            self._due[folder] = max(first, min(due, latest)), latest
            wakes = due < self._sleeps_until
        if wakes:
            self._wake_up()

    def put_off(self, folder: bytes, seconds: float) -> None:
        """Have a folder scanned again after this time, whatever events say."""
        due = time.monotonic() + seconds
        with self._lock:
            self._due[folder] = due, due

    def begin(self) -> tuple[int, float]:
        """A full scan begins.

        Returns:
            How many changes that earlier full scans found no event has announced until now; and
            since when the observer has had to announce changes, in seconds since the epoch.
        """
        with self._lock:
            self._earlier, self._announced = self._announced, set()
        now = time.monotonic()
        silent = [each for each in self._suspects if each.folder not in self._earlier]
        missed = [each for each in silent if each.found <= now - GRACE_SECONDS]
        self._suspects = [each for each in silent if each.found > now - GRACE_SECONDS]
        if self.state == WATCHING and any(each.after > self._started for each in missed):
            self.fail("it did not announce what a scan found")
        self._before, self._begun = self._begun, now
        since, self._since = max(self._since, self._observed_since), time.time()
        return len(missed), since

    def suspect(self, paths: Iterable[bytes]) -> None:
        """A full scan found these files changed, since the time that `begin` gave."""
        now = time.monotonic()
        folders = (path.rpartition(b"/")[0] for path in paths)
        self._suspects += [
            _Suspect(now, folder, self._before) for folder in folders if folder not in self._earlier
        ]

    def fail(self, why: str) -> None:
        """Have the observer replaced, and then the root scanned in full; called on any thread."""
        self._lost, self._check_at = why, 0.0
        self._wake_up()

    def is_observed_by(self, thread: int | None) -> bool:
        """Whether a thread, by its identifier, is one of the observer's."""
        return thread in {each.ident for each in self._threads()}

    def close(self) -> None:
        """End the observer and its threads."""
        observer, self._observer = self._observer, None
        logging.getLogger("watchdog").removeHandler(self._loss_handler)
        if observer is not None:
            observer.stop()
            with contextlib.suppress(RuntimeError):  # it was never started
                observer.join()

    def _wake_up(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake.set)

    def _take(self, now: float) -> set[bytes]:
        with self._lock:
            ready = {folder for folder, (due, _) in self._due.items() if due <= now}
            for folder in ready:
                del self._due[folder]
        return ready

    def _next_at(self) -> float:
        with self._lock:
            first = min((due for due, _ in self._due.values()), default=math.inf)
            self._sleeps_until = min(first, self._scan_at, self._check_at)
        return self._sleeps_until

    def _interval(self) -> float:
        """Seconds between full scans: fewer where events cannot be relied on."""
        slow, fast = self._settings.rescan_seconds, self._settings.poll_seconds
        return slow if self.state == WATCHING else min(slow, fast)

    def _check(self) -> bool:
        """Start the observer, or another one in place of one that failed; it may block.

        Returns:
            Whether changes may have gone unannounced.
        """
        if fault := self._fault():
            log.warning("%s: file events are unreliable: %s", self.root.name, fault)
            if time.monotonic() - self._started > STEADY_SECONDS:
                self._pause = 0.0
            self.close()
            self._fail(fault)
        is_due = self.state != WATCHING and time.monotonic() >= self._retry_at
        is_new = is_due and self._start()
        if self._observer is None:
            self._observed_since = math.inf
        return bool(fault) or is_new

    def _threads(self) -> list[BaseThread]:
        observer = self._observer
        parts = (observer, *observer.emitters) if observer is not None else ()
        threads = (each for part in parts for each in (part, *vars(part).values()))
        return [each for each in threads if isinstance(each, BaseThread)]

    def _fault(self) -> str:
        """What is wrong with the observer or its root; empty where nothing is."""
        if self._observer is None:
            return ""
        if not all(thread.is_alive() for thread in self._threads()):
            return "a watcher thread ended"
        if self._identity != _identity(self.root.path):
            return "the directory was deleted or replaced"
        return self._lost or (_used_up(self.root.path) if self.state == WATCHING else "")

    def _start(self) -> bool:
        """Whether there is an observer now."""
        self.close()
        if kind := durable.misses_events(Path(self.root.path)):
            self.state = f"polling: {kind} sends no events for changes made on other machines"
            self._retry_at = time.monotonic() + LONGEST_PAUSE_SECONDS
            return False
        self._lost = ""
        try:
            self._observer = Observer()
            self._observer.start()
            logging.getLogger("watchdog").addHandler(self._loss_handler)
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
        self._started = time.monotonic()
        self._observed_since = min(self._observed_since, time.time())
        if limit := _used_up(self.root.path):
            self._fail(limit)
        else:
            self.state = WATCHING
        return True

    def _fail(self, why: str) -> None:
        self.state = f"degraded: {why}"
        self._retry_at = time.monotonic() + self._pause
        self._pause = min(2 * self._pause + 1, LONGEST_PAUSE_SECONDS)


class EventHandler(FileSystemEventHandler):
    """Announces the folder of each event to the changes of a root."""

    def __init__(self, changes: Changes) -> None:
        self._changes = changes
        self._prefix = len(os.fsencode(changes.root.path).rstrip(b"/")) + 1

    def dispatch(self, event: FileSystemEvent) -> None:
        """Called by watchdog, on its thread."""
        for path in filter(None, (event.src_path, event.dest_path)):
            name = os.fsencode(str(path))[self._prefix :]
            self._changes.announce(name.rpartition(b"/")[0])
            if event.is_directory:
                self._changes.announce(name)


class _LossHandler(logging.Handler):
    """Fails the observer of a root that has lost events.

    watchdog only logs that, on the observer's thread: as `Inotify queue overflowed`, beside other
    warnings, or as an error where it cannot watch directories again. It watches all of them again
    after an overflow, which in a large tree overflows the queue again, for ever; so the observer is
    replaced.
    """

    def __init__(self, changes: Changes) -> None:
        super().__init__(logging.WARNING)
        self._changes = changes

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        is_loss = record.levelno >= logging.ERROR or "overflow" in message.lower()
        if is_loss and self._changes.is_observed_by(record.thread):
            self._changes.fail("events were lost")


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
