"""Talking to the daemon from another process: one question, one answer, over its local socket."""

from __future__ import annotations

import os

import zmq

from casparian_flow import daemon_lock, protocol
from casparian_flow.config import DatabaseSettings
from casparian_flow.errors import DaemonGone, ProtocolError

ANSWER_SECONDS = 30.0
"""How long a daemon may take: it may be publishing a plugin."""


def ask(
    database: DatabaseSettings, message: protocol.Deploy | protocol.Ring
) -> protocol.Reply | None:
    """Send a message to the daemon of this database.

    Returns:
        Its reply; None where no daemon runs.

    Raises:
        DaemonGone: one runs, and does not answer.
    """
    if daemon_lock.holder(database.daemon_lock) is None:
        return None
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(f"ipc://{database.control_socket}")
        proof = protocol.Proof(worker="", pid=os.getpid(), token=_token(database))
        socket.send_multipart(protocol.encode(proof))
        socket.send_multipart(protocol.encode(message))
        if not socket.poll(ANSWER_SECONDS * 1000):
            about = daemon_lock.holder(database.daemon_lock)
            if about is None:
                return None
            raise DaemonGone(
                f"the daemon (process {about.get('pid', '?')}) does not answer",
                "look at it, or stop it: what is in the ledger is safe",
            )
        reply = protocol.decode(socket.recv_multipart())
    if isinstance(reply, protocol.Refused):
        raise DaemonGone(f"the daemon refused us: {reply.reason}", "run this as the daemon's user")
    if not isinstance(reply, protocol.Reply):
        raise ProtocolError(f"the daemon answered with a {type(reply).__name__}")
    return reply


def _token(database: DatabaseSettings) -> str:
    """What only those who may read the daemon's files know."""
    try:
        return database.token.read_text()
    except OSError:
        return ""
