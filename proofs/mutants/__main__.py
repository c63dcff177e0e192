"""Seed each bug into a copy of the package; the tests named for it must fail there, and only there.

    python -m proofs.mutants                    all of them: some minutes
    python -m proofs.mutants "no fence check"   these only

Prints what caught each; the exit code is 1 unless every one was caught.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from proofs import arguments
from proofs.mutants.seeded import MUTANTS, ROOT, Mutant, apply

COPIED = ("casparian_flow", "plugins", "proofs", "tests", "pyproject.toml", "global_config.toml")
WITHIN_SECONDS = 900.0
"""Far longer than the tests of any mutant take on a busy machine."""
PASSED, FAILED = 0, 1
"""Exit codes of pytest; any other means that it could not try."""


def copy(folder: Path) -> Path:
    """A copy of what the tests need."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder)
    return folder


def run(folder: Path, tests: Sequence[str]) -> tuple[int, list[str], str]:
    """Run tests in a copy: pytest's exit code, the ids that failed, and all it said.

    Raises:
        TimeoutExpired: they did not end. A test that hangs where it should fail catches nothing.
    """
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "--tb=line"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True, text=True, check=False, timeout=WITHIN_SECONDS,
    )  # fmt: skip
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return done.returncode, failed, done.stdout + done.stderr


def caught(mutant: Mutant) -> tuple[str, str]:
    """The test that caught a mutant, or empty and what was said instead."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = copy(Path(name))
        apply(mutant, folder / "casparian_flow")
        code, failed, said = run(folder, mutant.tests)
    return (failed[0], "") if code == FAILED and failed else ("", said)


def main(words: Sequence[str] | None = None) -> int:
    parser = arguments.parser("mutants", __doc__)
    parser.add_argument("name", nargs="*", help="these mutants; else all")
    options = parser.parse_args(words)
    wanted = [mutant for mutant in MUTANTS if mutant.name in (options.name or [mutant.name])]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-none-") as name:
        tests = sorted({test for mutant in wanted for test in mutant.tests})
        code, _, said = run(copy(Path(name)), tests)
    if code != PASSED:
        print(f"the tests do not pass without a mutant:\n{said}")
        return 1
    number = 0
    for mutant in wanted:
        by, said = caught(mutant)
        number += bool(by)
        print(f"{mutant.name:32} {f'caught by {by}' if by else 'NOT CAUGHT'}", flush=True)
        if not by:
            print(said)
    print(f"{number} of {len(wanted)} caught in {time.monotonic() - started:.0f} s")
    return int(not wanted or number < len(wanted))


if __name__ == "__main__":
    sys.exit(main())
