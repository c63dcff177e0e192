"""The snapshot store keeps what a scan records, whole, once, and never more than it may."""

from __future__ import annotations

import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from sqlalchemy import insert, select

from casparian_flow.config import Settings
from casparian_flow.db import snapshots as references
from casparian_flow.db.access import Ledger, open_ledger
from casparian_flow.db.models import FileVersion, RoutingRule
from casparian_flow.services import report, snapshots
from casparian_flow.services.scan import scan
from casparian_flow.services.snapshots import problems, sweep
from tests import disks
from tests.conftest import write_config
from tests.factories import add_plugin, add_root

COPY = '[snapshots]\nmode = "copy"\n'
KIB = 1 << 10


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return write_config(tmp_path / "flow", COPY)


def put(file: Path, content: bytes) -> str:
    """Write a file; the hash of its content."""
    file.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def stored(settings: Settings) -> dict[str, bytes]:
    """Every content the store has a file of."""
    files = settings.database.snapshots_folder.glob("??/*")
    return {file.name: file.read_bytes() for file in files}


def on_their_way(settings: Settings) -> list[Path]:
    return list(settings.database.snapshots_folder.glob("tmp/*"))


def check(settings: Settings, ledger: Ledger, wanted: Sequence[str]) -> None:
    """The store claims and holds these contents, whole, and nothing else."""
    assert sorted(ledger.read(references.hashes)) == sorted(stored(settings)) == sorted(wanted)
    assert list(problems(ledger)) == []
    assert on_their_way(settings) == []


def test_what_a_scan_records_is_kept_once_read_only_and_for_us_alone(
    settings: Settings, ledger: Ledger, source: Path
) -> None:
    root = add_root(ledger, source)
    twice = put(source / "a", b"twice")
    put(source / "b", b"twice")
    other, empty = put(source / "c", os.urandom(3 << 20)), put(source / "d", b"")
    assert scan(ledger, root).versions == 4
    check(settings, ledger, [twice, other, empty])
    for file in settings.database.snapshots_folder.rglob("*"):
        wanted = 0o700 if file.is_dir() else 0o600 if file.name == "lock" else 0o400
        assert file.stat().st_mode & 0o777 == wanted, file
    put(source / "c", b"edited")
    (source / "d").unlink()
    scan(ledger, root)
    check(settings, ledger, [twice, other, empty, hashlib.sha256(b"edited").hexdigest()])


