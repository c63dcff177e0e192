"""docs/types.md is what the sinks do, and its writer notices what they do in silence."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest

from casparian_flow.engine.sinks import columns
from tests.sinks import write_types
from tests.sinks.arrow_types import row, rows
from tests.sinks.stages import Place


@pytest.mark.slow
def test_the_page_says_what_the_sinks_do() -> None:
    command = "python -m tests.sinks.write_types"
    assert write_types.page() == write_types.PAGE.read_text("utf-8"), f"run {command}"


def test_a_change_that_the_page_does_not_say_is_noticed(
    sqlite: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_types, "SAID", {})
    floats = row(pa.float64(), zero=0.0, **{"-0.0": -0.0})
    with pytest.raises(AssertionError, match=r"changes double -0\.0 without saying so"):
        write_types.column(sqlite, [floats], write_types.of_sqlite)


def test_a_sink_that_loses_a_digit_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = columns._texts
    monkeypatch.setattr(columns, "_texts", lambda array: [v and v[:-1] for v in exact(array)])
    times = row(pa.decimal128(9, 4), number=Decimal("1.2345"))
    with pytest.raises(AssertionError, match="without saying so"):
        write_types.column(Place("sqlite", tmp_path), [times], write_types.of_sqlite)


def test_a_refusal_that_leaves_something_is_noticed(
    parquet: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_types, "visible", lambda *_: 1)
    with pytest.raises(AssertionError):
        write_types.column(parquet, [row(pa.struct([]), empty={})], write_types.of_parquet)


def test_a_type_that_is_refused_too_late_is_noticed(
    sqlite: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "check_fields", lambda schema, sink: None)
    (twins,) = [each for each in rows() if str(each.kind) == "struct<a: int8, a: int8>"]
    with pytest.raises(AssertionError, match="too late"):
        write_types.column(sqlite, [twins], write_types.of_sqlite)
