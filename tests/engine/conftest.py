"""Real environments and real guests for the tests of the engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from casparian_flow import config
from casparian_flow.config import GuestSettings
from casparian_flow.engine.bridge import Guest
from casparian_flow.engine.environments import EnvironmentStore, bundle
from casparian_flow.engine.locking import lock_dependencies
from casparian_flow.security.sandbox import InPlace
from tests.engine.guests import artifact, plugin, run


@pytest.fixture(scope="session")
def default_lock(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("plugin") / "plain.py"
    file.write_text("pass\n")
    return lock_dependencies(file)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> EnvironmentStore:
    """To look into: nobody else builds in it."""
    return EnvironmentStore(tmp_path_factory.mktemp("envs"), limit_bytes=4 << 30)


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def environment(
    private_folders: Path,
    default_lock: str,
    bundle_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, Path]]:
    """The default environment, with the byte code of what its first guest imported."""
    folder = tmp_path_factory.mktemp("first")
    for inner in ("in", "tmp"):
        (folder / inner).mkdir()
    publishes = plugin("import pandas\nself.publish('t', pa.table({'n': [1]}))")
    shared = EnvironmentStore(config.cache_folder() / "envs", GuestSettings().environments_bytes)
    with shared.lease(default_lock) as lease:
        with Guest(
            lease.python, lease.site_packages, artifact(publishes),
            folder=folder, bundle=bundle_folder, limits=GuestSettings(),
        ) as guest:  # fmt: skip
            guest.load()
            lease.compile(guest.compiled_anew, 60.0)
            run(guest)
            lease.compile(guest.compiled_anew, 60.0)
        yield lease.python, lease.site_packages


@pytest.fixture
def start(
    environment: tuple[Path, Path], bundle_folder: Path, tmp_path: Path
) -> Iterator[Callable[..., Guest]]:
    """Start guests; at the end each is closed and has left no descriptor behind."""
    before = len(os.listdir("/proc/self/fd"))
    guests: list[Guest] = []

    def start(
        source: bytes,
        topics: tuple[str, ...] = ("t",),
        limit: int = 64 << 20,
        wants: dict[str, Any] | None = None,
        in_place: InPlace | None = None,
        **limits: Any,
    ) -> Guest:
        folder = tmp_path / "guest"
        for inner in ("in", "tmp"):
            (folder / inner).mkdir(exist_ok=True, parents=True)
        guest = Guest(
            *environment,
            artifact(source, topics, **(wants or {})),
            folder=folder,
            bundle=bundle_folder,
            limits=GuestSettings(batch_limit_bytes=limit, **limits),
            in_place=in_place,
        )
        guests.append(guest)
        return guest

    yield start
    for guest in guests:
        guest.close()
    assert len(os.listdir("/proc/self/fd")) == before
