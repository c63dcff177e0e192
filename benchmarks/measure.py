"""Measure whole processes in turn (A B C, A B C), so that a slow minute affects all sides.

Each side runs once unmeasured, to fill caches and write byte code. Before every run all dirty pages
are flushed, so that no fsync writes another side's data. This module and those that import it stay
light, because a child's peak memory includes its parent's at the fork.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

Command = Sequence[str | Path]

WHOLE = "whole process"
"""The figure of every run: seconds from the start of the process to its end."""

FIGURES = "figures.json"
"""A file that a program may leave in its working directory: further figures, name -> seconds."""


@dataclass(frozen=True)
class Side:
    """One program that does the work, started anew in each round."""

    name: str
    prepare: Callable[[Path], Command]
    """Prepares a run in a new folder, unmeasured, and returns the command to run there."""
    peers: tuple[str, ...] = ()
    """Names of the sides it is compared with; a peer has none."""


@dataclass(frozen=True)
class Benchmark:
    """A comparison of sides, the peers first."""

    text: str
    """What is compared, and what is durable on each side when the clock stops."""
    sides: Sequence[Side]
    rows: int = 0
    """Number of rows, for rates of figures other than the whole process; 0: no rates."""


class Run(NamedTuple):
    """The measurements of one run."""

    seconds: dict[str, float]
    cpu_seconds: float
    """User and system time of the process and the children it waited for."""
    peak_mib: float
    """Peak resident memory of its largest process."""


def measure(sides: Sequence[Side], rounds: int, scratch: Path) -> dict[str, list[Run]]:
    """Run every side once a round; returns the runs by the side's name.

    Raises:
        RuntimeError: a side failed; the message ends with its output.
    """
    runs: dict[str, list[Run]] = {side.name: [] for side in sides}
    for number in range(rounds + 1):
        for side in sides:
            what = f"round {number} of {rounds}" if number else "warming up"
            print(f"  {what}: {side.name}", file=sys.stderr)
            runs[side.name].append(_run(side, scratch))
    return {name: measured[1:] for name, measured in runs.items()}


def execute(command: Command, folder: Path) -> Run:
    """Run a program to its end in a folder.

    Raises:
        RuntimeError: the program failed.
    """
    with (folder / "errors.txt").open("w+b") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, env=_environment(folder),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            output = errors.read().decode(errors="replace")
            raise RuntimeError(f"{command} ended with {process.returncode}:\n{output}")
    figures = folder / FIGURES
    further = {}
    if figures.exists():
        further = json.loads(figures.read_text())
        figures.unlink()  # a copy of the folder must not have it
    cpu = usage.ru_utime + usage.ru_stime
    return Run({WHOLE: wall, **further}, cpu, usage.ru_maxrss / 1024)


def _run(side: Side, scratch: Path) -> Run:
    folder = scratch / "run"
    folder.mkdir()
    command = side.prepare(folder)
    os.sync()
    run = execute(command, folder)
    shutil.rmtree(folder)
    return run


def _environment(folder: Path) -> dict[str, str]:
    """Our environment without settings of Python and Casparian Flow, with its own signing keys."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "CASPARIAN"))
    }
    return kept | {"XDG_CONFIG_HOME": str(folder / "config")}
