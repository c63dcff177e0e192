"""A guest's own view of the files: a root with what it may read in it, and nothing else.

Landlock refuses to open what is outside; in a mount namespace of its own (mount_namespaces(7),
user_namespaces(7)) a guest does not even see that it is there, and its scratch folder is a
filesystem of a fixed size. Not every machine lets an ordinary user make namespaces, so this is a
layer on top and not what holds.

Standard library only: this file is copied beside the guest.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Sequence

from casparian_flow.security import kernel

_UNSHARE, _PIVOT_ROOT, _MOUNT_SETATTR = 272, 155, 442
_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000
_NO_SUID, _NO_DEVICES, _BIND, _RECURSIVE, _PRIVATE, _DETACH = 2, 4, 0x1000, 0x4000, 1 << 18, 2
_ATTRIBUTES_READ_ONLY = 1 | 2  # MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000


def enter(home: str, read: Sequence[str], devices: Sequence[str], scratch: str, size: int) -> None:
    """Move the calling process, which must have one thread, into a root of its own.

    Args:
        home: a folder of the guest's own; its `root` becomes the mount point.
        read: absolute paths that keep their names and can be read; missing ones are passed over.
        devices: device files that keep their names.
        scratch: where a writable filesystem of `size` bytes goes; nothing where `size` is 0.

    Raises:
        OSError: the machine does not allow it. The process may then be in a user namespace of
            its own, and sees the files as before.
    """
    user, group = os.getuid(), os.getgid()
    kernel.syscall("unshare", _UNSHARE, _NEW_USER | _NEW_MOUNTS)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    root = os.path.join(home, "root")
    os.makedirs(root, exist_ok=True)
    kernel.mount("none", "/", "", _RECURSIVE | _PRIVATE)
    kernel.mount("none", root, "tmpfs", _NO_SUID | _NO_DEVICES, "size=1m,mode=755")
    os.makedirs(root + scratch)
    for path in dict.fromkeys((*read, *devices)):
        _bind(root, path)
    attributes = struct.pack("QQQQ", _ATTRIBUTES_READ_ONLY, 0, 0, 0)
    kernel.syscall(
        "mount_setattr", _MOUNT_SETATTR, _AT_FDCWD, os.fsencode(root), _AT_RECURSIVE,
        attributes, len(attributes),
    )  # fmt: skip
    if size:
        options = f"size={size},nr_inodes={max(size // 4096, 16)},mode=700"
        kernel.mount("none", root + scratch, "tmpfs", _NO_SUID | _NO_DEVICES, options)
    os.chdir(root)
    kernel.syscall("pivot_root", _PIVOT_ROOT, b".", b".")
    kernel.unmount(".", _DETACH)
    os.chdir(home)


def _bind(root: str, path: str) -> None:
    """Show a file or a tree under its own name; a name that leads elsewhere stays a link there."""
    real = os.path.realpath(path)
    if not os.path.exists(real):
        return
    target = root + real
    if not os.path.lexists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.isdir(real):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
    kernel.mount(real, target, "", _BIND | _RECURSIVE)
    if path != real:
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.symlink(real, root + path)
