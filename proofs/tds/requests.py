"""What a driver sends ([MS-TDS] 2.2.6): login, batch, procedure call, transaction, bulk rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

from proofs.tds.reader import Reader
from proofs.tds.values import SqlType, read_type, read_value, value_reader

PROCEDURES = {
    10: "sp_executesql", 11: "sp_prepare", 12: "sp_execute", 13: "sp_prepexec", 15: "sp_unprepare",
}  # fmt: skip
"""Well-known procedures by number (2.2.6.6)."""


class Login(NamedTuple):
    """Who connects, and to what (2.2.6.4)."""

    user: str
    password: str
    database: str
    program: str
    packet_bytes: int


class Parameter(NamedTuple):
    """A parameter of a procedure call (2.2.6.6)."""

    name: str
    kind: SqlType
    value: Any
    output: bool = False


class Call(NamedTuple):
    """A procedure call (2.2.6.6)."""

    procedure: str
    parameters: list[Parameter]


class Verb(IntEnum):
    """What a transaction manager request wants (2.2.6.9)."""

    BEGIN = 5
    COMMIT = 7
    ROLLBACK = 8


@dataclass(frozen=True)
class Bulk:
    """The rows of a bulk load (2.2.6.1)."""

    names: list[str] = field(default_factory=list)
    kinds: list[SqlType] = field(default_factory=list)
    rows: list[tuple[Any, ...]] = field(default_factory=list)


def read_login(body: bytes) -> Login:
    """LOGIN7 (2.2.6.4)."""
    reader = Reader(body, 8)
    packet_bytes = reader.u32()

    def text(index: int) -> bytes:
        at = Reader(body, 36 + 4 * index)
        offset, characters = at.u16(), at.u16()
        return body[offset : offset + 2 * characters]

    def plain(index: int) -> str:
        return text(index).decode("utf-16-le")

    # Each byte of the password has its halves swapped, and is then combined with 0xA5.
    turned = (byte ^ 0xA5 for byte in text(2))
    password = bytes((byte >> 4 | byte << 4) & 0xFF for byte in turned).decode("utf-16-le")
    return Login(plain(1), password, plain(8), plain(3), packet_bytes)


def read_batch(body: bytes) -> str:
    """SQLBatch (2.2.6.7)."""
    reader = _after_headers(body)
    return reader.text(reader.left // 2)


def read_calls(body: bytes) -> list[Call]:
    """RPC request (2.2.6.6); calls that are sent together are told apart by 0xFF."""
    reader = _after_headers(body)
    calls = []
    while reader.left:
        length = reader.u16()
        name = PROCEDURES[reader.u16()] if length == 0xFFFF else reader.text(length)
        reader.u16()  # options
        parameters = []
        while reader.left and reader.data[reader.at] not in {0x80, 0xFF, 0xFE}:
            parameters.append(_read_parameter(reader))
        calls.append(Call(name, parameters))
        if reader.left:
            reader.u8()
    return calls


def read_verb(body: bytes) -> Verb:
    """Transaction manager request (2.2.6.9); isolation levels and names are not used by us."""
    return Verb(_after_headers(body).u16())


def read_bulk(body: bytes) -> Bulk:
    """Bulk load: COLMETADATA, ROW and NBCROW, DONE, as a server would send them.

    Raises:
        ValueError: a token that does not belong there.
    """
    bulk = Bulk()
    at, readers = _read_columns(body, bulk)
    everything = range(len(readers))
    while body[at] != 0xFD:
        token, at, absent = body[at], at + 1, 0
        if token == 0xD2:
            end = at + (len(readers) + 7) // 8
            absent, at = int.from_bytes(body[at:end], "little"), end
        elif token != 0xD1:
            raise ValueError(f"token 0x{token:02x} in a bulk load at byte {at - 1}")
        row: list[Any] = [None] * len(readers)
        for number in everything:
            if not absent >> number & 1:
                row[number], at = readers[number](body, at)
        bulk.rows.append(tuple(row))
    if len(body) - at not in {9, 13}:  # its count of rows has 4 bytes or 8, and is unset
        raise ValueError(f"a bulk load goes on after its end, or ends before it, at byte {at}")
    return bulk


def _read_columns(body: bytes, bulk: Bulk) -> tuple[int, list[Callable[[bytes, int], Any]]]:
    """COLMETADATA: where it ends, and what reads the value of each column."""
    reader = Reader(body)
    if reader.u8() != 0x81:
        raise ValueError("a bulk load that does not begin with its columns")
    for _ in range(reader.u16()):
        reader.take(6)  # user type and flags
        bulk.kinds.append(read_type(reader))
        bulk.names.append(reader.text(reader.u8()))
    return reader.at, [value_reader(kind) for kind in bulk.kinds]


def _read_parameter(reader: Reader) -> Parameter:
    name = reader.text(reader.u8())
    output = bool(reader.u8() & 1)
    kind = read_type(reader)
    return Parameter(name, kind, read_value(reader, kind), output)


def _after_headers(body: bytes) -> Reader:
    """ALL_HEADERS (2.2.5.3) are passed over: we have one request at a time."""
    return Reader(body, Reader(body).u32())
