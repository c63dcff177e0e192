"""Asking sinks what they have: when it is done, and what waits while it cannot be."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from casparian_flow import main
from casparian_flow.config import Settings
from casparian_flow.db import asked, jobs, plugins
from casparian_flow.db.access import Ledger, open_ledger
from casparian_flow.services import backup, inventory, report, topics
from casparian_flow.services.scan import Root, scan
from casparian_flow.services.scout import roots
from tests.conftest import write_config
from tests.daemons import work_off
from tests.eventually import PATIENCE, eventually
from tests.factories import add_root
from tests.plugs import ROWS, publish

PLUGIN = ROWS.replace(
    'pattern="*.txt", topic="lines"', 'pattern="*.txt", sinks={"lines": "sqlite:///out.sqlite3"}'
)


class Flow:
    """A folder with a source root and a plugin that writes to a SQLite sink, which may be away."""

    def __init__(self, settings: Settings, source: Path) -> None:
        self.settings = settings
        self.source = source
        self.sink = settings.home / "out.sqlite3"
        self._away = settings.home / "away"

    def publish(self, ledger: Ledger) -> Root:
        root = add_root(ledger, self.source)
        publish(ledger, self.settings, "rows", PLUGIN, "1.0.0")
        return root

    def work(self, ledger: Ledger, **contents: str) -> dict[str, int]:
        for name, words in contents.items():
            (self.source / f"{name}.txt").write_text(words)
        for root in roots(ledger):
            scan(ledger, root)
        return work_off(self.settings)

    def leave(self) -> None:
        """The sink cannot be read."""
        self.sink.rename(self._away)
        self.sink.mkdir()

    def come_back(self) -> None:
        self.sink.rmdir()
        self._away.rename(self.sink)

    def lines(self) -> list[str]:
        with closing(sqlite3.connect(self.sink)) as connection:
            return sorted(row[0] for row in connection.execute("SELECT line FROM lines"))

    @property
    def location(self) -> str:
        return f"sqlite:///{self.sink}"

    def lose(self) -> None:
        for file in self.settings.home.glob(f"{self.settings.database.path.name}*"):
            file.unlink()


@pytest.fixture
def flow(settings: Settings, source: Path) -> Flow:
    return Flow(settings, source)


async def until(daemon: main.Daemon, done: Callable[[dict[str, int]], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not done(await daemon.ledger.read_soon(jobs.counts)):
            await asyncio.sleep(0.05)


def test_jobs_wait_for_a_sink_that_a_lost_ledger_cannot_ask(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "AGAIN_SECONDS", 0.05)
    take, asked = inventory._take, []

    def counted(*arguments: Any, **options: Any) -> list[str]:
        asked.append(arguments)
        return take(*arguments, **options)

    with open_ledger(flow.settings.database) as ledger:
        flow.publish(ledger)
        flow.work(ledger, a="a1", b="b1")
        flow.work(ledger, a="a2")
    flow.lose()
    with open_ledger(flow.settings.database) as ledger:
        root = flow.publish(ledger)
        flow.leave()
        scan(ledger, root)
        assert ledger.read(jobs.counts) == {"QUEUED": 2}

    async def story() -> None:
        async with main.running(flow.settings, "test", workers=1, watch=True) as daemon:
            (words,) = daemon.adopted
            assert f"sink {flow.location} cannot be asked" in words
            monkeypatch.setattr(inventory, "_take", counted)
            await eventually(lambda: len(asked) > 2)  # in vain
            assert await daemon.ledger.read_soon(jobs.counts) == {"QUEUED": 2}
            advice = report.advise(flow.settings, daemon.ledger)
            assert [a for a in advice if flow.location in a.words]
            flow.come_back()
            await until(daemon, lambda counts: not counts.get("QUEUED"))

    asyncio.run(story())
    with open_ledger(flow.settings.database) as ledger:
        assert inventory.waiting(flow.settings, ledger) == {}
    assert flow.lines() == ["a1", "a2", "b1"]


def test_a_ledger_that_knows_its_sink_does_not_wait_for_it(flow: Flow) -> None:
    with open_ledger(flow.settings.database) as ledger:
        flow.publish(ledger)
        flow.work(ledger, a="a1")
        flow.leave()
        assert inventory.take(flow.settings, ledger) == []
        assert inventory.waiting(flow.settings, ledger) == {}


@pytest.mark.parametrize("how", ["backup", "copy"])
def test_an_older_ledger_waits_until_it_has_asked(flow: Flow, tmp_path: Path, how: str) -> None:
    copy = tmp_path / "copy"
    with open_ledger(flow.settings.database) as ledger:
        flow.publish(ledger)
        flow.work(ledger, a="a1")
        if how == "backup":
            backup.make(flow.settings, ledger, str(copy))
    if how == "copy":
        shutil.copyfile(flow.settings.database.path, copy)
    with open_ledger(flow.settings.database) as ledger:
        flow.work(ledger, a="a2")
    flow.lose()
    flow.leave()
    shutil.copyfile(copy, flow.settings.database.path)
    with open_ledger(flow.settings.database) as ledger:
        (words,) = inventory.take(flow.settings, ledger)
        assert f"sink {flow.location} cannot be asked" in words
        assert inventory.take(flow.settings, ledger) == [words]
        assert inventory.waiting(flow.settings, ledger).keys() == {flow.location}
        flow.come_back()
        (words,) = inventory.take(flow.settings, ledger)
        assert "1 output that this ledger did not know" in words
        assert inventory.waiting(flow.settings, ledger) == {}
        assert flow.work(ledger) == {"COMPLETED": 2}
    assert flow.lines() == ["a1", "a2"]


def test_outputs_are_adopted_before_the_first_scan_of_a_root_also_while_a_daemon_runs(
    flow: Flow,
) -> None:
    with open_ledger(flow.settings.database) as ledger:
        flow.publish(ledger)
        flow.work(ledger, a="a1", b="b1")
    flow.lose()

    async def story() -> None:
        async with main.running(flow.settings, "test", workers=1, watch=True) as daemon:
            publish(daemon.ledger, flow.settings, "rows", PLUGIN, "1.0.0")
            await daemon.ledger.read_soon(lambda _: add_root(daemon.ledger, flow.source))
            assert daemon.watch is not None
            daemon.watch.ring()
            await until(daemon, lambda counts: counts == {"COMPLETED": 2})

    asyncio.run(story())
    assert flow.lines() == ["a1", "b1"]


def test_a_sink_that_a_topic_goes_to_while_a_daemon_runs_is_asked_first(
    flow: Flow, tmp_path: Path
) -> None:
    with open_ledger(flow.settings.database) as ledger:
        flow.publish(ledger)
        flow.work(ledger, a="a1", b="b1")
    (flow.source / "a.txt").write_text("a2")
    other = write_config(tmp_path / "other")

    async def story() -> None:
        async with main.running(other, "test", workers=1, watch=True) as daemon:
            ledger = daemon.ledger

            def begin() -> None:
                publish(ledger, other, "rows", ROWS, "1.0.0")
                topics.set_topic(ledger, other, "rows", "lines", [flow.location], "append")
                add_root(ledger, flow.source)

            await asyncio.to_thread(begin)
            assert daemon.watch is not None
            daemon.watch.ring()
            await until(daemon, lambda counts: counts.get("COMPLETED", 0) >= 3)
            assert not await ledger.read_soon(asked.unknown)

    asyncio.run(story())
    assert flow.lines() == ["a1", "a2", "b1"]
    with open_ledger(other.database) as ledger:
        assert [str(v) for v in ledger.read(lambda c: plugins.versions(c, "rows", stubs=True))] == [
            "1.0.0", f"1.0.0+{_artifact(flow)[:12]}",
        ]  # fmt: skip


def _artifact(flow: Flow) -> str:
    with open_ledger(flow.settings.database) as ledger:
        (stored,) = ledger.read(plugins.stored)
        return stored.artifact_hash
