"""Files that are still being written, and folders that no watcher reaches."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from casparian_flow.config import ScanSettings
from casparian_flow.db import versions
from casparian_flow.db.access import Ledger
from casparian_flow.db.models import FileLocation
from casparian_flow.services.scan import Root, scan
from casparian_flow.services.watch import Changes
from tests.factories import add_root
from tests.services.test_scan import OLD, put


def known(ledger: Ledger, root: Root) -> dict[bytes, float]:
    return ledger.read(lambda c: versions.known_unsettled(c, root.id))


def test_since_when_a_file_is_written_is_kept_until_it_rests(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source, settle_seconds=3600.0)
    put(source / "rests", "1", OLD)
    os.utime(source, (OLD, OLD))
    for name in ("a", "deep/b", "deep/c"):
        put(source / name, "1")
    at_once = root._replace(settle_seconds=0.0)
    report = scan(ledger, root)
    first = known(ledger, root)
    assert report.writing.keys() == first.keys() == {b"a", b"deep/b", b"deep/c", b"rests"}
    assert scan(ledger, root).writing == first
    # A scan of one folder says nothing of the others.
    assert scan(ledger, at_once, only=[b"deep"]).versions == 2
    # Young files are read again, and unsettled then; so this waits for the clock.
    young = select(FileLocation.id).where(FileLocation.racy)
    while ledger.read(lambda c: c.execute(young).first()):
        scan(ledger, at_once, only=[b"deep"])
    assert known(ledger, root).keys() == {b"a", b"rests"}
    (source / "a").unlink()
    assert scan(ledger, root).writing == {b"rests": first[b"rests"]}
    assert scan(ledger, at_once).writing == {}
    assert known(ledger, root) == {}
    put(source / "rests", "written again")
    assert scan(ledger, root).writing[b"rests"] > first[b"rests"]


def test_of_a_crowd_only_so_many_are_kept(
    ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "UNSETTLED_KEPT", 3)
    root = add_root(ledger, source, settle_seconds=3600.0)
    for name in "bcd":
        put(source / name, "1")
    assert len(scan(ledger, root).writing) == 3
    for name in "aef":
        put(source / name, "1")
    assert len(scan(ledger, root).writing) == 6
    assert known(ledger, root).keys() == {b"b", b"c", b"d"}
    (source / "c").unlink()
    scan(ledger, root)
    assert known(ledger, root).keys() == {b"a", b"b", b"d"}
    assert ledger.read(versions.count_unsettled) == 3
    listed = ledger.read(lambda c: versions.unsettled_files(c, 2))
    assert [row["rel_path"] for row in listed] == ["b", "d"]


@pytest.fixture
def grow(source: Path) -> Iterator[None]:
    """Removes what `deepen` made: pathlib does not get there."""
    yield
    subprocess.run(["rm", "-r", str(source)], check=True)


def deepen(folder: Path, name: str, levels: int) -> None:
    """Folders in each other, deeper than a path may name."""
    here = os.open(folder, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


@pytest.mark.usefixtures("grow")
@pytest.mark.slow
def test_more_levels_than_watchdog_can_walk_end_no_daemon(ledger: Ledger, source: Path) -> None:
    deepen(source, "d", 1500)
    changes = Changes(add_root(ledger, source), ScanSettings())
    try:
        if not changes._check():  # where os.walk is recursive
            assert changes.state == "degraded: it cannot be watched (too many levels deep)"
    finally:
        changes.close()
