"""Killed at every crash point of the SQL Server sink, and asked again: as if nothing had been.

Whatever a job or a change does is one transaction: after a crash a reader sees what it saw before,
or everything. The server is the double of proofs/tds: it holds locks and undoes what was not
committed. What a real one would do is not proven here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from casparian_flow import crashpoints
from casparian_flow.engine import sinks
from casparian_flow.protocol import Output, Publication, State
from proofs.crash.nursery import ONE_THREAD
from proofs.tds.place import ServerPlace
from proofs.tds.server import Server
from tests.sinks.earlier_mssql import COLUMNS, Earlier
from tests.sinks.stages import TOPIC

OTHER = "others"

NURSERY = """
import os, sys
import msgspec, mssql_python
from casparian_flow import crashpoints
from casparian_flow.config import DatabaseSettings
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks import mssql
from casparian_flow.protocol import Output, Publication

while line := sys.stdin.buffer.readline():
    order = tuple[int, str, DatabaseSettings, msgspec.Raw]
    at, what, settings, subject = msgspec.json.decode(line, type=order)
    pid = os.fork()
    if pid == 0:
        count = 0

        def react(name):
            global count
            count += name.startswith(("mssql.", "sql."))
            if count == at:
                os.write(1, f"{name}\\n".encode())
                crashpoints.die()

        crashpoints.arm(react)
        sink = sinks.open_sink("mssql://sales", settings)
        if what == "publish":
            sink.publish([msgspec.json.decode(subject, type=Publication)])
        elif what == "drop_stages":
            sink.drop_stages("tag", [])
        elif what == "upgrade":
            sink.upgrade()
        else:
            getattr(sink, what)(msgspec.json.decode(subject, type=list[Output]))
        os._exit(0)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
"""Runs one order after another, each in a fork that dies at its n-th crash point."""


class Nursery:
    """A process that does what it is told, and dies of it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, **ONE_THREAD},
        )  # fmt: skip

    def dies(self, here: ServerPlace, at: int, what: str, subject: Any = None) -> str:
        """The name of the n-th crash point, where it died; empty if it did not come to it."""
        assert self._process.stdin
        self._process.stdin.write(msgspec.json.encode((at, what, here.settings, subject)) + b"\n")
        self._process.stdin.flush()
        *name, end = self._answer()
        assert end in ("ended 0", "ended -9"), end
        return name[0] if name else ""

    def _answer(self) -> Iterator[str]:
        assert self._process.stdout
        for line in self._process.stdout:
            yield line.decode().strip()
            if line.startswith(b"ended"):
                return

    def close(self) -> None:
        """End it."""
        assert self._process.stdin
        with self._process:
            self._process.stdin.close()


@pytest.fixture(scope="module")
def nursery(provider: str) -> Iterator[Nursery]:
    if not provider:
        pytest.skip("CRASHES OF THE SQL SERVER SINK ARE NOT TRIED: mssql-python is not installed")
    made = Nursery()
    yield made
    made.close()


def seen(here: ServerPlace) -> list[str]:
    """What a reader sees of both topics."""
    return sorted(repr(row) for topic in (TOPIC, OTHER) for row in here.rows(topic))


def recorded(here: ServerPlace) -> list[Output]:
    """The sink's records, without the times, which differ."""
    return [
        msgspec.structs.replace(output, shown_at=bool(output.shown_at) * "then",
                                hidden_at=bool(output.hidden_at) * "then")
        for topic in (TOPIC, OTHER)
        for output in here.sink_of(topic).records(())
    ]  # fmt: skip


def do(here: ServerPlace, what: str, subject: Any) -> None:
    if what == "publish":
        (outcome,) = here.sink.publish([subject])
        assert isinstance(outcome, list), outcome
    elif what == "upgrade":
        here.sink.upgrade()
    else:
        getattr(here.sink, what)(subject)


