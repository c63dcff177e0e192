"""Compute the unfolded size of an Arrow batch from its metadata, without reading its values.

A batch of 312 bytes can hold half a billion values: a list of nulls has a length but no data, and
many columns can share the same bytes. So the size is counted from the declared lengths before a
library allocates anything: for each array, at every depth, its buffers or VALUE_BYTES a value,
whichever is more. That does not work for dictionaries and views, in which many values share bytes:
the wire refuses them, and the guest converts them.

The metadata is read by hand from its flatbuffers (Arrow's format/Schema.fbs, format/Message.fbs),
since pyarrow shows lengths and field counts only after it has built all fields. Metadata can share
bytes too: a thousand fields can have the same name, and the reader copies it for each. So every use
of a string counts, and all together may not exceed the size of the metadata.

Standard library only: the guest applies the same rule, and splits batches.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

VALUE_BYTES = 4
"""Bytes counted for any value, also a null or a boolean: about the cost of writing it."""
FIELDS_LIMIT = 1 << 15
"""Columns and nested fields of one batch; each costs the reader some 6 KiB and 130 us."""
DEPTH_LIMIT = 60
"""Levels of nesting; pyarrow reads at most 63."""
SCHEMA_LIMIT = 4 << 20
"""Bytes of metadata of one message; a long name costs the reader thirty times its length."""
EXTENSION_LIMIT = 4096
"""Bytes of an extension type's metadata: Arrow parses it as JSON, in some versions recursively
until the stack overflows."""
PAIR_BYTES = 24
"""Smallest size in bytes of a key-value pair, without its strings."""

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
"""Type number in Schema.fbs -> number of buffers; types that are not listed are refused."""
_REFUSED = {14: "a union", 22: "a run-end-encoded", 23: "a view", 24: "a view", 25: "a view",
            26: "a view"}  # fmt: skip
_TIMESTAMP, _INTERVAL, _LIST, _STRUCT, _FIXED_LIST, _MAP, _LARGE_LIST = 10, 11, 12, 13, 16, 17, 21
_MONTH_DAY_NANO = 2
_EXTENSION_TEXT = b"ARROW:extension:metadata"
_NESTED = frozenset((_LIST, _STRUCT, _FIXED_LIST, _MAP, _LARGE_LIST))


class Unfit(ValueError):
    """The wire does not accept the batch; the message says why."""


class Size(NamedTuple):
    """Declared size of one batch."""

    rows: int
    columns: int
    unfolded_bytes: int


def measure(stream: memoryview) -> Size:
    """The declared size of the one batch of an IPC stream.

    Reads framing and metadata only; Arrow checks the buffers later.

    Raises:
        Unfit: the stream is not one schema and one uncompressed record batch, or exceeds the limits
            of fields, nesting or metadata, or has a layout that the wire does not accept.
        struct.error, IndexError: an offset in the metadata points outside it.
    """
    columns, kinds = 0, None
    size = None
    at = 0
    batches = 0
    while at + 8 <= len(stream):
        mark, length = struct.unpack_from("<Ii", stream, at)
        if mark != _CONTINUATION:
            raise Unfit("a message with an invalid beginning")
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
            raise Unfit("an unexpected message")
        body = _scalar(data, message, 3, "<q")
        if body < 0:
            raise Unfit(f"a body of {body} bytes")
        at += 8 + length + body
    if batches != 1 or size is None:
        raise Unfit(f"a stream of {batches} batches instead of one")
    return size


class _Texts:
    """Counts the strings of one message, once for each use."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._room = len(data)

    def add(self, position: int) -> tuple[int, int]:
        """Count the string that a member points to, if any; returns its start and end."""
        start, count = _vector(self._data, position, 1) if position else (0, 0)
        self._take(count)
        return start, start + count

    def add_pairs(self, position: int) -> None:
        """Count a vector of key-value pairs."""
        start, count = _vector(self._data, position, 4) if position else (0, 0)
        self._take(PAIR_BYTES * count)
        for number in range(count):
            pair = _follow(self._data, start + 4 * number)
            key, key_end = self.add(_member(self._data, pair, 0))
            value, value_end = self.add(_member(self._data, pair, 1))
            if value_end - value > EXTENSION_LIMIT and self._data[key:key_end] == _EXTENSION_TEXT:
                raise Unfit(f"an extension type with more than {EXTENSION_LIMIT} bytes of metadata")

    def _take(self, count: int) -> None:
        self._room -= count
        if self._room < 0:
            raise Unfit("metadata in which several texts overlap")


