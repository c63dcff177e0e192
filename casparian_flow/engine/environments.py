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


# The folder that a guest imports us from: the guest's side, the sdk, the sandbox, and no more.
#
# What is in it locks the guest down, so it is compared with what we have at each use: a byte that
# differs, in byte code too, or a file more, and it is made anew.


BUNDLED = (
    "__init__.py",
    "sdk.py",
    "trees.py",
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
"""Byte code of this kind is taken as it is: the guest does not look at times or at the source."""
_MARSHAL = 2
"""The last format without references, in which equal code is equal bytes in every process."""


def bundle(cache: Path) -> Path:
    """The folder that holds what a guest imports from us, and nothing else.

    It is made once, and again where what is found there is not what we put there.

    Args:
        cache: a folder that may be deleted at any time, such as `config.cache_folder()`.

    Raises:
        Unavailable: the cache belongs to another user.
    """
    name = _digest()
    folder = cache / "guest" / name
    for parent in (cache, folder.parent):
        make_private(parent)
    wanted = _wanted(folder)
    if os.path.lexists(folder):
        if fault := _fault(folder, wanted):
            log.warning("%s was changed (%s): it is made anew", folder, fault)
        else:
            return folder
    temporary = Path(tempfile.mkdtemp(prefix=f".{name[:8]}.", dir=folder.parent))
    try:
        _write(temporary / "new", wanted)
        if os.path.lexists(folder):
            folder.rename(temporary / "old")
        (temporary / "new").rename(folder)
    except OSError:
        if _fault(folder, wanted):  # else another process was first, with the same bytes
            raise
    finally:
        clear_away(temporary)
    return folder


@functools.cache
def _sources() -> Mapping[str, bytes]:
    package = resources.files("casparian_flow")
    return {name: package.joinpath(name).read_bytes() for name in BUNDLED}


def _digest() -> str:
    """Names the folder: what is in it, and for which Python its byte code is."""
    python = importlib.util.MAGIC_NUMBER, sys.implementation.cache_tag, sys.flags.optimize
    return hashlib.sha256(repr((sorted(_sources().items()), python)).encode()).hexdigest()


@functools.cache
def _wanted(folder: Path) -> Mapping[str, bytes]:
    """Every file of the folder by its path in it. A guest cannot write byte code: it has it."""
    files = {}
    for name, source in _sources().items():
        path = f"casparian_flow/{name}"
        files[path] = source
        code = compile(source, str(folder / path), "exec", dont_inherit=True)
        with contextlib.suppress(ValueError):  # slices, constants since 3.14: that file has none
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
    """Folders that only we enter, files that nobody writes; whatever the umask is."""
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


def _fault(folder: Path, wanted: Mapping[str, bytes]) -> str:
    """What differs from what we put there; empty where nothing does."""
    return next(_faults(folder, wanted), "")


def _faults(folder: Path, wanted: Mapping[str, bytes]) -> Iterator[str]:
    folders = {str(parent) for path in wanted for parent in Path(path).parents}
    waiting = ["."]
    found = set()
    while waiting:
        here = waiting.pop()
        try:
            look = os.lstat(folder / here)
            if look.st_uid != os.geteuid() or look.st_mode & 0o777 != 0o700:
                yield f"the owner or the mode of {here}"
            entries = list(os.scandir(folder / here))
        except OSError as error:
            yield f"{here}: {error.strerror}"
            continue
        for entry in entries:
            path = os.path.normpath(os.path.join(here, entry.name))
            if path in folders and entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            elif path not in wanted or not entry.is_file(follow_symlinks=False):
                yield f"{path!r} is not ours"
            elif not _holds(entry, wanted[path]):
                yield f"{path!r} has other bytes"
            else:
                found.add(path)
    yield from (f"{path!r} is missing" for path in sorted(set(wanted) - found))


def _holds(file: os.DirEntry[str], content: bytes) -> bool:
    return (
        file.stat(follow_symlinks=False).st_size == len(content)
        and Path(file.path).read_bytes() == content
    )
