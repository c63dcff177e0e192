"""Messages in packets ([MS-TDS] 2.2.3), over a line that can be severed at any byte.

A message is one or more packets of one type; each has a header of eight bytes, and the last one
the status bit END.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from enum import IntEnum
from typing import NamedTuple

HEADER = struct.Struct(">BBHHBB")
"""Type, status, length with the header, session, number, window."""

END = 0x01
RESET = 0x08
PACKET_BYTES = 4096


class Kind(IntEnum):
    """Types of packets (2.2.3.1.1)."""

    BATCH = 1
    RPC = 3
    REPLY = 4
    ATTENTION = 6
    BULK = 7
    TRANSACTION = 14
    LOGIN = 16
    PRELOGIN = 18


class Severed(Exception):
    """The line is no more: the peer left, or the plan said so."""


class Request(NamedTuple):
    """A whole message from the driver."""

    kind: Kind
    body: bytes
    reset: bool
    """The driver hands a pooled connection to another owner: nothing of the last is to stay."""


class Cut(NamedTuple):
    """Where a line is to be severed."""

    connection: int
    """The number of the connection since the server's start, from 1."""
    message: int
    """The number of the request on that connection, from 1: the first is PRELOGIN."""
    inbound: bool
    """While the request comes in (it is then not executed), or while the reply goes out."""
    at: int
    """Bytes of it, headers too, that still pass. A number beyond its end lets all pass and severs
    after it: a whole request that is not executed, or a whole reply to a line that is gone."""
    abrupt: bool = False
    """With a reset instead of an orderly end."""


class Line:
    """One connection's bytes, counted a message.

    Args:
        peer: the connected socket.
        cut: where to sever it; None for never.
    """

    def __init__(self, peer: socket.socket, cut: Cut | None) -> None:
        self._peer = peer
        self._cut = cut
        self.message = 0
        """Number of the request in hand."""
        self.received = self.sent = 0
        """Bytes of the request in hand, and of the reply to it."""
        self.kind = Kind.PRELOGIN
        """Of the request in hand; as soon as its first header is there."""
        self.whole = False
        """Whether all of the request is there."""

    def receive(self) -> Request:
        """The next message.

        Raises:
            Severed: there is none.
        """
        self.message += 1
        self.received = self.sent = 0
        self.whole = False
        body, reset = bytearray(), False
        while True:
            kind, status, length, *_ = HEADER.unpack(self._read(HEADER.size))
            self.kind = Kind(kind)
            body += self._read(length - HEADER.size)
            reset = reset or bool(status & RESET)
            if status & END:
                break
        if self._left(inbound=True) is not None:
            self.sever()
        self.whole = True
        return Request(self.kind, bytes(body), reset)

    def send(self, body: bytes) -> None:
        """Answer the request in hand.

        Raises:
            Severed: the line was cut in the midst of it.
        """
        room = PACKET_BYTES - HEADER.size
        chunks = [body[start : start + room] for start in range(0, len(body), room)] or [b""]
        packets = bytearray()
        for number, chunk in enumerate(chunks, start=1):
            status = END if number == len(chunks) else 0
            packets += HEADER.pack(Kind.REPLY, status, HEADER.size + len(chunk), 0, number % 256, 0)
            packets += chunk
        # In one go: the driver holds the interpreter's lock while it fetches, and so this thread
        # could not send it the rest.
        self._write(bytes(packets))
        if self._left(inbound=False) is not None:
            self.sever()

    def sever(self) -> None:
        """Cut it, now.

        Raises:
            Severed: always.
        """
        if self._cut and self._cut.abrupt:
            self._peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()
        raise Severed("by plan")

    def close(self) -> None:
        """Hang up; may be called twice, and by another thread than the one that reads."""
        with contextlib.suppress(OSError):
            if not (self._cut and self._cut.abrupt):
                self._peer.shutdown(socket.SHUT_RDWR)
        self._peer.close()

    def _left(self, inbound: bool) -> int | None:
        """How many more bytes pass this way; None for all."""
        cut = self._cut
        if cut is None or (cut.message, cut.inbound) != (self.message, inbound):
            return None
        return max(0, cut.at - (self.received if inbound else self.sent))

    def _read(self, wanted: int) -> bytes:
        left = self._left(inbound=True)
        passing = wanted if left is None else min(wanted, left)
        try:
            got = self._peer.recv(passing, socket.MSG_WAITALL) if passing else b""
        except OSError as error:
            raise Severed(str(error)) from error
        self.received += len(got)
        if len(got) < passing:
            raise Severed("the peer left")
        if passing < wanted:
            self.sever()
        return got

    def _write(self, chunk: bytes) -> None:
        left = self._left(inbound=False)
        passing = chunk if left is None else chunk[:left]
        try:
            self._peer.sendall(passing)
        except OSError as error:
            raise Severed(str(error)) from error
        self.sent += len(passing)
        if len(passing) < len(chunk):
            self.sever()
