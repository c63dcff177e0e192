"""One topic in two sinks, one of them locked, full or read-only for a while: neither goes ahead."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path

import pyarrow.dataset as ds
import pytest
from sqlalchemy import select

from casparian_flow import main
from casparian_flow.config import Settings
from casparian_flow.db.access import Ledger
from casparian_flow.db.models import ProcessingJob
from casparian_flow.engine.sinks import sqlite as sqlite_sink
from casparian_flow.services.scan import scan
from casparian_flow.services.topics import set_topic
from casparian_flow.services.verify import verify
from tests.daemons import all_done, outcomes, work_off
from tests.disks import fill, in_memory, remount
from tests.e2e.test_sinks_in_trouble import paused
from tests.eventually import eventually
from tests.factories import add_root
from tests.plugs import ROWS, publish

OTHERS = ROWS.replace('pattern="*.txt", topic="lines"', 'pattern="*.csv", topic="others"').replace(
    'self.publish("lines"', 'self.publish("others"'
)
"""A plugin that does not write to the sick sink."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A foreign program writes to the database."""
    with closing(sqlite3.connect(folder / "sick.sqlite3", isolation_level=None)) as foreign:
        foreign.execute("BEGIN IMMEDIATE")
        yield


@contextmanager
def full(folder: Path) -> Iterator[None]:
    """Its disk has no byte left."""
    ballast = fill(folder)
    yield
    ballast.unlink()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Its disk takes no more writes."""
    remount(folder, "ro")
    yield
    remount(folder, "rw")


def in_sqlite(database: Path) -> list[str]:
    with closing(sqlite3.connect(database)) as connection:
        return sorted(line for (line,) in connection.execute("SELECT line FROM lines"))


def in_parquet(settings: Settings) -> list[str]:
    return sorted(ds.dataset(settings.home / "output" / "lines").to_table()["line"].to_pylist())


@pytest.fixture
def sick(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Where the sink lies that falls sick."""
    if request.getfixturevalue("trouble") is locked:
        folder = tmp_path / "sick"
        folder.mkdir()
        yield folder
        return
    with in_memory(tmp_path / "sick", "2m") as folder:
        yield folder


@pytest.mark.parametrize("trouble", [locked, full, read_only], ids=lambda trouble: trouble.__name__)
@pytest.mark.slow_but("locked")
def test_of_two_sinks_of_a_topic_neither_shows_what_the_sick_one_lacks(
    ledger: Ledger,
    settings: Settings,
    source: Path,
    sick: Path,
    trouble: Callable[[Path], AbstractContextManager[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("casparian_flow.engine.committer.PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(sqlite_sink, "BUSY_SECONDS", 0.1)
    root = add_root(ledger, source)
    publish(ledger, settings, "rows", ROWS, "1.0.0")
    publish(ledger, settings, "others", OTHERS, "1.0.0")
    uris = ["parquet://output", f"sqlite:///{sick}/sick.sqlite3"]
    set_topic(ledger, settings, "rows", "lines", uris, "replace")
    (source / "a.txt").write_text("one\ntwo")
    scan(ledger, root)
    assert work_off(settings) == {"COMPLETED": 1}
    assert in_parquet(settings) == in_sqlite(sick / "sick.sqlite3") == ["one", "two"]

    (source / "a.txt").write_text("three")
    (source / "b.csv").write_text("else")
    scan(ledger, root)

    async def story() -> None:
        with ExitStack() as fallen:
            fallen.enter_context(trouble(sick))
            async with main.running(settings, "test", workers=1, watch=False) as daemon:
                await paused(daemon.ledger)
                await eventually(lambda: outcomes(ledger)["b.csv"][0] == "COMPLETED")
                assert in_parquet(settings) == ["one", "two"]
                if trouble is locked:  # readers still get in
                    assert in_sqlite(sick / "sick.sqlite3") == ["one", "two"]
                fallen.close()
                assert await all_done(daemon) == {"COMPLETED": 3}

    asyncio.run(story())
    assert in_parquet(settings) == in_sqlite(sick / "sick.sqlite3") == ["three"]
    attempts = ledger.read(lambda c: c.execute(select(ProcessingJob.attempts)).scalars().all())
    assert attempts == [1, 1, 1]
    assert verify(settings, ledger).problems == []
