"""What a scan sees: real files, any names, and edits of every kind."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import insert, select, text, update
from sqlalchemy.orm import Session

from casparian_flow import durable
from casparian_flow.config import Settings
from casparian_flow.db import states, views
from casparian_flow.db.access import Ledger, get_engine, open_ledger
from casparian_flow.db.models import (
    FileLocation,
    FileVersion,
    ProcessingJob,
    RoutingRule,
    ScanState,
    SourceRoot,
)
from casparian_flow.db.versions import Stat
from casparian_flow.errors import SourceError
from casparian_flow.services import scan as scan_module
from casparian_flow.services import walk
from casparian_flow.services.scan import hash_file, is_racy, scan
from casparian_flow.services.scout import Scout, scan_until_settled
from tests import disks
from tests.factories import add_plugin, add_root

OLD = time.time() - 3600


def put(path: Path, content: str | bytes, mtime: float | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if mtime is not None:
        os.utime(path, (mtime, mtime))
    return path


def history(ledger: Ledger) -> dict[bytes, list[int]]:
    """Path -> the size of each of its versions, in order."""
    rows = ledger.read(
        lambda c: c.execute(
            select(FileLocation.path, FileVersion.size_bytes)
            .join(FileVersion, FileVersion.location_id == FileLocation.id)
            .order_by(FileLocation.path, FileVersion.ordinal)
        ).all()
    )
    found: dict[bytes, list[int]] = {}
    for path, size in rows:
        found.setdefault(path, []).append(size)
    return found


def gone(ledger: Ledger) -> set[bytes]:
    query = select(FileLocation.path).where(FileLocation.gone_at.is_not(None))
    return set(ledger.read(lambda c: c.execute(query).scalars().all()))


def test_an_edit_is_a_version_and_a_touch_is_not(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source)
    edited, touched = put(source / "edited.csv", "a"), put(source / "sub/touched.csv", "b")
    assert scan(ledger, root).versions == 2
    put(edited, "aa")
    os.utime(touched)
    assert scan(ledger, root).versions == 1
    assert scan(ledger, root).versions == 0
    assert history(ledger) == {b"edited.csv": [1, 2], b"sub/touched.csv": [1]}


def test_a_return_to_an_earlier_content_is_a_version_of_its_own(
    ledger: Ledger, source: Path
) -> None:
    root = add_root(ledger, source)
    for content in ("A", "BB", "A"):
        put(source / "f", content)
        scan(ledger, root)
    assert history(ledger) == {b"f": [1, 2, 1]}


def test_same_size_and_restored_mtime_do_not_hide_an_edit(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source)
    file = put(source / "f", "before", OLD)
    scan(ledger, root)
    put(file, "after!", OLD)
    assert scan(ledger, root).versions == 1


def test_an_edit_long_after_is_found_by_more_than_its_mtime(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source)
    file = put(source / "f", "one", mtime=1_000_000_000)
    scan(ledger, root)
    # Time has passed: nothing but what stat shows sends the scan to the file again.
    ledger.write(lambda c: c.execute(update(FileLocation).values(racy=False)).rowcount)
    put(file, "two", mtime=1_000_000_000)
    assert scan(ledger, root).versions == 1


def test_deleting_marks_and_returning_unmarks(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source)
    put(source / "keep", "1")
    put(source / "drop", "2")
    put(source / "folder/deep/drop", "3")
    scan(ledger, root)
    (source / "drop").unlink()
    (source / "folder/deep/drop").unlink()
    (source / "folder/deep").rmdir()
    (source / "folder").rmdir()
    assert scan(ledger, root).gone == 2
    assert gone(ledger) == {b"drop", b"folder/deep/drop"}
    put(source / "folder/deep/drop", "3")
    assert scan(ledger, root).versions == 0
    assert gone(ledger) == {b"drop"}


def test_a_folder_that_was_found_before_the_one_above_it_is_missed(
    ledger: Ledger, source: Path
) -> None:
    """Nothing that the ledger has above it would say that it is not there any more."""
    root = add_root(ledger, source)
    scan(ledger, root)
    put(source / "a/b/c/x.csv", "1")
    scan(ledger, root, only=[b"a/b/c"])
    shutil.rmtree(source / "a")
    for _ in range(2):
        scan(ledger, root)
    assert gone(ledger) == {b"a/b/c/x.csv"}


def test_a_file_that_becomes_a_folder_is_gone(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source)
    put(source / "x", "1")
    scan(ledger, root)
    (source / "x").unlink()
    put(source / "x/y", "2")
    scan(ledger, root)
    assert gone(ledger) == {b"x"}
    assert history(ledger) == {b"x": [1], b"x/y": [1]}


def test_any_name_is_kept_to_the_byte(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source)
    names = [b"bad\xff", b"new\nline", b"-rf", b"\"quote'", b"x" * 255, "\u202eabc".encode(), b" "]
    names += [b"...", b"\\0", b"%s", "\U0001f41f".encode()]
    for name in names:
        with open(os.path.join(os.fsencode(source), name), "wb") as file:
            file.write(b"1")
    scan(ledger, root)
    assert set(history(ledger)) == set(names)
    shown = set(ledger.read(lambda c: c.execute(select(FileLocation.rel_path)).scalars().all()))
    assert "bad\\xff" in shown


def test_what_is_no_regular_file_is_passed_over(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source)
    os.mkfifo(source / "fifo")
    (source / "loop").symlink_to(source)
    (source / "dangling").symlink_to("nowhere")
    put(source / "real", "1")
    (source / "link").symlink_to("real")
    (source / "outside").symlink_to("/etc")
    if os.geteuid() == 0:
        with contextlib.suppress(PermissionError):
            os.mknod(source / "device", stat.S_IFCHR | 0o600, os.makedev(1, 5))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(source / "sock"))
        report = scan(ledger, root)
    assert (report.files, report.unreadable) == (1, [])
    assert set(history(ledger)) == {b"real"}


def test_a_path_longer_than_path_max_is_found(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source)
    here = os.open(source, os.O_RDONLY)
    for _ in range(40):
        os.mkdir("d" * 200, dir_fd=here)
        deeper = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    file = os.open("f", os.O_WRONLY | os.O_CREAT, dir_fd=here)
    os.write(file, b"deep")
    os.close(file)
    os.close(here)
    assert scan(ledger, root).versions == 1
    subprocess.run(["rm", "-r", str(source / ("d" * 200))], check=True)
    assert scan(ledger, root).gone == 1


def test_ignored_names_and_pruned_folders(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source, ignore="*.log\n!keep.log\nbuild/\n/only-here\n!x.tmp")
    for name in (
        "a.log", "keep.log", "build/x", "sub/build/keep.log", "only-here", "sub/only-here",
        "x.tmp", "y.tmp", "z.part", "~$doc.xlsx", ".git/config", "ok",
    ):  # fmt: skip
        put(source / name, "1")
    scan(ledger, root)
    assert set(history(ledger)) == {b"keep.log", b"sub/only-here", b"x.tmp", b"ok"}


PASSED_OVER = """
    .Trash-1000/files/old.csv .Trash/a .Trashes/a $RECYCLE.BIN/a.csv #recycle/a @Recycle/a
    lost+found/#12 .snapshot/h/s.csv .snapshots/1/a ~snapshot/a #snapshot/a .zfs/snapshot/a
    @eaDir/a.csv@SynoEAStream/x .AppleDouble/a .git/config
    ._orders.csv .DS_Store Thumbs.db desktop.ini .nfs000000000001 .fuse_hidden0001
    .orders.csv.swp .orders.csv.swo .orders.csv.swx orders.csv~ .#orders.csv #orders.csv#
    ~$orders.xlsx .~lock.orders.ods# .goutputstream-ABC123 a.csv.part a.csv.crdownload
    a.csv.filepart a.csv.partial a.tmp a.csv___jb_tmp___ deep/er/._x.csv deep/.Trash-0/a/b
