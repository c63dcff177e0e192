"""One thread for all that a worker does with its guests, which no end of the process waits for.

The kernel kills a guest when the thread that started it ends, so it is one for life. A call in it
may hang for good, in a filesystem that does not answer or in a fault of ours. `ThreadPoolExecutor`
would make the process wait for it at its end, whatever signal came.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from casparian_flow.errors import ExitCode

T = TypeVar("T")


class OneThread:
    """Runs one call after another; it starts with the first."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Any] | None]
        self._calls = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def run(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """Have a call made after those before it; its outcome comes to this event loop."""
        if not self._thread.is_alive():
            self._thread.start()
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._calls.put((future, call))
        return asyncio.wrap_future(future)

    def stop(self) -> None:
        """Let the thread end when it has done what it was given."""
        self._calls.put(None)

    def leave_behind(self) -> None:
        """Have the process end without what runs here: with `ExitCode.DAEMON` if it still runs.

        Once the interpreter takes itself apart, a thread in foreign code may crash it.
        """
        atexit.register(self._end)

    def _end(self) -> None:
        if self._thread.is_alive():
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(ExitCode.DAEMON)

    def _run(self) -> None:
        while (given := self._calls.get()) is not None:
            future, call = given
            if not future.set_running_or_notify_cancel():
                continue
            try:
                outcome = call()
            except BaseException as error:  # noqa: BLE001  whoever waits for it gets it
                future.set_exception(error)
            else:
                future.set_result(outcome)
