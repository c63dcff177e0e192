"""Ends a guest that has started too many threads, whatever its host does meanwhile.

A thread costs the kernel some 30 KiB that no limit of the guest's memory counts, and a process id,
of which a machine has few. The kernel holds an ordinary user's guest to a number; root's it does
not. So one thread of this process looks at all guests that run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable

from casparian_flow.engine.guest_process import status_number
from casparian_flow.security.sandbox import THREADS

LOOK_SECONDS = 0.05
"""One that does nothing else starts some eight hundred in it, which is not yet too much to hold."""


class ThreadWatch:
    """Looks at processes that nobody has waited for yet, so that their numbers stay theirs."""

    def __init__(self) -> None:
        self._watched: dict[int, Callable[[], None]] = {}
        self._change = threading.Condition()
        self._started = False

    def watch(self, pid: int, on_kill: Callable[[], None]) -> None:
        """Kill this process when it has more than THREADS, until `forget`.

        Args:
            on_kill: called just before, in the watching thread.
        """
        with self._change:
            self._watched[pid] = on_kill
            if not self._started:
                threading.Thread(target=self._run, name="thread-watch", daemon=True).start()
                self._started = True
            self._change.notify()

    def forget(self, pid: int) -> None:
        """Look at it no more: it waits for its next job, or is about to be waited for."""
        with self._change:
            self._watched.pop(pid, None)

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._watched:
                    self._change.wait()
            time.sleep(LOOK_SECONDS)  # first: a short job is over before anybody looks
            with self._change:
                for pid in list(self._watched):
                    if status_number(pid, b"Threads") > THREADS:
                        self._watched.pop(pid)()
                        with contextlib.suppress(OSError):
                            os.kill(pid, signal.SIGKILL)


WATCH = ThreadWatch()
"""The one of this process."""
