"""Killed at every crash point of the SQLite sink, and asked again: the same as if nothing had been.

Whatever is published together is one transaction: after a crash a reader sees what it saw before,
or everything.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from casparian_flow.engine.sinks import sqlite_tables
from casparian_flow.engine.sinks.base import Claim
from casparian_flow.protocol import Published, StagedOutput
from tests.sinks import forks
from tests.sinks.stages import TOPIC, Place

OTHER = "others"

Act = Callable[[Place], object]
"""What is done, and done again after the crash."""


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(sqlite_tables, "INSERT_ROWS", 2)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def seen(place: Place) -> list[str]:
    """What a reader sees of both topics."""
    return sorted(repr(row) for topic in (TOPIC, OTHER) for row in place.rows(topic))


def trials(home: Path, prepare: Act, act: Act) -> Iterator[tuple[int, Place, list[str]]]:
    """One for each crash point: its number, the place after the crash, and what must come."""
    fresh = home / "fresh"
    place = Place("sqlite", home / "place")
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
        if not forks.dies(lambda: act(place), number):
            assert number > 2, "hardly a crash point was met"
            return
        yield number, place, expected


def show(*outputs: StagedOutput) -> Act:
    def publish(place: Place) -> None:
        found = place.publish(*outputs)
        assert all(isinstance(each, Published) for each in found), found

    return publish


def staged(place: Place, job: int, topic: str = TOPIC, **named: object) -> StagedOutput:
    return place.sealed({"n": [job, 2, 3]}, job, topic=topic, attempt=f"a{job}{topic}", **named)


def replacing(place: Place, job: int, ordinal: int, topic: str = TOPIC) -> StagedOutput:
    key = f"job {job} {topic}"
    return staged(place, job, topic, mode="replace", ordinal=ordinal, key=key)


@pytest.mark.slow
def test_an_append_that_is_killed(home: Path) -> None:
    """Two topics of one job, and another job, into a database that is not there yet."""
    outputs: list[StagedOutput] = []

    def prepare(place: Place) -> None:
        outputs.append(staged(place, 1))
        outputs.append(staged(place, 1, OTHER, key="other"))
        outputs.append(staged(place, 2))

    def act(place: Place) -> None:
        show(*outputs)(place)

    for number, place, expected in trials(home, prepare, act):
        assert seen(place) in ([], expected), f"crash point {number}"
        act(place)
        assert seen(place) == expected, f"crash point {number}"
        assert place.staged_files() == [], f"crash point {number}"


def test_a_replacement_that_is_killed(home: Path) -> None:
    """Both topics of a version take their places at once; an older one comes late with it."""
    outputs: list[StagedOutput] = []
    before: list[list[str]] = []

    def prepare(place: Place) -> None:
        place.show(*(replacing(place, 1, 1, topic) for topic in (TOPIC, OTHER)))
        before.append(seen(place))
        outputs.extend(replacing(place, 2, 3, topic) for topic in (TOPIC, OTHER))
        outputs.append(replacing(place, 3, 2))

    def act(place: Place) -> None:
        show(*outputs)(place)

    for number, place, expected in trials(home, prepare, act):
        assert seen(place) in (before[0], expected), f"crash point {number}"
        act(place)
        assert seen(place) == expected, f"crash point {number}"
        assert {row["_cf_job_id"] for row in place.rows()} == {2}
        assert place.staged_files() == [], f"crash point {number}"


@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("verb", ["retract", "reinstate"])
@pytest.mark.slow_but("retract-append", "reinstate-replace")
def test_a_retraction_that_is_killed(home: Path, verb: str, mode: str) -> None:
    """Beside another job's rows, which stay as they are."""
    made: list[Claim] = []
    before: list[list[str]] = []

    def prepare(place: Place) -> None:
        output = staged(place, 1, mode=mode)
        made.extend(place.show(output, staged(place, 2))[:1])
        if verb == "reinstate":
            place.sink.retract(made[0])
        before.append(seen(place))

    def act(place: Place) -> None:
        getattr(place.sink, verb)(made[0])

    for number, place, expected in trials(home, prepare, act):
        assert seen(place) in (before[0], expected), f"crash point {number}"
        assert len(place.sink.check(made)) == (seen(place) == sorted(before[0])) ^ (
            verb == "retract"
        )
        act(place)
        assert seen(place) == expected, f"crash point {number}"
        assert len(place.sink.check(made)) == (verb == "retract")
