"""Publishes to the double whose line is cut at a random byte of a random phase, and recovery.

Each trial has a server of its own. An output is published while the line is cut once; whatever came
of it, it is published again over whole lines, as the Committer does after a pause or a crash.
Then the table and the ledger must have the output exactly once, no stage table may be left, the
error must have been one that a lost line is, and the statements must have come in the right order.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from casparian_flow.engine.sinks.mssql import MssqlSink
from casparian_flow.engine.sinks.sql import LEDGER
from casparian_flow.errors import JobError, SinkUnavailable
from casparian_flow.protocol import Output
from proofs.tds import order
from proofs.tds.faults import Entry, Faults
from proofs.tds.packets import Cut
from proofs.tds.phases import PHASES, choose
from proofs.tds.place import ServerPlace
from proofs.tds.server import Server
from tests.sinks.stages import TOPIC

TAG = "cuts"
"""Begins the names of staged files, as a ledger's own tag does."""


@dataclass(frozen=True)
class Trial:
    """One cut and what came of it."""

    phase: str
    cut: Cut
    first: Output | JobError
    """What came of the call whose line was cut."""
    committed: bool
    """On the server, by that call."""
    adopted: bool
    """What the second call found had been published."""
    violations: tuple[str, ...]

    def __str__(self) -> str:
        way = "request" if self.cut.inbound else "reply"
        return (
            f"{self.phase}: connection {self.cut.connection}, {way} {self.cut.message}, "
            f"byte {self.cut.at}{', reset' if self.cut.abrupt else ''}"
        )


@dataclass
class Tally:
    """All trials so far."""

    trials: list[Trial] = field(default_factory=list)

    @property
    def violations(self) -> list[str]:
        return [f"{trial}: {fault}" for trial in self.trials for fault in trial.violations]

    def summary(self) -> str:
        """For a person: a line a phase. What came of the call whose line was cut (published, after
        it had looked or begun again; or paused), and what the next call then did."""
        names = ("cuts", "request", "reply", "published", "paused", "adopted", "inserted")
        lines = [f"{'':<12} " + " ".join(f"{name:>9}" for name in names)]
        for phase in PHASES:
            of = [trial for trial in self.trials if trial.phase == phase]
            asked = sum(trial.cut.inbound for trial in of)
            done = sum(isinstance(trial.first, Output) for trial in of)
            adopted = sum(trial.adopted for trial in of)
            figures = (
                len(of), asked, len(of) - asked, done, len(of) - done, adopted, len(of) - adopted,
            )  # fmt: skip
            lines.append(f"{phase:<12} " + " ".join(f"{figure:>9}" for figure in figures))
        lines += [
            f"paused: {trial.first.message}"
            for trial in self.trials
            if isinstance(trial.first, JobError)
        ]
        lines += [f"VIOLATION {violation}" for violation in self.violations]
        lines.append(f"{len(self.trials)} cuts, {len(self.violations)} violations")
        return "\n".join(lines)


def run(folder: Path, count: int, seed: int, rows: int) -> Tally:
    """Cut so many publishes; the phases take turns, everything else is chance.

    Args:
        folder: for staged files.
        count: trials.
        seed: what chance begins with.
        rows: of each output.
    """
    chance = random.Random(seed)
    tally = Tally()
    # The first output makes the tables; a later one finds them.
    heard = [_listen(folder / f"whole {later}", rows, later=later) for later in (False, True)]
    for number in range(count):
        phase, later = PHASES[number % len(PHASES)], chance.random() < 0.5
        cut = choose(heard[later], phase, chance)
        tally.trials.append(_trial(folder / str(number), phase, cut, rows, later=later))
    return tally


def _listen(home: Path, rows: int, *, later: bool) -> list[Entry]:
    """What is said where nothing is cut."""
    with Server() as server:
        place = ServerPlace(server, home)
        before = _begin(place, rows, later=later)
        assert isinstance(_publish(place, _output(place, rows)), Output)
        server.settle()
        return server.log.entries[before:]


def _trial(home: Path, phase: str, cut: Cut, rows: int, *, later: bool) -> Trial:
    """Publish over a line that is cut, then over whole ones; and look."""
    with Server(faults=Faults([cut])) as server:
        place = ServerPlace(server, home)
        _begin(place, rows, later=later)
        output = _output(place, rows)
        first = _publish(place, output)
        server.settle()
        first_said = len(server.log.entries)
        committed = order.committed(server.log.entries, output.output_key)
        there = Path(output.stage).exists()
        second = _publish(place, output if there else _output(place, rows, attempt="again"))
        MssqlSink(place.location_of(TOPIC), place.settings).drop_stages(TAG, [])
        server.settle()
        again = order.committed(server.log.entries[first_said:], output.output_key)
        adopted = isinstance(second, Output) and not again
        violations = [
            *order.faults(server.log.entries, TOPIC),
            *_wrong(first, second, committed, adopted),
            *_left(place, rows, later),
        ]
    return Trial(phase, cut, first, committed, adopted, tuple(violations))


def _begin(place: ServerPlace, rows: int, *, later: bool) -> int:
    """Publish another output before, perhaps; how much was said by then."""
    if later:
        assert isinstance(_publish(place, _output(place, rows, job=1)), Output)
        place.server.settle()
    return len(place.server.log.entries)


def _output(place: ServerPlace, rows: int, job: int = 2, attempt: str = "cuts-first") -> Output:
    return place.sealed(columns(rows), job, attempt=attempt)


def columns(rows: int) -> dict[str, Any]:
    """Columns of many types, as long as one likes."""
    return {
        "id": pa.array(range(rows), pa.int64()),
        "name": [f"Ünï {number} 🐟" if number % 7 else None for number in range(rows)],
        "amount": pa.array([number / 8 for number in range(rows)], pa.float64()),
        "raw": pa.array([bytes([number % 256]) * (number % 50) for number in range(rows)]),
    }


def _publish(place: ServerPlace, output: Output) -> Output | JobError:
    (outcome,) = place.publish(output)
    return outcome


def _wrong(
    first: Output | JobError, second: Output | JobError, committed: bool, adopted: bool
) -> Iterator[str]:
    """What was said that is not so."""
    words = ("the connection is lost", "it cannot be reached")
    lost = isinstance(first, SinkUnavailable) and any(word in first.message for word in words)
    if not isinstance(first, Output) and not lost:
        yield f"a lost line was taken for {first!r}"
    if isinstance(first, Output) and not committed:
        yield "it said published, and the server had not committed"
    if not isinstance(second, Output):
        yield f"it was not published over a whole line: {second!r}"
    elif adopted is not committed:
        yield f"committed {committed}, and the second call adopted {adopted}"


def _left(place: ServerPlace, rows: int, later: bool) -> Iterator[str]:
    """What is on the server that should not be, or is missing."""
    for job in [1, 2] if later else [2]:
        wanted = pa.table(columns(rows)).to_pylist()
        found = [row for row in place.rows() if row["_cf_job_id"] == job]
        found = [{name: row[name] for name in wanted[0]} for row in found]
        if found != wanted:
            yield f"{len(found)} rows of job {job}, or others than the {rows} it has"
    ledger = place.rows(LEDGER)
    if len(ledger) != (2 if later else 1):
        yield f"{len(ledger)} rows in the ledger"
    stages = [name for name in place.tables.names() if name.startswith("casparian_stage_")]
    if stages:
        yield f"{len(stages)} stage tables are left"
