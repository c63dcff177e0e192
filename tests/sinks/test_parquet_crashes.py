"""Killed at every crash point of every act on a Parquet sink, and asked again: the same as if
nothing had happened. `python -m proofs.power` cuts the power at each of them."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.sinks.parquet_acts import Story, dies, finish, seen, small_groups, stories
from tests.sinks.stages import Place


@pytest.mark.parametrize("story", stories(), ids=lambda story: story.name)
@pytest.mark.slow_but("redo, a file", "upgrade", "roll back", "replace to append", "rebuild")
def test_what_is_killed_goes_on(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory, where there is such a filesystem: what a dead process wrote is there as well."""
    small_groups(monkeypatch.setattr)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        home, fresh = Path(name, "place"), Path(name, "fresh")
        home.mkdir()
        place = Place("parquet", home)
        story.prepare(place)
        shutil.copytree(home, fresh)
        story.act(place)
        expected = seen(place)
        number = 0
        while True:
            number += 1
            shutil.rmtree(home)
            shutil.copytree(fresh, home)
            if not dies(place, story, number, lambda: None):
                break
            assert not finish(place, story, expected), f"crash point {number}"
        assert number > 2, "hardly a crash point was met"
        assert not finish(place, story, expected), "and once more"
