"""The checks that the suite makes: the rules of durability, and a fault at each place that matters.

Where a fault strikes is said by the file it strikes, since the numbers of the calls change with
every release.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from proofs.syscalls.durability import Commits, Recorder, breaches
from proofs.syscalls.faults import Fault, attempt
from proofs.syscalls.stage import LEDGER, Stage
from proofs.syscalls.supervisor import Call

DURABILITY = "what must be durable before what"
COMMITS = "every commit leaves a ledger that holds"


class Place(NamedTuple):
    """Where a fault strikes."""

    kind: str
    is_there: Callable[[Path], bool]
    error: str
    span: str
    code: int
    """The exit code of the run: 0 where it overcomes the fault by itself."""


def _of_the_ledger(path: Path) -> bool:
    return path.name == f"{LEDGER}-wal"


def _staged(path: Path) -> bool:
    return path.parent.name == "stage"


PLACES: dict[str, Place] = {
    "a staged file is not written": Place("write", _staged, "ENOSPC", "once", 0),
    "a staged file is not fsynced": Place("fsync", _staged, "EIO", "once", 0),
    "an output gets no name": Place("link", lambda path: True, "EMFILE", "for ever", 1),
    "the ledger is not fsynced": Place("fsync", _of_the_ledger, "EIO", "once", 74),
    "the ledger is not written": Place("write", _of_the_ledger, "ENOSPC", "for ever", 74),
}
NAMES = [DURABILITY, COMMITS, *PLACES]


def checks(stage: Stage, names: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each of these checks, and what it found."""
    recorder = Recorder()
    stage.reset()
    stage.run(recorder)
    ledger = stage.home / LEDGER
    for name in names:
        if name == DURABILITY:
            yield name, breaches(recorder.calls, ledger)
        elif name == COMMITS:
            stage.reset()
            commits = Commits(ledger, stage.scratch("commits"))
            stage.run(commits)
            yield name, list(commits.breaches())
        else:
            tried = attempt(stage, _fault(recorder.calls, PLACES[name]))
            found = tried.violations if tried.hit else ["no such call was made"]
            if tried.run.ended.code != PLACES[name].code:
                found = [*found, f"{tried.run.ended}: {tried.run.err.strip()[-500:]}"]
            yield name, [*found, *_fsynced_again(tried.calls, tried.hit)]


def _fault(calls: list[Call], place: Place) -> Fault:
    """The middle one of the calls at a place: there is work before it and after it."""
    there = [c for c in calls if c.kind == place.kind and place.is_there(c.paths[0])]
    return Fault(place.kind, len(there) // 2 + 1, place.error, place.span, place.is_there)


def _fsynced_again(calls: list[Call], failed: list[Call]) -> Iterator[str]:
    """A staged file whose fsync failed is written again under a new name, never fsynced again."""
    lost = {call.paths[0] for call in failed if call.kind == "fsync" and _staged(call.paths[0])}
    tries = [call.paths[0] for call in calls if call.kind == "fsync" and call.paths[0] in lost]
    if len(tries) > len(lost):
        yield f"fsynced again after it had failed: {tries[0].name}"
