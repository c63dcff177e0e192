"""Which folders are scanned sooner than their root, and which files events have announced."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterable

GRACE_SECONDS = 5.0
"""How long after a scan an event may still announce what the scan has found."""

HEARD_LIMIT = 200_000
"""Announced names kept between two full scans of a root; beyond it, none are counted as missed."""

_COUNTED = math.inf


class Hints:
    """Directories to look at, and when; filled by the watchers' threads."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self._due: dict[int, dict[bytes, float]] = {}
        self._names: dict[int, set[bytes]] = {}
        """Root id -> names announced since its last full scan began."""
        self._previous_names: dict[int, set[bytes]] = {}
        """Root id -> names announced between that scan and the full scan before it."""
        self._unannounced: dict[int, dict[bytes, float]] = {}
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
            heard = self._names.setdefault(root_id, set())
            if name and len(heard) <= HEARD_LIMIT:
                heard.add(name)
        if fresh:
            self.wake()

    def clear(self, root_id: int) -> None:
        """Forget a root's directories: all of it is scanned, or nothing."""
        with self._lock:
            self._due.pop(root_id, None)

    def due(self, root_id: int) -> set[bytes]:
        """Take the directories whose time has come."""
        now = time.monotonic()
        with self._lock:
            folders = self._due.get(root_id, {})
            ready = {path for path, due in folders.items() if due <= now}
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
            self._previous_names[root_id] = heard = self._names.pop(root_id, set())
            self._unannounced[root_id] = {
                path: at
                for path, at in self._unannounced.get(root_id, {}).items()
                if at != _COUNTED and not _announced(path, heard)
            }

    def noticed(self, root_id: int, paths: Iterable[bytes]) -> None:
        """A scan found that these files changed since the last full scan began."""
        with self._lock:
            before = self._previous_names.get(root_id, set())
            heard = self._names.get(root_id, set())
            if max(len(before), len(heard)) > HEARD_LIMIT:
                return
            silent = self._unannounced.setdefault(root_id, {})
            for path in paths:
                if not _announced(path, before) and not _announced(path, heard):
                    silent.setdefault(path, time.monotonic() + GRACE_SECONDS)

    def missed(self, root_id: int) -> int:
        """How many noticed files no event has announced in time; each is counted once."""
        now = time.monotonic()
        with self._lock:
            silent = self._unannounced.get(root_id, {})
            heard = self._names.get(root_id, set())
            ripe = [path for path, at in silent.items() if at <= now]
            silent.update(dict.fromkeys(ripe, _COUNTED))
            return sum(not _announced(path, heard) for path in ripe)


def _announced(path: bytes, heard: set[bytes]) -> bool:
    """Whether this path, or a directory above it, was announced."""
    while heard and path:
        if path in heard:
            return True
        path = path.rpartition(b"/")[0]
    return False
