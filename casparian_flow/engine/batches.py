"""Read and check the Arrow batches of a guest, and count its rejects.

The bytes come from untrusted code. Their unfolded size is bounded before Arrow reads them
(`engine.sizes`), and a compressed body, which could unfold to any size, is refused undecoded.
Arrow's reader does not check offsets and lengths, so a batch is validated in full before its values
are read.
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
    """Totals of one topic in one job; those of guest and host must agree."""

    topic: str
    batches: int
    rows: int
    digest: str
    """SHA-256 over the IPC bytes of its batches, hexadecimal."""


class ReceivedTopic:
    """What the host received for one topic in one job."""

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self._schema: pa.Schema | None = None
        self._batches = 0
        self._rows = 0
        self._digest = hashlib.sha256()

    def add(self, data: pa.Buffer, limit_bytes: int) -> tuple[pa.RecordBatch, int]:
        """Read, check and count a batch; also returns its unfolded size in bytes.

        Args:
            limit_bytes: limit of the unfolded size.

        Raises:
            ProtocolError: the batch is invalid, or its columns differ from those of the first.
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
        """The totals that the guest's END must contain."""
        digest = self._digest.hexdigest()
        return TopicEnd(topic=self._topic, batches=self._batches, rows=self._rows, digest=digest)


def read_batch(data: pa.Buffer, limit_bytes: int) -> tuple[pa.RecordBatch, int]:
    """The one record batch of an IPC stream, and its unfolded size in bytes.

    Raises:
        ProtocolError: the stream is malformed or compressed, has not exactly one batch, too many
            rows, too large an unfolded size or a layout that the wire does not accept, or the
            batch's buffers are inconsistent.
    """
    try:
        size = sizes.measure(memoryview(data))
        if not size.columns or size.rows > BATCH_ROWS:
            raise ProtocolError(f"a batch of {size.rows} rows, {size.columns} columns")
        if size.unfolded_bytes > limit_bytes:
            message = f"a batch of {size.unfolded_bytes} bytes when unpacked"
            raise ProtocolError(f"{message}; the limit is {limit_bytes}")
        with pa.ipc.open_stream(data) as reader:
            batch = reader.read_next_batch()
        if (batch.num_rows, batch.num_columns) != (size.rows, size.columns):
            raise ProtocolError("a batch that does not match its metadata")
        batch.validate(full=True)
        list(_names(pa.struct(batch.schema)))  # raises for names that are not UTF-8
    except (pa.ArrowException, OSError, ValueError, StopIteration, struct.error) as error:
        raise ProtocolError(f"invalid Arrow data: {error}") from error
    return batch, size.unfolded_bytes


def _names(kind: pa.DataType) -> Iterator[str]:
    """The name of every field in a type, at any depth."""
    for number in range(kind.num_fields):
        field = kind.field(number)
        yield field.name
        yield from _names(field.type)


# A file that gives nothing but rejects was not read: the attempt fails. Its topics then publish
# nothing, so the job's log has the first rejects.

SHOWN = 20
"""Rejects of a failed attempt in its log, at most."""

COLUMNS = 8
"""Columns shown of a reject; the bundled plugins have at most four."""

CELL = 200
"""Characters shown of a value."""


class Rejects:
    """Counts the rows and the rejects of one attempt.

    Args:
        known: all topics of the plugin.
        may_be_empty: data topics that may get no row although there are rejects.
    """

    def __init__(self, known: Collection[str], may_be_empty: Collection[str]) -> None:
        self._known = set(known)
        self._may_be_empty = set(may_be_empty)
        self._reject_topics = protocol.reject_topics(self._known)
        self._rows = 0
        self._rejects: dict[str, int] = {}
        self._first: list[str] = []

    def see(self, topic: str, batch: pa.RecordBatch) -> None:
        """Count a validated batch."""
        if topic not in self._reject_topics:
            self._rows += batch.num_rows
            return
        self._rejects[topic] = self._rejects.get(topic, 0) + batch.num_rows
        if room := SHOWN - len(self._first):
            self._first += _described(batch.slice(0, room))

    def judge(self) -> None:
        """Raise if the output may not be published.

        Raises:
            OnlyRejects: there is no row, and there are rejects of a topic that may not be empty.
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
            f"the file gave {number} and no row for {names}; first reject: {self._first[0]}"
        )

    def log(self) -> str:
        """The first rejects, a line each, for the log of a failed attempt."""
        total = sum(self._rejects.values())
        if not total:
            return ""
        head = f"{counted(total, 'reject')}, not published"
        if total > len(self._first):
            head += f"; the first {len(self._first)}"
        return "\n".join([f"{head}:", *(f"rejected: {reject}" for reject in self._first), ""])

    def _data(self, topic: str) -> set[str]:
        return protocol.data_topics(topic, self._known)


def _described(batch: pa.RecordBatch) -> Iterator[str]:
    """Each row as text: names and values of its columns."""
    names = [_printable(name[:CELL]) for name in batch.schema.names[:COLUMNS]]
    columns = [_texts(column) for column in batch.columns[:COLUMNS]]
    for row in zip(*columns, strict=True):
        yield "; ".join(
            f"{name} {_printable(value)}" for name, value in zip(names, row, strict=True) if value
        )


def _texts(column: pa.Array) -> list[str]:
    """The beginning of each value as text; empty if it is null or nested."""
    try:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            # Cut in Arrow: one value can be as large as a batch.
            column = pc.utf8_slice_codeunits(column, 0, CELL)
        elif pa.types.is_nested(column.type):
            return [""] * len(column)
        values = column.to_pylist()
    except Exception:  # noqa: BLE001  Python cannot represent every value
        return [""] * len(column)
    return ["" if value is None else str(value)[:CELL] for value in values]


def _printable(text: str) -> str:
    """The text on one line, with control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
