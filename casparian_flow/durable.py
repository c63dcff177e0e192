"""Durable files and folders, file locks, and facts about filesystems.

A file is written as in maildir and dpkg: temporary file beside the target, fsync, link or rename,
fsync of the folder. Readers see the whole file or none, also after a power cut on any journalling
filesystem.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from casparian_flow.crashpoints import crashpoint
from casparian_flow.errors import DaemonRunning, Unavailable
from casparian_flow.trees import clear_away, remove_tree

STATE_FOLDER = ".casparian"
_OWNED = "owned"


def fsync_path(path: Path) -> None:
    """Make a file's data, or the names in a folder, durable.

    Raises:
        OSError: the disk failed. The data may be lost: write it again under another name.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Create a folder and its parents durably: each new name is fsynced in its parent."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=mode)
    crashpoint("atomic.folder_made")
    fsync_path(folder.parent)
    crashpoint("atomic.folder_synced")


def make_private(folder: Path) -> bool:
    """Create a folder with mode 0700, or set the mode of an existing one.

    Returns:
        Whether other users could write to it until now, so that its content is not trusted.

    Raises:
        Unavailable: it belongs to another user, or its filesystem does not keep modes.
    """
    make_folder(folder, mode=0o700)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid():
            raise Unavailable(
                f"{folder} belongs to another user (uid {status.st_uid}), who could change the "
                "code that runs from it",
                "remove it, or set XDG_CACHE_HOME to a folder of your own",
            )
        if status.st_mode & 0o777 == 0o700:
            return False
        os.fchmod(descriptor, 0o700)
        if os.fstat(descriptor).st_mode & 0o077:
            raise Unavailable(
                f"{folder} is open to other users, and its filesystem does not allow that to "
                "be changed",
                "set XDG_CACHE_HOME to a folder on a filesystem with permissions",
            )
    finally:
        os.close(descriptor)
    return bool(status.st_mode & 0o022)


def write_once(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a small file atomically and durably, replacing an existing one.

    Raises:
        OSError: nothing was changed, and the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with os.fdopen(_take(temporary, mode), "wb") as file:
        try:
            file.truncate(0)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            crashpoint("atomic.written")
            os.replace(temporary, path)
            crashpoint("atomic.replaced")
            fsync_path(path.parent)
            crashpoint("atomic.replacement_synced")
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def remove(path: Path) -> None:
    """Remove a file or a folder with its content, if it exists.

    Raises:
        OSError: something could not be removed.
    """
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        path.unlink(missing_ok=True)


def _take(temporary: Path, mode: int) -> int:
    """Open and lock the temporary file.

    All writers use one name, so that the file of a killed writer is reused and not left for ever.
    """
    while True:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, mode)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(temporary)):
                return descriptor
        os.close(descriptor)  # the writer before us has renamed it


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Wait for and hold an exclusive flock on a file, against processes and threads."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def scratch(folder: Path, lock: Path) -> Iterator[Path]:
    """A locked folder in `folder` for the time of the block; those of dead processes are deleted.

    The kernel drops the lock on a folder when the process that holds it ends.

    Args:
        lock: the file that is locked while such folders are made and deleted.
    """
    make_folder(folder, mode=0o700)
    with contextlib.ExitStack() as stack:
        with exclusive(lock):
            clear_dead(folder)
            own = Path(tempfile.mkdtemp(dir=folder))
            stack.enter_context(_locked(own))
        stack.callback(clear_away, own)
        yield own


def clear_dead(folder: Path) -> None:
    """Delete the folders that dead processes left of `scratch`; the caller holds its lock."""
    for left in folder.glob("*"):
        with contextlib.suppress(OSError), _locked(left):
            remove_tree(left)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder.

    Raises:
        BlockingIOError: another block, in this process or another, has the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def own(folder: Path, pattern: str) -> None:
    """Add a pattern to `folder/.casparian/owned`: matching names there are our outputs.

    Scans skip them, whichever ledger or configuration wrote them, so that outputs never become
    input.

    Args:
        folder: the folder with the outputs; created if missing.
        pattern: a shell pattern (`fnmatch`) for names directly in the folder.
    """
    state = folder / STATE_FOLDER
    if pattern in owned(state):
        return
    make_folder(folder)
    make_folder(state, mode=0o700)
    with exclusive(state / f"{_OWNED}.lock"):
        lines = owned(state)
        if pattern not in lines:
            write_once(state / _OWNED, "".join(f"{line}\n" for line in [*lines, pattern]).encode())