"""
TAKEN = """
    orders.csv .hidden.csv a~b.csv trash/a .trash-x/a snapshot/a .snapshots.csv #1.csv a#
    lost+found.csv parts.csv a.part.csv .swp.csv x.swp ._/a thumbs.db.csv deep/Trash/a ~a.csv
"""


def test_what_is_passed_over_by_default(ledger: Ledger, source: Path) -> None:
    for name in (PASSED_OVER + TAKEN).split():
        put(source / name, "1", OLD)
    root = add_root(ledger, source)
    scan(ledger, root)
    taken = {name.encode() for name in TAKEN.split()} - {b"._/a"}
    assert set(history(ledger)) - {b"._/a"} == taken
    # What a root ignores besides changes nothing of that.
    scan(ledger, root._replace(ignore="*.bak"))
    assert (set(history(ledger)) - {b"._/a"}, gone(ledger)) == (taken, set())


@pytest.mark.parametrize("back", ["!.Trash-1000/", "!.Trash-*/", "!/.Trash-1000/", "!.Trash-1000"])
def test_what_is_passed_over_by_default_can_be_taken_back(
    ledger: Ledger, source: Path, back: str
) -> None:
    for name in (".Trash-1000/files/old.csv", ".Trash-1000/._x", ".zfs/a", "sub/.zfs/a"):
        put(source / name, "1", OLD)
    scan(ledger, add_root(ledger, source, ignore=back))
    assert set(history(ledger)) == {b".Trash-1000/files/old.csv"}


def test_files_that_an_upgrade_passes_over_keep_their_versions(
    ledger: Ledger, source: Path
) -> None:
    names = [f".snapshot/{n}.csv" for n in range(120)] + ["._a.csv", "a.csv"]
    for name in names:
        put(source / name, "1", OLD)
    root = add_root(ledger, source)
    before = scan(ledger, root._replace(ignore="!.snapshot/\n!._*"))
    assert before.versions == len(names)
    report = scan(ledger, root)
    assert (report.gone, report.held, report.passed_over) == (0, 0, 121)
    assert len(history(ledger)) == len(names)
    rows = ledger.read(lambda c: views.files(c, 1000, gone=True))
    assert {row["problem"] for row in rows} == {states.PASSED_OVER}


@pytest.mark.slow
def test_our_own_outputs_are_never_our_input(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source)
    put(source / "out/sales/part.parquet", "ours")
    put(source / "out/other/file", "theirs")
    durable.own(source / "out", "sales")
    scan(ledger, root)
    assert set(history(ledger)) == {b"out/other/file"}
    assert scan(ledger, root, only=[b"out/sales"]).files == 0


def test_a_vanished_root_freezes_and_infers_nothing(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source)
    put(source / "f", "1")
    scan(ledger, root)
    source.rename(source.with_name("away"))
    report = scan(ledger, root)
    assert "cannot be read" in report.problem
    assert gone(ledger) == set()
    source.with_name("away").rename(source)
    assert scan(ledger, root).problem == ""
    assert ledger.read(lambda c: c.execute(select(ScanState.problem)).scalar_one()) == ""


def test_an_unmounted_root_freezes_and_infers_nothing(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source)
    with disks.or_skip(source, *disks.tmpfs()):
        put(source / "f", "1")
        scan(ledger, root)
    assert "unmounted?" in scan(ledger, root).problem
    assert gone(ledger) == set()


def test_an_unreadable_file_is_named_and_read_later(
    ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = add_root(ledger, source)
    put(source / "fine", "1")
    put(source / "secret", "1").chmod(0)
    if os.geteuid() == 0:  # whom no mode keeps out: let the open itself refuse

        def refuse(name: bytes, folder: int, *_: object) -> tuple[str, Stat] | None:
            if name == b"secret":
                raise PermissionError(13, "Permission denied")
            return hash_file(name, folder)

        monkeypatch.setattr(scan_module, "hash_and_capture", refuse)
    report = scan(ledger, root)
    assert report.unreadable == [f"{root.name}/secret: Permission denied"]
    assert set(history(ledger)) == {b"fine"}
    (source / "secret").chmod(0o600)
    monkeypatch.undo()
    assert scan(ledger, root).versions == 1


def test_a_large_folder_is_compared_in_chunks(
    ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "CHUNK", 10)
    root = add_root(ledger, source)
    for n in range(35):
        put(source / f"f{n}", str(n))
    assert scan(ledger, root).versions == 35
    assert scan(ledger, root).versions == 0
    put(source / "f7", "edited")
    (source / "f33").unlink()
    report = scan(ledger, root)
    assert (report.versions, report.gone) == (1, 1)


def test_a_fresh_file_waits_for_the_settle_window(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source, settle_seconds=3600)
    put(source / "fresh", "1")
    report = scan(ledger, root)
    assert (report.versions, report.unsettled) == (0, {b""})
    assert 3590 < report.settles_in <= 3600


def test_a_one_shot_waits_and_takes_the_last_content(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source, settle_seconds=1.0)
    file = put(source / "growing", "1")
    waits = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            if len(waits) < 3:
                put(file, "x" * 10 * len(waits))  # written again while we wait
                return False
            return super().wait(timeout)

    assert scan_until_settled(ledger, root, Stop()).versions == 1
    assert history(ledger) == {b"growing": [20]}


def test_a_scan_told_to_stop_records_what_it_has_and_claims_no_more(
    ledger: Ledger, source: Path
) -> None:
    root = add_root(ledger, source)
    put(source / "f", "1")
    stop = threading.Event()
    stop.set()
    assert scan(ledger, root, stop=stop).versions == 0
    assert ledger.read(lambda c: c.execute(select(ScanState.finished)).scalar()) is None
    assert scan(ledger, root).versions == 1


def test_a_sighting_that_lost_a_race_is_looked_at_again(
    ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another scan records a version between our look and our transaction."""
    root = add_root(ledger, source)
    file = put(source / "f", "first")
    monkeypatch.setattr(scan_module, "BATCH_FILES", 1)  # flush before the directory is done
    real = scan_module.hash_and_capture

    def slow(name: bytes, folder: int, *rest: Any) -> tuple[str, Stat] | None:
        found = real(name, folder, *rest)
        monkeypatch.setattr(scan_module, "hash_and_capture", real)
        scan(ledger, root)  # the other scan
        put(file, "second")
        return found

    monkeypatch.setattr(scan_module, "hash_and_capture", slow)
    scan(ledger, root)
    scan(ledger, root)
    assert history(ledger) == {b"f": [5, 6]}


