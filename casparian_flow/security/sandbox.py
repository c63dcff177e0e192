"""The sandbox of a guest: resource limits, namespaces, Landlock and seccomp, in this order.

`lock_down` runs in the guest before any foreign code; `shield_host` runs in the process that starts
guests. docs/security.md says what each layer leaves open.

Standard library only: this file is copied beside the guest.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from casparian_flow.security import kernel

LAYERS = ("limits", "landlock", "seccomp")
"""The layers that `sandbox = "required"` requires. `namespaces` is used where it is available."""

THREADS = 512
"""Limit of threads of one guest. Several libraries each start one thread a core."""

_SYSTEM = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache",
    "/etc/localtime", "/usr/share/zoneinfo",
)  # fmt: skip
"""Shared libraries and time zones, which any interpreter reads."""
_RESOLVER = (
    "/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/gai.conf", "/etc/services",
    "/etc/ssl", "/etc/pki", "/etc/ca-certificates", "/usr/share/ca-certificates",
)  # fmt: skip
"""Files that network connections need."""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


class InPlace(NamedTuple):
    """A large file that a guest reads in place."""

    path: str
    device: int
    inode: int
    """With `device`, identifies the file that was hashed; the path may name another file by now."""


@dataclass(frozen=True, kw_only=True)
class Confinement:
    """The rights of one guest, passed to it as JSON on its command line."""

    mode: str
    """`required`, `best-effort` or `off`, as configured."""
    home: str
    """The guest's own folder, with its inbox `in` and, if granted, its scratch folder `tmp`."""
    read: list[str]
    """Readable folders besides the interpreter: its packages and our bundle."""
    in_place: InPlace | None
    """A large file that it may also read."""
    memory_bytes: int
    scratch_bytes: int
    network: bool

    @property
    def scratch(self) -> str:
        """Folder of temporary files, if granted."""
        return os.path.join(self.home, "tmp")


@dataclass
class Level:
    """The layers of the sandbox that are active when plugin code begins."""

    layers: list[str] = field(default_factory=list)
    """Active layers; includes `network` if that was granted."""
    missing: dict[str, str] = field(default_factory=dict)
    """Layer -> why it is missing."""

    @property
    def whole(self) -> bool:
        """Whether all of `LAYERS` are active."""
        return not self.missing.keys() & set(LAYERS)


def lock_down(allowed: Confinement) -> Level:
    """Drop irreversibly every right that the guest was not given.

    Call it with one thread and before foreign code runs. Layers that the machine does not have are
    listed in the result; the caller decides.
    """
    level = Level()
    if allowed.mode == "off":
        level.missing = dict.fromkeys(LAYERS, "[guest] sandbox is off")
        return level
    with _layer(level, "limits"):
        _limit(allowed)
    if sys.platform != "linux":
        level.missing |= dict.fromkeys(LAYERS[1:], f"{sys.platform} does not have it")
    elif not kernel.seccomp_available():
        reason = f"only x86-64 is supported, not {os.uname().machine}"
        level.missing |= dict.fromkeys(LAYERS[1:], reason)
    else:
        _confine(allowed, level)
    if allowed.network:
        level.layers.append("network")
    return level


def shield_host() -> None:
    """Hide this process's memory, environment and descriptors from other processes of the user.

    Otherwise `/proc` gives them to every process of the user, sandboxed or not. It also disables
    core dumps and debuggers.
    """
    if sys.platform == "linux":
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)


def _confine(allowed: Confinement, level: Level) -> None:
    size = allowed.scratch_bytes
    read = [path for path in sys.path if os.path.exists(path)]
    read += [os.path.join(sys.base_prefix, "lib"), *_SYSTEM, *allowed.read]
    read += [os.path.join(allowed.home, "in"), *(_RESOLVER if allowed.network else ())]
    file = allowed.in_place
    with _layer(level, "namespaces"):
        shown = [*read, *([file[0]] if file else [])]
        kernel.enter_namespaces(allowed.home, shown, _DEVICES, allowed.scratch, size)
        _limit_threads()
    descriptors = [_open_checked(*file)] if file else []
    kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    with _layer(level, "landlock"):
        write = [*_DEVICES, *([allowed.scratch] if size else [])]
        # The large file is passed as a descriptor, since its path may be exchanged again.
        trees = [os.path.realpath(path) for path in read]
        kernel.install_landlock([*trees, *descriptors], write, allowed.network)
    with _layer(level, "seccomp"):
        kernel.install_seccomp(os.getpid(), allowed.network)


def _open_checked(path: str, device: int, inode: int) -> int:
    """Open the large file; end the process if its path names another file since it was hashed."""
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if (status.st_dev, status.st_ino) != (device, inode):
        sys.exit(f"{path!r} was replaced by another file")
    return descriptor


@contextlib.contextmanager
def _layer(level: Level, name: str) -> Iterator[None]:
    """Record that the layer is active, or why it is missing."""
    try:
        yield
    except OSError as error:
        level.missing[name] = f"{error.filename or name}: {error.strerror or error}"
    else:
        level.layers.append(name)


def _limit_threads() -> None:
    """Limit an ordinary user's guest to THREADS, inside its new user namespace.

    Linux 5.14 and later count the threads of that namespace alone; earlier kernels count all of the
    user's. Root's are never counted: the host watches them (`engine.guest_process`).
    """
    release = re.match(r"([0-9]+)\.([0-9]+)", os.uname().release)
    if release and (int(release[1]), int(release[2])) >= (5, 14):
        _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
        limit = THREADS if hard == resource.RLIM_INFINITY else min(THREADS, hard)
        resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))


def _limit(allowed: Confinement) -> None:
    """Set the resource limits. The host measures processor time, per job."""
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_FSIZE: allowed.scratch_bytes,
        resource.RLIMIT_AS: allowed.memory_bytes,
    }
    for number, value in limits.items():
        _, hard = resource.getrlimit(number)
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (limit, limit))
