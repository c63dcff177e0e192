"""The Sentinel's side of the handshake: who gets past it, and how many did not.

libzmq asks us about each connection that speaks CurveZMQ (RFC 27, ZAP); every other one it closes
by itself, before it keeps a single part of a message, and its monitor tells us.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
from collections import Counter
from enum import StrEnum

import zmq
import zmq.asyncio
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from casparian_flow.engine import wire

log = logging.getLogger(__name__)

_DOMAIN = b"casparian"
_ZAP = "inproc://zeromq.zap.01"
_MONITOR = "inproc://sentinel-monitor"
_EVENTS = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_EVENTS |= zmq.EVENT_DISCONNECTED
_WITHOUT_KEY = {
    zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH,
    zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC,
}


class Refusal(StrEnum):
    """Why the wire refused a connection or a message."""

    STRANGER = "stranger"
    """It speaks ZeroMQ and does not have our key."""
    GARBAGE = "garbage"
    """It ended before its handshake did: not ZeroMQ, silent, an absurd length, or it hung up."""
    UNHEARD = "unheard"
    """It has the key, and ended before a message of it came through: the routing id it claimed
    was another's, or its first message was too large."""
    IDENTITY = "identity"
    """It claimed a routing id, or took the one of a Worker that came by another connection."""
    PARTS = "parts"
    """A message of more parts than any of ours."""
    MALFORMED = "malformed"
    """A message that is not one of ours."""
    UNADMITTED = "unadmitted"
    """A message that only a Worker may send, from a peer that has not said Hello."""


class Refusals(Counter[str]):
    """How many were refused, by kind."""

    def refuse(self, kind: Refusal, why: str) -> None:
        """Count one. The 1st, 10th, 100th... of a kind is logged: a flood does not fill the disk.

        Args:
            why: what is known of this one.
        """
        self[kind] += 1
        count = self[kind]
        if str(count).strip("0") == "1":
            log.warning("the wire refused %s (%s: %d so far)", why, kind, count)

    def __str__(self) -> str:
        """As people read them: `stranger 3, garbage 17`."""
        return ", ".join(f"{kind} {count}" for kind, count in self.items())


class Handshake:
    """Lets those who have the key through to one socket.

    Args:
        context: of the socket; one Handshake a context.
        refused: counts those who do not.
    """

    def __init__(self, context: zmq.asyncio.Context, refused: Refusals) -> None:
        public, self._secret = zmq.curve_keypair()
        peers_public, peers_secret = zmq.curve_keypair()
        self.key = wire.Key(public, peers_secret)
        self._admitted = z85.decode(peers_public)
        self._refused = refused
        self._numbers = itertools.count(1)
        self._silent: set[str] = set()
        """User-Ids of connections that proved themselves and have not spoken."""
        self._heard: set[int] = set()
        """Descriptors of connections that have."""
        self._strangers = 0
        """Connections that failed and are not closed yet."""
        self._zap = context.socket(zmq.REP)
        self._zap.bind(_ZAP)
        # Without a bound on it: where it is full, libzmq's own thread would wait for us.
        self._monitor = context.socket(zmq.PAIR)
        self._monitor.rcvhwm = 0

    def guard(self, socket: zmq.asyncio.Socket) -> None:
        """Require the key of every connection, before the socket is bound; inproc has none."""
        socket.curve_server = True
        socket.curve_secretkey = self._secret
        socket.zap_domain = _DOMAIN
        socket.zap_enforce_domain = True
        socket.monitor(_MONITOR, _EVENTS)
        self._monitor.connect(_MONITOR)

    async def run(self) -> None:
        """Answer and count until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._answer())
            group.create_task(self._watch())

    def close(self) -> None:
        """Let go of the sockets, after the guarded one is closed."""
        self._monitor.close(0)
        self._zap.close(0)

    def heard(self, frame: zmq.Frame) -> str:
        """The User-Id of the connection that a frame came by: no two ever have the same.

        Empty for inproc: there was no handshake.
        """
        try:
            user = str(frame.get("User-Id"))
        except zmq.ZMQError:
            return ""
        self._silent.discard(user)
        self._heard.add(frame.get(zmq.SRCFD))
        return user

    async def _answer(self) -> None:
        while True:
            version, request, domain, _, _, mechanism, *proof = await self._zap.recv_multipart()
            # The 5th frame is not the peer's routing id, whatever RFC 27 says: libzmq 4.3.5 has
            # not read that yet, and sends our own.
            known = (domain, mechanism, len(proof)) == (_DOMAIN, b"CURVE", 1)
            if known and hmac.compare_digest(proof[0], self._admitted):
                user = str(next(self._numbers))
                self._silent.add(user)
                answer = [b"200", b"", user.encode(), b""]
            else:
                answer = [b"400", b"not our key", b"", b""]
            await self._zap.send_multipart([version, request, *answer])

    async def _watch(self) -> None:
        """Count the connections that ended unheard: libzmq has no event for most of them."""
        while True:
            event = parse_monitor_message(await self._monitor.recv_multipart())
            kind, value = event["event"], event["value"]
            if kind == zmq.EVENT_DISCONNECTED:
                self._ended(value)
            elif kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH or value in _WITHOUT_KEY:
                self._strangers += 1

    def _ended(self, descriptor: int) -> None:
        if descriptor in self._heard:
            self._heard.discard(descriptor)
        elif self._strangers:
            self._strangers -= 1
            self._refused.refuse(Refusal.STRANGER, "a connection that does not have our key")
        elif self._silent:
            self._silent.pop()
            self._refused.refuse(Refusal.UNHEARD, "a connection of which no message came through")
        else:
            self._refused.refuse(Refusal.GARBAGE, "a connection that did not speak as ours do")
