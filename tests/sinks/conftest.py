"""Every test that takes `place` runs once for each sink."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from proofs.tds import driver
from tests.sinks.stages import Place

FOLDERS, SERVERS = ["parquet", "sqlite"], ["mssql"]
"""Sinks in a folder of this machine, and tables of a server: the double of proofs/tds."""


@pytest.fixture(scope="session", autouse=True)
def provider() -> str:
    """Settle which half of mssql-python is used, before a test loads one of them."""
    return driver.choose()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "of_a_folder: holds for sinks in a folder only")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "place" in metafunc.fixturenames:
        is_of_folder = metafunc.definition.get_closest_marker("of_a_folder")
        schemes = FOLDERS if is_of_folder else FOLDERS + SERVERS
        metafunc.parametrize("place", schemes, indirect=True)


def _place(scheme: str, home: Path, provider: str) -> Iterator[Place]:
    if scheme in FOLDERS:
        yield Place(scheme, home)
        return
    if not provider:
        pytest.skip("SQL SERVER IS NOT TESTED: mssql-python is not installed")
    from proofs.tds.place import ServerPlace
    from proofs.tds.server import Server

    with Server() as server:
        yield ServerPlace(server, home)


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path, provider: str) -> Iterator[Place]:
    yield from _place(request.param, tmp_path, provider)


SCHEMES = [*FOLDERS, *SERVERS]


@pytest.fixture
def parquet(tmp_path: Path) -> Place:
    return Place("parquet", tmp_path)


@pytest.fixture
def sqlite(tmp_path: Path) -> Place:
    return Place("sqlite", tmp_path)
