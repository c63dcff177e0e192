"""Plugins' environments on this machine: one folder a lock, shared by all plugins that have it.

A folder holds packages and nothing that we run: no interpreter and no `pyvenv.cfg`. A wheel may
put a file anywhere in it, and one that replaced `pyvenv.cfg` would choose the standard library
that a guest starts with, before any sandbox is there. What we know of a folder stands beside it,
out of a wheel's reach:

    <key>/       what the guest adds to `sys.path`
    <key>.ok     the folder is whole; its size in bytes is in it, its mtime is the last use
    <key>.lock   held, shared, by who uses the folder, and alone by who builds or removes it
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import stat
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

from casparian_flow.atomic import fsync_path, make_private, write_once
from casparian_flow.engine import byte_code
from casparian_flow.engine.locking import TooMuchWritten, check_lock, run_uv
from casparian_flow.errors import ArtifactRefused, EnvironmentFailed, PluginError, Unavailable
from casparian_flow.sections import GuestSettings
from casparian_flow.trees import clear_away, remove_tree

log = logging.getLogger(__name__)

SLACK_BYTES = 64 << 20
"""What uv writes besides packages: metadata of the index, mostly."""
SYNC = ("pip", "sync", "--quiet", "--require-hashes", "--no-build")


class EnvironmentStore:
    """The environments of this machine, each named by what is in it.

    Args:
        root: such as `config.cache_folder() / "envs"`; may be deleted while no guest runs.
        limit_bytes: beyond it those least recently used go, but none that is leased.
        given_up: asked while one is built whether nobody waits for it any more.
        one_limit_bytes: a larger one is not built.
    """

    def __init__(
        self,
        root: Path,
        limit_bytes: int,
        given_up: Callable[[], bool] = lambda: False,
        one_limit_bytes: int = GuestSettings().environment_limit_bytes,
    ) -> None:
        self._root = root
        self._limit_bytes = limit_bytes
        self._given_up = given_up
        self._one_limit_bytes = one_limit_bytes

    def lease(self, lock: str) -> Lease:
        """The environment of a lock, built where it is missing; release the lease after use.

        Whoever asks first builds; others, threads or processes, wait for it.

        Raises:
            ArtifactRefused: the lock holds anything but pinned packages with hashes.
            EnvironmentFailed: uv could not build it, or it is too large; nothing half-built is ever
                returned.
            Unavailable: the store's folder cannot be written or is another user's, or it was given
                up.
        """
        folder = self._root / environment_key(lock)
        try:
            if make_private(self._root):
                distrust(self._root)
            with contextlib.ExitStack() as undo:
                descriptor = open_lock(folder)
                undo.callback(os.close, descriptor)
                # Between holding it alone and sharing it nobody does: it may be removed then.
                while not in_use(folder, descriptor):
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                    if not marker(folder).exists():
                        build(folder, lock, descriptor, self._given_up, self._one_limit_bytes)
                        evict(self._root, self._limit_bytes)
                undo.pop_all()
        except OSError as error:
            raise Unavailable(
                f"the environments in {self._root} cannot be used: {error}",
                "see that the folder can be written and its disk has room",
            ) from error
        return Lease(folder, descriptor)


class Lease:
    """The use of an environment: it stays as it is, in every process's eyes, until `release`.

    Attributes:
        python: the interpreter to run with it; none of the environment's own.
        site_packages: the folder to import from.
    """

    def __init__(self, site_packages: Path, descriptor: int) -> None:
        self.python = Path(sys.executable).resolve()
        self.site_packages = site_packages
        self._descriptor = descriptor

    def compile(self, modules: Iterable[str], seconds: float) -> None:
        """Cache the byte code of modules that a guest imported without; see `byte_code`."""
        byte_code.compile_modules(self.python, self.site_packages, modules, seconds)

    def release(self) -> None:
        """Give it back; may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def environment_key(lock: str) -> str:
    """What makes two environments the same one: SHA-256, hexadecimal."""
    facts = (lock, platform.python_version(), sysconfig.get_platform(), sys.implementation.name)
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()


def marker(folder: Path) -> Path:
    """The file that says that an environment is whole."""
    return folder.with_suffix(".ok")