def held_against(
    home: Path, nursery: Nursery, what: str, prepare: Callable[[ServerPlace], Any]
) -> list[str]:
    """Kill an act at each of its crash points, and do it again; the crash points.

    Args:
        prepare: brings a server to where the act begins; returns what is acted on.
    """
    staged, fresh = home / "staged", home / "fresh"
    with Server() as server:
        here = ServerPlace(server, staged)
        subject = prepare(here)
        server.settle()
        begun, before = server.database.copy(), seen(here)
        shutil.copytree(staged, fresh)
        do(here, what, subject)
        expected, records = seen(here), recorded(here)
    names: list[str] = []
    while True:
        shutil.rmtree(staged)
        shutil.copytree(fresh, staged)
        with Server(begun.copy()) as server:
            here = ServerPlace(server, staged)
            name = nursery.dies(here, len(names) + 1, what, subject)
            server.settle()
            if not name:
                break
            names.append(name)
            assert seen(here) in (before, expected), name
            do(here, what, subject)
            sinks.drop_stages(here.location_of(TOPIC), here.settings, "tag", [])
            assert seen(here) == expected, name
            assert recorded(here) == records, name
            assert here.check(records) == [], name
            left = [n for n in server.database.names() if n.startswith("casparian_stage_")]
            assert left == [], name
            assert here.staged_files() == [], name
    return list(dict.fromkeys(names))


def output(here: ServerPlace, job: int, topic: str = TOPIC, **named: Any) -> Output:
    columns = {"n": [job, 2, 3], "name": ["a", None, "ü"]}
    return here.sealed(columns, job, topic=topic, attempt=f"tag-{job}-{topic}", **named)


def as_told(outputs: list[Output], state: State) -> list[Output]:
    return [msgspec.structs.replace(output, state=state) for output in outputs]


PUBLISHING = [
    "mssql.ledger_made", "sql.view_made", "mssql.table_ready", "mssql.stage_made",
    "mssql.batch_sent", "mssql.loaded", "mssql.begun", "sql.recorded", "mssql.rows_written",
    "sql.rows_loaded", "sql.job_written", "mssql.all_written", "mssql.committed", "sql.unstaged",
]  # fmt: skip
CHANGING = ["sql.marked", "sql.change_written", "sql.changed"]
DELETING = ["sql.rows_deleted", "sql.deletion_written", "sql.deleted"]
UPGRADING = [
    "sql.upgrade_begun", "sql.outputs_upgraded", "sql.table_renamed", "sql.rows_numbered",
    "sql.retracted_moved", "sql.table_upgraded", "sql.view_made", "sql.topic_upgraded",
    "sql.upgrade_written", "sql.upgraded",
]  # fmt: skip
SWEEPING = "mssql.stage_swept"
DROPPING = "sql.table_dropped"


def test_every_crash_point_is_tried() -> None:
    tried = {*PUBLISHING, *CHANGING, *DELETING, *UPGRADING, SWEEPING, DROPPING}
    assert tried == {n for n in crashpoints.known() if n.startswith(("mssql.", "sql."))}


@pytest.mark.slow
def test_the_first_outputs(tmp_path: Path, nursery: Nursery) -> None:
    """Two topics of one job, on a server that has no table yet."""

    def prepare(here: ServerPlace) -> Publication:
        return Publication(outputs=[output(here, 1), output(here, 1, OTHER)])

    assert held_against(tmp_path, nursery, "publish", prepare) == PUBLISHING


@pytest.mark.slow
def test_a_version_that_takes_the_place_of_another(tmp_path: Path, nursery: Nursery) -> None:
    def prepare(here: ServerPlace) -> Publication:
        named = {"mode": "replace", "slot": "one.csv"}
        first = here.show(*(output(here, 1, topic, **named) for topic in (TOPIC, OTHER)))
        later = [output(here, 2, topic, ordinal=2, **named) for topic in (TOPIC, OTHER)]
        return Publication(outputs=later, changes=as_told(first, State.PAST))

    names = held_against(tmp_path, nursery, "publish", prepare)
    assert set(names) == {*PUBLISHING[3:], "sql.marked"}


