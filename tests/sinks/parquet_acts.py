"""What is done to a Parquet sink, to be interrupted at any crash point and done again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from casparian_flow.engine import sinks
from casparian_flow.engine.sinks import parquet_moves, parquet_record, parts
from casparian_flow.protocol import Output, Publication, State
from tests.sinks import forks
from tests.sinks.stages import TOPIC, Place

GROUP_ROWS = 2
"""Rows of a row group while acts are tried: a few rows make several parts."""


@dataclass
class Story:
    """An act, what was before it, and what a reader may see after a crash in it."""

    name: str
    jobs: list[Publication] = field(default_factory=list)
    known: list[Output] = field(default_factory=list)
    """Outputs that were published before."""
    jobs_between: tuple[set[int], ...] = ()
    """Which jobs' rows are seen in between: one of these; any of the act's own where empty."""

    def prepare(self, place: Place) -> None:
        raise NotImplementedError

    def act(self, place: Place) -> None:
        """To be asked of the sink as often as it dies; nothing else knows of it."""
        for outcome in place.sink.publish(self.jobs):
            assert isinstance(outcome, list), outcome

    def before(self, place: Place, job: int, rows: int, **named: Any) -> Output:
        """Publish an output before the act."""
        self.known += place.show(staged(place, job, rows, 1, **named))
        return self.known[-1]

    def between(self, place: Place) -> str:
        """What is wrong with what a reader sees after a crash; empty where nothing is."""
        counted: dict[int, int] = {}
        for row in place.rows():
            counted[row["_cf_job_id"]] = counted.get(row["_cf_job_id"], 0) + 1
        outputs = [*self.known, *(output for job in self.jobs for output in job.outputs)]
        whole = {output.job_id: output.rows for output in outputs}
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
            self.jobs.append(Publication(outputs=[staged(place, job, rows, first)]))


class Replace(Story):
    """A newer version, whose columns another was quicker to settle, and one that comes late."""

    def prepare(self, place: Place) -> None:
        late = staged(place, 3, 2, 1, mode="replace", slot="s", ordinal=2, state=State.PAST)
        newer = staged(place, 2, 2, 1, mode="replace", slot="s", ordinal=3)
        self.known += place.show(staged(place, 1, 2, 0.5, mode="replace", slot="s"))
        past = told(State.PAST, *self.known)
        self.jobs += [Publication(outputs=[newer], changes=past), Publication(outputs=[late])]
        self.jobs_between = ({1}, {2})


@dataclass
class Redo(Story):
    """Another artifact works a version again: its rows take the place of the first ones."""

    rows: tuple[int, int] = (2, 2)

    def prepare(self, place: Place) -> None:
        older = self.before(place, 1, self.rows[0], slot="s")
        newer = staged(place, 2, self.rows[1], 1, slot="s")
        self.jobs.append(Publication(outputs=[newer], changes=told(State.HIDDEN, older)))
        is_one_kind = len({rows > GROUP_ROWS for rows in self.rows}) == 1
        self.jobs_between = ({1}, {2}) if is_one_kind else ({1}, set(), {2})


@dataclass
class Change(Story):
    """Outputs of two files, of two versions each, get states: from `states` to `then`."""

    mode: str = "append"
    then_mode: str = ""
    rows: tuple[int, int, int] = (5, 2, 2)
    states: str = "PC C"
    then: str = "RR C"

    def prepare(self, place: Place) -> None:
        for job, (letter, rows) in enumerate(
            zip(self.states.replace(" ", ""), self.rows, strict=True), 1
        ):
            slot, ordinal = ("s", job) if job < 3 else ("other", 1)
            self.before(
                place, job, rows, slot=slot, ordinal=ordinal, mode=self.mode, state=STATES[letter]
            )
        self.after = [
            msgspec.structs.replace(o, state=STATES[letter], mode=self.then_mode or self.mode)
            for o, letter in zip(self.known, self.then.replace(" ", ""), strict=True)
        ]  # fmt: skip
        first, last = ({o.job_id for o in each if o.visible} for each in (self.known, self.after))
        changing = first ^ last
        one_rename = len(first - last) == len(last - first) == 1
        subsets = [set(), changing] if one_rename else _subsets(changing)
        self.jobs_between = tuple(first ^ each for each in subsets)

    def act(self, place: Place) -> None:
        place.sink.change(self.after)


class Rebuild(Story):
    """Files and parts with a mended type take the place of others: the folder is exchanged."""

    def prepare(self, place: Place) -> None:
        for job, rows in ((1, 2), (2, 5)):
            self.before(place, job, rows)
        for job, rows in ((3, 2), (4, 3)):
            stage = place.stage(job, split_bytes=1, generation=1, state=State.HIDDEN)
            for start in range(0, rows, GROUP_ROWS):
                texts = [f"mended {n}" for n in range(start, min(start + GROUP_ROWS, rows))]
                stage.write(pa.record_batch({"n": texts}))
            self.known += place.show(sinks.seal([stage])[0])
        self.after = [*told(State.HIDDEN, *self.known[:2]), *told(State.CURRENT, *self.known[2:])]
        self.jobs_between = ({1, 2}, {3, 4})

    def act(self, place: Place) -> None:
        place.sink.change(self.after)


class Delete(Story):
    """A visible file, a visible folder, a kept file, and one that has no file."""

    def prepare(self, place: Place) -> None:
        for job, rows in ((1, 2), (2, 5), (4, 2)):
            self.before(place, job, rows)
        self.before(place, 3, 2, state=State.RETRACTED)
        self.known += place.show(place.output(5))
        self.jobs_between = tuple(each | {4} for each in _subsets({1, 2}))

    def act(self, place: Place) -> None:
        place.sink.delete([output for output in self.known if output.job_id != 4])


class Upgrade(Story):
    """A sink of an earlier release, with a retracted file and a retracted folder."""

    def prepare(self, place: Place) -> None:
        for job, rows in ((1, 2), (2, 5), (3, 2), (4, 5)):
            self.before(place, job, rows)
        make_old(place, [output for output in self.known if output.job_id > 2])
        self.jobs_between = ({1, 2},)

    def act(self, place: Place) -> None:
        place.sink.upgrade()


STATES = {state.value[0].upper(): state for state in State}


def stories() -> list[Story]:
    """One of each, made anew: they remember what they did."""
    return [
        Append("append"),
        Replace("replace"),
        Redo("redo, a file"),
        Redo("redo, parts", rows=(5, 3)),
        Redo("redo, a file in parts", rows=(2, 5)),
        Change("retract, append"),
        Change("retract, replace", mode="replace", rows=(2, 2, 2)),
        Change("reinstate, append", states="RR C", then="PC C"),
        Change("reinstate, replace", mode="replace", rows=(2, 2, 2), states="RR C", then="PC C"),
        Change("roll back", rows=(2, 2, 2), states="CH C", then="HC C"),
        Change("roll back, parts", rows=(5, 3, 2), states="CH C", then="HC C"),
        Change("append to replace", then_mode="replace", then="PC C"),
        Change(
            "replace to append", mode="replace", rows=(2, 2, 2), then_mode="append", then="PC C"
        ),
        Rebuild("rebuild"),
        Delete("delete"),
        Upgrade("upgrade"),
    ]


def told(state: State, *outputs: Output) -> list[Output]:
    """The outputs with another state."""
    return [msgspec.structs.replace(output, state=state) for output in outputs]


def staged(place: Place, job: int, rows: int, first: Any, **named: Any) -> Output:
    """Two rows a part; a column of its own, and one whose type another output may settle."""
    stage = place.stage(job, split_bytes=1, **named)
    for start in range(0, rows, GROUP_ROWS):
        numbers = [first + number for number in range(start, min(start + GROUP_ROWS, rows))]
        stage.write(pa.record_batch({"n": numbers, f"of {job}": ["x"] * len(numbers)}))
    return sinks.seal([stage])[0]


def make_old(place: Place, retracted: list[Output]) -> None:
    """Make the sink one of an earlier release: without a record, with names by key or slot."""
    root = place.home / "out"
    for output in retracted:
        hidden = root / parquet_moves.HIDDEN / output.topic
        hidden.mkdir(parents=True, exist_ok=True)
        Path(output.target).rename(hidden / Path(output.target).name)
    for path in [*root.glob("[!.]*/*"), *(root / parquet_moves.HIDDEN).glob("*/*")]:
        if footer := parts.footer_of(path):
            suffix = "" if path.is_dir() else ".parquet"
            if footer.facts["mode"] != "replace":
                path.rename(path.with_name(footer.facts["output_key"][:32] + suffix))
    shutil.rmtree(root / parquet_record.KEPT, ignore_errors=True)
    for file in (root / ".casparian").glob("outputs.sqlite3*"):
        file.unlink()


def seen(place: Place) -> dict[str, Any]:
    """What readers see, what lies there, and what the record says of it."""
    root = place.home / "out"
    names = sorted(
        str(path.relative_to(root))
        for folder in (TOPIC, parquet_record.KEPT, parquet_moves.HIDDEN)
        for path in (root / folder).rglob("*")
        if not path.name.endswith(".tmp")
    )
    rows = [{k: value for k, value in row.items() if value is not None} for row in place.rows()]
    return {"rows": rows, "names": names, "record": recorded(place)}


def recorded(place: Place) -> list[Any]:
    """What the record says. Which columns a file has besides its own depends on when it was
    rewritten, so its digest is left out."""
    root = place.home / "out"
    with parquet_record.opened(root, write=False) as record:
        return [
            msgspec.structs.replace(entry, shown_at="", hidden_at="", digest="")
            for entry in (record.all() if record else ())
        ]


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
    if faults := place.sink.check([*place.sink.records(())]):
        return "; ".join(faults)
    left = [name for name in place.staged_files() if not name.endswith(".fitted")]
    return f"left behind: {left}" if left else ""


def small_groups(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Have row groups of `GROUP_ROWS`."""
    patch(parts, "GROUP_ROWS", GROUP_ROWS)


def _subsets(jobs: set[int]) -> list[set[int]]:
    found: list[set[int]] = [set()]
    for job in jobs:
        found += [each | {job} for each in found]
    return found
