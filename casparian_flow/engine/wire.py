"""What both ends of a socket agree on: where it may be, its bounds, and the key that opens it.

For each address the Sentinel leaves a key file in the runtime folder, which only its own user can
enter. CurveZMQ checks inside libzmq's handshake that the peer has read it, and that whoever
listens is the Sentinel that wrote it: a secret sent as text would be given to anybody who takes
the port while no Sentinel does. An inproc address is our own process and has no key.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
import socket
import stat
from pathlib import Path
from typing import NamedTuple

import zmq

from casparian_flow import config
from casparian_flow.atomic import make_folder, write_once
from casparian_flow.errors import CasparianError, ConfigError
from casparian_flow.protocol import FRAME_LIMIT

HANDSHAKE_MS = 5_000
"""A connection that has not proved itself by then is closed."""

HEARTBEAT_MS = 5_000
SILENCE_MS = 15_000
"""libzmq asks a silent peer whether it lives, and closes the connection when nothing comes."""

QUEUE_LIMIT = 1_000
"""Messages kept for a peer that does not read them, and from one that we do not read."""

_LIBZMQ = (4, 3, 5)
_TCP = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+\]|[^][:/;*]+):([0-9]{1,5})")


class Key(NamedTuple):
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


def connect(peer: zmq.Socket, endpoint: str, key: Key) -> None:
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


def leave_key(endpoint: str, key: Key) -> None:
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


def read_key(endpoint: str) -> Key | None:
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
    return Key(*words)


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
