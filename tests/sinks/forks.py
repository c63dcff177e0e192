"""Publishing in a fork that dies at a crash point of its own process."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

from casparian_flow import crashpoints


def dies(act: Callable[[], object], at: int, die: Callable[[], object] = crashpoints.die) -> bool:
    """Whether a fork that does it comes to its n-th crash point, and ends there.

    Args:
        die: what happens there; `kill -9` in the end, whatever it is.

    Raises:
        AssertionError: it failed before it came there.
    """
    process = os.fork()
    if not process:
        count = 0

        def react(_: str) -> None:
            nonlocal count
            count += 1
            if count == at:
                die()
                crashpoints.die()

        with suppress(BaseException):
            crashpoints.arm(react)
            act()
            os._exit(0)
        os._exit(1)
    status = os.waitpid(process, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise AssertionError(f"it failed before crash point {at}")
    return os.WIFSIGNALED(status)
