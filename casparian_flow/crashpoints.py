"""Named points in the code at which tests simulate a crash.

`crashpoint("committer.decided")` does nothing until `arm` installs a callback, which may end the
process, cut the power of a filesystem, or count. `CASPARIAN_CRASH_AT` and `CASPARIAN_CRASH_LOG` arm
a `Trap` (`config.arm_crashpoints`).
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
    """Mark a crash point, named after the step that was just done.

    Args:
        name: a literal, `module.what_happened`, unique in the package.
    """
    if _react is not None:
        _react(name)


def arm(react: Callable[[str], None]) -> None:
    """Call `react` with the name of every crash point that this process reaches."""
    global _react  # noqa: PLW0603  one process, one harness
    _react = react


def known() -> list[str]:
    """The names of all crash points, found in the package's source."""
    package = Path(__file__).parent
    sources = (path.read_text("utf-8") for path in package.rglob("*.py") if path.name != _SELF)
    return sorted(name for source in sources for name in _PLACE.findall(source))


_SELF = Path(__file__).name


def die() -> None:
    """Kill this process with SIGKILL, without any cleanup."""
    os.kill(os.getpid(), signal.SIGKILL)


class Trap:
    """Logs each crash point that the process reaches, and calls `spring` at one of them.

    Args:
        at: `name` or `name:n`: the crash point, and at its n-th time (from 1); empty: none.
        log: file that gets a line `name:n` for each, before `spring` is called; empty: none.
        spring: called at `at`.

    Raises:
        ConfigError: there is no such crash point, or the log cannot be written.
    """

    def __init__(self, at: str = "", log: str = "", spring: Callable[[], None] = die) -> None:
        name, _, hit = at.partition(":")
        if at and (name not in known() or not (hit or "1").isdecimal()):
            raise ConfigError(
                f"CASPARIAN_CRASH_AT: there is no crash point {at!r}",
                "use one of docs/job_lifecycle.md, such as committer.decided:2, or unset it",
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
        """Handle a crash point that was reached."""
        with self._lock:
            self._counts[name] += 1
            hit = f"{name}:{self._counts[name]}"
            if self._log is not None:
                os.write(self._log, f"{hit}\n".encode())
            if hit == self._at:
                self._spring()
