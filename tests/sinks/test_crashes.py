"""A publisher that dies at each step of mode replace: a reader sees the old version or the new."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from casparian_flow.protocol import Published, StagedOutput
from tests.sinks.stages import Place, claims

PUBLISHER = """
import sys
import msgspec
from casparian_flow import config
from casparian_flow.config import DatabaseSettings
from casparian_flow.engine import sinks
from casparian_flow.protocol import StagedOutput

config.arm_crashpoints()
staged = msgspec.json.decode(sys.stdin.buffer.read(), type=list[StagedOutput])
sinks.open_sink(staged[0].location, DatabaseSettings()).publish(staged)
"""

POINTS = [
    ("sqlite", "sqlite.begun"),
    ("sqlite", "sqlite.replaced"),
    ("sqlite", "sqlite.ledger_written"),
    ("sqlite", "sqlite.rows_written"),
    ("sqlite", "sqlite.job_written"),
    ("sqlite", "sqlite.committed"),
    ("sqlite", "sqlite.unstaged"),
]


def version(place: Place, number: int) -> list[StagedOutput]:
    """Two topics of one job."""
    return [
        place.sealed(
            {"id": [number] * 5}, number, topic=topic, key=f"{topic} {number}",
            attempt=f"{topic}{number}", mode="replace", ordinal=number, slot=topic,
        )
        for topic in ("left", "right")
    ]  # fmt: skip


def seen(place: Place, topic: str) -> list[int]:
    return [row["id"] for row in place.rows(topic)]


@pytest.mark.parametrize(("scheme", "at"), POINTS, ids=[at for _, at in POINTS])
def test_a_publisher_that_dies_leaves_the_old_version_or_the_new(
    tmp_path: Path, scheme: str, at: str
) -> None:
    place = Place(scheme, tmp_path)
    place.publish(*version(place, 1))
    newer = version(place, 2)
    died = subprocess.run(
        [sys.executable, "-c", PUBLISHER],
        input=msgspec.json.encode(newer), env={**os.environ, "CASPARIAN_CRASH_AT": at}, check=False,
    )  # fmt: skip
    assert died.returncode == -signal.SIGKILL
    sides = {topic: seen(place, topic) for topic in ("left", "right")}
    assert all(rows in ([1] * 5, [2] * 5) for rows in sides.values()), sides
    if scheme != "parquet":  # whose files appear one by one
        assert sides["left"] == sides["right"]
    outcomes = place.publish(*newer)
    assert all(isinstance(outcome, Published) for outcome in outcomes)
    assert [seen(place, topic) for topic in ("left", "right")] == [[2] * 5] * 2
    made = [msgspec.structs.replace(claim, job_id=2) for claim in claims(newer, outcomes)]
    assert place.sink.check(made) == []
    assert place.staged_files() == []
