"""ZeroMQ sockets: addresses, limits, key files, and the CurveZMQ handshake.

For each address the Sentinel writes a key file into the runtime folder, which only its user can
enter. CurveZMQ proves in libzmq's handshake that the peer has read the file, and that the listener
wrote it: a secret sent as text would reach any process that takes the port while no Sentinel runs.
An inproc address stays in this process and has no key.
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
"""A connection whose handshake takes longer is closed."""

HEARTBEAT_MS = 5_000
SILENCE_MS = 15_000
"""libzmq pings a silent peer, and closes the connection after SILENCE_MS without an answer."""

QUEUE_LIMIT = 1_000
"""Messages queued per peer, in each direction."""

_LIBZMQ = (4, 3, 5)
_TCP = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+\]|[^][:/;*]+):([0-9]{1,5})")


class CurveKeys(NamedTuple):
    """Content of a key file, each key as 40 characters of Z85."""

    sentinel: bytes
    """The Sentinel's public key; the secret one stays in its process."""
    secret: bytes
    """The secret key that all its peers use."""


def require_zmq() -> None:
    """Raise unless libzmq can authenticate peers.

    Raises:
        CasparianError: libzmq is older than 4.3.5, or has no CurveZMQ.
    """
    version = zmq.zmq_version_info()
    if version < _LIBZMQ or not zmq.has("curve"):
        needed = ".".join(map(str, _LIBZMQ))
        raise CasparianError(
            f"libzmq {'.'.join(map(str, version))} cannot authenticate connections: {needed} "
            "or newer with CurveZMQ is needed",
            "pip install --upgrade --force-reinstall --only-binary pyzmq pyzmq",
        )


def tune(peer: zmq.Socket) -> None:
    """Set limits and timeouts of a socket, before it is bound or connected."""
    peer.linger = 1_000
    peer.maxmsgsize = FRAME_LIMIT
    peer.sndhwm = peer.rcvhwm = QUEUE_LIMIT
    peer.handshake_ivl = HANDSHAKE_MS
    peer.heartbeat_ivl = HEARTBEAT_MS
    peer.heartbeat_timeout = SILENCE_MS


def connect(peer: zmq.Socket, endpoint: str, key: CurveKeys) -> None:
    """Connect to the Sentinel that wrote this key, and to no other."""
    peer.curve_serverkey = key.sentinel
    peer.curve_secretkey = key.secret
    peer.curve_publickey = zmq.curve_public(key.secret)
    peer.ipv6 = "[" in endpoint
    peer.connect(endpoint)


def loopback(endpoint: str, hint: str) -> str:
    """The TCP endpoint with its host as an IP address, so that the name is resolved once.

    Args:
        hint: where the user can set the endpoint, with an example.

    Raises:
        ConfigError: it is not TCP, has no port, or its host is not on the loopback interface.
    """
    match = _TCP.fullmatch(endpoint)
    hosts = _addresses(match[1].strip("[]")) if match else []
    if not match or not 0 < int(match[2]) < 1 << 16 or not _all_loopback(hosts):
        raise ConfigError(
            f"{endpoint} is not a TCP port of this machine's loopback interface; other "
            "addresses are not supported",
            hint,
        )
    host = min(hosts, key=lambda host: host.version)
    return f"tcp://[{host}]:{match[2]}" if host.version == 6 else f"tcp://{host}:{match[2]}"


