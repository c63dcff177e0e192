"""A watcher of one source root, which detects when watchdog stops delivering events.

watchdog can lose events without an error: a thread of it ends, by an error in a handler or of its
own; a directory beyond the kernel's limit on watches is skipped; the root is moved away and
another directory takes its name. So the threads are checked, and the directories that a scan has
visited are compared with those that the kernel watches. A watcher that fails is started anew,
after ever longer pauses, and its root is scanned more often meanwhile.

On network filesystems, where the changes of other machines give no event, there is no watcher.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import threading
import time
from collections.abc import Callable
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
from casparian_flow.errors import counted
from casparian_flow.services.scan import Heard, Root

WATCHING = "watching"

LONGEST_PAUSE_SECONDS = 300.0
"""A watcher that fails is started again after 1, 2, 4, ... seconds, at most after this."""

STEADY_SECONDS = 60.0
"""A watcher that has lasted this long begins with a pause of 1 second again."""

_IN_CREATE = 0x100

_start_lock = threading.Lock()


OnEvent = Callable[[Root, bytes, bytes], None]
"""Takes the root of an event, the directory in which something happened, and the name it announces:
a file, or a directory with all below it; empty for none. Paths are relative to the root."""


class Watcher:
    """Hands on the events of one source root, and says whether it gets them all.

    Its methods may block, and are called one at a time.

    Args:
        on_event: called on watchdog's thread.
    """

    def __init__(self, root: Root, on_event: OnEvent) -> None:
        self.root = root
        self._on_event = on_event
        self._observer: BaseObserver | None = None
        self._threads: list[threading.Thread] = []
        self._descriptors: list[int] = []
        self._identity: tuple[int, int] | None = None
        self._suspects: set[int] = set()
        """Inodes of directories that the last full scan found not watched."""
        self._trouble = ""
        self._too_deep = 0
        self._failures = 0
        self._start_time = self._retry_time = 0.0
        self._first_start = 0.0
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

    def ensure_running(self) -> bool:
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
        return due and time.monotonic() >= self._retry_time and self._start()

    def heard(self, since: float, *, full: bool) -> Heard | None:
        """Since when it has had to announce changes, and for a full scan what it watches.

        Args:
            since: start of the last full scan, seconds since the epoch.
        """
        if not self._first_start:
            return None
        return Heard(max(self._first_start, since), self._inodes() if full else None)

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
        watched = self._inodes() if unheard else None
        still = unheard - watched if watched is not None else set()
        lost = still & self._suspects
        self._suspects = still
        self._too_deep = too_deep
        if lost:
            self._fail(f"{counted(len(lost), 'folder')} not watched{_limit(self.root.path)}")
        elif not still and self._observer is not None:
            self._trouble = ""
            if time.monotonic() - self._start_time > STEADY_SECONDS:
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
        self._retry_time = time.monotonic() + min(2.0**self._failures, LONGEST_PAUSE_SECONDS)
        self._failures += 1

    def _start(self) -> bool:
        self.close()
        with _start_lock:  # one at a time: threads and descriptors that appear meanwhile are ours
            threads, descriptors = _threads(), _inotify()
            try:
                self._observer = Observer()
                self._observer.start()
                self._identity = _identity(self.root.path)
                handler = EventHandler(self.root, self._on_event)
                self._observer.schedule(handler, self.root.path, recursive=True)
            except (OSError, RecursionError) as error:
                # watchdog walks the tree by recursion, where Python's os.walk does.
                why = error.strerror if isinstance(error, OSError) else "too many levels deep"
                self._fail(f"it cannot be watched ({why})")
                self.close()
                return False
            self._threads = [*(_threads() - threads)]
            self._descriptors = [*(_inotify() - descriptors)]
        self._start_time = time.monotonic()
        self._first_start = self._first_start or time.time()
        if not self._suspects:  # else the next scan says whether they are watched now
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
    """Turns watchdog's events of a root into calls of `on_event`."""

    def __init__(self, root: Root, on_event: OnEvent) -> None:
        self._root = root
        self._on_event = on_event
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
            self._on_event(self._root, folder, name if announces else b"")


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

        with _start_lock:  # a watcher must not take this descriptor for one of its own
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
