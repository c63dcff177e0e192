"""The command line in a folder of its own."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from casparian_flow import config
from casparian_flow.cli import main
from tests.conftest import POLICY
from tests.plugs import ROWS

QUIET = ROWS.replace("        self.publish", "        if lines:\n            self.publish")
"""Publishes nothing where the file has no line."""

COMMAND = [sys.executable, "-W", "error::ResourceWarning", "-m", "casparian_flow.cli"]


class Casparian:
    """Runs commands in a folder and holds them to their exit code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        """A command in this process: the suite has hundreds, and starting one takes a second."""
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(SystemExit) as ended,
        ):
            patch.setattr(sys, "argv", ["casparian", *map(str, arguments)])
            main()
        done = subprocess.CompletedProcess(arguments, 0, out.getvalue(), err.getvalue())
        done.returncode = int(ended.value.code or 0)
        return _held(done, code)

    def process(self, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        """The same command as a person has it: a process of its own."""
        done = subprocess.run(
            [*COMMAND, *map(str, arguments)],
            cwd=self.folder, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        return _held(done, code)

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


def asked(casparian: Casparian, table: str = "lines") -> list[str]:
    return sorted(row["line"] for row in casparian.json("query", f"SELECT line FROM {table}"))


def holds(casparian: Casparian) -> None:
    assert casparian.json("verify")["problems"] == []


def _held(done: subprocess.CompletedProcess[str], code: int) -> subprocess.CompletedProcess[str]:
    assert done.returncode == code, f"{done.args}: {done.returncode}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    return done


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


Run = Callable[..., object]


def fill(casparian: Casparian, run: Run) -> Casparian:
    """Two files worked, one of them edited and worked again."""
    source = add_source(casparian)
    run("publish", casparian.plugin("rows", ROWS), "--version", "1.0.0")
    (source / "a.txt").write_text("one\ntwo\n")
    (source / "b\n.txt").write_text("three\n")
    run("scan", "--drain")
    (source / "a.txt").write_text("edited\n")
    run("scan", "in", "--drain")
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
    return fill(casparian, casparian.run)


@pytest.fixture(scope="session")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Casparian:
    """To be looked at only; made by processes of their own."""
    made = initialized(tmp_path_factory.mktemp("shown") / "flow")
    return fill(made, made.process)
