"""Files that change, vanish or cannot be read while a scan is at them, and files that are alike."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from casparian_flow import crashpoints
from casparian_flow.db.access import Ledger
from casparian_flow.db.models import FileLocation
from casparian_flow.services import scan as scan_module
from casparian_flow.services.scan import READ_BYTES, hash_and_capture, hash_file, scan
from tests import disks
from tests.factories import add_root
from tests.services.test_scan import OLD, history, put

BEFORE, AFTER = os.urandom(3 * READ_BYTES), os.urandom(3 * READ_BYTES)


@pytest.fixture
def folder(source: Path) -> Iterator[int]:
    """The source root, opened as a scan opens it."""
    descriptor = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


def append(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"more")


def truncate(file: Path) -> None:
    os.truncate(file, READ_BYTES // 2)


def write_over(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.write(AFTER)


def rename_over(file: Path) -> None:
    put(file.with_name("other"), AFTER).replace(file)


def delete(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("meddle", [append, truncate, write_over, rename_over, delete])
def test_what_changes_while_it_is_read_is_no_version_of_mixed_bytes(
    meddle: Callable[[Path], None], ledger: Ledger, source: Path, folder: int
) -> None:
    """Nor a crash: nothing is mapped into memory, so a truncated file sends no SIGBUS."""
    file = put(source / "f", BEFORE, OLD)
    meddled = threading.Event()

    def meanwhile(_: int) -> None:
        if not meddled.is_set():
            meddled.set()
            meddle(file)

    found = hash_file(b"f", folder, on_block=meanwhile)
    if meddle in (rename_over, delete):  # we read the file that we opened, to its end
        assert found is None or found[0] == hashlib.sha256(BEFORE).hexdigest()
    else:
        assert found is None
    scan(ledger, add_root(ledger, source))
    assert history(ledger) == ({b"f": [file.stat().st_size]} if file.exists() else {})


@pytest.mark.parametrize("moment", ["listed", "looked at"])
def test_a_file_that_vanishes_before_it_is_opened_is_passed_over(
    moment: str, ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = add_root(ledger, source)
    put(source / "stays", "1")
    file = put(source / "vanishes", "2")

    def listed(name: str) -> None:
        if name == "scan.listed":
            file.unlink(missing_ok=True)

    def looked_at(name: bytes, *arguments: Any) -> Any:
        file.unlink(missing_ok=True)
        return hash_and_capture(name, *arguments)

    if moment == "listed":
        monkeypatch.setattr(crashpoints, "_react", listed)
    else:
        monkeypatch.setattr(scan_module, "hash_and_capture", looked_at)
    report = scan(ledger, root)
    assert (report.versions, report.unreadable, report.problem) == (1, [], "")
    assert history(ledger) == {b"stays": [1]}


def test_an_inode_that_is_used_again_hides_nothing(ledger: Ledger, source: Path) -> None:
    """Another file of the same name, inode, size and mtime: the ctime gives it away."""
    root = add_root(ledger, source)
    file = put(source / "f", "before", OLD)
    scan(ledger, root)
    ledger.write(lambda c: c.execute(update(FileLocation).values(racy=False)).rowcount)
    inode = file.stat().st_ino
    for _ in range(100):
        file.unlink()
        if put(file, "after!", OLD).stat().st_ino == inode:
            break
    else:
        pytest.skip("this filesystem does not use an inode again soon: it is untested here")
    assert scan(ledger, root).versions == 1


def test_names_that_differ_in_case_or_normal_form_are_locations_of_their_own(
    ledger: Ledger, source: Path
) -> None:
    names = ["Case", "case", *(unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))]
    for name in names:
        put(source / name, name)
    if len(os.listdir(source)) < len(names):
        pytest.skip("this filesystem takes such names for one: it is untested here")
    scan(ledger, add_root(ledger, source))
    assert history(ledger) == {os.fsencode(name): [len(name.encode())] for name in names}


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc: a disk that errs is untested")
def test_a_disk_that_errs_makes_a_file_unreadable(ledger: Ledger) -> None:
    """The first page of a process's memory is never there: reading it is a true EIO."""
    root = add_root(ledger, Path("/proc/self"), ignore="*\n!mem")
    report = scan(ledger, root)
    assert report.unreadable == ["self/mem: Input/output error"]
    assert history(ledger) == {}


def test_a_file_of_any_size_is_given_up_when_the_scan_is_told_to_stop(
    source: Path, folder: int
) -> None:
    with (source / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    stop = threading.Event()
    read: list[int] = []

    def each(count: int) -> None:
        read.append(count)
        stop.set()

    assert hash_file(b"sparse", folder, stop, each) is None
    assert read == [READ_BYTES]


def test_an_empty_file_has_one_version(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source)
    put(source / "empty", "")
    assert [scan(ledger, root).versions for _ in range(3)] == [1, 0, 0]


def test_what_is_mounted_twice_is_two_locations(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source)
    put(source / "f", "1")
    with disks.or_skip(source / "again", "--bind", source):
        assert scan(ledger, root).versions == 2
        assert scan(ledger, root).versions == 0
    assert history(ledger) == {b"f": [1], b"again/f": [1]}
