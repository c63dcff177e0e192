"""Columns for property tests: an Arrow type, values, and what SQLite is to hold of each value."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st


@dataclass(frozen=True)
class Kind:
    arrow: Any
    values: st.SearchStrategy[Any]
    stored: Callable[[Any], Any] = lambda value: value


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def integers(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high) | st.sampled_from([low, high])


def nullable(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


DATES = st.dates(date(1, 1, 1), date(9999, 12, 31))
MOMENTS = st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31))
LONG = integers(-(2**63), 2**63 - 1)
TEXT = st.text()

KINDS = [
    *(Kind(t, integers(-(2 ** (b - 1)), 2 ** (b - 1) - 1))
      for b, t in ((8, pa.int8()), (16, pa.int16()), (32, pa.int32()), (64, pa.int64()))),
    *(Kind(t, integers(0, 2**b - 1))
      for b, t in ((8, pa.uint8()), (16, pa.uint16()), (32, pa.uint32()), (63, pa.uint64()))),
    Kind(pa.float64(), st.floats(allow_nan=False)),
    Kind(pa.float32(), st.floats(allow_nan=False, width=32)),
    Kind(pa.float16(), st.floats(allow_nan=False, width=16)),
    Kind(pa.bool_(), st.booleans(), int),
    Kind(pa.string(), TEXT),
    Kind(pa.large_string(), TEXT),
    Kind(pa.string_view(), TEXT),
    Kind(pa.dictionary(pa.int32(), pa.string()), TEXT),
    Kind(pa.binary(), st.binary()),
    Kind(pa.large_binary(), st.binary()),
    Kind(pa.binary(4), st.binary(min_size=4, max_size=4)),
    Kind(pa.uuid(), st.binary(min_size=16, max_size=16)),
    Kind(pa.null(), st.none()),
    Kind(pa.date32(), DATES, date.isoformat),
    Kind(pa.date64(), DATES, date.isoformat),
    Kind(pa.timestamp("us"), MOMENTS, lambda v: v.isoformat(" ", "microseconds")),
    Kind(pa.timestamp("ns"), st.datetimes(datetime(1700, 1, 1), datetime(2200, 1, 1)),
         lambda v: v.isoformat(" ", "microseconds") + "000"),
    Kind(pa.timestamp("us", "Asia/Tokyo"), MOMENTS.map(lambda v: v.replace(tzinfo=UTC)),
         lambda v: v.isoformat(" ", "microseconds")),
    Kind(pa.time64("us"), st.times(), lambda v: v.isoformat("microseconds")),
    Kind(pa.time64("ns"), st.times(), lambda v: v.isoformat("microseconds") + "000"),
    Kind(pa.time32("s"), st.times().map(lambda v: v.replace(microsecond=0)),
         lambda v: v.isoformat("milliseconds")),
    Kind(pa.decimal128(38, 10), st.decimals(-(10**20), 10**20, places=10, allow_nan=False), str),
    Kind(pa.decimal256(50, 2), st.decimals(-(10**20), 10**20, places=2, allow_nan=False), str),
    Kind(pa.duration("us"), st.timedeltas(timedelta(days=-9000), timedelta(days=9000)),
         lambda v: v // timedelta(microseconds=1) * 1000),
    Kind(pa.list_(pa.int64()), st.lists(nullable(LONG)), as_json),
    Kind(pa.large_list(pa.uint64()), st.lists(integers(0, 2**64 - 1)), as_json),
    Kind(pa.list_(pa.string(), 2), st.lists(TEXT, min_size=2, max_size=2), as_json),
    Kind(pa.list_view(pa.string()), st.lists(nullable(TEXT)), as_json),
    Kind(pa.list_(pa.list_(pa.date32())), st.lists(nullable(st.lists(nullable(DATES)))),
         lambda v: as_json([i and [d and d.isoformat() for d in i] for i in v])),
    Kind(pa.list_(pa.binary()), st.lists(nullable(st.binary())),
         lambda v: as_json([b if b is None else b.hex() for b in v])),
    Kind(pa.struct([("a", pa.int64()), ("b", pa.list_(pa.string()))]),
         st.fixed_dictionaries({"a": nullable(LONG), "b": nullable(st.lists(TEXT))}),
         lambda v: as_json({"a": v["a"], "b": v["b"]})),
    Kind(pa.map_(pa.string(), pa.int64()), st.lists(st.tuples(TEXT, nullable(LONG))),
         lambda v: as_json([{"key": k, "value": x} for k, x in v])),
]  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """Columns of one table, by name, as plain Python values."""

    kinds: list[Kind]
    rows: list[list[Any]]
    batch_rows: int

    def batches(self) -> list[Any]:
        """The rows in several batches; slices, so that offsets do not start at 0."""
        columns = [
            pa.array([row[n] for row in self.rows], kind.arrow)
            if not isinstance(kind.arrow, pa.BaseExtensionType)
            else pa.ExtensionArray.from_storage(
                kind.arrow, pa.array([row[n] for row in self.rows], kind.arrow.storage_type)
            )
            for n, kind in enumerate(self.kinds)
        ]
        whole = pa.RecordBatch.from_arrays(columns, names=[f"c{n}" for n in range(len(columns))])
        starts = range(0, max(len(self.rows), 1), self.batch_rows)
        return [whole.slice(start, self.batch_rows) for start in starts]

    def stored(self) -> list[tuple[Any, ...]]:
        """The rows as SQLite is to hold them."""
        return [
            tuple(
                None if value is None else kind.stored(value)
                for kind, value in zip(self.kinds, row, strict=True)
            )
            for row in self.rows
        ]


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=5))
    row = st.tuples(*(nullable(kind.values) for kind in kinds)).map(list)
    return Sample(kinds, draw(st.lists(row, max_size=8)), draw(st.integers(1, 9)))
