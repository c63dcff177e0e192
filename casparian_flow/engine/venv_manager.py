"""Plugins' environments: locked once when published, built once a machine.

A lock is the text of a requirements file: every package pinned, every wheel's hash listed. uv
resolves and installs; sources are never built, since building runs their code.
"""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import uv
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from casparian_flow.atomic import exclusive, make_folder, write_once
from casparian_flow.errors import CasparianError, EnvironmentFailed, PluginError

PYARROW = "pyarrow>=23.0.1"
"""What the guest itself needs; older ones have holes that hostile data gets through."""
DEFAULT = ("pandas>=2.2", PYARROW)
"""The environment of a plugin that declares none."""
COMPILE = ("pip", "compile", "--universal", "--generate-hashes", "--no-build")
EXPORT = ("export", "--frozen", "--no-emit-project", "--no-dev")
PLAIN = ("--quiet", "--no-header", "--no-annotate")
SCRIPT_BLOCK = re.compile(r"(?m)^# /// script\s*$\n(?P<body>(?:^#(?:| .*)$\n)+?)^# ///\s*$")
"""PEP 723's own expression, for blocks of the type it defines."""
ERROR_LINES = 12
"""Lines of uv's complaint that are shown; its reason comes last."""


def lock_dependencies(plugin: Path) -> str:
    """Pin what a plugin needs, with hashes, for every platform; the lock's text.

    Taken from the plugin's PEP 723 block, else from the `uv.lock` or the `pyproject.toml` beside
    it, else the default environment. pyarrow is added, for the guest, to all but a `uv.lock`.

    Raises:
        PluginError: the declaration is broken, does not fit this Python, or cannot be resolved.
    """
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


class EnvironmentStore:
    """The environments of this machine, one folder each, named by what is in them.

    Args:
        root: such as `config.cache_folder() / "envs"`; may be deleted while no guest runs.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def python(self, lock: str) -> tuple[Path, Path]:
        """The interpreter and the site-packages of a lock's environment, built where missing.

        Whoever asks first builds; others, threads or processes, wait for it.

        Raises:
            EnvironmentFailed: uv could not build it; nothing half-built is ever returned.
        """
        folder = self._root / environment_key(lock)
        python = folder / "bin" / "python"
        done = folder / ".ok"
        make_folder(self._root)
        with exclusive(folder.with_suffix(".lock")):
            # The interpreter the link leads to may have been removed since.
            if not (done.exists() and python.exists()):
                build(folder, python, lock)
                write_once(done, b"")
        return python, Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))


def environment_key(lock: str) -> str:
    """What makes two environments the same one: SHA-256, hexadecimal."""
    facts = (lock, platform.python_version(), sysconfig.get_platform(), sys.implementation.name)
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()


def build(folder: Path, python: Path, lock: str) -> None:
    """Make the environment from nothing."""

    def failed(words: str) -> EnvironmentFailed:
        return EnvironmentFailed(
            f"the plugin's environment cannot be built in {folder}: {words}",
            "see that the package index can be reached from here",
        )

    sync = ("pip", "sync", "--require-hashes", "--no-build")
    try:
        run_uv(["venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], failed)
        run_uv([*sync, "--quiet", "--python", str(python), "-"], failed, stdin=lock)
    except OSError as error:
        raise failed(str(error)) from error


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
    stdin: str = "",
    folder: Path | None = None,
) -> str:
    """Run uv to its end; what it printed. It sees our environment: the index is the user's."""
    command = [uv.find_uv_bin(), *arguments]
    done = subprocess.run(
        command, input=stdin, cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise failed("\n".join(done.stderr.strip().splitlines()[-ERROR_LINES:]))
    return done.stdout


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
