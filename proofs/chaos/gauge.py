"""Memory, descriptors and write-ahead logs over time, and whether they are flat.

Flat is said of one daemon's life, since a killed one starts anew: the median of the last third of
its samples against the median of the first, after a warm-up. Medians, because a sample in the
middle of a large scan says nothing; thirds, because that is a growth and not a slope through
noise. The slope of the last third is printed beside it (Theil and Sen's: the median over all
pairs of samples).
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

GROWTH_SHARE = 0.10
GROWTH_MB = 10.0
"""Memory may end higher by the larger of these two: caches of SQLite and Arrow fill up, and
allocators keep what they once had."""

GROWTH_DESCRIPTORS = 8
WAL_MB = 64.0
LOOK_SECONDS = 0.5
"""How often the logs are measured."""

WARM_UP = 0.2
"""Share of a life's samples that is left out: imports, first guests, first pages."""


class Sample(NamedTuple):
    """One look at one daemon."""

    seconds: float
    rss_mb: float
    descriptors: int


def look(pid: int, seconds: float) -> Sample:
    """Measure a process.

    Raises:
        psutil.NoSuchProcess: it has ended.
    """
    process = psutil.Process(pid)
    return Sample(seconds, process.memory_info().rss / 1e6, process.num_fds())


class LogGauge(threading.Thread):
    """Keeps the largest size that the write-ahead log of any of these databases has had.

    Args:
        databases: SQLite databases in WAL mode; they need not be there yet.
    """

    def __init__(self, databases: Sequence[Path]) -> None:
        super().__init__(name="logs", daemon=True)
        self.peak_mb = 0.0
        self._logs = [Path(f"{database}-wal") for database in databases]
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            for log in self._logs:
                with contextlib.suppress(FileNotFoundError):
                    self.peak_mb = max(self.peak_mb, log.stat().st_size / 1e6)

    def end(self) -> None:
        self._ended.set()
        self.join()


class Verdict(NamedTuple):
    """What the samples of one life say."""

    words: list[str]
    flat: bool


def judge(samples: Sequence[Sample], wal_peak_mb: float) -> Verdict:
    """Hold one life's samples, and the largest log ever seen, to the limits.

    Raises:
        ValueError: there are too few samples to say anything.
    """
    warm = samples[int(len(samples) * WARM_UP) :]
    third = len(warm) // 3
    if third < 3:
        raise ValueError(f"{len(samples)} samples are too few")
    hours = (warm[-1].seconds - warm[0].seconds) / 3600
    first, last = warm[:third], warm[-third:]
    rss = [statistics.median(s.rss_mb for s in part) for part in (first, last)]
    descriptors = [statistics.median(s.descriptors for s in part) for part in (first, last)]
    allowed = max(GROWTH_MB, GROWTH_SHARE * rss[0])
    holds = {
        f"memory       {rss[0]:.1f} -> {rss[1]:.1f} MB over {hours * 60:.0f} minutes "
        f"(limit +{allowed:.1f} MB; slope at the end {slope(last):+.1f} MB/h)": rss[1] - rss[0]
        <= allowed,
        f"descriptors  {descriptors[0]:g} -> {descriptors[1]:g} "
        f"(limit +{GROWTH_DESCRIPTORS})": descriptors[1] - descriptors[0] <= GROWTH_DESCRIPTORS,
        f"largest WAL  {wal_peak_mb:.1f} MB (limit {WAL_MB:g} MB)": wal_peak_mb < WAL_MB,
    }
    words = [f"{line}: {'flat' if held else 'NOT FLAT'}" for line, held in holds.items()]
    return Verdict(words, all(holds.values()))


def slope(samples: Sequence[Sample]) -> float:
    """Growth of memory in MB an hour: the median of the slopes of all pairs."""
    return statistics.median(
        (b.rss_mb - a.rss_mb) / (b.seconds - a.seconds) * 3600
        for a, b in itertools.combinations(samples, 2)
    )
