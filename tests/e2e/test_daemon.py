"""The whole daemon on real files: work done, failures explained, stops clean."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pyarrow.dataset as ds
import pytest
from sqlalchemy import select

from casparian_flow import config, durable, main, protocol
from casparian_flow.config import Settings
from casparian_flow.db import audit, jobs, views
from casparian_flow.db.access import Ledger
from casparian_flow.db.models import Attempt, FileLocation, FileVersion
from casparian_flow.engine import control
from casparian_flow.errors import DaemonRunning
from casparian_flow.main import Daemon
from casparian_flow.services import jobs as job_verbs
from casparian_flow.services.scan import scan
from tests.conftest import take_bytes_away, write_config
from tests.daemons import (
    DAEMON,
    WORK_SECONDS,
    WORKER,
    all_done,
    at_work,
    attempts,
    counted,
    free_endpoint,
    given,
    guests,
    outcomes,
    said,
    start,
    work_off,
)
from tests.eventually import PATIENCE, eventually, wait_until
from tests.factories import add_root
from tests.plugs import BEHAVES, ROWS, publish


def logs(ledger: Ledger) -> str:
    return "\n".join(ledger.read(lambda c: c.execute(select(Attempt.log)).scalars().all()))


def test_files_become_rows_that_say_where_they_came_from(
    ledger: Ledger, settings: Settings, source: Path
) -> None:
    root = add_root(ledger, source)
    publish(ledger, settings, "rows", ROWS, "1.0.0")
    for n in range(20):
        (source / f"{n}.txt").write_text(f"first {n}\nsecond {n}\n")
    scan(ledger, root)
    assert work_off(settings) == {"COMPLETED": 20}
    table = ds.dataset(settings.home / "output" / "lines").to_table()
    assert table.num_rows == 40
    row = next(r for r in table.to_pylist() if r["line"] == "second 7")
    version = ledger.read(
        lambda c: c.execute(
            select(FileVersion.content_hash, FileLocation.rel_path)
            .join(FileLocation, FileLocation.id == FileVersion.location_id)
            .where(FileVersion.id == row["_cf_file_version_id"])
        ).one()
    )
    assert version.rel_path == "7.txt"
    assert version.content_hash == row["_cf_source_hash"]
    assert row["_cf_plugin_version"] == "1.0.0"
    assert ledger.read(lambda c: list(audit.problems(c))) == []
    assert not list((settings.home / "output" / ".casparian" / "stage").iterdir())
    assert guests() == []


def test_every_way_a_plugin_can_fail_is_a_reason_and_the_next_job_runs(
    ledger: Ledger, tmp_path: Path, source: Path
) -> None:
    settings = write_config(tmp_path / "flow", "[guest]\nrecycle_jobs = 3\n")
    root = add_root(ledger, source)
    publish(ledger, settings, "behaves", BEHAVES, "1.0.0")
    for what in ("raise", "segfault", "exit", "undeclared", "prose", "fine", "also fine"):
        (source / f"{what}.do").write_text(what)
    scan(ledger, root)
    assert work_off(settings) == {"COMPLETED": 2, "FAILED": 5}
    found = outcomes(ledger)
    assert "ValueError: no such thing" in found["raise.do"][1]
    assert "was killed by SIGSEGV" in found["segfault.do"][1]
    assert "exit status 0" in found["exit.do"][1]
    assert "elsewhere" in found["undeclared.do"][1]
    assert "str" in found["prose.do"][1]
    assert "told to raise" in logs(ledger)
    assert 'raise ValueError("no such thing")' in logs(ledger)
    # The same error twice is not tried a third time; refused output not even twice.
    assert len(attempts(ledger)) == 2 + 3 * 2 + 2
    table = ds.dataset(settings.home / "output" / "done").to_table()
    assert sorted(table["what"].to_pylist()) == ["also fine", "fine"]


@pytest.mark.slow
def test_a_job_that_runs_too_long_is_killed_with_its_reason(
    ledger: Ledger, source: Path, settings: Settings
) -> None:
    root = add_root(ledger, source)
    manifest = BEHAVES.replace('topic="done")', 'topic="done", timeout_seconds=0.3)')
    publish(ledger, settings, "behaves", manifest, "1.0.0")
    (source / "hang.do").write_text("hang")
    scan(ledger, root)
    assert work_off(settings) == {"FAILED": 1}
    assert "longer than 0.3 s" in outcomes(ledger)["hang.do"][1]
    assert guests() == []


def test_bytes_that_changed_before_they_ran_are_superseded(
    ledger: Ledger, source: Path, settings: Settings
) -> None:
    root = add_root(ledger, source)
    publish(ledger, settings, "rows", ROWS, "1.0.0")
    for name in ("edited.txt", "deleted.txt", "kept.txt"):
        (source / name).write_text("as scanned")
    scan(ledger, root)
    take_bytes_away(settings)
    (source / "edited.txt").write_text("something else")
    (source / "deleted.txt").unlink()
    assert work_off(settings) == {"COMPLETED": 1, "SUPERSEDED": 2}
    scan(ledger, root)
    assert work_off(settings) == {"COMPLETED": 2, "SUPERSEDED": 2}


def test_bytes_that_come_back_are_worked_after_all(
    ledger: Ledger, source: Path, settings: Settings
) -> None:
    """The job ran while the source root was away: nothing of it may be lost."""
    root = add_root(ledger, source)
    publish(ledger, settings, "rows", ROWS, "1.0.0")
    (source / "a.txt").write_text("one")
    scan(ledger, root)
    take_bytes_away(settings)
    source.rename(source.with_name("away"))
    assert work_off(settings) == {"SUPERSEDED": 1}
    source.with_name("away").rename(source)
    assert len(scan(ledger, root).job_ids) == 1
    assert work_off(settings) == {"COMPLETED": 1}


def test_a_large_file_is_read_in_place_and_proved_twice(
    ledger: Ledger, tmp_path: Path, source: Path
) -> None:
    settings = write_config(tmp_path / "flow", "[guest]\ncopy_limit_bytes = 10\n")
    root = add_root(ledger, source)
    publish(ledger, settings, "rows", ROWS, "1.0.0")
    (source / "large.txt").write_text("more than ten bytes\n")
    scan(ledger, root)
    assert work_off(settings) == {"COMPLETED": 1}


def test_a_second_daemon_is_told_who_is_the_first(settings: Settings) -> None:
    async def story() -> None:
        async with main.running(settings, "the first", workers=0, watch=False):
            about = durable.daemon_lock_holder(settings.database.daemon_lock)
            assert about is not None
            assert about["pid"] == os.getpid()
            with pytest.raises(DaemonRunning, match="the first"):
                async with main.running(settings, "the second", workers=0, watch=False):
                    pass

    asyncio.run(story())
    assert durable.daemon_lock_holder(settings.database.daemon_lock) is None


@pytest.mark.parametrize("link", ["ledger", "folder"])
def test_one_ledger_has_one_daemon_by_whatever_name_it_is_reached(
    settings: Settings, tmp_path: Path, link: str
) -> None:
    other = tmp_path / "other"
    if link == "ledger":
        second = write_config(other)
        second.database.path.symlink_to(settings.database.path)
    else:
        other.symlink_to(settings.home)
    second = config.load(str(other / config.FILE_NAME))

    async def story() -> None:
        async with main.running(settings, "the first", workers=0, watch=False):
            answer = await asyncio.to_thread(control.ask, second.database, protocol.Ring())
            assert answer is not None
            assert answer.ok
            with pytest.raises(DaemonRunning, match="the first"):
                async with main.running(second, "the second", workers=0, watch=False):
                    pass

    asyncio.run(story())


def test_sentinel_and_worker_as_two_processes(ledger: Ledger, tmp_path: Path, source: Path) -> None:
    endpoint = free_endpoint()
    settings = write_config(tmp_path / "flow", f'[listen]\nendpoint = "{endpoint}"\n')
    add_root(ledger, source)
    publish(ledger, settings, "rows", ROWS, "1.0.0")
    for n in range(5):
        (source / f"{n}.txt").write_text(str(n))
    with start(settings, DAEMON) as sentinel:
        said(sentinel, "waiting for workers")
        with start(settings, WORKER, "--connect", endpoint) as worker:
            said(worker, "worker is waiting")
            asyncio.run(all_done(Daemon(ledger, None, None)))  # type: ignore[arg-type]
            sentinel.send_signal(signal.SIGTERM)
            assert sentinel.communicate(timeout=PATIENCE)[1] is not None
            assert "worker stopped" in worker.communicate(timeout=PATIENCE)[1]
    assert (sentinel.returncode, worker.returncode) == (0, 0)
    assert {status for status, _ in outcomes(ledger).values()} == {"COMPLETED"}


@pytest.mark.slow
def test_a_killed_worker_process_costs_nothing_but_time(
    ledger: Ledger, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its jobs come back when the Sentinel starts anew, under a new fence."""
    endpoint = free_endpoint()
    settings = write_config(tmp_path / "flow", f'[listen]\nendpoint = "{endpoint}"\n')
    root = add_root(ledger, source)
    publish(ledger, settings, "behaves", BEHAVES, "1.0.0")
    (source / "one.do").write_text("slow 3600")
    scan(ledger, root)
    with start(settings, DAEMON) as sentinel:
        said(sentinel, "waiting for workers")
        with start(settings, WORKER, "--connect", endpoint) as worker:
            wait_until(lambda: given(settings), WORK_SECONDS)
            theirs = psutil.Process(worker.pid).children(recursive=True)
            worker.kill()
            sentinel.kill()
            worker.communicate()
            sentinel.communicate()
    _, alive = psutil.wait_procs(theirs, timeout=PATIENCE)
    assert theirs
    assert not alive, "a guest outlived its worker"
    take_bytes_away(settings)
    (source / "one.do").unlink()
    assert work_off(settings) == {"SUPERSEDED": 1}
    assert attempts(ledger) == ["LOST", "SUPERSEDED"]


