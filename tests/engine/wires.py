"""A daemon to attack, peers that behave, and the bytes of those that do not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import zmq
import zmq.asyncio

from casparian_flow import main, protocol
from casparian_flow.config import Settings
from casparian_flow.engine import wire
from casparian_flow.engine.sentinel import Sentinel
from tests.daemons import free_endpoint
from tests.eventually import PATIENCE, eventually


def greeting(mechanism: bytes) -> bytes:
    """The 64 bytes that open a ZMTP 3.1 connection, as a client."""
    return b"\xff" + bytes(8) + b"\x7f\x03\x01" + mechanism.ljust(20, b"\0") + bytes(32)


class Peer:
    """A DEALER that may or may not be one of ours."""

    def __init__(self, context: zmq.asyncio.Context) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.reconnect_ivl = -1  # one attempt is one connection

    async def send(self, *messages: protocol.AnyMessage) -> None:
        """What a connection that was closed already does not take is lost."""
        for message in messages:
            with contextlib.suppress(zmq.Again):
                await self.socket.send_multipart(protocol.encode(message), flags=zmq.NOBLOCK)

    async def hear(self) -> protocol.AnyMessage:
        async with asyncio.timeout(PATIENCE):
            return protocol.decode(await self.socket.recv_multipart())

    async def works(self) -> bool:
        """Whether the Sentinel answers a peer that said Hello."""
        await self.send(protocol.Fetch(plugin_id=1))
        return isinstance(await self.hear(), protocol.Artifact)


@dataclass
class Attacked:
    """A daemon, one good worker of it, and the means to make others."""

    sentinel: Sentinel
    endpoint: str
    good: Peer
    context: zmq.asyncio.Context
    peers: list[Peer] = field(default_factory=list)
    """All that were made; they end with the test and not before."""

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    def peer(self, **options: object) -> Peer:
        """A connected peer that has the key."""
        peer = self.stranger(**options)
        wire.connect(peer.socket, self.endpoint, known(self.endpoint))
        return peer

    def stranger(self, **options: object) -> Peer:
        peer = Peer(self.context)
        for name, value in options.items():
            setattr(peer.socket, name, value)
        self.peers.append(peer)
        return peer

    async def says(self, data: bytes) -> None:
        """Send bytes that are not ours over TCP; the Sentinel must end the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(PATIENCE):
                while await reader.read(1 << 16):
                    pass
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def refuses(self, kind: str, count: int = 1) -> None:
        """Wait until so many were counted; the good worker must not have noticed."""
        await eventually(lambda: self.sentinel.refused[kind] >= count)
        assert await self.good.works()


def known(endpoint: str) -> wire.CurveKeys:
    key = wire.read_key(endpoint)
    assert key is not None
    return key


@contextlib.asynccontextmanager
async def attacked(settings: Settings, endpoint: str = "") -> AsyncIterator[Attacked]:
    endpoint = endpoint or free_endpoint()
    async with main.running(settings, "test", workers=0, watch=False, endpoints=[endpoint]) as up:
        with zmq.asyncio.Context() as context:
            target = Attacked(up.sentinel, endpoint, Peer(context), context)
            wire.connect(target.good.socket, endpoint, known(endpoint))
            await target.good.send(protocol.Hello(worker="good"))
            assert isinstance(await target.good.hear(), protocol.Welcome)
            try:
                yield target
            finally:
                for identity in list(up.sentinel._peers):
                    await up.sentinel._lose(identity, "left")
                for peer in (target.good, *target.peers):
                    peer.socket.close()
