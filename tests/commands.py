"""`casparian`, in the process of the test and in one of its own."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest

from casparian_flow import config
from casparian_flow.cli import main
from proofs.crash.nursery import Nursery, Order
from tests.conftest import POLICY
from tests.daemons import CLI, Process
from tests.plugs import remembered

COMMAND = [sys.executable, "-W", "error::ResourceWarning", "-m", CLI]
SECONDS = 300.0
"""How long a command may take."""


class Casparian:
    """Runs commands in a folder and holds them to their exit code."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.environment = environment
        """Of commands in processes of their own; None: as here."""

    def run(self, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        """A command in this process: the suite has hundreds, and starting one takes a second."""
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.MonkeyPatch.context() as patch,
            remembered(),
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
            [*COMMAND, *map(str, arguments)], cwd=self.folder, env=self.environment,
            capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        return _held(done, code)

    def killed(self, at: str, *arguments: str | Path) -> bool:
        """Whether a command died at a crash point; False: it came to its end without it."""
        with tempfile.NamedTemporaryFile() as said:
            order = Order(
                [*map(str, arguments)], said.name, at,
                folder=str(self.folder), environment=dict(os.environ),
            )  # fmt: skip
            code = _nursery().run(order)
            assert code in (0, -signal.SIGKILL), said.read().decode()
        return code != 0

    def start(self, *arguments: str) -> Process:
        """A command that goes on; what it says is piped."""
        return Process([*COMMAND, *arguments], cwd=self.folder, stderr=subprocess.PIPE, text=True)

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


@functools.cache
def _nursery() -> Nursery:
    """Of all commands that are killed; it ends with this process."""
    made = Nursery(dict(os.environ))
    atexit.register(made.close)
    return made


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


T = TypeVar("T")


class Kept:
    """What many tests begin with, made once: a folder with a flow and its source root.

    Each test gets it at the same place with the same contents, whatever the one before did.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Any] = {}

    def begun(self, name: str, make: Callable[[Casparian, Path], T]) -> T:
        """What `make` made of an initialised flow and its source root, as it was then.

        Args:
            name: tells apart what is made in different ways.
            make: returns nothing that a test changes.
        """
        place, kept = self._folder / name, self._folder / f"{name}.kept"
        if name in self._made:
            shutil.rmtree(place)
            shutil.copytree(kept, place, symlinks=True)
        else:
            place.mkdir()
            casparian = initialized(place / "flow")
            self._made[name] = make(casparian, add_source(casparian))
            shutil.copytree(place, kept, symlinks=True)
        made: T = self._made[name]
        return made


def asked(casparian: Casparian, table: str = "lines") -> list[str]:
    """The lines that `casparian query` shows."""
    return sorted(row["line"] for row in casparian.json("query", f"SELECT line FROM {table}"))


def holds(casparian: Casparian) -> None:
    assert casparian.json("verify")["problems"] == []
