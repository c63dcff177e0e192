"""The live line: what is going on, redrawn in place on a terminal, a line a change elsewhere."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from casparian_flow.cli.context import printable

if TYPE_CHECKING:
    from casparian_flow.db.views import Waiting

QUIET_SECONDS = 1.0
"""Where it is not redrawn, at most one line in this time."""

_ERASE = "\r\x1b[2K"


class Line:
    """Standard error with a last line that changes.

    Args:
        chatty: without a terminal, write a line for each change; else nothing.
        quiet: show nothing on a terminal either; what is written stays.
    """

    def __init__(self, chatty: bool, quiet: bool = False) -> None:
        self._live = sys.stderr.isatty() and not quiet
        self._chatty = chatty
        self._shown = ""
        self._last = 0.0

    def show(self, words: str) -> None:
        """Show this now, in place of what the last call showed."""
        words = printable(words)
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            _say(f"{_ERASE}{words[:width]}")
        elif self._chatty and words != self._shown and time.monotonic() > self._last:
            _say(f"{words}\n")
            self._last = time.monotonic() + QUIET_SECONDS
        else:
            return
        self._shown = words

    def write(self, text: str) -> None:
        """Lines that stay, above the one that changes; what a logging handler calls."""
        _say(f"{_ERASE}{text}" if self._live else text)

    def flush(self) -> None:
        """See `io.TextIOBase.flush`; what was written is on its way."""

    def clear(self) -> None:
        """Take the line away."""
        if self._live:
            _say(_ERASE)


def _say(text: str) -> None:
    """Write to standard error; where nobody listens any more, nobody does from now on.

    A daemon works on when its terminal or the other end of its pipe is gone.
    """
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)


@contextlib.contextmanager
def line(chatty: bool = False, quiet: bool = False) -> Iterator[Line]:
    """A live line, with log messages above it, for as long as the block runs."""
    live = Line(chatty, quiet)
    handlers = [h for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler)]
    streams = [handler.setStream(live) for handler in handlers]
    try:
        yield live
    finally:
        live.clear()
        for handler, stream in zip(handlers, streams, strict=True):
            handler.setStream(stream)


def waiting(jobs: Waiting) -> str:
    """The unfinished jobs in words."""
    words = f"{jobs.queued} queued, {jobs.running} running, {jobs.committing} committing"
    return f"{words}; {jobs.reason}" if jobs.reason else words
