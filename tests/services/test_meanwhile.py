"""What others do to the ledger and the directories while a scan is at them, and between two."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import select, update

from casparian_flow import durable
from casparian_flow.config import DatabaseSettings
from casparian_flow.db import jobs, routing, versions
from casparian_flow.db.access import Connection, Ledger, open_ledger
from casparian_flow.db.models import AuditEntry, FileLocation, ProcessingJob, RoutingRule
from casparian_flow.db.states import JobStatus
from casparian_flow.db.versions import Stat, invalidate
from casparian_flow.services import scan as scan_module
from casparian_flow.services import sources
from casparian_flow.services.scan import scan
from casparian_flow.services.sources import SourceOptions
from casparian_flow.services.vanished import Vanished
from tests.factories import add_plugin, add_root
from tests.services.test_scan import OLD, gone, put


def before(
    monkeypatch: pytest.MonkeyPatch, owner: type, method: str, deed: Callable[..., object]
) -> None:
    """Do something once, just before a method is called the next time, with its arguments."""
    real = getattr(owner, method)

    def first(*arguments: object, **named: object) -> object:
        monkeypatch.setattr(owner, method, real)
        deed(*arguments[1:])
        return real(*arguments, **named)

    monkeypatch.setattr(owner, method, first)


def deploy(ledger: Ledger) -> None:
    add_plugin(ledger, "p", subscriptions="csv")
    sources.add_rule(ledger, "*.csv", "csv")


def supersede(connection: Connection) -> None:
    """The only job's file was not there when it was to be read."""
    job_id = connection.execute(
        update(ProcessingJob)
        .values(status=JobStatus.RUNNING, fence=1, attempts=1, worker="w")
        .returning(ProcessingJob.id)
    ).scalar_one()
    assert jobs.supersede(connection, job_id, 1, "the file is gone")
    invalidate(connection, job_id)


