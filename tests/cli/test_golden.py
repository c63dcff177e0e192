"""What the commands print is what golden.txt has: `python -m tests.cli.write_golden` writes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli import write_golden
from tests.cli.write_docs import every_command


def test_every_command_is_in_the_story() -> None:
    told = write_golden.GOLDEN.read_text("utf-8")
    groups = {words[:-1] for words in every_command() if words}
    twice = {("demo",), ("topics", "list")}  # the demo runs the others; `topics` alone lists
    for words in set(every_command()) - groups - twice:
        command = " ".join(["$ casparian", *words])
        assert re.search(rf"^{re.escape(command)}\b", told, re.MULTILINE), command


def test_every_command_prints_what_the_golden_file_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))  # no key of another test
    told = write_golden.text(tmp_path / "home")
    golden = write_golden.GOLDEN.read_text("utf-8").splitlines()
    assert told.splitlines() == golden, (
        "if meant: python -m tests.cli.write_golden, and read its diff"
    )
