"""The columns of a topic, and the rule for outputs whose columns differ.

Columns are united by name, in the order of their first appearance. A column has one type in a
topic, the first that was published. A later output's values are cast to it if the cast is exact for
each of them, bit for bit. If not, a number column becomes *wider* if all its values so far fit the
wider type exactly; else the output is refused. A new column is null in earlier rows, and a column
that an output lacks is null in its rows. Types that may be cast to each other:

    integers, floating point           if the value is the same, including -0.0 and NaN
    decimals                           if no digit is lost
    text                               string, large_string, string_view
    binary                             of any offset size; of a fixed length if all have it
    dates; times; durations            between units, if nothing is cut off
    timestamps without a zone          the same
    timestamps with a zone             the same; the topic's zone shows the same points in time
    lists; maps                        of any offset size; their items by this rule
    structs                            with the same fields in the same order, each by this rule

All else is refused: text is not parsed, a number does not become text, a boolean is not a number,
an extension type matches only itself. A dictionary counts as its values (inside a nested type it
matches only itself). Null is not a type yet: a column, or a part of it, that was null everywhere
takes the first type that comes.

Wider than an integer type are those of the same sign with more bits, and double
(`EXACT_IN_DOUBLE`); wider than float is double.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pyarrow as pa

from casparian_flow.engine.sinks.base import LINEAGE, otherwise
from casparian_flow.engine.sinks.columns import is_binary, is_text, leaves
from casparian_flow.errors import OutputRefused

LINEAGE_FIELDS: tuple[Any, ...] = tuple(
    pa.field(name, kind)
    for name, kind in zip(LINEAGE, (pa.int64(), pa.int64(), pa.string(), pa.string()), strict=True)
)
"""The lineage columns: the last ones of every output. A topic's own columns do not include them."""


def own_columns(schema: Any) -> Any:
    """A file's columns without the lineage columns and without metadata."""
    return pa.schema([field for field in schema if field.name not in LINEAGE])


EXACT_IN_DOUBLE = 1 << 53
"""A double holds every whole number from minus this to this exactly."""


def unite(known: Any, columns: Any, number: Callable[[Any, Any], Any] | None = None) -> Any:
    """A topic's columns after an output is added.

    Args:
        known: the topic's columns so far; an empty schema for a new topic.
        columns: the output's columns, without the lineage columns.
        number: called for a number column that is too narrow for the output, with the wider type
            and the output's; returns the column's type. Without it, the column keeps its own.
    """
    kinds = {field.name: type_that_may(field.type) for field in known}
    for field in columns:
        own = _plain(field.type)
        kind, before = type_that_may(own), kinds.get(field.name)
        if before is None or (_is_open(before) and _are_kin(before, kind)):
            kinds[field.name] = kind
        elif number and (wide := wider(before, own)):
            kinds[field.name] = number(wide, own)
    return pa.schema(kinds.items())


def widened(known: Any, columns: Any) -> Any:
    """As `unite`, but with number columns widened to the output's types."""
    return unite(known, columns, lambda wide, _: wide)


def as_staged(known: Any, columns: Any) -> Any:
    """As `unite`, but numbers that may widen a column keep their type until it is published."""
    return unite(known, columns, lambda _, own: own)


def wider(kind: Any, other: Any) -> Any:
    """The wider number type that a topic's column may become for an output.

    Args:
        kind: the column's type in the topic.
        other: its type in the output.

    Returns:
        None if `kind` is wide enough, or no type is wide enough for both.
    """
    numbers = (pa.types.is_integer, pa.types.is_float32, pa.types.is_float64)
    if kind == other or not all(any(test(each) for test in numbers) for each in (kind, other)):
        return None
    whole = [pa.types.is_integer(each) for each in (kind, other)]
    if whole == [True, True]:
        signed = [pa.types.is_signed_integer(each) for each in (kind, other)]
        return other if signed[0] == signed[1] and other.bit_width > kind.bit_width else None
    return None if kind == pa.float64() else pa.float64()


