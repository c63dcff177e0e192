"""The faults of the matrix, and one run under each.

A fault is a kind of system call, which of them fails, with what error, and whether all after it
fail too. SQLite tests itself like this: fail the n-th call, then the next, until a run passes in
which there was no n-th call.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from proofs.syscalls.stage import Run, Stage
from proofs.syscalls.supervisor import FAULTED, Call

ERRORS = ("EIO", "ENOSPC", "EMFILE", "EINTR")
SPANS = ("once", "for ever")


def anywhere(_path: Path) -> bool:
    """Every file of the tree."""
    return True


class Fault(NamedTuple):
    """What fails."""

    kind: str
    number: int
    """1 is the first call of its kind on the tree that is about such a file."""
    error: str
    span: str
    """`once`; or `for ever`: all calls of the kind from this one on. No kernel interrupts for
    ever: there EINTR comes once to each call, which then may be made again."""
    about: Callable[[Path], bool] = anywhere
    """Which files count. Threads do not always take the same turns: the n-th call of a run may
    be about another file than the n-th of the run before."""

    def __str__(self) -> str:
        return f"{self.kind} {self.number} {self.error} {self.span}"


@dataclass
class Injector:
    """Counts the calls of a run and makes one, or more, of them fail."""

    fault: Fault
    seen: Counter[str] = field(default_factory=Counter)
    calls: list[Call] = field(default_factory=list)
    hit: list[Call] = field(default_factory=list)
    """What failed."""
    _interrupted: set[int] = field(default_factory=set)

    def __call__(self, call: Call) -> int:
        kind, number, error, span, about = self.fault
        self.calls.append(call)
        if call.kind == kind and not about(call.paths[0]):
            return 0
        if call.kind == kind and call.thread in self._interrupted:
            self._interrupted.discard(call.thread)
            return 0
        self.seen[call.kind] += 1
        if call.kind != kind or self.seen[kind] < number:
            return 0
        if self.seen[kind] > number and span == "once":
            return 0
        if error == "EINTR":
            self._interrupted.add(call.thread)
        self.hit.append(call)
        number_of: int = getattr(errno, error)
        return number_of


class Tried(NamedTuple):
    """A fault that was tried."""

    fault: Fault
    run: Run
    calls: list[Call]
    hit: list[Call]
    """What failed; empty where the run had no such call."""
    violations: list[str]


def count(stage: Stage) -> Counter[str]:
    """How many calls of each kind a run makes."""
    stage.reset()
    nothing = Injector(Fault("none", 1, "EIO", "once"))
    stage.run(nothing)
    return Counter({kind: nothing.seen[kind] for kind in FAULTED})


def attempt(stage: Stage, fault: Fault) -> Tried:
    """Run under a fault, then without one; what does not hold."""
    stage.reset()
    injector = Injector(fault)
    # What passes may take as long as a busy machine needs; what does not, need not.
    run = stage.run(injector) if fault.span == "once" else stage.run(injector, patience=3.0)
    found = [f"under the fault: {words}" for words in stage.faulted(run)]
    found += [f"afterwards: {words}" for words in stage.clean_run()]
    found += [f"afterwards: {words}" for words in stage.look(after_fault=False)]
    return Tried(fault, run, injector.calls, injector.hit, found)


def sweep(stage: Stage, kind: str, error: str, span: str, step: int = 1) -> Iterator[Tried]:
    """Fail the first, the second, ... call of a kind, until a run that has no such call."""
    number = 1
    while True:
        tried = attempt(stage, Fault(kind, number, error, span))
        yield tried
        if not tried.hit:
            return
        number += step
