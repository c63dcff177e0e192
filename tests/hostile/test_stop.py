"""SIGTERM ends a daemon whatever its workers do; what they had in hand, the next one works."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from casparian_flow import config
from casparian_flow.config import Settings
from casparian_flow.db import jobs
from casparian_flow.db.access import Ledger
from casparian_flow.errors import ExitCode
from casparian_flow.services.scan import scan
from casparian_flow.services.verify import verify
from tests.conftest import write_config
from tests.daemons import CLI, WORK_SECONDS, environment, outcomes, said, start, work_off
from tests.eventually import PATIENCE, wait_until
from tests.factories import add_root
from tests.plugs import BEHAVES, publish

HANGS = """
import os, sys
from casparian_flow import main
from casparian_flow.engine import runner, sinks, worker_client
from casparian_flow.engine.sinks.stage import Stage

def hang(*_, **__):
    print("it hangs", file=sys.stderr, flush=True)
    os.read(os.pipe()[0], 1)

def spin(*_, **__):
    print("it hangs", file=sys.stderr, flush=True)
    while True:
        pass

{patch}
sys.argv = ["casparian", "start", "--workers", "1"]
from casparian_flow.cli import main
main()
"""


def configured(tmp_path: Path, old: str, new: str) -> Settings:
    file = write_config(tmp_path / "flow").home / config.FILE_NAME
    file.write_text(file.read_text().replace(old, new))
    return config.load(str(file))


@pytest.mark.parametrize(
    "patch", ["Stage.write = hang", "Stage.write = spin", "runner.bundle = hang"]
)
@pytest.mark.slow_but("Stage.write = hang")
def test_sigterm_ends_a_daemon_whose_worker_hangs_and_no_job_is_lost(
    ledger: Ledger, tmp_path: Path, source: Path, patch: str
) -> None:
    settings = configured(tmp_path, "[jobs]", "[jobs]\ndrain_seconds = 0.5")
    root = add_root(ledger, source)
    publish(ledger, settings, "behaves", BEHAVES, "1.0.0")
    for n in range(3):
        (source / f"{n}.do").write_text(f"fine {n}")
    scan(ledger, root)
    command = [sys.executable, "-c", HANGS.format(patch=patch)]
    pipes = {"stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(settings), **pipes) as daemon:
        said(daemon, "it hangs")
        guests = psutil.Process(daemon.pid).children(recursive=True)
        daemon.send_signal(signal.SIGTERM)
        words = daemon.communicate(timeout=PATIENCE)[1]
    assert daemon.returncode == ExitCode.DAEMON
    assert "hangs in a call" in words
    assert "stopped: " in words, "the ledger was closed in order"
    _, alive = psutil.wait_procs(guests, timeout=PATIENCE)
    assert not alive, "a guest outlived its worker"
    assert ledger.read(jobs.counts) == {"QUEUED": 3}
    assert work_off(settings) == {"COMPLETED": 3}
    assert {reason for _, reason in outcomes(ledger).values()} == {""}
    assert verify(settings, ledger).problems == []


def test_a_guest_that_takes_its_time_to_quit_is_waited_for(
    ledger: Ledger, tmp_path: Path, source: Path
) -> None:
    """Within what it has to quit: nobody hangs, and nothing is left of it."""
    late = BEHAVES.replace('what == "raise"', 'what == "late"').replace(
        'raise ValueError("no such thing")', "atexit.register(time.sleep, 1.5)"
    )
    late = late.replace("import ctypes", "import atexit, ctypes")
    settings = configured(tmp_path, "allow = [", 'allow = ["import:atexit", ')
    root = add_root(ledger, source)
    publish(ledger, settings, "behaves", late, "1.0.0")
    (source / "a.do").write_text("late")
    scan(ledger, root)
    with start(settings, CLI, "start", "--workers", "1") as daemon:
        wait_until(lambda: ledger.read(jobs.counts) == {"COMPLETED": 1}, WORK_SECONDS)
        daemon.send_signal(signal.SIGTERM)
        words = daemon.communicate(timeout=PATIENCE)[1]
    assert daemon.returncode == 0, words
    assert "hangs" not in words
    assert list(settings.database.guests_folder.iterdir()) == []
