"""The Runner: what becomes of an attempt before, around and after its guest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from casparian_flow import config
from casparian_flow.engine.runner import Runner
from casparian_flow.protocol import Assignment, Outcome, Receipt, Welcome
from casparian_flow.sections import GuestSettings
from tests.engine.guests import artifact

Make = Callable[..., Runner]


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Make]:
    """Make Runners; they let their guests go at the end."""
    made: list[Runner] = []

    def make(**limits: Any) -> Runner:
        guests = str(tmp_path / "guests")
        welcome = Welcome(guests_folder=guests, inode=0, guests=4, limits=GuestSettings(**limits))
        made.append(Runner(welcome, config.cache_folder()))
        return made[-1]

    yield make
    for each in made:
        each.close()


def assignment(path: Path, content: bytes, **facts: Any) -> Assignment:
    return Assignment(
        **{
            "job_id": 1, "fence": 1, "attempt": "x-1", "plugin_id": 1, "plugin_version": "1",
            "version_id": 1, "source": "s", "path": os.fsencode(path), "rel_path": path.name,
            "content_hash": hashlib.sha256(content).hexdigest(), "size_bytes": len(content),
            "timeout_seconds": 30.0, "outputs": [], **facts,
        }
    )  # fmt: skip


def run(runner: Runner, job: Assignment, source: bytes, lock: str = "") -> Receipt:
    (receipt,) = runner.run([(job, msgspec.structs.replace(artifact(source), lock=lock))])
    return receipt


@pytest.mark.parametrize("led_to", ["secret", "."])
def test_a_large_file_that_is_a_link_now_is_shown_to_nobody(
    runner: Make, tmp_path: Path, default_lock: str, led_to: str
) -> None:
    (tmp_path / "secret").write_bytes(b"the version")
    large = tmp_path / "large.txt"
    large.symlink_to(tmp_path / led_to)
    job = assignment(large, b"the version")
    spy = b"import sys; print(sys.argv)"
    receipt = run(runner(copy_limit_bytes=1), job, spy, default_lock)
    assert receipt.outcome is Outcome.SUPERSEDED
    assert (receipt.sandbox, receipt.log) == ("", ""), "no guest was started"
