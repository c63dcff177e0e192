"""A file of 0 bytes gives nothing: no row, no reject, no error."""

from __future__ import annotations

from pathlib import Path

import pytest

from casparian_flow import bundled
from tests.plugins.conftest import runner

PATTERNS = {
    "delimited": "a.csv",
    "json_records": "a.jsonl",
    "access_log": "access.log",
    "excel_sheets": "a.xlsx",
    "windows_events": "a.evtx",
}


def test_every_bundled_plugin_is_tried() -> None:
    assert PATTERNS.keys() == set(bundled.names())


@pytest.mark.parametrize("plugin", PATTERNS)
def test_nothing_comes_of_nothing(plugin: str, tmp_path: Path) -> None:
    file = tmp_path / PATTERNS[plugin]
    file.write_bytes(b"")
    assert sum(table.num_rows for table in runner(plugin)(file).values()) == 0
