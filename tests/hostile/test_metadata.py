"""Metadata of a message that cost their reader more than they have bytes, and types at which
Arrow's Parquet writer ends the process: refused before Arrow sees them."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pyarrow as pa
import pytest

from casparian_flow.engine import sizes
from casparian_flow.engine.batches import read_batch
from casparian_flow.errors import OutputRefused, ProtocolError
from tests.engine.guests import Start, loaded, run

LIMIT = 256 << 20
LONG = "n" * 1_000_000


def message(batch: pa.RecordBatch) -> bytearray:
    """An IPC stream of one batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytearray(sink.getvalue().to_pybytes())


def read(data: bytes | bytearray) -> pa.RecordBatch:
    return read_batch(pa.py_buffer(bytes(data)), LIMIT)[0]


def schema_of(data: bytearray) -> tuple[memoryview, int]:
    """The metadata of a stream's first message, and where the schema is in them."""
    (length,) = struct.unpack_from("<i", data, 4)
    view = memoryview(data)[8 : 8 + length]
    return view, sizes._follow(view, sizes._member(view, sizes._follow(view, 0), 2))


def lead(view: memoryview, position: int, target: int) -> None:
    """Have an offset lead to another place."""
    struct.pack_into("<I", view, position, target - position)


def shared_pairs(place: str) -> bytearray:
    """1000 keys and values that are all the one of a million bytes: a gigabyte to copy."""
    pairs = {f"{number:04}": "" for number in range(1000)} | {"key": LONG}
    field = pa.field("a", pa.int8(), metadata=pairs if place == "field" else None)
    schema = pa.schema([field], metadata=pairs if place == "schema" else None)
    data = message(pa.record_batch([pa.array([1], pa.int8())], schema=schema))
    view, table = schema_of(data)
    member = sizes._SCHEMA_PAIRS
    if place == "field":
        (table,) = sizes._elements(view, sizes._member(view, table, sizes._SCHEMA_FIELDS))
        member = sizes._FIELD_PAIRS
    start, count = sizes._vector(view, sizes._member(view, table, member), 4)
    places = [start + 4 * number for number in range(count)]
    pair = next(p for p in (sizes._follow(view, at) for at in places) if value(view, p) == 10**6)
    for at in places:
        lead(view, at, pair)
    return data


def value(view: memoryview, pair: int) -> int:
    """How long the value of a key is."""
    return sizes._vector(view, sizes._member(view, pair, 1), 1)[1]


def shared_names() -> bytearray:
    """1000 columns that all have the one name of a million bytes."""
    names = [LONG, *(f"{number:04}" for number in range(1000))]
    data = message(pa.record_batch([pa.nulls(1)] * len(names), names))
    view, table = schema_of(data)
    fields = sizes._elements(view, sizes._member(view, table, sizes._SCHEMA_FIELDS))
    places = [sizes._member(view, field, sizes._FIELD_NAME) for field in fields]
    long = max(sizes._follow(view, at) for at in places)
    for at in places:
        lead(view, at, long)
    return data


def shared_zones() -> bytearray:
    """1000 columns in one time zone, whose name has a million bytes."""
    zones = [LONG, *["UTC"] * 1000]
    columns = [pa.array([1], pa.timestamp("s", zone)) for zone in zones]
    data = message(pa.record_batch(columns, [str(n) for n in range(len(zones))]))
    view, table = schema_of(data)
    fields = sizes._elements(view, sizes._member(view, table, sizes._SCHEMA_FIELDS))
    kinds = [sizes._follow(view, sizes._member(view, f, sizes._FIELD_TYPE)) for f in fields]
    places = [sizes._member(view, kind, 1) for kind in kinds]
    long = max(sizes._follow(view, at) for at in places)
    for at in places:
        lead(view, at, long)
    return data


@pytest.mark.parametrize(
    "make", [lambda: shared_pairs("schema"), lambda: shared_pairs("field"), shared_names,
             shared_zones], ids=["schema", "field", "names", "zones"],
)  # fmt: skip
def test_texts_that_share_a_place_are_not_copied_for_each(make: Callable[[], bytearray]) -> None:
    data = make()
    assert len(data) < 2 << 20
    with pytest.raises(ProtocolError, match="overlap"):
        read(data)


def test_texts_that_have_a_place_each_are_read() -> None:
    pairs = {str(number): "" for number in range(9_000)} | {"key": LONG}
    fields = [pa.field(str(n), pa.timestamp("s", "UTC"), metadata={"": "", "a": "b"})
              for n in range(2_000)]  # fmt: skip
    schema = pa.schema(fields, metadata=pairs)
    batch = pa.record_batch([pa.nulls(1, field.type) for field in fields], schema=schema)
    assert read(message(batch)).schema.equals(schema, check_metadata=True)


@pytest.mark.parametrize("name", ["arrow.fixed_shape_tensor", "arrow.opaque", "unheard.of"])
def test_an_extension_type_that_takes_much_to_say_is_refused(name: str) -> None:
    """Arrow 23 reads these as JSON, and calls itself for each bracket until the process ends."""
    said = {"ARROW:extension:name": name, "ARROW:extension:metadata": '{"shape":' + "[" * 3_000_000}
    schema = pa.schema([pa.field("a", pa.list_(pa.int8(), 1), metadata=said)])
    batch = pa.record_batch([pa.nulls(1, schema[0].type)], schema=schema)
    with pytest.raises(ProtocolError, match="extension type with more than 4096 bytes"):
        read(message(batch))


def test_an_extension_type_that_takes_little_to_say_is_read() -> None:
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(pa.array([1, 2]).to_numpy().reshape(1, 2))
    batch = pa.record_batch([tensors], ["a"])
    assert read(message(batch)).equals(batch)


@pytest.mark.parametrize("unit", [0, 1])
def test_an_interval_that_has_no_form_in_python_is_refused(unit: int) -> None:
    data = message(pa.record_batch([pa.array([(1, 2, 3)], pa.month_day_nano_interval())], ["a"]))
    view, table = schema_of(data)
    (field,) = sizes._elements(view, sizes._member(view, table, sizes._SCHEMA_FIELDS))
    kind = sizes._follow(view, sizes._member(view, field, sizes._FIELD_TYPE))
    struct.pack_into("<h", view, sizes._member(view, kind, 0), unit)
    with pytest.raises(ProtocolError, match="interval"):
        read(data)


NONE = "pa.array([{'a': []}, {'a': []}, None], pa.struct([('a', pa.list_(pa.string(), 0))]))"


@pytest.mark.parametrize("raw", [False, True])
def test_lists_of_a_fixed_size_of_none_do_not_end_the_host(start: Start, raw: bool) -> None:
    """Arrow's Parquet writer aborts the process at them, and what it does write cannot be read."""
    if raw:
        with pytest.raises(ProtocolError, match="lists of the fixed size 0"):
            read(message(pa.record_batch([eval(NONE)], ["a"])))
        return
    guest = loaded(start, f"self.publish('t', pa.table({{'a': {NONE}}}))")
    with pytest.raises(OutputRefused, match="lists of the fixed size 0"):
        run(guest)
    assert guest.alive
