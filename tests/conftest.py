"""Fixtures: a configuration in a scratch folder, its ledger, and an environment cache."""

from __future__ import annotations

import faulthandler
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key as SHOWN

from casparian_flow import config
from casparian_flow.config import Settings
from casparian_flow.db.access import Ledger, open_ledger
from casparian_flow.engine import control
from tests import hangs
from tests.disks import in_memory


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow the cases that `slow_cases` names, and those that `slow_but` does not."""
    for item in items:
        case = item.name.partition("[")[2].removesuffix("]")
        parts = {case, *case.split("-")}
        for name in ("slow_cases", "slow_but"):
            for mark in item.iter_markers(name):
                if parts.isdisjoint(mark.args) == (name == "slow_but"):
                    item.add_marker(pytest.mark.slow)


def time_limit(item: pytest.Item) -> float:
    """Seconds after which pytest ends the process of a test; 0: never."""
    return float(item.config.getini("faulthandler_timeout"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if not (limit := time_limit(item)):
        return (yield)
    with hangs.told(item.nodeid, limit, item.config.stash[SHOWN]):
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Bound the teardown of a test that failed too: pytest stops its clock at a failure."""
    if limit := time_limit(item):
        file = item.config.stash[SHOWN]
        faulthandler.dump_traceback_later(limit, exit=True, file=file)


@pytest.fixture(scope="session", autouse=True)
def private_folders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Keys, environments and sockets of the tests stay out of the person's own.

    The processes of a run share the environments, which stand between each other anyway.
    """
    base = tmp_path_factory.mktemp("home")
    run = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # of pytest-xdist: a folder for each process
        run = run.parent
    runtime = Path("/tmp") / f"cf-test-{os.getpid()}"  # a socket's path must be short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(run / "cache"))
        patch.setenv("XDG_CONFIG_HOME", str(base / "config"))
        patch.setenv("XDG_RUNTIME_DIR", str(runtime))
        for name in ("CASPARIAN_CONFIG", "AZURE_TENANT_ID", "AZURE_CLIENT_ID"):
            patch.delenv(name, raising=False)
        # Else every command of a test compiles the package anew.
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        yield base
    for left in sorted(runtime.rglob("*"), reverse=True):
        left.rmdir() if left.is_dir() else left.unlink()
    if runtime.is_dir():
        runtime.rmdir()


POLICY = '[gatekeeper]\nallow = ["import:ctypes", "import:os", "import:sys"]\n'
"""What the plugins of the tests misbehave with."""


def write_config(folder: Path, extra: str = "") -> Settings:
    """A configuration file in `folder`, loaded; retries are quick."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / config.FILE_NAME
    file.write_text(
        '[database]\ndb_location = "casparian_flow.sqlite3"\n'
        f"[jobs]\nretry_seconds = 0.1\n[workers]\ncount = 2\n{POLICY}{extra}"
    )
    return config.load(str(file))


def take_bytes_away(settings: Settings) -> None:
    """Empty the store: from the next start of the daemon on, jobs read the files themselves."""
    shutil.rmtree(settings.database.store_folder)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return write_config(tmp_path / "flow")


@pytest.fixture
def ledger(settings: Settings) -> Iterator[Ledger]:
    with open_ledger(settings.database, control.wake) as ledger:
        yield ledger


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture
def own_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of the test's own: it may rotate them."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "me"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem with room for next to nothing."""
    with in_memory(tmp_path / "small", "64k") as folder:
        yield folder


@pytest.fixture
def seed() -> int:
    """Of what a test chooses; it is shown where the test fails."""
    drawn = random.randrange(1 << 32)
    print(f"seed {drawn}")
    return drawn
