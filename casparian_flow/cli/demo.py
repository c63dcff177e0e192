"""`casparian demo`: the whole job on messy files, by the commands that a person would type."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from casparian_flow.cli import context

if TYPE_CHECKING:
    from casparian_flow.cli.progress import Line
    from casparian_flow.config import Settings
    from casparian_flow.main import Daemon

WORKERS = 2
TICK_SECONDS = 0.1
PATIENCE_SECONDS = 120

TABLES = (
    'select Auftrag, Kunde, "Betrag €", Datum, _cf_job_id from delimited where Auftrag is not null',
    "select station, city, name, name_2, _cf_job_id from delimited where station is not null",
    "select sensor, celsius, ok, tags, _cf_job_id from json",
    "select * exclude (_cf_source_hash, _cf_file_version_id, _cf_plugin_version) from excel",
    "select time, client, status, method, target, _cf_job_id from access_log",
)
REJECTS = (
    "select line, reason, raw, _cf_job_id from delimited_rejects_history",
    "select count(*) as rejects_of_the_latest_versions from delimited_rejects",
    "select line, reason, raw, _cf_job_id from json_rejects",
    "select line, reason, raw, _cf_job_id from access_log_rejects",
)


def demo(
    folder: Annotated[
        str | None,
        typer.Argument(metavar="DIR", help="Absent or empty; else a new scratch directory."),
    ] = None,
) -> None:
    """See it work on messy files that we made.

    In a directory of its own, which stays there to be looked at. Fails if anything it shows is
    not as it should be.
    """
    import time

    from casparian_flow import config
    from casparian_flow.services import demo as stage

    began = time.monotonic()
    home = stage.prepare(folder)
    with contextlib.chdir(home):
        _say("A directory of messy files, watched")
        context.say(f"$ cd {shlex.quote(str(home))}")
        _casparian("init")
        _casparian("source", "add", stage.INBOX, "--settle", str(stage.SETTLE_SECONDS))
        _say("The plugins that read them: locked, signed, each with an environment of its own")
        for plugin in stage.PLUGINS:
            _casparian("publish", plugin)
        _run_daemon(home)
        _say("What became of the files: edited, two versions; touched, still one")
        _casparian("versions", f"{stage.INBOX}/{stage.EDITED}")
        _casparian("versions", f"{stage.INBOX}/{stage.TOUCHED}")
        _casparian("jobs")
        _casparian("topics")
        _show_tables()
        settings = config.load(str(home / config.FILE_NAME))
        _prove(settings)
    context.say(f"All of it held, in {time.monotonic() - began:.0f} s. It is left in {home}")
    _look_further(home)


def _say(words: str) -> None:
    context.say(f"== {words}")


def _casparian(*words: str) -> None:
    """Show a command, and run it.

    Raises:
        CasparianError: it ended with an error.
    """
    from casparian_flow import config
    from casparian_flow.cli import app
    from casparian_flow.errors import CasparianError

    shown = shlex.join(["casparian", *words])
    context.say(f"$ {shown}")
    arguments = ["--config", config.FILE_NAME, *words]
    if code := app(arguments, prog_name="casparian", standalone_mode=False):
        raise CasparianError(f"{shown} ended with {code}, in {Path.cwd()}", "see what it said")
    context.say("")


def _run_daemon(home: Path) -> None:
    """Run what `casparian start` runs, and change two files under it."""
    import asyncio

    from casparian_flow import config
    from casparian_flow.cli import progress

    _say("The daemon, and two changes under it")
    context.say(f"$ casparian start --workers {WORKERS}    (here, in this process)")
    settings = config.load(str(home / config.FILE_NAME))
    with progress.line(chatty=True) as line:
        asyncio.run(_watch_and_edit(settings, home, line))
    context.say("the daemon has stopped\n")


async def _watch_and_edit(settings: Settings, home: Path, line: Line) -> None:
    from casparian_flow import main
    from casparian_flow.services import demo as stage

    async with main.running(settings, "casparian demo", workers=WORKERS, watch=True) as daemon:
        await _until_idle(daemon, line)
        context.say(f"{stage.EDITED} is edited in place: order 1004 gets its missing field")
        stage.edit(home)
        context.say(f"{stage.TOUCHED} is touched: new times, the same bytes\n")
        stage.touch(home)
        await _until_idle(daemon, line)


async def _until_idle(daemon: Daemon, line: Line) -> None:
    import asyncio

    progress = asyncio.create_task(_show_progress(daemon, line))
    try:
        await asyncio.to_thread(_casparian, "wait", "--idle", "--timeout", str(PATIENCE_SECONDS))
    finally:
        progress.cancel()


async def _show_progress(daemon: Daemon, line: Line) -> None:
    import asyncio

    from casparian_flow.db import jobs

    while True:
        counts = await daemon.ledger.read_soon(jobs.counts)
        line.show(", ".join(f"{n} {status}" for status, n in sorted(counts.items())))
        await asyncio.sleep(TICK_SECONDS)


def _show_tables() -> None:
    from importlib.util import find_spec

    if not find_spec("duckdb"):
        context.note("(to see the tables: pip install 'casparian-flow[query]')")
        return
    _say("The tables: what the latest version of each file gave")
    for question in TABLES:
        _casparian("query", question, "--limit", "3")
    _say("What no row could be made of: with line, reason and text; nothing is dropped silently")
    for question in REJECTS:
        _casparian("query", question)


def _prove(settings: Settings) -> None:
    from casparian_flow.db.access import open_ledger
    from casparian_flow.errors import CasparianError
    from casparian_flow.services import demo as stage

    _say("One row, traced to the bytes it came from")
    with open_ledger(settings.database) as ledger:
        if broken := stage.broken_promises(ledger):
            raise CasparianError(
                "\n  ".join(["not as the demo promises:", *broken]), "casparian jobs show ID"
            )
        context.facts(stage.trace(ledger))
        context.say("")
    _say("And every other claim")
    _casparian("verify")


def _look_further(home: Path) -> None:
    """Commands to paste, whether or not the environment's programs are on the PATH."""
    program = Path(sys.argv[0])
    command = str(program.absolute()) if program.name == "casparian" else "casparian"
    context.say(f"  cd {shlex.quote(str(home))}")
    for words in (
        "status",
        "jobs show 1",
        'query "select * from delimited_history"',
        "verify --json",
        "start          (and edit a file in inbox meanwhile)",
    ):
        context.say(f"  {shlex.quote(command)} {words}")
