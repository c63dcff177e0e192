"""Drop files into the source root of a running daemon, and measure from the close of each to its
queued job: notice.py COUNT. The settle window is subtracted.

`notice.py --daemon` is that daemon, without Workers.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from casparian_flow import config, main
from casparian_flow.config import Settings

SEED = 20_260_101
SETTLE_SECONDS = 0.5
PAUSE_SECONDS = 0.1
"""Mean of the pauses between two files."""
LOOK_SECONDS = 0.001

_QUEUED = """
SELECT j.id, l.path FROM cf_processing_queue j
JOIN cf_file_version v ON v.id = j.file_version_id
JOIN cf_file_location l ON l.id = v.location_id WHERE j.id > ? ORDER BY j.id
"""


async def _daemon(settings: Settings) -> None:
    stop = asyncio.Event()
    main.stop_on_signals(stop)
    async with main.running(settings, "benchmark", workers=0, watch=True) as daemon:
        assert daemon.watch is not None
        while not daemon.watch.last:
            await asyncio.sleep(0.01)
        print(flush=True)
        await stop.wait()


def _pss_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def _drop(ledger: sqlite3.Connection, folders: list[Path], count: int) -> list[float]:
    """Seconds from the close of each file to its job, in the order of the jobs."""
    chance = random.Random(SEED)
    (last,) = ledger.execute("SELECT coalesce(max(id), 0) FROM cf_processing_queue").fetchone()
    closed: dict[bytes, float] = {}
    found: list[float] = []
    next_drop = time.monotonic()
    while len(found) < count:
        now = time.monotonic()
        if len(closed) < count and now >= next_drop:
            file = chance.choice(folders) / f"dropped-{time.time_ns()}.txt"
            file.write_text(file.name)
            closed[os.fsencode(file.name)] = time.monotonic()
            next_drop = now + chance.expovariate(1 / PAUSE_SECONDS)
        for job, path in ledger.execute(_QUEUED, (last,)).fetchall():
            found.append(time.monotonic() - closed[path.rpartition(b"/")[2]])
            last = job
        time.sleep(LOOK_SECONDS)
    return found


def notice(settings: Settings, count: int) -> dict[str, float]:
    """Percentiles of the seconds beyond the settle window."""
    ledger = sqlite3.connect(settings.database.path)
    ledger.execute("UPDATE cf_source_root SET settle_seconds = ?", (SETTLE_SECONDS,))
    ledger.commit()
    (path,) = ledger.execute("SELECT path FROM cf_source_root").fetchone()
    folders = sorted(each for each in Path(path).iterdir() if each.is_dir())
    command = [sys.executable, __file__, "--daemon"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as daemon:
        try:
            assert daemon.stdout is not None
            assert daemon.stdout.readline() == b"\n"
            beyond = sorted(each - SETTLE_SECONDS for each in _drop(ledger, folders, count))
            print(f"PSS of the daemon: {_pss_mib(daemon.pid):.0f} MiB")
        finally:
            daemon.terminate()
    for folder in folders:  # the next round has the same tree
        for file in folder.glob("dropped-*"):
            file.unlink()
    shares = {"median": 0.5, "p95": 0.95, "p99": 0.99}
    figures = {name: beyond[int(share * count)] for name, share in shares.items()}
    return {f"close to queued, {name}": seconds for name, seconds in figures.items()}


if __name__ == "__main__":
    settings = config.load()
    if sys.argv[1] == "--daemon":
        asyncio.run(_daemon(settings))
    else:
        figures = notice(settings, int(sys.argv[1]))
        print(figures)
        Path("figures.json").write_text(json.dumps(figures))