@pytest.mark.parametrize("state", [State.RETRACTED, State.CURRENT])
@pytest.mark.slow_but("retracted")
def test_a_change(tmp_path: Path, nursery: Nursery, state: State) -> None:
    """Of two outputs at once, beside another job's rows, which stay as they are."""

    def prepare(here: ServerPlace) -> list[Output]:
        before = State.CURRENT if state == State.RETRACTED else State.RETRACTED
        made = here.show(*(output(here, job, state=before) for job in (1, 2)), output(here, 3))
        return as_told(made[:2], state)

    assert held_against(tmp_path, nursery, "change", prepare) == CHANGING


@pytest.mark.slow
def test_a_deletion(tmp_path: Path, nursery: Nursery) -> None:
    def prepare(here: ServerPlace) -> list[Output]:
        return here.show(*(output(here, job) for job in (1, 2, 3)))[:2]

    assert held_against(tmp_path, nursery, "delete", prepare) == DELETING


def rebuilt(here: ServerPlace) -> tuple[list[Output], list[Output]]:
    """An output, and what a rebuild is to show in its place, from a table of its own."""
    mended = {"n": ["x"], "name": [7]}
    stage = {"key": "new", "generation": 1, "attempt": "tag-new", "state": State.HIDDEN}
    return here.show(output(here, 1)), here.show(here.sealed(mended, 1, **stage))


def test_a_rebuild(tmp_path: Path, nursery: Nursery) -> None:
    def prepare(here: ServerPlace) -> list[Output]:
        old, new = rebuilt(here)
        return [*as_told(old, State.HIDDEN), *as_told(new, State.CURRENT)]

    names = held_against(tmp_path, nursery, "change", prepare)
    assert set(names) == {*CHANGING, "sql.view_made"}


@pytest.mark.slow
def test_a_rebuild_that_is_taken_back(tmp_path: Path, nursery: Nursery) -> None:
    """The second table goes with its output."""
    names = held_against(tmp_path, nursery, "delete", lambda here: rebuilt(here)[1])
    assert set(names) == {*DELETING, "sql.view_made", DROPPING}


@pytest.mark.slow
def test_an_upgrade(tmp_path: Path, nursery: Nursery) -> None:
    def prepare(here: ServerPlace) -> None:
        here.home.mkdir()
        earlier = Earlier(here.settings)
        for topic in (TOPIC, OTHER):
            earlier.topic(topic, COLUMNS)
            earlier.add(here.output(1, topic=topic), [(1, "a"), (2, None)])
            earlier.add(here.output(2, topic=topic), [(3, "c")], "retracted")

    assert held_against(tmp_path, nursery, "upgrade", prepare) == UPGRADING


@pytest.mark.slow
def test_stage_tables_of_the_dead_are_dropped(tmp_path: Path, nursery: Nursery) -> None:
    """But not those that are owed, or that somebody uses."""
    with Server() as server:
        here = ServerPlace(server, tmp_path)

        def stages() -> list[str]:
            return [n for n in server.database.names() if n.startswith("casparian_stage_")]

        here.show(output(here, 9))
        for job in (1, 2):
            job_of = Publication(outputs=[output(here, job)])
            assert nursery.dies(here, 3, "publish", job_of) == "mssql.loaded"
        server.settle()
        first, _ = stages()
        owed = here.sink.stage_folder / f"{first.removeprefix('casparian_stage_')}.parquet.part"
        sinks.drop_stages(here.location_of(TOPIC), here.settings, "tag", [str(owed)])
        assert stages() == [first]
        assert nursery.dies(here, 1, "drop_stages") == SWEEPING
        server.settle()
        assert stages() == []
