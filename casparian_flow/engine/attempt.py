"""The guest's side of an attempt: run the plugin over a file and send its output as frames.

Imports the standard library only, and pyarrow once the plugin's environment is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import linecache
import logging
import sys
import threading
import traceback
import types
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, BinaryIO

from casparian_flow.engine import sizes
from casparian_flow.engine.frames import (
    BATCH_BYTES,
    BATCH_ROWS,
    HEADER,
    TOPIC_LENGTH,
    FrameKind,
    pack,
)
from casparian_flow.sdk import BasePlugin, FileInfo

if TYPE_CHECKING:
    import pyarrow as pa


TRACEBACK_LIMIT = 1 << 16
"""Characters of a traceback that are sent, from its end."""
UNFOLDED_BYTES = 16 * BATCH_BYTES
"""Largest unfolded size of a batch of several rows: the host writes its values one by one."""
ACCEPTED = (
    "publish accepts a pandas DataFrame, a pyarrow Table, RecordBatch or RecordBatchReader, "
    "anything with __arrow_c_stream__ (polars, DuckDB), or an iterator of these"
)


class PluginRun:
    """One run of the plugin over one file, or loading the plugin (job 0).

    Args:
        wire: the stream to the host; buffered, so that a small job needs few system calls.
        job: the job number in every frame of this run.
        plugin: the header of LOAD: name, version, topics and batch_limit (bytes of a BATCH).
    """

    def __init__(self, wire: BinaryIO, job: int, plugin: dict[str, Any]) -> None:
        self._wire = wire
        self._job = job
        self._name: str = plugin["name"]
        self._topics: list[str] = plugin["topics"]
        self._batch_limit: int = plugin["batch_limit"]
        self._sent: dict[str, SentTopic] = {}
        self._lock = threading.Lock()  # a plugin may publish from several threads
        self._refusal: Exception | None = None

    def load(self, source: bytes) -> BasePlugin:
        """Run the plugin's module and create its Handler.

        Compiles the bytes that the host verified; reads no file.
        """
        lines = importlib.util.decode_source(source).splitlines(keepends=True)
        linecache.cache[self._file_name] = (len(source), None, lines, self._file_name)
        module = types.ModuleType("casparian_plugin")
        module.__file__ = self._file_name
        sys.modules[module.__name__] = module  # dataclasses and pickle need it there
        code = compile(source, self._file_name, "exec", dont_inherit=True)
        exec(code, module.__dict__)  # noqa: S102  our purpose
        handler = module.__dict__.get("Handler")
        if not (isinstance(handler, type) and issubclass(handler, BasePlugin)):
            raise self._refuse(TypeError(f"plugin {self._name} has no class Handler(BasePlugin)"))
        return handler()

    def execute(self, handler: BasePlugin, file: FileInfo) -> None:
        """Execute the plugin over one file.

        If `publish` refused data, the attempt fails even if the plugin caught the exception;
        otherwise a completed job could lack rows.
        """
        handler.file = file
        handler._publish = self.publish
        handler.execute(file.path)
        if self._refusal:
            raise self._refusal

    def publish(self, topic: str, data: Any) -> None:
        """Implements `BasePlugin.publish`: send `data` in batches of about 1 MiB."""
        if topic not in self._topics:
            declared = ", ".join(self._topics) or "none"
            raise self._refuse(ValueError(f"topic {topic!r} is not declared; declared: {declared}"))
        for reader in self._readers(topic, data):
            self._publish_stream(topic, reader)

    def finish(self, payload: bytes) -> None:
        """Send an END for each topic, then DONE with this payload."""
        flush()
        for topic, sent in self._sent.items():
            end = {"topic": topic, "batches": sent.batches, "rows": sent.rows}
            self.send(FrameKind.END, json.dumps(end | {"digest": sent.digest.hexdigest()}).encode())
        self.send(FrameKind.DONE, payload)

    def fail(self, error: BaseException) -> None:
        """Send FAILED with the error and its traceback from the plugin's first frame on."""
        flush()
        frames = error.__traceback__
        while frames and frames.tb_frame.f_code.co_filename != self._file_name:
            frames = frames.tb_next
        text = "".join(traceback.format_exception(type(error), error, frames))[-TRACEBACK_LIMIT:]
        last_line = text.rstrip().rpartition("\n")[2]
        failure = {"kind": "exception", "message": last_line, "traceback": printable(text)}
        if self._refusal:
            failure |= {"kind": "refused", "message": str(self._refusal)}
        elif is_held(error):
            failure = {"kind": "held", "message": str(error), "traceback": ""}
        failure["message"] = printable(failure["message"])
        self.send(FrameKind.FAILED, json.dumps(failure).encode())

    def send(self, kind: FrameKind, payload: bytes = b"") -> None:
        """Write a small frame; flush the wire unless it is an END, which more frames follow."""
        self._wire.write(pack(kind, self._job, payload))
        if kind != FrameKind.END:
            self._wire.flush()

    @property
    def _file_name(self) -> str:
        return f"{self._name}.py"

    def _refuse(self, error: Exception) -> Exception:
        """Record the refusal, so that the run fails even if the plugin catches the exception."""
        self._refusal = self._refusal or error
        return error

    def _readers(self, topic: str, data: Any) -> Iterator[pa.RecordBatchReader]:
        if is_tabular(data):
            yield self._reader(topic, data)
        elif isinstance(data, Iterator):
            for item in data:
                yield self._reader(topic, item)
        else:
            raise self._refuse(not_tabular(topic, data))

    def _reader(self, topic: str, data: Any) -> pa.RecordBatchReader:
        import pyarrow as pa

        if not is_tabular(data):
            raise self._refuse(not_tabular(topic, data))
        try:
            if is_dataframe(data):
                data = pa.Table.from_pandas(data)
            # The C interface is the last choice: it cuts a name at a NUL.
            if isinstance(data, pa.RecordBatch):
                data = pa.Table.from_batches([data])
            if isinstance(data, pa.Table):
                return data.to_reader()
            if isinstance(data, pa.RecordBatchReader):
                return data
            return pa.RecordBatchReader.from_stream(data)
        except (pa.ArrowException, TypeError, ValueError) as error:
            what = f"topic {topic!r}: a {type(data).__name__} is not a table: {error}"
            raise self._refuse(TypeError(what)) from error

    def _publish_stream(self, topic: str, reader: pa.RecordBatchReader) -> None:
        empty = True
        for batch in reader:
            if batch.num_rows and not batch.num_columns:
                what = f"topic {topic!r} was given {batch.num_rows} rows without columns"
                raise self._refuse(ValueError(what))
            for piece in pieces(batch):
                self._publish_batch(topic, piece)
                empty = False
        if empty and len(reader.schema):
            self._publish_batch(topic, empty_batch(reader.schema))

    def _publish_batch(self, topic: str, batch: pa.RecordBatch) -> None:
        try:
            batch = plain(batch)
        except NotImplementedError as error:
            raise self._refuse(ValueError(f"topic {topic!r}: {error}")) from error
        stream = ipc_stream(batch)
        name = topic.encode()
        head = TOPIC_LENGTH.pack(len(name)) + name
        length = len(head) + stream.size
        # The host limits the unfolded size too: null values have no bytes of their own.
        unfolded = self._unfolded(topic, stream)
        most = max(length, unfolded)
        if batch.num_rows > 1 and (most > self._batch_limit or unfolded > UNFOLDED_BYTES):
            half = batch.num_rows // 2
            self._publish_batch(topic, batch.slice(0, half))
            self._publish_batch(topic, batch.slice(half))
            return
        if most > self._batch_limit:
            what = f"topic {topic!r}: one row has {most} bytes"
            hint = f"the limit is {self._batch_limit} ([guest] batch_limit_bytes)"
            raise self._refuse(ValueError(f"{what}; {hint}"))
        with self._lock:
            sent = self._sent.setdefault(topic, SentTopic(batch.schema))
            if batch.schema != sent.schema:
                raise self._refuse(changed(topic, sent.schema, batch.schema))
            sent.add(batch.num_rows, stream)
            self._wire.write(HEADER.pack(FrameKind.BATCH, self._job, length) + head)
            self._wire.write(stream)
            self._wire.flush()

    def _unfolded(self, topic: str, stream: pa.Buffer) -> int:
        try:
            return sizes.measure(memoryview(stream)).unfolded_bytes
        except sizes.Unfit as error:
            raise self._refuse(ValueError(f"topic {topic!r} was given {error}")) from error


