"""Every Arrow type, with the values that are hardest to keep: the rows of docs/types.md."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import Context, Decimal
from typing import Any, NamedTuple

import pyarrow as pa

NAN, INF = float("nan"), float("inf")
LAST_DAY = date(9999, 12, 31)
LAST_TIME = time(23, 59, 59, 999999)
NS = pa.time64("ns")
DAY_MS = 86_400_000


class Row(NamedTuple):
    """A type, and arrays of it by the name of what is special about them."""

    kind: Any
    cases: dict[str, Any]


def row(kind: Any, **values: Any) -> Row:
    """Each value with a null behind it; the names' underscores are blanks."""
    return Row(kind, {n.replace("_", " "): _array(kind, [v, None]) for n, v in values.items()})


def rows() -> Iterator[Row]:
    yield row(pa.null(), null=None)
    yield row(pa.bool_(), true=True, false=False)
    for bits in (8, 16, 32, 64):
        kind = getattr(pa, f"int{bits}")()
        yield row(kind, least=-(2 ** (bits - 1)), greatest=2 ** (bits - 1) - 1)
    for bits in (8, 16, 32):
        yield row(getattr(pa, f"uint{bits}")(), greatest=2**bits - 1)
    yield Row(pa.uint64(), {
        f"2^{n} - 1" if less else f"2^{n}": _array(pa.uint64(), [2**n - less, None])
        for n, less in ((63, 1), (63, 0), (64, 1))
    })  # fmt: skip
    yield from _floats()
    yield from _decimals()
    long = "x" * 100_000
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        yield row(kind, empty="", text="naïve 🐟", NUL="a\0b", line_breaks="\r\n", long=long)
    for kind in (pa.binary(), pa.large_binary(), pa.binary_view()):
        yield row(kind, empty=b"", bytes=bytes(range(256)))
    yield row(pa.binary(4), bytes=b"\0\xff\0\1")
    yield row(pa.binary(0), bytes=b"")
    yield from _moments()
    yield row(pa.month_day_nano_interval(), a_month=pa.MonthDayNano([1, 1, 1]))
    yield from _nested()
    yield from _wrapped()


def _floats() -> Iterator[Row]:
    extremes = {16: (65504.0, 2.0**-24), 32: (3.4028234663852886e38, 2.0**-149),
                64: (1.7976931348623157e308, 5e-324)}  # fmt: skip
    for bits, (greatest, subnormal) in extremes.items():
        usual = {"0.1": 0.1, "greatest": greatest, "inf": INF, "-inf": -INF}
        yield row(
            getattr(pa, f"float{bits}")(), **usual, subnormal=subnormal, **{"-0.0": -0.0}, NaN=NAN
        )


def _decimals() -> Iterator[Row]:
    exact = Context(prec=99)
    for kind in (pa.decimal32(9, 2), pa.decimal64(18, 4), pa.decimal128(38, 10),
                 pa.decimal128(38, 0), pa.decimal256(76, 10), pa.decimal128(5, -2)):  # fmt: skip
        nines = Decimal(10**kind.precision - 1).scaleb(-kind.scale, exact)
        yield row(kind, all_digits=exact.minus(nines), zeros=Decimal(0).scaleb(-kind.scale))


def _moments() -> Iterator[Row]:
    dates = {"year_9999": LAST_DAY, "year_1": date(1, 1, 1)}
    for kind, far in ((pa.date32(), 2**31 - 1), (pa.date64(), DAY_MS * 2**32)):
        yield Row(kind, {**row(kind, **dates).cases, "years beyond": _numbers(kind, far)})
    yield row(pa.time32("s"), last=time(23, 59, 59), first=time(0))
    yield row(pa.time32("ms"), last=LAST_TIME.replace(microsecond=999_000), first=time(0))
    yield row(pa.time64("us"), last=LAST_TIME, first=time(0))
    yield Row(NS, {"last": _numbers(NS, DAY_MS * 10**6 - 1), "first": _numbers(NS, 0)})
    for unit in ("s", "ms", "us", "ns"):
        for zone in ("", "Europe/Paris", "+05:30"):
            yield _stamps(unit, zone)
    for unit in ("s", "ms", "us", "ns"):
        kind = pa.duration(unit)
        yield Row(kind, {
            "negative": _array(kind, [timedelta(seconds=-1), None]),
            "longest": _numbers(kind, 2**63 - 1),
        })  # fmt: skip


def _stamps(unit: str, zone: str) -> Row:
    kind = pa.timestamp(unit, zone or None)
    if unit == "ns":  # its 64 bits are the years 1677 to 2262
        numbers = {"last": 2**63 - 1, "first": 1 - 2**63, "1 ns": 1, "100 ns": 100}
        return Row(kind, {name: _numbers(kind, number) for name, number in numbers.items()})
    place = UTC if zone else None
    last, first = datetime(9999, 12, 31, 23, 59, 59), datetime(1, 1, 1)
    found = row(kind, year_9999=last.replace(tzinfo=place), year_1=first.replace(tzinfo=place))
    return Row(kind, {**found.cases, "years beyond": _numbers(kind, 2**62)})


