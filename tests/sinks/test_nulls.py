"""A null is a null, whatever was declared of the field that has it."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from casparian_flow.engine.sinks.topic_schema import may_be_null, type_that_may
from casparian_flow.protocol import Output
from tests.sinks.stages import TOPIC, Place

LISTS = pa.array([[1], None, [2, 3]])
STRUCTS = pa.array([{"x": 1}, None, {"x": 3}])
PAIRS = pa.array([[1], [2], [3]], pa.list_(pa.int8(), 1))
GAP = pa.array([False, True, False])


def within(array: pa.Array, mask: pa.Array | None = None) -> pa.Array:
    """A struct around an array, whose field is declared never to be null."""
    field = pa.field("f", array.type, nullable=False)
    return pa.StructArray.from_arrays([array], fields=[field], mask=mask)


def listed(array: pa.Array) -> pa.Array:
    """A list of two, and one of one item; declared never to be null."""
    kind = pa.list_(pa.field("item", array.type, nullable=False))
    offsets = pa.array([0, 2, 3], pa.int32()).buffers()[1]
    return pa.Array.from_buffers(kind, 2, [None, offsets], children=[array])


def mapped(array: pa.Array) -> pa.Array:
    kind = pa.map_(pa.string(), pa.field("value", array.type, nullable=False))
    entries = pa.StructArray.from_arrays(
        [pa.array(["a", "b", "c"]), array], fields=[kind.key_field, kind.item_field]
    )
    offsets = pa.array([0, 2, 3], pa.int32()).buffers()[1]
    return pa.Array.from_buffers(kind, 2, [None, offsets], children=[entries])


ARRAYS = {
    "a list": LISTS,
    "a struct": STRUCTS,
    "a number": pa.array([1, None, 3]),
    "a list in a struct": within(LISTS),
    "a struct in a struct": within(STRUCTS),
    "a number in a struct": within(pa.array([1, None, 3])),
    "pairs in a struct that is null": within(PAIRS, GAP),
    "lists in a list": listed(LISTS),
    "structs in a list": listed(STRUCTS),
    "pairs in a struct that is null in a list": listed(within(PAIRS, GAP)),
    "lists in a map": mapped(LISTS),
    "a large list": within(LISTS.cast(pa.large_list(pa.int64()))),
}


def declared(array: pa.Array) -> pa.RecordBatch:
    """A batch of one column that is declared never to be null."""
    return pa.record_batch([array], schema=pa.schema([pa.field("c", array.type, nullable=False)]))


@pytest.mark.parametrize("name", ARRAYS)
def test_a_null_stays_one_where_none_was_declared(place: Place, name: str) -> None:
    array = ARRAYS[name]
    (seen,) = place.publish(place.sealed(declared(array)))
    assert isinstance(seen, Output), seen
    found = [row["c"] for row in place.rows()]
    if place.scheme != "parquet" and pa.types.is_nested(array.type):
        found = [None if text is None else json.loads(text) for text in found]
    assert found == [in_json(value) if place.scheme != "parquet" else value
                     for value in array.to_pylist()]  # fmt: skip


def in_json(value: Any) -> Any:
    """A value as JSON has it: a map is a list of objects."""
    if isinstance(value, list) and value and isinstance(value[0], tuple):
        return [{"key": key, "value": each} for key, each in value]
    return value


@pytest.mark.parametrize("name", ARRAYS)
def test_the_values_of_a_batch_stay_the_same(name: str) -> None:
    for array in (ARRAYS[name], ARRAYS[name].slice(1)):
        batch = declared(array)
        opened = may_be_null(batch)
        opened.validate(full=True)
        assert opened.to_pylist() == batch.to_pylist()
        assert opened.schema.field("c").nullable
        assert opened.schema.field("c").type == type_that_may(array.type)
        assert may_be_null(opened) is opened


def test_a_topic_of_before_takes_what_comes_now(parquet: Place) -> None:
    """Files of an earlier version say that a field is never null; the topic no longer does."""
    from casparian_flow.engine.sinks.topic_schema import unite

    old = pa.schema([pa.field("c", within(LISTS).type)])
    new = may_be_null(declared(within(LISTS))).schema
    assert unite(old, new).field("c").type == new.field("c").type == type_that_may(old[0].type)
    for job in (1, 2):
        (seen,) = parquet.publish(parquet.sealed(declared(within(LISTS)), job=job))
        assert isinstance(seen, Output), seen
    assert len(parquet.rows(TOPIC)) == 6
