"""What both ends of a socket agree on: where it may be, its bounds, and the key that opens it.

For each address the Sentinel leaves a key file in the runtime folder, which only its own user can
enter. CurveZMQ checks inside libzmq's handshake that the peer has read it, and that whoever
listens is the Sentinel that wrote it: a secret sent as text would be given to anybody who takes
the port while no Sentinel does. An inproc address is our own process and has no key.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import itertools
import logging
import os
import re
import shlex
import socket
import stat
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import zmq
import zmq.asyncio
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from casparian_flow import config
from casparian_flow.durable import make_folder, write_once
from casparian_flow.errors import CasparianError, ConfigError
from casparian_flow.protocol import FRAME_LIMIT

log = logging.getLogger(__name__)


HANDSHAKE_MS = 5_000
"""A connection that has not proved itself by then is closed."""

HEARTBEAT_MS = 5_000
SILENCE_MS = 15_000
"""libzmq asks a silent peer whether it lives, and closes the connection when nothing comes."""

QUEUE_LIMIT = 1_000
"""Messages kept for a peer that does not read them, and from one that we do not read."""

_LIBZMQ = (4, 3, 5)
_TCP = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+\]|[^][:/;*]+):([0-9]{1,5})")


class CurveKeys(NamedTuple):
    """What a key file holds, each as 40 characters of Z85."""

    sentinel: bytes
    """The Sentinel's public key; its secret half never leaves its process."""
    secret: bytes
    """The secret key of its peers, one for them all."""


def require_zmq() -> None:
    """Return if libzmq can keep strangers out.

    Raises:
        CasparianError: it is older than 4.3.5, or was built without CurveZMQ.
    """
    version = zmq.zmq_version_info()
    if version < _LIBZMQ or not zmq.has("curve"):
        needed = ".".join(map(str, _LIBZMQ))
        raise CasparianError(
            f"libzmq {'.'.join(map(str, version))} cannot keep strangers out: it must be {needed} "
            "or newer and have CurveZMQ",
            "pip install --upgrade --force-reinstall --only-binary pyzmq pyzmq",
        )


def tune(peer: zmq.Socket) -> None:
    """Bound what the other end can cost us, before the socket is bound or connected."""
    peer.linger = 1_000
    peer.maxmsgsize = FRAME_LIMIT
    peer.sndhwm = peer.rcvhwm = QUEUE_LIMIT
    peer.handshake_ivl = HANDSHAKE_MS
    peer.heartbeat_ivl = HEARTBEAT_MS
    peer.heartbeat_timeout = SILENCE_MS


def connect(peer: zmq.Socket, endpoint: str, key: CurveKeys) -> None:
    """Connect to the Sentinel that left this key, and to no other."""
    peer.curve_serverkey = key.sentinel
    peer.curve_secretkey = key.secret
    peer.curve_publickey = zmq.curve_public(key.secret)
    peer.ipv6 = "[" in endpoint
    peer.connect(endpoint)


def loopback(endpoint: str, hint: str) -> str:
    """The TCP endpoint with its host as a number, so that a name is looked up only here.

    Args:
        hint: where the person wrote the endpoint, and what to write there.

    Raises:
        ConfigError: it is not TCP, names no port, or its host is not on the loopback interface.
    """
    found = _TCP.fullmatch(endpoint)
    hosts = _addresses(found[1].strip("[]")) if found else []
    if not found or not 0 < int(found[2]) < 1 << 16 or not _all_loopback(hosts):
        raise ConfigError(
            f"{endpoint} is not a TCP port of this machine's loopback interface, and others are "
            "not used: authenticated remote workers come with scale-out",
            hint,
        )
    host = min(hosts, key=lambda host: host.version)
    return f"tcp://[{host}]:{found[2]}" if host.version == 6 else f"tcp://{host}:{found[2]}"


def _addresses(host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [ipaddress.ip_address(str(place[0]).partition("%")[0]) for *_, place in found]


def _all_loopback(hosts: list[ipaddress.IPv4Address | ipaddress.IPv6Address]) -> bool:
    return bool(hosts) and all(host.is_loopback for host in hosts)


def key_file(endpoint: str) -> Path:
    """Where the key of an endpoint is left: by its port, or beside its local socket."""
    kind, _, place = endpoint.partition("://")
    if kind == "tcp":
        return config.runtime_folder() / f"tcp-{place.rpartition(':')[2]}.key"
    return Path(place).with_suffix(".key")


def leave_key(endpoint: str, key: CurveKeys) -> None:
    """Write the key file of an endpoint (0600), in a folder that is ours alone.

    Raises:
        ConfigError: the folder is not ours alone, or cannot be written.
    """
    file = key_file(endpoint)
    private_folder()
    try:
        write_once(file, b"\n".join(key) + b"\n", mode=0o600)
    except OSError as error:
        raise ConfigError(f"cannot write the key {file}: {error.strerror}") from error


def read_key(endpoint: str) -> CurveKeys | None:
    """The key that the Sentinel at an endpoint left; None where none did.

    Raises:
        ConfigError: the folder is not ours alone, or the file is not a key that we can read.
    """
    file = key_file(endpoint)
    private_folder()
    try:
        words = file.read_bytes().split()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(
            f"cannot read the Sentinel's key {file}: {error.strerror}",
            "run this as the Sentinel's user",
        ) from error
    if [len(word) for word in words] != [40, 40]:
        raise ConfigError(f"{file} is not a key", f"rm {shlex.quote(str(file))}, and restart it")
    return CurveKeys(*words)


def private_folder() -> None:
    """Make sure that the runtime folder is there, and that nobody else can put a file into it.

    Raises:
        ConfigError: it belongs to another user, is open to others or cannot be made.
    """
    folder = config.runtime_folder()
    elsewhere = "or set XDG_RUNTIME_DIR to a folder of your own, for the Sentinel and for this"
    try:
        make_folder(folder, mode=0o700)
        info = os.lstat(folder)
    except OSError as error:
        raise ConfigError(f"cannot make {folder}: {error.strerror}", elsewhere[3:]) from error
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
        raise ConfigError(
            f"{folder} is not a folder of user {os.geteuid()} (its owner is {info.st_uid}); "
            "what another user put there is not trusted",
            f"remove it, {elsewhere}",
        )
    if info.st_mode & 0o077:
        raise ConfigError(
            f"{folder} is open to other users (mode {info.st_mode & 0o777:o}); "
            "what they put there is not trusted",
            f"chmod 700 {shlex.quote(str(folder))}, {elsewhere}",
        )


# The Sentinel's side of the handshake: who gets past it, and how many did not.
#
# libzmq asks us about each connection that speaks CurveZMQ (RFC 27, ZAP); every other one it closes
# by itself, before it keeps a single part of a message, and its monitor tells us.


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
        self.key = CurveKeys(public, peers_secret)
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