def _nested() -> Iterator[Row]:
    yield row(pa.list_(pa.int64()), items=[1, None, 2**63 - 1], empty=[])
    yield row(pa.list_(pa.float64()), numbers=[0.1, 5e-324], **{"-0.0": [-0.0]}, NaN=[NAN],
              inf=[INF])  # fmt: skip
    yield row(pa.large_list(pa.uint64()), items=[2**64 - 1])
    yield row(pa.list_(pa.string(), 2), items=["naïve", None])
    yield row(pa.list_view(pa.string()), items=["a", None])
    yield row(pa.large_list_view(pa.string()), items=["a", None])
    yield row(pa.list_(pa.list_(pa.date32())), items=[[LAST_DAY, None], None, []])
    days = _numbers(pa.date64(), DAY_MS * 2**32)
    yield Row(pa.list_(pa.date64()), {
        "items": _array(pa.list_(pa.date64()), [[LAST_DAY], None]),
        "years beyond": pa.ListArray.from_arrays([0, 2], days),
    })  # fmt: skip
    yield row(pa.list_(pa.null()), nulls=[None] * 5, empty=[])
    yield row(pa.list_(pa.list_(pa.null())), nulls=[[None], [None] * 3, None, []])
    yield row(pa.list_(pa.struct([("a", pa.null()), ("b", pa.int32())])),
              a_field_of_nulls=[{"a": None, "b": 1}, {"a": None, "b": 2}])  # fmt: skip
    yield row(pa.struct([("a", pa.int64()), ("b", pa.list_(pa.binary()))]),
              fields={"a": 1, "b": [b"\0\xff"]})  # fmt: skip
    yield row(pa.struct([]), empty={})
    halves = [pa.array([number, None], pa.int8()) for number in (1, 2)]
    twins = pa.StructArray.from_arrays(halves, ["a", "a"])
    yield Row(twins.type, {"fields": twins})
    yield row(pa.map_(pa.string(), pa.decimal128(9, 2)),
              pairs=[("a", Decimal("1.50")), ("a", None)], empty=[])  # fmt: skip
    yield row(pa.map_(pa.string(), pa.list_(pa.null())), pairs=[("a", [None] * 3), ("b", None)])
    yield row(pa.map_(pa.string(), pa.null()), pairs=[("a", None), ("b", None)])


def _wrapped() -> Iterator[Row]:
    yield row(pa.dictionary(pa.int32(), pa.string()), text="a")
    yield row(pa.dictionary(pa.int8(), pa.string()), text="a")
    yield row(pa.dictionary(pa.int32(), pa.float64()), **{"0.1": 0.1, "-0.0": -0.0})
    days = [_numbers(pa.date64(), DAY_MS * day).dictionary_encode() for day in (1, 2**32)]
    yield Row(days[0].type, dict(zip(("a day", "years beyond"), days, strict=True)))
    yield row(pa.run_end_encoded(pa.int32(), pa.int64()), runs=7)
    number, text = pa.array([1], pa.int8()), pa.array(["x"])
    ids, offsets = pa.array([0], pa.int8()), pa.array([0], pa.int32())
    dense = pa.UnionArray.from_dense(ids, offsets, [number, text], ["a", "b"])
    sparse = pa.UnionArray.from_sparse(ids, [number, text], ["a", "b"])
    yield Row(dense.type, {"either": dense})
    yield Row(sparse.type, {"either": sparse})
    yield row(pa.uuid(), bytes=bytes(range(16)))
    yield row(pa.json_(), text='{"a": 1}')
    yield row(pa.bool8(), true=1)
    yield row(pa.opaque(pa.int64(), "type", "vendor"), number=1)
    yield row(pa.fixed_shape_tensor(pa.float32(), [2]), numbers=[0.5, -0.0])


def _array(kind: Any, values: list[Any]) -> Any:
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, _array(kind.storage_type, values))
    if pa.types.is_run_end_encoded(kind):
        ends = pa.array(range(1, len(values) + 1), kind.run_end_type)
        return pa.RunEndEncodedArray.from_arrays(ends, pa.array(values, kind.value_type))
    if pa.types.is_dictionary(kind):
        return pa.array(values, kind.value_type).dictionary_encode().cast(kind)
    return pa.array(values, kind)


def _numbers(kind: Any, number: int) -> Any:
    """A value by the number that the type keeps, which may be beyond Python's own types."""
    return pa.array([number, None], {32: pa.int32(), 64: pa.int64()}[kind.bit_width]).view(kind)
