"""`--help` is quick, and docs/cli.md says the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.write_docs import block, documented, every_command
from tests.commands import Casparian
from tests.plugs import ROWS


def loaded_by(arguments: list[str], folder: Path) -> set[str]:
    """The packages that a command has imported when it ends."""
    code = f"""
import sys
from casparian_flow.cli import main
sys.argv = ["casparian", *{arguments!r}]
try:
    main()
except SystemExit as end:
    assert not end.code
print("LOADED", *{{name.partition(".")[0] for name in sys.modules}})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    return set(done.stdout.rpartition("LOADED")[2].split())


@pytest.mark.parametrize("words", every_command(), ids=" ".join)
def test_the_docs_say_what_help_says(words: tuple[str, ...]) -> None:
    assert documented().get(words) == block(words), "run: python -m tests.cli.write_docs"


def test_the_docs_have_no_command_that_is_not_there() -> None:
    assert set(documented()) == set(every_command())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["scan", "--help"],
        ["jobs", "show", "--help"],
        ["try", "--help"],
        ["table", "add", "--help"],
    ],
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    heavy = "sqlalchemy pandas pyarrow duckdb zmq nacl watchdog rich msgspec asyncio numpy uv"
    assert not loaded_by(arguments, Path()) & set(heavy.split())


def test_a_scan_that_finds_nothing_new_in_its_sink_does_without_pyarrow(
    casparian: Casparian, source: Path
) -> None:
    casparian.run("publish", casparian.plugin("rows", ROWS), "--version", "1.0.0")
    assert "pyarrow" not in loaded_by(["scan"], casparian.folder), "there is no sink yet"
    (source / "a.txt").write_text("a\n")
    casparian.run("scan", "--drain")
    assert "pyarrow" not in loaded_by(["scan"], casparian.folder)
    (casparian.folder / "output" / ".casparian" / "outputs.sqlite3").unlink()
    assert "pyarrow" in loaded_by(["scan"], casparian.folder)


@pytest.mark.parametrize("arguments", [["scan"], ["status"], ["jobs"], ["files"]], ids=" ".join)
def test_what_only_reads_the_ledger_imports_nothing_heavy(
    arguments: list[str], casparian: Casparian, source: Path
) -> None:
    casparian.run("publish", casparian.plugin("rows", ROWS), "--version", "1.0.0")
    (source / "a.txt").write_text("a\n")
    casparian.run("scan", "--drain")
    heavy = "sqlalchemy pandas pyarrow duckdb zmq nacl watchdog asyncio numpy uv"
    assert not loaded_by(arguments, casparian.folder) & set(heavy.split())


def test_wrong_usage_is_told_by_the_command_itself(bare: Casparian) -> None:
    assert "No such command 'frob'" in bare.err("frob", code=2)
    assert "Missing argument" in bare.err("source", "add", code=2)
    assert "--idle" in bare.err("wait", code=2)
    assert "QUEUED" in bare.err("jobs", "--status", "FROB", code=2)
    assert "--failed" in bare.err("jobs", "retry", code=2)