def is_held(error: BaseException) -> bool:
    """Whether the plugin raised `contract.Held`; a plugin that has not imported it cannot."""
    module = sys.modules.get("casparian_flow.contract")
    return module is not None and isinstance(error, module.Held)


class SentTopic:
    """Counts and digest of what was sent to one topic in one run."""

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self.batches = 0
        self.rows = 0
        self.digest = hashlib.sha256()

    def add(self, rows: int, stream: pa.Buffer) -> None:
        """Count one batch, given its IPC bytes."""
        self.batches += 1
        self.rows += rows
        self.digest.update(stream)


def is_dataframe(data: Any) -> bool:
    """Whether `data` is a pandas DataFrame; pandas before 2.2 has no `__arrow_c_stream__`."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(data, pandas.DataFrame)


def is_tabular(data: Any) -> bool:
    """Whether `data` declares itself a table."""
    return is_dataframe(data) or hasattr(data, "__arrow_c_stream__")


def not_tabular(topic: str, data: Any) -> TypeError:
    return TypeError(f"topic {topic!r} was given a {type(data).__name__}; {ACCEPTED}")


def changed(topic: str, before: pa.Schema, after: pa.Schema) -> ValueError:
    """The error for a batch whose columns differ from those of the topic's first batch."""
    import pyarrow as pa

    pairs = zip_longest([str(pa.schema([f])) for f in before], [str(pa.schema([f])) for f in after])
    old, new = next((old or "absent", new or "absent") for old, new in pairs if old != new)
    return ValueError(
        f"the columns of topic {topic!r} changed: first `{old}`, now `{new}`; give explicit "
        "dtypes, such as pd.read_csv(..., dtype={...}), so that every batch has the same columns"
    )


