"""Named places where a crash is worth trying.

`crashpoint("committer.decided")` does nothing until `arm` has given it something to do; what a
harness arms ends the process, cuts the power of a filesystem, or counts.
"""

from __future__ import annotations

from collections.abc import Callable

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