def stamps(seconds_ago: float, whole: bool = False) -> Stat:
    at = int((1_000_000 - seconds_ago) * 1e9)
    at = at // 10**9 * 10**9 if whole else at | 1
    return Stat(1, 1, 1, at, at)


@pytest.mark.parametrize(
    ("found", "racy"),
    [
        (stamps(0.001), True),
        (stamps(1), False),
        (stamps(1, whole=True), True),
        (stamps(5, whole=True), False),
        (stamps(-10), True),
    ],
)
def test_stamps_too_young_to_prove_anything_are_racy(found: Stat, racy: bool) -> None:
    assert is_racy(found, 1_000_000.0) is racy


def test_an_edit_within_the_clocks_granularity_is_found(
    ledger: Ledger, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A filesystem so coarse that both edits have the stamps of the minute they are in.
    whole, minute = Stat.of, (time.time_ns() // 10**9 + 60) * 10**9
    monkeypatch.setattr(
        Stat, "of", staticmethod(lambda s: whole(s)._replace(mtime_ns=minute, ctime_ns=minute))
    )
    root = add_root(ledger, source)
    file = put(source / "f", "one")
    assert scan(ledger, root).versions == 1
    put(file, "two")
    assert scan(ledger, root).versions == 1


def test_a_racy_file_is_hashed_again(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source)
    file = put(source / "f", "one")
    facts = select(FileLocation.racy, FileLocation.inode)
    for _ in range(100):
        os.utime(file, ns=(10**18, 10**18))
        scan(ledger, root)
        row = ledger.read(lambda c: c.execute(facts).one())
        if row.racy:
            break
    else:
        pytest.skip("NOT PROVEN: a file seen within its clock's granularity (we are too slow)")
    # What an unlucky edit leaves behind: other bytes under the very stamps the ledger knows.
    put(file, "two")
    look = Stat.of(file.stat())
    ledger.write(
        lambda c: (
            c.execute(
                text("UPDATE cf_file_location SET mtime_ns = :m, ctime_ns = :c, size_bytes = :s"),
                {"m": look.mtime_ns, "c": look.ctime_ns, "s": look.size},
            ).rowcount
        )
    )
    assert scan(ledger, root).versions == 1


def test_jobs_are_queued_with_the_version_and_once(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source)
    plugin = add_plugin(ledger, "p", subscriptions="csv")
    ledger.write(
        lambda c: c.execute(insert(RoutingRule).values(pattern="*.csv", tag="csv", priority=7))
    )
    put(source / "a.csv", "1")
    put(source / "b.txt", "1")
    report = scan(ledger, root)
    jobs = ledger.read(
        lambda c: c.execute(select(ProcessingJob.plugin_id, ProcessingJob.priority)).all()
    )
    assert [tuple(job) for job in jobs] == [(plugin, 7)]
    assert len(report.job_ids) == 1
    assert scan(ledger, root).job_ids == []


def test_a_rule_made_later_reaches_the_files_already_known(ledger: Ledger, source: Path) -> None:
    root = add_root(ledger, source)
    put(source / "a.csv", "1")
    scan(ledger, root)
    add_plugin(ledger, "p", subscriptions="csv")
    ledger.write(
        lambda c: c.execute(insert(RoutingRule).values(pattern="*.csv", tag="csv", priority=0))
    )
    assert len(scan(ledger, root).job_ids) == 1
    assert scan(ledger, root).job_ids == []


def test_a_script_with_a_session_scans(settings: Settings, source: Path) -> None:
    put(source / "data/finance.csv", "a,b\n1,2\n")
    engine = get_engine(settings.database)
    with Session(engine) as db:
        db.add(SourceRoot(path=str(source), name=None, active=True, settle_seconds=0.0))
        root = db.query(SourceRoot).first()
        assert root is not None
        assert Scout(db).scan_source(root).versions == 1
        location = db.query(FileLocation).filter_by(rel_path="data/finance.csv").one()
        versions = db.query(FileVersion).filter_by(location_id=location.id).all()
        assert [v.size_bytes for v in versions] == [8]
        rows = db.execute(
            text(
                """
                SELECT l.rel_path, v.id AS version_id, v.content_hash, v.size_bytes,
                       v.detected_at, COUNT(j.id) AS jobs_processed
                FROM cf_file_location l JOIN cf_file_version v ON v.location_id = l.id
                LEFT JOIN cf_processing_queue j ON j.file_version_id = v.id
                GROUP BY l.rel_path, v.id ORDER BY l.rel_path, v.detected_at;
                """
            )
        ).all()
        assert rows[0].rel_path == "data/finance.csv"
        source.rename(source.with_name("away"))
        with pytest.raises(SourceError, match="cannot be read"):
            Scout(db).scan_source(root)
    engine.dispose()


@pytest.mark.slow
def test_scans_at_once_record_everything_once(settings: Settings, source: Path) -> None:
    code = (
        "import sys\n"
        "from casparian_flow import config\n"
        "from casparian_flow.db.access import open_ledger\n"
        "from casparian_flow.services.scout import roots, scan_until_settled\n"
        "with open_ledger(config.load(sys.argv[1]).database) as ledger:\n"
        "    print(scan_until_settled(ledger, roots(ledger)[0]).problem)\n"
    )
    for n in range(300):
        put(source / f"d{n % 7}/f{n}", str(n))
    with open_ledger(settings.database) as ledger:
        add_root(ledger, source)
        config_file = str(settings.home / "global_config.toml")
        crowd = [
            subprocess.Popen([sys.executable, "-c", code, config_file], stdout=subprocess.PIPE)
            for _ in range(4)
        ]
        assert [one.communicate()[0] for one in crowd] == [b"\n"] * 4
        assert all(len(versions) == 1 for versions in history(ledger).values())
        assert len(history(ledger)) == 300


EDIT = st.tuples(
    st.sampled_from(["a", "b", "d/c", "d/e/f"]),
    st.sampled_from(["write", "replace", "touch", "delete", "back-date"]),
    st.integers(0, 5),
)


@hypothesis_settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(edits=st.lists(st.lists(EDIT, max_size=4), max_size=6))
@pytest.mark.slow
def test_any_history_is_recorded_content_by_content(
    tmp_path_factory: pytest.TempPathFactory, edits: list[list[tuple[str, str, int]]]
) -> None:
    """After each burst one scan; the oracle keeps consecutive distinct contents."""
    from tests.conftest import write_config

    base = tmp_path_factory.mktemp("history")
    source = base / "source"
    source.mkdir()
    wanted: dict[bytes, list[int]] = {}
    with open_ledger(write_config(base / "flow").database) as ledger:
        root = add_root(ledger, source)
        for burst in edits:
            for name, kind, size in burst:
                edit(source / name, kind, size)
            scan(ledger, root)
            for name in ("a", "b", "d/c", "d/e/f"):
                file = source / name
                seen = wanted.setdefault(name.encode(), [])
                if file.exists() and seen[-1:] != [file.stat().st_size]:
                    seen.append(file.stat().st_size)
        assert history(ledger) == {path: sizes for path, sizes in wanted.items() if sizes}
        here = {p.relative_to(source).as_posix().encode() for p in source.rglob("*") if p.is_file()}
        assert gone(ledger) == set(history(ledger)) - here


def edit(file: Path, kind: str, size: int) -> None:
    """Contents are told apart by their size, so that the oracle needs no hash."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if kind == "write":
        put(file, b"x" * size)
    elif kind == "replace":
        put(file.with_name("new.tmp"), b"x" * size).replace(file)
    elif kind == "back-date":
        put(file, b"x" * size, OLD)
    elif kind == "touch" and file.exists():
        os.utime(file)
    elif kind == "delete":
        file.unlink(missing_ok=True)