def open_lock(folder: Path) -> int:
    """A descriptor of its own for an environment's lock, not yet held."""
    return os.open(folder.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def in_use(folder: Path, descriptor: int) -> bool:
    """Share the environment's lock and note the use; False where there is no environment."""
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    try:
        os.utime(marker(folder))
    except FileNotFoundError:
        return False
    return True


def build(
    folder: Path, lock: str, descriptor: int, given_up: Callable[[], bool], limit_bytes: int
) -> None:
    """Make the environment from nothing, holding its lock alone.

    uv holds the lock too: if this process is killed, the next one waits until uv has ended.
    """

    def failed(words: str) -> EnvironmentFailed:
        return EnvironmentFailed(
            f"the plugin's environment cannot be built in {folder}: {words}",
            "see that the package index can be reached from here: uv is told which one by its "
            "variables or by the uv.toml of this user, not by files beside a plugin",
        )

    try:
        check_lock(lock, "the plugin's lock")
    except PluginError as error:
        raise ArtifactRefused(error.message, error.hint) from error
    if folder.exists():
        remove_tree(folder)
    folder.mkdir()
    folder.chmod(0o700)
    command = [*SYNC, "--python", sys.executable, "--target", str(folder), "-"]
    try:
        # In our own folder, since uv takes settings from the current one and those above it.
        run_uv(
            command, failed, folder=folder.parent, stdin=lock, holds=[descriptor],
            given_up=given_up,
            write_limit_bytes=2 * limit_bytes + SLACK_BYTES,  # unpacked, and copied from there
        )  # fmt: skip
    except TooMuchWritten as error:
        clear_away(folder)
        raise too_large(limit_bytes) from error
    if (size := size_bytes(folder)) > limit_bytes:
        clear_away(folder)
        raise too_large(limit_bytes)
    narrow(folder)
    os.sync()  # or a power cut could keep the marker and lose what it vouches for
    write_once(marker(folder), str(size).encode())


def too_large(limit_bytes: int) -> EnvironmentFailed:
    """The error for an environment that was not built, since it would have more than it may."""
    return EnvironmentFailed(
        f"the plugin's environment has more than {limit_bytes} bytes when it is unpacked "
        "([guest] environment_limit_bytes)",
        "depend on less, or raise the limit; uv keeps what it unpacked until: uv cache clean",
    )


def distrust(root: Path) -> None:
    """Remove the environments of a folder that others could write in; they are built again."""
    log.warning("%s could be written by other users: its environments are built again", root)
    for folder in root.iterdir():
        if folder.is_dir() and not remove(folder):
            log.warning("%s is in use and stays; stop what runs, and delete it", folder)


def size_bytes(folder: Path) -> int:
    """Bytes of all files in a folder; one that has several names is counted once."""
    sizes: dict[tuple[int, int], int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            look = os.lstat(os.path.join(parent, name))
            sizes[look.st_dev, look.st_ino] = look.st_size
    return sum(sizes.values())


def narrow(folder: Path) -> None:
    """Let nobody else write what is in a folder: uv's cache, which has the same files by other
    names, may have been filled under any umask.
    """
    for parent, _, names in os.walk(folder):
        for path in (parent, *(os.path.join(parent, name) for name in names)):
            mode = os.lstat(path).st_mode
            if mode & 0o022 and not stat.S_ISLNK(mode):
                os.chmod(path, stat.S_IMODE(mode) & ~0o022)


def evict(root: Path, limit_bytes: int) -> None:
    """Remove what is not whole, then what was least recently used, down to the limit."""
    known: list[tuple[int, int, Path]] = []
    for folder in root.iterdir():
        if not folder.is_dir():
            continue
        try:
            used = marker(folder).stat().st_mtime_ns
            known.append((used, int(marker(folder).read_bytes()), folder))
        except (FileNotFoundError, ValueError):
            remove(folder)
    excess = sum(size for _, size, _ in known) - limit_bytes
    for _, size, folder in sorted(known):
        if excess > 0 and remove(folder):
            excess -= size


def remove(folder: Path) -> bool:
    """Remove an environment, unless somebody uses, builds or removes it: then False."""
    with os.fdopen(open_lock(folder)) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # First, and durably: half an environment is never taken for one.
        marker(folder).unlink(missing_ok=True)
        fsync_path(folder.parent)
        clear_away(folder)
        return True
