"""Waiting for what has no event to await: the ledger, the kernel, another process."""

from __future__ import annotations

import asyncio
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
