"""What a batch of Arrow data unfolds to, told from its metadata: its values stay untouched.

A batch of 312 bytes may hold half a billion values: a list of nulls has a length and no data, and
many columns may lie in the same bytes. So what a batch costs is counted in the values that it says
it has, before a library takes its word: of each array, at every depth, its buffers or VALUE_BYTES a
value, whichever is more. Two layouts leave no such count, since many values may share one place of
their own data: dictionaries and views. The wire takes neither; the guest's side writes them out.

The metadata are flatbuffers (Arrow's format/Schema.fbs and format/Message.fbs), read here by hand:
pyarrow shows neither the lengths nor the number of the fields before it has made them all. In them
too many may share one place: a thousand fields the one name, and the reader copies it for each. So
texts are counted as often as they are named, and may have no more bytes than the metadata.

Standard library only: the guest's side counts by the same rule, and sends smaller batches.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

VALUE_BYTES = 4
"""Bytes that any value counts for, a null or a boolean too: about what writing one takes."""
FIELDS_LIMIT = 1 << 15
"""Columns, and fields in them, of one batch: each costs the reader some 6 KiB and 130 us."""
DEPTH_LIMIT = 60
"""Levels of nesting; pyarrow reads no batch of more than 63."""
SCHEMA_LIMIT = 4 << 20
"""Bytes of the metadata of one message: a long name costs its reader thirty times its length."""
EXTENSION_LIMIT = 4096
"""Bytes in which an extension type may describe itself: Arrow reads them as JSON, and some versions
call themselves for each level of it, to the end of the stack."""
PAIR_BYTES = 24
"""Bytes of a key and its value besides their texts, at least."""

_CONTINUATION = 0xFFFFFFFF
_HEADER_TYPE, _HEADER, _SCHEMA, _DICTIONARY, _BATCH = 1, 2, 1, 2, 3
_MESSAGE_PAIRS = 4
_SCHEMA_FIELDS, _SCHEMA_PAIRS = 1, 2
_FIELD_NAME, _FIELD_TYPE_KIND, _FIELD_TYPE, _FIELD_DICTIONARY, _FIELD_CHILDREN = 0, 2, 3, 4, 5
_FIELD_PAIRS = 6
_BATCH_LENGTH, _BATCH_NODES, _BATCH_BUFFERS, _BATCH_COMPRESSION = 0, 1, 2, 3

_BUFFERS = {
    1: 0, 2: 2, 3: 2, 4: 3, 5: 3, 6: 2, 7: 2, 8: 2, 9: 2, 10: 2, 11: 2, 12: 2, 13: 1, 15: 2, 16: 1,
    17: 2, 18: 2, 19: 3, 20: 3, 21: 2,
}  # fmt: skip
"""Buffers of an array by its type's number in Schema.fbs; a type that is not here is refused."""
_REFUSED = {14: "a union", 22: "a run-end-encoded", 23: "a view", 24: "a view", 25: "a view",
            26: "a view"}  # fmt: skip
_TIMESTAMP, _INTERVAL, _LIST, _STRUCT, _FIXED_LIST, _MAP, _LARGE_LIST = 10, 11, 12, 13, 16, 17, 21
_MONTH_DAY_NANO = 2
_EXTENSION_TEXT = b"ARROW:extension:metadata"
_NESTED = frozenset((_LIST, _STRUCT, _FIXED_LIST, _MAP, _LARGE_LIST))


class Unfit(ValueError):
    """A batch that the wire does not take; the words say why."""


class Size(NamedTuple):
    """What one batch says of itself."""

    rows: int
    columns: int
    unfolded_bytes: int


