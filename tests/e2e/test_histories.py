"""Real revision histories, in short; `python -m tests.e2e.replay` runs them whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e import modes
from tests.e2e.replay import HISTORIES, replay
from tests.real_data import absent

pytestmark = pytest.mark.skipif(
    not HISTORIES.is_dir(),
    reason=absent("histories", "that real histories of files are recorded as they were"),
)


def test_the_first_commits_one_by_one(tmp_path: Path) -> None:
    figures = replay(tmp_path, "sp500", commits=50, flood=False)
    assert figures["versions"] == figures["COMPLETED"]


def test_identical_rewrites_give_no_version(tmp_path: Path) -> None:
    replay(tmp_path, "countries", commits=25, flood=False)


def test_a_flood(tmp_path: Path) -> None:
    replay(tmp_path, "sp500", commits=None, flood=True)


def test_a_history_under_replace_with_a_kill(tmp_path: Path) -> None:
    """`python -m tests.e2e.modes` runs it whole, with more kills."""
    figures = modes.replay(tmp_path, "sqlite", "replace", commits=5, kills=1, seed=3)
    assert figures["commits"] == 5
    assert figures["kills"] == 1
