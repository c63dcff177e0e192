"""The short chaos, and proof that it would notice: what cannot complain proves nothing."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import psutil
import pytest

from proofs.chaos import faults, oracle
from proofs.chaos.gauge import WAL_MB, Sample, judge
from proofs.chaos.history import Content, History
from proofs.chaos.kills import Chaos
from proofs.chaos.place import Place
from proofs.chaos.readers import Readers
from proofs.chaos.soak import Soak
from proofs.chaos.tally import Tally
from tests import disks

SEED = "short"
KILLS = 3
FAULTS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, private_folders: Path) -> Iterator[Place]:
    """A place that had a few faults and kills, and then came to rest."""
    place = Place(tmp_path_factory.mktemp("chaos"))
    chaos = Chaos(place, Tally(place.folder, aloud=True), SEED)
    disk = faults.small_disk(place.parquet.parent)
    try:
        with chaos.going():
            Soak(chaos, SEED, every=0.4).run(5.0, disk=disk)
            chaos.kills(KILLS, every=KILLS)
        yield place
    finally:
        if disk:
            disks.unmount(place.parquet.parent)


@pytest.mark.slow
def test_a_few_faults_and_kills_do_no_harm_and_are_all_kept(place: Place) -> None:
    tally = Tally(place.folder, aloud=False)
    assert not tally.violations, tally.found()
    assert (tally.total, tally.checked, tally.checkpoints) == (KILLS, KILLS, 1)
    assert sum(tally.faults.values()) >= FAULTS
    assert "0 lost, 0 twice, 0 partial, 0 audit, 0 left" in tally.summary()
    assert "100.00%" in tally.summary()  # the rule of three
    (versions,) = place.ask("SELECT count(*) FROM cf_file_version")
    assert versions[0] > 0


def test_every_kind_of_harm_is_noticed(place: Place) -> None:
    found = place.ask("SELECT version, count(*) FROM (SELECT _cf_file_version_id AS version "
                      "FROM entries) GROUP BY 1 HAVING count(*) > 1", of=place.sink)  # fmt: skip
    first, second = found[0][0], found[1][0]
    history = History(place.folder, place.root)
    some, other, *_ = sorted(place.parquet.glob("*.parquet"))
    shutil.copy(some, some.with_name("again.parquet"))
    other.unlink()
    (place.parquet / "half.parquet").write_bytes(some.read_bytes()[:-100])
    with closing(sqlite3.connect(place.sink, isolation_level=None)) as sink:
        of = "_cf_output = (SELECT id FROM _cf_outputs WHERE topic = 'entries' " \
             "AND file_version_id = ?)"  # fmt: skip
        row = f"SELECT max(rowid) FROM _cf_rows_entries WHERE {of}"
        sink.execute(f"DELETE FROM _cf_rows_entries WHERE rowid = ({row})", [first])
        sink.execute(
            f"INSERT INTO _cf_rows_entries SELECT * FROM _cf_rows_entries WHERE {of}", [second]
        )
    unseen = Content(history.last + 1, 3)
    history.intend("once/unseen.txt", unseen)
    (place.root / "once" / "unseen.txt").write_bytes(unseen.data)
    history.present = history.on_disk()
    (place.stages()[1] / "left.parquet.part").touch()
    complaints: list[tuple[str, str]] = []

    def complain(kind: str, words: str) -> None:
        complaints.append((kind, words))

    with subprocess.Popen([sys.executable, "-c", "input()", place.flow], stdin=-1) as orphan:
        oracle.check(place, history, Readers(place, history, complain), complain)
        orphan.communicate(b"\n")
    history.close()

    def said(kind: str, *words: str) -> bool:
        return any(k == kind and all(word in text for word in words) for k, text in complaints)

    assert said("partial", "half.parquet", "no whole file")
    assert said("partial", "entries", f"version_id={first}")
    assert said("twice", f"entries of version {second} ")
    assert said("twice", "lines of version", "2, not 1")
    assert said("lost", "lines of version", "0, not 1")
    assert said("lost", "once/unseen.txt", "is no version of it")
    assert said("audit", other.name)
    assert said("left", "left.parquet.part")
    assert said("left", f"process {orphan.pid} ")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    if not faults.small_disk(folder):
        pytest.skip("only root can mount: the fault `disk full` is untested")
    yield folder
    disks.unmount(folder)


def test_a_full_disk_is_full_and_then_it_is_not(disk: Path) -> None:
    with faults.full(disk), pytest.raises(OSError) as refused:
        (disk / "one").write_bytes(b"more than a page" * 1000)
    assert refused.value.errno == errno.ENOSPC
    (disk / "one").write_bytes(b"fits")


def test_a_locked_sink_takes_nothing(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "sink", timeout=0.0)) as program:
        program.execute("CREATE TABLE t (x)")
        with faults.locked(tmp_path / "sink"), pytest.raises(sqlite3.OperationalError):
            program.execute("INSERT INTO t VALUES (1)")
        program.execute("INSERT INTO t VALUES (1)")


def test_a_source_root_goes_away_and_comes_back(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with faults.away(root, nullcontext()):
        assert not root.exists()
    assert root.exists()


def test_a_stopped_process_stands_still_and_then_goes_on() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1) as process:
        with faults.stopped([process.pid]):
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            assert psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
        process.communicate(b"\n", timeout=60)
    assert process.returncode == 0


def samples(rss_mb_a_minute: float, descriptors_a_minute: float = 0.0) -> list[Sample]:
    return [
        Sample(60.0 * n, 150.0 + rss_mb_a_minute * n, 50 + int(descriptors_a_minute * n))
        for n in range(60)
    ]


def test_what_grows_is_not_flat() -> None:
    assert judge(samples(0.0), 10.0).flat
    assert judge(samples(0.1), 10.0).flat
    assert "memory" in not_flat(judge(samples(1.0), 10.0).words)
    assert "descriptors" in not_flat(judge(samples(0.0, 1.0), 10.0).words)
    assert "largest WAL" in not_flat(judge(samples(0.0), WAL_MB).words)
    with pytest.raises(ValueError, match="too few"):
        judge(samples(0.0)[:5], 10.0)


def not_flat(words: list[str]) -> str:
    (line,) = [line for line in words if line.endswith("NOT FLAT")]
    return line
