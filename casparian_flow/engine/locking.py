"""Make and check a plugin's lock, and check that it has what the plugin imports.

A lock is the text of a requirements file: pinned packages with the hashes of their wheels, and
nothing else. `publish` makes it with uv, and every reader checks it. Sources are never built, since
building runs their code.
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
"""What the guest itself needs; older versions have vulnerabilities to hostile data."""
DEFAULT = ("pandas>=2.2", PYARROW)
"""The dependencies of a plugin that declares none."""
COMPILE = ("pip", "compile", "--universal", "--generate-hashes", "--no-build")
EXPORT = ("export", "--frozen", "--no-emit-project", "--no-dev")
"""`--frozen`: else uv runs the interpreter of a `.venv` beside the plugin."""
SAFE = ("--keyring-provider", "disabled", "--no-python-downloads")
"""Whatever a `uv.toml` says, uv runs no keyring program and downloads no interpreter."""
PLAIN = ("--quiet", "--no-header", "--no-annotate")
SCRIPT_BLOCK = re.compile(r"(?m)^# /// script\s*$\n(?P<body>(?:^#(?:| .*)$\n)+?)^# ///\s*$")
"""The regular expression of PEP 723, for blocks of type `script`."""
LOOK_SECONDS = 0.2
ERROR_LINES = 12
"""Last lines of uv's error output that are shown."""
LOCK_LIMIT = 1 << 20
"""Bytes; some three hundred packages."""
PIN = re.compile(
    r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9.!+_-]+)"
    r"(?: ; (?P<marker>[A-Za-z0-9 ._()'\"<>=!~+-]+?))?"
    r"(?: --hash=sha256:[0-9a-f]{64})+"
)
HASH = re.compile(r" --hash=sha256:[0-9a-f]{64}(?= |$)")


WRITE_LIMIT_BYTES = 24 << 30
"""Limit while uv resolves: it unpacks wheels if an index has no metadata."""


class TooMuchWritten(PluginError):
    """uv wrote more than its limit and was killed."""


class Pin(NamedTuple):
    """One package of a lock."""

    name: str
    version: str
    marker: str
    """Environment marker of PEP 508; empty: everywhere."""


def lock_dependencies(plugin: Path) -> str:
    """Pin a plugin's dependencies, with hashes, for every platform; returns the lock's text.

    Dependencies come from the plugin's PEP 723 block, else from the `uv.lock` or `pyproject.toml`
    beside it, else from DEFAULT. pyarrow is added for the guest, except to a `uv.lock`.

    Raises:
        PluginError: the declaration is invalid, does not fit this Python, cannot be resolved, or
            has a dependency without pin and hash, such as a URL.
    """
    lock = resolved(plugin)
    check_lock(lock, f"the lock of {plugin}")
    return lock