@pytest.mark.slow
def test_a_stop_releases_what_runs_and_the_next_start_finishes_it(
    ledger: Ledger, tmp_path: Path, source: Path
) -> None:
    settings = write_config(tmp_path / "flow", "")
    file = settings.home / "global_config.toml"
    file.write_text(file.read_text().replace("[jobs]", "[jobs]\ndrain_seconds = 0.5"))
    settings = main.config.load(str(file))
    root = add_root(ledger, source)
    publish(ledger, settings, "behaves", BEHAVES, "1.0.0")
    for n in range(30):
        (source / f"{n}.do").write_text("slow 0.05" if n else "slow 3600")
    scan(ledger, root)
    take_bytes_away(settings)

    async def story() -> None:
        async with main.running(settings, "test", workers=2, watch=False) as daemon:
            await eventually(lambda: counted(daemon.ledger, "COMPLETED"), WORK_SECONDS)

    asyncio.run(story())
    counts = ledger.read(jobs.counts)
    assert not counts.keys() & {"RUNNING", "COMMITTING", "FAILED"}
    assert counts["QUEUED"] >= 1
    assert guests() == []
    (source / "0.do").write_text("fine")
    scan(ledger, root)
    assert work_off(settings) == {"COMPLETED": 30, "SUPERSEDED": 1}


