"""How Arrow columns become SQLite columns without changing a value.

    boolean, integers           INTEGER   a uint64 above 2**63-1 is refused
    duration                    INTEGER   nanoseconds
    floating point              REAL      NaN is refused (SQLite would store NULL); -0.0 is 0.0
    string                      TEXT
    binary                      BLOB
    decimal                     TEXT      with all digits
    date, time, timestamp       TEXT      2024-01-31 23:59:59.000000: all digits of the unit, three
                                          for seconds; with a zone: in UTC, followed by +00:00
    list, map, struct           TEXT      JSON; binary in hexadecimal, a map as [{"key":, "value":}]
    null                        (none)    such a column accepts values of every type

A column keeps the type of its first output; a column of nulls gets its type later. INTEGER and
REAL columns accept each other's numbers if each of them stays exact. Otherwise an INTEGER column
accepts REALs if a REAL can hold each of its numbers (`sqlite_tables.fit_table`). Any other change
of type is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from casparian_flow.engine.sinks.base import otherwise
from casparian_flow.errors import OutputRefused

CELL_VALUES = 1 << 22
"""The most values in one list, map or struct that is written as JSON. Each becomes a Python object
of about 200 bytes first, and null values take no bytes in Arrow."""
VALUES_AT_ONCE = 1 << 20
"""The most values in rows that become Python objects at once; a single row may have more."""


@dataclass(frozen=True)
class Column:
    """The conversion of one column from Arrow to SQLite."""

    name: str
    kind: Any
    """The Arrow type in the output."""
    plain: Any
    """The Arrow type that the values are cast to first, exactly."""
    declared: str
    """The type in the table; empty if it accepts values of every type."""

    def values(self, array: Any) -> list[Any]:
        """Convert an Arrow array to values for SQLite.

        Raises:
            OutputRefused: SQLite cannot hold a value exactly.
        """
        with self._holding():
            values = _values(self._checked(array))
            return _json_texts(values) if pa.types.is_nested(self.plain) else values

    def check(self, array: Any) -> None:
        """Check that SQLite can hold every value. Faster than `values`; raises the same errors."""
        with self._holding():
            self._checked(array)

    def _checked(self, array: Any) -> Any:
        # A nested array is not cast: for nulls in a list in a list, pyarrow 26 makes as many as
        # the outer list has items.
        nested = pa.types.is_nested(self.plain)
        if nested:
            check_cells(array)
        array = array if nested else array.cast(self.plain)
        check_inside(array, in_json=nested)
        return array

    @contextmanager
    def _holding(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, NotImplementedError) as error:
            raise OutputRefused(
                f"column {self.name!r} ({self.kind}) cannot be stored in SQLite: {error}",
                "convert the column in the plugin",
            ) from error


def columns_of(schema: Any) -> list[Column]:
    """The SQLite columns for an Arrow schema.

    Raises:
        OutputRefused: two columns have one name for SQLite, or two fields of a struct have one.
    """
    check_fields(schema, "SQLite")
    columns = [_column(field.name, field.type) for field in schema]
    names = Counter(fold(column.name) for column in columns)
    for column in columns:
        if names[fold(column.name)] > 1:
            raise OutputRefused(
                f"column {column.name!r} has the same name as another one in SQLite, which "
                "ignores case",
                "rename the column in the plugin",
            )
    return columns


def _column(name: str, kind: Any) -> Column:
    types = pa.types
    plain = kind
    while is_wrapped(plain):
        plain = plain.value_type if types.is_dictionary(plain) else plain.storage_type
    declared = "TEXT"
    if types.is_integer(plain):
        plain, declared = pa.int64(), "INTEGER"
    elif types.is_floating(plain):
        plain, declared = pa.float64(), "REAL"
    elif types.is_boolean(plain) or types.is_duration(plain):
        declared = "INTEGER"
    elif is_binary(plain):
        declared = "BLOB"
    elif types.is_null(plain):
        declared = ""
    return Column(name, kind, plain, declared)


def check_fields(schema: Any, sink: str) -> None:
    """Check that JSON can hold every struct among the columns.

    Raises:
        OutputRefused: two fields of a struct have the same name.
    """
    for field in schema:
        if _has_twins(field.type):
            raise OutputRefused(
                f"column {field.name!r} ({field.type}) cannot be stored in {sink}: two of its "
                "fields have one name",
                "convert the column in the plugin",
            )


def _has_twins(kind: Any) -> bool:
    """Whether a struct, at any depth of the type, has two fields with one name."""
    if isinstance(kind, pa.BaseExtensionType):
        return _has_twins(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _has_twins(kind.value_type)
    fields = [kind.field(number) for number in range(kind.num_fields)]
    names = {field.name for field in fields}
    twins = pa.types.is_struct(kind) and len(names) < len(fields)
    return twins or any(_has_twins(field.type) for field in fields)


def fit(column: Column, declared: str, settles: str = "") -> Column:
    """The column for a table that declares it with another type.

    Args:
        settles: the command to suggest if the output is refused.

    Raises:
        OutputRefused: the values would change in the table.
    """
    types = {column.declared, declared}
    if len(types) == 1 or "" in types:
        return column
    if types == {"INTEGER", "REAL"}:
        return replace(column, plain=pa.int64() if declared == "INTEGER" else pa.float64())
    raise OutputRefused(
        f"column {column.name!r} ({column.kind}) is {declared} in the table, not {column.declared}"
        f"{otherwise(settles, column.name)}",
        "convert the column in the plugin, or give it another name",
    )


def fold(name: str) -> str:
    """A name as SQLite compares it: without case, for ASCII letters only."""
    return name.encode().lower().decode()


def check_inside(array: Any, *, in_json: bool) -> None:
    """Check that SQLite, or JSON where nested, can hold every value of an array, at any depth.

    Raises:
        ValueError: a value cannot be stored.
    """
    types = pa.types
    for leaf in leaves(array):
        if types.is_duration(leaf.type):
            leaf.cast(pa.duration("ns"))
        elif types.is_temporal(leaf.type):
            if pc.any(pc.starts_with(_plain_texts(leaf), "<")).as_py():
                raise ValueError("a date or time is out of range")
        elif types.is_floating(leaf.type) and len(leaf.drop_null()):
            if in_json and not pc.all(pc.is_finite(leaf)).as_py():
                raise ValueError("JSON has no NaN and no infinity; publish null instead")
            if pc.any(pc.is_nan(leaf)).as_py():
                raise ValueError("it has no NaN; publish null instead")


def leaves(array: Any) -> Iterator[Any]:
    """The arrays without nesting that an array consists of, by their plain types."""
    array = unwrapped(array)
    if pa.types.is_map(array.type):
        array = as_list(array)
    if pa.types.is_struct(array.type):
        for child in array.flatten():
            yield from leaves(child)
    elif pa.types.is_nested(array.type) and not pa.types.is_union(array.type):
        yield from leaves(array.flatten())
    else:
        yield array


def unwrapped(array: Any) -> Any:
    """The values of an array whose type stores them as another type."""
    while is_wrapped(kind := array.type):
        array = array.dictionary_decode() if pa.types.is_dictionary(kind) else array.storage
    return array


def as_list(array: Any) -> Any:
    """An array of maps as an array of lists of key and value; not cast, as in `_checked`."""
    pairs = pa.StructArray.from_arrays([array.keys, array.items], ["key", "value"])
    return pa.Array.from_buffers(
        pa.list_(pairs.type), len(array), array.buffers()[:2], offset=array.offset, children=[pairs]
    )


def _values(array: Any) -> list[Any]:
    """The exact Python values of an Arrow array, for SQLite or JSON."""
    types, array = pa.types, unwrapped(array)
    kind = array.type
    if types.is_map(kind):
        return _values(as_list(array))
    if types.is_struct(kind):
        return _records(array)
    if types.is_nested(kind):
        items = iter(_values(array.flatten()))
        lengths = pc.list_value_length(array).to_pylist()
        return [None if length is None else list(islice(items, length)) for length in lengths]
    if types.is_duration(kind):
        array = array.cast(pa.duration("ns")).cast(pa.int64())
    elif types.is_temporal(kind) or types.is_decimal(kind):
        return _texts(array)
    values: list[Any] = array.to_pylist()
    return values


def _records(array: Any) -> list[Any]:
    names = [field.name for field in array.type]
    if len(set(names)) < len(names):
        raise ValueError("two fields have one name")
    fields = [_values(field) for field in array.flatten()]
    present = array.is_valid().to_pylist()
    rows = zip(*fields, strict=True)
    return [dict(zip(names, row, strict=True)) if is_row else None
            for is_row, row in zip(present, rows, strict=True)]  # fmt: skip


def _texts(array: Any) -> list[Any]:
    """Decimals, dates and times as text; those with a time zone in UTC."""
    zone = "+00:00" if getattr(array.type, "tz", None) else ""
    return [None if text is None else text + zone for text in _plain_texts(array).to_pylist()]


def _plain_texts(array: Any) -> Any:
    """The same as an Arrow array, without a zone; `<...>` for a value outside of the calendar."""
    if getattr(array.type, "tz", None):
        array = array.cast(pa.timestamp(array.type.unit))
    return array.cast(pa.string())


def values_in(array: Any) -> int:
    """How many values an array has, counting nested ones too."""
    kind, count = array.type, len(array)
    if isinstance(kind, pa.BaseExtensionType):
        return values_in(array.storage)
    if pa.types.is_fixed_size_list(kind):
        size = kind.list_size
        return count + values_in(array.values.slice(array.offset * size, count * size))
    if pa.types.is_struct(kind):
        return count + sum(values_in(array.field(number)) for number in range(kind.num_fields))
    if pa.types.is_nested(kind) and not pa.types.is_union(kind):
        return count + values_in((as_list(array) if pa.types.is_map(kind) else array).flatten())
    return count


def pieces(
    batch: Any, size: Callable[[Any], int] | None = None, most: int | None = None
) -> Iterator[Any]:
    """Slice a batch into whole rows of at most a size; by default `VALUES_AT_ONCE` values."""
    if batch.num_rows < 2 or (size or values_of)(batch) <= (most or VALUES_AT_ONCE):
        yield batch
        return
    half = batch.num_rows // 2
    for part in (batch.slice(0, half), batch.slice(half)):
        yield from pieces(part, size, most)


def values_of(batch: Any) -> int:
    """How many values a batch has, counting nested ones too."""
    return sum(map(values_in, batch.columns))


def check_cells(array: Any) -> None:
    """Check that every list, map or struct is small enough to be written as JSON.

    Raises:
        ValueError: one has more than `CELL_VALUES` values in it.
    """
    if values_in(array) <= CELL_VALUES:
        return
    if len(array) == 1:
        raise ValueError(f"one of its values contains more than {CELL_VALUES} values")
    half = len(array) // 2
    for part in (array.slice(0, half), array.slice(half)):
        check_cells(part)


def json_texts(array: Any) -> list[str | None]:
    """The lists, maps or structs of an array as JSON texts.

    Raises:
        ValueError, NotImplementedError: JSON cannot hold a value exactly.
    """
    check_cells(array)
    check_inside(array, in_json=True)
    return _json_texts(_values(array))


def _json_texts(values: list[Any]) -> list[str | None]:
    return [None if value is None else _json(value) for value in values]


def _json(value: Any) -> str:
    return json.dumps(
        value, allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=bytes.hex
    )


def is_wrapped(kind: Any) -> bool:
    """Whether the type stores its values as another type: an extension or dictionary type."""
    return isinstance(kind, pa.BaseExtensionType) or bool(pa.types.is_dictionary(kind))


def is_text(kind: Any) -> bool:
    """Whether values of this type are strings."""
    types = pa.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def is_binary(kind: Any) -> bool:
    """Whether values of this type are bytes."""
    types = pa.types
    return bool(
        types.is_binary(kind) or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind) or types.is_binary_view(kind)
    )  # fmt: skip
