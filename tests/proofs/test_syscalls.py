"""System calls that fail, and the order of those that must not: the short version of the matrix.

`python -m proofs.syscalls` is the whole of it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from proofs.syscalls.short import NAMES
from proofs.syscalls.supervisor import missing

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def said(request: pytest.FixtureRequest) -> dict[str, str]:
    """What each check found that was asked for; the harness forks: it is a process of its own."""
    if why := missing():
        pytest.skip(f"{why}: failing system calls are untested")
    wanted = [name for name in NAMES if any(f"[{name}]" in i.name for i in request.session.items)]
    done = subprocess.run(
        [sys.executable, "-m", "proofs.syscalls", "--short", *wanted],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert found.keys() == set(wanted), done.stdout + done.stderr
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_nothing_is_lost(said: dict[str, str], name: str) -> None:
    assert said[name] == "holds"
