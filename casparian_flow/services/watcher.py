"""A watcher of one source root, which detects when watchdog stops delivering events.

watchdog can lose events without an error: a thread of it ends, by an error in a handler or of its
own; the root is moved away and another directory takes its name; a directory beyond the kernel's
limit on watches is skipped. So the threads, the root and the limit are checked. A watcher that
fails is started anew, after ever longer pauses, and its root is scanned more often meanwhile.

On network filesystems, where the changes of other machines give no event, there is no watcher.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from watchdog.events import (
    EVENT_TYPE_CLOSED_NO_WRITE,
    EVENT_TYPE_OPENED,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver
from watchdog.utils import BaseThread

from casparian_flow import durable
from casparian_flow.services.scan import Root

WATCHING = "watching"

LONGEST_PAUSE_SECONDS = 300.0
"""A watcher that fails is started again after 1, 2, 4, ... seconds, at most after this."""

STEADY_SECONDS = 60.0
"""A watcher that has lasted this long begins with a pause of 1 second again."""

_IN_CREATE = 0x100

_start_lock = threading.Lock()


OnEvent = Callable[[Root, bytes], None]
"""Takes the root of an event, and the directory in which something happened, relative to it."""


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
        self._identity: tuple[int, int] | None = None
        self._trouble = ""
        self._failures = 0
        self._start_time = self._retry_time = 0.0
        self._network = durable.misses_events(Path(root.path))

    @property
    def state(self) -> str:
        """`watching`, `polling: why` or `degraded: why`."""
        if self._network:
            return f"polling: {self._network} sends no events for changes made on other machines"
        if self._trouble:
            return f"degraded: {self._trouble}"
        return WATCHING

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
        elif self._observer is not None and (limit := _limit(self.root.path)):
            if not self._trouble:
                self._fail(limit)
        elif time.monotonic() - self._start_time > STEADY_SECONDS:
            self._failures = 0
        due = self._observer is None or bool(self._trouble)
        return due and time.monotonic() >= self._retry_time and self._start()

    def close(self) -> None:
        """End its threads."""
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.stop()
            with contextlib.suppress(RuntimeError):  # it was never started
                observer.join()
        self._threads = []

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
            threads = _threads()
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
        self._start_time = time.monotonic()
        self._trouble = ""
        return True


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
        for path in filter(None, (event.src_path, event.dest_path)):
            name = os.fsencode(str(path))[self._prefix :]
            self._on_event(self._root, name.rpartition(b"/")[0])


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if isinstance(thread, BaseThread)}


def _limit(path: str) -> str:
    """Says that the kernel refuses one more watch: watchdog skips the folders beyond the limit."""
    try:
        from watchdog.observers.inotify_c import inotify_add_watch, inotify_init

        probe = inotify_init()
        if probe < 0:
            return ""
        added = inotify_add_watch(probe, os.fsencode(path), _IN_CREATE)
        full = added < 0 and ctypes.get_errno() == errno.ENOSPC
        os.close(probe)
        if not full:
            return ""
        with open("/proc/sys/fs/inotify/max_user_watches") as file:
            return f"fs.inotify.max_user_watches ({int(file.read())} for all programs) is used up"
    except (OSError, ImportError):  # there is no inotify here
        return ""
