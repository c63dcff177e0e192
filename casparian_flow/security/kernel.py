"""Linux system calls that Python has no function for: prctl, mounts, Landlock, seccomp.

Standard library only: this file is copied beside the guest. Called through the C library (x86-64).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import stat
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

_C = ctypes.CDLL(None, use_errno=True)  # loads on macOS too, where nobody calls it


def check(what: str, result: int) -> int:
    """Return a call's result, or raise its errno.

    Args:
        what: the call's name, for the error.

    Raises:
        OSError: the result is negative; `what` is its file name.
    """
    if result < 0:
        code = ctypes.get_errno() or errno.EINVAL
        raise OSError(code, os.strerror(code), what)
    return result


def prctl(option: int, *values: int) -> int:
    """prctl(2); missing arguments are passed as 0, which some options require."""
    arguments = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    return check("prctl", _C.prctl(option, *arguments))


def syscall(name: str, number: int, *arguments: object) -> int:
    """Make a system call by its number; integers are passed as longs."""
    passed = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return check(name, _C.syscall(ctypes.c_long(number), *passed))


def drop_capabilities() -> None:
    """Drop all capabilities (capset(2), version 3 of its structures)."""
    syscall("capset", 126, struct.pack("Ii", 0x20080522, 0), bytes(24))


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """mount(2)."""
    passed = [os.fsencode(text) for text in (source, target, kind)]
    check(f"mount {target}", _C.mount(*passed, ctypes.c_ulong(flags), os.fsencode(options)))


def unmount(target: str, flags: int) -> None:
    """umount2(2)."""
    check(f"umount {target}", _C.umount2(os.fsencode(target), flags))


def sync_filesystem(path: str | os.PathLike[str]) -> None:
    """syncfs(2): write all data of the filesystem that holds `path` to its disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        check("syncfs", _C.syncfs(descriptor))
    finally:
        os.close(descriptor)


# Landlock (landlock(7), uapi/linux/landlock.h): which files a guest may open. Rights that an old
# kernel does not know are left out; seccomp covers them.

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446

WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3
TRUNCATE = 1 << 14
READ = READ_FILE | READ_DIR
_REMOVE_MAKE = 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 12  # dirs and files, symlinks
_REFER = 1 << 13
WRITE = READ | WRITE_FILE | _REMOVE_MAKE | _REFER | TRUNCATE
_OF_A_FILE = WRITE_FILE | READ_FILE | TRUNCATE

_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""ABI version -> how many file rights it knows. Later ABIs add none that we use."""
_BIND_TCP, _CONNECT_TCP = 1, 2
_SCOPES = 3
"""Forbid abstract UNIX sockets of, and signals to, processes outside the sandbox."""


def landlock_abi() -> int:
    """The kernel's Landlock ABI version; 0 if it has none or Landlock is not active."""
    try:
        return syscall("landlock_create_ruleset", _CREATE_RULESET, None, 0, 1)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
            return 0
        raise


def install_landlock(read: Sequence[str | int], write: Sequence[str], network: bool) -> None:
    """Restrict the calling thread and its children to these files, irreversibly.

    `PR_SET_NO_NEW_PRIVS` must be set. Paths that do not exist are skipped.

    Args:
        read: readable files and folders, as paths or as descriptors, which are closed.
        write: writable folders and devices.
        network: do not restrict outgoing TCP connections.

    Raises:
        OSError: the kernel refuses, or has no Landlock.
    """
    version = landlock_abi()
    if not version:
        raise OSError(errno.ENOSYS, "this kernel does not have it, or it is not active", "landlock")
    files = (1 << _FILE_RIGHTS[min(version, max(_FILE_RIGHTS))]) - 1
    tcp = (_BIND_TCP if network else _BIND_TCP | _CONNECT_TCP) if version >= 4 else 0
    scopes = _SCOPES if version >= 6 else 0
    known = 3 if version >= 6 else 2 if version >= 4 else 1
    attributes = struct.pack("QQQ", files, tcp, scopes)[: 8 * known]
    ruleset = syscall("landlock_create_ruleset", _CREATE_RULESET, attributes, len(attributes), 0)
    try:
        for paths, rights in ((read, READ), (write, WRITE)):
            for path in paths:
                _allow(ruleset, path, rights & files)
        syscall("landlock_restrict_self", _RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str | int, rights: int) -> None:
    try:
        descriptor = path if isinstance(path, int) else os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _OF_A_FILE
        rule = struct.pack("=Qi", rights, descriptor)
        buffer = ctypes.create_string_buffer(rule, len(rule))
        syscall("landlock_add_rule", _ADD_RULE, ruleset, 1, buffer, 0)
    finally:
        os.close(descriptor)


