"""Scout inside the daemon: one loop that scans each source root when an event or its schedule says.

Events are hints, the scan is the truth. watchdog can lose events without an error, so every root
is also scanned in full on a schedule, and at once when its watcher lost events or was started
anew. Each full scan counts the changes that no event had announced.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import math
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from watchdog.events import (
    EVENT_TYPE_CLOSED_NO_WRITE,
    EVENT_TYPE_CREATED,
    EVENT_TYPE_MOVED,
    EVENT_TYPE_OPENED,
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
from casparian_flow.services.scan import Heard, Root, ScanReport, scan
from casparian_flow.services.scout import roots, run_in_thread

log = logging.getLogger(__name__)

WATCHING = "watching"

LOOK_SECONDS = 5.0
"""The list of roots and the watchers are checked at least this often."""

REST_FACTOR = 10
"""A root is scanned in full for at most a tenth of the time, however long its scan takes."""

GRACE_SECONDS = 5.0
"""How long after a scan an event may still announce what the scan has found."""

HEARD_LIMIT = 200_000
"""Announced names kept between two full scans of a root; beyond it, none are counted as missed."""

LONGEST_PAUSE_SECONDS = 300.0
"""A watcher that fails is started again after 1, 2, 4, ... seconds, at most after this."""

STEADY_SECONDS = 60.0
"""A watcher that has lasted this long begins with a pause of 1 second again."""


class Watch:
    """Watches and scans every active source root until cancelled.

    Args:
        ledger: where roots are read and findings recorded.
        settings: how often to scan.
        on_jobs: called after a scan that queued jobs.
    """

    def __init__(self, ledger: Ledger, settings: ScanSettings, on_jobs: Callable[[], None]) -> None:
        self._ledger = ledger
        self._settings = settings
        self._on_jobs = on_jobs
        self._hints = Hints()
        self._watchers: dict[int, Watcher] = {}
        self._states: dict[int, str] = {}
        """Root id -> how it is watched, as the ledger has it."""
        self._full: dict[int, float] = {}
        """Root id -> when its next full scan is due (monotonic seconds)."""
        self._began: dict[int, float] = {}
        """Root id -> start of its last full scan (seconds since the epoch)."""
        self._rung = True
        self._stop = threading.Event()
        self.last: dict[str, ScanReport] = {}
        """The last full scan of each root, by name."""

    def ring(self) -> None:
        """Read the list of roots again and scan them all in full, now."""
        self._rung = True
        self._hints.wake()

    async def run(self) -> None:
        """Watch and scan until cancelled."""
        self._hints.bind(asyncio.get_running_loop())
        # watchdog warns, at length, when a new folder is announced twice; that does no harm.
        warnings.filterwarnings("ignore", "Callback with id", RuntimeWarning)
        try:
            with _overflows(self.ring):
                await self._loop()
        finally:
            await asyncio.to_thread(self._close)

    async def _loop(self) -> None:
        """Read the list of roots, scan those that are due, wait for a hint or the schedule."""
        while True:
            self._hints.changed.clear()
            rung, self._rung = self._rung, False
            try:
                active = await asyncio.to_thread(roots, self._ledger)
                await run_in_thread(self._stop, partial(self._follow, active))
                for root in active:
                    if rung or self._full.get(root.id, 0.0) <= time.monotonic():
                        await self._scan_in_full(root)
                    elif folders := self._hints.due(root.id):
                        await self._scan(root, folders)
                await self._count_missed(active)
                await self._save_states(active)
            except LedgerError as error:
                log.error("cannot scan the source roots: %s", error.message)
                await asyncio.sleep(self._settings.rescan_seconds)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause()):
                    await self._hints.changed.wait()

    def _follow(self, active: list[Root]) -> None:
        """Start watchers of new roots, stop those of roots that were removed or changed, and start
        those anew that have failed."""
        current = {root.id: root for root in active}
        for root_id, watcher in list(self._watchers.items()):
            if current.get(root_id) != watcher.root:
                watcher.close()
                del self._watchers[root_id]
                self._full.pop(root_id, None)
                self._states.pop(root_id, None)
                self._hints.due(root_id, everything=True)
        for root in active:
            if root.id not in self._watchers:
                self._watchers[root.id] = Watcher(root, self._hints)
            if self._watchers[root.id].look():
                self._full.pop(root.id, None)

    async def _scan_in_full(self, root: Root) -> None:
        """Scan all of a root, and set when it is scanned in full again."""
        started, began = time.monotonic(), time.time()
        self._hints.due(root.id, everything=True)
        self._hints.begin(root.id)
        report = await self._scan(root, None)
        if report is None:
            return
        before = self.last.get(root.name)
        if report.problem and (before is None or before.problem != report.problem):
            log.warning("%s; its files count as unchanged until it is back", report.problem)
        self.last[root.name] = report
        self._began[root.id] = began
        now = time.monotonic()
        self._full[root.id] = now + max(self._interval(root, report), REST_FACTOR * (now - started))

    async def _scan(self, root: Root, folders: set[bytes] | None) -> ScanReport | None:
        """Scan these folders of a root, or all of it; None where the ledger failed.

        Folders with files that are still being written are due again once the files may be at rest.
        """
        watcher = self._watchers[root.id]
        began = self._began.get(root.id, 0.0)

        def work() -> ScanReport:
            heard = watcher.heard(began, full=folders is None)
            return scan(self._ledger, root, folders, self._stop, heard=heard)

        try:
            report = await run_in_thread(self._stop, work)
        except LedgerError as error:
            log.error("%s: %s", root.name, error.message)
            self._full[root.id] = time.monotonic() + self._settings.rescan_seconds
            return None
        for path in report.unsettled:
            self._hints.add(root.id, path, report.settles_in)
        self._hints.noticed(root.id, report.fresh)
        if report.job_ids:
            self._on_jobs()
        return report

    def _interval(self, root: Root, report: ScanReport) -> float:
        """Seconds until the next full scan: fewer where events cannot be relied on."""
        watcher = self._watchers[root.id]
        if watcher.confirm(report.unheard, report.too_deep) and watcher.state == WATCHING:
            return min(GRACE_SECONDS, self._settings.rescan_seconds)
        slow, fast = self._settings.rescan_seconds, self._settings.poll_seconds
        return slow if watcher.state == WATCHING else min(slow, fast)

    async def _count_missed(self, active: list[Root]) -> None:
        """Count the changes that scans found and that no event has announced in time."""
        for root in active:
            if self._watchers[root.id].busy:
                continue
            if missed := self._hints.missed(root.id):
                some = counted(missed, "change")
                log.warning("%s: %s found by a full scan, not by file events", root.name, some)
                work = partial(versions.count_up, root_id=root.id, missed=missed)
                await self._ledger.write_soon(work)

    async def _save_states(self, active: list[Root]) -> None:
        """Write into the ledger how each root is watched, where that has changed."""
        for root in active:
            state = self._watchers[root.id].state
            if self._states.get(root.id) == state:
                continue
            if state != WATCHING:
                log.warning("source root %s is %s", root.name, state)
            work = partial(versions.save_scan_state, root_id=root.id, watch=state)
            await self._ledger.write_soon(work)
            self._states[root.id] = state

    def _pause(self) -> float:
        """Seconds until something is due."""
        now = time.monotonic()
        return max(0.0, min([*self._full.values(), *self._hints.times(), now + LOOK_SECONDS]) - now)

    def _close(self) -> None:
        for watcher in self._watchers.values():
            watcher.close()


@contextlib.contextmanager
def _overflows(react: Callable[[], None]) -> Iterator[None]:
    """Call `react` when watchdog has lost events: it only logs that."""

    class _Overflow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.warning("file events were lost (%s): scanning everything", record.getMessage())
            react()

    handler = _Overflow(logging.WARNING)
    logger = logging.getLogger("watchdog")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


# Where to look sooner, and which files events have announced.


class Hints:
    """Directories to look at, and when; filled by the watchers' threads."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self._due: dict[int, dict[bytes, float]] = {}
        self._heard: dict[int, set[bytes]] = {}
        """Root id -> names announced since its last full scan began."""
        self._before: dict[int, set[bytes]] = {}
        """Root id -> names announced between that scan and the full scan before it."""
        self._silent: dict[int, dict[bytes, float]] = {}
        """Root id -> changed files that no event announced, and when they count as missed;
        `_COUNTED` once they are counted."""
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Set `changed` on this loop from now on."""
        self._loop = loop

    def wake(self) -> None:
        """Set `changed`, from any thread."""
        if self._loop:
            self._loop.call_soon_threadsafe(self.changed.set)

    def add(self, root_id: int, folder: bytes, after_seconds: float, name: bytes = b"") -> None:
        """Have a directory scanned after a while; an earlier time that is set already stays.

        Args:
            name: relative path of what was announced, a file or a directory with all below it.
        """
        with self._lock:
            folders = self._due.setdefault(root_id, {})
            fresh = folder not in folders
            folders.setdefault(folder, time.monotonic() + after_seconds)
            heard = self._heard.setdefault(root_id, set())
            if name and len(heard) <= HEARD_LIMIT:
                heard.add(name)
        if fresh:
            self.wake()

    def due(self, root_id: int, everything: bool = False) -> set[bytes]:
        """Take the directories whose time has come."""
        now = time.monotonic()
        with self._lock:
            folders = self._due.get(root_id, {})
            ready = {path for path, due in folders.items() if everything or due <= now}
            for path in ready:
                del folders[path]
        return ready

    def times(self) -> list[float]:
        """When the directories are due, monotonic seconds."""
        with self._lock:
            return [due for folders in self._due.values() for due in folders.values()]

    def begin(self, root_id: int) -> None:
        """Start a new set of announced names: a full scan covers those so far."""
        with self._lock:
            self._before[root_id] = heard = self._heard.pop(root_id, set())
            self._silent[root_id] = {
                path: at
                for path, at in self._silent.get(root_id, {}).items()
                if at != _COUNTED and not _announced(path, heard)
            }

    def noticed(self, root_id: int, paths: Iterable[bytes]) -> None:
        """A scan found that these files changed since the last full scan began."""
        with self._lock:
            before = self._before.get(root_id, set())
            heard = self._heard.get(root_id, set())
            if max(len(before), len(heard)) > HEARD_LIMIT:
                return
            silent = self._silent.setdefault(root_id, {})
            for path in paths:
                if not _announced(path, before) and not _announced(path, heard):
                    silent.setdefault(path, time.monotonic() + GRACE_SECONDS)

    def missed(self, root_id: int) -> int:
        """How many noticed files no event has announced in time; each is counted once."""
        now = time.monotonic()
        with self._lock:
            silent = self._silent.get(root_id, {})
            heard = self._heard.get(root_id, set())
            ripe = [path for path, at in silent.items() if at <= now]
            silent.update(dict.fromkeys(ripe, _COUNTED))
            return sum(not _announced(path, heard) for path in ripe)


_COUNTED = math.inf


def _announced(path: bytes, heard: set[bytes]) -> bool:
    """Whether this path, or a directory above it, was announced."""
    while heard and path:
        if path in heard:
            return True
        path = path.rpartition(b"/")[0]
    return False


# A watcher of one source root, which detects when watchdog stops delivering events.
#
# watchdog can lose events without an error: a thread of it ends, by an error in a handler or of its
# own; a directory beyond the kernel's limit on watches is skipped; the root is moved away and
# another directory takes its name. So the threads are checked, and the directories that a scan has
# visited are compared with those that the kernel watches. A watcher that fails is started anew,
# after ever longer pauses, and its root is scanned more often meanwhile.
#
# On network filesystems, where the changes of other machines give no event, there is no watcher.

_IN_CREATE = 0x100

_arming = threading.Lock()


class Watcher:
    """Turns the events of one source root into hints, and says whether it gets them all.

    Its methods may block, and are called one at a time.
    """

    def __init__(self, root: Root, hints: Hints) -> None:
        self.root = root
        self._hints = hints
        self._observer: BaseObserver | None = None
        self._threads: list[threading.Thread] = []
        self._descriptors: list[int] = []
        self._identity: tuple[int, int] | None = None
        self._doubted: set[int] = set()
        """Inodes of directories that the last full scan found not watched."""
        self._trouble = ""
        self._too_deep = 0
        self._failures = 0
        self._armed = self._again = 0.0
        self._first_armed = 0.0
        self._network = durable.misses_events(Path(root.path))

    @property
    def state(self) -> str:
        """`watching`, `polling: why`, `degraded: why`, or `watching, except` what."""
        if self._network:
            return f"polling: {self._network} sends no events for changes made on other machines"
        if self._trouble:
            return f"degraded: {self._trouble}"
        if self._too_deep:
            folders = counted(self._too_deep, "folder")
            return f"{WATCHING}, except {folders} with too long a path"
        return WATCHING

    @property
    def busy(self) -> bool:
        """Whether it has events that it has not handled yet."""
        return self._observer is not None and not self._observer.event_queue.empty()

    def look(self) -> bool:
        """Check that it works, and start it if it does not.

        Returns:
            Whether it was started: no event announced what happened before.
        """
        if self._network:
            return False
        if self._observer is not None and (fault := self._fault()):
            self._fail(fault)
            self.close()
        due = self._observer is None or bool(self._trouble)
        return due and time.monotonic() >= self._again and self._arm()

    def heard(self, since: float, *, full: bool) -> Heard | None:
        """Since when it has had to announce changes, and for a full scan what it watches.

        Args:
            since: start of the last full scan, seconds since the epoch.
        """
        if not self._first_armed:
            return None
        return Heard(max(self._first_armed, since), self._inodes() if full else None)

    def confirm(self, unheard: set[int], too_deep: int = 0) -> bool:
        """Take in what a full scan found about the directories that are not watched.

        A directory that was just made may not be watched yet; one that two scans in a row name
        will not be.

        Args:
            unheard: inodes of the directories that were not watched when the scan came by.
            too_deep: directories that cannot be watched at all, for which a new start is no help.

        Returns:
            Whether the root should be scanned again soon, to be certain.
        """
        watched = self._inodes()
        still = unheard - watched if watched is not None else set()
        lost = still & self._doubted
        self._doubted = still
        self._too_deep = too_deep
        if lost:
            self._fail(f"{counted(len(lost), 'folder')} not watched{_limit(self.root.path)}")
        elif not still and self._observer is not None:
            self._trouble = ""
            if time.monotonic() - self._armed > STEADY_SECONDS:
                self._failures = 0
        return bool(still)

    def close(self) -> None:
        """End its threads."""
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.stop()
            with contextlib.suppress(RuntimeError):  # it was never started
                observer.join()
        self._threads, self._descriptors = [], []

    def _fault(self) -> str:
        """What is wrong with its threads or its root; empty where nothing is."""
        if not all(thread.is_alive() for thread in self._threads):
            return "a watcher thread ended"
        if self._identity != _identity(self.root.path):
            return "the directory was deleted or replaced"
        return ""

    def _fail(self, why: str) -> None:
        self._trouble = why
        self._again = time.monotonic() + min(2.0**self._failures, LONGEST_PAUSE_SECONDS)
        self._failures += 1

    def _arm(self) -> bool:
        self.close()
        with _arming:  # one at a time: threads and descriptors that appear meanwhile are ours
            threads, descriptors = _threads(), _inotify()
            try:
                self._observer = Observer()
                self._observer.start()
                self._identity = _identity(self.root.path)
                handler = EventHandler(self.root, self._hints)
                self._observer.schedule(handler, self.root.path, recursive=True)
            except (OSError, RecursionError) as error:
                # watchdog walks the tree by recursion, where Python's os.walk does.
                why = error.strerror if isinstance(error, OSError) else "too many levels deep"
                self._fail(f"it cannot be watched ({why})")
                self.close()
                return False
            self._threads = [*(_threads() - threads)]
            self._descriptors = [*(_inotify() - descriptors)]
        self._armed = time.monotonic()
        self._first_armed = self._first_armed or time.time()
        if not self._doubted:  # else the next scan says whether they are watched now
            self._trouble = ""
        return True

    def _inodes(self) -> frozenset[int] | None:
        """Of the directories that the kernel watches for us; None where it does not say."""
        if not self._descriptors:
            return None
        inodes: set[int] = set()
        for descriptor in self._descriptors:
            with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{descriptor}") as lines:
                inodes.update(
                    int(i, 16) for i in re.findall(r"^inotify .* ino:(\w+)", lines.read(), re.M)
                )
        return frozenset(inodes)


class EventHandler(FileSystemEventHandler):
    """Turns events into hints: the directory in which something happened."""

    def __init__(self, root: Root, hints: Hints) -> None:
        self._root = root
        self._hints = hints
        self._prefix = len(os.fsencode(root.path).rstrip(b"/")) + 1

    def dispatch(self, event: FileSystemEvent) -> None:
        """Called by watchdog, on its thread."""
        if event.event_type in (EVENT_TYPE_OPENED, EVENT_TYPE_CLOSED_NO_WRITE):
            return
        # A directory is `modified` with everything in it: that announces no file.
        announces = not event.is_directory or event.event_type in (
            EVENT_TYPE_CREATED,
            EVENT_TYPE_MOVED,
        )
        for path in filter(None, (event.src_path, event.dest_path)):
            name = os.fsencode(str(path))[self._prefix :]
            folder = name.rpartition(b"/")[0]
            wait = self._root.settle_seconds
            self._hints.add(self._root.id, folder, wait, name if announces else b"")


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if isinstance(thread, BaseThread)}


def _inotify() -> set[int]:
    """Descriptors of this process's inotify instances; none where there is no /proc."""
    descriptors = set()
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:inotify":
                    descriptors.add(int(name))
    return descriptors


def _limit(path: str) -> str:
    """The kernel's limit on watches, where it refuses one more; else empty."""
    try:
        from watchdog.observers.inotify_c import inotify_add_watch, inotify_init

        with _arming:  # a watcher must not take this descriptor for one of its own
            probe = inotify_init()
            if probe < 0:
                return ""
            added = inotify_add_watch(probe, os.fsencode(path), _IN_CREATE)
            full = added < 0 and ctypes.get_errno() == errno.ENOSPC
            os.close(probe)
        if not full:
            return ""
        with open("/proc/sys/fs/inotify/max_user_watches") as file:
            return f" (fs.inotify.max_user_watches is {int(file.read())} for all programs together)"
    except (OSError, ImportError):  # there is no inotify here
        return ""
