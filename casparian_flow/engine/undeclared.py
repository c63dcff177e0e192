"""What a plugin imports, held against what its environment has; nothing is imported to know it."""

from __future__ import annotations

import ast
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, distributions
from inspect import getmodulename
from pathlib import Path
from typing import NamedTuple

from packaging.utils import canonicalize_name

from casparian_flow.engine.locking import declared, script_block
from casparian_flow.errors import PluginError

ALWAYS = sys.stdlib_module_names | {"casparian_flow"}
OPTIONAL = {"ImportError", "ModuleNotFoundError"}


class Import(NamedTuple):
    """The first place where a plugin imports a package."""

    line: int
    name: str
    """Its top level; with its dots where it is relative."""


def check_imports(plugin: Path, source: bytes, site_packages: Path) -> list[str]:
    """Refuse a plugin that imports what its environment does not have.

    Args:
        source: the plugin's bytes, parsed before.
        site_packages: the environment's folder, leased.

    Returns:
        What the author should know, in words: packages that are there for another's sake only.

    Raises:
        PluginError: an import would fail; the message says which, and on what line.
    """
    missing, indirect = undeclared(source, site_packages, declared(plugin))
    if missing:
        found = ", ".join(f"line {line} imports {name}" for line, name in missing)
        raise PluginError(
            f"{plugin.name} {found}, which its environment does not have",
            advice(plugin, missing[0].name),
        )
    return [
        f"{plugin.name} line {line} imports {name}, which is there only because another package "
        "needs it; declare it too, so that it stays"
        for line, name in indirect
    ]


def undeclared(
    source: bytes, site_packages: Path, names: set[str]
) -> tuple[list[Import], list[Import]]:
    """The imports that would fail, and those that only another package's needs make work.

    Not counted are imports that may fail (under `except ImportError` or `suppress(ImportError)`)
    or never run (under `TYPE_CHECKING`), the standard library, and `casparian_flow`.

    Args:
        names: the packages that the plugin declares, normalised.
    """
    first: dict[str, Import] = {}
    for found in sorted(imports(source)):
        if found.name not in ALWAYS:
            first.setdefault(found.name, found)
    missing = [found for found in first.values() if not available(found.name, site_packages)]
    providers = packages(site_packages)
    indirect = [
        found
        for found in first.values()
        if found not in missing and found.name in providers and not providers[found.name] & names
    ]
    return missing, indirect


def imports(source: bytes) -> Iterator[Import]:
    """Every import that a plugin depends on, in functions too, in no order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        match node:
            case ast.Import(names=aliases):
                for alias in aliases:
                    yield Import(node.lineno, alias.name.partition(".")[0])
            case ast.ImportFrom(module=module, level=0):
                yield Import(node.lineno, str(module).partition(".")[0])
            case ast.ImportFrom(module=module, level=level):
                yield Import(node.lineno, "." * level + (module or ""))
            case ast.Try(handlers=handlers) if any(may_fail(h.type) for h in handlers):
                waiting += [*node.orelse, *node.finalbody]
            case ast.With(items=items) if any(may_fail(item.context_expr) for item in items):
                pass
            case ast.If(test=ast.Name("TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                waiting += node.orelse
            case _:
                waiting += ast.iter_child_nodes(node)


def may_fail(caught: ast.expr | None) -> bool:
    """Whether what is caught names ImportError; a bare `except` hides more than it means to."""
    nodes = ast.walk(caught) if caught else ()
    return any(isinstance(node, ast.Name) and node.id in OPTIONAL for node in nodes)


def available(name: str, site_packages: Path) -> bool:
    """Whether an environment has a module at its top; by the names of its files alone."""
    return not name.startswith(".") and bool(PathFinder.find_spec(name, [str(site_packages)]))


def packages(site_packages: Path) -> dict[str | None, set[str]]:
    """For each name that can be imported, the packages that have a part in it, normalised."""
    found: defaultdict[str | None, set[str]] = defaultdict(set)
    for distribution in distributions(path=[str(site_packages)]):
        for name in top_level(distribution):
            found[name].add(canonicalize_name(distribution.name))
    return found


def top_level(distribution: Distribution) -> set[str | None]:
    """What a package puts at the top; None stands for what is no module."""
    return {
        file.parts[0] if len(file.parts) > 1 else getmodulename(file.name)
        for file in distribution.files or ()
    }


def advice(plugin: Path, name: str) -> str:
    """What the author of a missing import can do."""
    if name.startswith("."):
        return "a plugin is one file: move what it imports into it, or into a package"
    if plugin.with_name(f"{name}.py").is_file():
        return f"a plugin is one file: move {name}.py into it, or into a package it depends on"
    if script_block(plugin) is not None:
        where = "add its package to the dependencies in the plugin's `# /// script` block"
    elif plugin.with_name("pyproject.toml").is_file():
        where = "add its package to the dependencies in the pyproject.toml beside the plugin"
    else:
        block = f'`# /// script`, `# dependencies = ["pandas", "{name}"]` and `# ///`'
        where = f"begin the plugin with three lines that declare its package: {block}"
    return f"{where}; or catch ImportError, if the plugin can do without it"
