"""What a test that hangs waits for, where the stacks of threads do not show it."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator
from types import AsyncGeneratorType, CoroutineType

import psutil

EARLIER_SECONDS = 5.0
"""How long before pytest shows the stacks and ends the process."""


@contextlib.contextmanager
def told(name: str, seconds: float, descriptor: int) -> Iterator[None]:
    """Have the coroutines and the child processes shown where the block takes long.

    Args:
        seconds: after which pytest ends the process.
        descriptor: of the file to write to.
    """
    timer = threading.Timer(seconds - EARLIER_SECONDS, _tell, [name, descriptor])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _tell(name: str, descriptor: int) -> None:
    lines = [f"{name} hangs", "awaited in"]
    for each in gc.get_objects():
        if isinstance(each, CoroutineType):
            frame, awaited = each.cr_frame, each.cr_await
        elif isinstance(each, AsyncGeneratorType):
            frame, awaited = each.ag_frame, each.ag_await
        else:
            continue
        if frame and awaited is not None:
            code = frame.f_code
            lines.append(f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}')
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            words = " ".join(child.cmdline())[:500]
            lines.append(f"child {child.pid} of {child.ppid()}, {child.status()}: {words}")
    with open(descriptor, "w", closefd=False) as file:
        file.write("\n".join(["", *lines, ""]))