def check_lock(lock: str, what: str) -> list[Pin]:
    """Parse an untrusted lock: pinned packages with hashes, and nothing else.

    Options, URLs, paths and comments are refused, so that uv never gets them.

    Args:
        what: the lock's owner, for the message.

    Raises:
        PluginError: the lock holds anything else, nothing, or too much; the message has the line.
    """
    if len(lock) > LOCK_LIMIT:
        raise PluginError(
            f"{what} has {len(lock)} bytes; the limit is {LOCK_LIMIT}",
            "use fewer packages: about three hundred fit",
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
    """Parse one requirement of a lock; its lines end in a backslash, except the last."""
    text = re.sub(r" \\\n +", " ", requirement)
    match = PIN.fullmatch(text)
    hint = "use versions that the package index has as wheels, and publish the plugin again"
    if not match:
        shown = HASH.sub("", text)[:80]
        raise PluginError(f"{where}: {shown!a} is not a pinned package with its hashes", hint)
    name, version, marker = match["name"], match["version"], match["marker"] or ""
    try:
        Version(version)
        if marker:
            Marker(marker)
    except (InvalidVersion, InvalidMarker, RecursionError) as error:
        shown = f"{name}=={version} ; {marker}"[:80]
        raise PluginError(f"{where}: {shown!a} is not a requirement of PEP 508", hint) from error
    return Pin(name, version, marker)


def declared(plugin: Path) -> set[str]:
    """The normalised names of the packages that a plugin itself declares.

    Raises:
        PluginError: the plugin cannot be read, or its metadata is not TOML.
    """
    script = script_block(plugin)
    project = plugin.with_name("pyproject.toml")
    dependencies: object = list(DEFAULT)
    if script is not None:
        dependencies = script.get("dependencies")
    elif project.is_file():
        table = parse_toml(project, project.read_text("utf-8")).get("project")
        dependencies = table.get("dependencies") if isinstance(table, dict) else None
    texts = map(str, dependencies) if isinstance(dependencies, list) else ()
    names = [re.match(r"[A-Za-z0-9._-]+", text.strip()) for text in (*texts, PYARROW)]
    return {canonicalize_name(name[0]) for name in names if name}


def resolved(plugin: Path) -> str:
    """The lock's text, not yet checked."""
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
    """Pin the `extra` requirements and those of the `declared` files."""
    command = [*COMPILE, *PLAIN, "--python", sys.executable, "-", *map(str, declared)]
    return run_uv(command, cannot_lock(plugin), stdin="\n".join(extra), folder=plugin.parent)


def export(plugin: Path) -> str:
    """The pins of the `uv.lock` beside the plugin."""
    lock = run_uv([*EXPORT, *PLAIN], cannot_lock(plugin), folder=plugin.parent)
    pinned = re.search(r"(?m)^pyarrow==([^\s;]+)", lock)
    if not pinned or not SpecifierSet(PYARROW.removeprefix("pyarrow")).contains(pinned[1]):
        present = pinned[0] if pinned else "no pyarrow"
        raise PluginError(
            f"{plugin.with_name('uv.lock')} has {present}, and the guest needs {PYARROW}",
            f"uv add '{PYARROW}'",
        )
    return lock


def cannot_lock(plugin: Path) -> Callable[[str], PluginError]:
    """Makes the error for a failed resolution from uv's output."""
    return lambda output: PluginError(
        f"the dependencies of {plugin} cannot be locked: {output}",
        "only packages with wheels can be used; fix the plugin's dependencies",
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
    """Run uv with the user's environment, hence the user's index; returns its output.

    uv finds only programs of the system, and is killed if it writes too much: an unpacked wheel can
    be a thousand times as large as its archive.

    Args:
        failed: makes the error from uv's error output.
        folder: current folder of uv, which reads configuration from there and above.
        holds: descriptors that uv inherits, and holds even if this process ends first.
        given_up: polled every LOOK_SECONDS; True kills uv.
        write_limit_bytes: uv is killed if it writes more, on systems that count it.

    Raises:
        TooMuchWritten: uv wrote more than the limit.
        Unavailable: `given_up` returned True.
    """
    command = [uv.find_uv_bin(), *arguments, *SAFE]

    def check() -> None:
        if given_up():
            raise Unavailable("uv was stopped, since its job was aborted")
        if _written(process.pid) > write_limit_bytes:
            raise TooMuchWritten(
                f"uv was stopped: the packages have more than {write_limit_bytes} bytes when "
                "unpacked",
                "use fewer packages; uv cache clean   (removes what was unpacked)",
            )

    with subprocess.Popen(
        command, cwd=folder, pass_fds=holds, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True,
        env=config.uv_environment(), umask=0o077,
    ) as process:  # fmt: skip
        try:
            output, errors = _communicate(process, stdin, check)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise failed("\n".join(errors.strip().splitlines()[-ERROR_LINES:]))
    return output


def _communicate(
    process: subprocess.Popen[str], stdin: str | None, check: Callable[[], None]
) -> tuple[str, str]:
    while True:
        try:
            return process.communicate(stdin, LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            stdin = None  # Popen keeps it for the next call
            check()


def _written(pid: int) -> int:
    """Bytes that a child has written so far; 0 if the system does not count them."""
    try:
        match = re.search(rb"^wchar: (\d+)$", Path(f"/proc/{pid}/io").read_bytes(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) if match else 0


def script_block(plugin: Path) -> dict[str, object] | None:
    """The plugin's PEP 723 metadata; None if it has none."""
    try:
        text = plugin.read_text("utf-8", errors="replace")
    except OSError as error:
        raise PluginError(f"cannot read {plugin}: {error.strerror}") from error
    blocks = [match["body"] for match in SCRIPT_BLOCK.finditer(text)]
    if not blocks:
        return None
    if len(blocks) > 1:
        raise PluginError(f"{plugin} has {len(blocks)} `# /// script` blocks", "keep one of them")
    lines = [line[2:] for line in blocks[0].splitlines()]
    return parse_toml(plugin, "\n".join(lines))


def parse_toml(file: Path, text: str) -> dict[str, object]:
    """Parse TOML text; `file` is for the message."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PluginError(f"the metadata in {file} is not TOML: {error}", "fix it") from error


def check_python(file: Path, requires: object) -> None:
    """Raise PluginError unless the running Python meets `requires-python`."""
    if requires is None:
        return
    ours = platform.python_version()
    try:
        fits = SpecifierSet(str(requires)).contains(ours, prereleases=True)
    except InvalidSpecifier as error:
        raise PluginError(f"{file}: requires-python {requires!r} is not a version range") from error
    if not fits:
        raise PluginError(
            f"{file} requires Python {requires}, but plugins run on {ours} here",
            "relax requires-python, or run casparian with a Python that fits",
        )


# Compare a plugin's imports with the packages of its environment, without importing anything.

ALWAYS = sys.stdlib_module_names | {"casparian_flow"}
OPTIONAL = {"ImportError", "ModuleNotFoundError"}


class Import(NamedTuple):
    """The first place where a plugin imports a package."""

    line: int
    name: str
    """The top-level name; with its dots for a relative import."""


def check_imports(plugin: Path, source: bytes, site_packages: Path) -> list[str]:
    """Check that the environment has every package that a plugin imports.

    Args:
        source: the plugin's bytes; they parse.
        site_packages: the environment's folder, leased.

    Returns:
        Warnings about imported packages that the plugin does not declare itself.

    Raises:
        PluginError: an import would fail; the message has its name and line.
    """
    missing, indirect = undeclared(source, site_packages, declared(plugin))
    if missing:
        listed = ", ".join(f"line {line} imports {name}" for line, name in missing)
        raise PluginError(
            f"{plugin.name} {listed}, but its environment does not have it",
            advice(plugin, missing[0].name),
        )
    return [
        f"{plugin.name} line {line} imports {name}, which is installed only because another "
        "package needs it; declare it too"
        for line, name in indirect
    ]


def undeclared(
    source: bytes, site_packages: Path, names: set[str]
) -> tuple[list[Import], list[Import]]:
    """The imports that would fail, and those of packages that only other packages depend on.

    Ignores the standard library, `casparian_flow`, and imports that may fail (`except ImportError`,
    `suppress(ImportError)`) or never run (`if TYPE_CHECKING`).

    Args:
        names: normalised names of the packages that the plugin declares.
    """
    first: dict[str, Import] = {}
    for used in sorted(imports(source)):
        if used.name not in ALWAYS:
            first.setdefault(used.name, used)
    missing = [used for used in first.values() if not available(used.name, site_packages)]
    providers = packages(site_packages)
    indirect = [
        used
        for used in first.values()
        if used not in missing and used.name in providers and not providers[used.name] & names
    ]
    return missing, indirect


def imports(source: bytes) -> Iterator[Import]:
    """Every import that a plugin depends on, also in functions, unordered."""
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
    """Whether the caught expression names ImportError; a bare `except` does not count."""
    nodes = ast.walk(caught) if caught else ()
    return any(isinstance(node, ast.Name) and node.id in OPTIONAL for node in nodes)


def available(name: str, site_packages: Path) -> bool:
    """Whether an environment has a top-level module, by its file names."""
    return not name.startswith(".") and bool(PathFinder.find_spec(name, [str(site_packages)]))


def packages(site_packages: Path) -> dict[str | None, set[str]]:
    """Top-level module -> the normalised names of the packages that provide it."""
    providers: defaultdict[str | None, set[str]] = defaultdict(set)
    for distribution in distributions(path=[str(site_packages)]):
        for name in top_level(distribution):
            providers[name].add(canonicalize_name(distribution.name))
    return providers


def top_level(distribution: Distribution) -> set[str | None]:
    """The top-level modules of a package; None for other files."""
    return {
        file.parts[0] if len(file.parts) > 1 else getmodulename(file.name)
        for file in distribution.files or ()
    }


def advice(plugin: Path, name: str) -> str:
    """The hint for a missing import."""
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