def is_within(kind: Any, field: Any) -> bool:
    """Whether readers of a topic's column can read a file's column of this type."""
    wide = wider(kind, field.type)
    return bool(kind == field.type or pa.types.is_null(kind) or wide == field.type)


def is_mended(known: Any, columns: Any) -> bool:
    """Whether a rebuilt output has a column of another type than its topic."""
    return any(
        field.name in known.names and not _are_alike(known.field(field.name).type, field.type)
        for field in columns
    )


def _are_alike(kind: Any, other: Any) -> bool:
    """Whether two types are the same, or one is null, or they differ in offsets only."""
    kind, other = type_that_may(_plain(kind)), type_that_may(_plain(other))
    offsets = ("text", "binary")
    return (
        kind == other
        or (_is_open(kind) and _are_kin(kind, other))
        or (_is_open(other) and _are_kin(other, kind))
        or (_family(kind) in offsets and _are_kin(kind, other))
    )


def is_exact(column: Any, kind: Any) -> bool:
    """Whether every value of a number column fits a type exactly."""
    try:
        return all(len(_exact(chunk, kind)) == len(chunk) for chunk in column.chunks)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False


def fit(topic: str, table: Any, columns: Any, settles: str = "") -> Any:
    """Cast a table to exactly these columns, in their order; missing columns are null.

    Args:
        table: its columns are all among `columns`.
        columns: the result of `unite`, with or without the lineage columns.
        settles: the command to suggest if the output is refused.

    Raises:
        OutputRefused: a column's values do not fit its type in the topic exactly.
    """
    given = dict(zip(table.column_names, table.columns, strict=True))
    arrays = [
        _cast(topic, field, given[field.name], settles)
        if field.name in given
        else pa.nulls(table.num_rows, field.type)
        for field in columns
    ]
    return pa.Table.from_arrays(arrays, schema=columns)


def _cast(topic: str, field: Any, column: Any, settles: str) -> Any:
    if column.type == field.type:
        return column
    chunks = [_decoded(chunk) for chunk in column.chunks]
    kind = _plain(column.type)
    wrong = "which is a different kind of value"
    if _are_kin(kind, field.type):
        wrong = "with values that this type cannot hold exactly"
        try:
            exact = [_exact(chunk, field.type) for chunk in chunks]
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            pass
        else:
            return pa.chunked_array(exact, field.type)
    raise OutputRefused(
        f"topic {topic!r}: column {field.name!r} is {field.type} since it was first published; "
        f"this output has {kind}, {wrong}{otherwise(settles, field.name)}",
        "convert the column in the plugin, or give it another name",
    )


def _exact(array: Any, kind: Any) -> Any:
    """Cast an array to another type.

    Raises:
        pa.ArrowInvalid, pa.ArrowNotImplementedError: a value would change.
    """
    # Arrow's safe cast refuses every integer beyond 2**53 for a float, though many are exact: so
    # cast without it, and compare.
    cast = array.cast(kind, safe=not pa.types.is_floating(kind))
    cast.validate()  # pyarrow 26 sometimes returns too few nulls in lists
    for new, old in zip(leaves(cast), leaves(array), strict=True):
        if not (pa.types.is_null(old.type) or _bits(new.cast(old.type)).equals(_bits(old))):
            raise pa.ArrowInvalid("the values differ")
    return cast


def _bits(array: Any) -> Any:
    """Floating point as integers of the same bits: NaN equals itself, and -0.0 is not 0.0."""
    if not pa.types.is_floating(array.type):
        return array
    return array.view({16: pa.int16(), 32: pa.int32(), 64: pa.int64()}[array.type.bit_width])


def _plain(kind: Any) -> Any:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _decoded(array: Any) -> Any:
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _is_open(kind: Any) -> bool:
    """Whether the type is null, or has a part that is."""
    inside = (kind.field(n).type for n in range(kind.num_fields))
    return bool(pa.types.is_null(kind)) or any(map(_is_open, inside))


