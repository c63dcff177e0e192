"""A dependency runs inside the sandbox only, and what it unpacks to is bounded."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from casparian_flow.config import GuestSettings
from casparian_flow.engine.bridge import Guest
from casparian_flow.engine.environments import EnvironmentStore
from casparian_flow.engine.locking import lock_dependencies
from casparian_flow.errors import EnvironmentFailed, PluginError
from tests import wheels
from tests.engine.guests import artifact, plugin, run

PTH = (
    "import os; os.environ['PTH'] = 'ran'\n"
    "import pathlib; pathlib.Path({planted!r}).write_text('x')\n"
    "import os; os.environ['SEEN'] = open({secret!r}).read()\n"
)


def test_the_pth_file_of_a_wheel_runs_and_reaches_nothing(
    store: EnvironmentStore,
    default_lock: str,
    bundle_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secret, planted = tmp_path / "secret", tmp_path / "planted"
    secret.write_text("secret")
    code = PTH.format(planted=str(planted), secret=str(secret))
    evil = wheels.wheel(tmp_path / "wheels", "evil", files={"evil.pth": code})
    wheels.use(monkeypatch, tmp_path / "wheels", only=False)
    for inner in ("in", "tmp"):
        (tmp_path / "guest" / inner).mkdir(parents=True)
    body = "self.publish('t', pa.table({n: [os.environ.get(n, '')] for n in ('PTH', 'SEEN')}))"
    with (
        store.lease(default_lock + wheels.pin(evil)) as lease,
        Guest(
            lease.python, lease.site_packages, artifact(plugin(body)),
            folder=tmp_path / "guest", bundle=bundle_folder, limits=GuestSettings(),
        ) as guest,
    ):  # fmt: skip
        guest.load()
        assert run(guest)["t"].to_pylist() == [{"PTH": "ran", "SEEN": ""}]
    assert not planted.exists()


def test_an_environment_that_hides_the_library_is_not_what_a_guest_starts_with(
    store: EnvironmentStore,
    default_lock: str,
    bundle_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Modules of the standard library, as a wheel brings them, come after the real ones."""
    evil = wheels.wheel(tmp_path / "wheels", "evil2", files={"json.py": "raise SystemExit(9)\n"})
    wheels.use(monkeypatch, tmp_path / "wheels", only=False)
    for inner in ("in", "tmp"):
        (tmp_path / "guest" / inner).mkdir(parents=True)
    with (
        store.lease(default_lock + wheels.pin(evil)) as lease,
        Guest(
            lease.python, lease.site_packages, artifact(plugin("json.dumps(1)")),
            folder=tmp_path / "guest", bundle=bundle_folder, limits=GuestSettings(),
        ) as guest,
    ):  # fmt: skip
        guest.load()
        run(guest)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of uv in which nothing is unpacked yet."""
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    return tmp_path / "uv-cache"


def bomb(folder: Path, name: str, megabytes: int, files: int = 1) -> str:
    """A wheel of a thousandth of what it unpacks to; its lock."""
    wheel = wheels.wheel(folder, name)
    with zipfile.ZipFile(wheel, "a", zipfile.ZIP_DEFLATED) as archive:
        for number in range(files):
            with archive.open(f"{name}_{number}.bin", "w") as file:
                for _ in range(megabytes // files):
                    file.write(bytes(1 << 20))
    assert wheel.stat().st_size < megabytes * 1500
    return wheels.pin(wheel)


@pytest.mark.parametrize("files", [1, 64])
@pytest.mark.slow_but("1")
def test_a_wheel_that_unpacks_to_too_much_is_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path, files: int
) -> None:
    wheels.use(monkeypatch, tmp_path / "links")
    lock = bomb(tmp_path / "links", "large", 64, files)
    small = wheels.pin(wheels.wheel(tmp_path / "links", "small"))
    store = EnvironmentStore(tmp_path / "envs", 1 << 30, one_limit_bytes=16 << 20)
    for _ in range(2):  # the second time uv has it unpacked in its cache
        with pytest.raises(EnvironmentFailed, match="more than 16777216 bytes") as caught:
            store.lease(lock)
        assert "environment_limit_bytes" in str(caught.value)
        assert not [path for path in (tmp_path / "envs").iterdir() if path.suffix != ".lock"]
    store.lease(small).release()


@pytest.mark.slow
def test_uv_is_stopped_while_it_unpacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    """Not once it has: a gibibyte may be many, and the disk full before."""
    wheels.use(monkeypatch, tmp_path / "links")
    lock = bomb(tmp_path / "links", "huge", 1024)
    monkeypatch.setattr("casparian_flow.engine.locking.LOOK_SECONDS", 0.01)
    monkeypatch.setattr("casparian_flow.engine.environments.SLACK_BYTES", 0)
    store = EnvironmentStore(tmp_path / "envs", 4 << 30, one_limit_bytes=8 << 20)
    with pytest.raises(EnvironmentFailed, match="more than 8388608 bytes"):
        store.lease(lock)
    unpacked = sum(path.stat().st_size for path in own_cache.rglob("*") if path.is_file())
    assert unpacked < 1 << 30


@pytest.mark.slow
def test_uv_runs_no_program_that_files_beside_a_plugin_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for a password, a graphics card, a repository or an interpreter."""
    ran, here = tmp_path / "ran", tmp_path / "plugin"
    here.mkdir()
    for name in ("keyring", "nvidia-smi", "rocm_agent_enumerator", "git", "python3", "ssh"):
        (here / name).write_text(f"#!/bin/sh\necho {name} $* >> {ran}\nexit 1\n")
        (here / name).chmod(0o755)
    monkeypatch.setenv("PATH", f".:{here}:{os.environ['PATH']}")
    monkeypatch.setenv("UV_KEYRING_PROVIDER", "subprocess")
    wheels.use(monkeypatch, tmp_path / "links")
    wheels.wheel(tmp_path / "links", "small")
    wheels.wheel(tmp_path / "links", "pyarrow", "99.0")
    plugin = here / "p.py"
    uv_toml = here / "uv.toml"

    def declare(dependency: str, settings: str) -> None:
        plugin.write_text(f'# /// script\n# dependencies = ["{dependency}"]\n# ///\n')
        uv_toml.write_text(settings)

    declare("small", 'keyring-provider = "subprocess"\n[pip]\ntorch-backend = "auto"\n')
    assert "small==1.0" in lock_dependencies(plugin)
    monkeypatch.delenv("UV_NO_INDEX")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")  # else it waits between them
    closed = "http://user@127.0.0.1:9"  # nobody listens on it
    declare("nobody", f'keyring-provider = "subprocess"\nindex-url = "{closed}/simple"\n')
    with pytest.raises(PluginError):
        lock_dependencies(plugin)
    declare(f"nobody @ git+{closed}/x.git", "")
    with pytest.raises(PluginError):
        lock_dependencies(plugin)
    declare("small", f'python-downloads = "automatic"\npython-install-mirror = "{closed}"\n')
    (here / ".python-version").write_text("3.99\n")
    lock_dependencies(plugin)
    assert not ran.exists()
