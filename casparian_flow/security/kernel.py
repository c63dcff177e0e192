"""System calls that Python has no function for, through the C library (Linux, x86-64).

Standard library only: this file is copied beside the guest.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

_C = ctypes.CDLL(None, use_errno=True)  # also macOS has one; the calls are Linux's


def check(what: str, result: int) -> int:
    """A call's result, or the error it left behind.

    Raises:
        OSError: the result is negative; its file name is `what`, the call's name.
    """
    if result < 0:
        code = ctypes.get_errno() or errno.EINVAL
        raise OSError(code, os.strerror(code), what)
    return result


def prctl(option: int, *values: int) -> int:
    """prctl(2); values that are not given are 0, which some options insist on."""
    arguments = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    return check("prctl", _C.prctl(option, *arguments))


def syscall(name: str, number: int, *arguments: object) -> int:
    """Any system call by its number; integers are passed as longs."""
    passed = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return check(name, _C.syscall(ctypes.c_long(number), *passed))


def drop_capabilities() -> None:
    """Give up every capability, root's among them (capset(2), version 3 of its structures)."""
    syscall("capset", 126, struct.pack("Ii", 0x20080522, 0), bytes(24))


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """mount(2)."""
    passed = [os.fsencode(text) for text in (source, target, kind)]
    check(f"mount {target}", _C.mount(*passed, ctypes.c_ulong(flags), os.fsencode(options)))


def unmount(target: str, flags: int) -> None:
    """umount2(2)."""
    check(f"umount {target}", _C.umount2(os.fsencode(target), flags))


def sync_filesystem(path: str | os.PathLike[str]) -> None:
    """syncfs(2): have everything that was written to a path's filesystem on its disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        check("syncfs", _C.syncfs(descriptor))
    finally:
        os.close(descriptor)
