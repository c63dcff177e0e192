"""Commands and groups that are built when one is asked for, since typer takes a while for each.

Until then typer has their names and what `casparian --help` says of them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import typer
import typer.core
import typer.main

from casparian_flow.cli import context


def command(app: typer.Typer, function: Callable[..., None], name: str = "") -> None:
    """Add a command.

    Args:
        name: that of the function, where it is empty.
    """
    name = name or function.__name__

    @functools.cache
    def built() -> Any:
        alone = context.group("")
        alone.command(name)(function)
        return typer.main.get_command(alone)

    class Later(typer.core.TyperCommand):
        def make_context(self, *args: Any, **options: Any) -> Any:
            return built().make_context(*args, **options)

    def named() -> None:
        """Nothing: the context is that of the command itself."""

    app.command(name, cls=Later, help=function.__doc__)(named)


def group(app: typer.Typer, inner: typer.Typer, name: str) -> None:
    """Add a group of commands."""
    built = functools.cache(lambda: typer.main.get_group(inner).commands)

    class Later(typer.core.TyperGroup):
        @property
        def commands(self) -> Any:
            return built()

        @commands.setter
        def commands(self, _: Any) -> None:
            """Nothing: typer sets those that it has built, which are none."""

    shown = copy.copy(inner)
    shown.registered_commands = []
    shown.info = copy.copy(inner.info)
    shown.info.cls = Later
    app.add_typer(shown, name=name)
