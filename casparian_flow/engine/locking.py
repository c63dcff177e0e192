"""A plugin's lock: made once, when it is published, and checked by everyone who gets one.

A lock is the text of a requirements file: every package pinned, every wheel's hash listed, and
nothing else. uv resolves; sources are never built, since building runs their code.
"""

from __future__ import annotations

import ast
import platform
import re
import subprocess
import sys
import tomllib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, distributions
from inspect import getmodulename
from pathlib import Path
from subprocess import PIPE
from typing import NamedTuple

import uv
from packaging.markers import InvalidMarker, Marker
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from casparian_flow import config
from casparian_flow.errors import CasparianError, PluginError, Unavailable

PYARROW = "pyarrow>=23.0.1"
"""What the guest itself needs; older ones have holes that hostile data gets through."""
DEFAULT = ("pandas>=2.2", PYARROW)
"""The environment of a plugin that declares none."""
COMPILE = ("pip", "compile", "--universal", "--generate-hashes", "--no-build")
EXPORT = ("export", "--frozen", "--no-emit-project", "--no-dev")
"""Frozen, or else uv runs the interpreter that it finds in a `.venv` beside the plugin."""
SAFE = ("--keyring-provider", "disabled", "--no-python-downloads")
"""Whatever a `uv.toml` says: uv asks no program for passwords, and fetches no interpreter."""
PLAIN = ("--quiet", "--no-header", "--no-annotate")
SCRIPT_BLOCK = re.compile(r"(?m)^# /// script\s*$\n(?P<body>(?:^#(?:| .*)$\n)+?)^# ///\s*$")
"""PEP 723's own expression, for blocks of the type it defines."""
LOOK_SECONDS = 0.2
ERROR_LINES = 12
"""Lines of uv's complaint that are shown; its reason comes last."""
LOCK_LIMIT = 1 << 20
"""Bytes; some three hundred packages."""
PIN = re.compile(
    r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9.!+_-]+)"
    r"(?: ; (?P<marker>[A-Za-z0-9 ._()'\"<>=!~+-]+?))?"
    r"(?: --hash=sha256:[0-9a-f]{64})+"
)
HASH = re.compile(r" --hash=sha256:[0-9a-f]{64}(?= |$)")


WRITE_LIMIT_BYTES = 24 << 30
"""What uv may write while it resolves: where an index gives no metadata it unpacks wheels."""


class TooMuchWritten(PluginError):
    """uv wrote more than it may, and was killed."""


class Pin(NamedTuple):
    """One package of a lock."""

    name: str
    version: str
    marker: str
    """Where it is needed, as PEP 508 writes it; empty: everywhere."""


def lock_dependencies(plugin: Path) -> str:
    """Pin what a plugin needs, with hashes, for every platform; the lock's text.

    Taken from the plugin's PEP 723 block, else from the `uv.lock` or the `pyproject.toml` beside
    it, else the default environment. pyarrow is added, for the guest, to all but a `uv.lock`.

    Raises:
        PluginError: the declaration is broken, does not fit this Python, cannot be resolved, or
            names what has no pin and no hash, such as a URL.
    """
    lock = resolved(plugin)
    check_lock(lock, f"the lock of {plugin}")
    return lock


def check_lock(lock: str, what: str) -> list[Pin]:
    """Read a lock, which may be a stranger's: pinned packages with hashes, and nothing else.

    No option, URL, path or comment gets through to uv, and nothing that only looks like one line.

    Args:
        what: whose lock it is, for the message.

    Raises:
        PluginError: it holds anything else, nothing, or too much; the message says the line.
    """
    if len(lock) > LOCK_LIMIT:
        raise PluginError(
            f"{what} has {len(lock)} bytes; a lock may have {LOCK_LIMIT}",
            "depend on fewer packages: some three hundred fit",
        )
    pins = []
    number = 1
    for requirement in re.split(r"(?<! \\)\n", lock):
        if requirement:
            pins.append(read_pin(requirement, f"{what}, line {number}"))
        number += requirement.count("\n") + 1
    if not pins:
        raise PluginError(f"{what} pins no package", "publish the plugin again")
    return pins


def read_pin(requirement: str, where: str) -> Pin:
    """One requirement of a lock, which goes on over lines that end in a backslash."""
    text = re.sub(r" \\\n +", " ", requirement)
    found = PIN.fullmatch(text)
    hint = "depend on versions that a package index has as wheels, and publish the plugin again"
    if not found:
        shown = HASH.sub("", text)[:80]
        raise PluginError(f"{where}: {shown!a} is not a pinned package with its hashes", hint)
    name, version, marker = found["name"], found["version"], found["marker"] or ""
    try:
        Version(version)
        if marker:
            Marker(marker)
    except (InvalidVersion, InvalidMarker, RecursionError) as error:
        shown = f"{name}=={version} ; {marker}"[:80]
        raise PluginError(f"{where}: {shown!a} is not a requirement of PEP 508", hint) from error
    return Pin(name, version, marker)


def declared(plugin: Path) -> set[str]:
    """The names of the packages that a plugin asks for itself, normalised.

    Raises:
        PluginError: it cannot be read, or its metadata is not TOML.
    """
    script = script_block(plugin)
    project = plugin.with_name("pyproject.toml")
    found: object = list(DEFAULT)
    if script is not None:
        found = script.get("dependencies")
    elif project.is_file():
        table = parse_toml(project, project.read_text("utf-8")).get("project")
        found = table.get("dependencies") if isinstance(table, dict) else None
    texts = map(str, found) if isinstance(found, list) else ()
    names = [re.match(r"[A-Za-z0-9._-]+", text.strip()) for text in (*texts, PYARROW)]
    return {canonicalize_name(name[0]) for name in names if name}


