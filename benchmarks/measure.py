"""Whole processes, measured in turn: A B C, A B C, so that a slow minute of the machine hits all.

Each side runs once unmeasured, to fill caches and write byte code. Before every run all dirty
pages are flushed: nobody's fsync pays for what another has written. This module and all that
imports it stay light, because a child's peak memory begins with that of its parent.
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
"""The figure every run has: start of the process to its end, seconds."""

FIGURES = "figures.json"
"""What a program leaves in its working directory: further figures, name -> seconds."""


@dataclass(frozen=True)
class Side:
    """One way to do the work: a program, started anew in each round."""

    name: str
    prepare: Callable[[Path], Command]
    """Makes what a run needs in a fresh folder, off the clock; returns the command line, which
    is run with that folder as its working directory."""
    peers: tuple[str, ...] = ()
    """The sides this one is compared with; none where it is a peer itself."""


@dataclass(frozen=True)
class Benchmark:
    """A comparison of sides, the peers first."""

    text: str
    """What is compared, and what is durable on each side when the clock stops."""
    sides: Sequence[Side]
    rows: int = 0
    """What a figure other than the whole process is a rate of; 0 where it is none of rows."""


class Run(NamedTuple):
    """One measured run of a side."""

    seconds: dict[str, float]
    cpu_seconds: float
    """User and system time of the process and all it waited for."""
    peak_mib: float
    """Peak resident memory of its largest process."""


def measure(sides: Sequence[Side], rounds: int, scratch: Path) -> dict[str, list[Run]]:
    """Every side once a round; the runs by the side's name.

    Raises:
        RuntimeError: a side failed; the message ends with what it printed.
    """
    runs: dict[str, list[Run]] = {side.name: [] for side in sides}
    for number in range(rounds + 1):
        for side in sides:
            what = f"round {number} of {rounds}" if number else "warming up"
            print(f"  {what}: {side.name}", file=sys.stderr)
            runs[side.name].append(_run(side, scratch))
    return {name: measured[1:] for name, measured in runs.items()}


def execute(command: Command, folder: Path) -> Run:
    """Run a program to its end with this working directory.

    Raises:
        RuntimeError: it failed.
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
            words = errors.read().decode(errors="replace")
            raise RuntimeError(f"{command} ended with {process.returncode}:\n{words}")
    figures = folder / FIGURES
    further = {}
    if figures.exists():
        further = json.loads(figures.read_text())
        figures.unlink()  # else a copy of the folder would begin with it
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
    """Ours, without what changes Python (byte code off, say), and with signing keys of its own."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "CASPARIAN"))
    }
    return kept | {"XDG_CONFIG_HOME": str(folder / "config")}
