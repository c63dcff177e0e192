"""The watcher: hints come in, scans go out, and nothing depends on the hints."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, insert, select, update
from watchdog.events import FileSystemEvent
from watchdog.utils import BaseThread

from casparian_flow.config import ScanSettings
from casparian_flow.db.access import Ledger
from casparian_flow.db.models import FileVersion, RoutingRule, SourceRoot
from casparian_flow.errors import LedgerError
from casparian_flow.services import watch as watch_module
from casparian_flow.services.scan import Root, ScanReport, scan
from casparian_flow.services.scout import roots
from casparian_flow.services.watch import Changes, EventHandler, Watch
from tests.eventually import eventually
from tests.factories import add_plugin, add_root


@contextlib.asynccontextmanager
async def watching(
    ledger: Ledger, rescan_seconds: float = 3600.0, poll_seconds: float = 10.0
) -> AsyncIterator[tuple[Watch, asyncio.Event]]:
    """A running Watch, and an event that is set whenever it queued jobs."""
    queued = asyncio.Event()
    settings = ScanSettings(rescan_seconds=rescan_seconds, poll_seconds=poll_seconds)
    watch = Watch(ledger, settings, queued.set, lambda: None)
    task = asyncio.create_task(watch.run())
    try:
        yield watch, queued
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def versions(ledger: Ledger) -> int:
    """Locations with a version: a file may be seen empty, then written, with no settle window."""
    count = select(func.count(FileVersion.location_id.distinct()))
    return ledger.read(lambda c: c.execute(count).scalar_one())


def route_everything(ledger: Ledger) -> None:
    add_plugin(ledger, "p", subscriptions="all")
    ledger.write(
        lambda c: c.execute(insert(RoutingRule).values(pattern="*", tag="all", priority=0))
    )


async def versions_become(ledger: Ledger, queued: asyncio.Event, count: int) -> None:
    """Wait until so many locations have a version, and jobs were queued for them."""
    await eventually(lambda: versions(ledger) == count and queued.is_set())
    queued.clear()


def test_a_new_file_a_rename_and_a_folder_moved_in_are_heard(
    ledger: Ledger, source: Path, tmp_path: Path
) -> None:
    add_root(ledger, source)
    route_everything(ledger)

    async def story() -> None:
        async with watching(ledger) as (_, queued):
            (source / "first").write_text("1")
            await versions_become(ledger, queued, 1)
            (source / "second.tmp").write_text("2")
            (source / "second.tmp").rename(source / "second")
            await versions_become(ledger, queued, 2)
            (source / "made/at/once").mkdir(parents=True)
            (source / "made/at/once/file").write_text("3")
            await versions_become(ledger, queued, 3)
            (tmp_path / "outside/deep").mkdir(parents=True)
            (tmp_path / "outside/deep/file").write_text("4")
            (tmp_path / "outside").rename(source / "inside")
            await versions_become(ledger, queued, 4)

    asyncio.run(story())


def test_a_fresh_file_is_taken_when_it_has_settled(ledger: Ledger, source: Path) -> None:
    add_root(ledger, source, settle_seconds=0.3)
    route_everything(ledger)

    async def story() -> None:
        async with watching(ledger) as (_, queued):
            (source / "f").write_text("1")
            await versions_become(ledger, queued, 1)

    asyncio.run(story())


def test_a_ring_finds_new_roots_and_what_the_watcher_missed(
    ledger: Ledger, source: Path, tmp_path: Path
) -> None:
    route_everything(ledger)

    async def story() -> None:
        async with watching(ledger) as (watch, queued):
            (source / "f").write_text("1")
            add_root(ledger, source)
            watch.ring()
            await versions_become(ledger, queued, 1)
            other = tmp_path / "other"
            other.mkdir()
            (other / "g").write_text("1")
            ledger.write(
                lambda c: c.execute(
                    insert(SourceRoot).values(
                        path=str(other), name="other", active=True, ignore="", settle_seconds=0
                    )
                )
            )
            watch.ring()
            await versions_become(ledger, queued, 2)
            assert set(watch.last) == {"source", "other"}

    asyncio.run(story())


@pytest.fixture
def no_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watcher takes no event."""
    monkeypatch.setattr("casparian_flow.services.watch.EventHandler.dispatch", lambda *_: None)


@pytest.mark.parametrize(
    ("level", "words"),
    [(logging.WARNING, "Inotify queue overflowed"), (logging.ERROR, "Unable to rebuild watches")],
)
def test_lost_events_lead_to_a_full_scan(
    ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch, level: int, words: str
) -> None:
    root = add_root(ledger, source)
    route_everything(ledger)
    hear = EventHandler.dispatch

    def lose(_handler: EventHandler, _event: FileSystemEvent) -> None:
        """As watchdog says it: on a thread of the observer."""
        monkeypatch.setattr(EventHandler, "dispatch", hear)
        logging.getLogger("watchdog.observers").log(level, words)

    async def story() -> None:
        async with watching(ledger) as (watch, queued):
            await eventually(lambda: root.name in watch.last)
            monkeypatch.setattr(EventHandler, "dispatch", lose)
            (source / "first").write_text("1")
            await versions_become(ledger, queued, 1)
            (source / "second").write_text("1")
            await versions_become(ledger, queued, 2)

    asyncio.run(story())


