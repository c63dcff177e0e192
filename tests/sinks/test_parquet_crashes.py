"""Killed at every crash point of publishing, and asked again: the same as if nothing had happened.

Each trial is a fork that dies by SIGKILL, in a copy of one prepared sink. Power cuts are tried by
`python -m tests.crash power1 parquet`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest

from casparian_flow import crashpoints
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks import parts
from casparian_flow.engine.sinks.base import Claim
from casparian_flow.protocol import Published, StagedOutput
from tests.sinks.stages import TOPIC, Place, claims

Act = Callable[[Place], object]
"""What is done, and done again after the crash; nothing outside of the sink knows of it."""


def seen(place: Place) -> dict[str, Any]:
    """What readers see, and what lies there."""
    folder = place.home / "out" / TOPIC
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return {"rows": place.rows(), "names": [name for name in names if not name.endswith(".tmp")]}


def killed(place: Place, act: Act, at: int) -> bool:
    """Whether a process that does it dies at its n-th crash point; False: it came to its end."""
    process = os.fork()
    if not process:
        count = 0

        def react(_: str) -> None:
            nonlocal count
            count += 1
            if count == at:
                crashpoints.die()

        try:
            crashpoints.arm(react)
            act(place)
        finally:
            os._exit(0)
    return os.waitpid(process, 0)[1] != 0


def trials(home: Path, prepare: Act, act: Act) -> Iterator[tuple[int, Place, dict[str, Any]]]:
    """One for each crash point: its number, the place after the crash, and what must come."""
    fresh = home / "fresh"
    place = Place("parquet", home / "place")
    place.home.mkdir()
    prepare(place)
    shutil.copytree(place.home, fresh)
    act(place)
    expected = seen(place)
    number = 0
    while True:
        number += 1
        shutil.rmtree(place.home)
        shutil.copytree(fresh, place.home)
        if not killed(place, act, number):
            assert number > 2, "hardly a crash point was met"
            return
        yield number, place, expected


def staged(place: Place, job: int, rows: int = 3, first: Any = 1, **named: Any) -> StagedOutput:
    """Two rows a part; a column of its own, and one whose type another output may settle."""
    stage = place.stage(job, split_bytes=1, **named)
    for start in range(0, rows, 2):
        numbers = [first + number for number in range(start, min(start + 2, rows))]
        stage.write(pa.record_batch({"n": numbers, f"of {job}": ["x"] * len(numbers)}))
    return sinks.seal([stage])[0]


def show(place: Place, *outputs: StagedOutput) -> None:
    found = place.publish(*outputs)
    assert all(isinstance(each, Published) for each in found), found


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In memory, where there is such a filesystem: what a dead process wrote is there all the
    same."""
    monkeypatch.setattr(parts, "GROUP_ROWS", 2)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_an_append_that_is_killed(home: Path) -> None:
    """A file, a folder of parts, and both again, rewritten because the first was quicker."""
    outputs: list[StagedOutput] = []

    def prepare(place: Place) -> None:
        for job, (rows, first) in enumerate([(2, 0.5), (5, 1.5), (2, 1), (3, 1)], start=1):
            outputs.append(staged(place, job, rows, first))

    for number, place, expected in trials(home, prepare, lambda place: show(place, *outputs)):
        show(place, *outputs)
        assert seen(place) == expected, f"crash point {number}"
        left = [name for name in place.staged_files() if not name.endswith(".fitted")]
        assert left == [], f"crash point {number}"


def replacing(place: Place, job: int, ordinal: int, rows: int = 2, first: Any = 1) -> StagedOutput:
    return staged(place, job, rows, first, mode="replace", ordinal=ordinal, attempt=f"a{job}")


def claim(place: Place, output: StagedOutput) -> Claim:
    """Publish an output; what the ledger would claim of it."""
    (made,) = claims([output], place.publish(output))
    return msgspec.structs.replace(made, job_id=output.job_id)


def test_a_replacement_that_is_killed(home: Path) -> None:
    """Readers see the old version or the new one at any time, and in the end the new one."""
    outputs: list[StagedOutput] = []

    def prepare(place: Place) -> None:
        show(place, replacing(place, 1, 1, first=0.5))
        outputs.extend([replacing(place, 2, 3, rows=5), replacing(place, 3, 2)])

    for number, place, expected in trials(home, prepare, lambda place: show(place, *outputs)):
        assert {row["_cf_job_id"] for row in place.rows()} in ({1}, {2}), f"crash point {number}"
        show(place, *outputs)
        assert seen(place) == expected, f"crash point {number}"
        assert {row["_cf_job_id"] for row in place.rows()} == {2}


def test_a_replacement_of_what_was_retracted_that_is_killed(home: Path) -> None:
    outputs: list[StagedOutput] = []

    def prepare(place: Place) -> None:
        place.sink.retract(claim(place, replacing(place, 1, 1)))
        outputs.append(replacing(place, 2, 2))

    for number, place, expected in trials(home, prepare, lambda place: show(place, *outputs)):
        assert {row["_cf_job_id"] for row in place.rows()} <= {2}, f"crash point {number}"
        show(place, *outputs)
        assert seen(place) == expected, f"crash point {number}"
        assert list((home / "place" / "out" / ".casparian" / "hidden" / TOPIC).iterdir()) == []


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("verb", ["retract", "reinstate"])
def test_a_retraction_that_is_killed(home: Path, verb: str, mode: str) -> None:
    """The folder of parts of an output that was appended, and a file in a slot."""
    made: list[Claim] = []

    def prepare(place: Place) -> None:
        rows = 5 if mode == "append" else 2
        made.append(claim(place, staged(place, 1, rows, mode=mode)))
        if verb == "reinstate":
            place.sink.retract(made[0])

    def act(place: Place) -> None:
        getattr(place.sink, verb)(made[0])

    for number, place, expected in trials(home, prepare, act):
        act(place)
        assert seen(place) == expected, f"crash point {number}"
        assert len(place.sink.check(made)) == (verb == "retract")
