"""Puts every command's `--help` into docs/cli.md: `python -m tests.cli.write_docs`.

The page is written by hand, but for the blocks that begin with `$ casparian ... --help`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from typer.main import get_command

from casparian_flow.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
BLOCK = re.compile(r"```console\n\$ casparian(?P<words>[a-z ]*) --help\n.*?```\n", re.DOTALL)
PLAIN = {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}


def commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command, groups before their members."""
    yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*words, name))


def every_command() -> list[tuple[str, ...]]:
    return list(commands(get_command(app)))


def help_text(words: tuple[str, ...]) -> str:
    out = io.StringIO()
    with mock.patch.dict(os.environ, PLAIN), contextlib.redirect_stdout(out):
        get_command(app).main([*words, "--help"], prog_name="casparian", standalone_mode=False)
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


def block(words: tuple[str, ...]) -> str:
    return f"```console\n$ {' '.join(['casparian', *words])} --help\n{help_text(words)}\n```\n"


def documented() -> dict[tuple[str, ...], str]:
    """Words -> the block that stands in the page."""
    found = BLOCK.finditer(PAGE.read_text("utf-8"))
    return {tuple(match["words"].split()): match[0] for match in found}


if __name__ == "__main__":
    text = BLOCK.sub(lambda m: block(tuple(m["words"].split())), PAGE.read_text("utf-8"))
    PAGE.write_text(text, "utf-8")
