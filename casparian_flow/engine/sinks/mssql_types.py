"""How Arrow columns become SQL Server columns without changing a value (docs/types.md).

`_declared` says which type each becomes; a dictionary or extension type is stored as its values,
and lists, maps and structs as JSON. A number column whose type in the table differs accepts values
that fit it exactly. Columns that a user narrowed to `nvarchar(n)` or `varbinary(n)` accept what
fits into them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from casparian_flow.engine.sinks import columns
from casparian_flow.engine.sinks.base import LINEAGE
from casparian_flow.errors import OutputRefused

COLUMNS_LIMIT = 1024 - len(LINEAGE)
"""The most columns of a table, without the lineage columns."""

NAME_LIMIT = 128
"""The most UTF-16 units of a name."""

_CELL_BYTES = (1 << 31) - 1
"""The most bytes of a `max` value; a character takes two bytes or four."""

_FIRST_SECOND, _LAST_SECOND = -62_135_596_800, 253_402_300_799
"""First second of the year 1 and last second of 9999, counted from 1970."""

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}

_DAY = 86_400

_PLAIN = {
    "bit": pa.bool_(), "tinyint": pa.uint8(), "smallint": pa.int16(), "int": pa.int32(),
    "bigint": pa.int64(), "real": pa.float32(), "float": pa.float64(), "date": pa.date32(),
    "time(7)": pa.time64("ns"), "nvarchar(max)": pa.large_string(),
    "varbinary(max)": pa.large_binary(),
}  # fmt: skip
"""Declared type -> the Arrow type in which the driver sends its values."""

_INTEGERS = {"tinyint", "smallint", "int", "bigint"}

_SMALLEST = {pa.float32(): 2.0**-126, pa.float64(): 2.0**-1022}
"""The smallest positive number that is not subnormal; SQL Server does not store subnormals."""


@dataclass(frozen=True)
class Column:
    """The conversion of one column from Arrow to SQL Server."""

    name: str
    kind: Any
    """The Arrow type in the output."""
    declared: str
    """The type in the table; empty if the output has only nulls."""
    source: str
    """The name in the output; the name in the table may differ in case."""

    @property
    def loaded(self) -> str:
        """The type in the stage table: the same, but of maximal length."""
        base = self.declared.partition("(")[0]
        return f"{base}(max)" if base in ("nvarchar", "varbinary") else self.declared

    @property
    def plain(self) -> Any:
        """The Arrow type in which the values are given to the driver."""
        if self.declared.startswith("decimal"):
            return pa.decimal128(*map(int, re.findall(r"\d+", self.declared)))  # digits, scale
        if self.declared.startswith("datetime"):
            unit = "ns" if _unwrapped(self.kind).unit == "ns" else "us"
            return pa.timestamp(unit, "UTC" if self.declared == "datetimeoffset(7)" else None)
        return _PLAIN[self.loaded]

    def array(self, values: Any) -> Any:
        """Convert an Arrow array for the driver.

        Raises:
            OutputRefused: SQL Server cannot hold a value exactly.
        """
        with self._holding():
            return _exact(_decoded(values), self.plain)

    def check(self, values: Any) -> None:
        """Check that SQL Server can hold every value. As `array`, but writes no JSON."""
        with self._holding():
            if pa.types.is_nested(_unwrapped(self.kind)):
                columns.check_cells(values)
                columns.check_inside(values, in_json=True)
            else:
                _exact(_decoded(values), self.plain)

    def fit(self, declared: str, name: str = "") -> Column:
        """The column for a table that declares it with this type.

        Args:
            name: the table's spelling of the name; empty: the same.

        Raises:
            OutputRefused: the values would change in the table.
        """
        fitted = replace(self, name=name or self.name, declared=declared)
        if fitted.loaded == self.loaded or _are_numbers(declared, self.declared):
            return fitted
        raise self._refused(
            f"is {declared} in the table, not {self.declared}",
            "convert the column in the plugin, or give it another name",
        )

    @contextmanager
    def _holding(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, NotImplementedError) as error:
            raise self._refused(f"cannot be stored in SQL Server as {self.declared}: {error}",
                                "convert the column in the plugin") from error  # fmt: skip

    def _refused(self, message: str, hint: str) -> OutputRefused:
        return OutputRefused(f"column {self.name!r} ({self.kind}) {message}", hint)


def columns_of(schema: Any) -> list[Column]:
    """The SQL Server columns for an Arrow schema.

    Raises:
        OutputRefused: SQL Server does not support a type or name, two columns have one name for
            it, or there are too many columns.
    """
    columns.check_fields(schema, "SQL Server")
    found = [Column(field.name, field.type, _declared(field), field.name) for field in schema]
    names = Counter(fold(column.name) for column in found)
    for column in found:
        if not is_short(column.name):
            raise OutputRefused(
                f"column {column.name[:40]!r}... has a name of more than {NAME_LIMIT} characters",
                "rename the column in the plugin",
            )
        if names[fold(column.name)] > 1:
            raise OutputRefused(
                f"column {column.name!r} may have the same name as another one in SQL Server: "
                "most databases ignore case, width and trailing blanks",
                "rename the column in the plugin",
            )
    check_count(len(found) - sum(column.name in LINEAGE for column in found))
    return found


def check_values(batch: Any) -> None:
    """Check that SQL Server can hold every column and value of a batch.

    Raises:
        OutputRefused: it cannot; the message names the column.
    """
    for column, values in zip(columns_of(batch.schema), batch.columns, strict=True):
        if column.declared:
            column.check(values)


def check_count(count: int) -> None:
    """Check that a table can have this many columns besides the lineage columns.

    Raises:
        OutputRefused: it cannot.
    """
    if count > COLUMNS_LIMIT:
        raise OutputRefused(
            f"{count} columns are too many: a table of SQL Server has at most {COLUMNS_LIMIT} "
            "besides the lineage columns",
            "publish fewer columns, or a column of lists",
        )


def is_short(name: str) -> bool:
    """Whether SQL Server can have a name of this length."""
    return len(name.encode("utf-16-le")) // 2 <= NAME_LIMIT


def fold(name: str) -> str:
    """A name as most databases compare it: without regard to case and width."""
    return unicodedata.normalize("NFKC", name).casefold().rstrip(" ")


def declared_as(base: str, max_length: int, precision: int, scale: int) -> str:
    """A column's T-SQL type, from its row in the catalog (`sys.columns`)."""
    if base in ("decimal", "numeric"):
        return f"decimal({precision},{scale})"
    if base in ("time", "datetime2", "datetimeoffset"):
        return f"{base}({scale})"
    if base in ("nvarchar", "nchar"):
        return f"{base}({'max' if max_length < 0 else max_length // 2})"
    if base in ("varchar", "char", "varbinary", "binary"):
        return f"{base}({'max' if max_length < 0 else max_length})"
    return base


