"""Commands in processes of their own that start in no time.

The nursery imports the whole package once and starts nothing: no thread, no database, no guest.
Each command is a fork of it that runs the command line, so a trial costs what the command does,
and not a second of imports. What dies in a trial is a real process with its own descriptors and
locks; the kernel cleans up after it as after any other.

    us -> nursery      one JSON line an order; an empty one ends a command that stopped
    nursery -> us      one JSON line each time a command stops or ends

Should we die, the nursery ends what has stopped, and itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from casparian_flow import crashpoints
from casparian_flow.crashpoints import Trap
from casparian_flow.errors import ExitCode

ONE_THREAD = {
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
"""For a process that forks: a fork has one thread, and the others that numeric libraries and
pyarrow's allocator start would be left behind. Python 3.12 warns of any."""

PATIENCE_SECONDS = 300
"""A command that takes longer hangs: the kernel's alarm ends it."""


class Order(msgspec.Struct, frozen=True):
    """A command to run."""

    arguments: list[str]
    """Of `casparian`."""

    output: str
    """The file that takes what it prints."""

    at: str = ""
    """The hit, `name:n`, at which it dies; empty: none."""

    log: str = ""
    """The file that gets a line for each crash point it comes to."""

    stops: bool = False
    """At that hit it stops, as by SIGSTOP, and waits to be killed."""

    folder: str = ""
    """Where it runs; empty: where the nursery does."""

    environment: dict[str, str] | None = None
    """Its own; None: that of the nursery."""


class Ended(msgspec.Struct, frozen=True):
    """What became of it."""

    code: int
    """Its exit code; minus the signal that ended or stopped it."""

    stopped: bool = False


class Nursery:
    """Runs one command after another, each in a process of its own.

    Args:
        environment: of the commands (`proofs.environment`).
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=Path(__file__).parents[2],  # this package, whatever else lies where we are
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=environment | ONE_THREAD,
        )  # fmt: skip

    def close(self) -> None:
        """End it."""
        with self._process:  # closes the pipes and waits
            pass

    def run(self, order: Order, while_stopped: Callable[[], Any] = lambda: None) -> int:
        """Run a command to its end; its exit code, or minus the signal that ended it.

        Args:
            while_stopped: what to do while it is stopped at its crash point; then it is killed.
        """
        self._tell(msgspec.json.encode(order))
        ended = self._answer()
        if ended.stopped:
            try:
                while_stopped()
            finally:
                self._tell(b"")
                ended = self._answer()
        return ended.code

    def _tell(self, line: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + b"\n")
        self._process.stdin.flush()

    def _answer(self) -> Ended:
        assert self._process.stdout is not None
        return msgspec.json.decode(self._process.stdout.readline(), type=Ended)


def _serve() -> None:
    """Be the nursery, until our standard input ends."""
    # What a command would import first; the names are not used.
    import pyarrow.parquet  # noqa: F401

    from casparian_flow import cli, main  # noqa: F401
    from casparian_flow.engine.sinks import parquet, sqlite  # noqa: F401
    from casparian_flow.services import report, sources, verify  # noqa: F401

    answers = os.dup(1)
    while line := sys.stdin.buffer.readline():
        pid = os.fork()
        if pid == 0:
            _obey(msgspec.json.decode(line, type=Order))
        ended = _wait(pid)
        if ended.stopped:
            os.write(answers, msgspec.json.encode(ended) + b"\n")
            sys.stdin.buffer.readline()
            os.kill(pid, signal.SIGKILL)
            ended = _wait(pid)
        os.write(answers, msgspec.json.encode(ended) + b"\n")


def _wait(pid: int) -> Ended:
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        return Ended(-os.WSTOPSIG(status), stopped=True)
    return Ended(os.waitstatus_to_exitcode(status))


def _obey(order: Order) -> None:
    """Be the command; never returns."""
    code: int = ExitCode.BUG
    try:
        signal.alarm(PATIENCE_SECONDS)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        output = os.open(order.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if order.environment is not None:
            os.environ.clear()
            os.environ.update(order.environment)
        os.chdir(order.folder or os.curdir)
        spring = _stop if order.stops else crashpoints.die
        if order.at or order.log:
            crashpoints.arm(Trap(order.at, order.log, spring))
        code = _casparian(order.arguments)
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _casparian(arguments: list[str]) -> int:
    from casparian_flow import cli

    sys.argv = ["casparian", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    _serve()
