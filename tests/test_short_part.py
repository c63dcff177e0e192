"""The short part of the suite: `.ci/run` runs it on each Python that we name and that is here."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = ("3.11", "3.12", "3.13", "3.14")

ROOMS = {
    "tests/cli/test_azure.py",  # TLS
    "tests/db/test_access.py",  # connections to the ledger
    "tests/e2e/test_daemon.py",
    "tests/engine/test_bridge.py",  # real guests
    "tests/engine/test_venv_manager.py",  # real environments
    "tests/hostile/test_attacks.py",  # the sandbox
    "tests/plugins/test_bundle.py",
    "tests/security/test_gatekeeper.py",  # Python's own syntax tree
}
"""What has broken with another Python, or would."""


@pytest.mark.slow
def test_the_short_part_has_what_another_python_would_break() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "@.ci/short"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(tests) > 500
    assert {test.partition("::")[0] for test in tests} >= ROOMS


def test_what_only_has_the_name_of_a_python_is_not_run(tmp_path: Path) -> None:
    """pyenv's shims for what is not switched on, and a Python that is another one."""
    tools, pyenv = tmp_path / "bin", tmp_path / "pyenv"
    for folder in (tools, pyenv / "versions" / "3.12.1" / "bin"):
        folder.mkdir(parents=True)
    other = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
    shim = "#!/bin/sh\necho pyenv: command not found >&2\nexit 127\n"
    ours = ".".join(platform.python_version_tuple()[:2])
    files = {tools / f"python{version}": shim for version in NAMED} | {
        tools / "python3": other,
        pyenv / "versions" / "3.12.1" / "bin" / "python3.12": shim,
        tools / f"python{'3.14' if ours != '3.14' else '3.13'}": other,
    }
    for file, text in files.items():
        file.write_text(text)
        file.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.defpath}", "PYENV_ROOT": str(pyenv)}
    done = subprocess.run(
        ["bash", ROOT / ".ci" / "other-pythons", tmp_path / "environments"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    missing = "".join(f"; {each} NOT FOUND, not run" for each in NAMED if each != ours)
    expected = f"== Pythons: {platform.python_version()} all of the suite{missing}\n"
    assert (done.stdout, done.stderr) == (expected, "")
    assert not (tmp_path / "environments").exists()