def _declared(field: Any) -> str:
    """The T-SQL type for an Arrow field; empty for a field of nulls."""
    types, kind = pa.types, _unwrapped(field.type)
    if types.is_decimal(kind) and kind.scale >= 0 and kind.precision <= 38:
        return f"decimal({max(kind.precision, kind.scale)},{kind.scale})"
    for known, declared in (
        (types.is_null, ""),
        (types.is_boolean, "bit"),
        (types.is_uint8, "tinyint"),
        (lambda kind: types.is_int8(kind) or types.is_int16(kind), "smallint"),
        (lambda kind: types.is_int32(kind) or types.is_uint16(kind), "int"),
        (lambda kind: types.is_int64(kind) or types.is_uint32(kind), "bigint"),
        (types.is_uint64, "decimal(20,0)"),
        (types.is_float64, "float"),
        (types.is_floating, "real"),
        (types.is_date, "date"),
        (types.is_time, "time(7)"),
        (types.is_timestamp, "datetimeoffset(7)" if getattr(kind, "tz", "") else "datetime2(7)"),
        (types.is_duration, "bigint"),
        (columns.is_text, "nvarchar(max)"),
        (columns.is_binary, "varbinary(max)"),
        (types.is_nested, "nvarchar(max)"),
    ):
        if known(kind):
            return declared
    raise OutputRefused(
        f"column {field.name!r} ({field.type}) cannot be stored in SQL Server: it has no such type",
        "convert the column in the plugin",
    )


