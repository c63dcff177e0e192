"""Where the wire may be, and who finds the key to it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import zmq

from casparian_flow import config, durable, main, protocol
from casparian_flow.config import GuestSettings, Settings
from casparian_flow.db.access import Ledger
from casparian_flow.engine import control, wire, worker_client
from casparian_flow.errors import CasparianError, ConfigError, DaemonGone
from casparian_flow.services import architect
from tests.conftest import write_config
from tests.daemons import DAEMON, WORKER, free_endpoint, said, start
from tests.engine.wires import attacked
from tests.eventually import PATIENCE, eventually
from tests.plugs import signed

ELSEWHERE = [
    "tcp://*:5555", "tcp://0.0.0.0:5555", "tcp://0:5555", "tcp://[::]:5555", "tcp://lo:5555",
    "tcp://192.0.2.1:5555", "tcp://far:5555", "tcp://both:5555", "tcp://127.0.0.1:*",
    "tcp://127.0.0.1:0", "tcp://127.0.0.1:65536", "tcp://127.0.0.1", "127.0.0.1:5555",
    "tcp://192.0.2.1:1;127.0.0.1:5555", "udp://[::1]:5", "pgm://127.0.0.1:5555",
    "ipc:///tmp/socket", "inproc://sentinel",
]  # fmt: skip


def test_only_the_loopback_interface_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"ours": ["127.0.0.1", "::1"], "both": ["127.0.0.1", "192.0.2.1"], "far": ["192.0.2.1"]}
    real = socket.getaddrinfo

    def look_up(host: str, port: None, **options: object) -> list[object]:
        if host in names:
            return [(0, 0, 0, "", (address, 0)) for address in names[host]]
        return list(real(host, port, **options))  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    used = {
        "tcp://127.0.0.1:5555": "tcp://127.0.0.1:5555",
        "tcp://127.8.8.8:5555": "tcp://127.8.8.8:5555",
        "tcp://[::1]:5555": "tcp://[::1]:5555",
        "tcp://ours:5555": "tcp://127.0.0.1:5555",
    }
    for endpoint, address in used.items():
        assert wire.loopback(endpoint, "") == address
        assert wire.key_file(endpoint) == config.runtime_folder() / "tcp-5555.key"
    for endpoint in ELSEWHERE:
        with pytest.raises(ConfigError, match="loopback") as refused:
            wire.loopback(endpoint, "the hint")
        assert refused.value.message.startswith(endpoint)


def test_a_deploy_that_fails_as_nobody_foresaw_is_answered(
    ledger: Ledger, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deploy(*_: object) -> str:
        raise PermissionError(13, "Permission denied", "/some/where")

    monkeypatch.setattr(architect, "deploy", deploy)
    message = signed(ledger, tmp_path / "keys")

    async def story() -> None:
        async with attacked(settings) as target:
            reply = await asyncio.to_thread(control.ask, settings.database, message)
            assert reply is not None
            assert (reply.ok, reply.exit_code) == (False, 70)
            assert "/some/where" in reply.text
            assert not target.sentinel._answers

    asyncio.run(story())


def test_a_daemon_that_has_not_said_who_it_is_is_waited_for(
    ledger: Ledger, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its lock, and not written its name yet."""
    monkeypatch.setattr(control, "KEY_SECONDS", 0.1)
    with settings.database.daemon_lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DaemonGone, match="key file"):
            control.ask(settings.database, protocol.Ring())