def resolved(plugin: Path) -> str:
    """What uv makes of the plugin's own declaration, or of none."""
    project = plugin.with_name("pyproject.toml")
    script = script_block(plugin)
    if script is not None:
        check_python(plugin, script.get("requires-python"))
        return resolve(plugin, [PYARROW], plugin)
    if not project.is_file():
        return resolve(plugin, DEFAULT)
    if plugin.with_name("uv.lock").is_file():
        return export(plugin)
    return resolve(plugin, [PYARROW], project)


def resolve(plugin: Path, extra: Sequence[str], *declared: Path) -> str:
    """Pin these requirements and those that the declaring files list."""
    command = [*COMPILE, *PLAIN, "--python", sys.executable, "-", *map(str, declared)]
    return run_uv(command, cannot_lock(plugin), stdin="\n".join(extra), folder=plugin.parent)


def export(plugin: Path) -> str:
    """The pins of the `uv.lock` beside the plugin, as they are."""
    lock = run_uv([*EXPORT, *PLAIN], cannot_lock(plugin), folder=plugin.parent)
    pinned = re.search(r"(?m)^pyarrow==([^\s;]+)", lock)
    if not pinned or not SpecifierSet(PYARROW.removeprefix("pyarrow")).contains(pinned[1]):
        found = pinned[0] if pinned else "no pyarrow"
        raise PluginError(
            f"{plugin.with_name('uv.lock')} has {found}, and the guest needs {PYARROW}",
            f"uv add '{PYARROW}'",
        )
    return lock


def cannot_lock(plugin: Path) -> Callable[[str], PluginError]:
    """The error of a resolution that failed, around uv's own words."""
    return lambda words: PluginError(
        f"the dependencies of {plugin} cannot be locked: {words}",
        "only packages that have wheels can be used; mend the plugin's dependencies",
    )


def run_uv(
    arguments: list[str],
    failed: Callable[[str], CasparianError],
    *,
    folder: Path,
    stdin: str = "",
    holds: Sequence[int] = (),
    given_up: Callable[[], bool] = lambda: False,
    write_limit_bytes: int = WRITE_LIMIT_BYTES,
) -> str:
    """Run uv to its end; what it printed. It sees our environment: the index is the user's.

    It finds programs of the system only, and is killed once it has written too much: a wheel may
    be a thousand times as large as its archive, and uv unpacks it into its own cache.

    Args:
        folder: where it runs; it reads the configuration that it finds there and above.
        holds: descriptors that it keeps open, even when this process ends before it.
        given_up: asked every LOOK_SECONDS whether it is to be killed.
        write_limit_bytes: beyond it uv is killed, where the system counts what it writes.

    Raises:
        TooMuchWritten: uv wrote more than it may.
        Unavailable: it was given up.
    """
    command = [uv.find_uv_bin(), *arguments, *SAFE]

    def check() -> None:
        if given_up():
            raise Unavailable("uv was stopped: nobody waits for it any more")
        if _written(process.pid) > write_limit_bytes:
            raise TooMuchWritten(
                f"the packages unpack to more than {write_limit_bytes} bytes, and uv was stopped",
                "depend on less; uv cache clean   (removes what was unpacked)",
            )

    with subprocess.Popen(
        command, cwd=folder, pass_fds=holds, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True,
        env=config.uv_environment(), umask=0o077,
    ) as process:  # fmt: skip
        try:
            said, complaint = _communicate(process, stdin, check)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise failed("\n".join(complaint.strip().splitlines()[-ERROR_LINES:]))
    return said


def _communicate(
    process: subprocess.Popen[str], stdin: str | None, check: Callable[[], None]
) -> tuple[str, str]:
    while True:
        try:
            return process.communicate(stdin, LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            stdin = None  # it is kept for the next call
            check()


def _written(pid: int) -> int:
    """Bytes that a process of ours has written so far; 0 where the system does not say."""
    try:
        counted = re.search(rb"^wchar: (\d+)$", Path(f"/proc/{pid}/io").read_bytes(), re.MULTILINE)
    except OSError:
        return 0
    return int(counted[1]) if counted else 0


def script_block(plugin: Path) -> dict[str, object] | None:
    """The plugin's PEP 723 metadata; None where it has none."""
    try:
        text = plugin.read_text("utf-8", errors="replace")
    except OSError as error:
        raise PluginError(f"cannot read {plugin}: {error.strerror}") from error
    blocks = [match["body"] for match in SCRIPT_BLOCK.finditer(text)]
    if not blocks:
        return None
    if len(blocks) > 1:
        raise PluginError(f"{plugin} has {len(blocks)} `# /// script` blocks", "keep one")
    lines = [line[2:] for line in blocks[0].splitlines()]
    return parse_toml(plugin, "\n".join(lines))


def parse_toml(file: Path, text: str) -> dict[str, object]:
    """The tables in this text, which stands in `file`."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PluginError(f"the metadata in {file} is not TOML: {error}", "mend it") from error


def check_python(file: Path, requires: object) -> None:
    """Refuse a `requires-python` that the Python running this does not meet."""
    if requires is None:
        return
    ours = platform.python_version()
    try:
        fits = SpecifierSet(str(requires)).contains(ours, prereleases=True)
    except InvalidSpecifier as error:
        raise PluginError(f"{file}: requires-python {requires!r} is not a version range") from error
    if not fits:
        raise PluginError(
            f"{file} requires Python {requires}, and plugins run on {ours} here",
            "relax requires-python, or run casparian with a Python that fits",
        )


# What a plugin imports, held against what its environment has; nothing is imported to know it.


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