def measure(stream: memoryview) -> Size:
    """What the one batch of an IPC stream unfolds to.

    Only the framing and the metadata are read. That the buffers are there, and hold what they
    should, is for Arrow to say.

    Raises:
        Unfit: the stream is not one schema and one uncompressed record batch, or it is one of more
            fields or levels, longer metadata, or another layout than the wire takes.
        struct.error, IndexError: the metadata lead out of themselves.
    """
    columns, kinds = 0, None
    size = None
    at = 0
    batches = 0
    while at + 8 <= len(stream):
        mark, length = struct.unpack_from("<Ii", stream, at)
        if mark != _CONTINUATION:
            raise Unfit("a message that does not begin as one")
        if length == 0:
            break
        if not 8 <= length <= SCHEMA_LIMIT:
            raise Unfit(f"metadata of {length} bytes; the limit is {SCHEMA_LIMIT}")
        data = stream[at + 8 : at + 8 + length]
        message = _follow(data, 0)
        kind = _scalar(data, message, _HEADER_TYPE, "<B")
        table = _follow(data, _member(data, message, _HEADER))
        texts = _Texts(data)
        texts.add_pairs(_member(data, message, _MESSAGE_PAIRS))
        if kind == _SCHEMA and kinds is None:
            columns, kinds = _layout(data, table, texts)
        elif kind == _BATCH and kinds is not None:
            batches += 1
            size = size or _batch(data, table, columns, kinds)
        elif kind == _DICTIONARY:
            raise Unfit("a dictionary")
        else:
            raise Unfit("a message that is not due")
        body = _scalar(data, message, 3, "<q")
        if body < 0:
            raise Unfit(f"a body of {body} bytes")
        at += 8 + length + body
    if batches != 1 or size is None:
        raise Unfit(f"a stream of {batches} batches where one was due")
    return size


