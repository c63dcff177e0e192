"""Waiting for what has no event to await: the ledger, the kernel, another process."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 60.0
"""Seconds; a machine that is busy with ten other things needs some of them."""

PAUSE_SECONDS = 0.01


async def eventually(predicate: Callable[[], T | Awaitable[T]], seconds: float = PATIENCE) -> T:
    """Call a function, or a coroutine function, until what it returns is true; return that.

    Raises:
        TimeoutError: it never was.
    """
    async with asyncio.timeout(seconds):
        while True:
            value = predicate()
            found = await value if inspect.isawaitable(value) else value
            if found:
                return found
            await asyncio.sleep(PAUSE_SECONDS)


def wait_until(predicate: Callable[[], T], seconds: float = PATIENCE) -> T:
    """The same without an event loop: it blocks the thread.

    Raises:
        TimeoutError: it never was.
    """
    deadline = time.monotonic() + seconds
    while not (found := predicate()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(PAUSE_SECONDS)
    return found
