"""Watchers that go deaf: noticed, armed anew, and their roots scanned meanwhile."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from watchdog.events import FileSystemEvent

from casparian_flow import durable
from casparian_flow.db import versions as db_versions
from casparian_flow.db.access import Ledger, open_ledger
from casparian_flow.services import watch as watch_module
from casparian_flow.services import watcher as watcher_module
from casparian_flow.services.scan import Root
from casparian_flow.services.watcher import WATCHING, EventHandler, Watcher
from tests.conftest import write_config
from tests.eventually import eventually
from tests.factories import add_root
from tests.services.test_watch import versions, watching


def state(ledger: Ledger, root: Root) -> Any:
    return ledger.read(lambda c: db_versions.scan_state(c, root.id))


def is_watched(ledger: Ledger, root: Root) -> bool:
    found = state(ledger, root)
    return found is not None and found.watch == WATCHING and found.finished > 0


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "CHECK_SECONDS", 0.05)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_watcher_whose_thread_dies_is_armed_anew_and_its_root_scanned(
    ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = add_root(ledger, source)
    hear = EventHandler.dispatch
    states = []

    def fail(_handler: EventHandler, _event: FileSystemEvent) -> None:
        monkeypatch.setattr(EventHandler, "dispatch", hear)
        raise RuntimeError("an error in a handler ends watchdog's thread")

    def note(c: Any, root_id: int, **values: Any) -> None:
        states.extend([values["watch"]] if "watch" in values else [])
        save(c, root_id, **values)

    save = db_versions.save_scan_state
    monkeypatch.setattr(db_versions, "save_scan_state", note)

    async def story() -> None:
        async with watching(ledger):
            await eventually(lambda: is_watched(ledger, root))
            monkeypatch.setattr(EventHandler, "dispatch", fail)
            (source / "killed-it").write_text("1")
            await eventually(lambda: versions(ledger) == 1)
            await eventually(lambda: len(states) >= 3 and is_watched(ledger, root))
            (source / "heard-again").write_text("1")
            await eventually(lambda: versions(ledger) == 2)

    asyncio.run(story())
    assert states[:3] == [WATCHING, "degraded: a watcher thread ended", WATCHING]


def test_a_root_that_is_replaced_is_watched_anew(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source)

    async def story() -> None:
        async with watching(ledger):
            await eventually(lambda: is_watched(ledger, root))
            source.rename(source.with_name("away"))
            await eventually(lambda: state(ledger, root).watch.startswith("degraded"))
            source.mkdir()
            (source / "first").write_text("1")
            await eventually(lambda: versions(ledger) == 1 and is_watched(ledger, root))
            (source / "second").write_text("1")
            await eventually(lambda: versions(ledger) == 2)

    asyncio.run(story())


def test_a_network_filesystem_is_polled(
    ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = add_root(ledger, source)
    monkeypatch.setattr(durable, "filesystem_kind", lambda _: "nfs4")

    async def story() -> None:
        async with watching(ledger, poll_seconds=0.1) as (watch, _):
            await eventually(lambda: bool(watch.last))
            (source / "f").write_text("1")
            await eventually(lambda: versions(ledger) == 1)
            assert state(ledger, root).watch.startswith("polling: nfs4")

    asyncio.run(story())


LIMITED = """
import sys
from pathlib import Path
from casparian_flow.services.scan import Root
from casparian_flow.services.watcher import Watcher
from tests.eventually import wait_until

Path("/proc/sys/user/max_inotify_watches").write_text("50")
watcher = Watcher(Root(1, sys.argv[1], "in", "", 0.0), lambda *_: None)
assert watcher.ensure_running(), watcher.state
print(watcher.ensure_running(), watcher.state, sep="|")
Path("/proc/sys/user/max_inotify_watches").write_text("1000")
wait_until(watcher.ensure_running)
print(watcher.ensure_running(), watcher.state, sep="|")
Path("/proc/sys/user/max_inotify_instances").write_text("0")
other = Watcher(Root(2, sys.argv[1], "in", "", 0.0), lambda *_: None)
print(other.ensure_running(), other.state, sep="|")
watcher.close()
"""


def test_what_the_kernels_limits_leave_unwatched_is_noticed(source: Path) -> None:
    for n in range(100):
        (source / f"d{n}").mkdir()
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", LIMITED, str(source)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    except FileNotFoundError:
        pytest.skip("there is no unshare here: limits of the kernel are untested")
    if "unshare" in done.stderr or "PermissionError" in done.stderr:
        pytest.skip(f"no user namespace here, so limits are untested: {done.stderr}")
    assert done.returncode == 0, done.stderr
    limited, lifted, refused = done.stdout.splitlines()
    assert limited.startswith("False|degraded: fs.inotify.max_user_watches")
    assert lifted == "False|watching"
    assert refused.startswith("False|degraded: it cannot be watched")


def test_a_watcher_ends_with_its_threads(source: Path) -> None:
    watcher = Watcher(Root(1, str(source), "in", "", 0.0), lambda *_: None)
    before = watcher_module._threads()
    assert watcher.ensure_running()
    assert watcher_module._threads() - before
    assert not watcher.ensure_running()
    watcher.close()
    assert watcher_module._threads() == before


def test_the_settings_reach_the_status(tmp_path: Path) -> None:
    from casparian_flow.services import report

    for extra, words in (("", "every 7 days, 20 MiB a second"), ("scrub_days = 0\n", "OFF")):
        settings = write_config(tmp_path / (extra[:5] or "usual"), f"[scan]\n{extra}")
        with open_ledger(settings.database) as ledger:
            assert report.status(settings, ledger)["scrub"].startswith(words)
