"""Environments are built once and whole, run nothing, and stay while they are used. uv is real."""

from __future__ import annotations

import fcntl
import http.server
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from casparian_flow.engine import environments
from casparian_flow.engine.environments import (
    EnvironmentStore,
    environment_key,
    marker,
    open_lock,
    size_bytes,
)
from casparian_flow.errors import ArtifactRefused, EnvironmentFailed, Unavailable
from tests import wheels

PLENTY = 1 << 30


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that uv takes packages from."""
    folder = tmp_path / "links"
    wheels.use(monkeypatch, folder)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> EnvironmentStore:
    return EnvironmentStore(tmp_path / "envs", PLENTY)


def folders(store: EnvironmentStore) -> set[Path]:
    return {path for path in store._root.iterdir() if path.is_dir()}


def run(code: str, *, store: EnvironmentStore, lock: str) -> subprocess.Popen[str]:
    """Python in another process, which has a `store` and a `lock`."""
    head = (
        "import sys\n"
        "from pathlib import Path\n"
        "from casparian_flow.engine.environments import EnvironmentStore\n"
        f"store = EnvironmentStore(Path({str(store._root)!r}), {PLENTY})\n"
        f"lock = {lock!r}\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", head + code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_an_environment_is_built_once_whoever_asks(store: EnvironmentStore, links: Path) -> None:
    lock = wheels.pin(wheels.wheel(links, "small"))
    ask = "lease = store.lease(lock); print(lease.site_packages.stat().st_ino)"
    others = [run(ask, store=store, lock=lock) for _ in range(2)]
    with ThreadPoolExecutor(4) as threads:
        leases = list(threads.map(lambda _: store.lease(lock), range(4)))
    inodes = {str(lease.site_packages.stat().st_ino) for lease in leases}
    assert {process.communicate()[0].strip() for process in others} == inodes
    assert len(inodes) == len(folders(store)) == 1
    for lease in leases:
        lease.release()
        lease.release()
    shutil.rmtree(links)
    with store.lease(lock) as lease:
        assert (lease.site_packages / "small.py").is_file()


def test_two_that_find_it_missing_at_the_same_moment_share_it(
    store: EnvironmentStore, links: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who does not build does not wait until who does has let it go: that one may never."""
    lock = wheels.pin(wheels.wheel(links, "small"))
    both, firsts, real = threading.Barrier(2), iter(range(2)), environments.in_use

    def in_use(folder: Path, descriptor: int) -> bool:
        found = real(folder, descriptor)
        if next(firsts, None) is not None:
            both.wait(60)
        return found

    monkeypatch.setattr(environments, "in_use", in_use)
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(lambda _: store.lease(lock), range(2))
    with one, other:
        assert one.site_packages == other.site_packages
        assert (one.site_packages / "small.py").is_file()


def test_a_wait_for_a_build_ends_with_its_job(tmp_path: Path, links: Path) -> None:
    lock = wheels.pin(wheels.wheel(links, "small"))
    store = EnvironmentStore(tmp_path / "envs", PLENTY, given_up=lambda: True)
    store._root.mkdir(mode=0o700)
    descriptor = open_lock(store._root / environment_key(lock))
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(Unavailable, match="aborted"):
        store.lease(lock)
    os.close(descriptor)


def test_fifty_plugins_with_one_lock_share_an_environment(
    store: EnvironmentStore, links: Path
) -> None:
    lock = wheels.pin(wheels.wheel(links, "small"))
    leases = [store.lease(lock) for _ in range(50)]
    assert len({lease.site_packages for lease in leases}) == len(folders(store)) == 1
    for lease in leases:
        lease.release()


def test_two_versions_of_a_library_stand_side_by_side(store: EnvironmentStore, links: Path) -> None:
    locks = [wheels.pin(wheels.wheel(links, "lib", version)) for version in ("1.0", "2.0")]
    code = "import sys, lib; print(lib.VERSION)"
    said = []
    for lock in locks:
        with store.lease(lock) as lease:
            command = [
                lease.python,
                "-I",
                "-S",
                "-c",
                f"import sys\nsys.path.insert(0, {str(lease.site_packages)!r})\n{code}",
            ]
            said.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert said == ["1.0\n", "2.0\n"]
    assert len(folders(store)) == 2


