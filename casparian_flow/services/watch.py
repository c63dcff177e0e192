"""Scout inside the daemon: scans on a schedule, and sooner where a watcher heard something.

Events are hints, the scan is the truth. watchdog can lose events without a word, so every source
root is scanned in full again and again, and at once when a watcher lost some or was armed anew.
Each full scan also tells what the watcher should have announced and did not.
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
from casparian_flow.errors import LedgerError
from casparian_flow.services.scan import Heard, Root, ScanReport, scan
from casparian_flow.services.scout import aside, roots

log = logging.getLogger(__name__)


# What the watcher said: where to look sooner, and of which files it has spoken.


HEARD_LIMIT = 200_000
"""Names kept between two full scans of a root; above it nothing is said of missed ones."""

GRACE_SECONDS = 5.0
"""How long after a scan an event may still come for what the scan has noticed."""


class Hints:
    """Directories to look at, and when; filled by the watchers' threads."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self._due: dict[int, dict[bytes, float]] = {}
        self._heard: dict[int, set[bytes]] = {}
        """Root id -> what was announced since its last full scan began."""
        self._before: dict[int, set[bytes]] = {}
        """The same of the time between that and the full scan before it."""
        self._silent: dict[int, dict[bytes, float]] = {}
        """Root id -> changed files nobody announced, and when to judge; never: it was counted."""
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wake this loop from now on."""
        self._loop = loop

    def wake(self) -> None:
        """Have the loop look at what is due; from any thread."""
        if self._loop:
            self._loop.call_soon_threadsafe(self.changed.set)

    def add(self, root_id: int, folder: bytes, after_seconds: float, name: bytes = b"") -> None:
        """Look at a directory after a while; an earlier time that is set already stays.

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
        """A full scan of a root begins: what is announced from now on is another chapter."""
        with self._lock:
            self._before[root_id] = heard = self._heard.pop(root_id, set())
            self._silent[root_id] = {
                path: at
                for path, at in self._silent.get(root_id, {}).items()
                if at != _COUNTED and not _announced(path, heard)
            }

    def noticed(self, root_id: int, paths: Iterable[bytes]) -> None:
        """A scan has seen that these files changed since the last full scan began."""
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
        """How many of those noticed nobody has announced in time; each is counted once."""
        now = time.monotonic()
        with self._lock:
            silent = self._silent.get(root_id, {})
            heard = self._heard.get(root_id, set())
            ripe = [path for path, at in silent.items() if at <= now]
            silent.update(dict.fromkeys(ripe, _COUNTED))
            return sum(not _announced(path, heard) for path in ripe)


_COUNTED = math.inf


def _announced(path: bytes, heard: set[bytes]) -> bool:
    """Whether this path, or a directory above it, is among those."""
    return bool(heard) and any(part in heard for part in _parts(path))


def _parts(path: bytes) -> Iterable[bytes]:
    """The path, and each directory above it."""
    while path:
        yield path
        path = path.rpartition(b"/")[0]


# A watcher of one source root: watchdog's threads, and the doubt in them.
#
# watchdog goes deaf in more ways than it says. A thread of it may die, by an error in a handler or
# of its own. A directory beyond the kernel's limit is passed over without a word. The root may be
# moved away and another one put in its place. So its threads are looked at, and the directories
# that a scan has seen are compared with those that the kernel says are watched. A watcher that is
# not whole is armed anew, ever less often, and its root is scanned more often meanwhile.
#
# Where events do not tell the whole truth, on network filesystems, there is no watcher at all.


WATCHING = "watching"

LONGEST_PAUSE_SECONDS = 300.0
"""Arming is tried again after 1, 2, 4, ... seconds, and this at the most."""

STEADY_SECONDS = 60.0
"""A watcher that has lasted so long is not one that keeps dying."""

_IN_CREATE = 0x100

_arming = threading.Lock()


