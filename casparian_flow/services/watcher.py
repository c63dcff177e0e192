"""A watcher of one source root: watchdog's threads, and the doubt in them.

watchdog goes deaf in more ways than it says. A thread of it may die, by an error in a handler or
of its own. A directory beyond the kernel's limit is passed over without a word. The root may be
moved away and another one put in its place. So its threads are looked at, and the directories
that a scan has seen are compared with those that the kernel says are watched. A watcher that is
not whole is armed anew, ever less often, and its root is scanned more often meanwhile.

Where events do not tell the whole truth, on network filesystems, there is no watcher at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import threading
import time
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

from casparian_flow import mounts
from casparian_flow.services.hints import Hints
from casparian_flow.services.root import Heard, Root

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
        self._network = mounts.unheard(Path(root.path))

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
