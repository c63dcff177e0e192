"""What holds for every bundled plugin, and the demo files they are shown with."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from casparian_flow.db.routing import compile_pattern
from tests.plugins.conftest import REPOSITORY, load, runner

PLUGINS = sorted(file.stem for file in (REPOSITORY / "plugins").glob("*.py"))
DEMO = {
    "orders.csv": ("delimited", {"delimited": 5, "delimited_rejects": 1}),
    "stations.tsv": ("delimited", {"delimited": 4}),
    "sensors.jsonl": ("json_records", {"json": 4, "json_rejects": 1}),
    "stock.xlsx": ("excel_sheets", {"excel": 5}),
    "sales_2025-01.csv": ("delimited", {"delimited": 3}),
    "sales_2025-02.csv": ("delimited", {"delimited": 3}),
    "visits_2025-01.csv": ("delimited", {"delimited": 3}),
}


@pytest.mark.parametrize("name", PLUGINS)
def test_every_import_is_declared(name: str) -> None:
    source = (REPOSITORY / "plugins" / f"{name}.py").read_text("utf-8")
    block = re.search(r"^# /// script\n((?:#.*\n)*?)# ///$", source, re.MULTILINE)
    assert block
    script = tomllib.loads(re.sub(r"^# ?", "", block[1], flags=re.MULTILINE))
    declared = {re.split(r"[><=]", text)[0] for text in script["dependencies"]}
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).partition(".")[0])
    foreign = imported - sys.stdlib_module_names - {"casparian_flow"}
    assert foreign == declared


@pytest.mark.parametrize("name", DEMO)
def test_demo_files(name: str) -> None:
    plugin, rows = DEMO[name]
    patterns = load(plugin).MANIFEST.pattern
    assert any(compile_pattern(pattern).match(name) for pattern in patterns)
    out = runner(plugin)(REPOSITORY / "casparian_flow" / "demo_files" / name)
    assert {topic: table.num_rows for topic, table in out.items()} == rows


def test_every_demo_file_is_listed() -> None:
    folder = REPOSITORY / "casparian_flow" / "demo_files"
    assert {file.name for file in folder.iterdir()} == {*DEMO, "README.md"}
    readme = Path(folder / "README.md").read_text("utf-8")
    assert all(f"`{name}`" in readme for name in DEMO)