class Watcher:
    """Hears of changes in one source root while it is whole.

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
        self._trouble = ""
        self._too_deep = 0
        self._failures = 0
        self._armed = self._again = 0.0
        self._first_armed = 0.0
        self._network = durable.misses_events(Path(root.path))

    @property
    def state(self) -> str:
        """`watching`, `polling: why`, `degraded: why`, or `watching, but not` what."""
        if self._network:
            return f"polling: {self._network} tells of no changes that others make"
        if self._trouble:
            return f"degraded: {self._trouble}"
        if self._too_deep:
            folders = "1 folder" if self._too_deep == 1 else f"{self._too_deep} folders"
            return f"{WATCHING}, but not {folders} whose path is too long for that"
        return WATCHING

    @property
    def busy(self) -> bool:
        """Whether it has heard what it has not told yet."""
        return self._observer is not None and not self._observer.event_queue.empty()

    def look(self) -> bool:
        """See whether it lives, and arm it if it does not.

        Returns:
            Whether it was armed: nobody heard what happened before.
        """
        if self._network:
            return False
        if self._observer is not None and (fault := self._fault()):
            self._fail(fault)
            self.close()
        due = self._observer is None or bool(self._trouble)
        return due and time.monotonic() >= self._again and self._arm()

    def heard(self, since: float, *, full: bool) -> Heard | None:
        """Since when it has had to announce what changes, and for a full scan what it watches.

        Args:
            since: start of the last full scan, seconds since the epoch.
        """
        if not self._first_armed:
            return None
        return Heard(max(self._first_armed, since), self._inodes() if full else None)

    def confirm(self, unheard: set[int], too_deep: int = 0) -> bool:
        """Take a full scan's word on which directories are not watched.

        One that was just made may not be watched yet; one that two scans name is lost.

        Args:
            too_deep: directories that cannot be watched, whatever is done. Arming it anew is of no
                use there.

        Returns:
            Whether it should be scanned again soon, to be certain.
        """
        watched = self._inodes()
        still = unheard - watched if watched is not None else set()
        lost = still & self._doubted
        self._doubted = still
        self._too_deep = too_deep
        if lost:
            self._fail(f"{len(lost)} folders are not watched{_limit(self.root.path)}")
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
        """What is wrong with it, as far as its threads and its root tell."""
        if not all(thread.is_alive() for thread in self._threads):
            return "a thread of the watcher ended"
        if self._identity != _identity(self.root.path):
            return "the directory is not there, or not the one that was watched"
        return ""

    def _fail(self, why: str) -> None:
        self._trouble = why
        self._again = time.monotonic() + min(2.0**self._failures, LONGEST_PAUSE_SECONDS)
        self._failures += 1

    def _arm(self) -> bool:
        self.close()
        with _arming:  # what appears meanwhile is ours
            threads, descriptors = _threads(), _inotify()
            try:
                self._observer = Observer()
                self._observer.start()
                self._identity = _identity(self.root.path)
                handler = Handler(self.root, self._hints)
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
        if not self._doubted:  # else the next scan tells whether they are watched now
            self._trouble = ""
        return True

    def _inodes(self) -> frozenset[int] | None:
        """Of the directories that the kernel watches for us; None where it does not say."""
        if not self._descriptors:
            return None
        found: set[int] = set()
        for descriptor in self._descriptors:
            with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{descriptor}") as lines:
                found.update(
                    int(i, 16) for i in re.findall(r"^inotify .* ino:(\w+)", lines.read(), re.M)
                )
        return frozenset(found)


class Handler(FileSystemEventHandler):
    """Turns events into hints: the directory in which something happened."""

    def __init__(self, root: Root, hints: Hints) -> None:
        self._root = root
        self._hints = hints
        self._prefix = len(os.fsencode(root.path).rstrip(b"/")) + 1

    def dispatch(self, event: FileSystemEvent) -> None:
        """Called by watchdog, on its thread."""
        if event.event_type in (EVENT_TYPE_OPENED, EVENT_TYPE_CLOSED_NO_WRITE):
            return
        # A directory is `modified` with everything in it: that announces nothing.
        tells = not event.is_directory or event.event_type in (EVENT_TYPE_CREATED, EVENT_TYPE_MOVED)
        for path in filter(None, (event.src_path, event.dest_path)):
            name = os.fsencode(str(path))[self._prefix :]
            folder = name.rpartition(b"/")[0]
            wait = self._root.settle_seconds
            self._hints.add(self._root.id, folder, wait, name if tells else b"")


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
    found = set()
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:inotify":
                    found.add(int(name))
    return found


def _limit(path: str) -> str:
    """The kernel's limit, where one more watch is refused because of it; else nothing."""
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


REST_FACTOR = 10
"""A root whose scan takes long is scanned less often: at most a tenth of the time."""

LOOK_SECONDS = 5.0
"""Pause before the watchers and the list of roots are looked at again, at the most."""


