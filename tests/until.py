"""Waiting for what has no event to await: the ledger, the kernel, another process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

PATIENCE = 60.0
"""Seconds; a machine that is busy with ten other things needs some of them."""

PAUSE_SECONDS = 0.01


async def until(done: Callable[[], object]) -> None:
    """Ask until it is so.

    Raises:
        TimeoutError: it was never so.
    """
    async with asyncio.timeout(PATIENCE):
        while not done():
            await asyncio.sleep(PAUSE_SECONDS)


def wait_until(done: Callable[[], object], seconds: float = PATIENCE) -> None:
    """The same where no loop runs.

    Raises:
        TimeoutError: it was not so within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it was not so within {seconds:g} s")
        time.sleep(PAUSE_SECONDS)
