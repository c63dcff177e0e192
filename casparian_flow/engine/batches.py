"""Arrow bytes from a guest become batches, or are refused.

The bytes come from code nobody trusts. What they unfold to is bounded before Arrow reads them
(`engine.sizes`), and a compressed body, which could unfold to any size, is refused before it is
decoded. Arrow's reader takes offsets and lengths as they are, so a batch is checked in full before
anything looks at its values.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Iterator

import pyarrow as pa
import pyarrow.compute as pc

from casparian_flow import protocol
from casparian_flow.engine import sizes
from casparian_flow.engine.frames import BATCH_ROWS
from casparian_flow.errors import OnlyRejects, ProtocolError, counted
from casparian_flow.protocol import Record


class TopicEnd(Record, frozen=True):
    """What one topic received in one job; the guest's count and the host's own must agree."""

    topic: str
    batches: int
    rows: int
    digest: str
    """SHA-256 over the IPC bytes of its batches, hexadecimal."""


class ReceivedTopic:
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


# What a file gave, row by row and reject by reject, as the host counts it.
#
# A file of which nothing but rejects came has not been read, whatever the plugin thinks of it: the
# attempt fails. Its topics publish nothing then, so its first rejects go into its log.


SHOWN = 20
"""Rejects of a failed attempt that its log has."""

COLUMNS = 8
"""Columns of a reject that are shown; the bundled plugins have four at the most."""

CELL = 200
"""Characters of a value that are shown."""


class Rejects:
    """The rows and the rejects of one attempt.

    Args:
        known: every topic the plugin may publish to.
        may_be_empty: the topics of data that may get no row though there are rejects.
    """

    def __init__(self, known: Collection[str], may_be_empty: Collection[str]) -> None:
        self._known = set(known)
        self._may_be_empty = set(may_be_empty)
        self._reject_topics = protocol.reject_topics(self._known)
        self._rows = 0
        self._rejects: dict[str, int] = {}
        self._first: list[str] = []

    def see(self, topic: str, batch: pa.RecordBatch) -> None:
        """Count a batch that was checked in full."""
        if topic not in self._reject_topics:
            self._rows += batch.num_rows
            return
        self._rejects[topic] = self._rejects.get(topic, 0) + batch.num_rows
        if room := SHOWN - len(self._first):
            self._first += _in_words(batch.slice(0, room))

    def judge(self) -> None:
        """Return if what came may be published.

        Raises:
            OnlyRejects: no row came, and rejects of a topic whose data may not be empty.
        """
        strict = {
            name
            for topic, number in self._rejects.items()
            if number and not self._data(topic) & self._may_be_empty
            for name in self._data(topic)
        }
        if self._rows or not strict:
            return
        number = counted(sum(self._rejects.values()), "reject")
        names = ", ".join(sorted(strict))
        raise OnlyRejects(
            f"nothing but rejects came of the file: {number}, and no row for {names}; "
            f"the first: {self._first[0]}"
        )

    def log(self) -> str:
        """The first rejects, a line each; what is said where they are not published."""
        total = sum(self._rejects.values())
        if not total:
            return ""
        head = f"{counted(total, 'reject')}, not published"
        if total > len(self._first):
            head += f"; the first {len(self._first)}"
        return "\n".join([f"{head}:", *(f"rejected: {words}" for words in self._first), ""])

    def _data(self, topic: str) -> set[str]:
        return protocol.data_topics(topic, self._known)


def _in_words(batch: pa.RecordBatch) -> Iterator[str]:
    """Each row as its columns' names and values."""
    names = [_printable(name[:CELL]) for name in batch.schema.names[:COLUMNS]]
    columns = [_texts(column) for column in batch.columns[:COLUMNS]]
    for row in zip(*columns, strict=True):
        yield "; ".join(
            f"{name} {_printable(value)}" for name, value in zip(names, row, strict=True) if value
        )


def _texts(column: pa.Array) -> list[str]:
    """The beginning of each value as text; empty where it is null, or no plain value."""
    try:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            # Before they become Python's: one may have as many bytes as a whole batch.
            column = pc.utf8_slice_codeunits(column, 0, CELL)
        elif pa.types.is_nested(column.type):
            return [""] * len(column)
        found = column.to_pylist()
    except Exception:  # noqa: BLE001  Python has no form for every value; the rest still says much
        return [""] * len(column)
    return ["" if value is None else str(value)[:CELL] for value in found]


def _printable(text: str) -> str:
    """The text on one line, with nothing in it that moves a terminal's cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
