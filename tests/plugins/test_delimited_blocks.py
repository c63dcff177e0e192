"""`Blocks` of `plugins/delimited.py` gives what `Table.records` gives, record for record."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugins.conftest import load

MODULE = load("delimited")
ENCODINGS = ("utf-8", "utf-8-sig", "cp1252", "utf-16", "utf-16-le", "latin-1")
Seen = tuple[int, int, list[str], str, str]


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    """Blocks of a few records, so that all that a block's end may part is parted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "BLOCK_CHARACTERS", 48)
        patch.setattr(MODULE, "SMALL_BLOCK", 12)
        patch.setattr(MODULE, "COLUMN_CHARACTERS", 1)
        yield


def layout(delimiter: str, width: int, **more: Any) -> Any:
    quote = more.pop("quote", '"')
    header = [f"c{place}" for place in range(width)]
    every = bool(more.get("comment"))
    given = {"trailing": False, "comment": "", "every_comment": every, **more}
    return MODULE.Layout(MODULE.Dialect(delimiter, quote), 1, header, width, **given)


def one_by_one(text: io.TextIOBase, found: Any) -> tuple[list[Seen], int]:
    table = MODULE.Table(MODULE.Lines(text), found)
    return list(table.records()), table.comments


def by_blocks(text: io.TextIOBase, found: Any) -> tuple[list[Seen], int, int]:
    """The same by blocks, and how many records Arrow split."""
    lines = MODULE.Lines(text)
    table = MODULE.Table(lines, found)
    seen: list[Seen] = []
    fast = 0
    for part in MODULE.Blocks(lines, table):
        if isinstance(part, list):
            seen += part
            continue
        fast += part.count
        starts = part.starts()
        assert len(starts) == len(part.lines) == len(part.records) == part.count
        for place, line in enumerate(part.lines):
            raw = part.raw_of(place)
            assert raw.startswith(starts[place].rstrip("\r\n"))
            fields = [column[place].as_py() for column in part.columns]
            seen.append((line, part.records[place], fields, "", raw))
    assert table.number == int(found.commented) + (len(seen) + 1 if lines.number else 0)
    return seen, table.comments, fast


CELL = st.text(st.sampled_from("ab0 é'\\#\u2028\x1c\x85中"), max_size=4)
WILD = st.text(st.sampled_from('ab0 "\n\r;,\t|\0\ufeffé#'), max_size=5)


@st.composite
def texts(draw: st.DrawFn) -> tuple[str, Any]:
    """Records mostly of one width, with line ends and quotes of every kind."""
    delimiter = draw(st.sampled_from(",;\t| :"))
    width = draw(st.integers(1, 4))
    ends = draw(st.sampled_from([["\n"], ["\r\n"], ["\r"], ["\n", "\r\n", "\r", "\n\n"]]))
    enclosed = st.text(st.sampled_from('ab "\n\r' + delimiter), max_size=6)
    tidy = CELL.map(lambda text: text.replace(delimiter, ""))
    quoted = enclosed.map(lambda text: '"' + text.replace('"', '""') + '"')
    cells = draw(st.sampled_from([[tidy], [tidy, quoted], [tidy, quoted, WILD], [WILD]]))
    trailing = draw(st.booleans())
    records = ["".join(f"{delimiter}c{place}" for place in range(width))[1:]]
    for _ in range(draw(st.integers(0, 14))):
        odd = draw(st.integers(0, 19))
        count = draw(st.integers(0, 5)) if odd == 19 else width
        record = delimiter.join(draw(st.one_of(cells)) for _ in range(count))
        record = records[0].upper() if odd == 18 else record
        record = draw(st.sampled_from("#\ufeff")) + record if odd == 17 else record
        records.append(record + delimiter * trailing)
    text = "".join(record + draw(st.sampled_from(ends)) for record in records)
    if draw(st.booleans()):
        text = text.rstrip("\r\n")
    quote = draw(st.sampled_from(['"', '"', '"', ""]))
    comment = draw(st.sampled_from(["", "", "#"]))
    return text, layout(delimiter, width, quote=quote, trailing=trailing, comment=comment)


@settings(max_examples=400, deadline=None)
@given(texts())
def test_blocks_are_what_one_by_one_is(given: tuple[str, Any]) -> None:
    text, found = given
    expected, comments = one_by_one(io.StringIO(text, newline=""), found)
    seen, skipped, _ = by_blocks(io.StringIO(text, newline=""), found)
    assert seen == expected
    assert skipped == comments


@settings(max_examples=100, deadline=None)
@given(given=texts(), encoding=st.sampled_from(ENCODINGS), packed=st.booleans())
def test_in_any_encoding(
    given: tuple[str, Any], encoding: str, packed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text, found = given
    data = text.encode(encoding, "replace") + b"\xe4\xff\n" * (len(text) % 3 == 0)
    file = tmp_path_factory.getbasetemp() / "table.csv"
    file.write_bytes(gzip.compress(data) if packed else data)
    with MODULE.open_text(str(file), encoding) as opened:
        expected, _ = one_by_one(opened, found)
    with MODULE.open_text(str(file), encoding) as opened:
        assert by_blocks(opened, found)[0] == expected


ROWS = "".join(f'{place},"cell {place}",x\n' for place in range(500))
MENDED = {
    "no fault": (ROWS, 0),
    "one short row": (ROWS.replace('250,"cell 250",x', "250,x"), 1),
    "a quote that does not close": (ROWS.replace('"cell 250"', '"cell 250'), 1),
    "cells of two lines": (ROWS.replace("cell 2", "cell\n2"), 0),
    "empty lines": (ROWS.replace("9,", "9,", 1).replace("x\n", "x\n\n"), 0),
    "the header again": (ROWS.replace('250,"cell 250",x', "C0,c1,C2"), 1),
    "a NUL": (ROWS.replace("cell 250", "cell \0"), 1),
    "a byte that is no text": (ROWS.replace("cell 250", "cell \udce9"), 1),
}


@pytest.mark.parametrize("case", MENDED)
def test_a_fault_makes_only_its_block_slow(case: str) -> None:
    text, faults = MENDED[case]
    found = layout(",", 3)
    expected, _ = one_by_one(io.StringIO("c0,c1,c2\n" + text, newline=""), found)
    seen, _, fast = by_blocks(io.StringIO("c0,c1,c2\n" + text, newline=""), found)
    assert seen == expected
    assert sum(bool(reason) for *_, reason, _ in seen) == faults
    assert fast > 450
