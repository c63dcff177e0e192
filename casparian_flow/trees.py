"""Remove a folder with arbitrary content: any depth, names and modes.

`shutil.rmtree` recurses for each level, and fails at Python's recursion limit of 1,000. Here nested
folders are first moved up into the topmost one, so that paths have at most two names, there is no
recursion, and two descriptors are enough.

Standard library only: this file is copied beside the guest.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Container
from itertools import islice

log = logging.getLogger(__name__)

_AT_ONCE = 1000
"""Entries read at a time; a folder may have millions."""


def remove_tree(folder: str | os.PathLike[str]) -> None:
    """Remove a folder and its content; symlinks are removed, not followed.

    Removes as much as possible, even if something cannot be removed.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: something is left; the first error.
    """
    name = os.fspath(folder)
    top = _opened(name)
    try:
        _Emptying(top).run()
    finally:
        os.close(top)
    os.rmdir(name)


def clear_away(folder: str | os.PathLike[str]) -> bool:
    """Remove a folder if it exists. A failure is logged and not raised.

    Returns:
        Whether nothing is left.
    """
    try:
        remove_tree(folder)
    except FileNotFoundError:
        return True
    except Exception as error:  # noqa: BLE001  the content is arbitrary
        log.warning("cannot remove the folder %s: %s", os.fspath(folder), error)
        return False
    return True


class _Emptying:
    """Empties one open folder."""

    def __init__(self, top: int) -> None:
        self._top = top
        # Random, so that no entry has such a name.
        self._prefix = f".{os.urandom(12).hex()}-"
        self._moved = 0
        self._stuck: dict[str, OSError] = {}

    def run(self) -> None:
        """Empty the topmost folder.

        Raises:
            OSError: something is left.
        """
        while names := _names(self._top, self._stuck):
            for name in names:
                self._remove(name)
        for error in self._stuck.values():
            raise error

    def _remove(self, name: str) -> None:
        """Remove one entry of the topmost folder; nested folders become entries of it."""
        try:
            if not _unlinked(name, self._top):
                self._flatten(name)
                os.rmdir(name, dir_fd=self._top)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._stuck[name] = error

    def _flatten(self, name: str) -> None:
        inner = _opened(name, self._top)
        try:
            while names := _names(inner):
                for child in names:
                    with contextlib.suppress(FileNotFoundError):
                        if not _unlinked(child, inner):
                            self._move_up(child, inner)
        finally:
            os.close(inner)

    def _move_up(self, name: str, inner: int) -> None:
        self._moved += 1
        to = f"{self._prefix}{self._moved}"
        try:
            os.rename(name, to, src_dir_fd=inner, dst_dir_fd=self._top)
        except PermissionError:  # moving a folder writes its `..`, which needs its write right
            os.close(_opened(name, inner, rights=True))
            os.rename(name, to, src_dir_fd=inner, dst_dir_fd=self._top)


def _names(folder: int, but: Container[str] = ()) -> list[str]:
    """At most _AT_ONCE names in a folder."""
    with os.scandir(folder) as entries:
        return list(islice((entry.name for entry in entries if entry.name not in but), _AT_ONCE))


def _unlinked(name: str, folder: int) -> bool:
    """Remove an entry unless it is a folder; False if it is one."""
    if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
        return False
    os.unlink(name, dir_fd=folder)
    return True


def _opened(name: str, folder: int | None = None, *, rights: bool = False) -> int:
    """Open a folder that is not a symlink, and give the owner all rights on it if it lacks them.

    Args:
        rights: set them before opening it.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    if rights:
        _permit(name, folder)
    try:
        opened = os.open(name, flags, dir_fd=folder)
    except PermissionError:
        _permit(name, folder)
        opened = os.open(name, flags, dir_fd=folder)
    if os.fstat(opened).st_mode & 0o700 != 0o700:
        with contextlib.suppress(OSError):  # removing its content then fails with an error
            os.fchmod(opened, 0o700)
    return opened


def _permit(name: str, folder: int | None) -> None:
    """Set mode 0700 on a folder; on Linux through an O_PATH descriptor, since the name could be
    replaced by a symlink meanwhile."""
    path_only = getattr(os, "O_PATH", 0)
    if not path_only or not os.path.isdir("/proc/self/fd"):
        os.chmod(name, 0o700, dir_fd=folder)
        return
    flags = path_only | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=folder)
    try:
        os.chmod(f"/proc/self/fd/{descriptor}", 0o700)
    finally:
        os.close(descriptor)
