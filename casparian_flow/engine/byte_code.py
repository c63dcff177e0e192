"""Byte code of an environment's modules, which a guest may read but not write.

An environment is installed without: compiling all of pandas and pyarrow takes longer than many
plugins ever run. What guests import is compiled once, in a process of its own that runs none of
it: a stranger's source can exhaust or crash the compiler. This file is that process's script too.
"""

from __future__ import annotations

import compileall
import contextlib
import itertools
import logging
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)

MODULES_LIMIT = 10_000
"""pandas and pyarrow together import some 400."""
NAME_LIMIT = 4096
"""Bytes of a name, as in PATH_MAX: no file has a longer one."""
NAMES_LIMIT = 1 << 20
"""Bytes of all names: those of pandas and pyarrow have some 40,000."""
SECONDS = 120
"""Of processor time, and of the clock."""
LIMITS = {
    resource.RLIMIT_AS: 2 << 30,
    resource.RLIMIT_CPU: SECONDS,
    resource.RLIMIT_FSIZE: 64 << 20,
    resource.RLIMIT_CORE: 0,
}


_tried: set[tuple[str, int, int]] = set()
"""Modules (path, inode, time of its change) that this process had compiled, or came to grief over:
one that ends or stalls its compiler is not tried again with each job."""


def compile_modules(
    python: Path, site_packages: Path, modules: Iterable[str], seconds: float
) -> None:
    """Cache the byte code of modules that lie in an environment; what cannot be is left out.

    Args:
        python: the interpreter that will import them.
        site_packages: the environment's folder, leased.
        modules: file names as a guest gave them: none is believed.
        seconds: what may be spent on it, at most SECONDS.
    """
    if seconds <= 0:
        return
    found = {key: name for name in real_modules(site_packages, modules) for key in _key(name)}
    wanted = [name for key, name in found.items() if key not in _tried]
    if not wanted:
        return
    if len(_tried) > 10 * MODULES_LIMIT:
        _tried.clear()
    _tried.update(found)
    command = [str(python), "-I", "-S", __file__]
    names = "\0".join(wanted).encode("utf-8", "surrogateescape")
    try:
        done = subprocess.run(
            command,
            input=names,
            env={},
            capture_output=True,
            timeout=min(seconds, SECONDS),
            check=False,
            umask=0o077,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("byte code for %s was not cached: %s", site_packages, error)
        return
    if done.returncode:
        log.warning("caching byte code for %s ended early (%d)", site_packages, done.returncode)


def _key(name: str) -> Iterator[tuple[str, int, int]]:
    with contextlib.suppress(OSError):
        look = os.lstat(name)
        yield name, look.st_ino, look.st_ctime_ns


def real_modules(site_packages: Path, modules: Iterable[str]) -> Iterator[str]:
    """Those names that are sources in the environment, whatever links lead there."""
    inside = os.path.join(os.path.realpath(site_packages), "")
    for name in _plausible((os.path.join(site_packages, ""), inside), modules):
        # A NUL has no place in a name, nor has what is no text; a name can be too long for a look.
        with contextlib.suppress(ValueError, OSError):
            os.lstat(name)  # what is not there is not resolved, one name after the other
            path = os.path.realpath(name)
            cache = os.path.realpath(os.path.join(os.path.dirname(path), "__pycache__"))
            ours = path.startswith(inside) and cache.startswith(inside)
            if ours and path.endswith(".py") and stat.S_ISREG(os.lstat(path).st_mode):
                yield path


def _plausible(folders: tuple[str, str], names: Iterable[str]) -> Iterator[str]:
    """Those names that are worth a look, told without one: a look at a name takes time that grows
    with the square of its length, and a guest may send any names, in any number."""
    total = 0
    for name in dict.fromkeys(itertools.islice(names, MODULES_LIMIT)):
        size = len(name.encode("utf-8", "surrogatepass"))
        total += size
        if total > NAMES_LIMIT:
            return
        parts = name.split("/", 64)
        straight = not {"", ".", ".."} & set(parts[1:]) and len(parts) <= 64
        if size < NAME_LIMIT and name.startswith(folders) and straight:
            yield name


def main() -> None:
    """Compile the modules whose names come on standard input, each NUL from the next."""
    for limit, value in LIMITS.items():
        # macOS knows some limits that it cannot set.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (value, value))
    for name in os.fsdecode(sys.stdin.buffer.read()).split("\0"):
        compileall.compile_file(name, quiet=2)


if __name__ == "__main__":
    main()
