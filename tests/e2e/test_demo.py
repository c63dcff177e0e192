"""`casparian demo`, as a newcomer runs it; and that what it needs ships with the package."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.commands import Casparian

ROOT = Path(__file__).parents[2]
HASH = r"[0-9a-f]{64}"


@pytest.mark.slow
def test_the_demo_shows_what_it_promises(tmp_path: Path) -> None:
    home = tmp_path / "demo"
    done = Casparian(tmp_path).process("demo", home)
    orders = re.findall(r"^inbox +orders\.csv +(\d) ", done.stdout, re.MULTILINE)
    assert orders == ["1", "2"]
    assert re.findall(r"^inbox +stations\.tsv +(\d) ", done.stdout, re.MULTILINE) == ["1"]
    hashes = re.findall(rf"^hash (?:in row|in ledger|on disk) +({HASH})", done.stdout, re.MULTILINE)
    assert len(hashes) == 3
    assert len(set(hashes)) == 1
    assert "4 fields where the header has 5" in done.stdout
    assert re.search(r"^Betrag +decimal\(18,2\) ", done.stdout, re.MULTILINE)
    assert re.search(r"^2001 +2025-01-03 +1234\.50 +03044 ", done.stdout, re.MULTILINE)
    assert re.search(r"^3 +Tag +30\.02\.2025 +date ", done.stdout, re.MULTILINE)
    jobs = set(re.findall(r"COMPLETED +(\w+) .* (sales|visits)_2025", done.stdout))
    assert jobs == {("sales", "sales"), ("visits", "visits")}  # delimited gets none of them
    assert "東京" in done.stdout
    assert "no problems found" in done.stdout
    assert (home / "inbox" / "orders.csv").is_file()
    assert list((home / "output" / "delimited").glob("*.parquet"))


def test_a_directory_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = Casparian(tmp_path).process("demo", tmp_path, code=1)
    assert "is not empty" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_every_package_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = {file.parent for file in (ROOT / "casparian_flow").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(settings["packages"]) == names | set(settings["package-dir"])
    assert {ROOT / folder for folder in settings["package-dir"].values()} == {ROOT / "plugins"}
