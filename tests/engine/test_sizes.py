"""What a batch unfolds to is told from its metadata, whatever they say."""

from __future__ import annotations

import random
import struct

import pyarrow as pa
import pytest

from casparian_flow.engine import sizes
from casparian_flow.engine.batches import read_batch
from casparian_flow.errors import ProtocolError


def stream(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue().to_pybytes())


def unfolded(batch: pa.RecordBatch) -> int:
    return sizes.measure(memoryview(stream(batch))).unfolded_bytes


def test_flat_columns_count_as_their_bytes() -> None:
    numbers = pa.record_batch({"a": pa.array(range(1000)), "b": [0.5] * 1000, "c": ["word"] * 1000})
    assert numbers.nbytes <= unfolded(numbers) <= numbers.nbytes + 8
    nulls = pa.record_batch({"a": pa.array([1, None] * 500)})
    assert nulls.nbytes <= unfolded(nulls) <= nulls.nbytes + 64


def test_what_has_no_bytes_counts_by_its_values() -> None:
    rows = 1000
    for kind, levels in (
        (pa.null(), 1), (pa.bool_(), 1), (pa.int8(), 1),
        (pa.struct([("a", pa.null()), ("b", pa.null())]), 3), (pa.list_(pa.null(), 1), 2),
    ):  # fmt: skip
        batch = pa.record_batch({"x": pa.nulls(rows, kind)})
        assert unfolded(batch) == levels * rows * sizes.VALUE_BYTES, kind
    lists = pa.FixedSizeListArray.from_arrays(pa.nulls(rows * 50), 50)
    assert unfolded(pa.record_batch({"x": lists})) == rows * 51 * sizes.VALUE_BYTES


def test_a_length_that_only_the_metadata_have_counts() -> None:
    """A child of nulls longer than its lists need: 24 bytes say that there are half a billion."""
    lists = pa.ListArray.from_arrays(pa.array([0, 3], pa.int32()), pa.nulls(3))
    data = stream(pa.record_batch({"x": lists}))
    node = struct.pack("<qqqq", 1, 0, 3, 3)
    assert data.count(node) == 1
    many = 1 << 29
    forged = data.replace(node, struct.pack("<qqqq", 1, 0, many, many))
    assert sizes.measure(memoryview(forged)).unfolded_bytes > 2 << 30
    with pytest.raises(ProtocolError, match="of 2147483"):
        read_batch(pa.py_buffer(forged), 256 << 20)
    with pytest.raises(ProtocolError, match="negative length"):
        read_batch(pa.py_buffer(data.replace(node, struct.pack("<qqqq", 1, 0, -3, -3))), 1 << 30)


def test_columns_that_lie_in_the_same_bytes_count_each() -> None:
    columns = 100
    batch = pa.record_batch({str(n): pa.array(range(8000)) for n in range(columns)})
    data = stream(batch)
    for n in range(1, columns):  # each column's buffers are where the first one's are
        here = struct.pack("<qqqq", 64_000 * n, 0, 64_000 * n, 64_000)
        assert data.count(here) == 1
        data = data.replace(here, struct.pack("<qqqq", 0, 0, 0, 64_000))
    assert sizes.measure(memoryview(data)).unfolded_bytes == columns * 64_000
    _, size = read_batch(pa.py_buffer(data), columns * 64_000)
    assert size == columns * 64_000


def test_every_change_of_the_metadata_is_refused_or_measured(seed: int) -> None:
    """Nothing but `Unfit` and `struct.error` comes of it, and no long work."""
    chance = random.Random(seed)
    good = stream(
        pa.record_batch(
            {
                "n": [1, 2], "w": ["a", None], "l": [[1], None], "s": [{"a": 1}, None],
                "m": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int8())), "z": pa.nulls(2),
            }
        )
    )  # fmt: skip
    measured = 0
    for _ in range(5_000):
        data = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(data))
            data[at] = chance.randrange(256)
        try:
            sizes.measure(memoryview(bytes(data)))
        except (sizes.Unfit, struct.error):
            continue
        measured += 1
    assert measured


def test_fields_that_share_their_children_are_counted_each_time() -> None:
    """Both fields of each struct are the same one: thirty of them are a tree of a thousand million
    fields, which pyarrow would make."""
    kind = pa.struct([("a", pa.null()), ("b", pa.null())])
    for _ in range(30):
        kind = pa.struct([("a", kind), ("b", pa.null())])
    data = bytearray(stream(pa.record_batch({"s": pa.nulls(1, kind)})))
    (length,) = struct.unpack_from("<i", data, 4)
    schema = memoryview(data)[8 : 8 + length]
    table = sizes._follow(schema, sizes._member(schema, sizes._follow(schema, 0), 2))
    (field,) = sizes._elements(schema, sizes._member(schema, table, 1))
    while True:
        children = sizes._member(schema, field, 5)
        start, count = sizes._vector(schema, children, 4)
        if not count:
            break
        field = sizes._follow(schema, start)
        struct.pack_into("<I", schema, start + 4, field - start - 4)
    with pytest.raises(sizes.Unfit, match=r"columns and fields|overlap"):
        sizes.measure(memoryview(bytes(data)))


@pytest.mark.parametrize("columns", [sizes.FIELDS_LIMIT, sizes.FIELDS_LIMIT + 1])
def test_the_limit_of_columns(columns: int) -> None:
    data = stream(pa.RecordBatch.from_arrays([pa.nulls(1)] * columns, ["c"] * columns))
    if columns > sizes.FIELDS_LIMIT:
        with pytest.raises(sizes.Unfit, match="columns and fields"):
            sizes.measure(memoryview(data))
    else:
        assert sizes.measure(memoryview(data)).columns == columns
