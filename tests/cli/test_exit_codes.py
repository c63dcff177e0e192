"""One table has every exit code: the help and docs/cli.md show it, and the code uses no other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from casparian_flow import errors
from casparian_flow.errors import CasparianError, ExitCode
from tests.cli.write_docs import documented_codes, exit_codes
from tests.commands import Casparian

PACKAGE = Path(errors.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ENDS = {"Exit", "exit", "_exit", "SystemExit"}


def ends(tree: ast.AST) -> Iterator[ast.expr]:
    """What a module gives to whatever ends a program, or takes for an `exit_code`."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name)) if name in ENDS:
                yield from node.args
            case ast.Assign(targets=[ast.Name(id="exit_code")], value=value):
                yield value
            case ast.Call(keywords=keywords):
                values = [each.value for each in keywords if each.arg == "exit_code"]
                yield from (value for value in values if isinstance(value, ast.Constant))


def used(tree: ast.AST) -> set[str]:
    """The codes of the table that a module names."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "ExitCode"
    }


def test_every_code_of_the_table_is_used() -> None:
    named = set().union(*(used(ast.parse(file.read_text("utf-8"))) for file in FILES))
    assert named == {code.name for code in ExitCode}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_program_ends_with_a_number_of_its_own(file: Path) -> None:
    for end in ends(ast.parse(file.read_text("utf-8"))):
        numbers = [n.value for n in ast.walk(end) if isinstance(n, ast.Constant)]
        assert not [n for n in numbers if type(n) is int], f"line {end.lineno}"


def test_every_error_has_a_code_of_the_table() -> None:
    def below(kind: type[CasparianError]) -> Iterator[type[CasparianError]]:
        yield kind
        for each in kind.__subclasses__():
            yield from below(each)

    assert all(isinstance(kind.exit_code, ExitCode) for kind in below(CasparianError))


def test_the_page_has_the_table() -> None:
    assert documented_codes() == exit_codes(), "run: python -m tests.cli.write_docs"


def test_the_help_has_the_table(bare: Casparian) -> None:
    lines = [line.strip() for line in bare.out("--help").splitlines()]
    shown = lines[lines.index("Exit codes:") + 1 :]
    assert shown == [f"{code:d}  {code.meaning}" for code in ExitCode]
