"""Nobody but us writes what is run from the cache, and what was changed there is not run."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from casparian_flow.durable import make_private
from casparian_flow.engine.environments import EnvironmentStore, bundle
from casparian_flow.errors import Unavailable
from tests import wheels

PLENTY = 1 << 30


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return path.lstat().st_mode & 0o777


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077])
def test_cache_folders_are_ours_alone_whatever_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: int
) -> None:
    wheels.use(monkeypatch, tmp_path / "links")
    lock = wheels.pin(wheels.wheel(tmp_path / "links", "small"))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    cache = tmp_path / "cache"
    with umask(mask):
        folder = bundle(cache)
        with EnvironmentStore(cache / "envs", PLENTY).lease(lock) as lease:
            packages = lease.site_packages
    inner = [path for path in folder.rglob("*") if path.is_dir()]
    for path in (cache, cache / "guest", folder, *inner, cache / "envs", packages):
        assert mode(path) == 0o700, path
    for path in (*folder.rglob("*"), *packages.rglob("*")):
        assert mode(path) & 0o022 == 0, path


@pytest.mark.parametrize("wide", [0o777, 0o755, 0o770, 0o701, 0o600])
def test_a_folder_that_is_there_with_another_mode_is_mended(tmp_path: Path, wide: int) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(wide)
    assert make_private(folder) == bool(wide & 0o022)
    assert mode(folder) == 0o700
    assert not make_private(folder)


def test_a_folder_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    somebody = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: somebody)
    with pytest.raises(Unavailable, match="belongs to another user") as caught:
        bundle(tmp_path)
    assert "XDG_CACHE_HOME" in caught.value.hint
    with pytest.raises(Unavailable, match="belongs to another user"):
        EnvironmentStore(tmp_path, PLENTY).lease("small==1.0 --hash=sha256:" + "0" * 64)


def test_environments_that_others_could_write_are_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wheels.use(monkeypatch, tmp_path / "links")
    lock = wheels.pin(wheels.wheel(tmp_path / "links", "small"))
    store = EnvironmentStore(tmp_path / "envs", PLENTY)
    with store.lease(lock) as lease:
        planted = lease.site_packages / "planted.py"
        planted.write_text("")
    with store.lease(lock):
        assert planted.exists()
    (tmp_path / "envs").chmod(0o777)
    with store.lease(lock) as lease:
        assert not planted.exists()
        assert (lease.site_packages / "small.py").exists()
        (tmp_path / "envs").chmod(0o777)
        with store.lease(lock) as second:  # in use: it cannot go, and that is said
            assert second.site_packages == lease.site_packages
    assert "other users" in caplog.text
    assert "is in use" in caplog.text


def _byte_code(folder: Path) -> None:
    file = next(folder.rglob("guest.*.pyc"))
    file.chmod(0o644)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _source(folder: Path) -> None:
    file = folder / "casparian_flow" / "security" / "sandbox.py"
    file.chmod(0o644)
    file.write_text("def lock_down(*_): ...\n")


def _more(folder: Path) -> None:
    (folder / "casparian_flow" / "engine" / "socket.py").write_text("print('mine')\n")


def _beside(folder: Path) -> None:
    (folder / "json.py").write_text("print('mine')\n")


def _link(folder: Path) -> None:
    file = folder / "casparian_flow" / "sdk.py"
    elsewhere = folder.parent / "same.py"
    elsewhere.write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(elsewhere)


def _folder_link(folder: Path) -> None:
    (folder / "casparian_flow").rename(folder.parent / "elsewhere")
    (folder / "casparian_flow").symlink_to(folder.parent / "elsewhere")


def _fifo(folder: Path) -> None:
    file = folder / "casparian_flow" / "sdk.py"
    file.unlink()
    os.mkfifo(file)


def _missing(folder: Path) -> None:
    next(folder.rglob("kernel.*.pyc")).unlink()


def _wide(folder: Path) -> None:
    (folder / "casparian_flow" / "engine").chmod(0o777)


def _whole(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize(
    "change",
    [_byte_code, _source, _more, _beside, _link, _folder_link, _fifo, _missing, _wide, _whole],
)
def test_a_bundle_that_was_changed_is_made_anew_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable[[Path], None]
) -> None:
    folder = bundle(tmp_path)
    before = files(folder)
    inode = folder.stat().st_ino
    assert bundle(tmp_path).stat().st_ino == inode
    assert not caplog.records
    change(folder)
    assert bundle(tmp_path) == folder
    assert "was changed" in caplog.text
    assert not folder.is_symlink()
    assert files(folder) == before
    caplog.clear()
    bundle(tmp_path)
    assert not caplog.records


def test_every_process_makes_the_same_bundle(tmp_path: Path) -> None:
    """Byte code is compared byte by byte, so it must not depend on what else a process did."""
    folder = bundle(tmp_path)
    code = (
        "import asyncio, json, sqlite3, sys, typing\nfrom pathlib import Path\n"
        "from casparian_flow.engine.environments import bundle\nbundle(Path(sys.argv[1]))"
    )
    inode = folder.stat().st_ino
    for seed in ("0", "1", "random"):
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path],
            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stderr == ""
    assert folder.stat().st_ino == inode
