"""A backup is whole, checked, and never in the way."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import select, text

from casparian_flow import main
from casparian_flow.config import Settings
from casparian_flow.db import audit, jobs, kept, plugins
from casparian_flow.db.access import Connection, Ledger, open_ledger
from casparian_flow.db.models import ProcessingJob
from casparian_flow.db.states import JobStatus
from casparian_flow.errors import CasparianError, LedgerError
from casparian_flow.services import backup, store_upkeep
from casparian_flow.services.scan import scan
from casparian_flow.services.verify import verify
from tests.conftest import write_config
from tests.daemons import all_done
from tests.factories import add_audit_row, add_root
from tests.plugs import ROWS, publish


def restore(settings: Settings, copy: Path) -> None:
    """As docs/disaster.md says it: the old files away, the copy in their place."""
    for file in settings.home.glob(f"{settings.database.path.name}*"):
        file.unlink()
    shutil.copyfile(copy, settings.database.path)


def problems(settings: Settings) -> list[str]:
    with open_ledger(settings.database) as ledger:
        return verify(settings, ledger).problems


@pytest.mark.slow
def test_a_backup_taken_under_load_is_accepted_by_verify_and_goes_on(
    settings: Settings, source: Path, tmp_path: Path
) -> None:
    copies = [tmp_path / f"copy-{n}.sqlite3" for n in range(3)]
    with open_ledger(settings.database) as ledger:
        root = add_root(ledger, source)
        publish(ledger, settings, "rows", ROWS, "1.0.0")

        async def story() -> None:
            async with main.running(settings, "test", workers=2, watch=False) as daemon:
                for number, copy in enumerate(copies):
                    for n in range(20):
                        (source / f"{number}-{n}.txt").write_text(f"{n}\n")
                    await asyncio.to_thread(scan, ledger, root)
                    await asyncio.to_thread(backup.make, settings, ledger, str(copy))
                assert await all_done(daemon) == {"COMPLETED": 60}

        asyncio.run(story())

    async def start() -> None:
        async with main.running(settings, "test", workers=0, watch=False):
            pass

    for copy in copies:
        restore(settings, copy)
        assert all(each.endswith("into the queue)") for each in problems(settings))
        asyncio.run(start())
        assert problems(settings) == []
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".copy")]


@pytest.fixture
def running_job(settings: Settings, ledger: Ledger, source: Path) -> int:
    """The id of one that a worker of a daemon has, which has gone."""
    root = add_root(ledger, source)
    publish(ledger, settings, "rows", ROWS, "1.0.0")
    (source / "a.txt").write_text("a\n")
    (job_id,) = scan(ledger, root).job_ids
    assert ledger.write(lambda c: jobs.claim(c, "gone", plugins.begin_epoch(c), 1)) == [job_id]
    return job_id


@pytest.mark.usefixtures("running_job")
def test_a_copy_is_the_ledger_in_all_but_its_pages(
    settings: Settings, ledger: Ledger, tmp_path: Path
) -> None:
    copy = backup.make(settings, ledger, str(tmp_path / "copy")).path

    def content(path: Path | str) -> dict[str, object]:
        with closing(sqlite3.connect(path)) as connection:
            schema = connection.execute(
                "SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY type, name"
            ).fetchall()
            found: dict[str, object] = {"schema": schema}
            for pragma in ("user_version", "application_id", "encoding", "page_size"):
                found[pragma] = connection.execute(f"PRAGMA {pragma}").fetchone()
            for kind, name, *_ in schema:
                if kind == "table":
                    query = f"SELECT rowid, * FROM {name} ORDER BY rowid"
                    found[name] = connection.execute(query).fetchall()
        return found

    found, original = content(copy), content(settings.database.path)
    # Who starts from the copy asks the sinks: by then they may have more than it knows.
    assert found.pop("cf_asked_sink") == []
    assert original.pop("cf_asked_sink") != []
    assert found == original
    assert ("trigger", "cf_audit_no_update") in [row[:2] for row in found["schema"]]  # type: ignore[attr-defined]


def test_a_start_from_a_copy_takes_back_what_ran_in_the_ledger(
    settings: Settings, ledger: Ledger, running_job: int, tmp_path: Path
) -> None:
    copy = Path(backup.make(settings, ledger, str(tmp_path / "copy")).path)
    status = select(ProcessingJob.status)
    assert ledger.read(lambda c: c.execute(status).scalar_one()) == JobStatus.RUNNING
    other = write_config(tmp_path / "other")
    shutil.copyfile(copy, other.database.path)

    async def story() -> None:
        async with main.running(other, "test", workers=0, watch=False) as daemon:
            query = select(ProcessingJob.id, ProcessingJob.status, ProcessingJob.attempts)
            found = await daemon.ledger.read_soon(lambda c: c.execute(query).one())
            assert found == (running_job, JobStatus.QUEUED, 0)

    asyncio.run(story())


def test_a_copy_is_made_while_a_writer_holds_the_gate(
    settings: Settings, ledger: Ledger, tmp_path: Path
) -> None:
    """It holds what was committed before, and the writer waits for nothing."""

    def work(connection: Connection) -> backup.Backup:
        add_audit_row(connection)
        return backup.make(settings, ledger, str(tmp_path / "copy"))

    made = ledger.write(work)
    assert made.holds["audit rows"] == 0
    assert ledger.read(audit.head).seq == 1


def test_it_says_what_it_holds(settings: Settings, ledger: Ledger, tmp_path: Path) -> None:
    ledger.write(add_audit_row)
    made = backup.make(settings, ledger, str(tmp_path / "copy"))
    assert made.head == str(ledger.read(audit.head))
    assert made.holds["audit rows"] == 1
    assert made.size_bytes == (tmp_path / "copy").stat().st_size
    assert os.listdir(tmp_path / ".casparian")  # a scan of that folder passes it over


def test_a_file_that_is_there_stays_unless_told_otherwise(
    settings: Settings, ledger: Ledger, tmp_path: Path
) -> None:
    target = tmp_path / "precious"
    target.write_text("mine")
    with pytest.raises(CasparianError, match="left untouched"):
        backup.make(settings, ledger, str(target))
    assert target.read_text() == "mine"
    backup.make(settings, ledger, str(target), force=True)
    assert target.read_bytes().startswith(b"SQLite format 3")


@pytest.mark.parametrize("end", ["", "-wal"])
def test_the_ledger_is_never_its_own_backup(settings: Settings, ledger: Ledger, end: str) -> None:
    with pytest.raises(CasparianError, match="is the ledger itself"):
        backup.make(settings, ledger, f"{settings.database.path}{end}", force=True)
    link = settings.home / "link"
    link.symlink_to(settings.database.path)
    with pytest.raises(CasparianError, match="is the ledger itself"):
        backup.make(settings, ledger, str(link), force=True)


def test_a_ledger_that_does_not_hold_gives_no_backup(
    settings: Settings, ledger: Ledger, tmp_path: Path
) -> None:
    ledger.write(add_audit_row)
    ledger.write(lambda c: c.execute(text("DROP TRIGGER cf_audit_no_update")).rowcount)
    ledger.write(lambda c: c.execute(text("UPDATE cf_audit SET actor = 'nobody'")).rowcount)
    with pytest.raises(LedgerError, match=r"row 1 was changed.*no backup was made"):
        backup.make(settings, ledger, str(tmp_path / "copy"))
    assert not list(tmp_path.glob("*copy*"))


def test_a_full_disk_keeps_the_backup_that_is_there(
    settings: Settings, ledger: Ledger, small_disk: Path
) -> None:
    (small_disk / "copy").write_text("yesterday's")
    with pytest.raises(LedgerError, match="could not be copied"):
        backup.make(settings, ledger, str(small_disk / "copy"), force=True)
    assert (small_disk / "copy").read_text() == "yesterday's"
    assert not [name for name in os.listdir(small_disk) if name.endswith(".tmp")]


PLACES = """
    backup.copied store.chunk_copied backup.bytes_copied backup.durable backup.store_removed
    backup.store_named
