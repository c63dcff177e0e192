"""Bytes become a file once: a reader sees the whole file or none of it.

The recipe (temporary file beside the target, fsync, link or rename, fsync of the folder) is the
one of maildir and of dpkg. It survives a power cut on any journalling filesystem.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from casparian_flow.crashpoints import crashpoint
from casparian_flow.errors import Unavailable
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
