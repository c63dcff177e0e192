"""What the watcher said: where to look sooner, and of which files it has spoken."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable

HEARD_LIMIT = 200_000
"""Names kept between two full scans of a root; above it nothing is said of missed ones."""


class Hints:
    """Directories to look at, and when; filled by the watchers' threads."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self._due: dict[int, dict[bytes, float]] = {}
        self._heard: dict[int, set[bytes]] = {}
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

    def take_heard(self, root_id: int) -> set[bytes]:
        """Everything announced since the last call."""
        with self._lock:
            return self._heard.pop(root_id, set())

    def missed(self, root_id: int, paths: Iterable[bytes], before: set[bytes]) -> int:
        """How many of these files nobody has announced.

        Args:
            before: what was taken before they were found; what came later is looked up here.
        """
        with self._lock:
            since = set(self._heard.get(root_id, ()))
        if max(len(before), len(since)) > HEARD_LIMIT:
            return 0
        heard = before | since
        return sum(not any(part in heard for part in _parts(path)) for path in paths)


def _parts(path: bytes) -> Iterable[bytes]:
    """The path, and each directory above it."""
    while path:
        yield path
        path = path.rpartition(b"/")[0]
