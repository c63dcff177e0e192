"""Killed at every crash point of the SQLite sink, and asked again: the same as if nothing had been.

Whatever is done in one call is one transaction: after a crash a reader sees what it saw before, or
everything.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from casparian_flow.engine.sinks import sqlite_tables
from casparian_flow.protocol import Output, Publication, State
from tests.sinks import forks
from tests.sinks.stages import TOPIC, Place

OTHER = "others"


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(sqlite_tables, "INSERT_ROWS", 2)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def seen(place: Place) -> list[str]:
    """What a reader sees of both topics."""
    return sorted(repr(row) for topic in (TOPIC, OTHER) for row in place.rows(topic))


def as_told(output: Output, state: State) -> Output:
    return msgspec.structs.replace(output, state=state)


def held_against(
    home: Path, prepare: Callable[[Place], None], act: Callable[[Place], object]
) -> Place:
    """Kill the act at each of its crash points, and do it again; the place after the last."""
    fresh = home / "fresh"
    place = Place("sqlite", home / "place")
    place.home.mkdir()
    prepare(place)
    before = seen(place)
    shutil.copytree(place.home, fresh)
    act(place)
    expected, records = seen(place), recorded(place)
    number = 1
    while True:
        shutil.rmtree(place.home)
        shutil.copytree(fresh, place.home)
        if not forks.dies(lambda: act(place), number):
            break
        assert seen(place) in (before, expected), f"crash point {number}"
        act(place)
        assert seen(place) == expected, f"crash point {number}"
        assert recorded(place) == records, f"crash point {number}"
        assert place.staged_files() == [], f"crash point {number}"
        number += 1
    assert number > 4, "hardly a crash point was met"
    return place


def recorded(place: Place) -> list[Output]:
    """The sink's records, without the times, which differ."""
    return [
        msgspec.structs.replace(output, shown_at=bool(output.shown_at) * "then",
                                hidden_at=bool(output.hidden_at) * "then")
        for output in place.sink.records(())
    ]  # fmt: skip


def staged(place: Place, job: int, topic: str = TOPIC, **named: object) -> Output:
    return place.sealed({"n": [job, 2, 3]}, job, topic=topic, attempt=f"a{job}{topic}", **named)


def show(place: Place, *jobs: Publication) -> None:
    outcomes = place.sink.publish(jobs)
    assert all(isinstance(outcome, list) for outcome in outcomes), outcomes


@pytest.mark.slow
def test_an_append_that_is_killed(home: Path) -> None:
    """Two topics of one job, and another job, into a database that is not there yet."""
    jobs: list[Publication] = []

    def prepare(place: Place) -> None:
        jobs.append(Publication(outputs=[staged(place, 1), staged(place, 1, OTHER)]))
        jobs.append(Publication(outputs=[staged(place, 2), place.output(2, topic=OTHER)]))

    held_against(home, prepare, lambda place: show(place, *jobs))


def test_a_replacement_that_is_killed(home: Path) -> None:
    """Both topics of a version take their places at once; an older one comes late with it."""
    jobs: list[Publication] = []

    def version(place: Place, job: int, ordinal: int, state: State) -> list[Output]:
        named = {"mode": "replace", "slot": "one.csv", "ordinal": ordinal, "state": state}
        return [staged(place, job, topic, **named) for topic in (TOPIC, OTHER)]

    def prepare(place: Place) -> None:
        first = place.show(*version(place, 1, 1, State.CURRENT))
        past = [as_told(output, State.PAST) for output in first]
        jobs.append(Publication(outputs=version(place, 2, 3, State.CURRENT), changes=past))
        jobs.append(Publication(outputs=version(place, 3, 2, State.PAST)))

    place = held_against(home, prepare, lambda place: show(place, *jobs))
    assert {row["_cf_job_id"] for row in place.rows()} == {2}


@pytest.mark.parametrize("state", [State.RETRACTED, State.CURRENT])
def test_a_change_that_is_killed(home: Path, state: State) -> None:
    """Of two outputs at once, beside another job's rows, which stay as they are."""
    told: list[Output] = []

    def prepare(place: Place) -> None:
        before = State.CURRENT if state == State.RETRACTED else State.RETRACTED
        made = place.show(*(staged(place, job, state=before) for job in (1, 2)), staged(place, 3))
        told.extend(as_told(output, state) for output in made[:2])

    place = held_against(home, prepare, lambda place: place.sink.change(told))
    assert place.check(told) == []


def test_a_deletion_that_is_killed(home: Path) -> None:
    made: list[Output] = []

    def prepare(place: Place) -> None:
        made.extend(place.show(*(staged(place, job) for job in (1, 2, 3)))[:2])

    place = held_against(home, prepare, lambda place: place.sink.delete(made))
    assert {row["_cf_job_id"] for row in place.rows()} == {3}
