"""Writes docs/types.md by asking the sinks: `python -m tests.sinks.write_types`.

Each value of `arrow_types` is staged and published alone, and read back without the code that
wrote it. A value counts as exact only if the sink gives back the very same one, bit for bit, and
as mapped only if the original can be made of what is there, bit for bit. What a sink changes
otherwise must be in `SAID`.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import date
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from casparian_flow.engine.sinks import mssql_types
from casparian_flow.errors import OutputRefused
from casparian_flow.protocol import Output
from tests.sinks.arrow_types import Row, rows
from tests.sinks.stages import Place

PAGE = Path(__file__).parent.parent.parent / "docs" / "types.md"
COLUMN = "the value"

SAID = {("sqlite", "-0.0"): "-0.0 becomes 0.0"}
"""What a sink changes, and says so. Here: SQLite keeps a whole number in a REAL column as an
integer, which has no sign of zero. The two compare equal."""

EPOCH = date(1970, 1, 1).toordinal()
NANOSECONDS = {"day": 86_400 * 10**9, "s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}

HEAD = """\
# Types

What each sink makes of the columns that a plugin publishes, by Arrow type; pandas and polars frames
have such types once they are published. `python -m tests.sinks.write_types` writes this page by
storing and reading back every value named here, and a test keeps it current.

- **exact**: the same value comes back, floating point to the bit; from Parquet the type too, for
  readers that use the file's Arrow schema, such as pyarrow, pandas and polars.
- **mapped**: stored in another form, as shown, from which the value can be restored exactly.
- **refused**: the job fails with the column's name while the plugin runs; no sink shows any of it.

A value that is named is an exception to its type. Every sink keeps nulls. SQLite has no NaN and no
-0.0: NaN is refused, since it would come back as null, and -0.0 in a number column becomes 0.0,
which compares equal. That is the one value that a sink changes. In Parquet, lists and structs it
stays -0.0.

For SQL Server the page shows what is given to the driver, and the column's type; no server was
asked ([what is tested](sinks_mssql.md)). Times there have a resolution of 100 nanoseconds.

| Arrow type | Parquet | SQLite | SQL Server |
| --- | --- | --- | --- |
"""


class Kept(NamedTuple):
    """What became of one value."""

    how: str
    """`exact`, `mapped`, `refused` or `changed`."""
    words: str = ""


def page() -> str:
    """The whole page.

    Raises:
        AssertionError: a sink changed a value without saying so, or left a part of what it refused.
    """
    found = list(rows())
    # Durability is not what is asked here, and memory is quick.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        columns = [
            column(Place(scheme, Path(folder) / scheme), found, read)
            for scheme, read in (("parquet", of_parquet), ("sqlite", of_sqlite))
        ]
        columns.append(for_server(Path(folder) / "mssql", found))
    kinds: dict[tuple[str, ...], list[str]] = {}
    for row, *cells in zip(found, *columns, strict=True):
        kinds.setdefault(tuple(cells), []).append(f"`{_title(row.kind)}`")
    lines = [f"| {', '.join(same)} | {' | '.join(cells)} |\n" for cells, same in kinds.items()]
    return HEAD + "".join(lines)


def column(place: Place, found: Sequence[Row], read: Callable[..., Kept]) -> list[str]:
    """What a sink makes of every row."""
    staged: dict[str, Any] = {}
    outcomes: dict[str, Kept] = {}
    named = [
        (f"t{n}_{m}", case)
        for n, row in enumerate(found)
        for m, case in enumerate(row.cases.values())
    ]
    for job, (topic, case) in enumerate(named, start=1):
        try:
            staged[topic] = place.sealed({COLUMN: case}, job, topic=topic)
        except OutputRefused as error:
            outcomes[topic] = _refused(error)
    seen = dict(zip(staged, place.publish(*staged.values()), strict=True))
    for topic, case in named:
        if topic in seen:
            outcome = seen[topic]
            assert isinstance(outcome, Output), f"refused too late: {outcome}"
            outcomes[topic] = read(place, outcome, case)
        assert visible(place, topic) == (0 if outcomes[topic].how == "refused" else len(case)), (
            topic
        )
    return [
        _cell(place.scheme, row, [outcomes[f"t{n}_{m}"] for m in range(len(row.cases))])
        for n, row in enumerate(found)
    ]


def visible(place: Place, topic: str) -> int:
    """How many rows of a topic there are for any reader."""
    if place.scheme == "parquet":
        files = (place.home / "out" / topic).rglob("*.parquet")
        return sum(pq.read_metadata(file).num_rows for file in files)
    with closing(sqlite3.connect(place.database)) as connection:
        known = connection.execute("SELECT 1 FROM pragma_table_info(?)", [topic]).fetchone()
        query = f'SELECT count(*) FROM "{topic}"'
        return int(connection.execute(query).fetchone()[0]) if known else 0


def for_server(home: Path, found: Sequence[Row]) -> list[str]:
    """What SQL Server's driver is handed for every row; there is no server to ask."""
    place = Place("parquet", home)
    place.location = "mssql://values"
    return [
        _cell("mssql", row, [_handed(place, case) for case in row.cases.values()]) for row in found
    ]