# A mount namespace (mount_namespaces(7), user_namespaces(7)): the guest sees only the files that it
# may read, and its scratch folder is a filesystem of a fixed size. Not every machine lets an
# ordinary user create namespaces, so this is an additional layer; Landlock is the required one.

_UNSHARE, _PIVOT_ROOT, _MOUNT_SETATTR = 272, 155, 442
_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000
_NO_SUID, _NO_DEVICES, _BIND, _RECURSIVE, _PRIVATE, _DETACH = 2, 4, 0x1000, 0x4000, 1 << 18, 2
_ATTRIBUTES_READ_ONLY = 1 | 2  # MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000


def enter_namespaces(
    home: str, read: Sequence[str], devices: Sequence[str], scratch: str, size: int
) -> None:
    """Move the calling process, which must have one thread, into its own root.

    Args:
        home: a folder of the guest's own; its `root` becomes the mount point.
        read: absolute paths that stay readable under their names; missing ones are skipped.
        devices: device files that keep their names.
        scratch: where a writable filesystem of `size` bytes goes; nothing where `size` is 0.

    Raises:
        OSError: the machine does not allow it. The process may then be in a user namespace of
            its own, and sees the files as before.
    """
    user, group = os.getuid(), os.getgid()
    syscall("unshare", _UNSHARE, _NEW_USER | _NEW_MOUNTS)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    root = os.path.join(home, "root")
    os.makedirs(root, exist_ok=True)
    mount("none", "/", "", _RECURSIVE | _PRIVATE)
    mount("none", root, "tmpfs", _NO_SUID | _NO_DEVICES, "size=1m,mode=755")
    os.makedirs(root + scratch)
    for path in dict.fromkeys((*read, *devices)):
        _bind(root, path)
    attributes = struct.pack("QQQQ", _ATTRIBUTES_READ_ONLY, 0, 0, 0)
    syscall(
        "mount_setattr", _MOUNT_SETATTR, _AT_FDCWD, os.fsencode(root), _AT_RECURSIVE,
        attributes, len(attributes),
    )  # fmt: skip
    if size:
        options = f"size={size},nr_inodes={max(size // 4096, 16)},mode=700"
        mount("none", root + scratch, "tmpfs", _NO_SUID | _NO_DEVICES, options)
    os.chdir(root)
    syscall("pivot_root", _PIVOT_ROOT, b".", b".")
    unmount(".", _DETACH)
    os.chdir(home)


def _bind(root: str, path: str) -> None:
    """Bind a file or tree into `root` under its own name; a symlink stays a symlink."""
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
    mount(real, target, "", _BIND | _RECURSIVE)
    if path != real:
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.symlink(real, root + path)


# seccomp: the system calls that a guest may make. It is an allow list, so new calls are refused.
#
# The filter is a classic BPF program (seccomp(2), uapi/linux/seccomp.h), assembled here. It covers
# what Landlock does not: processes, signals, sockets, changes of mode or owner, and truncation
# through a read-only open, which old Landlock versions allow. Names and numbers are those of x86-64
# (arch/x86/entry/syscalls/syscall_64.tbl).

