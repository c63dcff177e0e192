"""The database deleted, replaced, damaged, full, read-only, or half migrated: said, and kept."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from casparian_flow import durable, main
from casparian_flow.config import DatabaseSettings, Settings
from casparian_flow.db import integrity, jobs, schema
from casparian_flow.db.access import Ledger, get_engine, open_ledger
from casparian_flow.db.states import JobStatus
from casparian_flow.errors import LedgerError, LedgerLost, first_error
from casparian_flow.services import report
from tests.disks import fill, in_memory, remount
from tests.eventually import PATIENCE
from tests.factories import add_audit_row, add_job


def write(ledger: Ledger) -> None:
    ledger.write(add_audit_row)


@pytest.mark.parametrize("end", ["", "-wal"])
@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_file_that_went_away_is_never_written_to(
    settings: Settings, ledger: Ledger, end: str, how: str
) -> None:
    write(ledger)
    file = settings.database.path.with_name(f"{settings.database.path.name}{end}")
    file.rename(settings.home / "away")
    if how == "replaced":
        shutil.copyfile(settings.home / "away", file)
    before = (settings.home / "away").read_bytes()
    with pytest.raises(LedgerLost, match=f"{file.name} was {how}"):
        write(ledger)
    assert (settings.home / "away").read_bytes() == before
    assert file.exists() == (how == "replaced")
    file.unlink(missing_ok=True)
    (settings.home / "away").rename(file)
    write(ledger)  # it is back: nothing has happened


def test_a_daemon_with_nothing_to_do_notices_too(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("casparian_flow.main.GUARD_SECONDS", 0.02)

    async def story() -> None:
        async with (
            asyncio.timeout(PATIENCE),
            main.running(settings, "test", workers=0, watch=False),
        ):
            for file in settings.home.glob(f"{settings.database.path.name}*"):
                file.unlink()
            await asyncio.Event().wait()

    with pytest.raises(BaseExceptionGroup) as caught:
        asyncio.run(story())
    error = first_error(caught.value)
    assert isinstance(error, LedgerLost)
    assert "was deleted" in error.message
    assert error.exit_code == 74
    assert not list(settings.home.glob(f"{settings.database.path.name}*"))


def flip(file: Path, offset: int, count: int = 64) -> bytes:
    data = bytearray(file.read_bytes())
    for n in range(offset, min(offset + count, len(data))):
        data[n] ^= 0xFF
    file.write_bytes(data)
    return bytes(data)


@pytest.mark.parametrize("page", [0, 1, 3, 7])
def test_a_damaged_page_is_named_at_the_start_and_nothing_is_repaired(
    settings: Settings, page: int
) -> None:
    with open_ledger(settings.database) as ledger:
        write(ledger)
    damaged = flip(settings.database.path, page * 4096)

    async def story() -> None:
        async with main.running(settings, "test", workers=0, watch=False):
            raise AssertionError("it started")

    with pytest.raises(LedgerLost, match="damaged") as caught:
        asyncio.run(story())
    assert "disaster.md" in caught.value.hint
    assert settings.database.path.read_bytes() == damaged


def test_damage_seen_while_running_ends_it(settings: Settings, ledger: Ledger) -> None:
    def meets_it(_connection: object) -> None:
        import sqlite3

        error = sqlite3.DatabaseError("database disk image is malformed")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error

    with pytest.raises(LedgerLost, match="malformed"):
        ledger.write(meets_it)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small filesystem of our own."""
    with in_memory(tmp_path / "disk", "2m") as folder:
        yield folder


def test_a_full_disk_under_the_ledger_writes_nothing_and_reads_on(disk: Path) -> None:
    with open_ledger(DatabaseSettings(db_location=str(disk / "ledger.sqlite3"))) as ledger:
        job_id = add_job(ledger, JobStatus.QUEUED)
        ballast = fill(disk)
        with pytest.raises(LedgerError, match="could not be written"):
            for _ in range(200):
                ledger.write(lambda c: add_audit_row(c, "x" * 4000))
        assert ledger.read(jobs.counts) == {"QUEUED": 1}
        ballast.unlink()
        assert ledger.write(lambda c: jobs.abort(c, [job_id], "me")) == [job_id]
        assert ledger.read(integrity.damage) == ""


def test_a_read_only_disk_is_an_error_in_words(disk: Path) -> None:
    database = DatabaseSettings(db_location=str(disk / "ledger.sqlite3"))
    get_engine(database).dispose()
    remount(disk, "ro")
    with pytest.raises(LedgerError, match="cannot use the database"):
        get_engine(database)