@pytest.mark.parametrize("broken", ["marker", "folder"])
def test_a_half_built_environment_is_built_again(
    store: EnvironmentStore, links: Path, broken: str
) -> None:
    lock = wheels.pin(wheels.wheel(links, "small"))
    with store.lease(lock) as lease:
        folder = lease.site_packages
    marker(folder).unlink()
    if broken == "folder":
        shutil.rmtree(folder)
    else:
        (folder / "small.py").unlink()
        (folder / "left_over.py").touch()
    with store.lease(lock):
        assert (folder / "small.py").is_file()
        assert not (folder / "left_over.py").exists()


class Stalled(http.server.BaseHTTPRequestHandler):
    """An index that takes a question and answers it only when told to."""

    asked: threading.Event
    answer: threading.Event

    def do_GET(self) -> None:
        self.asked.set()
        self.answer.wait(60)
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def stalled() -> Iterator[http.server.ThreadingHTTPServer]:
    Stalled.asked, Stalled.answer = threading.Event(), threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stalled) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        Stalled.answer.set()
        server.shutdown()
        thread.join()


def test_after_a_killed_build_the_next_start_is_clean(
    tmp_path: Path, links: Path, store: EnvironmentStore, stalled: http.server.ThreadingHTTPServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The uv that outlives the one who was killed holds the lock until it ends."""
    lock = wheels.pin(wheels.wheel(links, "small"))
    with monkeypatch.context() as patch:
        patch.delenv("UV_NO_INDEX")
        patch.setenv("UV_FIND_LINKS", str(tmp_path))
        patch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{stalled.server_port}/simple")
        builder = run("store.lease(lock)", store=store, lock=lock)
        assert Stalled.asked.wait(60)
        builder.send_signal(signal.SIGKILL)
        builder.communicate()
    assert not list(store._root.glob("*.ok"))
    (held,) = store._root.glob("*.lock")
    with held.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    Stalled.answer.set()
    with store.lease(lock) as lease:
        assert (lease.site_packages / "small.py").read_text() == "VERSION = '1.0'\n"


def test_another_hash_is_refused(store: EnvironmentStore, links: Path) -> None:
    file = wheels.wheel(links, "small")
    lock = wheels.pin(file)
    wheels.wheel(links, "small", files={"small.py": "other"})
    for _ in range(2):
        with pytest.raises(EnvironmentFailed, match=r"cannot be built(?s:.*)small"):
            store.lease(lock)


@pytest.mark.parametrize("lock", ["small==1.0\n", "--find-links .\n", "-r ../other.txt\n"])
def test_a_lock_of_anything_but_pins_never_gets_to_uv(
    store: EnvironmentStore, lock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(ArtifactRefused, match="the plugin's lock, line 1: ") as refused:
        store.lease(lock)
    assert not refused.value.retryable


def test_a_package_that_must_be_built_is_refused_and_not_run(
    store: EnvironmentStore, links: Path, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    lock = wheels.pin(wheels.sdist(links, "builds", setup=f"open({str(ran)!r}, 'w')"))
    with pytest.raises(EnvironmentFailed, match=r"cannot be built(?s:.*)builds"):
        store.lease(lock)
    assert not ran.exists()


def test_building_runs_nothing_of_a_package_and_no_interpreter_is_its_own(
    store: EnvironmentStore, links: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its `.pth` files, nor, at the next start, a standard library of its choice."""
    ran = tmp_path / "ran"
    own = f"import os; open({str(ran)!r}, 'w')\n"
    files = {
        "evil.pth": own,
        "sitecustomize.py": own,
        "evil-1.0.data/data/pyvenv.cfg": f"home = {tmp_path}\n",
        "evil-1.0.data/data/os.py": own,
        "evil-1.0.data/data/.ok": "1",
        "../outside.py": own,
        "evil-1.0.data/data/../../outside.py": own,
    }
    lock = wheels.pin(wheels.wheel(links, "evil", files=files))
    monkeypatch.setenv("UV_COMPILE_BYTECODE", "1")
    with store.lease(lock) as lease:
        subprocess.run([lease.python, "-I", "-S", "-c", "import os"], check=True)
        assert not lease.python.is_relative_to(store._root)
        assert (lease.site_packages / "evil.pth").is_file()
        assert (lease.site_packages / "__pycache__").is_dir()  # compiled, as uv was told, not run
    assert not ran.exists()
    assert {path.name for path in store._root.iterdir()} == {
        f"{lease.site_packages.name}{end}" for end in ("", ".ok", ".lock")
    }


def test_settings_beside_a_plugin_do_not_reach_a_build(
    store: EnvironmentStore, links: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "stranger"
    folder.mkdir()
    (folder / "uv.toml").write_text("this is not TOML")
    monkeypatch.chdir(folder)
    with store.lease(wheels.pin(wheels.wheel(links, "small"))) as lease:
        assert (lease.site_packages / "small.py").is_file()


def test_a_store_that_cannot_be_written_costs_no_attempt(tmp_path: Path, links: Path) -> None:
    (tmp_path / "envs").touch()
    with pytest.raises(Unavailable, match=r"cannot use the environments in .*/envs"):
        EnvironmentStore(tmp_path / "envs", PLENTY).lease(wheels.pin(wheels.wheel(links, "small")))


def kilobytes(links: Path, *names: str) -> list[str]:
    """Locks of environments of some 100 KB each."""
    text = "#" * 100_000
    return [wheels.pin(wheels.wheel(links, name, files={f"{name}.py": text})) for name in names]


def test_the_least_recently_used_go_beyond_the_limit(tmp_path: Path, links: Path) -> None:
    store = EnvironmentStore(tmp_path / "envs", limit_bytes=250_000)
    first, second, third = kilobytes(links, "one", "two", "three")
    paths = []
    for lock in (first, second, first, third):
        with store.lease(lock) as lease:
            paths.append(lease.site_packages)
        os.utime(marker(lease.site_packages), ns=(len(paths), len(paths)))
    assert folders(store) == {paths[0], paths[3]}
    assert not marker(paths[1]).exists()
    with store.lease(second) as lease:
        assert (lease.site_packages / "two.py").is_file()


def test_an_environment_in_use_stays_whatever_process_uses_it(tmp_path: Path, links: Path) -> None:
    store = EnvironmentStore(tmp_path / "envs", limit_bytes=1)
    ours, theirs, nobodys, last = kilobytes(links, "ours", "theirs", "nobodys", "last")
    lease = store.lease(ours)
    other = run("lease = store.lease(lock); print(lease.site_packages, flush=True)\ninput()",
                store=store, lock=theirs)  # fmt: skip
    assert other.stdout
    their_folder = Path(other.stdout.readline().strip())
    with store.lease(nobodys) as unused:
        pass
    with store.lease(last) as newest:
        assert folders(store) == {lease.site_packages, their_folder, newest.site_packages}
        assert not unused.site_packages.exists()
    other.communicate("\n")
    lease.release()
    with store.lease(nobodys) as newest:
        assert folders(store) == {newest.site_packages}


def test_a_removal_that_was_cut_short_is_finished_later(
    store: EnvironmentStore, links: Path
) -> None:
    first, second = kilobytes(links, "one", "two")
    with store.lease(first) as lease:
        folder = lease.site_packages
    marker(folder).unlink()
    with store.lease(second) as lease:
        assert folders(store) == {lease.site_packages}


def test_a_file_of_several_names_counts_once(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_bytes(b"x" * 1000)
    (tmp_path / "folder" / "b").hardlink_to(tmp_path / "folder" / "a")
    (tmp_path / "c").hardlink_to(tmp_path / "folder" / "a")
    (tmp_path / "c").write_bytes(b"x" * 2000)
    assert size_bytes(tmp_path / "folder") == 2000