def _are_kin(kind: Any, other: Any) -> bool:
    """Whether values of one type may be cast to the other, by the module's rule."""
    if kind == other or pa.types.is_null(kind):
        return True
    if _family(kind) != _family(other) or kind.num_fields != other.num_fields:
        return False
    pairs = [(kind.field(n), other.field(n)) for n in range(kind.num_fields)]
    return all(
        _are_kin(one.type, two.type) and (one.name == two.name or not pa.types.is_struct(kind))
        for one, two in pairs
    )


def _family(kind: Any) -> str:
    types = pa.types
    if types.is_timestamp(kind):
        return "moment" if kind.tz else "timestamp"
    for family, tests in _FAMILIES.items():
        if any(test(kind) for test in tests):
            return family
    return str(kind)


_FAMILIES: dict[str, tuple[Any, ...]] = {
    "number": (pa.types.is_integer, pa.types.is_floating),
    "decimal": (pa.types.is_decimal,),
    "text": (is_text,),
    "binary": (is_binary,),
    "date": (pa.types.is_date,),
    "time": (pa.types.is_time,),
    "duration": (pa.types.is_duration,),
    "list": (
        pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list,
        pa.types.is_list_view, pa.types.is_large_list_view,
    ),
    "struct": (pa.types.is_struct,),
    "map": (pa.types.is_map,),
}  # fmt: skip


# A plugin may declare a field as not nullable. Arrow does not check the values, and its Parquet
# writer trusts the declaration: it silently writes a null list or struct as an empty one, and lists
# of a fixed size in a null struct as a file that cannot be read. So staged files declare every
# field as nullable.


def may_be_null(batch: Any) -> Any:
    """The same batch with every column, and every field in them, declared as nullable."""
    if all(map(_may, batch.schema)):
        return batch
    columns = [_array(column, type_that_may(column.type)) for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(map(_field, batch.schema)))


def type_that_may(kind: Any) -> Any:
    """The same type with every field in it nullable, except the keys of maps, which never are."""
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
    """The array's buffers under this type. Arrow's casts of nested types lose nulls (see
    `columns.Column`)."""
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


# An output that shares no column name with its topic is probably another table. Its rows are
# stored, and a line in the attempt's log says so. Columns that this process has staged count as the
# topic's too, because files of several kinds are often processed together, before any is published.


FAMILY_NOTE = "families: "
"""How the line in the log begins."""

_TOPICS = 1000
_NAMES_SHOWN = 8
_lock = threading.Lock()
_staged: OrderedDict[tuple[str, str], Counter[str]] = OrderedDict()
"""Location and topic -> how often this process has staged each column (by case-folded name); for
the most recent topics."""


def note_family(
    location: str, topic: str, names: Sequence[str], known: Callable[[], Collection[str]],
    settles: str,
) -> str:  # fmt: skip
    """Count an output's columns as its topic's, and note if it shares none with the topic.

    Args:
        known: returns the topic's columns in the sink; called only if the columns staged by this
            process do not answer the question.
        settles: the command that gives such files a topic of their own.

    Returns:
        A line for the log; empty if the output shares a column.
    """
    mine = {name.casefold() for name in names}
    with _lock:
        counts = _staged.setdefault((location, topic), Counter())
        before = sorted(counts)
        counts.update(mine)
        _staged.move_to_end((location, topic))
        while len(_staged) > _TOPICS:
            _staged.popitem(last=False)
    if not mine.isdisjoint(before):
        return ""
    existing = [name for name in known() if name not in LINEAGE]
    if not mine.isdisjoint(name.casefold() for name in existing) or not (existing or before):
        return ""
    hint = f"; for a topic of their own: {settles}" if settles else ""
    return (
        f"{FAMILY_NOTE}topic {topic!r} has the columns {_some(existing or before)}; this file "
        f"has only others: {_some(names)}{hint}"
    )


def forget_family(location: str, topic: str, names: Sequence[str]) -> None:
    """Undo `note_family` for an output that was discarded."""
    with _lock:
        counts = _staged.get((location, topic), Counter())
        counts.subtract({name.casefold() for name in names})
        for name in [name for name, count in counts.items() if count <= 0]:
            del counts[name]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(map(repr, names[:_NAMES_SHOWN])) + more
