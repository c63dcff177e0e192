"""`kill -9` of Sentinel, Worker and guest in the course of a replayed history."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from casparian_flow.engine import control
from casparian_flow.errors import DaemonGone
from casparian_flow.protocol import Ring
from proofs.chaos.crew import CREWS, Crew, kill_process, pick
from proofs.chaos.place import CONFIG, Place
from tests.conftest import POLICY
from tests.daemons import free_port
from tests.eventually import PATIENCE

AT_WORK_SECONDS = 3.0
"""How long a job is waited for that could be killed at work."""

AT_WORK = "SELECT 1 FROM cf_processing_queue WHERE status IN ('RUNNING', 'COMMITTING')"

TARGETS = ("sentinel", "worker", "guest")


class Flow(Place):
    """A place without plugins and sources: the history brings its own.

    However often a job is killed, it is not given up: that is not what is tried here.
    """

    def _make(self) -> None:
        for folder in (self.flow, self.logs, self.temporary):
            folder.mkdir(parents=True, exist_ok=True)
        retries = "retry_seconds = 0.1\n"
        text = CONFIG.format(port=free_port()).replace(retries, f"{retries}max_attempts = 1000\n")
        self.config.write_text(text + POLICY)


class Upsets:
    """Kills between and during the commits of a history, and starts again what was killed.

    Args:
        folder: of the flow, of its logs and temporary files.
        kills: how many.
        commits: of the history; the kills are spread over them.
        seed: of every choice.
    """

    def __init__(self, folder: Path, kills: int, commits: int, seed: int) -> None:
        self.place = Flow(folder)
        self.killed: Counter[str] = Counter()
        self.faults: list[str] = []
        """Of processes that ended and were not killed."""
        self._chance = random.Random(seed)
        self._after = Counter(self._chance.choices(range(commits), k=kills))
        self._crew = Crew(self.place, lambda kind, words: self.faults.append(f"{kind}: {words}"))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Sentinel and Workers run while the block does.

        Raises:
            AssertionError: one of them ended by itself.
        """
        self._man()
        try:
            yield
            self._crew.man([])
        finally:
            self._crew.kill_all()
        assert not self.faults, "\n".join(self.faults)

    def strike(self, commit: int) -> None:
        """Kill as often as is due after a commit, half of the times while a job is at work."""
        for _ in range(self._after[commit]):
            if self._chance.random() < 0.5:
                self._crew.wait_for(lambda: bool(self.place.ask(AT_WORK)), AT_WORK_SECONDS)
                time.sleep(self._chance.uniform(0.0, 0.2))
            else:
                time.sleep(self._chance.uniform(0.0, 1.0))
            self._kill()
            self._man()

    def _man(self) -> None:
        """Start who is missing; returns when the Sentinel answers."""
        self._crew.man(CREWS["main"])
        assert self._crew.wait_for(self._answers, PATIENCE), "the Sentinel does not answer"

    def _answers(self) -> bool:
        try:
            return control.ask(self.place.settings.database, Ring(scan=False)) is not None
        except DaemonGone:
            return False

    def _kill(self) -> None:
        while True:
            target = self._chance.choice(TARGETS)
            if target == "guest":
                guest = pick(self._crew.guests(), self._chance)
                dead = guest is not None and kill_process(guest)
            else:
                hands = [hand for hand in self._crew.hands if hand.role == target]
                dead = self._crew.kill(self._chance.choice(hands))
            if dead:
                self.killed[target] += 1
                return