"""


@pytest.mark.parametrize("place", PLACES.split())
@pytest.mark.slow_but("backup.durable")
def test_killed_before_it_has_its_name_leaves_none(
    tmp_path: Path, source: Path, place: str
) -> None:
    settings = write_config(tmp_path / "flow")
    (source / "a").write_bytes(b"a")
    with open_ledger(settings.database) as ledger:
        scan(ledger, add_root(ledger, source))
    code = (
        "import os, sys\n"
        "from casparian_flow import config, crashpoints\n"
        "from casparian_flow.db.access import open_ledger\n"
        "from casparian_flow.services import backup\n"
        "crashpoints.arm(lambda name: os._exit(9) if name == sys.argv[3] else None)\n"
        "settings = config.load(sys.argv[1])\n"
        "with open_ledger(settings.database) as ledger:\n"
        "    backup.make(settings, ledger, sys.argv[2], with_bytes=True, force=True)\n"
    )
    target = tmp_path / "copy"
    command = [sys.executable, "-c", code, str(settings.home / "global_config.toml"), str(target)]
    assert subprocess.run([*command, place], check=False).returncode == 9
    assert not target.exists()
    assert subprocess.run([*command, "none"], check=False).returncode == 0
    restore(settings, target)
    assert problems(settings) == []


def test_a_copy_that_another_tool_made_is_put_into_write_ahead_logging(
    settings: Settings, ledger: Ledger, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(settings.database.path)) as connection:
        connection.execute("VACUUM INTO ?", [str(tmp_path / "copy")])
    other = write_config(tmp_path / "other")
    shutil.copyfile(tmp_path / "copy", other.database.path)
    with open_ledger(other.database) as opened:
        mode = opened.read(lambda c: c.execute(text("PRAGMA journal_mode")).scalar_one())
    assert mode == "wal"


def test_a_ledger_that_cannot_be_opened_is_not_taken_for_the_target(
    settings: Settings, tmp_path: Path
) -> None:
    with open_ledger(settings.database):
        pass
    with open_ledger(settings.database) as ledger:
        settings.database.path.rename(tmp_path / "elsewhere")
        with pytest.raises(LedgerError, match="could not be copied"):
            backup.make(settings, ledger, str(tmp_path / "copy.sqlite3"))
    assert not (tmp_path / "copy.sqlite3").exists()


def test_with_bytes_every_kept_version_can_be_printed_from_the_copy(
    settings: Settings, ledger: Ledger, source: Path, tmp_path: Path
) -> None:
    root = add_root(ledger, source)
    contents = [b"first", os.urandom(100_000), b"second", b"damaged", b""]
    for content in contents:
        (source / "a").write_bytes(content)
        scan(ledger, root)
    small = settings.database.store_folder / "small.sqlite3"
    small.write_bytes(small.read_bytes().replace(b"damaged", b"damageD"))
    bare = backup.make(settings, ledger, str(tmp_path / "bare"))
    assert (bare.store, bare.bytes_kept) == ("", 5)
    assert not (tmp_path / "bare.store").exists()
    made = backup.make(settings, ledger, str(tmp_path / "copy"), with_bytes=True)
    assert (made.store, made.bytes_kept) == (str(tmp_path / "copy.store"), 4)
    with pytest.raises(CasparianError, match="already exists"):
        backup.make(settings, ledger, str(tmp_path / "copy"), with_bytes=True)
    backup.make(settings, ledger, str(tmp_path / "copy"), with_bytes=True, force=True)

    ledger.close()
    (source / "a").unlink()
    elsewhere = write_config(tmp_path / "elsewhere")
    with open_ledger(elsewhere.database):
        pass
    restore(elsewhere, Path(made.path))
    elsewhere.database.store_folder.parent.mkdir()
    shutil.copytree(made.store, elsewhere.database.store_folder)
    with open_ledger(elsewhere.database) as restored:
        for number, content in enumerate(contents, start=1):
            version = store_upkeep.find_version(restored, "source/a", number)
            if content == b"damaged":
                with pytest.raises(CasparianError, match="the store does not have them"):
                    store_upkeep.opened(restored, version).__enter__()
            else:
                with store_upkeep.opened(restored, version) as found:
                    assert found.read() == content
        assert verify(elsewhere, restored).problems == []
        store_upkeep.sweep(restored)
        assert restored.read(kept.state).contents == 4
