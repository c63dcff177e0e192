"""Columns and fields that may be null, whatever their plugin declared of them.

A plugin may declare that a field is never null. Arrow holds no values to that, and its Parquet
writer believes it: of a list or a struct that is null there it makes an empty one, without a word,
and of lists of a fixed size in a struct that is null a file that nobody can read. So no field is
declared so in what we stage: a null stays a null.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa


def may_be_null(batch: Any) -> Any:
    """The same values in a batch all of whose columns, and fields in them, may be null."""
    if all(map(_may, batch.schema)):
        return batch
    columns = [_array(column, type_that_may(column.type)) for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(map(_field, batch.schema)))


def type_that_may(kind: Any) -> Any:
    """The same type, with every field in it nullable but the keys of maps, which never are."""
    types = pa.types
    if types.is_struct(kind):
        return pa.struct(list(map(_field, kind)))
    if types.is_map(kind):
        key = kind.key_field.with_type(type_that_may(kind.key_type))
        return pa.map_(key, _field(kind.item_field), kind.keys_sorted)
    if types.is_fixed_size_list(kind):
        return pa.list_(_field(kind.value_field), kind.list_size)
    if types.is_large_list(kind):
        return pa.large_list(_field(kind.value_field))
    if types.is_list(kind):
        return pa.list_(_field(kind.value_field))
    return kind


def _field(field: Any) -> Any:
    return field.with_nullable(True).with_type(type_that_may(field.type))


def _may(field: Any) -> bool:
    return bool(field.nullable) and (
        not pa.types.is_nested(field.type) or field.type == type_that_may(field.type)
    )


def _array(array: Any, kind: Any) -> Any:
    """The array as one of this type: of its own buffers, for Arrow's casts of nested types lose
    nulls (see `columns.Column`)."""
    if array.type == kind:
        return array
    if array.offset:
        array = pa.concat_arrays([array])
    types = pa.types
    if types.is_struct(kind):
        children = [_array(array.field(n), kind.field(n).type) for n in range(kind.num_fields)]
    elif types.is_map(kind):
        parts = [_array(array.keys, kind.key_type), _array(array.items, kind.item_type)]
        children = [pa.StructArray.from_arrays(parts, fields=[kind.key_field, kind.item_field])]
    else:
        children = [_array(array.values, kind.value_type)]
    own = 1 if types.is_struct(kind) or types.is_fixed_size_list(kind) else 2
    return pa.Array.from_buffers(kind, len(array), array.buffers()[:own], children=children)
