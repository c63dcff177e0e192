"""One rule for the columns of a topic: united by name, cast where that is exact, else refused."""

from __future__ import annotations

import math
import struct
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casparian_flow.engine.sinks.topic_schema import fit, own_columns, unite
from casparian_flow.errors import OutputRefused


def cast(values: Any, given: Any, wanted: Any) -> Any:
    """A column of a later output, as the topic takes it."""
    column = values if isinstance(values, pa.Array) else pa.array(values, given)
    return fit("sales", pa.table({"x": column}), pa.schema([("x", wanted)])).column("x")


def refused(values: Any, given: Any, wanted: Any) -> str:
    with pytest.raises(OutputRefused, match="topic 'sales': column 'x' is ") as error:
        cast(values, given, wanted)
    assert str(wanted) in error.value.message
    assert error.value.hint
    return error.value.message


EXACT = [
    ([1, None, 2**60, -(2**53)], pa.int64(), pa.float64()),
    ([1.0, None, -(2.0**53)], pa.float64(), pa.int64()),
    ([0, 255], pa.uint8(), pa.int16()),
    ([127, -128], pa.int64(), pa.int8()),
    ([math.nan, -0.0, math.inf, 1.5, None], pa.float64(), pa.float32()),
    ([math.nan, -0.0], pa.float32(), pa.float64()),
    ([1.5], pa.float64(), pa.float16()),
    ([Decimal("1.20"), None], pa.decimal128(10, 2), pa.decimal128(5, 1)),
    ([Decimal("1.20")], pa.decimal128(10, 2), pa.decimal256(60, 20)),
    (["a", "", None], pa.string(), pa.large_string()),
    (["a" * 20], pa.string_view(), pa.string()),
    ([b"ab", None], pa.binary(), pa.binary(2)),
    ([b"ab"], pa.binary(2), pa.large_binary()),
    ([86_400_000], pa.date64(), pa.date32()),
    ([1, None], pa.timestamp("s"), pa.timestamp("ns")),
    ([10**9], pa.timestamp("ns"), pa.timestamp("s")),
    ([1], pa.timestamp("ms", "Asia/Tokyo"), pa.timestamp("us", "UTC")),
    ([3000], pa.time32("ms"), pa.time32("s")),
    ([3], pa.duration("s"), pa.duration("ns")),
    ([None, None], pa.null(), pa.uuid()),
    ([[], None], pa.list_(pa.null()), pa.list_(pa.string())),
    ([[math.nan, 1], [], None], pa.list_(pa.float64()), pa.large_list(pa.float32())),
    ([[1, 2], None], pa.list_(pa.int8()), pa.list_(pa.int64(), 2)),
    ([[(1, -0.0)], None], pa.map_(pa.int8(), pa.float64()), pa.map_(pa.int64(), pa.float32())),
    ([{"a": 1, "b": None}], pa.struct([("a", pa.int8()), ("b", pa.null())]),
     pa.struct([("a", pa.float64()), ("b", pa.string())])),
]  # fmt: skip


@pytest.mark.parametrize(("values", "given", "wanted"), EXACT, ids=lambda v: str(v)[:40])
def test_what_is_exact_is_cast(values: Any, given: Any, wanted: Any) -> None:
    found = cast(values, given, wanted)
    assert found.type == wanted
    assert str(found.to_pylist()) == str(
        pa.array(values, given).cast(wanted, safe=False).to_pylist()
    )


OTHERWISE = [
    ([2**53 + 1], pa.int64(), pa.float64()),
    ([2**63 - 1], pa.int64(), pa.float64()),
    ([2**63], pa.uint64(), pa.int64()),
    ([-1], pa.int8(), pa.uint64()),
    ([1.5], pa.float64(), pa.int64()),
    ([-0.0], pa.float64(), pa.int64()),
    ([math.nan], pa.float64(), pa.int64()),
    ([1e300], pa.float64(), pa.int64()),
    ([0.1], pa.float64(), pa.float32()),
    ([1e300], pa.float64(), pa.float32()),
    ([Decimal("1.23")], pa.decimal128(10, 2), pa.decimal128(5, 1)),
    ([Decimal("1234.5")], pa.decimal128(10, 1), pa.decimal128(4, 1)),
    ([2**62], pa.timestamp("s"), pa.timestamp("ns")),
    ([1500], pa.timestamp("ms"), pa.timestamp("s")),
    ([b"abc"], pa.binary(), pa.binary(2)),
    ([[-0.0]], pa.list_(pa.float64()), pa.list_(pa.int8())),
    ([[1]], pa.list_(pa.int8()), pa.list_(pa.int8(), 2)),
    ([[(1, 0.1)]], pa.map_(pa.int8(), pa.float64()), pa.map_(pa.int8(), pa.float32())),
]


@pytest.mark.parametrize(("values", "given", "wanted"), OTHERWISE, ids=lambda v: str(v)[:40])
def test_a_value_that_would_change_is_refused(values: Any, given: Any, wanted: Any) -> None:
    assert "cannot hold exactly" in refused(values, given, wanted)


