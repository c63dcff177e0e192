"""One-shot scans beside a daemon, two daemons, and a daemon told to stop while it works."""

from __future__ import annotations

import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from sqlalchemy import func, select

from casparian_flow.config import Settings
from casparian_flow.db import jobs
from casparian_flow.db.access import Ledger
from casparian_flow.db.models import FileVersion
from casparian_flow.services.idle import wait_until_idle
from casparian_flow.services.scan import scan
from tests.commands import Casparian
from tests.conftest import write_config
from tests.daemons import CLI, WORK_SECONDS, start, started
from tests.eventually import PATIENCE, wait_until
from tests.factories import add_root
from tests.plugs import BEHAVES, ROWS, publish

SCANS = 8
"""`python -m proofs.chaos kills` has hundreds, and kills them too."""
AT_ONCE = 4
JOBS = 24


@pytest.mark.slow
def test_scans_from_cron_beside_a_daemon_lose_and_double_nothing(
    ledger: Ledger, settings: Settings, source: Path
) -> None:
    add_root(ledger, source)
    publish(ledger, settings, "rows", ROWS, "1.0.0")
    casparian = Casparian(settings.home)
    with started(settings), ThreadPoolExecutor(AT_ONCE) as pool:

        def change_and_scan(n: int) -> subprocess.CompletedProcess[str]:
            (source / f"{n % 10}.tmp").write_text(f"content {n}\n")
            (source / f"{n % 10}.tmp").replace(source / f"{n % 10}-{n}.txt")
            return casparian.process("scan")

        for done in pool.map(change_and_scan, range(SCANS)):
            assert done.stderr == ""
        wait_until_idle(settings, ledger, WORK_SECONDS)
    versions = ledger.read(lambda c: c.execute(select(func.count(FileVersion.id))).scalar_one())
    assert versions == SCANS
    assert ledger.read(jobs.counts) == {"COMPLETED": SCANS}
    casparian.process("verify")


@pytest.mark.slow
def test_a_second_start_says_who_holds_the_database(ledger: Ledger, settings: Settings) -> None:
    with started(settings):
        second = Casparian(settings.home).process("start", code=75)
    assert "casparian start holds" in second.stderr


@pytest.mark.slow
def test_sigterm_while_jobs_run_leaves_nothing_running_and_the_rest_is_finished_later(
    ledger: Ledger, tmp_path: Path, source: Path
) -> None:
    settings = write_config(tmp_path / "flow")
    root = add_root(ledger, source)
    publish(ledger, settings, "behaves", BEHAVES, "1.0.0")
    for n in range(JOBS):
        (source / f"{n}.do").write_text(f"slow {0.1 + n / 1000}")
    scan(ledger, root)
    with start(settings, CLI, "start") as process:
        wait_until(lambda: ledger.read(jobs.counts).get("COMPLETED"), WORK_SECONDS)
        guests = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    counts = ledger.read(jobs.counts)
    assert counts["QUEUED"] > 0
    assert set(counts) == {"QUEUED", "COMPLETED"}
    assert not [guest for guest in guests if guest.is_running()]
    casparian = Casparian(settings.home)
    casparian.process("scan", "--drain")
    assert ledger.read(jobs.counts) == {"COMPLETED": JOBS}
    casparian.process("verify")
