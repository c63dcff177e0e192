"""Files that are renamed or moved: what a scan takes for a move, when, and what it leaves alone."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import insert, select, text, update

from casparian_flow import crashpoints
from casparian_flow.db.access import Ledger
from casparian_flow.db.models import Directory, FileLocation, JobStatus, ProcessingJob, RoutingRule
from casparian_flow.services import scan as scan_module
from casparian_flow.services.scan import Root, scan
from casparian_flow.services.vanished import born
from tests.factories import add_plugin, add_root
from tests.services.test_scan import OLD, gone, put


@pytest.fixture
def root(ledger: Ledger, source: Path) -> Root:
    add_plugin(ledger, "p", subscriptions="txt")
    rule = insert(RoutingRule).values(pattern="*.txt", tag="txt", priority=0)
    ledger.write(lambda c: c.execute(rule))
    return add_root(ledger, source)


def moved(ledger: Ledger) -> dict[bytes, bytes]:
    """Where each gone file is recorded to have moved."""
    rows = ledger.read(
        lambda c: c.execute(
            text(
                "SELECT l.path, m.path FROM cf_gone_version g "
                "JOIN cf_file_version v ON v.id = g.file_version_id "
                "JOIN cf_file_location l ON l.id = v.location_id "
                "JOIN cf_file_version t ON t.id = g.to_version_id "
                "JOIN cf_file_location m ON m.id = t.location_id"
            )
        ).all()
    )
    return {row[0]: row[1] for row in rows}


@pytest.fixture
def at_crashpoints() -> Iterator[Callable[[Callable[[str], None]], None]]:
    yield crashpoints.arm
    crashpoints.arm(lambda _: None)


def test_no_job_of_a_new_name_is_seen_before_the_move_is(
    ledger: Ledger,
    source: Path,
    root: Root,
    monkeypatch: pytest.MonkeyPatch,
    at_crashpoints: Callable[[Callable[[str], None]], None],
) -> None:
    """Whoever looks between two batches of a scan: a worker may publish what it finds there."""
    monkeypatch.setattr(scan_module, "BATCH_FILES", 1)
    for number in range(9):
        put(source / f"day/{number % 3}/{number}.txt", str(number), OLD + number)
    scan(ledger, root)
    (source / "day").rename(source / "night")
    seen = []

    def look(point: str) -> None:
        if point == "scan.batch_committed":
            jobs = text(
                "SELECT l.path FROM cf_processing_queue j JOIN cf_file_location l "
                "ON l.current_version_id = j.file_version_id WHERE l.rel_path LIKE 'night/%'"
            )
            queued = set(ledger.read(lambda c: c.execute(jobs).scalars().all()))
            seen.append((queued, set(moved(ledger).values()), len(gone(ledger))))

    at_crashpoints(look)
    report = scan(ledger, root)
    assert (report.moved, report.gone, report.held, report.versions) == (9, 0, 0, 9)
    assert len(seen) > 2
    assert all(queued == known and len(known) == left for queued, known, left in seen)
    assert moved(ledger)[b"day/0/3.txt"] == b"night/0/3.txt"


@pytest.mark.parametrize("on_delete", ["keep", "retract"])
def test_a_file_that_is_not_settled_at_its_new_place_is_not_gone(
    ledger: Ledger, source: Path, root: Root, on_delete: str
) -> None:
    """Its rows would be hidden, or a folder held, for as long as it takes to settle."""
    ledger.write(lambda c: c.execute(text(f"UPDATE cf_source_root SET on_delete = '{on_delete}'")))
    for number in range(150):
        put(source / f"day/{number}.txt", str(number), OLD + number)
    put(source / "deleted.txt", "another")
    scan(ledger, root)
    (source / "day").rename(source / "night")
    (source / "deleted.txt").unlink()
    slow = root._replace(settle_seconds=3600.0)
    report = scan(ledger, slow)
    assert (report.gone, report.held, report.moved) == (1, 0, 0)
    assert gone(ledger) == {b"deleted.txt"}
    assert report.unsettled >= {b"night", b""}
    report = scan(ledger, root, only=report.unsettled)
    assert (report.gone, report.moved, len(moved(ledger))) == (0, 150, 150)
    shutil.rmtree(source / "night")
    assert scan(ledger, root, believe=True).gone == 150


def test_a_folder_that_was_away_while_another_file_was_on_its_way_is_seen_again(
    ledger: Ledger, source: Path, root: Root
) -> None:
    """It comes back with the digest that it had."""
    put(source / "a/x.txt", "1", OLD)
    put(source / "a/b/y.txt", "22", OLD)
    put(source / "moves.txt", "333", OLD)
    scan(ledger, root)
    time.sleep(0.1)  # nothing is racy then, so the digests are saved
    scan(ledger, root)
    (source / "a").rename(source.parent / "away")
    (source / "moves.txt").rename(source / "moved.txt")
    assert scan(ledger, root._replace(settle_seconds=3600.0)).gone == 2
    (source.parent / "away").rename(source / "a")
    scan(ledger, root)
    assert gone(ledger) == {b"moves.txt"}


def test_a_rename_is_found_by_a_scan_of_the_new_folder_alone(
    ledger: Ledger, source: Path, root: Root
) -> None:
    """As a watcher scans: the old folder is another event. What is back there meanwhile is seen."""
    put(source / "a/x.txt", "1", OLD)
    put(source / "b/y.txt", "2", OLD)
    scan(ledger, root)
    digest = select(Directory.digest).where(Directory.path == b"a")
    before = ledger.read(lambda c: c.execute(digest).scalar_one())
    (source / "a/x.txt").rename(source / "b/x.txt")
    report = scan(ledger, root, only=[b"b"])
    assert (report.moved, gone(ledger)) == (1, {b"a/x.txt"})
    assert ledger.read(lambda c: c.execute(digest).scalar_one()) != before
    (source / "b/x.txt").rename(source / "a/x.txt")
    report = scan(ledger, root)
    assert (report.versions, report.moved) == (0, 1)
    assert moved(ledger) == {b"b/x.txt": b"a/x.txt"}
    assert gone(ledger) == {b"b/x.txt"}


def test_a_move_is_sealed_once(ledger: Ledger, source: Path, root: Root) -> None:
    """A folder of many files would have the audit grow twice as much."""
    put(source / "a/x.txt", "1", OLD)
    scan(ledger, root)
    (source / "a").rename(source / "b")
    assert scan(ledger, root).moved == 1
    query = "SELECT count(*) FROM cf_audit, json_each(detail, '$.moves.rows') WHERE action = 'seal'"
    assert ledger.read(lambda c: c.execute(query).scalar_one()) == 1


def test_a_file_moves_between_two_roots_whichever_is_scanned_first(
    ledger: Ledger, source: Path, root: Root
) -> None:
    other = add_root(ledger, source.parent / "other")
    (source.parent / "other").mkdir()
    for name in ("first.txt", "second.txt"):
        put(source / name, name, OLD)
    scan(ledger, root)
    scan(ledger, other)
    (source / "first.txt").rename(source.parent / "other/first.txt")
    assert scan(ledger, other).moved == 1
    assert scan(ledger, root).gone == 0
    (source / "second.txt").rename(source.parent / "other/second.txt")
    assert scan(ledger, root).gone == 1
    assert scan(ledger, other).moved == 1
    assert moved(ledger) == {name: name for name in (b"first.txt", b"second.txt")}


def test_names_of_one_file_and_other_contents_are_no_moves(
    ledger: Ledger, source: Path, root: Root
) -> None:
    put(source / "a.txt", "1", OLD)
    scan(ledger, root)
    os.link(source / "a.txt", source / "b.txt")
    put(source / "empty.txt", "", OLD)
    assert scan(ledger, root).moved == 0
    (source / "empty.txt").rename(source / "void.txt")
    (source / "a.txt").unlink()  # now it is where the other name is
    report = scan(ledger, root)
    assert (report.moved, report.gone) == (1, 1)
    assert moved(ledger) == {b"a.txt": b"b.txt"}


def test_which_of_several_equal_files_it_was_is_not_guessed(
    ledger: Ledger, source: Path, root: Root
) -> None:
    """They share content and time, so each new one may be either; those of one name pair."""
    for name in ("a/x.txt", "a/y.txt", "c/p.txt", "c/q.txt"):
        put(source / name, "same" if name[0] == "a" else "too", OLD)
    scan(ledger, root)
    (source / "a").rename(source / "b")
    (source / "c/p.txt").rename(source / "c/1.txt")
    (source / "c/q.txt").unlink()
    report = scan(ledger, root)
    assert (report.moved, report.gone) == (2, 2)
    assert moved(ledger) == {b"a/x.txt": b"b/x.txt", b"a/y.txt": b"b/y.txt"}


def test_a_copy_that_is_ignored_since_leaves_the_other_as_the_only_one(
    ledger: Ledger, source: Path, root: Root
) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        put(source / name, "1", OLD)
    scan(ledger, root)
    (source / "a.txt").unlink()
    scan(ledger, root)
    assert moved(ledger) == {}
    ignoring = root._replace(ignore="c.txt")
    scan(ledger, ignoring)
    scan(ledger, ignoring)
    assert moved(ledger) == {b"a.txt": b"b.txt"}


def test_a_folder_that_moves_beside_a_mass_deletion_is_not_held(
    ledger: Ledger, source: Path, root: Root
) -> None:
    for number in range(200):
        put(source / f"day/{number}.txt", str(number), OLD + number)
        put(source / f"lost/{number}.txt", f"lost {number}", OLD + number)
    scan(ledger, root)
    (source / "day").rename(source / "night")
    shutil.rmtree(source / "lost")
    report = scan(ledger, root)
    assert (report.moved, report.gone, report.held) == (200, 0, 200)
    report = scan(ledger, root, believe=True)
    assert (report.moved, report.gone, report.held) == (0, 200, 0)
    # A file that is found after it was believed to be deleted has moved all the same.
    aside = source.parent / "aside"
    (source / "night").rename(aside)
    assert scan(ledger, root, believe=True).gone == 200
    aside.rename(source / "found")
    assert scan(ledger, root).moved == 200


def test_a_copy_that_keeps_its_time_is_where_the_file_went_once_that_is_gone(
    ledger: Ledger, source: Path, root: Root
) -> None:
    put(source / "a.txt", "1", int(OLD) + 0.123456789)
    scan(ledger, root)
    shutil.copy2(source / "a.txt", source / "b.txt")
    assert scan(ledger, root).moved == 0
    os.utime(source / "b.txt", (OLD, int(OLD)))  # as an archive keeps it
    scan(ledger, root)
    (source / "a.txt").unlink()
    report = scan(ledger, root)
    assert (report.moved, report.gone) == (1, 0)


def test_when_a_file_was_made_is_known_where_the_filesystem_says_so(tmp_path: Path) -> None:
    file = put(tmp_path / "new", "1", OLD)
    made = born(os.fsencode(file))
    assert made is None or made > OLD * 1e9
    assert born(os.fsencode(tmp_path / "missing")) is None


def test_jobs_of_both_places_run(ledger: Ledger, source: Path, root: Root) -> None:
    """The bytes of the old place are those of the new one: its job is not in vain."""
    put(source / "a.txt", "1", OLD)
    first = scan(ledger, root).job_ids
    (source / "a.txt").rename(source / "b.txt")
    second = scan(ledger, root).job_ids
    assert len(first) == len(second) == 1
    states = select(ProcessingJob.status).order_by(ProcessingJob.id)
    assert ledger.read(lambda c: c.execute(states).scalars().all()) == [JobStatus.QUEUED] * 2


def test_a_new_file_with_the_inode_of_a_deleted_one_is_no_move(
    ledger: Ledger, source: Path, root: Root
) -> None:
    """Which filesystem gives it again cannot be relied on, so the ledger is told so."""
    put(source / "a.txt", "1", OLD)
    scan(ledger, root)
    (source / "a.txt").unlink()
    new = put(source / "b.txt", "1", OLD + 60)
    same = update(FileLocation).values(inode=new.stat().st_ino, ctime_ns=int(OLD * 1e9))
    ledger.write(lambda c: c.execute(same))
    report = scan(ledger, root)
    assert (report.moved, report.gone) == (0, 1)
