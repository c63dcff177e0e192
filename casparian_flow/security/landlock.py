"""Which files a guest may reach: a Landlock ruleset (landlock(7), Linux's uapi/linux/landlock.h).

Rights that an old kernel does not know are left out; what that leaves open, seccomp closes.

Standard library only: this file is copied beside the guest.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from collections.abc import Sequence

from casparian_flow.security import kernel

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446

WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3
TRUNCATE = 1 << 14
READ = READ_FILE | READ_DIR
_REMOVE_MAKE = 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 12  # dirs and files, symlinks
_REFER = 1 << 13
WRITE = READ | WRITE_FILE | _REMOVE_MAKE | _REFER | TRUNCATE
_OF_A_FILE = WRITE_FILE | READ_FILE | TRUNCATE

_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""ABI -> how many rights over files it knows; later ones know no more that concern us."""
_BIND_TCP, _CONNECT_TCP = 1, 2
_SCOPES = 3
"""No abstract UNIX socket, and no signal, of a process outside."""


def abi() -> int:
    """The kernel's version of Landlock; 0 where it has none, or where it is not active."""
    try:
        return kernel.syscall("landlock_create_ruleset", _CREATE_RULESET, None, 0, 1)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
            return 0
        raise


def install(read: Sequence[str | int], write: Sequence[str], network: bool) -> None:
    """Hold the calling thread, and all it starts, to these trees. There is no way back.

    `PR_SET_NO_NEW_PRIVS` must have been set. Paths that do not exist are passed over.

    Args:
        read: files and folders whose content may be read: paths, or descriptors, which are closed.
        write: folders that may be changed, and devices that may be written.
        network: whether TCP connections are left to others to decide.

    Raises:
        OSError: the kernel refuses, or has no Landlock.
    """
    version = abi()
    if not version:
        raise OSError(errno.ENOSYS, "this kernel has none, or it is not active", "landlock")
    files = (1 << _FILE_RIGHTS[min(version, max(_FILE_RIGHTS))]) - 1
    tcp = (_BIND_TCP if network else _BIND_TCP | _CONNECT_TCP) if version >= 4 else 0
    scopes = _SCOPES if version >= 6 else 0
    known = 3 if version >= 6 else 2 if version >= 4 else 1
    attributes = struct.pack("QQQ", files, tcp, scopes)[: 8 * known]
    ruleset = kernel.syscall(
        "landlock_create_ruleset", _CREATE_RULESET, attributes, len(attributes), 0
    )
    try:
        for paths, rights in ((read, READ), (write, WRITE)):
            for path in paths:
                _allow(ruleset, path, rights & files)
        kernel.syscall("landlock_restrict_self", _RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str | int, rights: int) -> None:
    try:
        place = path if isinstance(path, int) else os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            rights &= _OF_A_FILE
        rule = struct.pack("=Qi", rights, place)
        buffer = ctypes.create_string_buffer(rule, len(rule))
        kernel.syscall("landlock_add_rule", _ADD_RULE, ruleset, 1, buffer, 0)
    finally:
        os.close(place)
