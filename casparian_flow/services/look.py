"""One look at one file: its hash, read once, and whether its stamps prove anything."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Callable

from casparian_flow.db.files import Stat
from casparian_flow.services.snapshots import NOTHING, Capture, Store

GRANULARITY_NS = 20_000_000
"""Two writes this close may leave the same stamps on a filesystem with a fine clock."""

COARSE_NS = 2_000_000_000
"""The same where stamps have whole seconds only (FAT, SMB, ext3, small inodes)."""

READ_BYTES = 1 << 20


def hash_file(
    name: bytes,
    folder: int,
    stop: threading.Event | None = None,
    each: Callable[[int], None] | None = None,
    capture: Capture = NOTHING,
) -> tuple[str, Stat] | None:
    """Read a file once and hash it.

    Args:
        name: its name in the directory.
        folder: descriptor of the directory.
        stop: gives up when set.
        each: called after each block with its length; it may take its time.
        capture: takes the bytes that are hashed; the caller keeps it if the hash is good.

    Returns:
        SHA-256 and the stat identity, or None when it changed while it was read, is not a
        regular file any more, or was given up.

    Raises:
        OSError: it cannot be opened or read.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=folder)
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return None
        before = Stat.of(status)
        content = capture.begin(file)
        digest = hashlib.sha256()
        length = 0
        # One that grows as fast as we read would have no end.
        while length <= before.size and (block := content.read(READ_BYTES)):
            digest.update(block)
            capture.write(block)
            length += len(block)
            if each:
                each(len(block))
            if stop and stop.is_set():
                return None
        torn = Stat.of(os.fstat(descriptor)) != before or length != before.size
    return None if torn else (digest.hexdigest(), before)


def hash_and_capture(
    name: bytes, folder: int, stop: threading.Event, store: Store, found: Stat, racy: str | None
) -> tuple[str, Stat] | None:
    """`hash_file`, with the bytes on their way into the snapshot store when it returns.

    Args:
        store: takes them, or says that it takes nothing.
        found: the stat identity that was seen.
        racy: the hash of a file that only its young stamps make us read again. It is seldom
            another one by now, so nothing is captured unless it is: then it is read once more.

    Returns, Raises:
        As `hash_file`.
    """
    if racy and store.holds(racy):
        content = hash_file(name, folder, stop)
        if content is None or content[0] == racy:
            return content
    with store.capture(found.size, found.device) as capture:
        content = hash_file(name, folder, stop, capture=capture)
        if content:
            capture.keep(content[0])
        return content


def newest_stamp(found: Stat, now_ns: int) -> int:
    """When the file last changed, as far as its stamps tell; a future mtime was made up."""
    return found.ctime_ns if found.mtime_ns > now_ns else max(found.mtime_ns, found.ctime_ns)


def is_racy(found: Stat, started: float) -> bool:
    """Whether an edit after this look could have left the same stamps.

    The rule is git's (Documentation/technical/racy-git.txt), with the scan's start as the time of
    the look and a margin for the granularity of the filesystem's clock.
    """
    coarse = found.ctime_ns % 1_000_000_000 == 0
    started_ns = int(started * 1e9)
    granularity = COARSE_NS if coarse else GRANULARITY_NS
    return newest_stamp(found, started_ns) + granularity >= started_ns


def unrest(found: Stat, now_ns: int, seconds: float) -> float:
    """Seconds until a file with these stamps has been quiet for so long; none if it has.

    A ctime in the future means that the clock was set back: the file's age says nothing then, so
    it is taken, and racy until the clock has passed its stamps. A clock that is set forward makes
    every file look old; only its writer's next write tells that it was not at rest.
    """
    if seconds == 0 or found.ctime_ns > now_ns + COARSE_NS:
        return 0.0
    return max(0.0, seconds - (now_ns - newest_stamp(found, now_ns)) / 1e9)