ALLOWED: dict[str, int] = {
    # files: Landlock decides which
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "lseek": 8,
    "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "dup": 32, "dup2": 33,
    "sendfile": 40, "flock": 73, "fsync": 74, "fdatasync": 75, "ftruncate": 77, "getdents": 78,
    "getcwd": 79, "chdir": 80, "fchdir": 81, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85,
    "link": 86, "unlink": 87, "symlink": 88, "readlink": 89, "umask": 95, "statfs": 137,
    "fstatfs": 138, "readahead": 187, "getdents64": 217, "fadvise64": 221, "mkdirat": 258,
    "newfstatat": 262, "unlinkat": 263, "renameat": 264, "linkat": 265, "symlinkat": 266,
    "readlinkat": 267, "faccessat": 269, "sync_file_range": 277, "fallocate": 285, "dup3": 292,
    "preadv": 295, "pwritev": 296, "renameat2": 316, "copy_file_range": 326, "preadv2": 327,
    "pwritev2": 328, "statx": 332, "close_range": 436, "faccessat2": 439,
    # memory: limited by RLIMIT_AS
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "mremap": 25, "msync": 26, "madvise": 28,
    "munlock": 150,
    # its threads, and its end
    "futex": 202, "set_tid_address": 218, "set_robust_list": 273, "sched_yield": 24,
    "sched_getparam": 143, "sched_getscheduler": 145, "sched_get_priority_max": 146,
    "sched_get_priority_min": 147, "sched_getaffinity": 204, "getcpu": 309, "membarrier": 324,
    "rseq": 334, "futex_waitv": 449, "arch_prctl": 158, "exit": 60, "exit_group": 231,
    "wait4": 61, "waitid": 247, "restart_syscall": 219,
    # receiving signals
    "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pause": 34,
    "rt_sigpending": 127, "rt_sigtimedwait": 128, "rt_sigsuspend": 130, "sigaltstack": 131,
    # waiting, and the time
    "poll": 7, "select": 23, "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38,
    "gettimeofday": 96, "time": 201, "epoll_create": 213, "clock_gettime": 228,
    "clock_getres": 229, "clock_nanosleep": 230, "epoll_wait": 232, "epoll_ctl": 233,
    "pselect6": 270, "ppoll": 271, "epoll_pwait": 281, "timerfd_create": 283, "eventfd": 284,
    "timerfd_settime": 286, "timerfd_gettime": 287, "eventfd2": 290, "epoll_create1": 291,
    "epoll_pwait2": 441, "pipe": 22, "pipe2": 293,
    # its one socket
    "recvfrom": 45, "recvmsg": 47, "shutdown": 48, "getsockname": 51, "getpeername": 52,
    "getsockopt": 55,
    # ids and system information
    "getpid": 39, "uname": 63, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100,
    "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "getpgrp": 111,
    "getgroups": 115, "getresuid": 118, "getresgid": 120, "gettid": 186, "getrandom": 318,
}  # fmt: skip

NETWORK: dict[str, int] = {
    "connect": 42, "sendto": 44, "sendmsg": 46, "setsockopt": 54, "recvmmsg": 299, "sendmmsg": 307,
}  # fmt: skip
"""Additional calls of a plugin that was granted the network: connect, never listen."""

MISSING: dict[str, int] = {"clone3": 435, "openat2": 437}
"""Calls that fail with ENOSYS: the C library then uses an older call, whose arguments a filter can
see."""

FCNTL, LOCKS = 72, (6, 7)
"""F_SETLK and F_SETLKW succeed without taking a lock.

These locks exclude other processes, and a guest is one process, so SQLite and DuckDB see no
difference. The kernel would store any number of locks, one a byte range, in memory that no limit
counts. F_OFD_SETLK locks could exclude the guest's own threads: they are refused.
"""

NEWEST = 462
"""The newest call number when the lists were written; later calls fail with ENOSYS, not EPERM."""

_AUDIT_ARCH_X86_64 = 0xC000003E
_LOAD, _EQUAL, _GREATER, _AND, _RETURN = 0x20, 0x15, 0x25, 0x54, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_ERRNO = 0x00050000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16

_CLONE_THREAD = 0x00010000
_O_TRUNC_ACCMODE = os.O_TRUNC | os.O_ACCMODE
_SOCKET_TYPES = 0xF
_AF_UNIX, _AF_INET, _AF_INET6, _STREAM, _DGRAM = 1, 2, 10, 1, 2
_MSG_NOSIGNAL = 0x4000


class Condition(NamedTuple):
    """A test of one 32-bit half of an argument: whether `half & mask` is one of `values`.

    The kernel uses only the low half of the integers tested here; pointers need both halves.
    """

    argument: int
    values: Sequence[int]
    mask: int = 0xFFFFFFFF
    wanted: bool = True
    half: int = 0


class Conditional(NamedTuple):
    """A system call that is allowed if all its conditions hold."""

    number: int
    conditions: Sequence[Condition]


