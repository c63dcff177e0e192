"""The benchmarks run; what they measure is not asserted here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_one_command_measures_us_and_the_peer(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "help", "--quick", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--scratch", str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "| import typer: whole process |" in done.stdout
    assert "| casparian --help: whole process |" in done.stdout
    assert not list(tmp_path.iterdir())
