"""The queue under fire: stopped workers, aborted jobs, poison, no processes, no memory."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pyarrow.dataset as ds
import pytest
from sqlalchemy import select

from casparian_flow import config, main, protocol
from casparian_flow.config import Settings
from casparian_flow.db import jobs
from casparian_flow.db.access import Ledger
from casparian_flow.db.models import Attempt, ProcessingJob
from casparian_flow.engine import dispatch, endings, guest_process, sentinel
from casparian_flow.engine.sentinel import Sentinel
from casparian_flow.services import jobs as job_verbs
from casparian_flow.services.scan import scan
from casparian_flow.services.verify import verify
from tests.conftest import write_config
from tests.daemons import (
    CLI,
    DAEMON,
    WORK_SECONDS,
    WORKER,
    all_done,
    at_work,
    attempts,
    counted,
    free_endpoint,
    guests,
    outcomes,
    said,
    start,
    work_off,
)
from tests.eventually import PATIENCE, eventually, wait_until
from tests.factories import add_root
from tests.plugs import BEHAVES, publish


def persistent(tmp_path: Path, extra: str = "") -> Settings:
    """A configuration under which nothing fails for being unlucky."""
    file = write_config(tmp_path / "flow", extra).home / "global_config.toml"
    file.write_text(file.read_text().replace("[jobs]", "[jobs]\nmax_attempts = 50"))
    return config.load(str(file))


def rows(settings: Settings) -> list[str]:
    return sorted(ds.dataset(settings.home / "output" / "done").to_table()["what"].to_pylist())


@pytest.mark.slow
def test_a_worker_that_was_stopped_past_its_lease_finds_its_job_done_by_another(
    ledger: Ledger, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = persistent(tmp_path)
    monkeypatch.setattr(sentinel, "LEASE_SECONDS", 2.0)
    root = add_root(ledger, source)
    publish(ledger, settings, "behaves", BEHAVES, "1.0.0")
    (source / "a.do").write_text("slow 3")
    scan(ledger, root)
    endpoint = free_endpoint()
    command = (settings, WORKER, "--connect", endpoint)

    async def story(first: subprocess.Popen[str], workers: contextlib.ExitStack) -> None:
        async with main.running(
            settings, "test", workers=0, watch=False, endpoints=[endpoint]
        ) as daemon:
            await at_work(settings)
            first.send_signal(signal.SIGSTOP)
            workers.callback(first.send_signal, signal.SIGCONT)
            await eventually(lambda: counted(ledger, "QUEUED"))
            monkeypatch.setattr(sentinel, "LEASE_SECONDS", 600.0)  # however slow the rest is
            second = workers.enter_context(start(*command))
            workers.callback(second.terminate)
            assert await all_done(daemon) == {"COMPLETED": 1}
            first.send_signal(signal.SIGCONT)
            await eventually(lambda: daemon.sentinel.workers == 2)

    with contextlib.ExitStack() as workers:
        first = workers.enter_context(start(*command))
        workers.callback(first.terminate)
        asyncio.run(story(first, workers))
    assert rows(settings) == ["slow 3"]
    assert attempts(ledger)[0] == "LOST"
    assert attempts(ledger)[-1] == "STAGED"
    assert not list((settings.home / "output" / ".casparian" / "stage").iterdir())
    assert verify(settings, ledger).problems == []


def test_an_aborted_job_is_killed_and_the_next_one_runs(
    ledger: Ledger, settings: Settings, source: Path
) -> None:
    root = add_root(ledger, source)
    publish(ledger, settings, "behaves", BEHAVES, "1.0.0")
    (source / "hang.do").write_text("hang")
    (job,) = scan(ledger, root).job_ids

    async def story() -> None:
        async with main.running(settings, "test", workers=1, watch=False) as daemon:
            await at_work(settings)
            (guest,) = guests()
            await asyncio.to_thread(job_verbs.abort, ledger, [job])
            await eventually(lambda: not psutil.pid_exists(guest.pid))
            (source / "fine.do").write_text("fine")
            await asyncio.to_thread(scan, ledger, root)
            assert await all_done(daemon) == {"ABORTED": 1, "COMPLETED": 1}

    asyncio.run(story())
    assert rows(settings) == ["fine"]
    assert attempts(ledger) == ["ABORTED", "STAGED"]
    assert verify(settings, ledger).problems == []
    (source / "hang.do").write_text("hang")  # the same bytes: the same version
    job_verbs.retry(ledger, [job])
    assert job_verbs.abort(ledger, [job]) == 1, "without a daemon too"


KILLS = BEHAVES.replace(
    'if what == "raise":',
    """if what == "kill":
            os.kill(os.getppid(), 6)
            time.sleep(60)  # a daemon that writes where it crashed takes a moment to end
        if what == "raise":""",
)


@pytest.mark.slow
def test_a_job_that_crashes_the_daemon_is_isolated_and_the_others_go_on(
    ledger: Ledger, tmp_path: Path, source: Path
) -> None:
    """Where no trace is left it takes more ends: tests/engine/test_retries.py."""
    settings = persistent(tmp_path, '[guest]\nsandbox = "off"\n')
    root = add_root(ledger, source)
    publish(ledger, settings, "behaves", KILLS, "1.0.0")
    for n in range(12):
        (source / f"{n:02}.do").write_text(f"fine {n}" if n != 5 else "kill")
    scan(ledger, root)
    codes: list[int] = []
    while not codes or codes[-1] < 0:
        with start(settings, CLI, "scan", "--drain") as daemon:
            daemon.communicate(timeout=WORK_SECONDS)
        codes.append(daemon.returncode)
    # What writes the trace of an abort may crash itself.
    assert {*codes[:-1]} <= {-signal.SIGABRT, -signal.SIGSEGV}
    assert len(codes) == dispatch.POISON_AFTER + 1
    assert codes[-1] == 1
    found = outcomes(ledger)
    status, reason = found.pop("05.do")
    assert status == "FAILED"
    words = f"POISON: the daemon ended {dispatch.POISON_AFTER} times"
    assert reason.startswith(words)
    assert {status for status, _ in found.values()} == {"COMPLETED"}
    assert len(rows(settings)) == 11
    assert verify(settings, ledger).problems == []


@pytest.mark.slow
def test_random_kills_of_the_daemon_make_no_innocent_job_fail(
    ledger: Ledger, settings: Settings, source: Path, seed: int
) -> None:
    """As configured by default: three attempts. Each kill comes while jobs are in hand."""
    chance = random.Random(seed)
    root = add_root(ledger, source)
    publish(ledger, settings, "behaves", BEHAVES, "1.0.0")
    for n in range(4):
        (source / f"{n}.do").write_text(f"slow {1 + n / 10}")
    scan(ledger, root)
    kills = 0
    while kills < 5:
        with start(settings, CLI, "scan", "--drain") as daemon:
            folder = settings.database.guests_folder
            wait_until(lambda: daemon.poll() is not None or endings.read_held(folder))  # noqa: B023
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.communicate(timeout=chance.uniform(0.0, 0.8))
            if daemon.poll() is not None:
                break  # all is done
            daemon.kill()
        kills += 1
    assert kills
    assert set(work_off(settings)) == {"COMPLETED"}
    assert len(rows(settings)) == 4
    assert verify(settings, ledger).problems == []


@pytest.mark.slow
def test_no_process_to_be_had_costs_no_attempt(
    ledger: Ledger, settings: Settings, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("casparian_flow.engine.committer.PAUSE_SECONDS", 0.1)
    root = add_root(ledger, source)
    publish(ledger, settings, "behaves", BEHAVES, "1.0.0")
    (source / "a.do").write_text("fine")
    real = guest_process.Popen
    faults = [errno.EAGAIN, errno.ENOMEM, errno.EMFILE]

    def fork(*arguments: Any, **options: Any) -> Any:
        if faults:
            raise OSError(faults[0], os.strerror(faults.pop(0)))
        return real(*arguments, **options)

    async def story() -> None:
        async with main.running(settings, "test", workers=1, watch=False) as daemon:
            monkeypatch.setattr(guest_process, "Popen", fork)
            await asyncio.to_thread(scan, ledger, root)
            assert await all_done(daemon) == {"COMPLETED": 1}

    asyncio.run(story())
    assert attempts(ledger) == ["RELEASED"] * 3 + ["STAGED"]
    counted = select(ProcessingJob.attempts, ProcessingJob.fence)
    assert tuple(ledger.read(lambda c: c.execute(counted).one())) == (1, 4)


@pytest.mark.slow
def test_want_of_memory_in_the_host_ends_the_job_and_not_the_daemon(
    ledger: Ledger, settings: Settings, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = add_root(ledger, source)
    publish(ledger, settings, "behaves", BEHAVES, "1.0.0")
    (source / "a.do").write_text("fine")
    scan(ledger, root)

    def seal(_stages: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("casparian_flow.engine.sinks.seal", seal)
    assert work_off(settings) == {"FAILED": 1}
    assert "MemoryError" in outcomes(ledger)["a.do"][1]
    assert not list((settings.home / "output" / ".casparian" / "stage").iterdir())


@pytest.mark.slow
def test_a_worker_that_follows_another_sentinel_takes_its_settings(
    ledger: Ledger, tmp_path: Path, source: Path
) -> None:
    endpoint = free_endpoint()
    before = write_config(
        tmp_path / "flow", f'[listen]\nendpoint = "{endpoint}"\n[guest]\nsandbox = "off"\n'
    )
    publish(ledger, before, "behaves", BEHAVES, "1.0.0")
    (source / "a.do").write_text("fine")
    scan(ledger, add_root(ledger, source))

    async def story(after: Settings) -> None:
        async with main.running(
            after, "test", workers=0, watch=False, endpoints=[endpoint]
        ) as daemon:
            assert await all_done(daemon) == {"COMPLETED": 1}

    with start(before, WORKER, "--connect", endpoint) as worker:
        with start(before, DAEMON) as sentinel:
            said(sentinel, "connected")
            sentinel.kill()
            sentinel.communicate()
        asyncio.run(story(write_config(before.home, '[guest]\nsandbox = "best-effort"\n')))
        worker.communicate(timeout=PATIENCE)
    held_by = ledger.read(lambda c: c.execute(select(Attempt.sandbox)).scalar_one())
    assert "limits" in held_by


def test_a_worker_that_waits_for_an_artifact_can_be_stopped(
    ledger: Ledger, settings: Settings, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(ledger, settings, "behaves", BEHAVES, "1.0.0")
    (source / "a.do").write_text("fine")
    scan(ledger, add_root(ledger, source))
    endpoint = free_endpoint()
    asked = asyncio.Event()
    real = Sentinel._send

    async def send(self: Sentinel, identity: bytes, message: protocol.AnyMessage) -> None:
        if isinstance(message, protocol.Artifact):  # as if it were lost, each time
            asked.set()
        else:
            await real(self, identity, message)

    monkeypatch.setattr(Sentinel, "_send", send)

    async def story(worker: subprocess.Popen[str]) -> None:
        async with main.running(
            settings, "test", workers=0, watch=False, endpoints=[endpoint]
        ) as daemon:
            await eventually(asked.is_set)
            worker.terminate()
            await eventually(lambda: not daemon.sentinel.workers)

    with start(settings, WORKER, "--connect", endpoint) as worker:
        asyncio.run(story(worker))
        assert "worker stopped" in worker.communicate(timeout=PATIENCE)[1]
    assert ledger.read(jobs.counts) == {"QUEUED": 1}
    assert attempts(ledger) == ["RELEASED"]
