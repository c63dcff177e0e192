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

import pyarrow as pa
import pytest

from casparian_flow import crashpoints
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks import parts
from casparian_flow.protocol import Published, StagedOutput
from tests.sinks.stages import TOPIC, Place

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
            assert number > 3, "hardly a crash point was met"
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
