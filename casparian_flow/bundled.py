"""The bundled plugins. A plugin's name is its file's name without `.py`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parent


def folder() -> Path:
    """The folder of their files: in the package, or beside it in a checkout."""
    installed = _PACKAGE / "bundled_plugins"
    return installed if installed.is_dir() else _PACKAGE.with_name("plugins")


@cache
def names() -> tuple[str, ...]:
    """Their names, sorted."""
    return tuple(sorted(file.stem for file in folder().glob("*.py")))


def path(name: str) -> Path:
    """The file of a bundled plugin."""
    return folder() / f"{name}.py"


def argument(plugin: str) -> str:
    """The argument of `casparian publish`: the name of a bundled plugin, else the file."""
    return plugin if plugin in names() else f"{plugin}.py"