def test_a_racy_file_is_read_again_and_captured_only_if_it_changed(
    settings: Settings, ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = add_root(ledger, source)
    kept = put(source / "a", b"fresh, so its stamps prove nothing")
    scan(ledger, root)
    taken: list[str] = []
    monkeypatch.setattr(snapshots._Taking, "keep", lambda capture, found: taken.append(found))
    assert scan(ledger, root).versions == 0
    assert taken == []
    check(settings, ledger, [kept])


def test_a_torn_read_is_thrown_away(
    settings: Settings, ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = add_root(ledger, source)
    file = source / "a"
    put(file, os.urandom(3 << 20))
    write = snapshots._Taking.write

    def and_meanwhile(capture: snapshots._Taking, block: bytes) -> None:
        with file.open("ab") as more:
            more.write(b"x")
        write(capture, block)

    with monkeypatch.context() as patch:
        patch.setattr(snapshots._Taking, "write", and_meanwhile)
        report = scan(ledger, root)
    assert (report.versions, report.unsettled) == (0, {b""})
    check(settings, ledger, [])
    assert scan(ledger, root).versions == 1
    check(settings, ledger, [hashlib.sha256(file.read_bytes()).hexdigest()])


def test_off_makes_nothing(tmp_path: Path, source: Path) -> None:
    settings = write_config(tmp_path / "flow", '[snapshots]\nmode = "off"\n')
    with open_ledger(settings.database) as ledger:
        put(source / "a", b"a")
        assert scan(ledger, add_root(ledger, source)).versions == 1
        assert not settings.database.snapshots_folder.exists()
        assert report.status(settings, ledger)["snapshots"]["snapshots"] == 0


def test_a_file_above_the_copy_limit_has_none(tmp_path: Path, source: Path) -> None:
    settings = write_config(tmp_path / "flow", f"{COPY}copy_limit_bytes = 4\n")
    with open_ledger(settings.database) as ledger:
        small = put(source / "small", b"1234")
        put(source / "large", b"12345")
        assert scan(ledger, add_root(ledger, source)).versions == 2
        check(settings, ledger, [small])


def wanted_by_a_plugin(ledger: Ledger, pattern: str) -> None:
    """From now on files of the pattern give jobs, which nobody runs."""
    add_plugin(ledger, "p", subscriptions="t")
    rule = insert(RoutingRule).values(pattern=pattern, tag="t", priority=0)
    ledger.write(lambda c: c.execute(rule))


def test_what_no_unfinished_job_needs_makes_room_oldest_first(tmp_path: Path, source: Path) -> None:
    settings = write_config(tmp_path / "flow", f"{COPY}keep_bytes = {30 * KIB}\n")
    with open_ledger(settings.database) as ledger:
        root = add_root(ledger, source)
        wanted_by_a_plugin(ledger, "*.job")
        needed = put(source / "needed.job", os.urandom(10 * KIB))
        scan(ledger, root)
        spare = []
        for n in range(4):
            spare.append(put(source / f"{n}", os.urandom(10 * KIB)))
            scan(ledger, root)
        check(settings, ledger, [needed, *spare[-2:]])
        ledger.write(lambda c: c.exec_driver_sql(
            "UPDATE cf_processing_queue SET status = 'ABORTED'"))  # fmt: skip
        last = put(source / "last", os.urandom(10 * KIB))
        scan(ledger, root)
        check(settings, ledger, [*spare[-2:], last])


def test_where_unfinished_jobs_need_all_newcomers_have_none_and_status_says_so(
    tmp_path: Path, source: Path
) -> None:
    settings = write_config(tmp_path / "flow", f"{COPY}keep_bytes = {30 * KIB}\n")
    with open_ledger(settings.database) as ledger:
        root = add_root(ledger, source)
        wanted_by_a_plugin(ledger, "*")
        for n in range(3):
            put(source / f"{n}", os.urandom(10 * KIB))
        scan(ledger, root)
        first = ledger.read(references.hashes)
        assert len(first) == 3
        for n in range(3, 5):
            put(source / f"{n}", os.urandom(10 * KIB))
        found = scan(ledger, root)
        assert (found.versions, len(found.job_ids)) == (2, 2)
        check(settings, ledger, first)
        said = report.status(settings, ledger)
        assert said["snapshots"]["unprotected_jobs"] == 2
        advice = [each["words"] for each in said["advice"] if "snapshot" in each["words"]]
        (words,) = advice
        assert words.startswith("2 versions recorded without a snapshot: ")
        assert f"{30 * KIB} bytes, [snapshots] keep_bytes" in words
        ledger.write(lambda c: c.exec_driver_sql(
            "UPDATE cf_processing_queue SET status = 'ABORTED'"))  # fmt: skip
        put(source / "5", b"there is room again")
        scan(ledger, root)
        assert ledger.read(references.fault) is None


def test_a_full_disk_stops_no_scan(settings: Settings, ledger: Ledger, source: Path) -> None:
    """A limit on file size stands in for the full disk: the write itself fails."""
    root = add_root(ledger, source)
    small = put(source / "small", b"small")
    large = put(source / "large", os.urandom(3 << 20))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, limits[1]))
    try:
        assert scan(ledger, root).versions == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    check(settings, ledger, [small])
    assert ledger.read(references.fault)[:2] == ("File too large", 1)
    with (source / "large").open("r+b") as file:
        file.write(b"edited")
    edited = hashlib.sha256((source / "large").read_bytes()).hexdigest()
    scan(ledger, root)
    check(settings, ledger, [small, edited])
    assert large not in stored(settings)
    assert ledger.read(references.fault) is None


def test_a_store_that_cannot_be_written_stops_no_scan(
    settings: Settings, ledger: Ledger, source: Path
) -> None:
    settings.database.snapshots_folder.parent.write_text("a file in its place")
    put(source / "a", b"a")
    assert scan(ledger, add_root(ledger, source)).versions == 1
    assert ledger.read(references.fault).words == "Not a directory"


def test_our_state_is_never_input_whatever_is_not_ignored(
    settings: Settings, ledger: Ledger
) -> None:
    root = add_root(ledger, settings.home, ignore="!.casparian/\n!*.sqlite3")
    put(settings.home / "a.csv", b"a")
    for _ in range(2):
        scan(ledger, root)
    configuration = (settings.home / "global_config.toml").read_bytes()
    check(settings, ledger, [hashlib.sha256(each).hexdigest() for each in (b"a", configuration)])
    assert len(ledger.read(lambda c: c.execute(select(FileVersion.id)).all())) == 2


def test_damage_and_loss_are_named_and_what_is_gone_is_captured_anew(
    settings: Settings, ledger: Ledger, source: Path
) -> None:
    root = add_root(ledger, source)
    hashes = [put(source / name, name.encode()) for name in ("damaged", "lost", "whole")]
    scan(ledger, root)
    files = [settings.database.snapshot(each) for each in hashes]
    files[0].chmod(0o600)
    files[0].write_bytes(b"DAMAGED")
    files[1].unlink()
    found = sorted(problems(ledger))
    assert len(found) == 2
    assert str(files[0]) in "".join(found) and "is damaged" in "".join(found)
    assert str(files[1]) in "".join(found) and "is missing" in "".join(found)
    files[0].unlink()
    scan(ledger, root)  # the files are racy yet, so they are read again
    check(settings, ledger, hashes)
    files[2].unlink()
    sweep(ledger)
    check(settings, ledger, hashes[:2])