@pytest.mark.slow
def test_the_daemon_of_another_database_in_the_folder_leaves_its_guests_alone(
    ledger: Ledger, settings: Settings, source: Path
) -> None:
    file = settings.home / "other.toml"
    file.write_text('[database]\ndb_location = "other.sqlite3"\n')
    other = main.config.load(str(file))
    root = add_root(ledger, source)
    publish(ledger, settings, "behaves", BEHAVES, "1.0.0")
    (source / "one.do").write_text("hang")
    scan(ledger, root)

    async def story() -> None:
        async with main.running(settings, "test", workers=1, watch=False) as daemon:
            await at_work(settings)
            before = sorted(settings.database.guests_folder.rglob("*"))
            assert any(path.name.startswith("hand-") for path in before)
            async with main.running(other, "test", workers=1, watch=False):
                assert sorted(settings.database.guests_folder.rglob("*")) == before
            job_verbs.abort(ledger, ledger.read(lambda c: views.job_ids(c, ["RUNNING"])))
            assert await all_done(daemon) == {"ABORTED": 1}

    asyncio.run(story())
    assert other.database.state_folder == settings.database.state_folder


def test_a_daemon_that_is_left_at_once_leaves(settings: Settings) -> None:
    """Its workers had no time to introduce themselves."""

    async def story() -> None:
        async with asyncio.timeout(PATIENCE), main.running(settings, "x", workers=2, watch=True):
            pass

    asyncio.run(story())
