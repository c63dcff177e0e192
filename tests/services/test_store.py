"""The store keeps what a scan records, whole, once, and never more than it may."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import insert, select

from casparian_flow import durable
from casparian_flow.config import Settings
from casparian_flow.db import kept, schema, views
from casparian_flow.db.access import Ledger, open_ledger
from casparian_flow.db.models import FileVersion, RoutingRule
from casparian_flow.engine import contents
from casparian_flow.engine.contents import SMALL_BYTES, content_file
from casparian_flow.services import report, store, store_upkeep
from casparian_flow.services import scan as scan_module
from casparian_flow.services.scan import scan
from casparian_flow.services.scout import scrub
from casparian_flow.services.store_upkeep import problems, sweep
from tests import disks
from tests.conftest import write_config
from tests.factories import add_plugin, add_root

KIB = 1 << 10
LARGE = SMALL_BYTES + KIB


def put(file: Path, content: bytes) -> str:
    """Write a file; the hash of its content."""
    file.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def stored(settings: Settings) -> dict[str, bytes]:
    """Every content the store has, by the hash that its file or row gives."""
    folder = settings.database.store_folder
    found = {file.name: file.read_bytes() for file in folder.glob("??/*")}
    if (folder / "small.sqlite3").exists():
        with closing(sqlite3.connect(folder / "small.sqlite3")) as rows:
            found |= {
                row[0].hex(): row[1]
                for row in rows.execute("SELECT content_hash, bytes FROM content")
            }
    return found


def hashes(ledger: Ledger) -> list[str]:
    """Every content that the ledger says the store has."""
    return [content.content_hash for content in ledger.read(lambda c: kept.after(c, 0, 1 << 20))]


def on_their_way(settings: Settings) -> list[Path]:
    return list(settings.database.store_folder.glob("tmp/*"))


def check(settings: Settings, ledger: Ledger, wanted: Sequence[str]) -> None:
    """The store claims and holds these contents, whole, and nothing else."""
    found = stored(settings)
    assert sorted(hashes(ledger)) == sorted(found) == sorted(wanted)
    assert [
        name for name, content in found.items() if name != hashlib.sha256(content).hexdigest()
    ] == []
    held = ledger.read(kept.state)
    assert (held.contents, held.bytes) == (len(found), sum(map(len, found.values())))
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
    ours = {"lock", "small.sqlite3", "small.sqlite3-journal"}
    for file in settings.database.store_folder.rglob("*"):
        wanted = 0o700 if file.is_dir() else 0o600 if file.name in ours else 0o400
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
    monkeypatch.setattr(store._Taking, "keep", lambda capture, found: taken.append(found))
    assert scan(ledger, root).versions == 0
    assert taken == []
    check(settings, ledger, [kept])


def test_a_torn_read_is_thrown_away(
    settings: Settings, ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = add_root(ledger, source)
    file = source / "a"
    put(file, os.urandom(3 << 20))
    write = store._Taking.write

    def and_meanwhile(capture: store._Taking, block: bytes) -> None:
        with file.open("ab") as more:
            more.write(b"x")
        write(capture, block)

    with monkeypatch.context() as patch:
        patch.setattr(store._Taking, "write", and_meanwhile)
        report = scan(ledger, root)
    assert (report.versions, report.unsettled) == (0, {b""})
    check(settings, ledger, [])
    assert scan(ledger, root).versions == 1
    check(settings, ledger, [hashlib.sha256(file.read_bytes()).hexdigest()])


def test_off_makes_nothing(tmp_path: Path, source: Path) -> None:
    settings = write_config(tmp_path / "flow", "[store]\nkeep = false\n")
    with open_ledger(settings.database) as ledger:
        put(source / "a", b"a")
        assert scan(ledger, add_root(ledger, source)).versions == 1
        assert not settings.database.store_folder.exists()
        said = report.status(settings, ledger)["store"]
        assert (said["keep"], said["contents"], said["versions"], said["kept_versions"]) == (
            False, 0, 1, 0)  # fmt: skip


def test_a_file_above_the_copy_limit_has_none(tmp_path: Path, source: Path) -> None:
    settings = write_config(tmp_path / "flow", f"[store]\ncopy_limit_bytes = {LARGE}\n")
    with open_ledger(settings.database) as ledger:
        small = put(source / "small", os.urandom(LARGE))
        put(source / "large", os.urandom(LARGE + 1))
        assert scan(ledger, add_root(ledger, source)).versions == 2
        check(settings, ledger, [small])


def wanted_by_a_plugin(ledger: Ledger, pattern: str) -> None:
    """From now on files of the pattern give jobs, which nobody runs."""
    add_plugin(ledger, "p", subscriptions="t")
    rule = insert(RoutingRule).values(pattern=pattern, tag="t", priority=0)
    ledger.write(lambda c: c.execute(rule))


@pytest.mark.parametrize("size", [10 * KIB, LARGE])
def test_room_is_made_by_old_contents_then_by_the_oldest_and_never_by_a_jobs(
    tmp_path: Path, source: Path, size: int
) -> None:
    room = size * 16 // 5
    settings = write_config(tmp_path / "flow", f"[store]\nkeep_bytes = {room}\n")
    with open_ledger(settings.database) as ledger:
        root = add_root(ledger, source)
        wanted_by_a_plugin(ledger, "*.job")
        needed = put(source / "needed.job", os.urandom(size))
        current = put(source / "current", os.urandom(size))
        scan(ledger, root)
        for _ in range(3):  # each takes the place of the one before
            edited = put(source / "edited", os.urandom(size))
            scan(ledger, root)
        check(settings, ledger, [needed, current, edited])
        newest = put(source / "newest", os.urandom(size))
        scan(ledger, root)
        check(settings, ledger, [needed, edited, newest])
        said = report.status(settings, ledger)["store"]
        assert (said["versions"], said["kept_versions"], said["evicted_versions"]) == (6, 3, 3)
        shown = ledger.read(lambda c: views.versions(c, root.id, b"edited", "edited"))
        assert [row["bytes"] for row in shown] == ["evicted", "evicted", "kept"]
        put(source / "current", b"back again")
        back = put(source / "current", (source / "newest").read_bytes())
        scan(ledger, root)
        check(settings, ledger, [needed, edited, back])


def test_where_unfinished_jobs_need_all_newcomers_have_none_and_status_says_so(
    tmp_path: Path, source: Path
) -> None:
    settings = write_config(tmp_path / "flow", f"[store]\nkeep_bytes = {30 * KIB}\n")
    with open_ledger(settings.database) as ledger:
        root = add_root(ledger, source)
        wanted_by_a_plugin(ledger, "*")
        for n in range(3):
            put(source / f"{n}", os.urandom(10 * KIB))
        scan(ledger, root)
        first = hashes(ledger)
        assert len(first) == 3
        for n in range(3, 5):
            put(source / f"{n}", os.urandom(10 * KIB))
        found = scan(ledger, root)
        assert (found.versions, len(found.job_ids)) == (2, 2)
        check(settings, ledger, first)
        said = report.status(settings, ledger)
        assert said["store"]["unprotected_jobs"] == 2
        advice = [each["words"] for each in said["advice"] if "bytes" in each["words"]]
        (words,) = advice
        assert words.startswith("2 versions recorded without their bytes: the store is full")
        assert f"{30 * KIB} bytes, [store] keep_bytes" in words
        ledger.write(lambda c: c.exec_driver_sql(
            "UPDATE cf_processing_queue SET status = 'ABORTED'"))  # fmt: skip
        put(source / "5", b"there is room again")
        scan(ledger, root)
        assert ledger.read(kept.state).fault == ""


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
    assert ledger.read(kept.state)[2:4] == ("File too large", 1)
    with (source / "large").open("r+b") as file:
        file.write(b"edited")
    edited = hashlib.sha256((source / "large").read_bytes()).hexdigest()
    scan(ledger, root)
    check(settings, ledger, [small, edited])
    assert large not in stored(settings)
    assert ledger.read(kept.state).fault == ""


def test_a_store_that_cannot_be_written_stops_no_scan(
    settings: Settings, ledger: Ledger, source: Path
) -> None:
    settings.database.store_folder.parent.write_text("a file in its place")
    put(source / "a", b"a")
    assert scan(ledger, add_root(ledger, source)).versions == 1
    assert ledger.read(kept.state).fault == "Not a directory"


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


def read_again(source: Path) -> None:
    """Have the next scan read every file, whether it is racy yet or not."""
    for file in source.iterdir():
        file.touch()


def test_damage_and_loss_are_named_and_what_is_gone_is_captured_anew(
    settings: Settings, ledger: Ledger, source: Path
) -> None:
    root = add_root(ledger, source)
    wanted = [put(source / n, n.encode() * LARGE) for n in ("damaged", "lost", "whole")]
    scan(ledger, root)
    files = [content_file(settings.database.store_folder, each) for each in wanted]
    files[0].chmod(0o600)
    files[0].write_bytes(b"DAMAGED")
    files[1].unlink()
    found = sorted(problems(ledger))
    assert len(found) == 2
    assert str(files[0]) in "".join(found) and "is damaged" in "".join(found)
    assert str(files[1]) in "".join(found) and "is missing" in "".join(found)
    assert "(version 1 of source/damaged)" in "".join(found)
    files[0].unlink()
    sweep(ledger)
    check(settings, ledger, wanted[2:])
    read_again(source)
    scan(ledger, root)
    check(settings, ledger, wanted)


def test_a_row_that_is_damaged_or_lost_is_named_and_what_is_gone_is_captured_anew(
    settings: Settings, ledger: Ledger, source: Path
) -> None:
    root = add_root(ledger, source)
    wanted = [put(source / name, name.encode()) for name in ("damaged", "lost", "whole")]
    scan(ledger, root)
    with closing(sqlite3.connect(settings.database.store_folder / "small.sqlite3")) as rows, rows:
        rows.execute("UPDATE content SET bytes = ? WHERE bytes = ?", (b"damageD", b"damaged"))
        rows.execute("DELETE FROM content WHERE bytes = ?", (b"lost",))
    found = sorted(problems(ledger))
    assert len(found) == 2
    assert "(version 1 of source/damaged)" in "".join(found) and "is damaged" in "".join(found)
    assert "(version 1 of source/lost)" in "".join(found) and "is missing" in "".join(found)
    sweep(ledger)
    read_again(source)
    scan(ledger, root)
    assert sorted(hashes(ledger)) == sorted(wanted)
    assert len(list(problems(ledger))) == 1


def test_a_flipped_byte_in_the_middle_of_the_rows_is_named(
    settings: Settings, ledger: Ledger, source: Path
) -> None:
    put(source / "a", b"a" * 9000)
    scan(ledger, add_root(ledger, source))
    file = settings.database.store_folder / "small.sqlite3"
    content = bytearray(file.read_bytes())
    content[content.index(b"a" * 100) + 50] ^= 1
    file.write_bytes(content)
    assert len(list(problems(ledger))) == 1
    file.write_bytes(content[:-100] + b"x")
    assert len(list(problems(ledger))) == 1


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

POINTS = [
    point
    for module in (store, contents)
    for point in re.findall(r'crashpoint\("(.+?)"\)', Path(module.__file__).read_text("utf-8"))
]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.slow_but("contents.rows_committed", "store.evicted")
def test_killed_at_any_point_the_next_scan_finds_all_and_no_version_claims_what_is_not_there(
    tmp_path: Path, source: Path, point: str
) -> None:
    settings = write_config(tmp_path / "flow", f"[store]\nkeep_bytes = {60 * KIB}\n")
    sizes = (10 * KIB, 10 * KIB, 18 * KIB, 18 * KIB)
    with open_ledger(settings.database) as ledger:
        root = add_root(ledger, source)
        for n, size in enumerate(sizes):
            put(source / f"old{n}", os.urandom(size))
        scan(ledger, root)
        fresh = [put(source / f"new{n}", os.urandom(size)) for n, size in enumerate(sizes)]
        command = [sys.executable, "-c", CRASHES, str(settings.home / "global_config.toml"), point]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert list(problems(ledger)) == []
        scan(ledger, root)
        assert list(problems(ledger)) == []
        sweep(ledger)
        # A content whose version was recorded by the scan that died is there too, unless the
        # scans were too late for it.
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
        assert stored(settings)[before] != stored(settings)[after]


@pytest.fixture
def store_disk(tmp_path: Path) -> Iterator[Settings]:
    """A store with a small disk of its own."""
    settings = write_config(tmp_path / "flow", f"[store]\nkeep_bytes = {1 << 30}\n")
    folder = settings.database.store_folder.parent
    with disks.or_skip(folder, *disks.tmpfs("2m", "mode=700")):
        yield settings


@pytest.mark.parametrize("size", [8 * KIB, 256 * KIB])
@pytest.mark.parametrize("reserve", [True, False])
def test_a_full_disk_pauses_keeping_and_not_the_scan_until_it_has_room(
    store_disk: Settings, source: Path, size: int, reserve: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the look at the disk finds room, it is the writing itself that fails."""
    if not reserve:
        monkeypatch.setattr(store, "_has_room", lambda *_: True)
    settings, disk = store_disk, store_disk.database.store_folder.parent
    with open_ledger(settings.database) as ledger:
        root = add_root(ledger, source)
        first = put(source / "first", os.urandom(size))
        scan(ledger, root)
        filler = disk / "filler"
        filler.write_bytes(b"x" * (shutil.disk_usage(disk).free - 12 * KIB))
        for n in range(3):
            put(source / f"{n}", os.urandom(size))
        assert scan(ledger, root).versions == 3
        check(settings, ledger, [first])
        said = report.status(settings, ledger)
        why = "its disk is nearly full" if reserve else "its disk is full"
        assert said["store"]["fault"].startswith("3 versions since ")
        assert said["store"]["fault"].endswith(why)
        assert any(why in each["words"] and each["wrong"] for each in said["advice"])
        filler.unlink()
        last = put(source / "last", os.urandom(size))
        scan(ledger, root)
        assert {first, last} <= set(hashes(ledger))
        check(settings, ledger, hashes(ledger))
        assert ledger.read(kept.state).fault == ""


