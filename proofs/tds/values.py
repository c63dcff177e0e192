"""SQL types and their values ([MS-TDS] 2.2.5.4 to 2.2.5.6), as bytes in both directions.

Values are Python's own: int, bool, float, Decimal, str, bytes, date, time, datetime (with an offset
for datetimeoffset), and None. A time whose seventh digit is not zero has no Python type: it is a
`Finer`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Context, Decimal
from typing import Any, NamedTuple

from proofs.tds.reader import Reader

COLLATION = bytes.fromhex("0904d00034")
"""SQL_Latin1_General_CP1_CI_AS."""

MAX = 0xFFFF
"""The size of a `(max)` type, whose values come in chunks (PLP)."""

_LONG, _INT = struct.Struct("<Q"), struct.Struct("<I")

PLP_NULL = 2**64 - 1
PLP_UNKNOWN = 2**64 - 2

EXACT = Context(prec=38)

_FIXED = {0x1F: (0x1F, 0), 0x30: (0x26, 1), 0x32: (0x68, 1), 0x34: (0x26, 2), 0x38: (0x26, 4),
          0x7F: (0x26, 8), 0x3B: (0x6D, 4), 0x3E: (0x6D, 8), 0x3D: (0x6F, 8)}  # fmt: skip
"""Types without a length before their values -> the same type with one."""

_WIDE = {0xE7, 0xEF, 0xA7, 0xAF, 0xA5, 0xAD}
"""Types whose values have a length of two bytes, or come in chunks."""

_TEXT = {0xE7, 0xEF, 0xA7, 0xAF}
_SCALED = {0x29, 0x2A, 0x2B}
_DECIMAL = {0x6A, 0x6C}
_INTEGERS = {1: "<B", 2: "<h", 4: "<i", 8: "<q"}

_NAMES = {
    "tinyint": (0x26, 1), "smallint": (0x26, 2), "int": (0x26, 4), "bigint": (0x26, 8),
    "integer": (0x26, 4), "bit": (0x68, 1), "real": (0x6D, 4), "float": (0x6D, 8),
    "date": (0x28, 3),
    "nvarchar": (0xE7, 0), "nchar": (0xEF, 0), "sysname": (0xE7, 256), "varchar": (0xA7, 0),
    "char": (0xAF, 0), "varbinary": (0xA5, 0), "binary": (0xAD, 0), "decimal": (0x6A, 17),
    "numeric": (0x6C, 17), "time": (0x29, 5), "datetime2": (0x2A, 8), "datetimeoffset": (0x2B, 10),
    "uniqueidentifier": (0x24, 16), "datetime": (0x6F, 8),
}  # fmt: skip


class Finer(NamedTuple):
    """A moment with a seventh digit after the second."""

    moment: time | datetime
    digit: int


@dataclass(frozen=True)
class SqlType:
    """A type as TYPE_INFO says it (2.2.5.6)."""

    code: int
    size: int
    """Bytes at the most; MAX for a `(max)` type."""
    precision: int = 0
    scale: int = 0
    bare: bool = False
    """Its values have no length before them."""

    @property
    def chunked(self) -> bool:
        return self.code in _WIDE and self.size == MAX

    @property
    def is_text(self) -> bool:
        return self.code in _TEXT


NVARCHAR_MAX = SqlType(0xE7, MAX)
INT = SqlType(0x26, 4)
BIGINT = SqlType(0x26, 8)


def declared(words: str) -> SqlType:
    """The type that T-SQL calls so, such as `decimal(38, 10)`.

    Raises:
        ValueError: none that is known here.
    """
    parts = re.fullmatch(r"\s*(\w+)\s*(?:\(\s*(\w+)\s*(?:,\s*(\d+)\s*)?\))?\s*", words)
    if parts is None or parts[1].lower() not in _NAMES:
        raise ValueError(f"no type {words!r} is known here")
    code, size = _NAMES[parts[1].lower()]
    if code in _WIDE:
        unit = 2 if code in {0xE7, 0xEF} else 1
        if (parts[2] or "").lower() == "max":
            return SqlType(code, MAX)
        return SqlType(code, size or unit * int(parts[2] or 1))
    if code in _DECIMAL:
        return SqlType(code, size, int(parts[2] or 18), int(parts[3] or 0))
    if code in _SCALED:
        return SqlType(code, size, scale=int(parts[2] or 7))
    return SqlType(code, size)


def read_type(reader: Reader) -> SqlType:
    """TYPE_INFO (2.2.5.6)."""
    code = reader.u8()
    if code in _FIXED:
        return SqlType(*_FIXED[code], bare=True)
    if code == 0x28:
        return SqlType(code, 3)
    if code in _SCALED:
        return SqlType(code, 0, scale=reader.u8())
    if code in _WIDE:
        size = reader.u16()
        if code in _TEXT:
            reader.take(5)
        return SqlType(code, size)
    size = reader.u8()
    if code in _DECIMAL:
        return SqlType(code, size, reader.u8(), reader.u8())
    if code not in {0x26, 0x68, 0x6D, 0x6F, 0x24}:
        raise ValueError(f"type 0x{code:02x} is not known here")
    return SqlType(code, size)


def write_type(kind: SqlType) -> bytes:
    """TYPE_INFO (2.2.5.6)."""
    if kind.code == 0x28:
        return bytes([kind.code])
    if kind.code in _SCALED:
        return bytes([kind.code, kind.scale])
    if kind.code in _WIDE:
        return struct.pack("<BH", kind.code, kind.size) + (COLLATION if kind.code in _TEXT else b"")
    if kind.code in _DECIMAL:
        return bytes([kind.code, kind.size, kind.precision, kind.scale])
    return bytes([kind.code, kind.size])


def read_value(reader: Reader, kind: SqlType) -> Any:
    """A value of that type."""
    value, reader.at = value_reader(kind)(reader.data, reader.at)
    return value


def value_reader(kind: SqlType) -> Callable[[bytes, int], tuple[Any, int]]:
    """What reads a value of that type from a place in some bytes, and says where it ends."""
    decode = decoder(kind)

    def short(data: bytes, at: int) -> tuple[Any, int]:
        at += 1
        end = at + data[at - 1]
        return (decode(data[at:end]) if end > at else None), end

    def long(data: bytes, at: int) -> tuple[Any, int]:
        length = int.from_bytes(data[at : at + 2], "little")
        at += 2
        return (None, at) if length == MAX else (decode(data[at : at + length]), at + length)

    def chunked(data: bytes, at: int) -> tuple[Any, int]:
        whole, at = _read_chunks(data, at)
        return (None if whole is None else decode(whole)), at

    def bare(data: bytes, at: int) -> tuple[Any, int]:
        end = at + kind.size
        return (decode(data[at:end]) if kind.size else None), end

    if kind.bare:
        return bare
    if kind.code in _WIDE:
        return chunked if kind.size == MAX else long
    return short


def write_value(kind: SqlType, value: Any) -> bytes:
    """A value of that type."""
    data = None if value is None else encode(kind, value)
    if kind.chunked:
        if data is None:
            return struct.pack("<Q", PLP_NULL)
        chunk = struct.pack("<I", len(data)) + data if data else b""
        return struct.pack("<Q", len(data)) + chunk + bytes(4)
    if kind.code in _WIDE:
        return struct.pack("<H", 0xFFFF if data is None else len(data)) + (data or b"")
    return bytes([len(data or b"")]) + (data or b"")


def _read_chunks(data: bytes, at: int) -> tuple[bytes | None, int]:
    """Partially length-prefixed bytes (2.2.5.2.3), and where they end."""
    (total,) = _LONG.unpack_from(data, at)
    at += 8
    if total == PLP_NULL:
        return None, at
    chunks = []
    while length := _INT.unpack_from(data, at)[0]:
        chunks.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    whole = b"".join(chunks)
    if total not in {PLP_UNKNOWN, len(whole)}:
        raise ValueError(f"a value of {total} bytes came as {len(whole)}")
    return whole, at + 4


def decoder(kind: SqlType) -> Callable[[bytes], Any]:
    """What makes a value of its bytes (2.2.5.5).

    Raises:
        ValueError: it is a type that nobody here sends.
    """
    match kind.code:
        case 0x26:
            return lambda data: int.from_bytes(data, "little", signed=len(data) > 1)
        case 0x68:
            return lambda data: data[0] == 1
        case 0x6D:
            return lambda data: struct.unpack("<f" if len(data) == 4 else "<d", data)[0]
        case 0x6A | 0x6C:
            return lambda data: Decimal(
                int.from_bytes(data[1:], "little") * (1 if data[0] else -1)
            ).scaleb(-kind.scale, EXACT)
        case 0xE7 | 0xEF:
            return lambda data: data.decode("utf-16-le", "surrogatepass")
        case 0xA7 | 0xAF:
            return lambda data: data.decode("cp1252")
        case 0x28:
            return lambda data: date.fromordinal(int.from_bytes(data, "little") + 1)
        case 0x29:
            return lambda data: _exact(*_time(kind, data))
        case 0x2A:
            return lambda data: _exact(*_moment(kind, data))
        case 0x2B:
            return lambda data: _exact(*_zoned(kind, data))
        case 0xA5 | 0xAD | 0x24:
            return bytes
        case 0x1F:
            return lambda data: None
        case code:
            raise ValueError(f"values of type 0x{code:02x} are not known here")


def encode(kind: SqlType, value: Any) -> bytes:
    """The bytes of a value (2.2.5.5)."""
    match kind.code:
        case 0x26:
            return struct.pack(_INTEGERS[kind.size], value)
        case 0x68:
            return bytes([bool(value)])
        case 0x6D:
            return struct.pack("<f" if kind.size == 4 else "<d", value)
        case 0x6A | 0x6C:
            whole = int(value.scaleb(kind.scale, EXACT))
            return bytes([whole >= 0]) + abs(whole).to_bytes(kind.size - 1, "little")
        case 0xE7 | 0xEF:
            return str(value).encode("utf-16-le", "surrogatepass")
        case 0xA7 | 0xAF:
            return str(value).encode("cp1252")
        case 0x28:
            return _days(value)
        case 0x29:
            return _ticks(kind, value)
        case 0x2A:
            return _ticks(kind, value) + _days(_plain(value))
        case 0x2B:
            moment = _plain(value)
            utc = moment.astimezone(UTC)
            ticks = _ticks(kind, value._replace(moment=utc) if value is not moment else utc)
            offset = int(moment.utcoffset() // timedelta(minutes=1))
            return ticks + _days(utc) + offset.to_bytes(2, "little", signed=True)
        case 0x6F:
            since = value - datetime(1900, 1, 1)
            thirds = (since.seconds * 10**6 + since.microseconds) * 3 // 10**4
            return struct.pack("<iI", since.days, thirds)
        case 0xA5 | 0xAD | 0x24:
            return bytes(value)
        case _:
            raise ValueError(f"values of type 0x{kind.code:02x} are not known here")


_EPOCH = datetime(1, 1, 1)


def _time(kind: SqlType, data: bytes) -> tuple[time, int]:
    """A time of day to the microsecond, and the digit after it."""
    ticks = int.from_bytes(data, "little") * 10 ** (7 - kind.scale)
    return (_EPOCH + timedelta(microseconds=ticks // 10)).time(), ticks % 10


def _moment(kind: SqlType, data: bytes) -> tuple[datetime, int]:
    ticks = int.from_bytes(data[:-3], "little") * 10 ** (7 - kind.scale)
    days = int.from_bytes(data[-3:], "little")
    return _EPOCH + timedelta(days, 0, ticks // 10), ticks % 10


def _zoned(kind: SqlType, data: bytes) -> tuple[datetime, int]:
    moment, digit = _moment(kind, data[:-2])
    minutes = int.from_bytes(data[-2:], "little", signed=True)
    moment = moment.replace(tzinfo=UTC)
    return (moment.astimezone(timezone(timedelta(minutes=minutes))) if minutes else moment), digit


def _exact(moment: time | datetime, digit: int) -> time | datetime | Finer:
    return Finer(moment, digit) if digit else moment


def _plain(value: Any) -> Any:
    return value.moment if isinstance(value, Finer) else value


def _days(value: Any) -> bytes:
    return int(value.toordinal() - 1).to_bytes(3, "little")


def _ticks(kind: SqlType, value: Any) -> bytes:
    """A time of day in the type's parts of a second."""
    moment, digit = _plain(value), value.digit if isinstance(value, Finer) else 0
    seconds = (moment.hour * 60 + moment.minute) * 60 + moment.second
    ticks = (seconds * 10**7 + moment.microsecond * 10 + digit) // 10 ** (7 - kind.scale)
    return int(ticks).to_bytes(3 if kind.scale < 3 else 4 if kind.scale < 5 else 5, "little")
