"""Puts every command's `--help` into docs/cli.md: `python -m tests.cli.write_docs`.

The page is written by hand, but for the blocks that begin with `$ casparian ... --help`, and the
table of exit codes. A command that has no block gets one below the command before it.
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
from casparian_flow.errors import ExitCode

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
BLOCK = re.compile(r"```console\n\$ casparian(?P<words>[a-z ]*) --help\n.*?```\n", re.DOTALL)
CODES = re.compile(r"\| Code \| Name \| Meaning \|\n(?:\|.*\n)+")
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


def exit_codes() -> str:
    """The table of exit codes, as it must stand in the page."""
    rows = [f"| {code} | `{code.name}` | {code.meaning} |" for code in ExitCode]
    return "\n".join(["| Code | Name | Meaning |", "| ---: | --- | --- |", *rows, ""])


def documented_codes() -> str:
    """The table of exit codes that stands in the page."""
    found = CODES.search(PAGE.read_text("utf-8"))
    return found[0] if found else ""


def with_missing(text: str) -> str:
    """Add a block for each command that the page does not have."""
    before: tuple[str, ...] = ()
    for words in every_command():
        blocks = {tuple(match["words"].split()): match for match in BLOCK.finditer(text)}
        if words not in blocks:
            end = blocks[before].end()
            text = f"{text[:end]}\n{block(words)}{text[end:]}"
        before = words
    return text


if __name__ == "__main__":
    text = with_missing(PAGE.read_text("utf-8"))
    text = BLOCK.sub(lambda m: block(tuple(m["words"].split())), text)
    text = CODES.sub(lambda _: exit_codes(), text)
    PAGE.write_text(text, "utf-8")
