"""The daemon and its commands, in this process and as processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from sqlalchemy import select

from casparian_flow import config, main
from casparian_flow.config import Settings
from casparian_flow.db import jobs
from casparian_flow.db.access import Ledger
from casparian_flow.db.models import FileLocation, FileVersion, ProcessingJob
from casparian_flow.main import Daemon
from tests.until import wait_until

PATIENCE = 120.0
"""Seconds; the first test to run builds the plugins' environment."""

CLI = "casparian_flow.cli"
WORKER = "casparian_flow.engine.worker_client"


async def all_done(daemon: Daemon) -> dict[str, int]:
    """Wait until no job is unfinished."""
    async with asyncio.timeout(PATIENCE):
        while True:
            counts = await daemon.ledger.read_soon(jobs.counts)
            if counts and not set(counts) & set(jobs.UNFINISHED):
                return counts
            await asyncio.sleep(0.02)


def work_off(settings: Settings) -> dict[str, int]:
    """Run a daemon with two workers until no job is unfinished; how many jobs have each status."""

    async def story() -> dict[str, int]:
        async with main.running(settings, "test", workers=2, watch=False) as daemon:
            return await all_done(daemon)

    return asyncio.run(story())


def outcomes(ledger: Ledger) -> dict[str, tuple[str, str]]:
    """File name -> (status, reason)."""
    rows = ledger.read(
        lambda c: c.execute(
            select(FileLocation.rel_path, ProcessingJob.status, ProcessingJob.reason)
            .join(FileVersion, FileVersion.location_id == FileLocation.id)
            .join(ProcessingJob, ProcessingJob.file_version_id == FileVersion.id)
        ).all()
    )
    return {row[0]: (row[1], row[2]) for row in rows}


def environment(settings: Settings) -> dict[str, str]:
    """Of a command under this configuration."""
    return {**os.environ, "CASPARIAN_CONFIG": str(settings.home / config.FILE_NAME)}


def start(
    settings: Settings, module: str, *arguments: str, **options: Any
) -> subprocess.Popen[str]:
    """A command as a process of its own; what it says is piped.

    Args:
        options: of `Popen`, in place of that.
    """
    options = {"stderr": subprocess.PIPE, "text": True, **options}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, env=environment(settings), **options)


@contextlib.contextmanager
def started(settings: Settings) -> Iterator[None]:
    """`casparian start`, stopped by SIGTERM.

    Raises:
        AssertionError: it ended by itself, or with an error.
    """
    log = settings.home / "daemon.log"
    with (
        log.open("w") as file,
        start(settings, CLI, "start", stderr=file, stdout=file) as process,
    ):
        try:
            wait_until(
                lambda: settings.database.control_socket.exists() or process.poll() is not None
            )
            assert process.poll() is None, log.read_text()
            yield
        finally:
            process.terminate()
            status = process.wait(60)
        assert status == 0, log.read_text()


def said(process: subprocess.Popen[str], words: str) -> str:
    """Read what a process says until it says these words."""
    assert process.stderr is not None
    heard = ""
    for line in process.stderr:
        heard += line
        if words in line:
            return heard
    raise AssertionError(f"it ended and never said {words!r}:\n{heard}")


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def free_endpoint(host: str = "127.0.0.1") -> str:
    """An endpoint that nobody listens on now."""
    return f"tcp://[{host}]:{free_port(host)}" if ":" in host else f"tcp://{host}:{free_port()}"
