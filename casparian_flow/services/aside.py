"""Work on a thread that does not outlive the coroutine that waits for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def aside(stop: threading.Event, work: Callable[[], T]) -> T:
    """Run `work` on a thread of the pool.

    When we are cancelled `stop` is set, and the thread is waited for: it must be gone before what
    it uses is.

    Raises:
        Exception: what `work` raises.
    """
    working = asyncio.create_task(asyncio.to_thread(work))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([working])
        raise
