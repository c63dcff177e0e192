"""One process at a time claims the jobs of a database: the holder of its daemon lock.

`flock` on a file of its own: the lock goes with the process, however it ends, and no guest
inherits it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from casparian_flow.errors import DaemonRunning

_PROBE_SECONDS = 1.0
"""A process that only asks who holds the lock takes it for an instant; wait that long."""


@contextlib.contextmanager
def hold(path: Path, role: str) -> Iterator[None]:
    """Be the daemon of this database.

    Args:
        path: the lock file; its folder exists.
        role: what we do, for whoever finds the lock taken: `casparian start`.

    Raises:
        DaemonRunning: another process is; the message says which.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _take(descriptor, path)
        about = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "role": role,
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(about).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def holder(path: Path) -> dict[str, str | int] | None:
    """Who is the daemon of this database; None where nobody is."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _about(descriptor)
    else:
        return None
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path) -> None:
    deadline = time.monotonic() + _PROBE_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                about = _about(descriptor)
                raise DaemonRunning(
                    f"{about.get('role', 'another process')} holds {path} "
                    f"(process {about.get('pid', '?')} on {about.get('host', '?')}, "
                    f"since {about.get('since', '?')})",
                    "casparian status   (or stop that process first)",
                ) from None
            time.sleep(0.05)
        else:
            return


def _about(descriptor: int) -> dict[str, str | int]:
    try:
        about: dict[str, str | int] = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return about
