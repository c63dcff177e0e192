"""The helpers of `casparian_flow.sdk` that readers of files share."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from casparian_flow.sdk import batches, column_names, open_bytes, printable


def test_column_names() -> None:
    cells = [" a \n b", "", None, "A B", "_CF_x", "sheet", "a\0", "\udcff", "y" * 200]
    assert column_names(cells, taken=["Sheet"]) == [
        "a b", "column_2", "column_3", "A B_2", "x_CF_x", "sheet_2", "a\\x00", "\\udcff", "y" * 100
    ]  # fmt: skip


def test_printable_leaves_what_can_be_stored() -> None:
    assert printable("é\n\U0001f600") == "é\n\U0001f600"


def test_gzip_is_unpacked_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    for data, read in ((gzip.compress(b"a"), b"a"), (b"\x1f", b"\x1f"), (b"", b"")):
        file.write_bytes(data)
        with open_bytes(str(file)) as opened:
            assert opened.read() == read


@pytest.mark.parametrize("cut", [3, 12, -4, -9])
def test_damaged_gzip_is_named(cut: int, tmp_path: Path) -> None:
    file = tmp_path / "a.gz"
    file.write_bytes(gzip.compress(b"text" * 100)[:cut])
    with (
        pytest.raises(ValueError, match="the gzip file is damaged"),
        open_bytes(str(file)) as opened,
    ):
        opened.read()


def test_batches_are_bounded_by_rows_and_by_size() -> None:
    assert list(batches([1, 2, 3, 9, 1], lambda item: item, rows=3, total=8)) == [
        [1, 2, 3],
        [9],
        [1],
    ]