def _layout(data: memoryview, schema: int, texts: _Texts) -> tuple[int, bytes]:
    """The number of columns of a schema, and the type number of each array in batch order."""
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
            raise Unfit(f"a column nested {depth} levels deep, or in a place where none is allowed")
        if len(kinds) + len(waiting) + len(children) >= FIELDS_LIMIT:
            raise Unfit(f"more than {FIELDS_LIMIT} columns and fields")
        kinds.append(kind)
        waiting += [(child, depth + 1) for child in reversed(children)]
    return len(columns), bytes(kinds)


def _check_type(data: memoryview, field: int, kind: int, texts: _Texts) -> None:
    """Refuse types whose values Arrow cannot convert to Python, or at which its Parquet writer
    aborts the process."""
    if kind not in (_TIMESTAMP, _INTERVAL, _FIXED_LIST):
        return
    table = _follow(data, _member(data, field, _FIELD_TYPE))
    if kind == _TIMESTAMP:
        texts.add(_member(data, table, 1))  # its time zone
    elif kind == _INTERVAL and _scalar(data, table, 0, "<h") != _MONTH_DAY_NANO:
        raise Unfit("an interval other than month_day_nano_interval")
    elif kind == _FIXED_LIST and _scalar(data, table, 0, "<i") < 1:
        raise Unfit("a column of lists of the fixed size 0")


def _batch(data: memoryview, batch: int, columns: int, kinds: bytes) -> Size:
    if _member(data, batch, _BATCH_COMPRESSION):
        raise Unfit("a compressed batch")
    nodes = _pairs(data, _member(data, batch, _BATCH_NODES))
    buffers = _pairs(data, _member(data, batch, _BATCH_BUFFERS))
    if len(nodes) != 2 * len(kinds) or len(buffers) != 2 * sum(_BUFFERS[kind] for kind in kinds):
        raise Unfit("a batch whose arrays do not match its schema")
    if min(nodes, default=0) < 0 or min(buffers, default=0) < 0:
        raise Unfit("a batch with a negative length")
    total, start = 0, 0
    for number, kind in enumerate(kinds):
        end = start + 2 * _BUFFERS[kind]
        total += max(VALUE_BYTES * nodes[2 * number], sum(buffers[start + 1 : end : 2]))
        start = end
    return Size(_scalar(data, batch, _BATCH_LENGTH, "<q"), columns, total)


def _pairs(data: memoryview, position: int) -> tuple[int, ...]:
    """The integers of a vector of structs with two 64-bit integers each."""
    if not position:
        return ()
    start, count = _vector(data, position, 16)
    return struct.unpack_from(f"<{2 * count}q", data, start)


def _elements(data: memoryview, position: int) -> list[int]:
    """The positions of the tables of a vector."""
    if not position:
        return []
    start, count = _vector(data, position, 4)
    if count > FIELDS_LIMIT:
        raise Unfit(f"more than {FIELDS_LIMIT} columns and fields")
    return [_follow(data, start + 4 * number) for number in range(count)]


def _vector(data: memoryview, position: int, width: int) -> tuple[int, int]:
    """Position of a vector's first element, and their number; all are within the data."""
    start = _follow(data, position)
    count: int = struct.unpack_from("<I", data, start)[0]
    if start + 4 + width * count > len(data):
        raise Unfit("metadata that point outside of themselves")
    return start + 4, count


def _scalar(data: memoryview, table: int, number: int, form: str) -> int:
    """A number in a table; 0 if it is absent."""
    position = _member(data, table, number)
    return int(struct.unpack_from(form, data, position)[0]) if position else 0


def _follow(data: memoryview, position: int) -> int:
    """The position that the offset at `position` points to."""
    return position + int(struct.unpack_from("<I", data, position)[0])


def _member(data: memoryview, table: int, number: int) -> int:
    """Position of a member of a flatbuffer table; 0 if it is absent."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0:
        raise Unfit("metadata that point outside of themselves")
    slot = 4 + 2 * number
    if slot >= struct.unpack_from("<H", data, vtable)[0]:
        return 0
    offset: int = struct.unpack_from("<H", data, vtable + slot)[0]
    return table + offset if offset else 0