def test_a_plugin_that_comes_while_files_are_hashed_gets_them(
    ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = add_root(ledger, source)
    scan(ledger, root)
    put(source / "a.csv", "1", OLD)
    before(monkeypatch, scan_module._Scan, "_flush", lambda: deploy(ledger))
    assert len(scan(ledger, root, only=[b""]).job_ids) == 1
    assert ledger.read(jobs.counts) == {"QUEUED": 1}


def test_a_doubt_outlives_the_scan_that_looked_before_it(
    ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = add_root(ledger, source)
    put(source / "d" / "a.csv", "1", OLD)
    scan(ledger, root)
    deploy(ledger)
    put(source / "d" / "other", "2", OLD)
    before(monkeypatch, scan_module._Scan, "_flush", lambda: ledger.write(supersede))
    scan(ledger, root)
    scan(ledger, root)
    assert ledger.read(jobs.counts) == {"QUEUED": 1}


def test_a_file_that_is_doubted_and_gone_is_gone(
    ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = add_root(ledger, source)
    file = put(source / "a.csv", "1", OLD)
    scan(ledger, root)
    deploy(ledger)
    file.unlink()
    before(monkeypatch, Vanished, "settle", supersede)
    assert scan(ledger, root).gone == 1
    assert gone(ledger) == {b"a.csv"}


def test_a_folder_that_was_known_before_its_parent_is_missed_when_it_goes(
    ledger: Ledger, source: Path
) -> None:
    root = add_root(ledger, source)
    scan(ledger, root)
    file = put(source / "y" / "z" / "f", "1", OLD)
    scan(ledger, root, only=[b"y/z"])
    scan(ledger, root)
    file.unlink()
    file.parent.rmdir()
    scan(ledger, root)
    assert gone(ledger) == {b"y/z/f"}


def test_a_name_too_long_for_a_marker_hides_no_other_file(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source, done_file="{name}.done")
    put(source / ("x" * 252), "long", OLD)
    for n in range(20):
        put(source / f"{n}.csv", str(n), OLD)
        put(source / f"{n}.csv.done", "")
    report = scan(ledger, root)
    assert (report.versions, report.waiting, report.unreadable) == (20, 1, [])


def test_what_is_ignored_from_now_on_is_no_mass_deletion(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source)
    for n in range(120):
        put(source / f"{n}.bak", "1", OLD)
        put(source / "old" / f"{n}.csv", "1", OLD)
    scan(ledger, root)
    report = scan(ledger, root._replace(ignore="*.bak\nold/"))
    assert (report.gone, report.held, report.passed_over) == (0, 0, 240)
    assert ledger.read(lambda c: versions.count_present(c, root.id)) == 0
    assert ledger.read(lambda c: versions.count_passed_over(c, root.name)) == 240
    assert scan(ledger, root._replace(ignore="*.bak\nold/")).passed_over == 0
    report = scan(ledger, root)
    assert (report.versions, len(gone(ledger))) == (0, 0), "the same contents are no new versions"
    assert ledger.read(lambda c: versions.count_passed_over(c, root.name)) == 0


def test_a_file_that_is_ours_from_now_on_is_there_no_more(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source)
    put(source / "tables.sqlite3", "1", OLD)
    scan(ledger, root)
    durable.own(source, "tables.sqlite3*")
    scan(ledger, root)
    assert gone(ledger) == {b"tables.sqlite3"}


def test_a_person_may_say_that_an_empty_folder_on_a_new_device_is_right(
    ledger: Ledger, source: Path
) -> None:
    root = add_root(ledger, source)
    file = put(source / "day" / "a", "1", OLD)
    scan(ledger, root)
    file.unlink()
    ledger.write(lambda c: c.execute(update(FileLocation).values(device=-1)))
    assert "unmounted?" in scan(ledger, root).unreadable[0]
    assert scan(ledger, root, believe=True).gone == 1
    actions = select(AuditEntry.detail).where(AuditEntry.action == "believe-deletions")
    assert ledger.read(lambda c: list(c.execute(actions).scalars())) == ['{"gone": 1}']


def test_a_removed_root_comes_back_under_another_name_of_its_directory(
    ledger: Ledger, source: Path
) -> None:
    put(source / "a.csv", "1", OLD)
    options = SourceOptions(settle_seconds=0)
    sources.add_source(ledger, str(source), name="in", options=options)
    sources.remove_source(ledger, "in")
    alias = source.with_name("alias")
    alias.symlink_to(source)
    sources.add_source(ledger, str(alias), name="in", options=options)
    assert [root.path for root in ledger.read(routing.every_root)] == [str(source)]


def test_a_copy_of_the_ledger_in_a_source_root_is_not_its_input(
    ledger: Ledger, source: Path
) -> None:
    copied = source / "flow" / "casparian_flow.sqlite3"
    copied.parent.mkdir()
    shutil.copyfile(ledger.database.path, copied)
    with open_ledger(DatabaseSettings(db_location=str(copied))) as other:
        os.utime(copied, (OLD, OLD))
        assert scan(other, add_root(other, source)).files == 0


def rest(*files: Path) -> None:
    """Wait until the stamps of these files are old enough to show the next write."""
    while any(scan_module.is_racy(Stat.of(file.stat()), time.time()) for file in files):
        time.sleep(0.01)


def test_what_another_scan_saw_come_is_missed_when_it_goes(
    ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = add_root(ledger, source)
    touched, passing = put(source / "touched", "1", OLD), source / "passing"
    scan(ledger, root)
    os.utime(touched, (OLD + 1, OLD + 1))
    rest(touched)

    def come_and_go() -> None:
        put(passing, "2", OLD)
        scan(ledger, root)
        passing.unlink()

    before(monkeypatch, scan_module._Scan, "_flush", come_and_go)
    scan(ledger, root)
    scan(ledger, root)
    assert gone(ledger) == {b"passing"}


def test_what_came_back_for_another_scan_is_missed_when_it_goes(
    ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = add_root(ledger, source)
    rest(put(source / "stays", "1", OLD), passing := put(source / "passing", "2", OLD))
    scan(ledger, root)
    passing.unlink()

    def come_and_go(*_: object) -> None:
        rest(put(passing, "2", OLD))
        scan(ledger, root)
        passing.unlink()

    before(monkeypatch, scan_module._Scan, "_end", come_and_go)
    scan(ledger, root)
    scan(ledger, root)
    assert gone(ledger) == {b"passing"}


def test_a_folder_ignored_while_deletions_are_held_can_be_taken_back(
    ledger: Ledger, source: Path
) -> None:
    root = add_root(ledger, source)
    held = [put(source / "held" / str(n), "1", OLD) for n in range(120)]
    rest(put(source / "old" / "f", "1", OLD), *held)
    scan(ledger, root)
    shutil.rmtree(source / "held")
    report = scan(ledger, root._replace(ignore="old/"))
    assert (report.held, report.passed_over) == (120, 1)
    report = scan(ledger, root)
    assert (report.held, gone(ledger)) == (120, set())


def test_a_version_found_by_other_rules_gets_its_job_when_they_are_back(
    ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = add_root(ledger, source)
    rest(file := put(source / "a.csv", "1", OLD))
    scan(ledger, root)

    def change_the_rules_for_a_while(name: str) -> None:
        if name == "scan.routed" and file.read_text() == "1":
            ledger.write(lambda c: c.execute(update(RoutingRule).values(pattern="*.other")))
            put(file, "22", OLD)
            assert scan(ledger, root, only=[b""]).versions == 1
            ledger.write(lambda c: c.execute(update(RoutingRule).values(pattern="*.csv")))

    monkeypatch.setattr(scan_module, "crashpoint", change_the_rules_for_a_while)
    deploy(ledger)
    scan(ledger, root)
    newest = select(ProcessingJob.id).where(ProcessingJob.file_version_id == 2)
    assert ledger.read(lambda c: len(c.execute(newest).all())) == 1


def test_a_folder_in_the_place_of_a_file_and_the_reverse_are_deletions(
    ledger: Ledger, source: Path
) -> None:
    root = add_root(ledger, source)
    inside, file = put(source / "folder" / "f", "1", OLD), put(source / "file", "2", OLD)
    scan(ledger, root)
    shutil.rmtree(inside.parent)
    put(inside.parent, "3", OLD)
    file.unlink()
    put(file / "g", "4", OLD)
    report = scan(ledger, root)
    assert (report.gone, report.passed_over, report.versions) == (2, 0, 2)
