"""What holds a guest: limits, a root of its own, Landlock and seccomp, in this order.

`lock_down` runs in the guest before any code that is not ours; `shield_host` in the process that
starts guests. The recipe and what each layer leaves open is in docs/security.md.

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
"""What `required` requires. The fourth, `namespaces`, closes what remains where a machine has it:
see docs/security.md."""

THREADS = 512
"""Of one guest. Libraries start one a core, some of them each for themselves."""

_SYSTEM = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache",
    "/etc/localtime", "/usr/share/zoneinfo",
)  # fmt: skip
"""Shared libraries and time zones: what any interpreter reads besides its own."""
_RESOLVER = (
    "/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/gai.conf", "/etc/services",
    "/etc/ssl", "/etc/pki", "/etc/ca-certificates", "/usr/share/ca-certificates",
)  # fmt: skip
"""What going out to the network reads."""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


class InPlace(NamedTuple):
    """A large file that a guest reads where it lies."""

    path: str
    device: int
    inode: int
    """With `device`, what was proved to be the version; the path may lead elsewhere by now."""


@dataclass(frozen=True, kw_only=True)
class Confinement:
    """What one guest may have; crosses to the guest as JSON on its command line."""

    mode: str
    """`required`, `best-effort` or `off`, as configured."""
    home: str
    """The guest's own folder, with its inbox `in` and, where granted, its scratch folder `tmp`."""
    read: list[str]
    """What it may read besides the interpreter: its packages and our bundle."""
    in_place: InPlace | None
    """A large file that it may read as well."""
    memory_bytes: int
    scratch_bytes: int
    network: bool

    @property
    def scratch(self) -> str:
        """Where temporary files go, where that was granted."""
        return os.path.join(self.home, "tmp")


@dataclass
class Level:
    """What holds a guest, as it was when plugin code began."""

    layers: list[str] = field(default_factory=list)
    """Those that are there; `network` among them where that was granted."""
    missing: dict[str, str] = field(default_factory=dict)
    """Layer -> why it is not there."""

    @property
    def whole(self) -> bool:
        """Whether everything that `required` requires is there."""
        return not self.missing.keys() & set(LAYERS)


def lock_down(allowed: Confinement) -> Level:
    """Give up, for good, all that the guest is not allowed. One thread, before foreign code.

    A layer that the machine does not have is named in the result; the caller decides.
    """
    level = Level()
    if allowed.mode == "off":
        level.missing = dict.fromkeys(LAYERS, "[guest] sandbox is off")
        return level
    with _layer(level, "limits"):
        _limit(allowed)
    if sys.platform != "linux":
        level.missing |= dict.fromkeys(LAYERS[1:], f"{sys.platform} has no such thing")
    elif not kernel.seccomp_available():
        words = f"only x86-64 is supported, and this is {os.uname().machine}"
        level.missing |= dict.fromkeys(LAYERS[1:], words)
    else:
        _confine(allowed, level)
    if allowed.network:
        level.layers.append("network")
    return level


def shield_host() -> None:
    """Close this process's memory, environment and descriptors to others of the same user.

    Without it they are open in `/proc` to every process of the user, sandboxed or not. Costs us
    core dumps, and debuggers of the same user.
    """
    if sys.platform == "linux":
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)


def _confine(allowed: Confinement, level: Level) -> None:
    """The layers of Linux."""
    size = allowed.scratch_bytes
    read = [path for path in sys.path if os.path.exists(path)]
    read += [os.path.join(sys.base_prefix, "lib"), *_SYSTEM, *allowed.read]
    read += [os.path.join(allowed.home, "in"), *(_RESOLVER if allowed.network else ())]
    file = allowed.in_place
    with _layer(level, "namespaces"):
        shown = [*read, *([file[0]] if file else [])]
        kernel.enter_namespaces(allowed.home, shown, _DEVICES, allowed.scratch, size)
        _limit_threads()
    proved = [_proved(*file)] if file else []
    kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    with _layer(level, "landlock"):
        write = [*_DEVICES, *([allowed.scratch] if size else [])]
        # The large file comes as a descriptor: a path could lead elsewhere once more.
        trees = [os.path.realpath(path) for path in read]
        kernel.install_landlock([*trees, *proved], write, allowed.network)
    with _layer(level, "seccomp"):
        kernel.install_seccomp(os.getpid(), allowed.network)


def _proved(path: str, device: int, inode: int) -> int:
    """A descriptor of the large file. Whoever may write beside it may have exchanged it since it
    was proved, for a link to anything: then this process ends, before foreign code."""
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    look = os.fstat(place)
    if (look.st_dev, look.st_ino) != (device, inode):
        sys.exit(f"{path!r} is not the file any more that was to be read")
    return place


@contextlib.contextmanager
def _layer(level: Level, name: str) -> Iterator[None]:
    """Note that a layer is there, or why it is not."""
    try:
        yield
    except OSError as error:
        level.missing[name] = f"{error.filename or name}: {error.strerror or error}"
    else:
        level.layers.append(name)


def _limit_threads() -> None:
    """Hold an ordinary user's guest to THREADS, in the user namespace that it has just entered.

    Since Linux 5.14 the kernel counts those of that namespace by themselves; before, all that the
    user runs, so that a guest would be held to what others leave. Of root it counts none: the host
    looks (`engine.guest_process`).
    """
    release = re.match(r"([0-9]+)\.([0-9]+)", os.uname().release)
    if release and (int(release[1]), int(release[2])) >= (5, 14):
        _, most = resource.getrlimit(resource.RLIMIT_NPROC)
        least = THREADS if most == resource.RLIM_INFINITY else min(THREADS, most)
        resource.setrlimit(resource.RLIMIT_NPROC, (least, least))


def _limit(allowed: Confinement) -> None:
    """Limits of the process; its processor time is measured by the host, job by job."""
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_FSIZE: allowed.scratch_bytes,
        resource.RLIMIT_AS: allowed.memory_bytes,
    }
    for limit, value in limits.items():
        _, most = resource.getrlimit(limit)
        least = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (least, least))
