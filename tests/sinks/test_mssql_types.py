"""What becomes of Arrow's types and values in SQL Server; no server is needed to know."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from casparian_flow.engine.sinks.mssql_types import (
    COLUMNS_LIMIT,
    Column,
    columns_of,
    declared_as,
    fold,
)
from casparian_flow.errors import OutputRefused
from tests.sinks.columns_of_any_type import Sample, samples

UTC = dt.UTC


def column(values: Any) -> Column:
    return columns_of(pa.schema([("x", values.type)]))[0]


def refused(values: Any, declared: str = "") -> str:
    """What is said when these values are to go into a column."""
    with pytest.raises(OutputRefused) as error:
        here = column(values)
        (here.fit(declared) if declared else here).array(values)
    assert error.value.message.startswith(f"column 'x' ({values.type}) ")
    assert error.value.hint
    return error.value.message


EXACT = [
    (pa.array([True, None]), "bit"),
    (pa.array([0, 255], pa.uint8()), "tinyint"),
    (pa.array([-128, 127], pa.int8()), "smallint"),
    (pa.array([-(2**15), 2**15 - 1], pa.int16()), "smallint"),
    (pa.array([0, 2**16 - 1], pa.uint16()), "int"),
    (pa.array([-(2**31), 2**31 - 1], pa.int32()), "int"),
    (pa.array([0, 2**32 - 1], pa.uint32()), "bigint"),
    (pa.array([-(2**63), 2**63 - 1], pa.int64()), "bigint"),
    (pa.array([0, 2**63, 2**64 - 1], pa.uint64()), "decimal(20,0)"),
    (pa.array([1.5, None], pa.float16()), "real"),
    (pa.array([3.4028234663852886e38, 2.0**-126], pa.float32()), "real"),
    (pa.array([1.7976931348623157e308, 2.0**-1022, 0.1, None]), "float"),
    (pa.array([Decimal("1.10"), None], pa.decimal32(5, 2)), "decimal(5,2)"),
    (pa.array([Decimal("9" * 28 + ".0123456789")], pa.decimal128(38, 10)), "decimal(38,10)"),
    (pa.array([Decimal("0.0000001")], pa.decimal128(3, 7)), "decimal(7,7)"),
    (pa.array([Decimal("9" * 38)], pa.decimal256(38, 0)), "decimal(38,0)"),
    (pa.array([dt.date(1, 1, 1), dt.date(9999, 12, 31)]), "date"),
    (pa.array([dt.date(1, 1, 1), dt.date(9999, 12, 31)], pa.date64()), "date"),
    (pa.array([dt.time(23, 59, 59)], pa.time32("s")), "time(7)"),
    (pa.array([dt.time(23, 59, 59, 999999)]), "time(7)"),
    (pa.array([dt.datetime(1, 1, 1), dt.datetime.max], pa.timestamp("us")), "datetime2(7)"),
    (pa.array([dt.datetime(1, 1, 1)], pa.timestamp("s")), "datetime2(7)"),
    (pa.array([-(10**17), 123_456_789_100], pa.timestamp("ns")), "datetime2(7)"),
    (pa.array(["", "a\0b", "🐟", None]), "nvarchar(max)"),
    (pa.array(["x" * 50], pa.string_view()), "nvarchar(max)"),
    (pa.array([b"", b"\0\xff", None]), "varbinary(max)"),
    (pa.array([b"0123456789abcdef"], pa.binary(16)), "varbinary(max)"),
    (pa.array([b"x"], pa.binary_view()), "varbinary(max)"),
]


@pytest.mark.parametrize(
    ("values", "declared"), EXACT, ids=lambda each: str(getattr(each, "type", each))
)
def test_exact(values: Any, declared: str) -> None:
    here = column(values)
    assert here.declared == declared
    sent = here.array(values)
    assert sent.type == here.plain
    assert sent.cast(values.type).equals(values)


@pytest.mark.parametrize(
    ("values", "declared", "sent"),
    [
        (
            pa.array([dt.datetime(2024, 3, 31, 3, tzinfo=UTC)], pa.timestamp("us", "Asia/Tokyo")),
            "datetimeoffset(7)", [dt.datetime(2024, 3, 31, 3, tzinfo=UTC)],
        ),
        (pa.array([dt.timedelta(days=-1, seconds=1)]), "bigint", [-86_399 * 10**9]),
        (pa.array([[1, None], None, []]), "nvarchar(max)", ["[1,null]", None, "[]"]),
        (
            pa.array([{"a": b"x", "b": Decimal("1.50")}]), "nvarchar(max)",
            ['{"a":"78","b":"1.50"}'],
        ),
        (
            pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())), "nvarchar(max)",
            ['[{"key":"k","value":1}]'],
        ),
        (pa.array(["a", "b", "a"]).dictionary_encode(), "nvarchar(max)", ["a", "b", "a"]),
    ],
    ids=str,
)  # fmt: skip
def test_mapped(values: Any, declared: str, sent: list[Any]) -> None:
    here = column(values)
    assert here.declared == declared
    assert here.array(values).to_pylist() == sent


def test_a_column_of_nulls_waits_for_its_type() -> None:
    (here,) = columns_of(pa.schema([("x", pa.null())]))
    assert here.declared == ""


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (pa.array([1.0, float("nan")]), "no NaN"),
        (pa.array([float("inf")]), "no infinity"),
        (pa.array([float("-inf")], pa.float32()), "no infinity"),
        (pa.array([5e-324]), "subnormal"),
        (pa.array([1e-40], pa.float32()), "subnormal"),
        (pa.array([-719_163], pa.date32()), "years 1 to 9999"),
        (pa.array([2_932_897], pa.date32()), "years 1 to 9999"),
        (pa.array([253_402_300_800], pa.timestamp("s")), "years 1 to 9999"),
        (pa.array([-62_135_596_800_001], pa.timestamp("ms", "UTC")), "years 1 to 9999"),
        (pa.array([101], pa.timestamp("ns")), "100 nanoseconds"),
        (pa.array([-1], pa.timestamp("ns")), "100 nanoseconds"),
        (pa.array([1], pa.time64("ns")), "100 nanoseconds"),
        (pa.array([86_400], pa.time32("s")), "of a day"),
        (pa.array([-1], pa.time64("us")), "of a day"),
        (pa.array([2**62], pa.duration("s")), "out of bounds"),
        (pa.array([[float("nan")]]), "no NaN"),
        (pa.nulls(1, pa.decimal256(39, 0)), "no such type"),
        (pa.nulls(1, pa.month_day_nano_interval()), "no such type"),
    ],
    ids=str,
)
def test_refused(values: Any, said: str) -> None:
    assert said in refused(values)


@pytest.mark.parametrize(
    ("values", "declared"),
    [
        (pa.array([1, -2]), "smallint"),
        (pa.array([255, 0]), "tinyint"),
        (pa.array([2**53]), "float"),
        (pa.array([2**24], pa.int32()), "real"),
        (pa.array([7]), "decimal(10,2)"),
        (pa.array([3.0, None]), "int"),
        (pa.array([1.5]), "real"),
        (pa.array([1.5], pa.float32()), "float"),
        (pa.array([Decimal("2.00")]), "bigint"),
        (pa.array([Decimal("1.50")]), "decimal(38,1)"),
        (pa.array(["short"]), "nvarchar(50)"),
        (pa.array([b"short"]), "varbinary(50)"),
    ],
    ids=str,
)
def test_a_table_takes_what_fits_exactly(values: Any, declared: str) -> None:
    here = column(values).fit(declared)
    assert here.declared == declared
    assert [
        None if v is None else values[0].type and v for v in here.array(values).to_pylist()
    ] == (values.to_pylist())


@pytest.mark.parametrize(
    ("values", "declared"),
    [
        (pa.array([2**15]), "smallint"),
        (pa.array([-1]), "tinyint"),
        (pa.array([2**53 + 1]), "float"),
        (pa.array([10**8]), "decimal(10,2)"),
        (pa.array([0.1]), "real"),
        (pa.array([1e300]), "real"),
        (pa.array([3.5]), "int"),
        (pa.array([Decimal("1.55")]), "decimal(38,1)"),
        (pa.array([Decimal("0.1")]), "float"),
        (pa.array([0.5]), "decimal(10,2)"),
        (pa.array(["x"]), "varchar(50)"),
        (pa.array(["x"]), "nchar(5)"),
        (pa.array([b"x"]), "binary(5)"),
        (pa.array([True]), "int"),
        (pa.array(["1"]), "int"),
        (pa.array([dt.date(2024, 1, 1)]), "datetime2(7)"),
        (pa.array([dt.datetime(2024, 1, 1)]), "datetimeoffset(7)"),
        (pa.array([dt.datetime(2024, 1, 1)]), "datetime2(3)"),
    ],
    ids=str,
)
def test_and_refuses_what_would_change_there(values: Any, declared: str) -> None:
    assert declared in refused(values, declared)


@pytest.mark.parametrize(
    ("catalog", "declared"),
    [
        (("bigint", 8, 19, 0), "bigint"),
        (("numeric", 9, 10, 2), "decimal(10,2)"),
        (("nvarchar", -1, 0, 0), "nvarchar(max)"),
        (("nvarchar", 100, 0, 0), "nvarchar(50)"),
        (("varbinary", 50, 0, 0), "varbinary(50)"),
        (("varchar", -1, 0, 0), "varchar(max)"),
        (("datetime2", 8, 27, 7), "datetime2(7)"),
        (("time", 5, 16, 7), "time(7)"),
    ],
)
def test_what_the_catalog_says_of_a_column(catalog: Any, declared: str) -> None:
    assert declared_as(*catalog) == declared


@pytest.mark.parametrize(
    "names", [["a", "A"], ["straße", "STRASSE"], ["x", "x "], ["\uff11", "1"], ["É", "é"]]
)
def test_names_that_a_database_may_take_for_one(names: list[str]) -> None:
    assert fold(names[0]) == fold(names[1])
    with pytest.raises(OutputRefused, match="same name") as error:
        columns_of(pa.schema([(name, pa.int64()) for name in names]))
    assert repr(names[0]) in error.value.message


@pytest.mark.parametrize("name", ["x" * 129, "🐟" * 65])
def test_names_that_are_too_long(name: str) -> None:
    columns_of(pa.schema([(name[:64], pa.int64())]))
    with pytest.raises(OutputRefused, match="more than 128 characters"):
        columns_of(pa.schema([(name, pa.int64())]))


def test_more_columns_than_a_table_has() -> None:
    schema = [(f"c{n}", pa.int64()) for n in range(COLUMNS_LIMIT)]
    assert len(columns_of(pa.schema(schema))) == 1020
    for more in (1, 10_000):
        extra = [(f"d{n}", pa.int64()) for n in range(more)]
        with pytest.raises(OutputRefused, match=f"{1020 + more} columns are too many"):
            columns_of(pa.schema([*schema, *extra]))


@given(samples())
@pytest.mark.slow
def test_columns_of_any_type_are_kept_or_refused_by_name(sample: Sample) -> None:
    for batch in sample.batches():
        for field, values in zip(batch.schema, batch.columns, strict=True):
            try:
                (here,) = columns_of(pa.schema([field]))
                sent = here.array(values) if here.declared else values
            except OutputRefused as error:
                assert f"column {field.name!r} ({field.type})" in error.message
            else:
                assert sent.is_valid().equals(values.is_valid())


@given(st.lists(st.floats(width=64), max_size=5))
def test_floats_go_through_bit_by_bit_or_not_at_all(numbers: list[float]) -> None:
    values = pa.array(numbers, pa.float64())
    try:
        sent = column(values).array(values)
    except OutputRefused:
        return
    assert sent.view(pa.int64()).equals(values.view(pa.int64()))
    assert not len(sent) or pc.all(pc.is_finite(sent)).as_py()