def _addresses(host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    try:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [ipaddress.ip_address(str(address[0]).partition("%")[0]) for *_, address in infos]


def _all_loopback(hosts: list[ipaddress.IPv4Address | ipaddress.IPv6Address]) -> bool:
    return bool(hosts) and all(host.is_loopback for host in hosts)


def key_file(endpoint: str) -> Path:
    """Path of an endpoint's key file: named by its port, or beside its local socket."""
    transport, _, address = endpoint.partition("://")
    if transport == "tcp":
        return config.runtime_folder() / f"tcp-{address.rpartition(':')[2]}.key"
    return Path(address).with_suffix(".key")


def leave_key(endpoint: str, key: CurveKeys) -> None:
    """Write the key file of an endpoint (mode 0600).

    Raises:
        ConfigError: the folder is not private, or cannot be written.
    """
    file = key_file(endpoint)
    private_folder()
    try:
        write_once(file, b"\n".join(key) + b"\n", mode=0o600)
    except OSError as error:
        raise ConfigError(f"cannot write the key {file}: {error.strerror}") from error


def read_key(endpoint: str) -> CurveKeys | None:
    """Read the key file of an endpoint; None if there is none.

    Raises:
        ConfigError: the folder is not private, the file cannot be read, or is not a key.
    """
    file = key_file(endpoint)
    private_folder()
    try:
        keys = file.read_bytes().split()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(
            f"cannot read the Sentinel's key {file}: {error.strerror}",
            "run this as the Sentinel's user",
        ) from error
    if [len(key) for key in keys] != [40, 40]:
        raise ConfigError(
            f"{file} is not a key", f"rm {shlex.quote(str(file))}, then restart the daemon"
        )
    return CurveKeys(*keys)


def private_folder() -> None:
    """Create the runtime folder, and check that only this user can enter it.

    Raises:
        ConfigError: it belongs to another user, is open to others, or cannot be created.
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
            "files of another user are not trusted",
            f"remove it, {elsewhere}",
        )
    if info.st_mode & 0o077:
        raise ConfigError(
            f"{folder} is open to other users (mode {info.st_mode & 0o777:o}); their files are "
            "not trusted",
            f"chmod 700 {shlex.quote(str(folder))}, {elsewhere}",
        )


# The Sentinel's side of the handshake. libzmq asks us about each CurveZMQ connection (ZAP, RFC 27).
# It closes all others itself, before it stores any message, and reports them to its monitor.

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
    """Why a connection or a message was refused."""

    STRANGER = "stranger"
    """It speaks ZeroMQ but does not have the key."""
    GARBAGE = "garbage"
    """It ended before the end of its handshake: not ZeroMQ, silent, invalid length, or closed."""
    UNHEARD = "unheard"
    """It has the key, but ended before its first message: its routing id belongs to another peer,
    or the message was too large."""
    IDENTITY = "identity"
    """It chose a routing id, or uses that of a Worker with another connection."""
    PARTS = "parts"
    """A message with too many parts."""
    MALFORMED = "malformed"
    """A message that cannot be decoded."""
    UNADMITTED = "unadmitted"
    """A Worker's message from a peer that has not sent Hello."""


class Refusals(Counter[str]):
    """Number of refusals by kind."""

    def refuse(self, kind: Refusal, why: str) -> None:
        """Count a refusal; log the 1st, 10th, 100th... of its kind, so that the log stays small.

        Args:
            why: description for the log.
        """
        self[kind] += 1
        count = self[kind]
        if str(count).strip("0") == "1":
            log.warning("refused %s (%s: %d so far)", why, kind, count)

    def __str__(self) -> str:
        """Such as `stranger 3, garbage 17`."""
        return ", ".join(f"{kind} {count}" for kind, count in self.items())


class Handshake:
    """Admits connections that have the key to one socket.

    Args:
        context: the socket's context; one Handshake a context.
        refused: counts the others.
    """

    def __init__(self, context: zmq.asyncio.Context, refused: Refusals) -> None:
        public, self._secret = zmq.curve_keypair()
        peers_public, peers_secret = zmq.curve_keypair()
        self.key = CurveKeys(public, peers_secret)
        self._admitted = z85.decode(peers_public)
        self._refused = refused
        self._numbers = itertools.count(1)
        self._silent: set[str] = set()
        """User-Ids of admitted connections without a message so far."""
        self._heard: set[int] = set()
        """Descriptors of connections with a message."""
        self._strangers = 0
        """Failed connections that are not closed yet."""
        self._zap = context.socket(zmq.REP)
        self._zap.bind(_ZAP)
        # Unlimited: if its queue were full, libzmq's I/O thread would block.
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
        """Close the sockets, after the guarded one is closed."""
        self._monitor.close(0)
        self._zap.close(0)

    def heard(self, frame: zmq.Frame) -> str:
        """The User-Id of a frame's connection, unique among all connections; empty for inproc."""
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
            # The 5th frame is not the peer's routing id as in RFC 27: libzmq 4.3.5 has not read it
            # yet, and sends our own.
            known = (domain, mechanism, len(proof)) == (_DOMAIN, b"CURVE", 1)
            if known and hmac.compare_digest(proof[0], self._admitted):
                user = str(next(self._numbers))
                self._silent.add(user)
                answer = [b"200", b"", user.encode(), b""]
            else:
                answer = [b"400", b"unknown key", b"", b""]
            await self._zap.send_multipart([version, request, *answer])

    async def _watch(self) -> None:
        """Count connections that end without a message; libzmq has no event for most of them."""
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
            self._refused.refuse(Refusal.STRANGER, "a connection with an unknown key")
        elif self._silent:
            self._silent.pop()
            self._refused.refuse(Refusal.UNHEARD, "a connection that sent no message in time")
        else:
            self._refused.refuse(Refusal.GARBAGE, "a connection that does not speak the protocol")
