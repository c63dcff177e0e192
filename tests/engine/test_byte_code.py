"""Byte code is cached for what lies in the environment, by a process that may come to grief."""

from __future__ import annotations

import logging
import os
import subprocess
from importlib.util import cache_from_source
from pathlib import Path

import pytest

from casparian_flow.engine import byte_code
from casparian_flow.engine.byte_code import compile_modules, real_modules
from casparian_flow.engine.environments import EnvironmentStore, Lease
from tests import wheels


@pytest.fixture
def lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lease:
    files = {
        "used.py": "VERSION = 1\n",
        "idle.py": "VERSION = 2\n",
        "package/__init__.py": "",
        "package/deep.py": "",
        "broken.py": "def (:\n",
        "nested.py": "(" * 100_000,
        "coded.py": "# coding: no-such\n",
    }
    wheels.use(monkeypatch, tmp_path / "links")
    lock = wheels.pin(wheels.wheel(tmp_path / "links", "parts", files=files))
    lease = EnvironmentStore(tmp_path / "envs", 1 << 30).lease(lock)
    lease.release()
    return lease


def traced(lease: Lease, name: str) -> str:
    """What Python itself says of where it takes a module's code from."""
    code = f"import sys; sys.path.insert(0, {str(lease.site_packages)!r}); import {name}"
    command = [lease.python, "-I", "-S", "-B", "-v", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def test_the_second_import_is_from_the_cache(lease: Lease) -> None:
    file = str(lease.site_packages / "used.py")
    assert f"code object from {file}\n" in traced(lease, "used")
    lease.compile([file], 60.0)
    said = traced(lease, "used")
    assert f"code object from '{cache_from_source(file)}'" in said
    assert f"code object from {file}\n" not in said
    assert not Path(cache_from_source(str(lease.site_packages / "idle.py"))).exists()


def test_a_module_that_cannot_be_compiled_is_left_out(lease: Lease) -> None:
    names = ["broken.py", "nested.py", "coded.py", "package/deep.py", "used.py"]
    lease.compile([str(lease.site_packages / name) for name in names], 60.0)
    cached = {path.name.partition(".")[0] for path in lease.site_packages.rglob("*.pyc")}
    assert cached == {"deep", "used"}


def test_only_sources_in_the_environment_are_compiled(lease: Lease, tmp_path: Path) -> None:
    inside, outside = lease.site_packages, tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.py").touch()
    (tmp_path / f"{inside.name}x").mkdir()
    (inside / "link.py").symlink_to(outside / "secret.py")
    (inside / "leads_out").symlink_to(outside)
    (inside / "folder.py").mkdir()
    os.mkfifo(inside / "pipe.py")
    (inside / "elsewhere").mkdir()
    (inside / "elsewhere" / "cached.py").touch()
    (inside / "elsewhere" / "__pycache__").symlink_to(outside)
    names = [
        str(outside / "secret.py"),
        "link.py",
        "leads_out/secret.py",
        "folder.py",
        "pipe.py",
        "elsewhere/cached.py",
        "none.py",
        "package",
        "parts-1.0.dist-info/METADATA",
        "../outside/secret.py",
        "nul\0.py",
        "lone\udfff\ud800.py",
        "x" * 5000 + ".py",
        "",
    ]
    asked = [os.path.join(inside, name) for name in names]
    assert list(real_modules(inside, asked)) == []
    bent = [f"{inside}/{way}used.py" for way in ("package/../", "./", "/", "." + "/." * 3000 + "/")]
    assert list(real_modules(inside, bent)) == []
    wanted = str(inside / "used.py")
    assert list(real_modules(inside, [*asked, wanted, wanted])) == [str(inside / "used.py")]


def test_a_compiler_that_dies_costs_nothing_but_its_work(
    lease: Lease, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -SEGV $$\n")
    python.chmod(0o755)
    with caplog.at_level(logging.WARNING):
        compile_modules(python, lease.site_packages, [str(lease.site_packages / "used.py")], 60.0)
    assert "ended early (-11)" in caplog.text


def test_a_flood_of_names_is_not_looked_at(lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they cost is counted before a look: no more than NAMES_LIMIT bytes, each a short one."""
    looked: list[str] = []
    lstat = os.lstat
    monkeypatch.setattr(os, "lstat", lambda name: looked.append(name) or lstat(name))
    inside = lease.site_packages
    floods = [
        [f"{inside}/{'a/' * (4 << 20)}"],
        [f"{inside}/{'x' * 900}{number}" for number in range(9000)],
        [f"{inside}/{'d/' * 40}{number}.py" for number in range(20_000)],
        [f"{inside}{'/' * number}used.py" for number in range(2, 9000)],
    ]
    for names in floods:
        assert list(real_modules(inside, names)) == []
        asked = [name for name in looked if str(name).startswith(f"{inside}/")]
        assert sum(map(len, asked)) <= byte_code.NAMES_LIMIT
        assert len(asked) <= byte_code.MODULES_LIMIT
        looked.clear()


def test_a_module_that_stalls_its_compiler_does_so_once(
    lease: Lease, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """For as long as the job has time left, and not again with the next job."""
    python, begun = tmp_path / "python", tmp_path / "begun"
    python.write_text(f"#!/bin/sh\necho x >> {begun}\nexec sleep 3600\n")
    python.chmod(0o755)
    names = [str(lease.site_packages / "used.py")]
    for seconds in (0.0, 0.5, 60.0):
        compile_modules(python, lease.site_packages, names, seconds)
    assert begun.read_text() == "x\n"
    assert "byte code" in caplog.text
