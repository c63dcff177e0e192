"""The wire against those who are not ours: each is refused, counted, and harms nobody."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import zmq

from casparian_flow import main, protocol
from casparian_flow.config import Settings
from casparian_flow.db.access import open_ledger
from casparian_flow.engine import control, wire
from casparian_flow.engine.wire import Refusal, Refusals
from casparian_flow.errors import CasparianError, DaemonRunning
from casparian_flow.services import report
from tests.conftest import write_config
from tests.engine.wires import attacked, greeting, known
from tests.eventually import PATIENCE, eventually

MORE_PARTS = (b"\x03" + (1 << 20).to_bytes(8, "big") + bytes(1 << 20)) * 8
"""Frames of 1 MiB that announce another one; the flag for a long frame is 2, for more is 1."""

GARBAGE = {
    "random bytes": os.urandom(1 << 16),
    "a browser": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "ZMTP 1.0": b"\x01\x00\x06\x00hello",
    "2^62 bytes to come": greeting(b"CURVE") + b"\x02" + (1 << 62).to_bytes(8, "big"),
    "a command that is none": greeting(b"CURVE") + b"\x04\x05hello",
    "endless parts instead of a handshake": greeting(b"CURVE") + MORE_PARTS,
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_counted(settings: Settings, name: str) -> None:
    async def story() -> None:
        async with attacked(settings) as target:
            await target.says(GARBAGE[name])
            await target.refuses("garbage")
            assert target.sentinel.refused == {"garbage": 1}

    asyncio.run(story())


def test_silence_ends_with_the_handshakes_time(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "HANDSHAKE_MS", 2_000)  # the good worker has no more either

    async def story() -> None:
        async with attacked(settings) as target:
            await target.says(b"")
            await target.refuses("garbage")

    asyncio.run(story())


def keys(pair: tuple[bytes, bytes]) -> dict[str, object]:
    return {"curve_publickey": pair[0], "curve_secretkey": pair[1]}


def test_strangers_are_counted_and_nothing_of_them_is_heard(settings: Settings) -> None:
    async def story() -> None:
        async with attacked(settings) as target:
            true = known(target.endpoint)
            other, anyone = zmq.curve_keypair()
            strangers = [
                target.stranger(),
                target.stranger(plain_username=b"worker", plain_password=true.secret),
                target.stranger(curve_serverkey=true.sentinel, **keys((other, anyone))),
                target.stranger(curve_serverkey=other, **keys(zmq.curve_keypair())),
            ]
            for count, stranger in enumerate(strangers, 1):
                stranger.socket.connect(target.endpoint)
                await stranger.send(protocol.Hello(worker="good"), protocol.Ring())
                refused = target.sentinel.refused
                await eventually(lambda: refused.total() >= count)  # noqa: B023
                assert await target.good.works()
            # The first two see by themselves that it cannot work, and may hang up before we do.
            assert refused["stranger"] >= 2
            assert refused["stranger"] + refused["garbage"] == len(strangers)
            for stranger in strangers:
                assert not await stranger.socket.poll(0)

    asyncio.run(story())


@pytest.mark.parametrize(("mechanism", "kind"), [(b"NULL", "stranger"), (b"CURVE", "garbage")])
def test_endless_parts_of_a_stranger_cost_no_memory(
    settings: Settings, mechanism: bytes, kind: str
) -> None:
    def flood(port: int) -> int:
        """MiB sent until the connection was ended."""
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(greeting(mechanism))
            for count in range(1024):
                try:
                    stranger.sendall(MORE_PARTS)
                except ConnectionError:
                    return count * 8
        raise AssertionError("a stranger was listened to")

    async def story() -> None:
        async with attacked(settings) as target:
            before = psutil.Process().memory_info().rss
            for _ in range(10):
                assert await asyncio.to_thread(flood, target.port) <= 16
            await target.refuses(kind, 10)
            assert psutil.Process().memory_info().rss - before < 32 << 20

    asyncio.run(story())


def test_messages_that_are_not_ours_are_dropped(settings: Settings) -> None:
    async def story() -> None:
        async with attacked(settings) as target:
            socket = target.good.socket
            await socket.send_multipart([b"part"] * 9)
            await target.refuses("parts")
            for frames in ([b""], [b"CF0", b"x"], [b"part"] * 8, [b"CF1", b"\xc1"]):
                await socket.send_multipart(frames)
            await target.refuses("malformed", 4)
            assert target.sentinel.refused == {"parts": 1, "malformed": 4}

    asyncio.run(story())


def test_who_has_not_said_hello_is_asked_to(settings: Settings) -> None:
    async def story() -> None:
        async with attacked(settings) as target:
            peer = target.peer()
            await peer.send(protocol.Ready(free=1))
            assert await peer.hear() == protocol.Unknown()
            await target.refuses("unadmitted")

    asyncio.run(story())


def test_a_frame_over_the_limit_ends_its_connection(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "FRAME_LIMIT", 1 << 16)

    async def story() -> None:
        async with attacked(settings) as target:
            peer = target.peer()
            await peer.socket.send_multipart([b"CF1", bytes(1 << 17)])
            await target.refuses("unheard")
            assert target.sentinel.refused == {"unheard": 1}

    asyncio.run(story())


def test_a_routing_id_of_ones_own_is_refused(settings: Settings) -> None:
    async def story() -> None:
        async with attacked(settings) as target:
            for count, claimed in enumerate((b"mine", b"\xff\xfe", b"\0\0", b"\0" * 6), 1):
                peer = target.peer(routing_id=claimed)
                await peer.send(protocol.Hello(worker="thief"))
                await target.refuses("identity", count)

    asyncio.run(story())


def test_a_workers_routing_id_cannot_be_stolen(settings: Settings) -> None:
    """Neither while the Worker is there nor when its connection is gone."""

    async def story() -> None:
        async with attacked(settings) as target:
            sentinel = target.sentinel
            (alive,) = sentinel._peers
            # One that hangs up before its handshake ends counts as garbage: try until one is let in
            async with asyncio.timeout(PATIENCE):
                while not sentinel.refused["unheard"]:
                    thief = target.peer(routing_id=alive)
                    await thief.send(protocol.Conclude(receipts=[]), protocol.Goodbye())
                    await thief.socket.poll(50)
                    assert await target.good.works()
                    assert sentinel.workers == 1
                    thief.socket.close()
            await target.refuses("unheard")

            lost = target.peer()
            await lost.send(protocol.Hello(worker="lost"))
            await lost.hear()
            (gone,) = set(sentinel._peers) - {alive}
            lost.socket.close()
            # libzmq gives an id away only when the connection that had it is quite gone
            async with asyncio.timeout(PATIENCE):
                while not sentinel.refused["identity"]:
                    thief = target.peer(routing_id=gone)
                    await thief.send(protocol.Goodbye())
                    await thief.socket.poll(50)
                    thief.socket.close()
            assert gone in sentinel._peers
            await sentinel._lose(gone, "left")
            await target.refuses("identity")

    asyncio.run(story())


FROZEN = """
import sys, zmq
from casparian_flow import protocol
from casparian_flow.engine import wire
with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
    socket.linger = 0
    wire.connect(socket, sys.argv[1], wire.read_key(sys.argv[1]))
    socket.send_multipart(protocol.encode(protocol.Hello(worker="frozen")))
    socket.recv_multipart()
    print("welcome", flush=True)
    sys.stdin.read()
