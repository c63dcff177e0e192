"""What file events tell: which folders are scanned sooner than their root.

The watchers' threads fill the schedule while the loop reads it.
"""

from __future__ import annotations

import asyncio
import threading
import time


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