def _unwrapped(kind: Any) -> Any:
    """The type of a dictionary's or extension type's values."""
    while columns.is_wrapped(kind):
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind.storage_type
    return kind


def _decoded(array: Any) -> Any:
    """The values without a dictionary or extension type; nested values as JSON texts."""
    while columns.is_wrapped(array.type):
        is_dictionary = pa.types.is_dictionary(array.type)
        array = array.dictionary_decode() if is_dictionary else array.storage
    if pa.types.is_nested(array.type):
        return pa.array(columns.json_texts(array), pa.large_string())
    return array


def _exact(array: Any, plain: Any) -> Any:
    """Cast an array to a type that the driver accepts.

    Raises:
        ValueError: a value would change, or is outside of SQL Server's range.
    """
    types = pa.types
    if types.is_duration(array.type):
        return array.cast(pa.duration("ns")).cast(pa.int64()).cast(plain)
    if types.is_temporal(array.type):
        _check_moment(array)
        return array.cast(plain)
    if types.is_integer(array.type) and types.is_decimal(plain):
        # Arrow refuses a cast to fewer digits than the integer type may have.
        array = array.cast(pa.decimal128(38, plain.scale))
    cast = array.cast(plain)
    if types.is_floating(plain):
        _check_float(cast)
        if not cast.cast(array.type).equals(array):
            raise ValueError("a value would be rounded")
    if (columns.is_text(plain) or columns.is_binary(plain)) and len(cast):
        longest = pc.max(pc.binary_length(cast)).as_py() or 0
        if longest * (2 if columns.is_text(plain) else 1) > _CELL_BYTES:
            raise ValueError(f"a value of {longest} bytes is too long")
    return cast


def _check_float(array: Any) -> None:
    if not pc.all(pc.is_finite(array)).as_py() and len(array.drop_null()):
        raise ValueError("SQL Server has no NaN and no infinity; publish null instead")
    size = pc.abs(array)
    small = pc.and_(pc.less(size, _SMALLEST[array.type]), pc.not_equal(size, 0))
    if pc.any(small).as_py():
        raise ValueError("a number is too close to 0 (subnormal) for SQL Server")


def _check_moment(array: Any) -> None:
    """Raise ValueError if a date, time or timestamp is out of range, or finer than 100 ns."""
    types, kind = pa.types, array.type
    short = types.is_date32(kind) or types.is_time32(kind)
    ticks = array.cast(pa.int32() if short else pa.int64()).cast(pa.int64())
    unit = "day" if types.is_date32(kind) else "ms" if types.is_date64(kind) else kind.unit
    if unit == "ns" and not pc.multiply(pc.divide(ticks, 100), 100).equals(ticks):
        raise ValueError("SQL Server stores times to 100 nanoseconds, and this one is finer")
    if types.is_time(kind):
        low, high = 0, _DAY * _PER_SECOND[unit] - 1
    elif unit == "day":
        low, high = _FIRST_SECOND // _DAY, _LAST_SECOND // _DAY
    elif unit == "ns":
        return  # 64 bits of nanoseconds reach only from 1677 to 2262
    else:
        low = _FIRST_SECOND * _PER_SECOND[unit]
        high = (_LAST_SECOND + 1) * _PER_SECOND[unit] - 1
    if pc.any(pc.or_(pc.less(ticks, low), pc.greater(ticks, high))).as_py():
        raise ValueError("it is outside of the years 1 to 9999, or of a day")


def are_one(one: str, other: str) -> bool:
    """Whether a union of columns of both types holds every value as it is."""
    bases = {one.partition("(")[0], other.partition("(")[0]}
    return one == other or bases <= _INTEGERS or (len(bases) == 1 and bases != {"decimal"})


def _are_numbers(one: str, other: str) -> bool:
    """Whether values of one number type can be checked to fit the other exactly."""
    bases = {one.partition("(")[0], other.partition("(")[0]}
    return bases <= _INTEGERS | {"decimal"} or bases <= _INTEGERS | {"real", "float"}
