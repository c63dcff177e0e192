"""A daemon that is stopped while files are created: its kernel queue overflows, and it must say so.

`python -m proofs.detection.missed CONFIG` is that daemon.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from casparian_flow import config, main
from casparian_flow.config import Settings
from casparian_flow.db import versions, views
from casparian_flow.db.access import Ledger, open_ledger
from casparian_flow.db.models import FileVersion
from casparian_flow.services import watch
from tests.conftest import write_config
from tests.eventually import wait_until
from tests.factories import add_root

PATIENCE = 300.0

FOLDERS = 20
"""Files are created in one after the other: no event announces the last ones."""


@dataclass
class Tally:
    """What came of it."""

    files: int
    recorded: int
    recorded_after: float
    """Seconds from the daemon's going on until all were recorded."""
    missed: int
    missed_after: float
    """Seconds until the count was there."""
    watch: str
    replaced: int
    """Observers that were replaced."""


def run(base: Path, files: int, extra: str = "", folders: int = FOLDERS) -> Tally:
    """Stop a daemon, create files, let it go on, and wait for what it says of them.

    Args:
        folders: in the source root.
    """
    settings = write_config(base / "flow", extra)
    folder = base / "source"
    for n in range(folders):
        (folder / str(n)).mkdir(parents=True)
    said = base / "said"
    with open_ledger(settings.database) as ledger, said.open("w") as errors:
        root = add_root(ledger, folder)
        daemon = subprocess.Popen(
            [sys.executable, "-m", "proofs.detection.missed", settings.home / config.FILE_NAME],
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        try:
            assert daemon.stdout is not None
            assert daemon.stdout.readline() == b"watching\n"
            os.kill(daemon.pid, signal.SIGSTOP)
            for n in range(files):
                (folder / str(n * FOLDERS // files) / f"{n}").write_text(str(n))
            os.kill(daemon.pid, signal.SIGCONT)
            began = time.monotonic()
            wait_until(lambda: count(ledger) == files, PATIENCE)
            recorded_after = time.monotonic() - began
            wait_until(lambda: _state(ledger, root.id).missed > 0, PATIENCE)
            missed_after = time.monotonic() - began
            state = _state(ledger, root.id)
            shown = ledger.read(views.roots)[0]["missed"]
            assert shown == state.missed
            replaced = said.read_text().count("file events are unreliable")
            return Tally(
                files, count(ledger), recorded_after, state.missed, missed_after, state.watch,
                replaced,
            )  # fmt: skip
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
            daemon.terminate()
            daemon.communicate(timeout=60)


def _state(ledger: Ledger, root_id: int) -> Any:
    return ledger.read(lambda c: versions.scan_state(c, root_id))


def count(ledger: Ledger) -> int:
    """Locations that have a version."""
    query = select(func.count(FileVersion.location_id.distinct()))
    return ledger.read(lambda c: c.execute(query).scalar_one())


async def _daemon(settings: Settings) -> None:
    watch.REST_FACTOR = 1  # what a scan finds is counted by the next: soon, on a busy machine too
    stop = asyncio.Event()
    main.stop_on_signals(stop)
    async with main.running(settings, "test", workers=0, watch=True) as daemon:
        assert daemon.watch is not None
        while not daemon.watch.last:
            await asyncio.sleep(0.02)
        print("watching", flush=True)
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(_daemon(config.load(sys.argv[1])))