def owned(state: Path) -> list[str]:
    """The patterns that `own` wrote to a `.casparian` folder; empty if there are none."""
    try:
        return (state / _OWNED).read_text().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []


_SHARED_FILESYSTEMS = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "coda", "gfs2", "glusterfs",
    "gpfs", "lustre", "ncpfs", "ocfs2", "vboxsf",
    "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.ceph-fuse",
}  # fmt: skip
_MEMORY_FILESYSTEMS = {"tmpfs", "ramfs"}

_MOUNTS = Path("/proc/self/mountinfo")


def filesystem_kind(path: Path, mounts: Path = _MOUNTS) -> str:
    """The type of the filesystem of a path, as mount(8) names it; empty if it is not known (not
    Linux)."""
    try:
        lines = mounts.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return ""
    real, kind, deepest = os.path.realpath(path), "", -1
    for line in lines:
        fields, _, rest = line.partition(" - ")
        # Blanks and backslashes in a path are written in octal.
        mounted = re.sub(r"\\([0-7]{3})", lambda c: chr(int(c[1], 8)), fields.split()[4])
        inside = real == mounted or real.startswith(f"{mounted.rstrip('/')}/")
        if inside and len(mounted) >= deepest:  # the last mount at a path hides the earlier ones
            kind, deepest = rest.split()[0], len(mounted)
    return kind


def misses_events(path: Path) -> str:
    """The type of the filesystem of a path, if writes there may cause no inotify event (network
    filesystems and FUSE); empty for others."""
    kind = filesystem_kind(path)
    return kind if kind in _SHARED_FILESYSTEMS or kind.startswith("fuse") else ""


def unfit_for_database(path: Path) -> str:
    """A warning if the filesystem of a path is unsafe for a database; else empty."""
    kind = filesystem_kind(path)
    if kind in _SHARED_FILESYSTEMS:
        return (
            f"the database {path} is on a network filesystem ({kind}): file locks are not "
            "reliable there, and a write-ahead log works on one machine only"
        )
    if kind in _MEMORY_FILESYSTEMS:
        return f"the database {path} is in memory ({kind}): it will be lost at the next restart"
    return ""


# The daemon lock: only its holder claims jobs of a database. It is a flock, which ends with the
# process and which no guest inherits.

_PROBE_SECONDS = 1.0
"""How long to wait for the lock: a process that asks for its holder takes it for an instant."""


@contextlib.contextmanager
def hold_daemon_lock(path: Path, role: str) -> Iterator[None]:
    """Hold the daemon lock of a database.

    Args:
        path: the lock file; its folder exists.
        role: our command, such as `casparian start`, for the message that other processes get.

    Raises:
        DaemonRunning: another process holds it; the message names it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _take_lock(descriptor, path)
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


def daemon_lock_holder(path: Path) -> dict[str, str | int] | None:
    """The process that holds the daemon lock; None if none does."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _about_holder(descriptor)
    else:
        return None
    finally:
        os.close(descriptor)


def _take_lock(descriptor: int, path: Path) -> None:
    deadline = time.monotonic() + _PROBE_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                about = _about_holder(descriptor)
                raise DaemonRunning(
                    f"a daemon is already running: {about.get('role', 'another process')} "
                    f"holds {path} (process {about.get('pid', '?')} on "
                    f"{about.get('host', '?')}, since {about.get('since', '?')})",
                    "casparian status   (or stop that process first)",
                ) from None
            time.sleep(0.05)
        else:
            return


def _about_holder(descriptor: int) -> dict[str, str | int]:
    try:
        about: dict[str, str | int] = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return about
