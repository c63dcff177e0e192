"""The trials: one for each crash point that a clean run came to, and what came of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from casparian_flow.errors import CasparianError
from proofs.crash import oracle
from proofs.crash.nursery import Nursery, Order
from proofs.crash.oracle import Reader
from proofs.crash.scene import Act, Ground, Scene
from proofs.environment import private

KILLED = -9


class Point(NamedTuple):
    """One coming of an act to a crash point."""

    act: str
    hit: str
    """`name:n`."""

    @property
    def name(self) -> str:
        return self.hit.partition(":")[0]


@dataclass
class Tally:
    """What was tried, and what did not hold."""

    trials: int = 0
    missed: int = 0
    """Trials whose command never came to its point: threads took another order than before."""
    looks: int = 0
    """Times that the reader read the rows of a job."""
    violations: list[str] = field(default_factory=list)


class Matrix:
    """Runs the acts of a scene, cleanly and with crashes.

    Args:
        scene: the files, the plugin and the commands.
        nursery: where the commands run.
        say: called with a line for each trial.
    """

    def __init__(self, scene: Scene, nursery: Nursery, say: Callable[[str], None]) -> None:
        self.scene = scene
        self.ground = scene.ground
        self.tally = Tally()
        self._nursery = nursery
        self._say = say
        self._output = str(self.ground.scratch / "output.txt")
        self._log = self.ground.scratch / "hits.txt"

    def record(self) -> list[Point]:
        """Run every act but the last cleanly, remembering how it was before each.

        Returns:
            The points they came to.

        Raises:
            CasparianError: an act fails without any crash; nothing can be tried here then.
        """
        points: list[Point] = []
        for act in self.scene.acts[:-1]:
            self.ground.save(act.name)
            self.scene.put_files(act)
            if code := self._run(act, log=True):
                raise CasparianError(
                    f"`casparian {' '.join(act.arguments)}` ended with {code}, without a crash: "
                    f"{self._said()}",
                    "mend that first: casparian demo",
                )
            if found := oracle.faults(self.scene, act):
                raise CasparianError(
                    "\n  ".join(["not in order, without a crash:", *found]), "casparian demo"
                )
            points += [Point(act.name, hit) for hit in self._hits()]
        return points

    def try_point(self, point: Point) -> bool:
        """Crash there, start again, compare; whether all held."""
        act = self.back_to(point.act)
        with self._watched() as found:
            reached = self._crash(act, point.hit, found)
            if reached:
                found.extend(self._see_through(act))
        return self._note(f"{point.act:8} {point.hit}", reached, found)

    def try_pair(self, point: Point, choose: random.Random) -> bool:
        """Crash there, and again at some point of the recovery; start again, compare."""
        act = self.back_to(point.act)
        second = ""
        with self._watched() as found:
            reached = self._crash(act, point.hit, found)
        if reached:  # nobody looks while everything is put back: half of that is half of nothing
            self.ground.save("crashed")
            self._run(act, log=True)
            second = choose.choice(self._hits())
            self.ground.restore("crashed")
            self.ground.forget("crashed")
            with self._watched() as again:
                reached = self._crash(act, second, again)
                again.extend(self._see_through(act))
            found += again
        return self._note(f"{point.act:8} {point.hit}, then {second}", reached, found)

    def back_to(self, name: str) -> Act:
        """Have everything be as it was before an act of that name; the act."""
        act = next(act for act in self.scene.acts if act.name == name)
        self.ground.restore(name)
        self.scene.put_files(act)
        return act

    def _crash(self, act: Act, hit: str, found: list[str]) -> bool:
        """Run it until it dies there; whether it came there.

        Args:
            found: takes what is not as it must be at once.
        """
        return self._came_there(act, self._run(act, at=hit), found)

    def _came_there(self, act: Act, code: int, found: list[str]) -> bool:
        """Whether a command that ended so died at its point. One that did not may have taken
        another way, and all must be in order; but it may not fail or hang."""
        if code in (0, act.again):
            found.extend(oracle.faults(self.scene, act))
        elif code != KILLED:
            found.append(f"it never came there, and ended with {code}: {self._said()}")
        return code == KILLED

    def _see_through(self, act: Act) -> list[str]:
        """Start it again; what is not as it must be."""
        if (code := self._run(act)) not in (0, act.again):
            return [f"started again, it ended with {code}: {self._said()}"]
        found = oracle.faults(self.scene, act)
        if found and all(words.startswith(oracle.LEFT) for words in found):
            # A guest's folder of the last job, or what a power cut brought back just after it was
            # unlinked, lies there until a daemon starts again.
            return self._until_the_next_job(act)
        return found

    def _until_the_next_job(self, act: Act) -> list[str]:
        """Go on until files come, and a daemon with them; what is not as it must be then, or
        before that is more than left behind."""
        found: list[str] = []
        for following in self.scene.acts[self.scene.acts.index(act) + 1 :]:
            self.scene.put_files(following)
            if (code := self._run(following)) not in (0, following.again):
                return [f"{following.name}, which came next, ended with {code}: {self._said()}"]
            found = oracle.faults(self.scene, following)
            if following.files or not all(words.startswith(oracle.LEFT) for words in found):
                break
        return found

    @contextmanager
    def _watched(self) -> Iterator[list[str]]:
        """A reader looks meanwhile; what it saw is added to what the block found."""
        found: list[str] = []
        reader = Reader(self.scene)
        with reader.looking():
            yield found
        self.tally.looks += reader.looks
        found += dict.fromkeys(reader.faults)

    def _note(self, what: str, reached: bool, found: Sequence[str]) -> bool:
        self.tally.trials += 1
        self.tally.missed += not reached
        verdict = "VIOLATED" if found else "holds" if reached else "not reached again"
        self._say(f"{what:48} {verdict}")
        for words in found:
            self._say(f"    {words}")
            self.tally.violations.append(f"{what}: {words}")
        return not found

    def _run(
        self, act: Act, at: str = "", *, log: bool = False, then: Callable[[], Any] | None = None
    ) -> int:
        """Run it; with `then` it does not die at its point, but stops while `then` is done."""
        self._log.unlink(missing_ok=True)
        order = Order(
            arguments=self.scene.command(act),
            output=self._output,
            at=at,
            log=str(self._log) if log else "",
            stops=then is not None,
        )
        return self._nursery.run(order, then or (lambda: None))

    def _hits(self) -> list[str]:
        return self._log.read_text().splitlines()

    def _said(self) -> str:
        return Path(self._output).read_text(errors="replace").strip()[-500:]


M = TypeVar("M", bound=Matrix)


def sample(points: Sequence[Point], seed: int) -> list[Point]:
    """One of each act's comings to each crash point."""
    choose = random.Random(seed)
    by_name: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        by_name.setdefault((point.act, point.name), []).append(point)
    return [choose.choice(group) for group in by_name.values()]


@contextmanager
def staged(
    ground: Ground,
    kinds: Sequence[str],
    say: Callable[[str], None],
    matrix: type[M] = Matrix,  # type: ignore[assignment]
) -> Iterator[M]:
    """A matrix on a ground, for as long as the block runs."""
    with (
        private(ground.person) as environment,
        closing(Nursery(environment)) as nursery,
    ):
        yield matrix(Scene(ground, kinds), nursery, say)
