"""Arrow bytes from a guest become batches, or are refused.

The bytes come from code nobody trusts. What they unfold to is bounded before Arrow reads them
(`engine.sizes`), and a compressed body, which could unfold to any size, is refused before it is
decoded. Arrow's reader takes offsets and lengths as they are, so a batch is checked in full before
anything looks at its values.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

import pyarrow as pa

from casparian_flow.engine import sizes
from casparian_flow.engine.frames import BATCH_ROWS
from casparian_flow.errors import ProtocolError
from casparian_flow.protocol import Record


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

    def add(self, data: pa.Buffer, limit_bytes: int) -> tuple[pa.RecordBatch, int]:
        """The batch in these bytes, checked and counted, and the bytes that it unfolds to.

        Args:
            limit_bytes: what it may unfold to.

        Raises:
            ProtocolError: it is not a valid batch, or its columns are not those of the first.
        """
        batch, unfolded = read_batch(data, limit_bytes)
        self._schema = self._schema or batch.schema
        if not batch.schema.equals(self._schema, check_metadata=True):
            raise ProtocolError(f"the columns of topic {self._topic!r} changed")
        self._batches += 1
        self._rows += batch.num_rows
        self._digest.update(data)
        return batch, unfolded

    def end(self) -> TopicEnd:
        """What the guest's END must say."""
        digest = self._digest.hexdigest()
        return TopicEnd(topic=self._topic, batches=self._batches, rows=self._rows, digest=digest)


def read_batch(data: pa.Buffer, limit_bytes: int) -> tuple[pa.RecordBatch, int]:
    """The one record batch of an IPC stream, and the bytes that it unfolds to.

    Raises:
        ProtocolError: the stream is malformed, compressed, holds another number of batches, too
            many rows or what unfolds to more than the limit, a layout that the wire does not take,
            or a batch whose buffers do not fit each other.
    """
    try:
        size = sizes.measure(memoryview(data))
        if not size.columns or size.rows > BATCH_ROWS:
            raise ProtocolError(f"a batch of {size.rows} rows, {size.columns} columns")
        if size.unfolded_bytes > limit_bytes:
            words = f"a batch that unfolds to {size.unfolded_bytes} bytes"
            raise ProtocolError(f"{words}; the limit is {limit_bytes}")
        with pa.ipc.open_stream(data) as reader:
            batch = reader.read_next_batch()
        if (batch.num_rows, batch.num_columns) != (size.rows, size.columns):
            raise ProtocolError("a batch that is not what its metadata say")
        batch.validate(full=True)
        list(_names(pa.struct(batch.schema)))  # those that are not UTF-8 fail here
    except (pa.ArrowException, OSError, ValueError, StopIteration, struct.error) as error:
        raise ProtocolError(f"invalid Arrow data: {error}") from error
    return batch, size.unfolded_bytes


def _names(kind: pa.DataType) -> Iterator[str]:
    """The name of every field in a type, at any depth."""
    for number in range(kind.num_fields):
        field = kind.field(number)
        yield field.name
        yield from _names(field.type)