def _handed(place: Place, case: Any) -> Kept:
    try:
        staged = place.sealed({COLUMN: case})
    except OutputRefused as error:
        return _refused(error)
    with pq.ParquetFile(staged.stage) as file:
        (batch,) = file.iter_batches()
    Path(staged.stage).unlink()
    column = mssql_types.columns_of(batch.schema)[0]
    if not column.declared:
        return Kept("exact", "no column until another type comes")
    handed = column.array(batch.column(0))
    kind, types = _storage(case.type), pa.types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_nested(kind):
        again, how = _restored(kind, handed.to_pylist()), f" JSON `{handed[0]}`"
    elif types.is_duration(kind):
        again, how = handed.cast(pa.duration("ns")).cast(kind), " nanoseconds"
    else:
        again = handed.cast(kind)
        how = ", in UTC" if types.is_timestamp(kind) and kind.tz else ""
    if bits(again) != bits(case):
        return Kept("changed", str(handed))
    return Kept("mapped" if how else "exact", column.declared + how)


def _refused(error: OutputRefused) -> Kept:
    assert f"column {COLUMN!r}" in error.message, error.message
    return Kept("refused")


def _cell(scheme: str, row: Row, outcomes: Sequence[Kept]) -> str:
    cases = dict(zip(row.cases, outcomes, strict=True))
    exceptions = []
    for name, kept in cases.items():
        if kept.how == "changed":
            said = SAID.get((scheme, name))
            assert said, f"{scheme} changes {row.kind} {name} without saying so: {kept.words}"
            exceptions.append(said)
    refused = [name for name, kept in cases.items() if kept.how == "refused"]
    if len(refused) == len(cases):
        return "refused"
    if refused:
        exceptions.append(f"refused: {', '.join(refused)}")
    usual = next(kept for kept in outcomes if kept.how in ("exact", "mapped"))
    how = f"{usual.how}: {usual.words}" if usual.words else usual.how
    return "; ".join([how, *exceptions])


def _title(kind: Any) -> str:
    return str(kind).replace("|", "\\|")


def of_parquet(place: Place, published: Output, case: Any) -> Kept:
    found = pq.read_table(published.target)[COLUMN].combine_chunks()
    if found.type == case.type:
        return Kept("exact") if bits(found) == bits(case) else Kept("changed", str(found))
    kind = case.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        found = found.dictionary_decode() if pa.types.is_dictionary(found.type) else found
    if bits(found.cast(kind)) == bits(case):
        return Kept("mapped", f"read as `{_title(found.type)}`")
    return Kept("changed", str(found))


def of_sqlite(place: Place, published: Output, case: Any) -> Kept:
    topic = published.target.rpartition(":")[2]
    with closing(sqlite3.connect(place.database)) as connection:
        (declared,) = connection.execute(
            "SELECT type FROM pragma_table_info(?) WHERE name = ?", [topic, COLUMN]
        ).fetchone()
        found = [
            value for (value,) in
            connection.execute(f'SELECT "{COLUMN}" FROM _cf_rows_{topic} ORDER BY rowid')
        ]  # fmt: skip
    kind = case.type
    if bits(_restored(kind, found)) != bits(case):
        return Kept("changed", str(found))
    if _is_plain(kind):
        return Kept("exact", declared or "no type")
    how = "JSON " if pa.types.is_nested(_storage(kind)) else ""
    how = "nanoseconds " if pa.types.is_duration(kind) else how
    return Kept("mapped", f"{declared} {how}`{found[0]}`")