class Watch:
    """Watches every active source root until cancelled.

    Args:
        ledger: where roots are read and findings recorded.
        settings: how often is scanned.
        on_jobs: called after a scan that queued jobs.
    """

    def __init__(self, ledger: Ledger, settings: ScanSettings, on_jobs: Callable[[], None]) -> None:
        self._ledger = ledger
        self._settings = settings
        self._on_jobs = on_jobs
        self._full: dict[int, float] = {}
        """Root id -> when its next full scan is due (monotonic seconds)."""
        self._began: dict[int, float] = {}
        """Root id -> start of its last full scan (seconds since the epoch)."""
        self._hints = Hints()
        self._watchers: dict[int, Watcher] = {}
        self._states: dict[int, str] = {}
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
        try:
            with _overflows(self.ring):
                while True:
                    self._hints.changed.clear()
                    await self._turn()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._pause()):
                            await self._hints.changed.wait()
        finally:
            await asyncio.to_thread(self._close)

    async def _turn(self) -> None:
        rung, self._rung = self._rung, False
        try:
            known = await asyncio.to_thread(roots, self._ledger)
            await aside(self._stop, partial(self._follow, known))
            for root in known:
                if rung or self._full.get(root.id, 0.0) <= time.monotonic():
                    await self._scan(root, None)
                elif hinted := self._hints.due(root.id):
                    await self._scan(root, hinted)
            await self._judge(known)
            await self._tell(known)
        except LedgerError as error:
            log.error("no source root is scanned: %s", error.message)
            await asyncio.sleep(self._settings.rescan_seconds)

    async def _scan(self, root: Root, only: set[bytes] | None) -> None:
        started, began = time.monotonic(), time.time()
        if only is None:
            self._hints.due(root.id, everything=True)
            self._hints.begin(root.id)
        try:
            report = await aside(self._stop, partial(self._look, root, only))
        except LedgerError as error:
            log.error("%s: %s", root.name, error.message)
            self._full[root.id] = time.monotonic() + self._settings.rescan_seconds
            return
        for path in report.unsettled:
            self._hints.add(root.id, path, report.settles_in)
        self._hints.noticed(root.id, report.fresh)
        if report.job_ids:
            self._on_jobs()
        if only is not None:
            return
        before = self.last.get(root.name)
        if report.problem and (before is None or before.problem != report.problem):
            log.warning("%s; nothing is inferred from that", report.problem)
        self.last[root.name] = report
        self._began[root.id] = began
        now = time.monotonic()
        self._full[root.id] = now + max(self._interval(root, report), REST_FACTOR * (now - started))

    def _look(self, root: Root, only: set[bytes] | None) -> ScanReport:
        watcher = self._watchers[root.id]
        heard = watcher.heard(self._began.get(root.id, 0.0), full=only is None)
        return scan(self._ledger, root, only, self._stop, heard=heard)

    def _interval(self, root: Root, report: ScanReport) -> float:
        """Seconds until the next full scan: fewer where the watcher is in doubt."""
        watcher = self._watchers[root.id]
        if watcher.confirm(report.unheard, report.too_deep) and watcher.state == WATCHING:
            return min(GRACE_SECONDS, self._settings.rescan_seconds)
        slow, fast = self._settings.rescan_seconds, self._settings.poll_seconds
        return slow if watcher.state == WATCHING else min(slow, fast)

    async def _judge(self, known: list[Root]) -> None:
        """Count what was noticed and never announced, once an event has had time to come."""
        for root in known:
            if self._watchers[root.id].busy:
                continue
            if missed := self._hints.missed(root.id):
                log.warning("%s: the watcher announced %d files too few", root.name, missed)
                work = partial(versions.count_up, root_id=root.id, missed=missed)
                await self._ledger.write_soon(work)

    async def _tell(self, known: list[Root]) -> None:
        """Keep in the ledger how each root is watched."""
        for root in known:
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

    def _follow(self, known: list[Root]) -> None:
        """Watch new roots and not those that were removed or changed; see to the others."""
        current = {root.id: root for root in known}
        for root_id, watcher in list(self._watchers.items()):
            if current.get(root_id) != watcher.root:
                watcher.close()
                del self._watchers[root_id]
                self._full.pop(root_id, None)
                self._states.pop(root_id, None)
                self._hints.due(root_id, everything=True)
        for root in known:
            if root.id not in self._watchers:
                self._watchers[root.id] = Watcher(root, self._hints)
            if self._watchers[root.id].look():
                self._full.pop(root.id, None)

    def _close(self) -> None:
        for watcher in self._watchers.values():
            watcher.close()


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
