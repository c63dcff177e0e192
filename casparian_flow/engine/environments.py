"""The cache of plugins' environments: one folder per lock, shared by all plugins with that lock.

A folder holds packages only, without an interpreter or `pyvenv.cfg`. A wheel can put a file
anywhere in it, and a replaced `pyvenv.cfg` would choose the guest's standard library before the
sandbox is active. The state of a folder is kept beside it, where no wheel can write:

    <key>/       what the guest adds to `sys.path`
    <key>.ok     the folder is complete; contains its size in bytes, its mtime is the last use
    <key>.lock   flock: shared while the folder is used, exclusive while it is built or removed
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import logging
import marshal
import os
import platform
import stat
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Self

from casparian_flow.config import GuestSettings
from casparian_flow.durable import fsync_path, make_private, write_once
from casparian_flow.engine import byte_code
from casparian_flow.engine.locking import TooMuchWritten, check_lock, run_uv
from casparian_flow.errors import ArtifactRefused, EnvironmentFailed, PluginError, Unavailable
from casparian_flow.trees import clear_away, remove_tree

log = logging.getLogger(__name__)


SLACK_BYTES = 64 << 20
"""Allowance for what uv writes besides packages, mostly metadata of the index."""
SYNC = ("pip", "sync", "--quiet", "--require-hashes", "--no-build")
LOOK_SECONDS = 0.05
"""How often one looks whether another has built the environment."""


class EnvironmentStore:
    """The environments of this machine, each named by a hash of its lock and platform.

    Args:
        root: such as `config.cache_folder() / "envs"`; may be deleted while no guest runs.
        limit_bytes: size of all environments; the least recently used are removed, never a leased
            one.
        given_up: polled during a build, also another's; True cancels it, or the wait.
        one_limit_bytes: size limit of one environment.
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
        """Lease the environment of a lock, building it if it is missing.

        The first caller builds it; other threads and processes wait.

        Raises:
            ArtifactRefused: the lock holds anything but pinned packages with hashes.
            EnvironmentFailed: uv could not build it, or it is too large.
            Unavailable: the folder cannot be written or belongs to another user, or the build was
                cancelled.
        """
        folder = self._root / environment_key(lock)
        try:
            if make_private(self._root):
                distrust(self._root)
            with contextlib.ExitStack() as undo:
                descriptor = open_lock(folder)
                undo.callback(os.close, descriptor)
                # Going from the exclusive to the shared lock is not atomic: it may be removed.
                while not in_use(folder, descriptor):
                    if not locked(descriptor, fcntl.LOCK_EX):
                        self._wait(descriptor)
                    elif not marker(folder).exists():
                        build(folder, lock, descriptor, self._given_up, self._one_limit_bytes)
                        evict(self._root, self._limit_bytes)
                undo.pop_all()
        except OSError as error:
            raise Unavailable(
                f"cannot use the environments in {self._root}: {error}",
                "make sure the folder is writable and its disk has room",
            ) from error
        return Lease(folder, descriptor)

    def _wait(self, descriptor: int) -> None:
        """Wait a moment without a lock, so that another may build.

        Who waited for the exclusive lock itself, and was not the first to get it, would wait as
        long as the first one uses what it built.
        """
        if self._given_up():
            raise Unavailable("the wait for an environment was ended, since its job was aborted")
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        time.sleep(LOOK_SECONDS)


