"""What file events tell: which folders are scanned sooner than their root, and which names changed.

The watchers' threads fill both while the loop reads them.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterable

GRACE_SECONDS = 5.0
"""How long after a scan an event may still announce what the scan has found."""

NAMES_LIMIT = 200_000
"""Announced names kept between two full scans of a root; beyond it, none are counted as missed."""

_COUNTED = math.inf


class FolderSchedule:
    """Directories to scan, and when.

    Attributes:
        changed: set when there is a new directory, and by `wake`.
    """

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self._times: dict[int, dict[bytes, float]] = {}
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Set `changed` on this loop from now on."""
        self._loop = loop

    def wake(self) -> None:
        """Set `changed`, from any thread."""
        if self._loop:
            self._loop.call_soon_threadsafe(self.changed.set)

    def add(self, root_id: int, folder: bytes, after_seconds: float) -> None:
        """Have a directory scanned after a while; an earlier time that is set already stays."""
        with self._lock:
            folders = self._times.setdefault(root_id, {})
            is_new = folder not in folders
            folders.setdefault(folder, time.monotonic() + after_seconds)
        if is_new:
            self.wake()

    def due(self, root_id: int) -> set[bytes]:
        """Take the directories whose time has come."""
        now = time.monotonic()
        with self._lock:
            folders = self._times.get(root_id, {})
            ready = {path for path, due in folders.items() if due <= now}
            for path in ready:
                del folders[path]
        return ready

    def clear(self, root_id: int) -> None:
        """Forget a root's directories: all of it is scanned, or nothing."""
        with self._lock:
            self._times.pop(root_id, None)

    def times(self) -> list[float]:
        """When the directories are due, monotonic seconds."""
        with self._lock:
            return [due for folders in self._times.values() for due in folders.values()]


class Announcements:
    """The names that events have announced, to count the changes that none has.

    A full scan finds what changed since the last full scan began. So a name counts from the `begin`
    of one full scan to the `end` of the next.
    """

    def __init__(self) -> None:
        self._names: dict[int, set[bytes]] = {}
        """Root id -> names announced since its last full scan began."""
        self._previous_names: dict[int, set[bytes]] = {}
        """Root id -> names announced between that scan and the full scan before it."""
        self._unannounced: dict[int, dict[bytes, float]] = {}
        """Root id -> changed files that no event announced, and when they count as missed;
        `_COUNTED` once they are counted."""
        self._lock = threading.Lock()

    def add(self, root_id: int, name: bytes) -> None:
        """An event announced a file, or a directory with all below it.

        Args:
            name: path relative to the root.
        """
        with self._lock:
            names = self._names.setdefault(root_id, set())
            if len(names) <= NAMES_LIMIT:
                names.add(name)

    def begin(self, root_id: int) -> None:
        """A full scan begins: it covers the names so far."""
        with self._lock:
            self._previous_names[root_id] = self._names.pop(root_id, set())

    def abandon(self, root_id: int) -> None:
        """That scan did not end: the next one covers its names as well."""
        with self._lock:
            names = self._names.setdefault(root_id, set())
            names |= self._previous_names.get(root_id, set())

    def end(self, root_id: int) -> None:
        """That scan ended: what was counted before it is done with."""
        with self._lock:
            self._unannounced[root_id] = {
                path: at
                for path, at in self._unannounced.get(root_id, {}).items()
                if at != _COUNTED and not self._has(root_id, path)
            }

    def noticed(self, root_id: int, paths: Iterable[bytes]) -> None:
        """A scan found that these files changed since the last full scan began."""
        with self._lock:
            known = self._names.get(root_id, set()), self._previous_names.get(root_id, set())
            if max(map(len, known)) > NAMES_LIMIT:
                return
            unannounced = self._unannounced.setdefault(root_id, {})
            for path in paths:
                if not self._has(root_id, path):
                    unannounced.setdefault(path, time.monotonic() + GRACE_SECONDS)

    def missed(self, root_id: int) -> int:
        """How many noticed files no event has announced in time; each is counted once."""
        now = time.monotonic()
        with self._lock:
            unannounced = self._unannounced.get(root_id, {})
            ripe = [path for path, at in unannounced.items() if at <= now]
            unannounced.update(dict.fromkeys(ripe, _COUNTED))
            return sum(not self._has(root_id, path) for path in ripe)

    def _has(self, root_id: int, path: bytes) -> bool:
        """Whether this path, or a directory above it, was announced. The caller has the lock."""
        names = self._names.get(root_id, set()), self._previous_names.get(root_id, set())
        while path:
            if path in names[0] or path in names[1]:
                return True
            path = path.rpartition(b"/")[0]
        return False
