"""What is done to a Parquet sink, to be interrupted at any crash point and done again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from casparian_flow.engine import sinks
from casparian_flow.engine.sinks import parts
from casparian_flow.engine.sinks.base import Claim
from casparian_flow.protocol import Published, StagedOutput
from tests.sinks import forks
from tests.sinks.stages import TOPIC, Place

GROUP_ROWS = 2
"""Rows of a row group while acts are tried: a few rows make several parts."""


@dataclass
class Story:
    """An act, what was before it, and what a reader may see after a crash in it."""

    name: str
    outputs: list[StagedOutput] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    jobs_between: tuple[set[int], ...] = ()
    """Which jobs' rows are seen in between: one of these; any of the act's own where empty."""

    def prepare(self, place: Place) -> None:
        raise NotImplementedError

    def act(self, place: Place) -> None:
        """To be asked of the sink as often as it dies; nothing else knows of it."""
        show(place, *self.outputs)

    def between(self, place: Place) -> str:
        """What is wrong with what a reader sees after a crash; empty where nothing is."""
        counted: dict[int, int] = {}
        for row in place.rows():
            counted[row["_cf_job_id"]] = counted.get(row["_cf_job_id"], 0) + 1
        whole = {output.job_id: output.rows for output in self.outputs}
        whole |= {claim.job_id: claim.rows for claim in self.claims}
        halves = {job: n for job, n in counted.items() if n != whole[job]}
        if halves:
            return f"a part of an output is seen: {halves}"
        if self.jobs_between and set(counted) not in self.jobs_between:
            return f"the rows of jobs {sorted(counted)} are seen"
        return ""


class Append(Story):
    """A file, a folder of parts, and both again, rewritten because the first was quicker."""

    def prepare(self, place: Place) -> None:
        for job, (rows, first) in enumerate([(2, 0.5), (5, 1.5), (2, 1), (3, 1)], start=1):
            self.outputs.append(staged(place, job, rows, first))


class Replace(Story):
    """A newer version, whose columns another was quicker to settle, and one that comes late."""

    def prepare(self, place: Place) -> None:
        late = staged(place, 3, 2, 1, mode="replace", ordinal=2)
        newer = staged(place, 2, 5, 1, mode="replace", ordinal=3)
        self.claims.extend(place.show(staged(place, 1, 2, 0.5, mode="replace")))
        self.outputs += [newer, late]
        self.jobs_between = ({1}, {2})


class ReplaceRetracted(Story):
    """A newer version takes the place of one that is hidden."""

    def prepare(self, place: Place) -> None:
        self.claims.extend(place.show(staged(place, 1, 2, 1, mode="replace")))
        place.sink.retract(self.claims[0])
        self.outputs.append(staged(place, 2, 2, 1, mode="replace", ordinal=2))
        self.jobs_between = (set(), {2})


@dataclass
class Retract(Story):
    """An output goes out of sight: a folder of parts, or the file of a slot."""

    mode: str = "append"

    def prepare(self, place: Place) -> None:
        self.claims.extend(place.show(staged(place, 1, 5, 1, mode=self.mode)))
        self.claims.extend(place.show(staged(place, 2, 2, 1)))
        self.jobs_between = ({2}, {1, 2})

    def act(self, place: Place) -> None:
        place.sink.retract(self.claims[0])


class Reinstate(Retract):
    """And comes back."""

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        super().act(place)

    def act(self, place: Place) -> None:
        place.sink.reinstate(self.claims[0])


def stories() -> list[Story]:
    """One of each, made anew: they remember what they did."""
    return [
        Append("append"),
        Replace("replace"),
        ReplaceRetracted("replace what is retracted"),
        *(kind(f"{kind.__name__.lower()}, {mode}", mode=mode)
          for kind in (Retract, Reinstate) for mode in ("append", "replace")),
    ]  # fmt: skip


def staged(place: Place, job: int, rows: int, first: Any, **named: Any) -> StagedOutput:
    """Two rows a part; a column of its own, and one whose type another output may settle."""
    stage = place.stage(job, attempt=f"a{job}", split_bytes=1, **named)
    for start in range(0, rows, GROUP_ROWS):
        numbers = [first + number for number in range(start, min(start + GROUP_ROWS, rows))]
        stage.write(pa.record_batch({"n": numbers, f"of {job}": ["x"] * len(numbers)}))
    return sinks.seal([stage])[0]


def show(place: Place, *outputs: StagedOutput) -> None:
    found = place.publish(*outputs)
    assert all(isinstance(each, Published) for each in found), found


def seen(place: Place) -> dict[str, Any]:
    """What readers see, and what lies there."""
    folder = place.home / "out" / TOPIC
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return {"rows": place.rows(), "names": [name for name in names if not name.endswith(".tmp")]}


def dies(place: Place, story: Story, at: int, die: Callable[[], object]) -> bool:
    """Whether a fork that does it comes to its n-th crash point, and ends there."""
    return forks.dies(lambda: story.act(place), at, die)


def finish(place: Place, story: Story, expected: dict[str, Any]) -> str:
    """Do it again after a crash; what is not as if nothing had happened."""
    if words := story.between(place):
        return words
    story.act(place)
    if (found := seen(place)) != expected:
        return f"{found} where {expected} was due"
    left = [name for name in place.staged_files() if not name.endswith(".fitted")]
    return f"left behind: {left}" if left else ""


def small_groups(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Have row groups of `GROUP_ROWS`."""
    patch(parts, "GROUP_ROWS", GROUP_ROWS)