CRASHES = """
import os, signal, sys
from casparian_flow import config, crashpoints
from casparian_flow.db.access import open_ledger
from casparian_flow.services.scan import scan
from casparian_flow.services.scout import roots
def react(name):
    if name == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
crashpoints.arm(react)
with open_ledger(config.load(sys.argv[1]).database) as ledger:
    scan(ledger, roots(ledger)[0])
"""

POINTS = re.findall(r'crashpoint\("(.+?)"\)', Path(snapshots.__file__).read_text("utf-8"))


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.slow_but("snapshot.fsynced", "snapshot.claimed")
def test_killed_at_any_point_the_next_scan_finds_all_and_no_version_claims_what_is_not_there(
    tmp_path: Path, source: Path, point: str
) -> None:
    settings = write_config(tmp_path / "flow", f"{COPY}keep_bytes = {40 * KIB}\n")
    with open_ledger(settings.database) as ledger:
        root = add_root(ledger, source)
        for n in range(4):
            put(source / f"old{n}", os.urandom(10 * KIB))
        scan(ledger, root)
        fresh = [put(source / f"new{n}", os.urandom(10 * KIB)) for n in range(4)]
        command = [sys.executable, "-c", CRASHES, str(settings.home / "global_config.toml"), point]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert list(problems(ledger)) == []
        scan(ledger, root)
        assert list(problems(ledger)) == []
        assert set(fresh) <= set(stored(settings))
        sweep(ledger)
        check(settings, ledger, fresh)
        versions = ledger.read(
            lambda c: c.execute(select(FileVersion.content_hash)).scalars().all()
        )
        assert sorted(versions) == sorted(set(versions)) and len(versions) == 8


@pytest.mark.slow
def test_scans_that_store_the_same_contents_at_once_store_them_once(
    settings: Settings, ledger: Ledger, tmp_path: Path
) -> None:
    contents = [f"content {n}".encode() for n in range(20)]
    for number in range(3):
        folder = tmp_path / f"root{number}"
        folder.mkdir()
        add_root(ledger, folder)
        for n, content in enumerate(contents):
            put(folder / f"{n}", content)
    command = [sys.executable, "-m", "casparian_flow.cli", "--config"]
    command += [str(settings.home / "global_config.toml"), "scan"]
    crowd = [subprocess.Popen([*command, f"root{n}"], stdout=subprocess.DEVNULL) for n in range(3)]
    assert [one.wait() for one in crowd] == [0] * 3
    check(settings, ledger, [hashlib.sha256(content).hexdigest() for content in contents])


@pytest.fixture(params=["btrfs", "xfs"])
def sharing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on a filesystem that can share blocks."""
    mkfs = shutil.which(f"mkfs.{request.param}")
    if mkfs is None:
        pytest.skip(f"NOT TESTED: sharing blocks on {request.param} (there is no mkfs of it)")
    image = tmp_path / "image"
    disks.make(image, 512 << 20, mkfs, "-q")
    with disks.or_skip(tmp_path / "mounted", "-o", "loop", image) as folder:
        yield folder


def on_disk(folder: Path) -> None:
    """Have the filesystem count what it holds."""
    subprocess.run(["sync", "-f", str(folder)], check=True)


def test_blocks_are_shared_where_the_filesystem_can(sharing: Path, source: Path) -> None:
    settings = write_config(sharing / "flow")
    (here := sharing / "here").mkdir()
    with open_ledger(settings.database) as ledger:
        roots = [add_root(ledger, folder) for folder in (here, source)]
        before = put(here / "large", os.urandom(32 << 20))
        put(source / "elsewhere", b"on another filesystem")
        on_disk(sharing)
        free = shutil.disk_usage(sharing).free
        for root in roots:
            assert scan(ledger, root).versions == 1
        on_disk(sharing)
        assert free - shutil.disk_usage(sharing).free < 8 << 20
        check(settings, ledger, [before])
        with (here / "large").open("r+b") as file:
            file.write(b"edited")
        after = hashlib.sha256((here / "large").read_bytes()).hexdigest()
        scan(ledger, roots[0])
        check(settings, ledger, [before, after])
        said = report.status(settings, ledger)["snapshots"]
        assert (said["shares"], said["sources"]) == (True, {"here": True, "source": False})


@pytest.fixture
def store_disk(settings: Settings) -> Iterator[Path]:
    """A store with a small disk of its own."""
    folder = settings.database.snapshots_folder.parent
    with disks.or_skip(folder, *disks.tmpfs("2m", "mode=700")):
        yield folder


def test_a_store_with_a_full_disk_leaves_the_reserve_and_records_every_version(
    settings: Settings, store_disk: Path, source: Path
) -> None:
    with open_ledger(settings.database) as ledger:
        root = add_root(ledger, source)
        for n in range(20):
            put(source / f"{n}", os.urandom(256 * KIB))
        assert scan(ledger, root).versions == 20
        kept = ledger.read(references.hashes)
        assert 0 < len(kept) < 8
        check(settings, ledger, kept)
        assert ledger.read(references.fault)[:2] == ("its disk is nearly full", 20 - len(kept))
        assert shutil.disk_usage(store_disk).free > (2 << 20) / 20