class Lease:
    """A shared lock on an environment: no process may delete or change it until `release`.

    Attributes:
        python: the interpreter to use, which is not part of the environment.
        site_packages: the folder to import from.
    """

    def __init__(self, site_packages: Path, descriptor: int) -> None:
        self.python = Path(sys.executable).resolve()
        self.site_packages = site_packages
        self._descriptor = descriptor

    def compile(self, modules: Iterable[str], seconds: float) -> None:
        """Cache the byte code of these modules; see `byte_code.compile_modules`."""
        byte_code.compile_modules(self.python, self.site_packages, modules, seconds)

    def release(self) -> None:
        """Release the lock; may be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def environment_key(lock: str) -> str:
    """The name of the environment of a lock on this platform: SHA-256, hexadecimal."""
    facts = (lock, platform.python_version(), sysconfig.get_platform(), sys.implementation.name)
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()


def marker(folder: Path) -> Path:
    """The file that marks an environment as complete."""
    return folder.with_suffix(".ok")


def open_lock(folder: Path) -> int:
    """Open an environment's lock file without locking it."""
    return os.open(folder.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def locked(descriptor: int, kind: int) -> bool:
    """Take a lock of this kind, if it can be had now."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def in_use(folder: Path, descriptor: int) -> bool:
    """Take the shared lock and record the use; False if the environment is not complete."""
    if not locked(descriptor, fcntl.LOCK_SH):
        return False
    try:
        os.utime(marker(folder))
    except FileNotFoundError:
        return False
    return True


def build(
    folder: Path, lock: str, descriptor: int, given_up: Callable[[], bool], limit_bytes: int
) -> None:
    """Build the environment, under the exclusive lock.

    uv inherits the lock: if this process is killed, the next one waits until uv has ended.
    """

    def failed(output: str) -> EnvironmentFailed:
        return EnvironmentFailed(
            f"the plugin's environment cannot be built in {folder}: {output}",
            "check that the package index can be reached from here; uv's variables or your "
            "uv.toml name the index, files beside a plugin do not",
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
        # In our own folder: uv reads settings from the current folder and those above it.
        run_uv(
            command, failed, folder=folder.parent, stdin=lock, holds=[descriptor],
            given_up=given_up,
            write_limit_bytes=2 * limit_bytes + SLACK_BYTES,  # uv unpacks, then copies
        )  # fmt: skip
    except TooMuchWritten as error:
        clear_away(folder)
        raise too_large(limit_bytes) from error
    if (size := size_bytes(folder)) > limit_bytes:
        clear_away(folder)
        raise too_large(limit_bytes)
    narrow(folder)
    os.sync()  # else a power cut could keep the marker and lose files
    write_once(marker(folder), str(size).encode())


def too_large(limit_bytes: int) -> EnvironmentFailed:
    return EnvironmentFailed(
        f"the plugin's environment has more than {limit_bytes} bytes when unpacked ([guest] "
        "environment_limit_bytes)",
        "use fewer packages, or raise the limit; `uv cache clean` removes what uv has unpacked",
    )


def distrust(root: Path) -> None:
    """Remove all environments of a folder that other users could write to."""
    log.warning("other users could write to %s: its environments are built again", root)
    for folder in root.iterdir():
        if folder.is_dir() and not remove(folder):
            log.warning(
                "%s is in use and was not deleted; stop the processes that use it, then delete it",
                folder,
            )


def size_bytes(folder: Path) -> int:
    """Bytes of all files in a folder; hard links count once."""
    sizes: dict[tuple[int, int], int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            status = os.lstat(os.path.join(parent, name))
            sizes[status.st_dev, status.st_ino] = status.st_size
    return sum(sizes.values())


def narrow(folder: Path) -> None:
    """Remove write permission of group and others: the files are hard links into uv's cache, which
    may have been filled under any umask.
    """
    for parent, _, names in os.walk(folder):
        for path in (parent, *(os.path.join(parent, name) for name in names)):
            mode = os.lstat(path).st_mode
            if mode & 0o022 and not stat.S_ISLNK(mode):
                os.chmod(path, stat.S_IMODE(mode) & ~0o022)


def evict(root: Path, limit_bytes: int) -> None:
    """Remove incomplete environments, then the least recently used, down to the limit."""
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
    """Remove an environment; False if it is locked (in use, being built or removed)."""
    with os.fdopen(open_lock(folder)) as lock:
        if not locked(lock.fileno(), fcntl.LOCK_EX):
            return False
        # The marker first and durably, so that no partial environment has one.
        marker(folder).unlink(missing_ok=True)
        fsync_path(folder.parent)
        clear_away(folder)
        return True


# The bundle: the folder that a guest imports `casparian_flow` from, with the guest's side, the sdk,
# what holds rows against a contract, and the sandbox only. Since its code activates the sandbox, it
# is compared byte by byte at each use (byte code too), and made again if anything differs.

BUNDLED = (
    "__init__.py",
    "candidates.py",
    "cells.py",
    "contract.py",
    "contract_words.py",
    "intake.py",
    "path_patterns.py",
    "sdk.py",
    "survey.py",
    "time_formats.py",
    "trees.py",
    "typed.py",
    "engine/__init__.py",
    "engine/attempt.py",
    "engine/frames.py",
    "engine/guest.py",
    "engine/sizes.py",
    "security/__init__.py",
    "security/kernel.py",
    "security/sandbox.py",
)
_UNCHECKED_HASH = (1).to_bytes(4, "little")
"""Flag of byte code that Python uses without checking the source or its time."""
_MARSHAL = 2
"""The last marshal format without references: equal code gives equal bytes in every process."""


def bundle(cache: Path) -> Path:
    """The folder that a guest imports `casparian_flow` from.

    Made once, and again if its content is not as expected.

    Args:
        cache: a folder that may be deleted at any time, such as `config.cache_folder()`.

    Raises:
        Unavailable: the cache belongs to another user.
    """
    name = _digest()
    folder = cache / "guest" / name
    for parent in (cache, folder.parent):
        make_private(parent)
    files = _files(folder)
    if os.path.lexists(folder):
        if fault := _fault(folder, files):
            log.warning("%s was changed (%s): building it again", folder, fault)
        else:
            return folder
    temporary = Path(tempfile.mkdtemp(prefix=f".{name[:8]}.", dir=folder.parent))
    try:
        _write(temporary / "new", files)
        if os.path.lexists(folder):
            folder.rename(temporary / "old")
        (temporary / "new").rename(folder)
    except OSError:
        if _fault(folder, files):  # else another process was first, with the same bytes
            raise
    finally:
        clear_away(temporary)
    return folder


@functools.cache
def _sources() -> Mapping[str, bytes]:
    package = resources.files("casparian_flow")
    return {name: package.joinpath(name).read_bytes() for name in BUNDLED}


def _digest() -> str:
    """The bundle's name: a hash of its sources and of the Python version of its byte code."""
    python = importlib.util.MAGIC_NUMBER, sys.implementation.cache_tag, sys.flags.optimize
    return hashlib.sha256(repr((sorted(_sources().items()), python)).encode()).hexdigest()


@functools.cache
def _files(folder: Path) -> Mapping[str, bytes]:
    """Path in the folder -> content, for sources and byte code (a guest cannot write any)."""
    files = {}
    for name, source in _sources().items():
        path = f"casparian_flow/{name}"
        files[path] = source
        code = compile(source, str(folder / path), "exec", dont_inherit=True)
        with contextlib.suppress(
            ValueError
        ):  # Python 3.14 has slice constants, which this format cannot hold
            files[importlib.util.cache_from_source(path)] = b"".join(
                (
                    importlib.util.MAGIC_NUMBER,
                    _UNCHECKED_HASH,
                    importlib.util.source_hash(source),
                    marshal.dumps(code, _MARSHAL),
                )
            )
    return files


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files, with modes 0700 and 0444 whatever the umask is."""
    folder.mkdir()
    folder.chmod(0o700)
    for path, content in files.items():
        file = folder
        for part in Path(path).parts[:-1]:
            file /= part
            if not file.is_dir():
                file.mkdir()
                file.chmod(0o700)
        file /= Path(path).name
        file.write_bytes(content)
        file.chmod(0o444)


def _fault(folder: Path, files: Mapping[str, bytes]) -> str:
    """The first difference between a folder and these files; empty if there is none."""
    return next(_faults(folder, files), "")


def _faults(folder: Path, files: Mapping[str, bytes]) -> Iterator[str]:
    folders = {str(parent) for path in files for parent in Path(path).parents}
    waiting = ["."]
    intact = set()
    while waiting:
        inner = waiting.pop()
        try:
            status = os.lstat(folder / inner)
            if status.st_uid != os.geteuid() or status.st_mode & 0o777 != 0o700:
                yield f"the owner or the mode of {inner}"
            entries = list(os.scandir(folder / inner))
        except OSError as error:
            yield f"{inner}: {error.strerror}"
            continue
        for entry in entries:
            path = os.path.normpath(os.path.join(inner, entry.name))
            if path in folders and entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            elif path not in files or not entry.is_file(follow_symlinks=False):
                yield f"{path!r} is an unknown file"
            elif not _holds(entry, files[path]):
                yield f"{path!r} has other content"
            else:
                intact.add(path)
    yield from (f"{path!r} is missing" for path in sorted(set(files) - intact))


def _holds(file: os.DirEntry[str], content: bytes) -> bool:
    return (
        file.stat(follow_symlinks=False).st_size == len(content)
        and Path(file.path).read_bytes() == content
    )
