"""The command line in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import Casparian, Kept, add_source, initialized
from tests.plugs import ROWS

Run = Callable[..., object]


def fill(casparian: Casparian, run: Run) -> Casparian:
    """Two files worked, one of them edited and worked again."""
    source = add_source(casparian)
    run("publish", casparian.plugin("rows", ROWS), "--version", "1.0.0")
    (source / "a.txt").write_text("one\ntwo\n")
    (source / "b\n.txt").write_text("three\n")
    run("scan", "--drain")
    (source / "a.txt").write_text("edited\n")
    run("scan", "in", "--drain")
    return casparian


@pytest.fixture
def bare(tmp_path: Path) -> Casparian:
    """An empty folder: no configuration."""
    folder = tmp_path / "flow"
    folder.mkdir()
    return Casparian(folder)


@pytest.fixture
def casparian(tmp_path: Path) -> Casparian:
    return initialized(tmp_path / "flow")


@pytest.fixture
def source(casparian: Casparian) -> Path:
    return add_source(casparian)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    return Kept(tmp_path_factory.mktemp("kept"))


@pytest.fixture
def filled(casparian: Casparian) -> Casparian:
    """To be changed."""
    return fill(casparian, casparian.run)


@pytest.fixture
def blocked(casparian: Casparian, source: Path, monkeypatch: pytest.MonkeyPatch) -> Casparian:
    """A file to be worked, and one where the output folder should be; a drain soon gives up."""
    monkeypatch.setattr("casparian_flow.engine.committer.PAUSE_SECONDS", 0.2)
    monkeypatch.setattr("casparian_flow.cli.scan.PATIENCE_SECONDS", 1.0)
    casparian.run("publish", casparian.plugin("rows", ROWS))
    (casparian.folder / "output").write_text("a file where the folder should be")
    (source / "a.txt").write_text("one")
    return casparian


@pytest.fixture(scope="session")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Casparian:
    """To be looked at only; made by processes of their own."""
    made = initialized(tmp_path_factory.mktemp("shown") / "flow")
    return fill(made, made.process)
