"""Send one request to the daemon from another process, over its local socket."""

from __future__ import annotations

import logging
import time

import msgspec
import zmq

from casparian_flow import durable, protocol
from casparian_flow.config import DatabaseSettings
from casparian_flow.engine import wire
from casparian_flow.errors import ConfigError, DaemonGone, ProtocolError

log = logging.getLogger(__name__)

ANSWER_SECONDS = 30.0
"""How long the daemon may take to answer."""

KEY_SECONDS = 5.0
"""How long a starting daemon may take to write its key file."""

DEPLOY_SECONDS = 120.0
"""How long deploying a plugin may take; the Gatekeeper alone may take 60 s."""

STATS_SECONDS = 2.0
"""How long the daemon may take to answer GetStats, which `status` can do without."""

_AS_WHOM = "run this as the daemon's user and with the same XDG_RUNTIME_DIR"

_FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
_FAILED |= zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


def ask(
    database: DatabaseSettings,
    message: protocol.Deploy | protocol.Ring | protocol.GetStats,
    patience: float = ANSWER_SECONDS,
) -> protocol.Reply | None:
    """Send a message to the daemon of this database.

    Args:
        patience: seconds to wait for the answer.

    Returns:
        The daemon's reply; None if no daemon runs.

    Raises:
        DaemonGone: a daemon runs, but refuses the connection or does not answer.
    """
    refused: wire.CurveKeys | None = None
    while (about := durable.daemon_lock_holder(database.daemon_lock)) is not None:
        key = _key(database.control_endpoint, refused, min(patience, KEY_SECONDS))
        try:
            frames = _exchange(database.control_endpoint, key, protocol.encode(message), patience)
        except TimeoutError as error:
            if durable.daemon_lock_holder(database.daemon_lock) is None:
                return None
            raise DaemonGone(
                f"the daemon (process {about.get('pid', '?')}) does not answer",
                "wait, or stop that process: the ledger is safe",
            ) from error
        if frames is not None:
            return _reply(frames)
        refused = key  # try again once: the key may be that of a daemon that died
    return None


def wake(database: DatabaseSettings, scan: bool = False) -> None:
    """Tell the daemon, if one runs, that the ledger has changed.

    Args:
        scan: ask it for a full scan as well.
    """
    try:
        ask(database, protocol.Ring(scan=scan))
    except DaemonGone as error:
        log.warning(
            "%s; the daemon will pick up the change by itself within seconds", error.message
        )


def refusals(database: DatabaseSettings) -> dict[str, int]:
    """Refused connections and messages by kind; empty if no daemon answers."""
    try:
        reply = ask(database, protocol.GetStats(), STATS_SECONDS)
    except DaemonGone:
        return {}
    return msgspec.json.decode(reply.text, type=dict[str, int]) if reply else {}


def _key(endpoint: str, refused: wire.CurveKeys | None, patience: float) -> wire.CurveKeys:
    """The daemon's keys, from a folder that only its user can enter."""
    file = wire.key_file(endpoint)
    deadline = time.monotonic() + patience
    try:
        while (key := wire.read_key(endpoint)) is None:
            if time.monotonic() > deadline:
                raise DaemonGone(
                    f"cannot connect to the daemon: its key file {file} does not exist", _AS_WHOM
                )
            time.sleep(0.05)
    except ConfigError as error:
        raise DaemonGone(error.message, error.hint) from error
    if key == refused:
        raise DaemonGone(
            f"the daemon refused the connection: its key is not the one in {file}", _AS_WHOM
        )
    return key


def _exchange(
    endpoint: str, key: wire.CurveKeys, message: list[bytes], patience: float
) -> list[bytes] | None:
    """The frames of the answer; None if the daemon does not accept this key.

    Raises:
        TimeoutError: there was no answer.
    """
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        wire.tune(peer)
        peer.linger = 0
        with peer.get_monitor_socket(_FAILED) as monitor:
            wire.connect(peer, endpoint, key)
            peer.send_multipart(message)
            poller = zmq.Poller()
            poller.register(peer, zmq.POLLIN)
            poller.register(monitor, zmq.POLLIN)
            started = time.monotonic()
            ready = dict(poller.poll(patience * 1000))
            took = time.monotonic() - started
            peer.disable_monitor()
        if peer in ready:
            frames: list[bytes] = peer.recv_multipart()
            return frames
        if not ready or took * 1000 > wire.HANDSHAKE_MS / 2:
            raise TimeoutError  # not refused: a refusal comes at once
        return None


def _reply(frames: list[bytes]) -> protocol.Reply:
    message = protocol.decode(frames)
    if not isinstance(message, protocol.Reply):
        raise ProtocolError(f"the daemon sent an unexpected answer ({type(message).__name__})")
    return message
