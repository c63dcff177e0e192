"""Every test that takes `place` runs once for each sink."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sinks.stages import Place


@pytest.fixture(params=["parquet", "sqlite"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(request.param, tmp_path)


MODES_KNOWN = ["parquet", "sqlite"]
"""Sinks that know modes and retract; those of another branch are added by it."""


@pytest.fixture(params=MODES_KNOWN)
def modes(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(request.param, tmp_path)


@pytest.fixture
def parquet(tmp_path: Path) -> Place:
    return Place("parquet", tmp_path)


@pytest.fixture
def sqlite(tmp_path: Path) -> Place:
    return Place("sqlite", tmp_path)