@pytest.mark.slow
def test_a_migration_killed_at_each_statement_is_done_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = schema._scripts()
    real = schema._statements
    for done in range(len(whole)):
        database = DatabaseSettings(db_location=str(tmp_path / f"{done}" / "ledger.sqlite3"))
        with monkeypatch.context() as older:
            older.setattr(schema, "_scripts", lambda done=done: whole[:done])
            if done:
                schema.bring_up_to_date(database)
        for killed_at in range(1, len(list(real(whole[done][1]))) + 1):
            child = os.fork()
            if not child:
                left = iter(range(killed_at))

                def dying(script: str, left: Iterator[int] = left) -> Iterator[str]:
                    for statement in real(script):
                        if next(left, None) is None:
                            os._exit(9)
                        yield statement
                    os._exit(9)

                schema._statements = dying
                schema.bring_up_to_date(database)
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
            connection = schema.connect(database)
            assert connection.execute("PRAGMA user_version").fetchone() == (done,)
            connection.close()
        with open_ledger(database) as ledger:
            version = ledger.read(lambda c: c.execute(text("PRAGMA user_version")).scalar_one())
            assert version == len(whole)
            assert list(ledger.read(lambda c: list(integrity.broken_invariants(c)))) == []


def test_a_clock_set_back_a_day_delays_no_retry(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = add_job(ledger, JobStatus.RUNNING, worker="w")
    ledger.write(lambda c: jobs.requeue(c, job_id, 1, reason="later", delay_seconds=60))
    assert not ledger.read(jobs.claimable)
    now = time.time()
    for jump, due in ((-86_400, True), (-60, False), (59, False), (61, True), (86_400, True)):
        with monkeypatch.context() as patch:
            patch.setattr("casparian_flow.db.jobs.time.time", lambda jump=jump: now + jump)
            assert ledger.read(jobs.claimable) is due, jump


def test_of_daemons_started_at_once_exactly_one_lives(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from casparian_flow import durable\n"
        "from casparian_flow.errors import DaemonRunning\n"
        "durable._PROBE_SECONDS = 0.0\n"
        "while sys.stdin.readline():\n"
        "    try:\n"
        "        with durable.hold_daemon_lock(Path(sys.argv[1]), 'race'):\n"
        "            print('alive', flush=True)\n"
        "            sys.stdin.readline()\n"
        "    except DaemonRunning:\n"
        "        print('told', flush=True)\n"
        "        sys.stdin.readline()\n"
        "    print('ready', flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    crowd = [subprocess.Popen(command, **pipes) for _ in range(3)]  # type: ignore[call-overload]

    def all_say(word: str) -> list[str]:
        for one in crowd:
            one.stdin.write(f"{word}\n")
        return sorted(one.stdout.readline().strip() for one in crowd)

    for _ in range(50):
        assert all_say("go") == ["alive", "told", "told"]
        assert all_say("stop") == ["ready"] * 3
    for one in crowd:
        one.communicate()


MOUNTS = """\
22 1 0:20 / / rw - ext4 /dev/root rw
30 22 0:30 / /mnt/office\\040files rw shared:1 - nfs4 server:/export rw
31 22 0:31 / /run rw - tmpfs tmpfs rw
32 22 0:32 / /mnt/gro\u00df\u5b57 rw - cifs //server/x rw
"""


def test_a_database_on_a_network_or_in_memory_is_doubted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(MOUNTS)
    kinds = {
        "/home/x": "ext4", "/mnt/office files/a": "nfs4", "/run/a": "tmpfs", "/runner": "ext4",
        "/mnt/gro\u00df\u5b57/a": "cifs",
    }  # fmt: skip
    assert {path: durable.filesystem_kind(Path(path), table) for path in kinds} == kinds
    assert durable.filesystem_kind(Path("/"), tmp_path / "none") == ""
    assert durable.misses_events(tmp_path) == ""
    for kind, words, unheard in (
        ("nfs4", "network filesystem", True), ("fuse.sshfs", "network filesystem", True),
        ("fuseblk", "", True), ("tmpfs", "in memory", False), ("ext4", "", False),
    ):  # fmt: skip
        monkeypatch.setattr(durable, "filesystem_kind", lambda path, kind=kind: kind)
        assert words in durable.unfit_for_database(tmp_path)
        assert bool(durable.unfit_for_database(tmp_path)) == bool(words)
        assert bool(durable.misses_events(tmp_path)) == unheard


def test_a_log_that_a_foreign_reader_holds_is_said(
    settings: Settings, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "WAL_LIMIT_BYTES", 1 << 10)
    monkeypatch.setattr("casparian_flow.db.schema.CHECKPOINT_BYTES", 1 << 10)
    monkeypatch.setattr("casparian_flow.db.schema.CHECKPOINT_PAUSE_SECONDS", 0.0)
    reader = schema.connect(settings.database)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM cf_audit").fetchone()
    for _ in range(3):
        write(ledger)
    assert [a for a in report.advise(settings, ledger) if "write-ahead log has" in a.words]
    reader.close()
    write(ledger)
    write(ledger)
    assert not [a for a in report.advise(settings, ledger) if "write-ahead log has" in a.words]


def test_nobody_is_killed_by_a_pid_that_was_written_down() -> None:
    """Pids are used again: guests are children that nobody but us can have reaped."""
    package = Path(main.__file__).parent
    signalling = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "os.killpg(" in path.read_text()
    }
    assert signalling == {"engine/guest_process.py"}