class _Texts:
    """The texts of one message, counted as often as something has them."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._room = len(data)

    def add(self, position: int) -> tuple[int, int]:
        """Count the text that a member leads to, if there is one: where it begins and ends."""
        start, count = _vector(self._data, position, 1) if position else (0, 0)
        self._take(count)
        return start, start + count

    def add_pairs(self, position: int) -> None:
        """Count keys and values."""
        start, count = _vector(self._data, position, 4) if position else (0, 0)
        self._take(PAIR_BYTES * count)
        for number in range(count):
            pair = _follow(self._data, start + 4 * number)
            key, key_end = self.add(_member(self._data, pair, 0))
            value, value_end = self.add(_member(self._data, pair, 1))
            if value_end - value > EXTENSION_LIMIT and self._data[key:key_end] == _EXTENSION_TEXT:
                raise Unfit(
                    f"an extension type that takes more than {EXTENSION_LIMIT} bytes to say"
                )

    def _take(self, count: int) -> None:
        self._room -= count
        if self._room < 0:
            raise Unfit("metadata in which many texts share one place")


def _layout(data: memoryview, schema: int, texts: _Texts) -> tuple[int, bytes]:
    """How many columns a schema has, and the kind of each array of a batch, as they come there."""
    kinds = bytearray()
    texts.add_pairs(_member(data, schema, _SCHEMA_PAIRS))
    columns = _elements(data, _member(data, schema, _SCHEMA_FIELDS))
    waiting = [(field, 1) for field in reversed(columns)]
    while waiting:
        field, depth = waiting.pop()
        kind = _scalar(data, field, _FIELD_TYPE_KIND, "<B")
        if _member(data, field, _FIELD_DICTIONARY):
            raise Unfit("a dictionary column")
        if kind not in _BUFFERS:
            raise Unfit(f"{_REFUSED.get(kind, 'an unknown')} column")
        texts.add(_member(data, field, _FIELD_NAME))
        texts.add_pairs(_member(data, field, _FIELD_PAIRS))
        _check_type(data, field, kind, texts)
        children = _elements(data, _member(data, field, _FIELD_CHILDREN))
        if depth > DEPTH_LIMIT or (children and kind not in _NESTED):
            raise Unfit(f"a column nested {depth} levels deep, or where none can be")
        if len(kinds) + len(waiting) + len(children) >= FIELDS_LIMIT:
            raise Unfit(f"more than {FIELDS_LIMIT} columns and fields")
        kinds.append(kind)
        waiting += [(child, depth + 1) for child in reversed(children)]
    return len(columns), bytes(kinds)


def _check_type(data: memoryview, field: int, kind: int, texts: _Texts) -> None:
    """
    Raises:
        Unfit: Arrow has no form for values of the type in Python, or its Parquet writer aborts the
            process at some of them.
    """
    if kind not in (_TIMESTAMP, _INTERVAL, _FIXED_LIST):
        return
    table = _follow(data, _member(data, field, _FIELD_TYPE))
    if kind == _TIMESTAMP:
        texts.add(_member(data, table, 1))  # its time zone
    elif kind == _INTERVAL and _scalar(data, table, 0, "<h") != _MONTH_DAY_NANO:
        raise Unfit("an interval of another kind than month_day_nano_interval")
    elif kind == _FIXED_LIST and _scalar(data, table, 0, "<i") < 1:
        raise Unfit("a column of lists of the fixed size 0")


def _batch(data: memoryview, batch: int, columns: int, kinds: bytes) -> Size:
    if _member(data, batch, _BATCH_COMPRESSION):
        raise Unfit("a compressed batch")
    nodes = _pairs(data, _member(data, batch, _BATCH_NODES))
    buffers = _pairs(data, _member(data, batch, _BATCH_BUFFERS))
    if len(nodes) != 2 * len(kinds) or len(buffers) != 2 * sum(_BUFFERS[kind] for kind in kinds):
        raise Unfit("a batch that has not the arrays of its schema")
    if min(nodes, default=0) < 0 or min(buffers, default=0) < 0:
        raise Unfit("a batch with a length below nothing")
    total, place = 0, 0
    for number, kind in enumerate(kinds):
        end = place + 2 * _BUFFERS[kind]
        total += max(VALUE_BYTES * nodes[2 * number], sum(buffers[place + 1 : end : 2]))
        place = end
    return Size(_scalar(data, batch, _BATCH_LENGTH, "<q"), columns, total)


def _pairs(data: memoryview, position: int) -> tuple[int, ...]:
    """The numbers of a vector of structs of two 64-bit integers each."""
    if not position:
        return ()
    start, count = _vector(data, position, 16)
    return struct.unpack_from(f"<{2 * count}q", data, start)


def _elements(data: memoryview, position: int) -> list[int]:
    """Where the tables of a vector are."""
    if not position:
        return []
    start, count = _vector(data, position, 4)
    if count > FIELDS_LIMIT:
        raise Unfit(f"more than {FIELDS_LIMIT} columns and fields")
    return [_follow(data, start + 4 * number) for number in range(count)]


def _vector(data: memoryview, position: int, width: int) -> tuple[int, int]:
    """Where a vector's first element is, and how many there are: all of them within the data."""
    start = _follow(data, position)
    count: int = struct.unpack_from("<I", data, start)[0]
    if start + 4 + width * count > len(data):
        raise Unfit("metadata that lead out of themselves")
    return start + 4, count


def _scalar(data: memoryview, table: int, number: int, form: str) -> int:
    """A number in a table; 0 where it is absent."""
    place = _member(data, table, number)
    return int(struct.unpack_from(form, data, place)[0]) if place else 0


def _follow(data: memoryview, position: int) -> int:
    """Where the offset stored at `position` points."""
    return position + int(struct.unpack_from("<I", data, position)[0])


def _member(data: memoryview, table: int, number: int) -> int:
    """Where a member of a flatbuffer table is; 0 where it is absent."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0:
        raise Unfit("metadata that lead out of themselves")
    slot = 4 + 2 * number
    if slot >= struct.unpack_from("<H", data, vtable)[0]:
        return 0
    offset: int = struct.unpack_from("<H", data, vtable + slot)[0]
    return table + offset if offset else 0
