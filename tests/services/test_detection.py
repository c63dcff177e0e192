"""What a scan waits for, what it does not believe, and what only reading finds."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from casparian_flow.db import audit, versions
from casparian_flow.db.access import Ledger
from casparian_flow.db.models import (
    AuditEntry,
    FileLocation,
    ProcessingJob,
    RoutingRule,
    ScanState,
)
from casparian_flow.db.versions import Stat
from casparian_flow.services import scan as scan_module
from casparian_flow.services import vanished, walk
from casparian_flow.services.scan import Root, scan, unrest
from casparian_flow.services.scout import scan_until_settled, scrub
from tests import disks
from tests.eventually import wait_until
from tests.factories import add_plugin, add_root
from tests.services.test_scan import OLD, gone, history, put


def state(ledger: Ledger, root: Root) -> ScanState:
    return ledger.read(lambda c: versions.scan_state(c, root.id))


@pytest.mark.parametrize(
    ("done_file", "name", "wanted"),
    [
        ("{name}.done", b"a.csv", b"a.csv.done"),
        ("{stem}.ok", b"a.b.csv", b"a.b.ok"),
        ("ok-{stem}", b"\xff", b"ok-\xff"),
        ("_SUCCESS", b"a.csv", b"_SUCCESS"),
    ],
)
def test_a_marker_is_named_after_its_file(done_file: str, name: bytes, wanted: bytes) -> None:
    assert walk.marker(done_file, name) == wanted
    assert walk.marker_names(done_file).fullmatch(os.fsdecode(wanted))
    assert not walk.marker_names(done_file).fullmatch(os.fsdecode(name))


def test_a_file_is_taken_when_its_done_file_is_there(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source, done_file="{name}.done")
    put(source / "a.csv", "1")
    put(source / "sub/b.csv", "22")
    report = scan(ledger, root)
    assert (report.versions, report.waiting, report.unsettled) == (0, 2, set())
    assert state(ledger, root).waiting == 2
    put(source / "sub/b.csv.done", "")
    assert (scan(ledger, root).versions, state(ledger, root).waiting) == (1, 1)
    # Its producer takes the marker away before it writes again.
    (source / "sub/b.csv.done").unlink()
    put(source / "sub/b.csv", "half of")
    assert scan(ledger, root).versions == 0
    put(source / "sub/b.csv", "whole content")
    put(source / "sub/b.csv.done", "")
    scan(ledger, root)
    assert history(ledger) == {b"sub/b.csv": [2, 13]}
    assert scan(ledger, root).files == 2  # a marker is not a file of the root


def test_one_marker_may_speak_for_a_folder(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source, done_file="_SUCCESS")
    for n in range(3):
        put(source / f"part/{n}", str(n))
    put(source / "other/x", "1")
    assert scan(ledger, root).waiting == 4
    put(source / "part/_SUCCESS", "")
    assert scan(ledger, root, only=[b"part"]).versions == 3
    assert set(history(ledger)) == {b"part/0", b"part/1", b"part/2"}


def test_a_file_below_the_minimum_age_waits_and_nobody_waits_for_it(
    ledger: Ledger, source: Path
) -> None:
    root = add_root(ledger, source, settle_seconds=60, min_age_seconds=3600)
    put(source / "f", "1", OLD)  # an old mtime is no age: its ctime is now
    report = scan_until_settled(ledger, root)
    assert (report.versions, report.waiting, report.unsettled) == (0, 1, set())
    ripe = root._replace(min_age_seconds=0, settle_seconds=0)
    assert scan(ledger, ripe).versions == 1


def test_a_file_that_is_written_between_the_listing_and_the_reading_is_not_at_rest(
    ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its age was judged by the stamps of the listing; the bytes that are read are younger."""
    root = add_root(ledger, source, settle_seconds=0.5)
    file = put(source / "f", "whole")
    real = scan_module.hash_and_capture
    read: list[bytes] = []

    def late(name: bytes, *rest: Any) -> Any:
        if not read:
            put(file, "half of the next")
        read.append(name)
        return real(name, *rest)

    monkeypatch.setattr(scan_module, "hash_and_capture", late)
    report = scan(ledger, root)
    while not read:
        report = scan(ledger, root)
    assert (report.versions, report.unsettled, history(ledger)) == (0, {b""}, {})
    assert scan_until_settled(ledger, root).versions == 1


