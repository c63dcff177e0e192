"""Write RESULTS.md: a section for each benchmark, with the time and machine of its run."""

from __future__ import annotations

import os
import platform
import re
import sqlite3
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

from benchmarks.measure import WHOLE, Benchmark, Run

PACKAGES = ("pandas", "pyarrow", "sqlalchemy", "pyzmq", "typer", "huey", "duckdb")

TITLE = """\
# Measured

Written by `python -m benchmarks`. Every side is a process of its own; the sides of a benchmark
run in turn, after one unmeasured run each. A ratio is the median, over the rounds, of our seconds
divided by the peer's in the same round: below 1 we are faster. A part of our run is compared with
the same part of the peer's where it has one, else with the peer's whole process. CPU seconds are
medians and count child processes; peak RSS is the largest process's, and about 20 MiB at the
least, which is what the harness itself has."""

COLUMNS = "| what | median s | min | max | n | CPU s | peak RSS MiB | ratio to peer |"


def machine(scratch: Path) -> str:
    """Time, machine, load and versions of a run; no names of hosts or folders."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    kind = subprocess.run(
        ["df", "--output=fstype", scratch], capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    facts = [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        cpu[1] if cpu else platform.machine(),
        f"{os.cpu_count()} cores",
        f"load average {os.getloadavg()[0]:.1f}",
        kind,
        f"{platform.system()} {platform.release()}",
        f"Python {platform.python_version()}",
        f"SQLite {sqlite3.sqlite_version}",
        *(f"{package} {version(package)}" for package in PACKAGES),
    ]
    return ", ".join(facts)


def section(name: str, benchmark: Benchmark, runs: Mapping[str, Sequence[Run]], facts: str) -> str:
    """A benchmark's section of the page."""
    rows = [
        _row(
            side.name, figure, runs[side.name], {peer: runs[peer] for peer in side.peers},
            benchmark.rows,
        )
        for side in benchmark.sides
        for figure in runs[side.name][0].seconds
    ]  # fmt: skip
    columns = f"{COLUMNS} rows/s |" if benchmark.rows else COLUMNS
    table = [columns, "|" + "---|" * (columns.count("|") - 1), *rows]
    return "\n\n".join([f"## {name}", benchmark.text, f"Measured {facts}.", "\n".join(table)])


def save(page: Path, name: str, text: str, order: Sequence[str]) -> None:
    """Replace a benchmark's section of the page; the others stay as they are."""
    parts = page.read_text("utf-8").split("\n\n## ")[1:] if page.exists() else []
    sections = {part.partition("\n")[0]: f"## {part.strip()}" for part in parts} | {name: text}
    kept = [sections[known] for known in order if known in sections]
    page.write_text("\n\n".join([TITLE, *kept]) + "\n", "utf-8")


def _row(
    side: str, figure: str, runs: Sequence[Run], peers: Mapping[str, Sequence[Run]], rows: int
) -> str:
    seconds = [run.seconds[figure] for run in runs]
    is_whole = figure == WHOLE
    cells = [
        f"{side}: {figure}",
        *(f"{value:.3g}" for value in (median(seconds), min(seconds), max(seconds))),
        str(len(runs)),
        f"{median(run.cpu_seconds for run in runs):.3g}" if is_whole else "",
        f"{median(run.peak_mib for run in runs):.0f}" if is_whole else "",
        ", ".join(f"{_ratio(figure, runs, peer):.2f} ({name})" for name, peer in peers.items()),
    ]
    if rows:
        cells.append("" if is_whole else f"{rows / median(seconds):,.0f}")
    return f"| {' | '.join(cells)} |"


def _ratio(figure: str, runs: Sequence[Run], peer: Sequence[Run]) -> float:
    pairs = zip(runs, peer, strict=True)
    return median(
        ours.seconds[figure] / theirs.seconds.get(figure, theirs.seconds[WHOLE])
        for ours, theirs in pairs
    )
