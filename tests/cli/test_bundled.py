"""Bundled plugins by their names, from the repository and from an installed wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.commands import Casparian
from tests.plugs import ROWS

ROOT = Path(__file__).parents[2]
NAMES = sorted(file.stem for file in (ROOT / "plugins").glob("*.py"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this repository, unpacked as an installer does it."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"  # a copy: building leaves files beside what is built
    for name in ("casparian_flow", "plugins"):
        shutil.copytree(ROOT / name, sources / name)
    for name in ("pyproject.toml", "README.md"):
        shutil.copyfile(ROOT / name, sources / name)
    command = ["uv", "build", "--wheel", "--quiet", "--out-dir", folder / "dist", sources]
    subprocess.run(command, check=True, timeout=300)
    (built,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_brings_plugins_that_can_be_published_by_name(
    installed: Path, tmp_path: Path
) -> None:
    casparian = Casparian(tmp_path, {**os.environ, "PYTHONPATH": str(installed)})
    listed = json.loads(casparian.process("plugins", "bundled", "--json").stdout)
    folder = installed / "casparian_flow" / "bundled_plugins"
    assert [row["file"] for row in listed] == [str(folder / f"{name}.py") for name in NAMES]
    casparian.process("init")
    done = casparian.process("publish", "delimited", "--name", "orders")
    assert f"bundled      {folder / 'delimited.py'}\n" in done.stderr
    assert "deployed orders 1.2.0" in done.stdout


def test_every_plugin_of_the_repository_is_listed(bare: Casparian) -> None:
    listed = {row["name"]: row for row in bare.json("plugins", "bundled")}
    assert sorted(listed) == NAMES
    delimited = listed["delimited"]
    assert delimited["topics"] == ["delimited", "delimited_rejects"]
    assert "*.csv" in delimited["patterns"]
    assert delimited["options"]["skip_lines"] == 0
    assert delimited["reads"].startswith("Delimited text")
    assert Path(delimited["file"]).is_file()
    words = bare.out("plugins", "bundled")
    assert all(f"\n{row['name']} {row['version']}\n" in f"\n{words}" for row in listed.values())
    assert "- `skip_lines`" not in words
    assert "- `skip_lines`" in bare.out("plugins", "bundled", "delimited")
    assert "one of access_log, delimited" in bare.err("plugins", "bundled", "frob", code=66)


def test_a_name_is_a_bundled_plugin_and_a_path_a_file(casparian: Casparian) -> None:
    mine = casparian.plugin("delimited", ROWS)
    unnamed = casparian.folder / "delimited"
    unnamed.write_text(ROWS)
    bundled = casparian.err("publish", "delimited", "--dry-run")
    assert f"bundled      {ROOT / 'plugins' / 'delimited.py'}\n" in bundled
    assert "not the file delimited.py: casparian publish ./delimited.py\n" in bundled
    assert "not the file delimited: casparian publish ./delimited\n" in bundled
    assert f"file         {mine}\n" in casparian.err("publish", "delimited.py", "--dry-run")
    assert f"file         {unnamed}\n" in casparian.err("publish", "./delimited", "--dry-run")


def test_a_name_that_no_plugin_has_is_told_those_there_are(casparian: Casparian) -> None:
    words = casparian.err("publish", "delimted", code=66)
    assert f"try: casparian publish NAME, where NAME is one of {', '.join(NAMES)}" in words
    (casparian.folder / "mine").write_text(ROWS)
    assert "try: casparian publish ./mine " in casparian.err("publish", "mine", code=66)
    missing = casparian.err("publish", "plugins/delimited.py", code=65)
    assert "try: casparian publish delimited " in missing
