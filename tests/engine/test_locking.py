"""Locks say every hash, no host, and nothing that uv could do besides. uv is the real one."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import uv
from hypothesis import given
from hypothesis import strategies as st

from casparian_flow.engine.locking import LOCK_LIMIT, Pin, check_lock, declared, lock_dependencies
from casparian_flow.errors import PluginError
from tests import wheels

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
        (block('requires-python = ">=4"'), "requires Python >=4"),
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


BUNDLED = sorted((Path(__file__).parents[2] / "plugins").glob("*.py"))


@pytest.mark.parametrize("file", BUNDLED, ids=lambda file: file.stem)
def test_the_locks_of_bundled_plugins_pass(file: Path) -> None:
    lock = lock_dependencies(file)
    assert {pin.name for pin in check_lock(lock, "it")} == packages(lock)
    assert declared(file) <= packages(lock)


def local(plugin: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *wanted: str) -> None:
    """A plugin that depends on packages of a folder, where a pyarrow is too."""
    wheels.wheel(folder, "pyarrow", "99.0")
    wheels.use(monkeypatch, folder)
    plugin.write_text(block(f"dependencies = {list(wanted)!r}"))


def test_a_dependency_that_must_be_built_is_refused_and_not_run(
    plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "ran"
    wheels.sdist(tmp_path / "links", "builds", setup=f"open({str(marker)!r}, 'w')")
    local(plugin, tmp_path / "links", monkeypatch, "builds")
    with pytest.raises(PluginError, match=r"cannot be locked(?s:.*)builds") as refused:
        lock_dependencies(plugin)
    assert "wheels" in refused.value.hint
    assert not marker.exists()


def test_a_dependency_at_a_url_is_refused(
    plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = wheels.wheel(tmp_path / "elsewhere", "direct")
    local(plugin, tmp_path / "links", monkeypatch, f"direct @ {file.as_uri()}")
    with pytest.raises(PluginError, match=r"demo.py, line 1: 'direct @ file:.*is not a pinned"):
        lock_dependencies(plugin)


def test_the_interpreter_of_a_project_is_not_run(plugin: Path, tmp_path: Path) -> None:
    uv_lock(plugin.parent, "six", "pyarrow>=23.0.1")
    python = plugin.parent / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (plugin.parent / ".venv" / "pyvenv.cfg").write_text("home = /usr/bin\n")
    python.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    python.chmod(0o755)
    assert packages(lock_dependencies(plugin)) == {"six", "pyarrow"}
    assert not (tmp_path / "ran").exists()


SHA = "0" * 64
HASHED = f"six==1.16.0 \\\n    --hash=sha256:{SHA}"
LOCK = (
    f"{HASHED} \\\n    --hash=sha256:{'f' * 64}\n"
    f"nump-y_2==2.4.6+cu.1 ; (python_full_version < '3.12' or os_name == \"nt\") \\\n"
    f"    --hash=sha256:{SHA}\n"
)


def test_a_lock_is_its_pins() -> None:
    assert check_lock(LOCK, "it") == [
        Pin("six", "1.16.0", ""),
        Pin("nump-y_2", "2.4.6+cu.1", "(python_full_version < '3.12' or os_name == \"nt\")"),
    ]
    assert check_lock(LOCK.rstrip("\n"), "it") == check_lock(LOCK, "it")


@pytest.mark.parametrize(
    "line",
    [
        "--index-url https://example.org/simple",
        "--extra-index-url=https://example.org/simple",
        "--find-links ./here",
        "-f ./here",
        "-r other.txt",
        "-c other.txt",
        "-e .",
        "--no-binary :all:",
        "--trusted-host example.org",
        f"six @ https://example.org/six-1-py3-none-any.whl --hash=sha256:{SHA}",
        f"six @ git+https://example.org/six.git --hash=sha256:{SHA}",
        f"./six-1-py3-none-any.whl --hash=sha256:{SHA}",
        f"file:///six-1-py3-none-any.whl --hash=sha256:{SHA}",
        "six==1.16.0",
        f"six --hash=sha256:{SHA}",
        f"six>=1.16.0 --hash=sha256:{SHA}",
        f"six==1.* --hash=sha256:{SHA}",
        f"six===1.16.0 --hash=sha256:{SHA}",
        f"six==1.16.0,==1.16.1 --hash=sha256:{SHA}",
        f"six[extra]==1.16.0 --hash=sha256:{SHA}",
        f"six==new --hash=sha256:{SHA}",
        f"six==1.16.0 --hash=md5:{SHA}",
        f"six==1.16.0 --hash=sha256:{SHA[1:]}",
        f"six==1.16.0 --hash=sha256:{SHA}0",
        f"six==1.16.0 --hash=sha256:{'F' * 64}",
        f"six==1.16.0 --hash sha256:{SHA}",
        f"six==1.16.0 --hash=sha256:{SHA} --config-settings=x=y",
        f"six==1.16.0 --hash=sha256:{SHA} -r other.txt",
        f"six==1.16.0 --hash=sha256:{SHA} # six",
        f"six==1.16.0 ; python_version --hash=sha256:{SHA}",
        f"six==1.16.0 ; {'(' * 5000}os_name == 'x' --hash=sha256:{SHA}",
        f"six==1.16.0 ; os_name == '${{HOME}}' --hash=sha256:{SHA}",
        f"six==1.16.0 \\\n--index-url=x \\\n    --hash=sha256:{SHA}",
        f"six==1.16.0 --hash=sha256:{SHA} \\\n    --index-url=x",
        f"six==1.16.0 --hash=sha256:{SHA} \\",
        f"six==1.16.0\\\n    --hash=sha256:{SHA}",
        f"six==1.16.0 --hash=sha256:{SHA}\r-r other.txt",
        f"six==1.16.0 --hash=sha256:{SHA}\x0c-r other.txt",
        f"six==1.16.0 --hash=sha256:{SHA}\u2028-r other.txt",
        f"s\u0131x==1.16.0 --hash=sha256:{SHA}",
        f"six==1.16.0\x00 --hash=sha256:{SHA}",
        "# a comment",
    ],
)
def test_anything_else_in_a_lock_is_refused_by_its_line(line: str) -> None:
    for lock in (f"{LOCK}{line}\n{LOCK}", f"{LOCK}{line}"):
        with pytest.raises(PluginError, match=r"^the lock of x, line 6: ['\"]") as refused:
            check_lock(lock, "the lock of x")
        assert refused.value.message.isprintable()
        assert len(refused.value.message) < 300


@pytest.mark.parametrize(
    ("lock", "words"),
    [
        ("", "it pins no package"),
        ("\n", "it pins no package"),
        ("x" * LOCK_LIMIT + "x", "the limit is"),
    ],
)
def test_a_lock_of_no_use_or_of_any_size_is_refused(lock: str, words: str) -> None:
    with pytest.raises(PluginError, match=words):
        check_lock(lock, "it")


@given(st.integers(0, len(LOCK)), st.integers(0, 12), st.text(max_size=12))
def test_no_edit_of_a_lock_gets_a_word_through(place: int, removed: int, added: str) -> None:
    """What still passes is made of the five kinds of words that a lock has."""
    edited = LOCK[:place] + added + LOCK[place + removed :]
    try:
        pins = check_lock(edited, "it")
    except PluginError:
        return
    for pin in pins:
        edited = edited.replace(f"{pin.name}=={pin.version}", "", 1).replace(pin.marker, "", 1)
    assert all(
        word in {"\\", ";"} or (word.startswith("--hash=sha256:") and len(word) == len(SHA) + 14)
        for word in edited.split()
    )


@pytest.mark.parametrize(
    ("declare", "names"),
    [
        (lambda file: file.write_text(block('dependencies = ["Foo_Bar[x]>1", "b; os_name"]')),
         {"foo-bar", "b", "pyarrow"}),
        (lambda file: file.write_text(block('requires-python = ">=3"')), {"pyarrow"}),
        (lambda file: file.with_name("pyproject.toml").write_text(PROJECT.format("'six>1'")),
         {"six", "pyarrow"}),
        (lambda file: file.with_name("pyproject.toml").write_text("[tool.x]\n"), {"pyarrow"}),
        (lambda file: None, {"pandas", "pyarrow"}),
    ],
)  # fmt: skip
def test_what_a_plugin_declares(
    plugin: Path, declare: Callable[[Path], object], names: set[str]
) -> None:
    declare(plugin)
    assert declared(plugin) == names
