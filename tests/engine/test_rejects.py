"""What the host counts of rejects, and what it shows of them: bounded, and never an error."""

from __future__ import annotations

import pyarrow as pa
import pytest

from casparian_flow import protocol
from casparian_flow.engine.batches import CELL, COLUMNS, SHOWN, Rejects
from casparian_flow.errors import OnlyRejects
from tests.sinks.arrow_types import Row, rows


def seen(batches: dict[str, pa.Table], known: str, empty: str = "") -> Rejects:
    found = Rejects(known.split(), empty.split())
    for topic, table in batches.items():
        for batch in table.to_batches():
            found.see(topic, batch)
    return found


SOME = pa.table({"line": [1, 2]})


@pytest.mark.parametrize(
    ("known", "gives", "empty", "fails"),
    [
        ("a a_rejects", "a_rejects", "", True),
        ("a a_rejects", "a_rejects", "a", False),
        ("a a_rejects", "a a_rejects", "", False),
        ("a a_rejects", "a", "", False),
        ("a b a_rejects", "b a_rejects", "", False),
        ("a b a_rejects", "a_rejects", "b", True),
        ("events event_rejects", "event_rejects", "", True),
        ("events event_rejects", "event_rejects", "events", False),
        ("a b a_rejects b_rejects", "a_rejects b_rejects", "a", True),
        ("a b a_rejects b_rejects", "a_rejects b_rejects", "a b", False),
        ("bank_rejects", "bank_rejects", "", False),
    ],
)
def test_who_has_failed(known: str, gives: str, empty: str, fails: bool) -> None:
    found = seen(dict.fromkeys(gives.split(), SOME), known, empty)
    if fails:
        with pytest.raises(OnlyRejects, match="first reject: line 1"):
            found.judge()
    else:
        found.judge()


def test_no_row_and_no_reject_is_nothing_and_no_failure() -> None:
    found = seen({"a_rejects": SOME.slice(0, 0)}, "a a_rejects")
    found.judge()
    assert found.log() == ""


def test_what_is_shown_is_bounded_and_on_one_line() -> None:
    wide = {f"c{n}": ["x" * 10_000, "\n\r\x1b\u202e"] * 500 for n in range(50)}
    found = seen({"a_rejects": pa.table(wide)}, "a a_rejects")
    lines = found.log().splitlines()
    assert len(lines) == SHOWN + 1
    assert max(map(len, lines)) < (COLUMNS + 1) * (CELL + 20)
    assert all(line.isprintable() for line in lines)
    with pytest.raises(OnlyRejects) as raised:
        found.judge()
    assert raised.value.message.isprintable()


def test_a_hundred_thousand_rejects_in_small_batches_leave_the_first_ones() -> None:
    found = Rejects(["a", "a_rejects"], [])
    for start in range(0, 100, 7):
        found.see("a_rejects", pa.record_batch({"line": list(range(start, start + 7))}))
    shown = [line.split()[-1] for line in found.log().splitlines()[1:]]
    assert shown == [str(n) for n in range(SHOWN)]


@pytest.mark.parametrize("row", list(rows()), ids=lambda row: str(row.kind))
def test_every_type_can_be_shown_or_left_out(row: Row) -> None:
    for values in row.cases.values():
        table = pa.table({"line": [1] * len(values), "value": values})
        lines = seen({"a_rejects": table}, "a a_rejects").log().splitlines()
        assert all(line.startswith("rejected: line 1") for line in lines[1:])
        assert len(lines) == 1 + len(values)
        assert max(map(len, lines)) < 2 * CELL


def test_times_that_python_has_no_form_for_are_left_out() -> None:
    far = pa.array([1 << 62], pa.int64())
    for kind in (pa.timestamp("s"), pa.timestamp("s", tz="Nowhere/Else"), pa.time64("ns")):
        table = pa.table({"line": [7], "value": far.view(kind)})
        assert "rejected: line 7" in seen({"a_rejects": table}, "a a_rejects").log()


def test_a_topic_of_rejects_belongs_to_the_one_it_is_named_after() -> None:
    known = ["access", "syslog", "access_rejects", "odd_rejects"]
    assert protocol.reject_topics(known) == {"access_rejects", "odd_rejects"}
    assert protocol.data_topics("access_rejects", known) == {"access"}
    assert protocol.data_topics("odd_rejects", known) == {"access", "syslog"}
