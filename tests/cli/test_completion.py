"""`--version`, and the completion of commands in bash, zsh and fish."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.commands import Casparian

ASK = """
COMP_WORDS=(casparian plugins bun); COMP_CWORD=2
_casparian_completion casparian
echo "completed: ${COMPREPLY[*]}"
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A home without any file, and `casparian` on the PATH."""
    program = tmp_path / "bin" / "casparian"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m casparian_flow.cli "$@"\n')
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "HOME": str(tmp_path), "PATH": path}


def run(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        command, env=environment, cwd=environment["HOME"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout


def test_the_version_is_told(bare: Casparian) -> None:
    told = f"casparian-flow {version('casparian-flow')}, Python {platform.python_version()}\n"
    assert bare.out("--version") == told


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_completes_a_subcommand(environment: dict[str, str]) -> None:
    bash = ["bash", "--norc", "-c"]
    shown = "source <(_CASPARIAN_COMPLETE=source_bash casparian) && complete -p casparian"
    assert "completed: bundled\n" in run(environment, *bash, shown + ASK)
    run(environment, *bash, "casparian --install-completion; true")
    assert "completed: bundled\n" in run(environment, *bash, "source ~/.bashrc" + ASK)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_given_a_script_and_the_words(
    shell: str, environment: dict[str, str]
) -> None:
    environment["_CASPARIAN_COMPLETE"] = f"source_{shell}"
    assert f"_CASPARIAN_COMPLETE=complete_{shell}" in run(environment, "casparian")
    environment["_CASPARIAN_COMPLETE"] = f"complete_{shell}"
    environment["_TYPER_COMPLETE_ARGS"] = "casparian plugins bun"
    environment["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
    assert "bundled" in run(environment, "casparian")
