"""`casparian start`, `casparian wait` and `casparian init`."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from casparian_flow.cli import context
from casparian_flow.errors import counted

if TYPE_CHECKING:
    from casparian_flow.cli.context import Here, Line
    from casparian_flow.main import Daemon


TICK_SECONDS = 0.5

TICK_SHARE = 20
"""Counting in a large ledger is slow: at most a twentieth of the time is spent on it."""


def start(
    ctx: typer.Context,
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=64, metavar="N", help="Number of workers; default: as configured."),
    ] = None,
) -> None:
    """Watch the source roots and run their jobs.

    Runs until Ctrl-C or SIGTERM; running jobs may then finish.
    """
    import asyncio

    with context.opened(ctx) as here, context.line(chatty=True) as line:
        count = workers or here.settings.workers.effective
        tally = _Tally(here)
        asyncio.run(_run(here, count, line, tally))
        line.clear()
        words = tally.fresh_words()
        for named in tally.take_named():
            context.note(named)
        context.note(f"stopped: {words}")


async def _run(here: Here, workers: int, line: Line, tally: _Tally) -> None:
    import asyncio

    from casparian_flow import main

    stop = asyncio.Event()
    main.stop_on_signals(stop)
    async with main.running(
        here.settings, "casparian start", workers=workers, watch=True
    ) as daemon:
        line.write("".join(f"{words}\n" for words in [*daemon.adopted, _watched(here)]))
        while not stop.is_set():
            line.show(await asyncio.to_thread(_state, here, daemon, tally))
            for words in tally.take_named():
                line.write(f"{context.printable(words)}\n")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await stop.wait()
        grace = here.settings.jobs.drain_seconds
        line.write(f"stopping: waiting up to {grace:g} s for running jobs to finish\n")


def _watched(here: Here) -> str:
    """The watched source roots, and advice."""
    from casparian_flow.db import views
    from casparian_flow.services.report import advise

    lines = [
        f"watching {root['name']} ({root['path']})"
        for root in here.ledger.read(views.roots)
        if root["active"]
    ]
    lines += [f"{a.words}\n  try: {a.command}" for a in advise(here.settings, here.ledger)]
    return context.printable("\n".join(lines))


class _Tally:
    """Counts of jobs, rows and rejects since the start, and versions with many rejects."""

    def __init__(self, here: Here) -> None:
        self._here = here
        self._due = 0.0
        self._words = ""
        self._named: list[str] = []
        self._rows = self._rejects = 0
        self._seen = self._committed(1 << 62)[1]

    def words(self) -> str:
        """The counts; not recomputed each time if that is slow."""
        if (began := time.monotonic()) >= self._due:
            self._words = self.fresh_words()
            self._due = began + TICK_SHARE * (time.monotonic() - began)
        return self._words

    def fresh_words(self) -> str:
        """The counts, recomputed."""
        self._look()
        came = context.amount(self._rows, self._rejects)
        return ", ".join(filter(None, [_counts(self._here), came]))

    def take_named(self) -> list[str]:
        """A line for each version with more than 1 % rejects; each is returned once."""
        found, self._named = self._named, []
        return found

    def _look(self) -> None:
        from casparian_flow.db import outputs

        job_ids, self._seen = self._committed(self._seen)
        if not job_ids:
            return
        came = self._here.ledger.read(lambda c: outputs.rejected_of_jobs(c, job_ids))
        self._rows += came.rows
        self._rejects += came.rejects
        if not came.rejects:
            return
        rows = self._here.ledger.read(lambda c: outputs.reject_counts(c, context.LIMIT, job_ids))
        self._named += [f"rejects: {context.rejected(row)}" for row in reversed(rows)]
        if more := rows.total - len(rows):
            self._named.append(f"and {more:,} more: casparian jobs --rejects --all")

    def _committed(self, after: int) -> tuple[list[int], int]:
        from casparian_flow.db import outputs

        return self._here.ledger.read(lambda c: outputs.rejected_since(c, after))


def _state(here: Here, daemon: Daemon, tally: _Tally) -> str:
    from casparian_flow.db import views
    from casparian_flow.db.states import PAUSED

    files = sum(r["files"] for r in here.ledger.read(views.roots) if r["active"])
    workers = counted(daemon.sentinel.workers, "worker")
    paused = here.ledger.read(lambda c: views.waiting(c, PAUSED)).reason
    refused = str(daemon.sentinel.refused)
    wire = f"network refused: {refused}" if refused else ""
    words = [counted(files, "file"), tally.words(), workers, paused, wire]
    return " | ".join(filter(None, words))


def _counts(here: Here) -> str:
    """Jobs by status; zeros are left out."""
    from casparian_flow.services.report import counts

    found = counts(here.ledger)
    shown = ("QUEUED", "RUNNING", "COMMITTING", "COMPLETED", "FAILED", "held", "gone unread")
    return ", ".join(f"{found[s]:,} {s.lower()}" for s in shown if s in found) or "no jobs"


def wait(
    ctx: typer.Context,
    idle: Annotated[
        bool, typer.Option("--idle", help="Until all files are scanned and all jobs are done.")
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="Give up after this time; default: never."),
    ] = None,
) -> None:
    """Wait until the daemon has scanned everything and is idle.

    That is: a full scan begun after this call has finished, no file is still being written, and no
    job is queued, running or committing.
    """
    if not idle:
        raise typer.BadParameter("give --idle")
    from casparian_flow.services.idle import wait_until_idle

    with context.opened(ctx) as (settings, ledger):
        wait_until_idle(settings, ledger, timeout)


# `casparian init`.


def init(
    ctx: typer.Context,
    folder: Annotated[
        str | None, typer.Argument(metavar="DIR", help="The directory; default: the current one.")
    ] = None,
) -> None:
    """Create a configuration file and its database.

    Existing files are kept.
    """
    from casparian_flow import config

    file = Path(folder).absolute() / config.FILE_NAME if folder else config.named(ctx.obj)
    file = file or Path.cwd() / config.FILE_NAME
    if file.exists():
        context.say(f"{file} already exists")
    else:
        _write(file)
        context.say(f"wrote {file}")
    ctx.obj = str(file)
    with context.opened(ctx) as (settings, _):
        context.say(f"the database is {settings.database.path}")
    context.note(
        "next:\n  casparian source add DIR        the directory to watch"
        "\n  casparian scan                  record its files"
        "\n  casparian table add NAME GLOB   a typed table of those that match, without code"
        "\n  casparian publish PLUGIN        or the code that turns them into rows"
        "\n  casparian start                 watch the directory and run jobs"
    )


def _write(file: Path) -> None:
    """The required table, and every default as a comment."""
    import glob

    from casparian_flow import durable
    from casparian_flow.errors import ConfigError

    try:
        # A scan of this folder must ignore the configuration.
        durable.own(file.parent, glob.escape(file.name))
        durable.write_once(file, _text().encode())
    except OSError as error:
        raise ConfigError(
            f"cannot write {file}: {error.strerror}", "choose a directory that you can write to"
        ) from error


def _text() -> str:
    import msgspec

    from casparian_flow.config import Settings

    defaults: dict[str, Any] = msgspec.to_builtins(Settings(), enc_hook=str)
    lines = [
        "# Casparian Flow. Relative paths start at the folder of this file.",
        "",
        "[database]",
        f"db_location = {json.dumps(defaults['database']['db_location'])}",
        "",
        "# The defaults follow; docs/configuration.md explains each key.",
    ]
    for section, values in defaults.items():
        if section not in ("home", "database"):
            lines += ["", f"# [{section}]"]
            lines += [f"# {name} = {json.dumps(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"
