"""Watchers that go deaf: noticed, armed anew, and their roots scanned meanwhile."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from watchdog.events import FileSystemEvent

from casparian_flow import durable
from casparian_flow.config import ScanSettings
from casparian_flow.db import versions as db_versions
from casparian_flow.db.access import Ledger, open_ledger
from casparian_flow.services import watch as watch_module
from casparian_flow.services.scan import Root
from casparian_flow.services.watch import WATCHING, Changes, EventHandler, Watch
from proofs.detection import missed
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
    ledger: Ledger,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = add_root(ledger, source)
    hear = EventHandler.dispatch

    def fail(_handler: EventHandler, _event: FileSystemEvent) -> None:
        monkeypatch.setattr(EventHandler, "dispatch", hear)
        raise RuntimeError("an error in a handler ends watchdog's thread")

    async def story() -> None:
        async with watching(ledger):
            await eventually(lambda: is_watched(ledger, root))
            monkeypatch.setattr(EventHandler, "dispatch", fail)
            (source / "killed-it").write_text("1")
            await eventually(lambda: versions(ledger) == 1)
            (source / "heard-again").write_text("1")
            await eventually(lambda: versions(ledger) == 2)
            assert is_watched(ledger, root)

    asyncio.run(story())
    assert caplog.messages.count("source: file events are unreliable: a watcher thread ended") == 1


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
from casparian_flow.config import ScanSettings
from casparian_flow.services.scan import Root
from casparian_flow.services.watch import Changes
from tests.eventually import wait_until

Path("/proc/sys/user/max_inotify_watches").write_text("50")
changes = Changes(Root(1, sys.argv[1], "in", "", 0.0), ScanSettings())
print(changes._check(), changes._check(), changes._check(), changes.state, sep="|")
Path("/proc/sys/user/max_inotify_watches").write_text("1000")
wait_until(changes._check)
print(changes._check(), changes.state, sep="|")
Path("/proc/sys/user/max_inotify_instances").write_text("0")
other = Changes(Root(2, sys.argv[1], "in", "", 0.0), ScanSettings())
print(other._check(), other.state, sep="|")
changes.close()
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
    assert limited.startswith("True|True|False|degraded: fs.inotify.max_user_watches")
    assert lifted == "False|watching"
    assert refused.startswith("False|degraded: it cannot be watched")


def test_a_watcher_ends_with_its_threads(source: Path) -> None:
    changes = Changes(Root(1, str(source), "in", "", 0.0), ScanSettings())
    assert changes._check()
    own = set(changes._threads())
    assert own <= set(threading.enumerate())
    assert not changes._check()
    changes.close()
    assert not own & set(threading.enumerate())


def test_what_is_announced_is_not_missed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "GRACE_SECONDS", 0.0)
    changes = Changes(Root(1, str(source), "in", "", 0.0), ScanSettings())
    changes.announce(b"before")
    changes.begin()
    never = [b"never/one", b"never/two", b"f"]
    changes.suspect([b"before/f", b"late/f", *never])
    changes.announce(b"late")
    assert changes.begin()[0] == 3
    assert changes.begin()[0] == 0, "each is counted once"
    changes.suspect(never)
    changes.announce(b"")
    assert changes.begin()[0] == 2, "they changed again, and no event told"


def test_what_no_event_may_still_announce_is_not_counted_yet(source: Path) -> None:
    changes = Changes(Root(1, str(source), "in", "", 0.0), ScanSettings())
    changes.begin()
    changes.suspect([b"late/f"])
    assert changes.begin()[0] == changes.begin()[0] == 0
    changes.announce(b"late")
    changes.begin()
    assert changes._suspects == []


def test_an_observer_that_did_not_announce_a_change_is_replaced(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose filesystem was unmounted and mounted again, or that skipped a folder."""
    monkeypatch.setattr(watch_module, "GRACE_SECONDS", 0.0)
    changes = Changes(Root(1, str(source), "in", "", 0.0), ScanSettings())
    try:
        assert changes._check()
        first = changes._observer
        changes.begin()
        changes.suspect([b"made/before/it/was/watched"])
        changes.begin()
        assert not changes._check()
        changes.suspect([b"deaf/f"])
        changes.begin()
        assert changes._check()
        assert changes.state == WATCHING
        assert changes._observer is not first
    finally:
        changes.close()


def test_a_folder_that_is_put_off_is_not_hurried_by_events(source: Path) -> None:
    changes = Changes(Root(1, str(source), "in", "", 0.0), ScanSettings())
    changes.announce(b"log")
    changes.put_off(b"log", 1000.0)
    changes.announce(b"log")
    changes.announce(b"other")
    assert changes._take(time.monotonic() + 999.0) == {b"other"}
    assert changes._take(time.monotonic() + 1000.0) == {b"log"}


@pytest.mark.parametrize("events", [True, False])
def test_a_change_that_a_full_scan_found_and_no_event_announced_is_counted(
    ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch, events: bool
) -> None:
    monkeypatch.setattr(watch_module, "GRACE_SECONDS", 0.0)
    root = add_root(ledger, source)
    (source / "before").write_text("no observer was there to announce it")

    hear = EventHandler.dispatch
    heard = []

    def note(handler: EventHandler, event: FileSystemEvent) -> None:
        if events:
            hear(handler, event)
        heard.append(event)

    async def scanned_again(watch: Watch) -> None:
        last = watch.last.get(root.name)
        watch.ring()
        await eventually(lambda: watch.last.get(root.name) is not last)

    async def story() -> None:
        async with watching(ledger) as (watch, _):
            await eventually(lambda: is_watched(ledger, root))
            monkeypatch.setattr(EventHandler, "dispatch", note)
            (source / "f").write_text("1")
            await eventually(lambda: heard)
            await scanned_again(watch)
            await eventually(lambda: versions(ledger) == 2)
            await scanned_again(watch)
            await scanned_again(watch)
            assert state(ledger, root).missed == (0 if events else 1)

    asyncio.run(story())


@pytest.mark.slow
def test_files_made_while_the_daemon_is_stopped_are_found_and_counted(tmp_path: Path) -> None:
    """Twelve thousand files are more events than the kernel keeps by default: 16,384."""
    tally = missed.run(tmp_path, 12_000, "[scan]\nrescan_seconds = 10.0\n")
    assert tally.recorded == 12_000
    assert 0 < tally.missed < 12_000
    assert tally.watch == WATCHING
    assert tally.replaced == 1


def test_the_settings_reach_the_status(tmp_path: Path) -> None:
    from casparian_flow.services import report

    for extra, words in (("", "every 7 days, 20 MiB a second"), ("scrub_days = 0\n", "OFF")):
        settings = write_config(tmp_path / (extra[:5] or "usual"), f"[scan]\n{extra}")
        with open_ledger(settings.database) as ledger:
            assert report.status(settings, ledger)["scrub"].startswith(words)
