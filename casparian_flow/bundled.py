"""The plugins that come with the package, known by name: the name of the file without `.py`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parent


def folder() -> Path:
    """Where their files are: in the package, or beside it in a checkout."""
    installed = _PACKAGE / "bundled_plugins"
    return installed if installed.is_dir() else _PACKAGE.with_name("plugins")


@cache
def names() -> tuple[str, ...]:
    """The name of each, sorted."""
    return tuple(sorted(file.stem for file in folder().glob("*.py")))


def path(name: str) -> Path:
    """The file of the bundled plugin of this name."""
    return folder() / f"{name}.py"


def argument(plugin: str) -> str:
    """What `casparian publish` is given for a plugin: a bundled one's name, else a file's."""
    return plugin if plugin in names() else f"{plugin}.py"
