"""A supervisor of one process's system calls: each may be seen, and answered with an error.

seccomp's user notification (seccomp_unotify(2)): a filter stops the calls of `KINDS`, and the
supervisor says whether the kernel goes on with one or what error it returns. The filter is
inherited, so guests are stopped too; their calls go on, unseen. Nothing but the standard library
is needed, and no root: a parent may look into its child, which is kept from hiding
(PR_SET_DUMPABLE is answered, and not done).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from casparian_flow.security import kernel

KINDS: dict[str, dict[int, tuple[int, ...]]] = {
    "open": {2: (0,), 85: (0,), 257: (1,), 437: (1,)},  # open, creat, openat, openat2
    # write, pwrite64, writev, pwritev, pwritev2, sendfile, copy_file_range
    "write": {1: (), 18: (), 20: (), 296: (), 328: (), 40: (), 326: ()},
    "fsync": {74: (), 75: ()},  # fsync, fdatasync
    "rename": {82: (0, 1), 264: (1, 3), 316: (1, 3)},  # rename, renameat, renameat2
    "link": {86: (0, 1), 265: (1, 3)},  # link, linkat
    "mkdir": {83: (0,), 258: (1,)},  # mkdir, mkdirat
    "unlink": {87: (0,), 263: (1,)},  # unlink, unlinkat
}
"""Kind -> number on x86-64 -> which arguments are paths; none where a descriptor says it."""

FAULTED = ("open", "write", "fsync", "rename", "link")
"""The kinds that are made to fail; the others are only seen."""

_KIND_OF = {number: kind for kind, numbers in KINDS.items() for number in numbers}
_PATHS = {number: paths for numbers in KINDS.values() for number, paths in numbers.items()}
_TARGET_FIRST = {40: 0, 326: 2}
"""Where the descriptor that is written to is: argument 0, but for copy_file_range."""
_PRCTL = 157
_AT_FDCWD = 0xFFFFFF9C

_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_NUMBER, _FIRST_ARGUMENT = 0, 16
_SECCOMP, _SET_FILTER, _NEW_LISTENER = 317, 1, 8
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_NOTICE, _ANSWER = struct.Struct("QIIiIQ6Q"), struct.Struct("QqiI")
_CONTINUE = 1
_PAGE = 4096
_DATA_LIMIT = 1 << 16
"""Bytes of a write that are looked at; SQLite writes a page at a time."""


class Call(NamedTuple):
    """A system call of the supervised process that is about to be made."""

    kind: str
    thread: int
    paths: tuple[Path, ...]
    """What it is about, absolute; of `rename` and `link` the old name and the new one."""
    data: bytes
    """What is written, where that is one buffer."""


@dataclass
class Ended:
    """How the supervised process ended."""

    code: int
    """Its exit code; negative for a signal."""
    seconds: float
    late: bool
    """It ran longer than it may, and was killed."""


def missing() -> str:
    """Why this machine cannot do it, in words; empty where it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "system calls are supervised on Linux for x86-64 only"
    try:
        ended = supervise(_try, lambda call: errno.EIO, within=30.0)
    except OSError as error:
        return f"the kernel lets nobody supervise system calls here: {error}"
    return "" if ended.code == errno.EIO else f"an open that should have failed gave {ended}"


def _try() -> int:
    try:
        os.close(os.open("/", os.O_RDONLY))
    except OSError as error:
        return error.errno or 0
    return 0


def supervise(run: Callable[[], int | None], judge: Callable[[Call], int], within: float) -> Ended:
    """Run a function in a forked process under supervision.

    Args:
        run: what the process does; its value is the exit code.
        judge: called with every call of the process itself; the errno it fails with, or 0.
        within: seconds after which it is killed.

    Raises:
        OSError: the kernel refuses the filter.
    """
    ours, theirs = socket.socketpair()
    started = time.monotonic()
    process = os.fork()
    if process == 0:
        _be_supervised(run, theirs)
    theirs.close()
    with ours:
        said, descriptors, _, _ = socket.recv_fds(ours, 1024, 1)
    if not descriptors:
        os.waitpid(process, 0)
        raise OSError(f"no filter: {said.decode() or 'the process ended'}")
    handle = os.pidfd_open(process)
    late = False
    try:
        late = not _Supervisor(process, descriptors[0], judge).serve(handle, started + within)
        if late:
            os.kill(process, signal.SIGKILL)
    finally:
        os.close(descriptors[0])  # what a guest still waits for is answered so: ENOSYS
        os.close(handle)
        _, status = os.waitpid(process, 0)
    return Ended(os.waitstatus_to_exitcode(status), time.monotonic() - started, late)


