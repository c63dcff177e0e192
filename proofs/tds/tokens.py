"""What a server answers ([MS-TDS] 2.2.7), as bytes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from proofs.tds.packets import PACKET_BYTES
from proofs.tds.values import COLLATION, SqlType, write_type, write_value

VERSION = 0x74000004
"""TDS 7.4."""

SERVER = "tds-double"

DONE, DONE_PROCEDURE, DONE_IN_PROCEDURE = 0xFD, 0xFE, 0xFF
MORE, ERROR, COUNT, ATTENTION = 0x01, 0x02, 0x10, 0x20
"""Bits of a DONE's status (2.2.7.6)."""

SELECT, INSERT, DELETE, UPDATE, BULK = 0xC1, 0xC3, 0xC4, 0xC5, 0xF0
"""What a DONE's count is of."""


def prelogin() -> bytes:
    """PRELOGIN (2.2.6.5): our version; no encryption, no MARS."""
    values = [
        (0, struct.pack(">BBHH", 16, 0, 1000, 0)),
        (1, b"\x02"),  # ENCRYPT_NOT_SUP
        (2, b"\x00"),
        (4, b"\x00"),
    ]
    head, body = b"", b""
    for option, value in values:
        head += struct.pack(">BHH", option, 5 * len(values) + 1 + len(body), len(value))
        body += value
    return head + b"\xff" + body


class Answer(NamedTuple):
    """What a statement is answered with, before the DONE at its end."""

    body: bytes = b""
    status: int = 0
    rows: int = 0
    command: int = 0


def logged_in(database: str) -> bytes:
    """The whole answer to a login."""
    return (
        changed(1, database, "master")
        + collation()
        + changed(2, "us_english")
        + login_ack()
        + changed(4, str(PACKET_BYTES), str(PACKET_BYTES))
        + done()
    )


def replied(answers: Sequence[Answer], *, within: bool = False) -> bytes:
    """The answers of some statements.

    Args:
        within: of a procedure, which has more to say after them.
    """
    body = b""
    for number, answer in enumerate(answers or [Answer()], start=1):
        more = MORE if within or number < len(answers) else 0
        token = DONE_IN_PROCEDURE if within else DONE
        body += answer.body + done(token, answer.status | more, answer.rows, answer.command)
    return body


def login_ack() -> bytes:
    """LOGINACK (2.2.7.14)."""
    body = struct.pack(">BI", 1, VERSION) + _b_text("Microsoft SQL Server") + bytes([16, 0, 3, 232])
    return _sized(0xAD, body)


def changed(kind: int, new: str, old: str = "") -> bytes:
    """ENVCHANGE (2.2.7.9) of a text: 1 the database, 2 the language, 4 the bytes of a packet."""
    return _sized(0xE3, bytes([kind]) + _b_text(new) + _b_text(old))


def collation() -> bytes:
    """ENVCHANGE 7: the collation of the database."""
    return _sized(0xE3, bytes([7, len(COLLATION)]) + COLLATION + b"\0")


def began(transaction: int) -> bytes:
    """ENVCHANGE 8: this transaction is the connection's from now on."""
    return _sized(0xE3, bytes([8, 8]) + struct.pack("<Q", transaction) + b"\0")


def ended(transaction: int, *, committed: bool) -> bytes:
    """ENVCHANGE 9 and 10: the transaction is over."""
    kind = 9 if committed else 10
    return _sized(0xE3, bytes([kind, 0, 8]) + struct.pack("<Q", transaction))


def was_reset() -> bytes:
    """ENVCHANGE 18: the connection is as new."""
    return _sized(0xE3, bytes([18, 0, 0]))


def error(number: int, state: int, severity: int, words: str) -> bytes:
    """ERROR (2.2.7.10)."""
    return _sized(0xAA, _message(number, state, severity, words))


def info(number: int, words: str) -> bytes:
    """INFO (2.2.7.13)."""
    return _sized(0xAB, _message(number, 1, 0, words))


def done(token: int = DONE, status: int = 0, rows: int = 0, command: int = 0) -> bytes:
    """DONE, DONEPROC, DONEINPROC (2.2.7.6 to 2.2.7.8)."""
    return struct.pack("<BHHQ", token, status, command, rows)


def columns(names: Sequence[str], kinds: Sequence[SqlType]) -> bytes:
    """COLMETADATA (2.2.7.4); every column may be null."""
    described = [
        struct.pack("<IH", 0, 0x09) + write_type(kind) + _b_text(name)
        for name, kind in zip(names, kinds, strict=True)
    ]
    return struct.pack("<BH", 0x81, len(described)) + b"".join(described)


def row(kinds: Sequence[SqlType], values: Sequence[Any]) -> bytes:
    """ROW (2.2.7.19)."""
    return b"\xd1" + b"".join(map(write_value, kinds, values))


def table(names: Sequence[str], kinds: Sequence[SqlType], rows: Sequence[Sequence[Any]]) -> Answer:
    """The answer to a SELECT."""
    body = columns(names, kinds) + b"".join([row(kinds, values) for values in rows])
    return Answer(body, COUNT, len(rows), SELECT)


def counted(command: int, rows: int) -> Answer:
    """The answer to a statement that touched so many rows."""
    return Answer(b"", COUNT, rows, command)


def return_status(value: int) -> bytes:
    """RETURNSTATUS (2.2.7.18)."""
    return struct.pack("<Bi", 0x79, value)


def return_value(ordinal: int, name: str, kind: SqlType, value: Any) -> bytes:
    """RETURNVALUE (2.2.7.19) of an output parameter."""
    head = struct.pack("<BH", 0xAC, ordinal) + _b_text(name) + struct.pack("<BIH", 1, 0, 0)
    return head + write_type(kind) + write_value(kind, value)


def _message(number: int, state: int, severity: int, words: str) -> bytes:
    text = words.encode("utf-16-le")
    head = struct.pack("<iBBH", number, state, severity, len(text) // 2)
    return head + text + _b_text(SERVER) + _b_text("") + struct.pack("<I", 1)


def _sized(token: int, body: bytes) -> bytes:
    return struct.pack("<BH", token, len(body)) + body


def _b_text(text: str) -> bytes:
    """B_VARCHAR: its length in code units in one byte before it."""
    data = text.encode("utf-16-le")
    return bytes([len(data) // 2]) + data