"""


def test_a_frozen_peer_is_dropped(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HEARTBEAT_MS", 100)
    monkeypatch.setattr(wire, "SILENCE_MS", 3_000)  # the good worker has no more either

    async def story() -> None:
        async with attacked(settings) as target:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", FROZEN, target.endpoint,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            assert process.stdin and process.stdout
            assert await process.stdout.readline() == b"welcome\n"
            (port,) = [c.laddr.port for c in psutil.Process(process.pid).net_connections("tcp")]
            process.send_signal(signal.SIGSTOP)
            ours = psutil.Process()
            await eventually(
                lambda: port not in [c.raddr.port for c in ours.net_connections("tcp") if c.raddr]
            )
            assert await target.good.works()
            process.kill()
            process.stdin.close()
            await process.wait()

    asyncio.run(story())


def test_a_second_sentinel_takes_nothing_from_the_first(settings: Settings, tmp_path: Path) -> None:
    other = write_config(tmp_path / "other")
    with open_ledger(other.database):
        pass

    async def story() -> None:
        async with attacked(settings) as target:
            key = known(target.endpoint)
            for rival, error in ((other, CasparianError), (settings, DaemonRunning)):
                with pytest.raises(error):
                    async with main.running(
                        rival, "rival", workers=0, watch=False, endpoints=[target.endpoint]
                    ):
                        pass
            assert known(target.endpoint) == key
            assert await target.good.works()
            reply = await asyncio.to_thread(control.ask, settings.database, protocol.Ring())
            assert reply == protocol.Reply(ok=True, text="rung")
            key_file = wire.key_file(target.endpoint)
            assert key_file.is_file()
        assert not key_file.exists()

    asyncio.run(story())


def test_the_counts_can_be_seen(settings: Settings) -> None:
    async def story() -> None:
        async with attacked(settings) as target:
            assert await asyncio.to_thread(control.refusals, settings.database) == {}
            await target.says(b"GET / HTTP/1.1\r\n\r\n")
            await target.refuses("garbage")
            with open_ledger(settings.database) as ledger:
                found = await asyncio.to_thread(report.status, settings, ledger)
            assert found["refused"] == {"garbage": 1}

    asyncio.run(story())


def test_a_flood_is_logged_by_powers_of_ten(caplog: pytest.LogCaptureFixture) -> None:
    refused = Refusals()
    for _ in range(1234):
        refused.refuse(Refusal.STRANGER, "somebody")
    refused.refuse(Refusal.GARBAGE, "something")
    logged = [int(record.args[2]) for record in caplog.records]  # type: ignore[index,arg-type]
    assert logged == [1, 10, 100, 1000, 1]
    assert str(refused) == "stranger 1234, garbage 1"
