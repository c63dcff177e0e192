"""Columns as the wire takes them: each value written out, no layout in which two share a place.

    dictionary                          its values
    string_view, binary_view            string, binary
    list_view, large_list_view          list, large_list
    run-end-encoded                     its values

at any depth, the values being the same. Which of these layouts data has is often an accident of the
library that made it, and dictionaries differ between chunks of one table (a category's index type
follows the number of its values), which would look like a change of columns. Metadata are left out
for the same reason.

A batch is a slice of a larger one: nothing beyond its own rows is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


def plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch in layouts that the wire takes.

    Raises:
        NotImplementedError: there is no such layout for a column's type; the message names both.
    """
    import pyarrow as pa

    columns = []
    for field, column in zip(batch.schema, batch.columns, strict=True):
        try:
            columns.append(_plain(column) if _is_shared(column.type) else column)
        except (pa.ArrowException, NotImplementedError) as error:
            words = f"column {field.name!r} ({field.type}) cannot be written out: {error}"
            raise NotImplementedError(words) from error
    fields = [f.with_type(c.type) for f, c in zip(batch.schema, columns, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))


def written_out_bytes(batch: pa.RecordBatch) -> int:
    """About how many bytes it has once it is plain: a dictionary's values of a mean length each."""
    import pyarrow as pa

    total = int(batch.nbytes)
    for column in batch.columns:
        if pa.types.is_dictionary(column.type) and len(column.dictionary):
            total += len(column) * column.dictionary.nbytes // len(column.dictionary)
    return total


def _is_shared(kind: Any) -> bool:
    """Whether values of the type, or within it, may share a place."""
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
    """The array without such layouts, whatever it is."""
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
    """A list of any layout as one with offsets. Its parts are put together, and not cast: of nulls
    in lists in lists, pyarrow 26 makes as many as the outer list has items."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    is_large = pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind)
    width = pa.int64() if is_large else pa.int32()
    items = _plain(array.flatten())  # what no null hides, one list after the other
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
    """An array of this type from its parts, with the nulls of the one it is made from."""
    import pyarrow as pa

    valid = pa.concat_arrays([array.is_valid()]) if array.null_count else None
    bits = valid.buffers()[1] if valid is not None else None
    return pa.Array.from_buffers(kind, len(array), [bits, *buffers], children=list(children))