def pieces(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Slices of a batch of about BATCH_BYTES each; none if it has no rows."""
    fitting = batch.num_rows * BATCH_BYTES // max(written_out_bytes(batch), 1)
    rows = min(max(fitting, 1), BATCH_ROWS)
    for start in range(0, batch.num_rows, rows):
        yield batch.slice(start, rows)


def empty_batch(schema: pa.Schema) -> pa.RecordBatch:
    """A batch of this schema without rows."""
    import pyarrow as pa

    return pa.RecordBatch.from_arrays([pa.nulls(0, f.type) for f in schema], schema=schema)


def ipc_stream(batch: pa.RecordBatch) -> pa.Buffer:
    """An uncompressed IPC stream with this one batch."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def flush() -> None:
    """Flush the plugin's prints and logs, even if it replaced the streams."""
    for stream in (*logging.getLogger().handlers, sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def printable(text: str) -> str:
    """The text with lone surrogates (names that are not UTF-8) escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


# Convert columns to layouts in which no two values share bytes, at any depth:
#
#     dictionary                          its values
#     string_view, binary_view            string, binary
#     list_view, large_list_view          list, large_list
#     run-end-encoded                     its values
#
# The layout often depends on the library that made the data, and dictionaries differ between chunks
# of one table (a category's index type follows the number of its values): that would look like a
# change of columns. Schema metadata is dropped for the same reason.
#
# A batch is a slice of a larger one: only its own rows are read.


def plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Convert a batch to layouts that the wire accepts.

    Raises:
        NotImplementedError: a column's type has no such layout; the message names both.
    """
    import pyarrow as pa

    columns = []
    for field, column in zip(batch.schema, batch.columns, strict=True):
        try:
            columns.append(_plain(column) if _is_shared(column.type) else column)
        except (pa.ArrowException, NotImplementedError) as error:
            message = f"column {field.name!r} ({field.type}) cannot be written as Arrow: {error}"
            raise NotImplementedError(message) from error
    fields = [f.with_type(c.type) for f, c in zip(batch.schema, columns, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))


def written_out_bytes(batch: pa.RecordBatch) -> int:
    """Estimate of the size after `plain`; dictionary values count with their mean length."""
    import pyarrow as pa

    total = int(batch.nbytes)
    for column in batch.columns:
        if pa.types.is_dictionary(column.type) and len(column.dictionary):
            total += len(column) * column.dictionary.nbytes // len(column.dictionary)
    return total


def _is_shared(kind: Any) -> bool:
    """Whether values of the type, or nested in it, may share bytes."""
    import pyarrow as pa

    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _is_shared(kind.storage_type)
    if types.is_union(kind):
        return True
    return _is_written_anew(kind) or any(
        _is_shared(kind.field(number).type) for number in range(kind.num_fields)
    )


def _is_written_anew(kind: Any) -> bool:
    import pyarrow as pa

    types = pa.types
    return bool(
        types.is_dictionary(kind)
        or types.is_run_end_encoded(kind)
        or types.is_string_view(kind)
        or types.is_binary_view(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )


def _plain(array: Any) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    types, kind = pa.types, array.type
    if not _is_shared(kind):
        return array
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(array.storage)
    if types.is_dictionary(kind):
        return _plain(array.dictionary).take(array.indices)
    if types.is_run_end_encoded(kind):
        return _plain(pc.run_end_decode(array))
    if types.is_string_view(kind):
        return array.cast(pa.string())
    if types.is_binary_view(kind):
        return array.cast(pa.binary())
    if types.is_struct(kind):
        children = [_plain(array.field(number)) for number in range(kind.num_fields)]
        fields = [f.with_type(c.type) for f, c in zip(kind, children, strict=True)]
        return _rebuilt(array, pa.struct(fields), [], children)
    if types.is_map(kind):
        return _map(array)
    if types.is_fixed_size_list(kind):
        size = kind.list_size
        items = _plain(array.values.slice(array.offset * size, len(array) * size))
        field = kind.value_field.with_type(items.type)
        return _rebuilt(array, pa.list_(field, size), [], [items])
    if types.is_union(kind):
        raise NotImplementedError("no sink takes a union")
    return _list(array)


def _list(array: Any) -> Any:
    """A list of any layout as a list with offsets.

    Built from parts, not cast: pyarrow 26 casts nulls in nested lists wrongly (it makes as many as
    the outer list has items).
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    is_large = pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind)
    width = pa.int64() if is_large else pa.int32()
    items = _plain(array.flatten())  # the items of all lists that are not null
    ends = pc.cumulative_sum(pc.fill_null(pc.list_value_length(array), 0).cast(pa.int64()))
    offsets = pa.concat_arrays([pa.array([0], pa.int64()), ends]).cast(width)
    field = kind.value_field.with_type(items.type)
    made = pa.large_list(field) if is_large else pa.list_(field)
    return _rebuilt(array, made, [offsets.buffers()[1]], [items])


def _map(array: Any) -> Any:
    import pyarrow as pa

    kind = array.type
    offsets = array.offsets
    first, last = offsets[0].as_py(), offsets[-1].as_py()
    keys = _plain(array.keys.slice(first, last - first))
    items = _plain(array.items.slice(first, last - first))
    made = pa.map_(kind.key_field.with_type(keys.type), kind.item_field.with_type(items.type),
                   kind.keys_sorted)  # fmt: skip
    pairs = pa.StructArray.from_arrays([keys, items], fields=[made.key_field, made.item_field])
    at = pa.compute.subtract(offsets, pa.scalar(first, offsets.type))
    return _rebuilt(array, made, [at.buffers()[1]], [pairs])


def _rebuilt(array: Any, kind: Any, buffers: Sequence[Any], children: Sequence[Any]) -> Any:
    """An array of type `kind` from its parts, with the nulls of `array`."""
    import pyarrow as pa

    valid = pa.concat_arrays([array.is_valid()]) if array.null_count else None
    bits = valid.buffers()[1] if valid is not None else None
    return pa.Array.from_buffers(kind, len(array), [bits, *buffers], children=list(children))
