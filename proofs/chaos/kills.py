"""Random `kill -9` under load, checked against the oracle every few kills."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

from proofs.chaos import oracle
from proofs.chaos.crew import CREWS, Crew, kill_process, pick
from proofs.chaos.history import History
from proofs.chaos.load import Load
from proofs.chaos.place import Place
from proofs.chaos.readers import Readers
from proofs.chaos.tally import Tally

MEAN_SECONDS = 1.0
"""Between two kills, on average, or between the first new output and a kill."""

MOST_SECONDS = 6.0
AT_WORK = 0.5
"""Share of the kills that wait until an output has come since the last one; the others come when
they come, mostly while a process starts or recovers."""

WORK_SECONDS = 6.0
KILLS_OF_A_CREW = 8
"""Then all of it goes at once, and another way to run follows."""

GUEST_SECONDS = 10.0
"""How long a guest is waited for that could be killed."""

CHANGES_A_SECOND = 4.0

TARGETS = {
    "start": ["daemon", "guest", "one-shot"],
    "main": ["daemon", "worker", "guest", "one-shot"],
    "drain": ["one-shot", "guest"],
}


class Chaos:
    """One run over one place: the load, the readers, the crew, and who ends it.

    Args:
        place: where.
        tally: what is kept of it.
        seed: of every choice.
    """

    def __init__(self, place: Place, tally: Tally, seed: str) -> None:
        self.place = place
        self.tally = tally
        self.chance = random.Random(seed)
        self.history = History(place.folder, place.root)
        self.load = Load(self.history, f"{seed}-load", CHANGES_A_SECOND)
        self.readers = Readers(place, self.history, tally.complain)
        self.crew = Crew(place, tally.complain)

    @contextmanager
    def going(self) -> Iterator[None]:
        """Load and readers, for as long as the block runs; nothing outlives it."""
        self.readers.start()
        self.load.start()
        try:
            yield
        finally:
            self.load.end()
            self.crew.kill_all()
            self.readers.end()
            self.history.close()

    def checkpoint(self) -> None:
        """Stop everything, let a daemon come to rest, and compare."""
        assert self.load.is_alive() and self.readers.is_alive(), "nobody works against it any more"
        with self.load.turn:
            self.crew.kill_all()
            began = time.monotonic()
            self.crew.rest(self.tally.note)
            found = oracle.check(self.place, self.history, self.readers, self.tally.complain)
            took = round(time.monotonic() - began, 1)
            self.tally.note("checkpoint", seconds=took, polls=self.readers.polls, **found)

    def kills(self, count: int, every: int) -> None:
        """Kill until the tally has so many kills, or something is violated.

        Args:
            every: kills between two checkpoints.
        """
        while self.tally.total < count and not self.tally.violations:
            way = self.chance.choice(sorted(CREWS))
            until = min(count, self.tally.total + KILLS_OF_A_CREW, self.tally.checked + every)
            while self.tally.total < until:
                self.crew.man(CREWS[way])
                if self.chance.random() < AT_WORK:
                    self.crew.wait_for(self.readers.comes(), WORK_SECONDS)
                time.sleep(min(self.chance.expovariate(1 / MEAN_SECONDS), MOST_SECONDS))
                self._kill(way, self.chance.choice(TARGETS[way]))
            self.crew.kill_all()
            if self.tally.total >= min(count, self.tally.checked + every):
                self.checkpoint()

    def _kill(self, way: str, target: str) -> None:
        match target:
            case "guest":
                self.crew.wait_for(lambda: bool(self.crew.guests()), GUEST_SECONDS)
                guest = pick(self.crew.guests(), self.chance)
                if guest is None or not kill_process(guest):
                    return
                self.tally.note("kill", target=target, pid=guest.pid, way=way)
                return
            case "one-shot" if way != "drain":
                hand = self.crew.start(self.chance.choice(["scan", "drain"]))
                time.sleep(self.chance.uniform(0.0, 2.5))
            case "one-shot":
                roles = ["drain"]
                hand = self.chance.choice([h for h in self.crew.hands if h.role in roles])
            case "daemon":
                roles = ["daemon", "sentinel"]
                hand = self.chance.choice([h for h in self.crew.hands if h.role in roles])
            case _:
                hand = self.chance.choice([h for h in self.crew.hands if h.role == target])
        if self.crew.kill(hand):
            self.tally.note("kill", target=target, pid=hand.process.pid, way=way)
