"""Dates of 64 bits that Parquet would wrap: it keeps days in 32, and Arrow casts without a look.

`date64` is milliseconds; one beyond the year 5,881,580 came back as a day of 1970.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from casparian_flow.errors import OutputRefused


def check(topic: str, batch: Any) -> None:
    """Return if every date of a batch stays the same.

    Raises:
        OutputRefused: one does not; the message names its column.
    """
    for field, column in zip(batch.schema, batch.columns, strict=True):
        for dates in _dates(column):
            try:
                dates.cast(pa.date32())
            except pa.ArrowInvalid as error:
                raise OutputRefused(
                    f"topic {topic!r}: column {field.name!r} ({field.type}) cannot be stored: "
                    f"{error}",
                    "convert the column in the plugin",
                ) from error


def _dates(array: Any) -> Iterator[Any]:
    """The arrays of `date64` that an array consists of."""
    types, kind = pa.types, array.type
    if types.is_date64(kind):
        yield array
    elif isinstance(kind, pa.BaseExtensionType):
        yield from _dates(array.storage)
    elif types.is_dictionary(kind):
        yield from _dates(array.dictionary)
    elif types.is_map(kind):
        yield from _dates(array.keys)
        yield from _dates(array.items)
    elif types.is_struct(kind):
        for child in array.flatten():
            yield from _dates(child)
    elif types.is_nested(kind) and not types.is_union(kind):
        yield from _dates(array.flatten())
