"""Named places where a crash is worth trying.

`crashpoint("committer.decided")` does nothing until `arm` has given it something to do; what a
harness arms ends the process, cuts the power of a filesystem, or counts. A `Trap` is what
`CASPARIAN_CRASH_AT` and `CASPARIAN_CRASH_LOG` arm (`config.arm_crashpoints`).
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from casparian_flow.errors import ConfigError

_PLACE = re.compile(r'crashpoint\("([a-z_]+\.[a-z_]+)"\)')

_react: Callable[[str], None] | None = None


def crashpoint(name: str) -> None:
    """Be at a place; what it is called says what has just been done.

    Args:
        name: a literal, `module.what_happened`, unique in the package.
    """
    if _react is not None:
        _react(name)


def arm(react: Callable[[str], None]) -> None:
    """Have `react` called with the name of every crash point that this process comes to."""
    global _react  # noqa: PLW0603  one process, one harness
    _react = react


def known() -> list[str]:
    """The name of every crash point, read from the package's own source."""
    package = Path(__file__).parent
    sources = (path.read_text("utf-8") for path in package.rglob("*.py") if path.name != _SELF)
    return sorted(name for source in sources for name in _PLACE.findall(source))


_SELF = Path(__file__).name


def die() -> None:
    """End as `kill -9` ends a process: at once, and nothing is tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)


class Trap:
    """Writes down each crash point that the process comes to, and springs at one of them.

    Args:
        at: `name` or `name:n`: where to spring, and at which time of coming there (from 1);
            empty: nowhere.
        log: a file that gets a line `name:n` for each, before the trap springs; empty: none.
        spring: what to do there.

    Raises:
        ConfigError: there is no such crash point, or the log cannot be written.
    """

    def __init__(self, at: str = "", log: str = "", spring: Callable[[], None] = die) -> None:
        name, _, hit = at.partition(":")
        if at and (name not in known() or not (hit or "1").isdecimal()):
            raise ConfigError(
                f"CASPARIAN_CRASH_AT: there is no crash point {at!r}",
                "name one of docs/job_lifecycle.md, such as committer.decided:2, or unset it",
            )
        self._at = f"{name}:{hit or 1}"
        self._spring = spring
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            self._log = os.open(log, flags, 0o600) if log else None
        except OSError as error:
            raise ConfigError(f"CASPARIAN_CRASH_LOG {log}: {error.strerror}") from error

    def __call__(self, name: str) -> None:
        """Come to a crash point."""
        with self._lock:
            self._counts[name] += 1
            hit = f"{name}:{self._counts[name]}"
            if self._log is not None:
                os.write(self._log, f"{hit}\n".encode())
            if hit == self._at:
                self._spring()
