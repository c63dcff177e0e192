"""Locks say every hash and no host; environments are built once and whole. uv is the real one."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import uv

from casparian_flow.engine.venv_manager import EnvironmentStore, lock_dependencies
from casparian_flow.errors import EnvironmentFailed, PluginError

PROJECT = """
[project]
name = "demo"
version = "1"
requires-python = ">=3.11"
dependencies = [{}]
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    file = tmp_path / "demo.py"
    file.write_text("pass\n")
    return file


def block(*lines: str) -> str:
    return "\n".join(["# /// script", *(f"# {line}" for line in lines), "# ///", ""])


def packages(lock: str) -> set[str]:
    return {line.partition("==")[0] for line in lock.splitlines() if "==" in line}


def uv_lock(folder: Path, *dependencies: str) -> None:
    (folder / "pyproject.toml").write_text(PROJECT.format(", ".join(map(repr, dependencies))))
    subprocess.run([uv.find_uv_bin(), "lock", "--quiet"], cwd=folder, check=True)


def test_a_plugin_that_declares_nothing_gets_the_default(default_lock: str) -> None:
    assert {"pandas", "pyarrow", "numpy"} <= packages(default_lock)
    assert "--hash=sha256:" in default_lock
    assert "://" not in default_lock


def test_a_script_block_is_locked_with_pyarrow(plugin: Path) -> None:
    plugin.write_text(block('requires-python = ">=3.11"', 'dependencies = ["six"]'))
    assert packages(lock_dependencies(plugin)) == {"six", "pyarrow"}


def test_a_project_beside_the_plugin_is_locked_with_pyarrow(plugin: Path) -> None:
    plugin.with_name("pyproject.toml").write_text(PROJECT.format("'six'"))
    assert packages(lock_dependencies(plugin)) == {"six", "pyarrow"}


def test_a_uv_lock_is_taken_as_it_is(plugin: Path) -> None:
    uv_lock(plugin.parent, "six", "pyarrow>=23.0.1")
    lock = lock_dependencies(plugin)
    assert packages(lock) == {"six", "pyarrow"}
    assert "--hash=sha256:" in lock
    assert "://" not in lock


@pytest.mark.parametrize(("dependency", "found"), [("six", "no pyarrow"), ("pyarrow<20", "==")])
def test_a_uv_lock_without_a_fit_pyarrow_is_refused(
    plugin: Path, dependency: str, found: str
) -> None:
    uv_lock(plugin.parent, dependency)
    with pytest.raises(PluginError, match=f"{found}.*and the guest needs") as refused:
        lock_dependencies(plugin)
    assert refused.value.hint == "uv add 'pyarrow>=23.0.1'"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (block('requires-python = ">=4"'), "requires Python >=4, and plugins run on 3"),
        (block('requires-python = "new"'), "is not a version range"),
        (block("dependencies = ["), "is not TOML"),
        (block('dependencies = ["six"]') * 2, "has 2 `# /// script` blocks"),
        (block('dependencies = ["six>99999"]'), "cannot be locked: (?s:.*)six"),
    ],
)
def test_a_declaration_that_cannot_be_met(plugin: Path, text: str, words: str) -> None:
    plugin.write_text(text)
    with pytest.raises(PluginError, match=words):
        lock_dependencies(plugin)


def test_a_plugin_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="cannot read"):
        lock_dependencies(tmp_path / "none.py")


@pytest.fixture
def small_lock(plugin: Path) -> str:
    uv_lock(plugin.parent, "six", "pyarrow>=23.0.1")
    lock = lock_dependencies(plugin)
    return lock[lock.index("six==") :]


def test_an_environment_is_built_once_whoever_asks(tmp_path: Path, small_lock: str) -> None:
    store = EnvironmentStore(tmp_path / "envs")
    with ThreadPoolExecutor(4) as threads:
        answers = set(threads.map(lambda _: store.python(small_lock), range(4)))
    ((python, site_packages),) = answers
    built = site_packages.stat().st_mtime_ns
    assert (site_packages / "six.py").is_file()
    assert EnvironmentStore(tmp_path / "envs").python(small_lock) == (python, site_packages)
    assert site_packages.stat().st_mtime_ns == built
    code = "import sys; print(sys.prefix)"
    said = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str(python.parent.parent)


@pytest.mark.parametrize("broken", [".ok", "bin/python"])
def test_a_half_built_environment_is_built_again(
    tmp_path: Path, small_lock: str, broken: str
) -> None:
    store = EnvironmentStore(tmp_path / "envs")
    python, site_packages = store.python(small_lock)
    (python.parent.parent / broken).unlink()
    (site_packages / "six.py").unlink()
    store.python(small_lock)
    assert (site_packages / "six.py").is_file()


def test_another_hash_is_refused(tmp_path: Path) -> None:
    lock = f"six==1.16.0 --hash=sha256:{'0' * 64}\n"
    store = EnvironmentStore(tmp_path / "envs")
    with pytest.raises(EnvironmentFailed, match="cannot be built"):
        store.python(lock)
    with pytest.raises(EnvironmentFailed):
        store.python(lock)


def test_a_lock_without_hashes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailed, match="hash"):
        EnvironmentStore(tmp_path / "envs").python("six==1.16.0\n")
