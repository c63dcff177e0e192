"""Run the daemon with two workers until every job is COMPLETED; with --scan, scan first."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from casparian_flow import config, main
from casparian_flow.config import Settings
from casparian_flow.db import jobs
from casparian_flow.db.access import open_ledger
from casparian_flow.db.states import JobStatus
from casparian_flow.services import scout

LOOK_SECONDS = 0.1


def queue_by_scan(settings: Settings) -> float:
    """Seconds that the first scan takes: find, hash, record and queue every file."""
    with open_ledger(settings.database) as ledger:
        started = time.perf_counter()
        for root in scout.roots(ledger):
            scout.scan_until_settled(ledger, root)
        return time.perf_counter() - started


async def run_jobs(settings: Settings) -> float:
    """Seconds from the start of the running daemon to the end of the last job."""
    async with main.running(settings, "benchmark", workers=2, watch=False) as daemon:
        started = time.perf_counter()
        while (tally := await daemon.ledger.read_soon(jobs.counts)).keys() & set(jobs.UNFINISHED):
            await asyncio.sleep(LOOK_SECONDS)
        seconds = time.perf_counter() - started
    if tally.keys() != {JobStatus.COMPLETED}:
        sys.exit(f"jobs ended as {tally}")
    return seconds


if __name__ == "__main__":
    settings = config.load()
    figures = {"queueing": queue_by_scan(settings)} if "--scan" in sys.argv else {}
    figures["jobs"] = asyncio.run(run_jobs(settings))
    Path("figures.json").write_text(json.dumps(figures))
