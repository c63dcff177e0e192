"""The command line as a person has it: a process of its own, in a folder of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from casparian_flow import config
from tests.conftest import POLICY
from tests.plugs import ROWS

COMMAND = [sys.executable, "-W", "error::ResourceWarning", "-m", "casparian_flow.cli"]


class Casparian:
    """Runs commands in a folder and holds them to their exit code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*COMMAND, *map(str, arguments)],
            cwd=self.folder, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        return done

    def out(self, *arguments: str | Path, code: int = 0) -> str:
        return self.run(*arguments, code=code).stdout

    def err(self, *arguments: str | Path, code: int = 0) -> str:
        return self.run(*arguments, code=code).stderr

    def json(self, *arguments: str | Path, code: int = 0) -> Any:
        return json.loads(self.out(*arguments, "--json", code=code))

    def plugin(self, name: str, source: str) -> Path:
        file = self.folder / f"{name}.py"
        file.write_text(source)
        return file


def initialized(folder: Path) -> Casparian:
    """A folder after `casparian init`; what fails is tried again at once."""
    folder.mkdir(exist_ok=True)
    made = Casparian(folder)
    made.run("init")
    with (folder / config.FILE_NAME).open("a") as file:
        file.write("\n[jobs]\nretry_seconds = 0.1\n[workers]\ncount = 2\n" + POLICY)
    return made


def add_source(casparian: Casparian) -> Path:
    """A source root without a settle time: every file counts as at rest."""
    folder = casparian.folder.parent / "in"
    folder.mkdir()
    casparian.run("source", "add", folder, "--settle", "0")
    return folder


def fill(casparian: Casparian) -> Casparian:
    """Two files worked, one of them edited and worked again."""
    source = add_source(casparian)
    casparian.run("publish", casparian.plugin("rows", ROWS), "--version", "1.0.0")
    (source / "a.txt").write_text("one\ntwo\n")
    (source / "b\n.txt").write_text("three\n")
    casparian.run("scan", "--drain")
    (source / "a.txt").write_text("edited\n")
    casparian.run("scan", "in", "--drain")
    return casparian


@pytest.fixture
def bare(tmp_path: Path) -> Casparian:
    """An empty folder: no configuration."""
    folder = tmp_path / "flow"
    folder.mkdir()
    return Casparian(folder)


@pytest.fixture
def casparian(tmp_path: Path) -> Casparian:
    return initialized(tmp_path / "flow")


@pytest.fixture
def source(casparian: Casparian) -> Path:
    return add_source(casparian)


@pytest.fixture
def filled(casparian: Casparian) -> Casparian:
    """To be changed."""
    return fill(casparian)


@pytest.fixture(scope="session")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Casparian:
    """To be looked at only."""
    return fill(initialized(tmp_path_factory.mktemp("shown") / "flow"))
