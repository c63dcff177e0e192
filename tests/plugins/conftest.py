"""Runs a bundled plugin in-process and gives back what it published, a table a topic."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest

from casparian_flow.sdk import FileInfo
from tests.real_data import REPOSITORY, absent, real_data

Run = Callable[[Path], dict[str, pa.Table]]


def load(name: str) -> ModuleType:
    """Import `plugins/<name>.py` the way the guest does: as a module of its own."""
    spec = importlib.util.spec_from_file_location(
        f"bundled_{name}", REPOSITORY / "plugins" / f"{name}.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def runner(name: str, **options: str | int) -> Run:
    """A function that runs the plugin on a file; it holds the plugin to its declared topics.

    Args:
        options: those of its MANIFEST that `casparian publish --option` changes.
    """
    module = load(name)
    if options:
        assert options.keys() <= module.MANIFEST.options.keys()
        chosen = {**module.MANIFEST.options, **options}
        module.MANIFEST = dataclasses.replace(module.MANIFEST, options=chosen)
    return running(module)


def running(module: ModuleType) -> Run:
    """The same for a module that is loaded already."""
    topics = module.MANIFEST.topic
    declared = {topics} if isinstance(topics, str) else set(topics)
    handler = module.Handler()

    def run(path: Path) -> dict[str, pa.Table]:
        published: dict[str, list[pa.Table]] = {}

        def record(topic: str, data: pa.Table) -> None:
            assert topic in declared
            data.validate(full=True)
            names = [name.casefold() for name in data.column_names]
            assert all(names) and len(set(names)) == len(names), "empty or repeated column names"
            assert not any(name.startswith("_cf_") for name in names), "a reserved column name"
            published.setdefault(topic, []).append(data)

        handler._publish = record
        handler.execute(str(path))
        return {topic: pa.concat_tables(tables) for topic, tables in published.items()}

    return run


class Table:
    """A bundled plugin that was published as a table, or runs a survey.

    Args:
        topics: the table's topic and that of its rejects; `survey` for a survey.
    """

    def __init__(self, plugin: str, contract: dict[str, Any], topics: list[str]) -> None:
        module = load(plugin)
        module.MANIFEST = dataclasses.replace(module.MANIFEST, contract=contract, topic=topics)
        self._handler = module.Handler()
        self._topics = topics

    def run(self, folder: Path, data: bytes, rel_path: str = "table.csv") -> dict[str, pa.Table]:
        """What the plugin publishes of a file with this content."""
        file = folder / rel_path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        published: dict[str, list[pa.Table]] = {}

        def record(topic: str, data: pa.Table) -> None:
            assert topic in self._topics
            data.validate(full=True)
            published.setdefault(topic, []).append(data)

        self.run_file(file, rel_path, record)
        return {topic: pa.concat_tables(tables) for topic, tables in published.items()}

    def run_file(self, file: Path, rel_path: str, publish: Callable[[str, pa.Table], None]) -> None:
        """Run the plugin on a file."""
        self._handler._publish = publish
        self._handler.file = FileInfo(
            path=str(file), rel_path=rel_path, source="in", content_hash="",
            size_bytes=file.stat().st_size, version_id=1, job_id=1,
        )  # fmt: skip
        self._handler.execute(str(file))


def table_of(plugin: str, contract: dict[str, Any]) -> Table:
    """The table of a contract."""
    return Table(plugin, contract, [contract["table"], f"{contract['table']}_rejects"])


@pytest.fixture(scope="session")
def delimited() -> Run:
    return runner("delimited")


@pytest.fixture(scope="session")
def json_records() -> Run:
    return runner("json_records")


@pytest.fixture(scope="session")
def excel_sheets() -> Run:
    return runner("excel_sheets")


@pytest.fixture(scope="session")
def windows_events() -> Run:
    return runner("windows_events")


@pytest.fixture(scope="session")
def access_log() -> Run:
    return runner("access_log")


@pytest.fixture(scope="session")
def shared_files() -> Path:
    """The folder of real input beside the repository."""
    found = real_data("files")
    if found is None:
        pytest.skip(absent("files", "that the bundled plugins read files that people have"))
    return found
