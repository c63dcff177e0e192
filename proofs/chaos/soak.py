"""Load for a long time, a random fault every while; memory, descriptors and logs must stay flat.

The first half runs a Sentinel and two Workers over TCP and has every fault, killed daemons
among them. The second half is one life of one `casparian start`, measured: it has the faults that
a daemon outlives. At the end everything comes to rest and the oracle compares.
"""

from __future__ import annotations

import random
import time

from proofs.chaos.crew import CREWS
from proofs.chaos.faults import Faults, small_disk
from proofs.chaos.gauge import LogGauge, Sample, Verdict, judge, look
from proofs.chaos.kills import Chaos
from tests import disks

LONGEST_SECONDS = 10.0
"""A fault lasts so long at the most, or half the time between two."""

SAMPLES = 100
"""Of each half."""


def soak(chaos: Chaos, seed: str, every: float, seconds: float) -> Verdict:
    """The whole of it: load and faults, then the oracle; what the samples say.

    Args:
        chaos: of a new place: the disk that is mounted in it hides what was there.
        every: seconds between two faults.
    """
    outputs = chaos.place.parquet.parent
    disk = small_disk(outputs)
    logs = LogGauge([chaos.place.ledger, chaos.place.sink])
    logs.start()
    with chaos.going():
        samples = Soak(chaos, seed, every).run(seconds, disk=disk)
        logs.end()
        chaos.checkpoint()
    if disk and not chaos.tally.violations:  # else what is on it is evidence
        disks.unmount(outputs)
    verdict = judge(samples, logs.peak_mb)
    chaos.tally.note("verdict", flat=verdict.flat, words=verdict.words)
    return verdict


class Soak:
    """Faults over one place.

    Args:
        chaos: load, readers and crew.
        seed: of the faults.
        every: seconds between two faults.
    """

    def __init__(self, chaos: Chaos, seed: str, every: float) -> None:
        self._chaos = chaos
        self._chance = random.Random(f"{seed}-faults")
        self._every = every

    def run(self, seconds: float, *, disk: bool) -> list[Sample]:
        """Faults for so long, under the load of whoever calls; samples of the second half's daemon.

        Args:
            disk: the Parquet sink has a small disk of its own, which may be filled.
        """
        if not disk:
            self._chaos.tally.note("left out", fault="disk full: only root can mount a small disk")
        faults = Faults(self._chaos.place, self._chaos.crew, self._chaos.load.turn, disk)
        self._half("main", sorted(faults.all), faults, seconds / 2)
        self._chaos.crew.kill_all()
        return self._half("start", sorted(faults.gentle), faults, seconds / 2)

    def _half(self, way: str, names: list[str], faults: Faults, seconds: float) -> list[Sample]:
        """Every fault once before any comes twice; samples of the first process of the crew."""
        began = time.monotonic()
        ahead: list[str] = []
        samples: list[Sample] = []
        next_fault, next_sample = self._every, 0.0
        while (now := time.monotonic() - began) < seconds:
            self._chaos.crew.man(CREWS[way])
            if now >= next_sample:
                pid = self._chaos.crew.hands[0].process.pid
                samples.append(look(pid, now))
                self._chaos.tally.note("sample", **samples[-1]._asdict())
                next_sample += seconds / SAMPLES
            if now >= next_fault:
                ahead = ahead or self._chance.sample(names, len(names))
                lasts = self._chance.uniform(0.1, min(LONGEST_SECONDS, self._every / 2))
                self._chaos.tally.note("fault", fault=ahead[-1], seconds=round(lasts, 1))
                faults.all[ahead.pop()](lasts)
                next_fault += self._every
            time.sleep(min(1.0, self._every / 10))
        return samples
