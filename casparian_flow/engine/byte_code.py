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
SECONDS = 120
"""Of processor time, and a little more by the clock."""
LIMITS = {
    resource.RLIMIT_AS: 2 << 30,
    resource.RLIMIT_CPU: SECONDS,
    resource.RLIMIT_FSIZE: 64 << 20,
    resource.RLIMIT_CORE: 0,
}


def compile_modules(python: Path, site_packages: Path, modules: Iterable[str]) -> None:
    """Cache the byte code of modules that lie in an environment; what cannot be is left out.

    Args:
        python: the interpreter that will import them.
        site_packages: the environment's folder, leased.
        modules: file names as a guest gave them: none is believed.
    """
    wanted = list(real_modules(site_packages, modules))
    if not wanted:
        return
    command = [str(python), "-I", "-S", __file__]
    names = "\0".join(wanted).encode("utf-8", "surrogateescape")
    try:
        done = subprocess.run(
            command, input=names, env={}, capture_output=True, timeout=SECONDS * 2, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("byte code for %s was not cached: %s", site_packages, error)
        return
    if done.returncode:
        log.warning("caching byte code for %s ended early (%d)", site_packages, done.returncode)


def real_modules(site_packages: Path, modules: Iterable[str]) -> Iterator[str]:
    """Those names that are sources in the environment, whatever links lead there."""
    inside = os.path.join(os.path.realpath(site_packages), "")
    for name in dict.fromkeys(itertools.islice(modules, MODULES_LIMIT)):
        # A NUL has no place in a name, nor has what is no text; a name can be too long for a look.
        with contextlib.suppress(ValueError, OSError):
            path = os.path.realpath(name)
            cache = os.path.realpath(os.path.join(os.path.dirname(path), "__pycache__"))
            ours = path.startswith(inside) and cache.startswith(inside)
            if ours and path.endswith(".py") and stat.S_ISREG(os.lstat(path).st_mode):
                yield path


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
