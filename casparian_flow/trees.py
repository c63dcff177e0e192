"""Removing a folder that somebody else has filled: of any depth, with any names and rights in it.

`shutil.rmtree` calls itself for each level, and Python ends that after a thousand of them. Here
folders that lie deeper are moved up into the topmost one first, so that no path is ever longer than
two names, nothing calls itself, and two descriptors are enough.

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
"""Names that are read before what they name is removed; a folder may hold millions."""


def remove_tree(folder: str | os.PathLike[str]) -> None:
    """Remove a folder and all that is in it; a link that leads elsewhere is removed, not followed.

    What can be removed is, though something else cannot.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: something is left; the first reason.
    """
    name = os.fspath(folder)
    top = _opened(name)
    try:
        _Emptying(top).run()
    finally:
        os.close(top)
    os.rmdir(name)


def clear_away(folder: str | os.PathLike[str]) -> bool:
    """Remove a folder where it is there. A failure is said in the log, and is no error: whoever
    clears up has something to do besides.

    Returns:
        Whether nothing is left.
    """
    try:
        remove_tree(folder)
    except FileNotFoundError:
        return True
    except Exception as error:  # noqa: BLE001  what is in it is not ours to foresee
        log.warning("the folder %s cannot be removed, and stays: %s", os.fspath(folder), error)
        return False
    return True


class _Emptying:
    """All that is below one open folder goes."""

    def __init__(self, top: int) -> None:
        self._top = top
        # Nobody who filled the folder can have known these names.
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
        """Remove one entry of the topmost folder; the folders in it become such entries."""
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
                for each in names:
                    with contextlib.suppress(FileNotFoundError):
                        if not _unlinked(each, inner):
                            self._move_up(each, inner)
        finally:
            os.close(inner)

    def _move_up(self, name: str, inner: int) -> None:
        self._moved += 1
        to = f"{self._prefix}{self._moved}"
        try:
            os.rename(name, to, src_dir_fd=inner, dst_dir_fd=self._top)
        except PermissionError:  # its `..` is written, which takes a right that it may not give
            os.close(_opened(name, inner, rights=True))
            os.rename(name, to, src_dir_fd=inner, dst_dir_fd=self._top)


def _names(folder: int, but: Container[str] = ()) -> list[str]:
    """Some of the names in a folder."""
    with os.scandir(folder) as entries:
        return list(islice((each.name for each in entries if each.name not in but), _AT_ONCE))


def _unlinked(name: str, folder: int) -> bool:
    """Remove what is no folder; False where it is one."""
    if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
        return False
    os.unlink(name, dir_fd=folder)
    return True


def _opened(name: str, folder: int | None = None, *, rights: bool = False) -> int:
    """A descriptor of a folder that is no link, with all rights for us where it has not got them.

    Args:
        rights: give them in any case.
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
        with contextlib.suppress(OSError):  # then removing what is in it fails, and says so
            os.fchmod(opened, 0o700)
    return opened


def _permit(name: str, folder: int | None) -> None:
    """Give ourselves all rights on a folder, by a descriptor that asks for none where there is
    such a thing (Linux): the name could lead elsewhere in between."""
    path_only = getattr(os, "O_PATH", 0)
    if not path_only or not os.path.isdir("/proc/self/fd"):
        os.chmod(name, 0o700, dir_fd=folder)
        return
    flags = path_only | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    place = os.open(name, flags, dir_fd=folder)
    try:
        os.chmod(f"/proc/self/fd/{place}", 0o700)
    finally:
        os.close(place)
