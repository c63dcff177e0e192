"""The daemon and its commands, in this process and as processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import select

from casparian_flow import config, main
from casparian_flow.config import Settings
from casparian_flow.db import jobs
from casparian_flow.db.access import Ledger
from casparian_flow.db.models import Attempt, FileLocation, FileVersion, ProcessingJob
from casparian_flow.main import Daemon
from tests.eventually import PATIENCE, eventually, wait_until

WORK_SECONDS = 300.0
"""How long a daemon may take over its jobs; the first test to run builds an environment."""

CLI = "casparian_flow.cli"
DAEMON = "casparian_flow.main"
WORKER = "casparian_flow.engine.worker_client"


async def all_done(daemon: Daemon, seconds: float = WORK_SECONDS) -> dict[str, int]:
    """Wait until there are jobs and all have ended; how many have each status."""

    async def ended() -> dict[str, int]:
        counts = await daemon.ledger.read_soon(jobs.counts)
        return {} if set(counts) & set(jobs.UNFINISHED) else counts

    return await eventually(ended, seconds)


def work_off(settings: Settings, workers: int = 2, seconds: float = WORK_SECONDS) -> dict[str, int]:
    """Run a daemon until all jobs have ended; how many have each status."""

    async def story() -> dict[str, int]:
        async with main.running(settings, "test", workers=workers, watch=False) as daemon:
            return await all_done(daemon, seconds)

    return asyncio.run(story())


async def counted(ledger: Ledger, status: str) -> int:
    """How many jobs have a status."""
    return (await ledger.read_soon(jobs.counts)).get(status, 0)


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


def attempts(ledger: Ledger) -> list[str]:
    """How each attempt ended, job by job."""
    query = select(Attempt.outcome).order_by(Attempt.job_id, Attempt.fence)
    return ledger.read(lambda c: list(c.execute(query).scalars()))


def given(settings: Settings) -> list[Path]:
    """The files `*.do` that guests have been given to work."""
    return list(settings.database.guests_folder.glob("*/in/**/*.do"))


async def at_work(settings: Settings) -> None:
    """Wait until a guest has been given a file `*.do`."""
    await eventually(lambda: given(settings), WORK_SECONDS)


def guests() -> list[psutil.Process]:
    """The guests of daemons in this process."""
    return [p for p in psutil.Process().children(recursive=True) if "guest.py" in str(p.cmdline())]


class Process(subprocess.Popen[str]):
    """Killed where the block that has it fails: it would be waited for without end."""

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, *rest)


def environment(settings: Settings) -> dict[str, str]:
    """Of a command under this configuration."""
    return {**os.environ, "CASPARIAN_CONFIG": str(settings.home / config.FILE_NAME)}


def start(settings: Settings, module: str, *arguments: str, **options: Any) -> Process:
    """A command as a process of its own; what it says is piped.

    Args:
        options: of `Popen`, in place of that.
    """
    options = {"stderr": subprocess.PIPE, "text": True, **options}
    command = [sys.executable, "-m", module, *arguments]
    return Process(command, env=environment(settings), **options)


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
            status = process.wait(PATIENCE)
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