def _storage(kind: Any) -> Any:
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _is_plain(kind: Any) -> bool:
    """Whether SQLite has such values itself."""
    types = pa.types
    plain = _storage(kind)
    plain = plain.value_type if types.is_dictionary(plain) else plain
    return any(
        test(plain) for test in (
            types.is_null, types.is_integer, types.is_floating, types.is_string,
            types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary,
            types.is_binary_view, types.is_fixed_size_binary,
        )
    )  # fmt: skip


def _restored(kind: Any, values: list[Any]) -> Any:
    """An array made of what SQLite has, by what the page says."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, _restored(kind.storage_type, values))
    if types.is_dictionary(kind):
        return _restored(kind.value_type, values)
    if types.is_nested(kind):
        return pa.array([v if v is None else _of_json(kind, json.loads(v)) for v in values], kind)
    if types.is_boolean(kind):
        return pa.array([v if v is None else {0: False, 1: True}[v] for v in values], kind)
    if types.is_floating(kind):
        return pa.array(values, pa.float64()).cast(kind)
    if types.is_decimal(kind):
        return pa.array([v if v is None else Decimal(v) for v in values], kind)
    if types.is_duration(kind):
        return pa.array(values, pa.int64()).cast(pa.duration("ns")).cast(kind)
    if types.is_temporal(kind):
        numbers = [v if v is None else _number(kind, v.removesuffix("+00:00")) for v in values]
        return pa.array(numbers, {32: pa.int32(), 64: pa.int64()}[kind.bit_width]).view(kind)
    return pa.array(values, kind)


def _number(kind: Any, text: str) -> int:
    """The number that the type keeps for a date, a time or both."""
    day, clock = ("", text) if pa.types.is_time(kind) else (text[:10], text[11:])
    nanoseconds = date.fromisoformat(day).toordinal() - EPOCH if day else 0
    nanoseconds *= 86_400 * 10**9
    if clock:
        hours, minutes, seconds = clock.split(":")
        nanoseconds += int(Decimal(seconds).scaleb(9))
        nanoseconds += (int(hours) * 60 + int(minutes)) * 60 * 10**9
    unit = {"date32[day]": "day", "date64[ms]": "ms"}.get(str(kind)) or kind.unit
    count, rest = divmod(nanoseconds, NANOSECONDS[unit])
    assert not rest
    return count


def _of_json(kind: Any, value: Any) -> Any:
    types = pa.types
    if value is None:
        return None
    if types.is_map(kind):
        pairs = [(pair["key"], pair["value"]) for pair in value]
        return [(_of_json(kind.key_type, k), _of_json(kind.item_type, v)) for k, v in pairs]
    if types.is_struct(kind):
        return {field.name: _of_json(field.type, value[field.name]) for field in kind}
    if types.is_nested(kind):
        return [_of_json(kind.value_type, item) for item in value]
    if types.is_binary(kind):
        return bytes.fromhex(value)
    return _restored(kind, [value])[0].as_py()


def bits(array: Any) -> list[Any]:
    """Values that are equal only where all of theirs are, floating point to the bit."""
    types, kind = pa.types, array.type
    if isinstance(kind, pa.BaseExtensionType):
        return bits(array.storage)
    if types.is_dictionary(kind):
        return bits(array.dictionary_decode())
    if types.is_map(kind):
        pair = pa.struct([("key", kind.key_type), ("value", kind.item_type)])
        return bits(array.cast(pa.list_(pair)))
    if types.is_struct(kind):
        parts = list(zip(*map(bits, array.flatten()), strict=True))
        present = array.is_valid().to_pylist()
        return [part if there else None for part, there in zip(parts, present, strict=True)]
    if types.is_nested(kind):
        items = iter(bits(array.flatten()))
        lengths = pc.list_value_length(array).to_pylist()
        return [n if n is None else tuple(islice(items, n)) for n in lengths]
    if types.is_floating(kind) or (types.is_temporal(kind) and not types.is_interval(kind)):
        numbers = {16: pa.int16(), 32: pa.int32(), 64: pa.int64()}
        return list(array.view(numbers[kind.bit_width]).to_pylist())
    if types.is_decimal(kind):
        return [value if value is None else str(value) for value in array.to_pylist()]
    return list(array.to_pylist())


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    sys.stdout.write(f"wrote {PAGE}\n")