HOUR = 3600 * 10**9
NOW = 10**18


@pytest.mark.parametrize(
    ("mtime", "ctime", "wait"),
    [
        (NOW, NOW, 2.0),
        (NOW - HOUR, NOW - 10**9, 1.0),
        (NOW - HOUR, NOW - HOUR, 0.0),
        (NOW + HOUR, NOW, 2.0),  # a future mtime was made up
        (NOW + HOUR, NOW - HOUR, 0.0),
        (NOW + HOUR, NOW + HOUR, 0.0),  # the clock was set back an hour: no waiting for it
        (NOW - 24 * HOUR, NOW - 24 * HOUR, 0.0),  # or forward a day
    ],
)
def test_rest_is_told_by_the_stamps_and_the_clock(mtime: int, ctime: int, wait: float) -> None:
    assert unrest(Stat(1, 1, 1, mtime, ctime), NOW, 2.0) == pytest.approx(wait)
    assert unrest(Stat(1, 1, 1, mtime, ctime), NOW, 0.0) == 0.0


@pytest.mark.parametrize("shift", [-86_400.0, -3600.0, 3600.0, 86_400.0])
def test_nothing_is_missed_when_the_clock_jumps(
    ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    """The files keep the old clock's stamps; what is written after has the new one's."""
    root = add_root(ledger, source, settle_seconds=2.0)
    real, real_ns = time.time, time.time_ns
    put(source / "before", "1", OLD)
    scan(ledger, root._replace(settle_seconds=0))
    put(source / "edited", "1")
    monkeypatch.setattr(time, "time", lambda: real() + shift)
    monkeypatch.setattr(time, "time_ns", lambda: real_ns() + int(shift * 1e9))
    scan(ledger, root)
    put(source / "before", "22", OLD)
    scan(ledger, root)
    assert scan(ledger, root).versions == 0
    assert history(ledger) == {b"before": [1, 2], b"edited": [1]}
    monkeypatch.undo()
    scan(ledger, root._replace(settle_seconds=0))
    assert history(ledger) == {b"before": [1, 2], b"edited": [1]}


def test_a_future_mtime_is_one_version(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source)
    file = put(source / "f", "1", time.time() + 86_400)
    assert [scan(ledger, root).versions for _ in range(3)] == [1, 0, 0]
    put(file, "2", file.stat().st_mtime)
    assert scan(ledger, root).versions == 1


def crowd(source: Path, count: int) -> None:
    for n in range(count):
        put(source / f"d{n % 5}/f{n}", str(n))


@pytest.mark.slow
def test_many_files_that_vanish_at_once_are_held_until_somebody_says_so(
    ledger: Ledger, source: Path
) -> None:
    root = add_root(ledger, source)
    crowd(source, 300)
    scan(ledger, root)
    for n in range(0, 300, 2):
        (source / f"d{n % 5}/f{n}").unlink()
    put(source / "new", "1")
    report = scan(ledger, root)
    assert (report.gone, report.held, report.versions, report.problem) == (0, 150, 1, "")
    assert (state(ledger, root).held, gone(ledger)) == (150, set())
    since = state(ledger, root).held_since
    # Parts of a held deletion are not believed because somebody looks at a part.
    assert scan(ledger, root, only=[b"d0"]).gone == 0
    assert scan(ledger, root).held == 150
    assert state(ledger, root).held_since == since
    report = scan(ledger, root, believe=True)
    assert (report.gone, report.held, len(gone(ledger))) == (150, 0, 150)
    assert (state(ledger, root).held, state(ledger, root).held_since) == (0, 0)
    assert scan(ledger, root).gone == 0


def test_held_files_are_believed_gone_after_a_day(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source)
    crowd(source, 200)
    scan(ledger, root)
    for n in range(5):
        shutil.rmtree(source / f"d{n}")
    assert scan(ledger, root).held == 200
    almost = time.time() - vanished.HOLD_SECONDS
    for since, found in ((almost + 60, (0, 200)), (almost - 60, (200, 0))):
        ledger.write(lambda c, s=since: versions.save_scan_state(c, root.id, held_since=s))
        report = scan(ledger, root)
        assert (report.gone, report.held) == found


def test_a_few_deletions_are_believed_however_large_their_share(
    ledger: Ledger, source: Path
) -> None:
    root = add_root(ledger, source)
    crowd(source, 99)
    scan(ledger, root)
    for n in range(5):
        shutil.rmtree(source / f"d{n}")
    assert scan(ledger, root).gone == 99


def test_a_file_that_another_scan_has_seen_anew_is_not_marked_gone(
    ledger: Ledger, source: Path
) -> None:
    root = add_root(ledger, source)
    file = put(source / "f", "1")
    scan(ledger, root)
    top = ledger.read(lambda c: versions.directory(c, root.id, b""))
    assert top
    seen = ledger.read(lambda c: versions.present_in(c, top.directory_id))
    file.unlink()
    put(file, "2")
    scan(ledger, root)
    ledger.write(lambda c: versions.mark_gone(c, root.id, seen))
    assert gone(ledger) == set()


@pytest.mark.parametrize("place", ["listing it", "opening it"])
def test_a_directory_that_errors_infers_no_deletions(
    ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    root = add_root(ledger, source)
    put(source / "sub/deep/f", "1")
    put(source / "sub/g", "1")
    scan(ledger, root)
    scandir, open_, bad = os.scandir, os.open, os.stat(source / "sub").st_ino

    def broken_list(folder: int | Path) -> Iterator[os.DirEntry[str]]:
        if os.stat(folder).st_ino == bad:
            raise OSError(5, "Input/output error")
        return scandir(folder)

    def refused_open(path: str | bytes, *args: int, **more: int) -> int:
        if path == b"sub":
            raise PermissionError(13, "Permission denied")
        return open_(path, *args, **more)

    with monkeypatch.context() as patch:
        if place == "listing it":
            patch.setattr(os, "scandir", broken_list)
        else:
            patch.setattr(os, "open", refused_open)
        put(source / "the-root-changes-too", "1")
        report = scan(ledger, root)
    assert [words.partition(":")[0] for words in report.unreadable] == [f"{root.name}/sub"]
    assert (report.gone, gone(ledger)) == (0, set())
    assert scan(ledger, root).unreadable == []


def test_a_lost_mount_below_the_root_infers_nothing_and_reloads_nothing(
    ledger: Ledger, source: Path, tmp_path: Path
) -> None:
    root = add_root(ledger, source)
    put(source / "beside", "1")
    with disks.or_skip(tmp_path / "disk", *disks.tmpfs()) as disk:
        put(disk / "deep/f", "1")
        with disks.or_skip(source / "share", "--bind", disk):
            assert scan(ledger, root).versions == 2
        for _ in range(2):
            report = scan(ledger, root)
            assert (report.gone, gone(ledger)) == (0, set())
            assert "unmounted?" in report.unreadable[0]
        with disks.or_skip(source / "share", "--bind", disk):
            report = scan(ledger, root)
            assert (report.versions, report.job_ids, report.unreadable) == (0, [], [])


def hidden_edit(ledger: Ledger, root: Root, file: Path) -> None:
    """Other bytes under the very stamps that the ledger knows."""
    look = Stat.of(file.stat())
    ledger.write(
        lambda c: c.execute(
            update(FileLocation)
            .where(FileLocation.path == os.path.relpath(file, root.path).encode())
            .values(
                inode=look.inode, mtime_ns=look.mtime_ns, ctime_ns=look.ctime_ns,
                size_bytes=look.size, racy=False,
            )
        ).rowcount
    )  # fmt: skip


def test_a_store_into_a_dirty_page_is_found_by_a_scrub_and_by_nothing_else(
    ledger: Ledger, source: Path
) -> None:
    root = add_root(ledger, source)
    add_plugin(ledger, "p", subscriptions="all")
    ledger.write(
        lambda c: c.execute(insert(RoutingRule).values(pattern="*", tag="all", priority=0))
    )
    file = put(source / "sub/f", "x" * 4096)
    with open(file, "r+b") as handle, mmap.mmap(handle.fileno(), 0) as view:
        view[0:1] = b"y"
        certain(ledger, root)
        before = Stat.of(file.stat())
        view[1:2] = b"z"
        if Stat.of(file.stat()) != before:
            pytest.skip("this filesystem stamps every store through mmap: nothing is hidden")
    for _ in range(2):
        assert scan(ledger, root).versions == 0
    report = scrub(ledger, root, anew=True)
    assert (report.hidden, len(report.job_ids), report.finished) == (
        [f"{root.name}/sub/f"],
        1,
        True,
    )
    assert history(ledger)[b"sub/f"] == [4096] * len(history(ledger)[b"sub/f"])
    entry = ledger.read(
        lambda c: c.execute(select(AuditEntry).where(AuditEntry.action == "hidden-change")).one()
    )
    assert entry.subject == f"file {root.name}/sub/f"
    assert json.loads(entry.detail)["stamps"] == "did not show it"
    assert ledger.read(lambda c: list(audit.problems(c))) == []
    assert state(ledger, root).hidden == 1
    again = scrub(ledger, root, anew=True)
    assert (again.files, again.hidden) == (1, [])
    jobs = ledger.read(lambda c: c.execute(select(ProcessingJob.id)).scalars().all())
    assert len(jobs) == len(history(ledger)[b"sub/f"])


def certain(ledger: Ledger, root: Root) -> None:
    """Scan until every file is recorded and none may have changed since unnoticed."""
    racy = select(FileLocation.id).where(FileLocation.racy)

    def is_certain() -> bool:
        found = scan(ledger, root).versions
        return not found and ledger.read(lambda c: c.execute(racy).first()) is None

    wait_until(is_certain)


def test_a_scrub_goes_on_where_it_was_stopped(
    ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "BATCH", 2)
    root = add_root(ledger, source)
    for n in range(5):
        put(source / f"f{n}", str(n), OLD)
    certain(ledger, root)

    class Stop(threading.Event):
        reads = 0

        def wait(self, timeout: float | None = None) -> bool:
            """Called for each block: the third file is where we are told to stop."""
            self.reads += 1
            if self.reads == 3:
                self.set()
            return self.is_set()

    stopped = scrub(ledger, root, Stop(), bytes_per_second=1e9)
    assert (stopped.finished, state(ledger, root).scrub_after > 0) == (False, True)
    rested = state(ledger, root).scrubbed
    rest = scrub(ledger, root)
    assert (rest.files, rest.finished) == (3, True)
    assert (state(ledger, root).scrub_after, state(ledger, root).scrubbed > rested) == (0, True)


def test_bytes_that_keep_moving_are_not_believed(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source)
    file = put(source / "f", "a" * 4096)
    certain(ledger, root)

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            """Between two readings somebody stores through mmap once more."""
            put(file, os.urandom(4096))
            hidden_edit(ledger, root, file)
            return False

    Stop().wait()
    assert scrub(ledger, root, Stop(), anew=True).hidden == []