def test_large_contents_leave_the_reserve_of_the_disk(store_disk: Settings, source: Path) -> None:
    settings = store_disk
    with open_ledger(settings.database) as ledger:
        root = add_root(ledger, source)
        for n in range(20):
            put(source / f"{n}", os.urandom(256 * KIB))
        assert scan(ledger, root).versions == 20
        taken = hashes(ledger)
        assert 0 < len(taken) < 8
        check(settings, ledger, taken)
        missed = 20 - len(taken)
        assert ledger.read(kept.state)[2:4] == ("its disk is nearly full", missed)
        assert shutil.disk_usage(settings.database.store_folder).free > (2 << 20) / 20


def test_the_budget_is_a_tenth_of_the_free_disk_unless_it_is_named(
    store_disk: Settings, tmp_path: Path
) -> None:
    folder = store_disk.database.store_folder.parent
    free = shutil.disk_usage(folder).free
    ours = write_config(tmp_path / "flow")
    assert abs(store.budget(ours.database, 0) - free // 10) < 100 * KIB
    store_disk.database.store_folder.mkdir()
    assert abs(store.budget(ours.database, 10 * KIB) - (free + 10 * KIB) // 10) < 10 * KIB
    assert store.budget(store_disk.database, 0) == 1 << 30
    assert store.budget(ours.database, 1 << 50) == store.LARGEST_BYTES


def test_a_scan_that_has_filled_the_store_by_itself_captures_no_more(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a first scan of a large tree would write all of it, to keep the end of it."""
    monkeypatch.setattr(scan_module, "BATCH_FILES", 1)
    settings = write_config(tmp_path / "flow", f"[store]\nkeep_bytes = {30 * KIB}\n")
    with open_ledger(settings.database) as ledger:
        root = add_root(ledger, source)
        for n in range(9):
            (source / f"{n}").mkdir()
            put(source / f"{n}" / "a", os.urandom(10 * KIB))
        assert scan(ledger, root).versions == 9
        assert len(hashes(ledger)) == 3
        assert ledger.read(kept.state)[2:4] == (
            "this scan has filled the store ([store] keep_bytes) by itself", 6)  # fmt: skip


def test_contents_of_an_earlier_release_are_found_after_the_upgrade(
    settings: Settings, source: Path
) -> None:
    """Every content was a file, in a folder of another name."""
    content = b"of an earlier release"
    digest = hashlib.sha256(content).hexdigest()
    old = settings.database.earlier_store_folder
    durable.make_folder(old / digest[:2], 0o700)
    (old / digest[:2] / digest).write_bytes(content)
    with closing(sqlite3.connect(settings.database.path, isolation_level=None)) as connection:
        for script in schema.migrations()[:12]:
            connection.executescript(script)
        connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 12")
        connection.execute(
            "INSERT INTO cf_snapshot VALUES (?, ?, '2026-01-01 00:00:00')", (digest, len(content))
        )
    with open_ledger(settings.database) as ledger:
        root = add_root(ledger, source)
        check(settings, ledger, [digest])
        put(source / "again", content)
        other = put(source / "other", b"another one")
        scan(ledger, root)
        check(settings, ledger, [digest, other])
        version = store_upkeep.find_version(ledger, "source/again", None)
        with store_upkeep.opened(ledger, version) as found:
            assert found.read() == content
        sweep(ledger)
        check(settings, ledger, [digest, other])
    assert not old.exists()


def test_a_lowered_budget_holds_from_the_next_start(tmp_path: Path, source: Path) -> None:
    settings = write_config(tmp_path / "flow")
    with open_ledger(settings.database) as ledger:
        for n in range(40):
            put(source / f"{n:02}", os.urandom(10 * KIB))
        scan(ledger, add_root(ledger, source))
    file = settings.database.store_folder / "small.sqlite3"
    before = file.stat().st_size
    settings = write_config(tmp_path / "flow", f"[store]\nkeep_bytes = {100 * KIB}\n")
    with open_ledger(settings.database) as ledger:
        sweep(ledger)
        assert len(hashes(ledger)) == 10
        check(settings, ledger, hashes(ledger))
    assert file.stat().st_size < before / 2


def test_a_scrub_captures_what_was_recorded_without_its_bytes_and_what_it_finds(
    tmp_path: Path, source: Path
) -> None:
    off = write_config(tmp_path / "flow", "[store]\nkeep = false\n")
    past = time.time_ns() - 10**12
    with open_ledger(off.database) as ledger:
        root = add_root(ledger, source)
        wanted = [put(source / "small", b"small"), put(source / "large", os.urandom(LARGE))]
        for name in ("small", "large"):
            os.utime(source / name, ns=(past, past))
        time.sleep(0.03)  # else the stamps say that a later write may have gone unseen
        scan(ledger, root)
        scan(ledger, root)
    on = write_config(tmp_path / "flow")
    with open_ledger(on.database) as ledger:
        scan(ledger, root)
        check(on, ledger, [])
        assert scrub(ledger, root).files == 2
        check(on, ledger, wanted)
        mapped = (source / "small").open("r+b")
        with mapped, mmap.mmap(mapped.fileno(), 5) as pages:
            pages[:] = b"SMALL"
        ledger.write(lambda c: c.exec_driver_sql(
            "UPDATE cf_file_location SET mtime_ns = ?, ctime_ns = ? WHERE path = ?",
            (*_stamps(source / "small"), b"small")))  # fmt: skip
        assert len(scrub(ledger, root, anew=True).hidden) == 1
        check(on, ledger, [*wanted, hashlib.sha256(b"SMALL").hexdigest()])


def _stamps(file: Path) -> tuple[int, int]:
    return file.stat().st_mtime_ns, file.stat().st_ctime_ns
