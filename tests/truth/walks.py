"""Random sequences of events, told to the model and the product; what they show is compared after
each.

`walk` draws a sequence with a seed, a `Teller` tells one, `shortest` leaves out what a difference
does not need. A step names what it does and to what; one that cannot be done at its place (a file
that is not there cannot be deleted) is passed over, so that any part of a sequence is a sequence.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import random
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.truth.model import Ledger, Model
from tests.truth.product import Product
from tests.truth.situations import BAD, FRAIL, GOOD, TWO, TWO_FRAIL, differences

SHORTEN_SECONDS = 120.0

PATHS = ("a.txt", "b.txt", "sub/c.txt")
CONTENTS = ("one", "one two", "one !two", "!three", "four boom", "five !six seven")
ARTIFACTS = {a.name: a for a in (GOOD, BAD, TWO, FRAIL, TWO_FRAIL)}
TOPICS = ("lines", "marked")
MODES = ("append", "replace")


class Step(NamedTuple):
    """An event, and what of."""

    event: str
    of: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.event, *(repr(value) for value in self.of)])


class Difference(AssertionError):
    """Model and product show different rows: the steps that led there, and the rows of both."""

    def __init__(self, steps: Sequence[Step], found: Sequence[str]) -> None:
        self.steps = list(steps)
        story = [f"{number:3} {step}" for number, step in enumerate(steps, 1)]
        super().__init__("\n".join(["after these steps", *story, *found]))


# Drawing steps.


def walk(seed: int, steps: int, events: Collection[str]) -> list[Step]:
    """So many steps, beginning with a plugin.

    Args:
        events: that are drawn.
    """
    draw = random.Random(seed)
    names = [name for name in sorted(events) for _ in range(_WEIGHTS[name])]
    began = [Step("publish", ("p", draw.choice(sorted(ARTIFACTS))))]
    return began + [Step(name, tuple(_DRAWS[name](draw))) for name in draw.choices(names, k=steps)]


def drawn() -> set[str]:
    """The events that are drawn; those that need a mount only where this process may."""
    may_mount = os.geteuid() == 0
    return {name for name in _WEIGHTS if may_mount or "sink_" not in name}


_WEIGHTS = {
    "write": 12, "delete": 3, "move": 3, "copy": 1, "scan": 5, "work": 5, "settle": 12,
    "publish": 5, "activate": 4, "redo": 5, "retry": 2, "retract": 4, "undo": 4, "set_topic": 4,
    "remove_topic": 1, "set_on_delete": 1, "rebuild": 2, "backup": 2, "restore": 2, "kill": 2,
    "refuse": 2, "sink_goes": 1, "sink_returns": 2, "expire": 1,
}  # fmt: skip


def _path(draw: random.Random) -> str:
    return draw.choice(PATHS)


def _plugin(draw: random.Random) -> str:
    return draw.choice("ppq")


def _topic(draw: random.Random) -> str:
    return draw.choice(TOPICS)


def _sinks(draw: random.Random) -> dict[str, str]:
    chosen = draw.choice((["S1"], ["S2"], ["S1", "S2"]))
    return {sink: draw.choice(MODES) for sink in chosen}


def _nothing(_draw: random.Random) -> tuple[()]:
    return ()


_DRAWS: dict[str, Callable[[random.Random], Sequence[Any]]] = {
    "write": lambda d: (_path(d), d.choice(CONTENTS)),
    "delete": lambda d: (_path(d),),
    "move": lambda d: (_path(d), _path(d)),
    "copy": lambda d: (_path(d), _path(d)),
    "scan": _nothing,
    "work": _nothing,
    "settle": _nothing,
    "publish": lambda d: (_plugin(d), d.choice(sorted(ARTIFACTS))),
    "activate": lambda d: (_plugin(d), d.randrange(5)),
    "redo": lambda d: (_plugin(d),),
    "retry": _nothing,
    "retract": lambda d: (_path(d), d.choice((0, 0, 1, 2))),
    "undo": lambda d: (_path(d), d.choice((0, 0, 1, 2))),
    "set_topic": lambda d: (_plugin(d), _topic(d), _sinks(d)),
    "remove_topic": lambda d: (_plugin(d), _topic(d)),
    "set_on_delete": lambda d: (d.choice(("keep", "retract")),),
    "rebuild": lambda d: (_plugin(d),),
    "backup": _nothing,
    "restore": _nothing,
    "kill": _nothing,
    "refuse": lambda d: (_topic(d), d.choice(("S1", "S2")), d.choice(CONTENTS)),
    "sink_goes": lambda d: (d.choice(("S1", "S2")), d.choice(("early", "late"))),
    "sink_returns": _nothing,
    "expire": _nothing,
}


# Telling them.


class Teller:
    """Tells steps to the model and, if there is one, to the product.

    Args:
        product: None tells the model alone.
    """

    def __init__(self, product: Product | None) -> None:
        self.model = Model()
        self.done: list[Step] = []
        self._product = product
        self._published = 0
        self._backup_made: Ledger | None = None

    def tell(self, step: Step) -> None:
        """Do it where it can be done, and compare.

        Raises:
            Difference: they differ.
        """
        calls = list(getattr(self, f"_{step.event}")(*step.of))
        if not calls:
            return
        self.done.append(step)
        for event, *of in calls:
            right = getattr(self.model, event)(*of)
            if self._product is not None:
                shown = getattr(self._product, event)(*of)
                if event in ("activate", "redo") and right != shown:
                    raise Difference(self.done, [f"{event} queued {shown} jobs, not {right}"])
        self.compare()

    def compare(self) -> None:
        """
        Raises:
            Difference: model and product differ.
        """
        if self._product is not None and (found := differences(self.model, self._product)):
            raise Difference(self.done, [*found, *self._product.told()])

    def end(self) -> None:
        """Have everything come to rest; then all that is recorded is true.

        Raises:
            Difference: it is not.
        """
        for step in (Step("sink_returns"), Step("settle"), Step("kill")):
            self.tell(step)
        if self._product is not None:
            problems = self._product.problems()
            right, shown = self.model.failures(), self._product.failures()
            if right != shown:
                problems.append(f"failures are {sorted(shown)}, not {sorted(right)}")
            if problems:
                raise Difference(self.done, problems)

    # Each gives the events that a step is, or none where it cannot be done.

    def _write(self, path: str, content: str) -> Iterator[Sequence[Any]]:
        yield "write", path, content

    def _delete(self, path: str) -> Iterator[Sequence[Any]]:
        if path in self.model.disk:
            yield "delete", path

    def _move(self, old: str, new: str) -> Iterator[Sequence[Any]]:
        if old in self.model.disk and old != new:
            yield "move", old, new

    def _copy(self, old: str, new: str) -> Iterator[Sequence[Any]]:
        if old in self.model.disk and old != new:
            yield "copy", old, new

    def _scan(self) -> Iterator[Sequence[Any]]:
        yield ("scan",)

    def _work(self) -> Iterator[Sequence[Any]]:
        yield ("work",)

    def _settle(self) -> Iterator[Sequence[Any]]:
        yield from (("scan",), ("work",))

    def _publish(self, plugin: str, name: str) -> Iterator[Sequence[Any]]:
        if not self.model.away:
            self._published += 1
            yield "publish", plugin, f"1.0.{self._published}", ARTIFACTS[name]

    def _activate(self, plugin: str, number: int) -> Iterator[Sequence[Any]]:
        ledger = self.model.ledger
        known = [r for r in ledger.deployed.get(plugin, ()) if (plugin, r) not in ledger.stubs]
        if known and not self.model.away:
            yield "activate", plugin, known[number % len(known)]

    def _redo(self, plugin: str) -> Iterator[Sequence[Any]]:
        if plugin in self.model.ledger.active:
            yield "redo", plugin

    def _retry(self) -> Iterator[Sequence[Any]]:
        yield ("retry",)

    def _retract(self, path: str, ordinal: int) -> Iterator[Sequence[Any]]:
        if set(self._worked(path, ordinal)) - self.model.ledger.retracted:
            yield "retract", path, ordinal

    def _undo(self, path: str, ordinal: int) -> Iterator[Sequence[Any]]:
        if self.model.ledger.retracted.intersection(self._worked(path, ordinal)):
            yield "reinstate", path, ordinal

    def _worked(self, path: str, ordinal: int) -> Iterator[Any]:
        """Versions that a person can name to retract them: not while a decided job waits."""
        queued = (job.version.path for job in self.model.ledger.jobs if job.status == "queued")
        if not (self.model.away and path in queued):
            for output in self.model.ledger.outputs:
                if output.version.path == path and ordinal in (0, output.version.ordinal):
                    yield output.version

    def _set_topic(self, plugin: str, topic: str, sinks: dict[str, str]) -> Iterator[Sequence[Any]]:
        if (plugin, topic) in self.model.ledger.sinks and not self.model.away:
            yield "set_topic", plugin, topic, sinks

    def _remove_topic(self, plugin: str, topic: str) -> Iterator[Sequence[Any]]:
        known = (plugin, topic) in self.model.ledger.sinks
        if known and topic not in self.model.artifact(plugin).topics:
            yield "remove_topic", plugin, topic

    def _set_on_delete(self, what: str) -> Iterator[Sequence[Any]]:
        yield "set_on_delete", what

    def _rebuild(self, plugin: str) -> Iterator[Sequence[Any]]:
        if plugin in self.model.ledger.active and not self.model.away:
            yield "rebuild", plugin

    def _backup(self) -> Iterator[Sequence[Any]]:
        if not self.model.away:
            self._backup_made = copy.deepcopy(self.model.ledger)
            yield ("backup",)

    def _restore(self) -> Iterator[Sequence[Any]]:
        if self._backup_made and not self.model.away and not self._has_moved_since():
            yield ("restore",)

    def _has_moved_since(self) -> bool:
        """Whether a topic was moved with its rows since the backup. A sink does not keep what was
        left behind in it apart from what was replaced there: the restored ledger shows it again,
        and names the topic (docs/disaster.md)."""
        then, now = self._backup_made, self.model.ledger
        return then is not None and then.sinks != now.sinks and now.complete != then.complete

    def _kill(self) -> Iterator[Sequence[Any]]:
        yield ("kill",)
        if self._product is not None and self._product.works_when_killed:
            yield from (("scan",), ("work",))

    def _refuse(self, topic: str, sink: str, content: str) -> Iterator[Sequence[Any]]:
        """A new file meets a stranger. Nothing else may be queued: its place may be taken by a file
        of ours, before which no stranger can be."""
        path = f"refused{self.model.count}.txt"
        if not self.model.away:
            yield from (("scan",), ("work",), ("refuse", topic, sink), ("write", path, content))
            yield from (("scan",), ("work",), ("accept", topic, sink))

    def _sink_goes(self, sink: str, when: str) -> Iterator[Sequence[Any]]:
        if not self.model.away and any(o.sink == sink for o in self.model.ledger.outputs):
            yield "go_away", sink, when

    def _sink_returns(self) -> Iterator[Sequence[Any]]:
        for sink in list(self.model.away):
            yield "come_back", sink
            yield ("work",)

    def _expire(self) -> Iterator[Sequence[Any]]:
        yield ("expire",)


# Making a difference small.


def compare(
    folder: Path,
    seed: int,
    count: int,
    steps: Sequence[Step] | None = None,
    make: type[Product] = Product,
) -> None:
    """Tell a walk to the model and a new product; what differs is told as short as it is found.

    Args:
        folder: takes a folder for each telling.
        steps: these, in the place of those that `seed` draws.
        make: the product.

    Raises:
        Difference: they differ.
    """
    draw = random.Random(seed)
    kinds = {sink: draw.choice(("sqlite", "parquet")) for sink in ("S1", "S2")}
    steps = steps if steps is not None else walk(seed, count, make.events or drawn())
    numbers = itertools.count(1)

    def differs(steps: Sequence[Step]) -> Difference | None:
        with contextlib.closing(make(folder / str(next(numbers)), kinds)) as product:
            teller = Teller(product)
            try:
                for step in steps:
                    teller.tell(step)
                teller.end()
            except Difference as found:
                return found
            except Exception as error:  # a bug may also raise: its story is as good
                traceback.print_exc()
                return Difference(teller.done, [f"{type(error).__name__}: {error}"])
        return None

    if found := differs(steps):
        shown = shortest(found, differs)
        shown.add_note(f"seed {seed}, {count} steps, sinks {kinds}")
        raise shown


def shortest(
    found: Difference, differs: Callable[[Sequence[Step]], Difference | None]
) -> Difference:
    """The shortest story of a difference that leaving out steps finds within a while.

    Args:
        differs: tells steps to a new model and product.
    """
    size, until = len(found.steps), time.monotonic() + SHORTEN_SECONDS
    while size := size // 2:
        at = 0
        while at < len(found.steps) and time.monotonic() < until:
            shorter = differs([*found.steps[:at], *found.steps[at + size :]])
            # The end of each telling settles again: what was left out may be back.
            if shorter is None or len(shorter.steps) >= len(found.steps):
                at += size
            else:
                found = shorter
    return found