@pytest.mark.usefixtures("no_events")
def test_the_schedule_finds_what_no_event_told(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source)
    route_everything(ledger)

    async def story() -> None:
        async with watching(ledger, rescan_seconds=0.1) as (watch, queued):
            await eventually(lambda: root.name in watch.last)
            (source / "f").write_text("1")
            await versions_become(ledger, queued, 1)

    asyncio.run(story())


@pytest.mark.usefixtures("no_events")
def test_a_ring_outlives_a_ledger_that_cannot_be_read(
    ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "REST_FACTOR", 1e12)  # no schedule after the first scan
    root = add_root(ledger, source)
    route_everything(ledger)
    refusals: list[LedgerError] = []

    def refuse_once(of: Ledger) -> list[Root]:
        monkeypatch.setattr(watch_module, "roots", roots)
        refusals.append(LedgerError("the disk is full"))
        raise refusals[-1]

    async def story() -> None:
        async with watching(ledger, rescan_seconds=0.01) as (watch, queued):
            await eventually(lambda: root.name in watch.last)
            (source / "f").write_text("1")
            monkeypatch.setattr(watch_module, "roots", refuse_once)
            watch.ring()
            await versions_become(ledger, queued, 1)

    asyncio.run(story())
    assert refusals


def test_what_watchdog_says_of_others_replaces_no_observer(
    ledger: Ledger, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = Changes(add_root(ledger, source), ScanSettings())
    try:
        assert changes._check()
        logging.getLogger("watchdog.observers").warning("Inotify queue overflowed")
        assert not changes._check()
        assert "unreliable" not in caplog.text
    finally:
        changes.close()


def test_a_huge_file_in_one_root_does_not_delay_another(
    ledger: Ledger, source: Path, tmp_path: Path
) -> None:
    """A terabyte is read for longer than this test takes."""
    add_root(ledger, source, settle_seconds=0.05)
    huge = tmp_path / "huge"
    huge.mkdir()
    with open(huge / "file", "wb") as file:
        file.truncate(1 << 40)
    values = {"path": str(huge), "name": "huge", "active": True, "ignore": "", "settle_seconds": 0}
    ledger.write(lambda c: c.execute(insert(SourceRoot).values(values)))
    count = select(func.count(FileVersion.id))

    async def story() -> None:
        async with watching(ledger) as (watch, _):
            for n in range(14):
                (source / "f").write_text(str(n))
                await eventually(
                    lambda n=n: ledger.read(lambda c: c.execute(count).scalar_one()) == n + 1
                )
            assert set(watch.last) == {"source"}

    asyncio.run(story())


def spy(monkeypatch: pytest.MonkeyPatch) -> list[set[bytes] | None]:
    """What each scan from now on scans."""
    scanned: list[set[bytes] | None] = []

    def note(ledger: Ledger, root: Root, only: set[bytes] | None, stop: Any) -> ScanReport:
        scanned.append(only)
        return scan(ledger, root, only, stop)

    monkeypatch.setattr(watch_module, "scan", note)
    return scanned


def test_a_file_that_is_dropped_is_scanned_once(
    ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = add_root(ledger, source, settle_seconds=0.3)
    route_everything(ledger)
    scanned = spy(monkeypatch)

    async def story() -> None:
        async with watching(ledger) as (watch, queued):
            await eventually(lambda: root.name in watch.last)
            (source / "f").write_text("1")
            await versions_become(ledger, queued, 1)

    asyncio.run(story())
    assert scanned == [None, {b""}]


def test_a_file_beside_one_that_is_written_all_the_time_is_found(
    ledger: Ledger, source: Path
) -> None:
    root = add_root(ledger, source, settle_seconds=0.3)
    route_everything(ledger)

    async def write(log: Path) -> None:
        while True:
            with log.open("a") as file:
                file.write("x")
            await asyncio.sleep(0.02)

    async def story() -> None:
        async with watching(ledger) as (watch, queued):
            await eventually(lambda: root.name in watch.last)
            writing = asyncio.create_task(write(source / "log"))
            (source / "f").write_text("1")
            await versions_become(ledger, queued, 1)
            assert not writing.done()
            writing.cancel()

    asyncio.run(story())


def test_a_root_that_is_removed_or_changed_is_scanned_no_more_or_anew(
    ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = add_root(ledger, source, settle_seconds=3600.0)
    route_everything(ledger)
    scanned = spy(monkeypatch)
    roots_table = SourceRoot.__table__

    async def story() -> None:
        async with watching(ledger) as (watch, queued):
            await eventually(lambda: root.name in watch.last)
            (source / "f").write_text("1")
            ledger.write(lambda c: c.execute(update(roots_table).values(settle_seconds=0.0)))
            watch.ring()
            await versions_become(ledger, queued, 1)
            ledger.write(lambda c: c.execute(update(roots_table).values(active=False)))
            watch.ring()
            await eventually(lambda: not [t for t in threading.enumerate() if is_watchdogs(t)])

    asyncio.run(story())
    assert scanned.count(None) == 2


def is_watchdogs(thread: threading.Thread) -> bool:
    return isinstance(thread, BaseThread)