def _be_supervised(run: Callable[[], int | None], supervisor: socket.socket) -> NoReturn:
    code = 99
    try:
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        try:
            listener = _install()
        except OSError as error:
            supervisor.send(str(error).encode())
            os._exit(code)
        socket.send_fds(supervisor, [b"."], [listener])
        os.close(listener)
        supervisor.close()
        code = run() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _install() -> int:
    """The filter: notify of what we know by number, and of hiding; allow the rest."""
    code = [_step(_LOAD, _NUMBER)]
    for number in _KIND_OF:
        code += [_step(_EQUAL, number, 0, 1), _step(_RETURN, _NOTIFY)]
    code += [
        _step(_EQUAL, _PRCTL, 0, 3),
        _step(_LOAD, _FIRST_ARGUMENT),
        _step(_EQUAL, kernel.PR_SET_DUMPABLE, 0, 1),
        _step(_RETURN, _NOTIFY),
        _step(_RETURN, _ALLOW),
    ]
    program = b"".join(code)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))
    passed = ctypes.create_string_buffer(header, len(header))
    return kernel.syscall("seccomp", _SECCOMP, _SET_FILTER, _NEW_LISTENER, passed)


def _step(code: int, value: int, hit: int = 0, miss: int = 0) -> bytes:
    return struct.pack("HBBI", code, hit, miss, value)


class _Supervisor:
    """Answers the notifications of one filter."""

    def __init__(self, process: int, listener: int, judge: Callable[[Call], int]) -> None:
        self._process = process
        self._listener = listener
        self._judge = judge
        self._memory = os.open(f"/proc/{process}/mem", os.O_RDONLY | os.O_CLOEXEC)
        self._process_of: dict[int, int] = {}

    def serve(self, handle: int, deadline: float) -> bool:
        """Until the process has ended; False when the deadline came first."""
        waiting = select.poll()
        waiting.register(self._listener, select.POLLIN)
        waiting.register(handle, select.POLLIN)
        try:
            while (left := deadline - time.monotonic()) > 0:
                ready = dict(waiting.poll(left * 1000))
                if ready.get(self._listener, 0) & select.POLLIN:
                    self._answer()
                elif handle in ready:
                    return True
            return False
        finally:
            os.close(self._memory)

    def _answer(self) -> None:
        notice = bytearray(_NOTICE.size)
        try:
            fcntl.ioctl(self._listener, _RECEIVE, notice)
        except FileNotFoundError:
            return  # whoever made the call was killed meanwhile
        number, thread, _flags, call, _arch, _at, *arguments = _NOTICE.unpack(notice)
        error, flags = 0, _CONTINUE
        if self._is_ours(thread):
            if call == _PRCTL:
                flags = 0  # it is told that it hides
            elif error := self._judge(self._read(thread, call, arguments)):
                flags = 0
        answer = bytearray(_ANSWER.pack(number, 0, -error, flags))
        try:
            fcntl.ioctl(self._listener, _SEND, answer)
        except FileNotFoundError:
            return

    def _is_ours(self, thread: int) -> bool:
        if thread not in self._process_of:
            try:
                status = Path(f"/proc/{thread}/status").read_text()
            except OSError:
                return False
            self._process_of[thread] = int(status.partition("\nTgid:")[2].split()[0])
        return self._process_of[thread] == self._process

    def _read(self, thread: int, number: int, arguments: list[int]) -> Call:
        kind, places = _KIND_OF[number], _PATHS[number]
        if places:
            paths = tuple(self._path(arguments, place) for place in places)
            return Call(kind, thread, paths, b"")
        descriptor = arguments[_TARGET_FIRST.get(number, 0)]
        data = self._bytes(*arguments[1:3]) if number in (1, 18) else b""
        return Call(kind, thread, (self._link(f"fd/{descriptor & 0xFFFFFFFF}"),), data)

    def _path(self, arguments: list[int], place: int) -> Path:
        folder = arguments[place - 1] & 0xFFFFFFFF if place else _AT_FDCWD
        name = os.fsdecode(self._string(arguments[place]))
        if name.startswith("/"):
            return Path(os.path.normpath(name))
        base = self._link("cwd" if folder == _AT_FDCWD else f"fd/{folder}")
        return Path(os.path.normpath(base / name))

    def _link(self, name: str) -> Path:
        try:
            return Path(os.readlink(f"/proc/{self._process}/{name}"))
        except OSError:
            return Path("unknown")

    def _string(self, address: int) -> bytes:
        found = b""
        while b"\0" not in found and len(found) < 2 * _PAGE:
            start = address + len(found)
            found += self._bytes(start, _PAGE - start % _PAGE) or b"\0"
        return found.partition(b"\0")[0]

    def _bytes(self, address: int, length: int) -> bytes:
        try:
            return os.pread(self._memory, min(length, _DATA_LIMIT), address)
        except OSError:
            return b""
