"""Arrow bytes from a guest become batches, or are refused.

The bytes come from code nobody trusts. Arrow's reader takes their offsets and lengths as they
are, so a batch is checked in full before anything looks at its values; a compressed body, which
could unfold to any size, is refused before it is decoded.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

import pyarrow as pa

from casparian_flow.engine.frames import BATCH_ROWS
from casparian_flow.errors import ProtocolError
from casparian_flow.protocol import Record

# Members of the tables of Arrow's flatbuffer schema (format/Message.fbs), by position.
MESSAGE_HEADER = 2
DICTIONARY_DATA = 1
BATCH_COMPRESSION = 3


class TopicEnd(Record, frozen=True):
    """What one topic received in one job; the guest's count and the host's own must agree."""

    topic: str
    batches: int
    rows: int
    digest: str
    """SHA-256 over the IPC bytes of its batches, hexadecimal."""


class Tally:
    """What the host itself received for one topic in one job."""

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self._schema: pa.Schema | None = None
        self._batches = 0
        self._rows = 0
        self._digest = hashlib.sha256()

    def add(self, data: pa.Buffer) -> pa.RecordBatch:
        """The batch in these bytes, checked and counted.

        Raises:
            ProtocolError: it is not a valid batch, or its columns are not those of the first.
        """
        batch = read_batch(data)
        self._schema = self._schema or batch.schema
        if not batch.schema.equals(self._schema, check_metadata=True):
            raise ProtocolError(f"the columns of topic {self._topic!r} changed")
        self._batches += 1
        self._rows += batch.num_rows
        self._digest.update(data)
        return batch

    def end(self) -> TopicEnd:
        """What the guest's END must say."""
        digest = self._digest.hexdigest()
        return TopicEnd(topic=self._topic, batches=self._batches, rows=self._rows, digest=digest)


def read_batch(data: pa.Buffer) -> pa.RecordBatch:
    """The one record batch of an IPC stream.

    Raises:
        ProtocolError: the stream is malformed, compressed, holds another number of batches or
            too many rows, or a batch whose buffers do not fit each other.
    """
    try:
        batches = 0
        for message in pa.ipc.MessageReader.open_stream(data):
            if is_compressed(message):
                raise ProtocolError("a compressed batch")
            batches += message.type == "record batch"
        if batches != 1:
            raise ProtocolError(f"a stream of {batches} batches where one was due")
        with pa.ipc.open_stream(data) as reader:
            batch = reader.read_next_batch()
        if not batch.num_columns or batch.num_rows > BATCH_ROWS:
            raise ProtocolError(f"a batch of {batch.num_rows} rows, {batch.num_columns} columns")
        batch.validate(full=True)
        list(_names(pa.struct(batch.schema)))  # those that are not UTF-8 fail here
    except (pa.ArrowException, OSError, ValueError, StopIteration, struct.error) as error:
        raise ProtocolError(f"invalid Arrow data: {error}") from error
    return batch


def _names(kind: pa.DataType) -> Iterator[str]:
    """The name of every field in a type, at any depth."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    for number in range(kind.num_fields):
        field = kind.field(number)
        yield field.name
        yield from _names(field.type)


def is_compressed(message: pa.Message) -> bool:
    """Whether the message's body is compressed, read from its metadata: the body stays untouched.

    pyarrow has verified that the metadata is a well-formed flatbuffer, but does not show this.
    """
    if message.type not in ("record batch", "dictionary"):
        return False
    data = memoryview(message.metadata)
    table = _follow(data, _member(data, _follow(data, 0), MESSAGE_HEADER))
    if message.type == "dictionary":
        table = _follow(data, _member(data, table, DICTIONARY_DATA))
    return _member(data, table, BATCH_COMPRESSION) != 0


def _follow(data: memoryview, position: int) -> int:
    """Where the offset stored at `position` points."""
    return position + int(struct.unpack_from("<I", data, position)[0])


def _member(data: memoryview, table: int, number: int) -> int:
    """Where a member of a flatbuffer table is; 0 where it is absent."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    slot = 4 + 2 * number
    if slot >= struct.unpack_from("<H", data, vtable)[0]:
        return 0
    offset: int = struct.unpack_from("<H", data, vtable + slot)[0]
    return table + offset if offset else 0