@pytest.mark.parametrize("module", ["main", "engine.worker_client"])
def test_another_interface_is_refused_in_words(tmp_path: Path, module: str) -> None:
    settings = write_config(tmp_path / "flow", '[listen]\nendpoint = "tcp://0.0.0.0:5555"\n')
    place = ["--config", str(settings.home / config.FILE_NAME)]
    arguments = place if module == "main" else ["--connect", "tcp://0.0.0.0:5555"]
    done = subprocess.run(
        [sys.executable, "-m", f"casparian_flow.{module}", *arguments],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 78
    assert "error: tcp://0.0.0.0:5555 is not" in done.stderr
    assert "loopback" in done.stderr
    assert "  try: " in done.stderr


def has_ipv6() -> bool:
    try:
        free_endpoint("::1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="NOT PROVEN: serving over IPv6 (this machine has none)")
def test_ipv6_is_served(settings: Settings) -> None:
    async def story() -> None:
        async with attacked(settings, free_endpoint("::1")) as target:
            assert await target.good.works()

    asyncio.run(story())


def test_a_client_without_the_key_is_told_at_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "KEY_SECONDS", 0.1)
    monkeypatch.setattr(wire, "HANDSHAKE_MS", 60_000)  # a late refusal counts as no answer
    file = wire.key_file(settings.database.control_endpoint)

    async def story() -> None:
        async with attacked(settings) as target:
            right = file.read_bytes()
            wrong = wire.CurveKeys(zmq.curve_keypair()[0], zmq.curve_keypair()[1])
            wire.leave_key(settings.database.control_endpoint, wrong)
            with pytest.raises(DaemonGone, match="refused") as refused:
                await asyncio.to_thread(control.ask, settings.database, protocol.Ring())
            assert "the daemon's user" in refused.value.hint
            file.unlink()
            with pytest.raises(DaemonGone, match="key file"):
                await asyncio.to_thread(control.ask, settings.database, protocol.Ring())
            file.write_bytes(b"no key")
            with pytest.raises(DaemonGone, match="is not a key"):
                await asyncio.to_thread(control.ask, settings.database, protocol.Ring())
            file.write_bytes(right)
            assert await asyncio.to_thread(control.ask, settings.database, protocol.Ring())
            await target.refuses("stranger")

    asyncio.run(story())


def test_a_daemon_that_does_not_answer_is_not_waited_for_forever(settings: Settings) -> None:
    database = settings.database
    assert control.ask(database, protocol.Ring()) is None
    database.state_folder.mkdir(mode=0o700)
    stale = wire.CurveKeys(zmq.curve_keypair()[0], zmq.curve_keypair()[1])
    wire.leave_key(database.control_endpoint, stale)
    with (
        durable.hold_daemon_lock(database.daemon_lock, "stuck"),
        pytest.raises(DaemonGone, match="does not answer"),
    ):
        control.ask(database, protocol.Ring(), patience=0.2)
    wire.key_file(database.control_endpoint).unlink()


def test_a_key_in_a_folder_of_others_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = config.runtime_folder()
    assert wire.read_key("tcp://127.0.0.1:5555") is None
    assert folder.stat().st_mode & 0o777 == 0o700
    wire.leave_key("tcp://127.0.0.1:5555", wire.CurveKeys(b"a" * 40, b"b" * 40))
    assert (folder / "tcp-5555.key").stat().st_mode & 0o777 == 0o600
    folder.chmod(0o750)
    with pytest.raises(ConfigError, match="open to other users") as refused:
        wire.read_key("tcp://127.0.0.1:5555")
    assert refused.value.hint.startswith(f"chmod 700 {folder}")
    folder.chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 4242)
        with pytest.raises(ConfigError, match="not a folder of user 4242"):
            wire.read_key("tcp://127.0.0.1:5555")
    folder.rename(tmp_path / "real")
    folder.symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="not a folder of user"):
        wire.read_key("tcp://127.0.0.1:5555")


def test_an_old_libzmq_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    wire.require_zmq()
    monkeypatch.setattr(zmq, "zmq_version_info", lambda: (4, 3, 4))
    with pytest.raises(CasparianError, match=r"libzmq 4\.3\.4 .* 4\.3\.5 or newer"):
        wire.require_zmq()


def test_a_worker_waits_for_a_sentinel_and_follows_it_to_its_next_key(tmp_path: Path) -> None:
    endpoint = free_endpoint()
    settings = write_config(tmp_path / "flow", f'[listen]\nendpoint = "{endpoint}"\n')
    named = endpoint.replace("127.0.0.1", "localhost")

    async def next_sentinel() -> None:
        async with main.running(
            settings, "test", workers=0, watch=False, endpoints=[endpoint]
        ) as daemon:
            await eventually(lambda: daemon.sentinel.workers == 1)

    with start(settings, WORKER, "--connect", named) as worker:
        said(worker, "waiting for a Sentinel")
        with start(settings, DAEMON) as sentinel:
            said(sentinel, "connected")
            sentinel.send_signal(signal.SIGKILL)
        asyncio.run(next_sentinel())
        said(worker, "worker stopped")
        assert worker.wait(PATIENCE) == 0


def test_a_worker_that_cannot_trust_its_key_says_so_and_ends(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "casparian").mkdir(mode=0o755)
    with start(settings, WORKER, "--connect", free_endpoint()) as worker:
        said(worker, "is open to other users")
        said(worker, "try: chmod 700")
        assert worker.wait(PATIENCE) == ConfigError.exit_code


def test_a_worker_of_another_filesystem_leaves(tmp_path: Path) -> None:
    def welcome(folder: Path, inode: int) -> protocol.Welcome:
        return protocol.Welcome(
            guests_folder=str(folder / "guests"),
            inode=inode,
            database=str(folder / "ledger"),
            guests=1,
            limits=GuestSettings(),
        )

    inode = tmp_path.stat().st_ino
    worker_client._check_shared(welcome(tmp_path, inode))
    for other in (welcome(tmp_path, inode + 1), welcome(tmp_path / "absent", inode)):
        with pytest.raises(DaemonGone, match="files") as refused:
            worker_client._check_shared(other)
        assert "Sentinel's machine" in refused.value.hint
