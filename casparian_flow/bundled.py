"""The bundled plugins. A plugin's name is its file's name without `.py`."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any

from casparian_flow.errors import NotFound
from casparian_flow.security.manifest import read_manifest

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


def describe(name: str | None = None) -> list[dict[str, Any]]:
    """What each bundled plugin says of itself; with a name, only this one.

    Raises:
        NotFound: none has the name.
    """
    if name is not None and name not in names():
        known = ", ".join(names())
        raise NotFound(f"no bundled plugin is named {name!r}", f"one of {known}")
    return [_describe(each) for each in names() if name in (None, each)]


def _describe(name: str) -> dict[str, Any]:
    file = path(name)
    source = file.read_bytes()
    manifest = read_manifest(source, file.name)
    description = ast.get_docstring(ast.parse(source)) or ""
    return {
        "name": name,
        "version": manifest.version,
        "reads": description.partition("\n")[0],
        "file": str(file),
        "patterns": manifest.patterns,
        "topics": manifest.topics,
        "options": manifest.options,
        "description": description,
    }
