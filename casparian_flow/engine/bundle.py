"""The folder that a guest imports us from: the guest's side, the sdk, the sandbox, and no more.

What is in it locks the guest down, so it is compared with what we have at each use: a byte that
differs, in byte code too, or a file more, and it is made anew.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import logging
import marshal
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path

from casparian_flow.atomic import make_private
from casparian_flow.trees import clear_away

log = logging.getLogger(__name__)

BUNDLED = (
    "__init__.py",
    "sdk.py",
    "trees.py",
    "engine/__init__.py",
    "engine/attempt.py",
    "engine/frames.py",
    "engine/guest.py",
    "engine/layouts.py",
    "engine/sizes.py",
    "security/__init__.py",
    "security/kernel.py",
    "security/landlock.py",
    "security/namespaces.py",
    "security/sandbox.py",
    "security/seccomp.py",
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
