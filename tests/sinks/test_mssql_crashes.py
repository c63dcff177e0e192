"""A publisher to SQL Server that dies at each of its crash points, and what another makes of it.

The server is the double of proofs/tds: it holds locks and undoes what was not committed. What a
real one would do is not proven here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest

from casparian_flow import crashpoints
from casparian_flow.config import DatabaseSettings, MssqlSettings
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks.base import Claim, Lineage
from casparian_flow.protocol import OutputPlan, Published, StagedOutput
from proofs.crash.nursery import ONE_THREAD
from proofs.tds.server import Server

LOCATION = "mssql://sales"

NURSERY = """
import os, sys
import msgspec, mssql_python
from casparian_flow import crashpoints
from casparian_flow.config import DatabaseSettings
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks import mssql
from casparian_flow.engine.sinks.base import Claim
from casparian_flow.protocol import StagedOutput

while line := sys.stdin.buffer.readline():
    order = tuple[str, str, DatabaseSettings, msgspec.Raw]
    at, what, settings, subject = msgspec.json.decode(line, type=order)
    pid = os.fork()
    if pid == 0:
        crashpoints.arm(crashpoints.Trap(at))
        sink = sinks.open_sink("mssql://sales", settings)
        if what == "publish":
            sink.publish([msgspec.json.decode(subject, type=StagedOutput)])
        elif what == "drop":
            sink.drop_stages("tag", [])
        else:
            getattr(sink, what)(msgspec.json.decode(subject, type=Claim))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
"""Runs one order after another, each in a fork that dies at its crash point."""

PUBLISHING = [
    "ledger_made", "table_ready", "stage_made", "batch_sent", "loaded", "begun", "ledger_written",
    "rows_written", "all_written", "committed", "unstaged",
]  # fmt: skip
REPLACING = [each for each in PUBLISHING[2:] if each != "unstaged"] + ["replaced"]
CHANGING = ["change_written", "changed"]


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[bytes]]:
    pytest.importorskip("mssql_python", reason="CRASHES OF THE SQL SERVER SINK ARE NOT TRIED")
    process = subprocess.Popen(
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, **ONE_THREAD},
    )  # fmt: skip
    with process:
        yield process
        assert process.stdin
        process.stdin.close()


class Scene:
    """A double of SQL Server, and outputs of versions of one file."""

    def __init__(self, home: Path, server: Server, nursery: subprocess.Popen[bytes]) -> None:
        self.server = server
        self.settings = DatabaseSettings(
            db_location=str(home / "ledger.sqlite3"),
            mssql=MssqlSettings(connection=server.connection_string),
        )
        self.sink = sinks.open_sink(LOCATION, self.settings)
        self._nursery = nursery

    def sealed(self, version: int, mode: str) -> StagedOutput:
        plan = OutputPlan(
            topic="sales", uri=LOCATION, location=LOCATION, mode=mode,
            output_key=f"{version:064}", slot="5" * 64, ordinal=version,
        )  # fmt: skip
        lineage = Lineage(
            file_version_id=version, job_id=version, source_hash="ab" * 32, plugin_version="1.0"
        )
        stage = self.sink.open_stage(plan, lineage, f"tag-1-{version}-1")
        stage.write(pa.record_batch({"version": [version] * 3, "name": ["a", None, "ü"]}))
        return sinks.seal([stage])[0]

    def publish(self, output: StagedOutput) -> Published:
        (outcome,) = self.sink.publish([output])
        assert isinstance(outcome, Published), outcome
        return outcome

    def die(self, at: str, what: str, subject: Any = None) -> None:
        """Do something in a process that is killed at a crash point."""
        assert self._nursery.stdin
        assert self._nursery.stdout
        order = (f"mssql.{at}", what, self.settings, subject)
        self._nursery.stdin.write(msgspec.json.encode(order) + b"\n")
        self._nursery.stdin.flush()
        assert int(self._nursery.stdout.readline()) == -signal.SIGKILL, f"it did not come to {at}"

    def seen(self) -> list[int]:
        """The version of each row that a reader sees."""
        table = self.server.database.committed("sales")
        return sorted(row[0] for row in table.rows) if table else []

    def stages(self) -> list[str]:
        names = self.server.database.names()
        return [name for name in names if name.startswith("casparian_stage_")]


@pytest.fixture
def scene(tmp_path: Path, nursery: subprocess.Popen[bytes]) -> Iterator[Scene]:
    with Server() as server:
        yield Scene(tmp_path, server, nursery)


def claim(output: StagedOutput, seen: Published) -> Claim:
    return Claim(
        topic="sales", output_key=output.output_key, job_id=output.job_id, target=seen.target,
        rows=seen.rows, digest=seen.digest,
    )  # fmt: skip


def test_every_crash_point_is_tried() -> None:
    tried = {*PUBLISHING, *REPLACING, *CHANGING, "stage_swept"}
    assert {f"mssql.{each}" for each in tried} == {
        name for name in crashpoints.known() if name.startswith("mssql.")
    }


@pytest.mark.parametrize("at", PUBLISHING)
@pytest.mark.slow_but("committed", "batch_sent")
def test_the_first_output(scene: Scene, at: str) -> None:
    output = scene.sealed(1, "append")
    scene.die(at, "publish", output)
    scene.server.settle()
    assert scene.seen() in ([], [1, 1, 1])
    seen = scene.publish(output)
    assert seen.adopted == (at in ("committed", "unstaged"))
    assert scene.seen() == [1, 1, 1]
    assert scene.sink.check([claim(output, seen)]) == []
    assert not Path(output.stage).exists()


@pytest.mark.parametrize("at", REPLACING)
@pytest.mark.slow_but("stage_made")
def test_one_that_replaces(scene: Scene, at: str) -> None:
    scene.publish(scene.sealed(1, "replace"))
    output = scene.sealed(2, "replace")
    scene.die(at, "publish", output)
    scene.server.settle()
    assert scene.seen() in ([1, 1, 1], [2, 2, 2])
    seen = scene.publish(output)
    assert scene.seen() == [2, 2, 2]
    assert scene.sink.check([claim(output, seen)]) == []


@pytest.mark.parametrize("at", CHANGING)
@pytest.mark.parametrize("what", ["retract", "reinstate", "withdraw"])
@pytest.mark.slow_but("retract-changed")
def test_a_change(scene: Scene, what: str, at: str) -> None:
    output = scene.sealed(1, "append")
    told = claim(output, scene.publish(output))
    if what == "reinstate":
        scene.sink.retract(told)
    scene.die(at, what, told)
    scene.server.settle()
    assert scene.seen() in ([], [1, 1, 1])
    getattr(scene.sink, what)(told)
    assert scene.seen() == ([1, 1, 1] if what == "reinstate" else [])


@pytest.mark.slow
def test_stage_tables_of_the_dead_are_dropped(scene: Scene) -> None:
    """But not those that are owed, or that somebody uses."""
    for version in (1, 2):
        scene.die("loaded", "publish", scene.sealed(version, "append"))
    scene.server.settle()
    first, _ = scene.stages()
    owed = scene.settings.stage_folder / f"{first.removeprefix('casparian_stage_')}.parquet.part"
    sinks.drop_stages(LOCATION, scene.settings, "tag", [str(owed)])
    assert scene.stages() == [first]
    scene.die("stage_swept", "drop")
    scene.server.settle()
    assert scene.stages() == []
