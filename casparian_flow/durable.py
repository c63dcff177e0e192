"""Bytes become a file once: a reader sees the whole file or none of it.

The recipe (temporary file beside the target, fsync, link or rename, fsync of the folder) is the
one of maildir and of dpkg. It survives a power cut on any journalling filesystem.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from casparian_flow.crashpoints import crashpoint
from casparian_flow.errors import DaemonRunning, Unavailable
from casparian_flow.trees import remove_tree

STATE_FOLDER = ".casparian"
_OWNED = "owned"


def fsync_path(path: Path) -> None:
    """Make a file's data, or a folder's names, durable.

    Raises:
        OSError: the disk refused. The data may be lost: write it again under another name.
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
    """Create a folder that only this user can enter, or make one so; whatever the umask is.

    Returns:
        Whether others could have written there until now: what is in it may be theirs.

    Raises:
        Unavailable: it belongs to another user, or its filesystem does not keep modes.
    """
    make_folder(folder, mode=0o700)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            raise Unavailable(
                f"{folder} belongs to another user (uid {found.st_uid}), and what we run would "
                "come from there",
                "remove it, or set XDG_CACHE_HOME to a folder of your own",
            )
        if found.st_mode & 0o777 == 0o700:
            return False
        os.fchmod(descriptor, 0o700)
        if os.fstat(descriptor).st_mode & 0o077:
            raise Unavailable(
                f"{folder} is open to other users, and its filesystem does not let us close it",
                "set XDG_CACHE_HOME to a folder on a filesystem that keeps modes",
            )
    finally:
        os.close(descriptor)
    return bool(found.st_mode & 0o022)


def write_once(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a small file so that it appears whole, replacing what was there.

    Raises:
        OSError: nothing was changed, and the temporary file is gone.
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
    """Remove a file, or a folder with all that is in it; what is not there needs no removing.

    Raises:
        OSError: something is left.
    """
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        path.unlink(missing_ok=True)


def _take(temporary: Path, mode: int) -> int:
    """The temporary file, ours alone while it is open.

    It has one name for all, so what somebody left who died is taken over, not left for ever.
    """
    while True:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, mode)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(temporary)):
                return descriptor
        os.close(descriptor)  # whoever had it before us has given it its name


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold an advisory lock on a file, waiting for it; processes and threads both exclude."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def own(folder: Path, pattern: str) -> None:
    """Note in `folder/.casparian/owned` that names matching `pattern` there are our own.

    A scan skips what it finds so marked, whichever ledger or configuration wrote it: our own
    outputs never become our input.

    Args:
        folder: the folder that holds the names; created when absent.
        pattern: a shell pattern (`fnmatch`) over names directly in the folder.
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
    """The patterns that `own` noted in a `.casparian` folder; empty where there are none."""
    try:
        return (state / _OWNED).read_text().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []


# Which filesystem a path lies on: where others write unheard, and where no database should lie.


_SHARED_FILESYSTEMS = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "coda", "gfs2", "glusterfs",
    "gpfs", "lustre", "ncpfs", "ocfs2", "vboxsf",
    "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.ceph-fuse",
}  # fmt: skip
_MEMORY_FILESYSTEMS = {"tmpfs", "ramfs"}

_MOUNTS = Path("/proc/self/mountinfo")


def filesystem_kind(path: Path, mounts: Path = _MOUNTS) -> str:
    """The type of the filesystem that a path lies on, as mount(8) names it; empty where the
    kernel does not say (not Linux)."""
    try:
        lines = mounts.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return ""
    here, found, deepest = os.path.realpath(path), "", -1
    for line in lines:
        fields, _, rest = line.partition(" - ")
        # Blanks and backslashes in a path are written in octal.
        mounted = re.sub(r"\\([0-7]{3})", lambda c: chr(int(c[1], 8)), fields.split()[4])
        inside = here == mounted or here.startswith(f"{mounted.rstrip('/')}/")
        if inside and len(mounted) >= deepest:  # the last of those at one place is the one seen
            found, deepest = rest.split()[0], len(mounted)
    return found


def misses_events(path: Path) -> str:
    """The type of a filesystem on which somebody may write without the kernel's telling us: one of
    the network's, or one made by a program. Empty for a local one."""
    found = filesystem_kind(path)
    return found if found in _SHARED_FILESYSTEMS or found.startswith("fuse") else ""


def unfit_for_database(path: Path) -> str:
    """Why a database at that path is in danger, in words; empty where it is not."""
    found = filesystem_kind(path)
    if found in _SHARED_FILESYSTEMS:
        return (
            f"the database {path} lies on a network filesystem ({found}): locks that keep writers "
            "apart cannot be trusted there, and a write-ahead log is for one machine"
        )
    if found in _MEMORY_FILESYSTEMS:
        return f"the database {path} lies in memory ({found}): it is gone with the next restart"
    return ""


# One process at a time claims the jobs of a database: the holder of its daemon lock.
#
# `flock` on a file of its own: the lock goes with the process, however it ends, and no guest
# inherits it.


_PROBE_SECONDS = 1.0
"""A process that only asks who holds the lock takes it for an instant; wait that long."""


@contextlib.contextmanager
def hold_daemon_lock(path: Path, role: str) -> Iterator[None]:
    """Be the daemon of this database.

    Args:
        path: the lock file; its folder exists.
        role: what we do, for whoever finds the lock taken: `casparian start`.

    Raises:
        DaemonRunning: another process is; the message says which.
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
    """Who is the daemon of this database; None where nobody is."""
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
                    f"{about.get('role', 'another process')} holds {path} "
                    f"(process {about.get('pid', '?')} on {about.get('host', '?')}, "
                    f"since {about.get('since', '?')})",
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