def conditional(pid: int, network: bool) -> list[Conditional]:
    """The calls that are allowed for some arguments only.

    Args:
        pid: the guest's process id; it may signal only itself.
        network: whether the guest may open internet sockets.
    """
    own = Condition(0, [pid])
    no_address = [*_null(4), Condition(3, [0, _MSG_NOSIGNAL])]
    reading_only = [*_null(2), Condition(0, [0, pid])]
    fcntl = [0, 1, 2, 3, 4, 5, 1030]  # no owner, lease, pipe size or lock (see LOCKS)
    ioctl = [0x5401, 0x5421, 0x541B, 0x5450, 0x5451]  # TCGETS, FIONBIO, FIONREAD, FIO(N)CLEX
    names = [15, 16]  # PR_SET_NAME, PR_GET_NAME; not the parent-death signal
    calls = [
        Conditional(2, [Condition(1, [os.O_TRUNC], _O_TRUNC_ACCMODE, wanted=False)]),  # open
        Conditional(257, [Condition(2, [os.O_TRUNC], _O_TRUNC_ACCMODE, wanted=False)]),  # openat
        Conditional(16, [Condition(1, ioctl)]),
        Conditional(72, [Condition(1, fcntl)]),
        Conditional(53, [Condition(0, [_AF_UNIX]), Condition(1, [_STREAM], _SOCKET_TYPES)]),
        Conditional(56, [Condition(0, [_CLONE_THREAD], _CLONE_THREAD)]),  # clone: threads
        Conditional(62, [own]),  # kill
        Conditional(234, [own]),  # tgkill
        Conditional(157, [Condition(0, names)]),  # prctl
        Conditional(302, reading_only),  # prlimit64
    ]
    if network:
        families = Condition(0, [_AF_INET, _AF_INET6])
        calls.append(
            Conditional(41, [families, Condition(1, [_STREAM, _DGRAM], _SOCKET_TYPES)])  # socket
        )
    else:
        calls.append(Conditional(44, no_address))  # sendto, on the one socket
    return calls


def _null(argument: int) -> list[Condition]:
    return [Condition(argument, [0], half=half) for half in (0, 1)]


def seccomp_available() -> bool:
    """Whether this machine has the call numbers above."""
    return platform.machine() == "x86_64" and struct.calcsize("P") == 8


def install_seccomp(pid: int, network: bool) -> None:
    """Restrict the calling thread and its children to the lists, irreversibly.

    `PR_SET_NO_NEW_PRIVS` must be set.

    Raises:
        OSError: the kernel has no seccomp filters, or refuses this one.
    """
    code = program(pid, network)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    passed = ctypes.create_string_buffer(header, len(header))
    prctl(PR_SET_SECCOMP, 2, ctypes.addressof(passed))


def program(pid: int, network: bool) -> bytes:
    """The BPF program: check the architecture, then each allowed call, then refuse."""
    allowed = ALLOWED | (NETWORK if network else {})
    code = [
        _step(_LOAD, _ARCH),
        _step(_EQUAL, _AUDIT_ARCH_X86_64, 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
    ]
    for number in allowed.values():
        code += [_step(_EQUAL, number, 0, 1), _step(_RETURN, _ALLOW)]
    for number in MISSING.values():
        code += [_step(_EQUAL, number, 0, 1), _step(_RETURN, _ERRNO | errno.ENOSYS)]
    code += [
        _step(_EQUAL, FCNTL, 0, 5),
        _step(_LOAD, _ARGUMENTS + 8),
        _step(_EQUAL, LOCKS[0], 1, 0),
        _step(_EQUAL, LOCKS[1], 0, 1),
        _step(_RETURN, _ERRNO),
        _step(_LOAD, _NUMBER),
    ]
    for call in conditional(pid, network):
        body = _body(call.conditions)
        code += [_step(_EQUAL, call.number, 0, len(body)), *body]
    code += [
        _step(_GREATER, NEWEST, 0, 1),
        _step(_RETURN, _ERRNO | errno.ENOSYS),
        _step(_RETURN, _ERRNO | errno.EPERM),
    ]
    return b"".join(code)


def _body(conditions: Iterable[Condition]) -> list[bytes]:
    """Return "allow" if every condition holds, else EPERM."""
    refuse = _step(_RETURN, _ERRNO | errno.EPERM)
    body: list[bytes] = []
    for condition in conditions:
        body += [
            _step(_LOAD, _ARGUMENTS + 8 * condition.argument + 4 * condition.half),
            _step(_AND, condition.mask),
        ]
        tests = list(condition.values)
        for index, value in enumerate(tests):
            hit = len(tests) - index - 1 + condition.wanted
            miss = 0 if index < len(tests) - 1 else int(not condition.wanted)
            body.append(_step(_EQUAL, value, hit, miss))
        body.append(refuse)
    return [*body, _step(_RETURN, _ALLOW)]


def _step(code: int, value: int, hit: int = 0, miss: int = 0) -> bytes:
    """One instruction (struct sock_filter)."""
    return struct.pack("HBBI", code, hit, miss, value)
