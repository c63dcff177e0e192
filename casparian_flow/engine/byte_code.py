"""Cache byte code for an environment's modules, which guests can read but not write.

An environment is installed without byte code: compiling all of pandas and pyarrow takes longer than
many plugins run. Modules that guests import are compiled once, in a subprocess that runs none of
them, since a hostile source can exhaust or crash the compiler. This file is also the subprocess's
script.
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
"""Modules of one call at most; pandas and pyarrow together import some 400."""
NAME_LIMIT = 4096
"""Bytes of a name, as PATH_MAX."""
NAMES_LIMIT = 1 << 20
"""Bytes of all names; those of pandas and pyarrow have some 40,000."""
SECONDS = 120
"""Limit of processor time, and of wall clock time."""
LIMITS = {
    resource.RLIMIT_AS: 2 << 30,
    resource.RLIMIT_CPU: SECONDS,
    resource.RLIMIT_FSIZE: 64 << 20,
    resource.RLIMIT_CORE: 0,
}


_tried: set[tuple[str, int, int]] = set()
"""Modules (path, inode, ctime) that this process compiled or failed to: one that crashes or stalls
the compiler is not tried again with each job."""


def compile_modules(
    python: Path, site_packages: Path, modules: Iterable[str], seconds: float
) -> None:
    """Cache the byte code of an environment's modules; skip those that fail.

    Args:
        python: the interpreter that will import them.
        site_packages: the environment's folder, leased.
        modules: file names from a guest, untrusted.
        seconds: time limit; SECONDS at most.
    """
    if seconds <= 0:
        return
    keyed = {key: name for name in real_modules(site_packages, modules) for key in _key(name)}
    untried = [name for key, name in keyed.items() if key not in _tried]
    if not untried:
        return
    if len(_tried) > 10 * MODULES_LIMIT:
        _tried.clear()
    _tried.update(keyed)
    command = [str(python), "-I", "-S", __file__]
    names = "\0".join(untried).encode("utf-8", "surrogateescape")
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
        log.warning("cannot cache byte code for %s: %s", site_packages, error)
        return
    if done.returncode:
        log.warning("caching byte code for %s ended early (%d)", site_packages, done.returncode)


def _key(name: str) -> Iterator[tuple[str, int, int]]:
    with contextlib.suppress(OSError):
        status = os.lstat(name)
        yield name, status.st_ino, status.st_ctime_ns


def real_modules(site_packages: Path, modules: Iterable[str]) -> Iterator[str]:
    """The names that are source files inside the environment, with symlinks resolved."""
    inside = os.path.join(os.path.realpath(site_packages), "")
    for name in _plausible((os.path.join(site_packages, ""), inside), modules):
        # A NUL or a lone surrogate raises ValueError, a name that is too long OSError.
        with contextlib.suppress(ValueError, OSError):
            os.lstat(name)  # realpath is slow for names that do not exist
            path = os.path.realpath(name)
            cache = os.path.realpath(os.path.join(os.path.dirname(path), "__pycache__"))
            ours = path.startswith(inside) and cache.startswith(inside)
            if ours and path.endswith(".py") and stat.S_ISREG(os.lstat(path).st_mode):
                yield path


def _plausible(folders: tuple[str, str], names: Iterable[str]) -> Iterator[str]:
    """Filter names without a system call: resolving a name takes time that grows with the square of
    its length, and a guest may send any number of names."""
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
    """Compile the modules named on standard input, separated by NUL."""
    for limit, value in LIMITS.items():
        # macOS cannot set some of the limits.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (value, value))
    for name in os.fsdecode(sys.stdin.buffer.read()).split("\0"):
        compileall.compile_file(name, quiet=2)


if __name__ == "__main__":
    main()