def test_nulls_that_arrow_miscounts_are_refused_by_name() -> None:
    """Its cast gives lists that reach beyond their values."""
    deep = pa.list_(pa.list_(pa.null()))
    said = refused([[[None], [None] * 3]], deep, pa.large_list(pa.list_(pa.null())))
    assert "cannot hold exactly" in said


OTHER_KINDS = [
    (["1"], pa.string(), pa.int64()),
    ([1], pa.int64(), pa.string()),
    ([True], pa.bool_(), pa.int64()),
    ([1], pa.int64(), pa.decimal128(30, 0)),
    ([1], pa.timestamp("s"), pa.timestamp("s", "UTC")),
    ([1], pa.date32(), pa.timestamp("s")),
    ([b"a"], pa.binary(), pa.string()),
    ([b"a" * 16], pa.binary(16), pa.uuid()),
    ([{"a": 1}], pa.struct([("a", pa.int8())]), pa.struct([("b", pa.int8())])),
    ([{"a": 1}], pa.struct([("a", pa.int8())]), pa.struct([("a", pa.int8()), ("b", pa.int8())])),
    ([["a"]], pa.list_(pa.string()), pa.list_(pa.null())),
]


@pytest.mark.parametrize(("values", "given", "wanted"), OTHER_KINDS, ids=lambda v: str(v)[:40])
def test_another_kind_of_value_is_refused(values: Any, given: Any, wanted: Any) -> None:
    assert "different kind of value" in refused(values, given, wanted)


NUMBERS = [pa.int8(), pa.int32(), pa.int64(), pa.uint16(), pa.uint64(), pa.float32(), pa.float64()]


@settings(max_examples=300, deadline=None)
@given(
    bits=st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 2**63, 2**53 + 1]), max_size=4),
    given_type=st.sampled_from(NUMBERS),
    wanted=st.sampled_from(NUMBERS),
)
def test_any_number_is_the_same_or_refused(bits: list[int], given_type: Any, wanted: Any) -> None:
    """Compared in Python: whole numbers of any size, and floating point by its bits."""
    data = b"".join(struct.pack("<Q", each)[: given_type.bit_width // 8] for each in bits)
    array = pa.Array.from_buffers(given_type, len(bits), [None, pa.py_buffer(data)])
    try:
        found = cast(array, given_type, wanted).to_pylist()
    except OutputRefused:
        assert any(not held(value, wanted) for value in array.to_pylist())
        return
    for ours, theirs in zip(found, array.to_pylist(), strict=True):
        assert ours == theirs or (ours != ours and theirs != theirs)
        assert math.copysign(1, ours) == math.copysign(1, theirs)


def held(value: Any, kind: Any) -> bool:
    """Whether a type has exactly this number; a NaN other than the usual one may be refused."""
    if pa.types.is_integer(kind):
        low = -(2 ** (kind.bit_width - 1)) if pa.types.is_signed_integer(kind) else 0
        high = low + 2**kind.bit_width
        whole = math.isfinite(value) and value == int(value)
        return whole and low <= int(value) < high and not (value == 0 and str(value)[0] == "-")
    if isinstance(value, float) and math.isnan(value):
        return struct.pack("<d", value) == struct.pack("<d", math.nan)
    try:
        code = {32: "<f", 64: "<d"}[kind.bit_width]
        return bool(struct.unpack(code, struct.pack(code, value))[0] == value)
    except OverflowError:
        return False


def test_columns_are_united_by_name_in_the_order_they_came() -> None:
    first = pa.schema([("b", pa.int64()), ("a", pa.string())])
    later = pa.schema([("c", pa.bool_()), ("a", pa.large_string()), ("b", pa.float64())])
    assert unite(first, later) == pa.schema([*first, ("c", pa.bool_())])


def test_null_is_no_type_yet() -> None:
    known = unite(pa.schema([]), pa.schema([("a", pa.null()), ("b", pa.list_(pa.null()))]))
    later = pa.schema([("a", pa.int8()), ("b", pa.list_(pa.string()))])
    assert unite(known, later) == later
    assert unite(later, known) == later
    assert unite(known, pa.schema([("b", pa.int8())])) == known


def test_a_dictionary_counts_as_its_values() -> None:
    column = pa.array(["a", None, "b", "a"]).dictionary_encode()
    known = unite(pa.schema([]), pa.schema([("x", column.type)]))
    assert known == pa.schema([("x", pa.string())])
    assert cast(column, column.type, pa.string()).to_pylist() == ["a", None, "b", "a"]
    assert cast(column, column.type, pa.large_string()).to_pylist() == ["a", None, "b", "a"]


def test_missing_columns_are_null_and_the_order_is_the_topics() -> None:
    columns = pa.schema([("a", pa.int64()), ("b", pa.list_(pa.string())), ("c", pa.uuid())])
    found = fit("sales", pa.table({"c": pa.nulls(2, pa.uuid()), "a": [1, 2]}), columns)
    assert found.schema == columns
    assert found.column("a").to_pylist() == [1, 2]
    assert found.column("b").null_count == 2


def test_the_lineage_columns_are_no_part_of_it() -> None:
    schema = pa.schema([("a", pa.int8()), ("_cf_job_id", pa.int64())], {"pandas": "{}"})
    assert own_columns(schema) == pa.schema([("a", pa.int8())])
    assert own_columns(schema).metadata is None
