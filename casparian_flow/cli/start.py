"""`casparian start` and `casparian wait`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from casparian_flow.cli import context

if TYPE_CHECKING:
    from casparian_flow.cli.context import Here
    from casparian_flow.cli.progress import Line
    from casparian_flow.main import Daemon

TICK_SECONDS = 0.5


def start(
    ctx: typer.Context,
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=64, metavar="N", help="Workers; else as configured."),
    ] = None,
) -> None:
    """Watch the source roots and work their jobs.

    Until Ctrl-C or SIGTERM; then running jobs may finish.
    """
    import asyncio

    from casparian_flow.cli import progress

    with context.opened(ctx) as here, progress.line(chatty=True) as line:
        count = workers or here.settings.workers.effective
        asyncio.run(_run(here, count, line))
        line.clear()
        context.note(f"stopped: {_counts(here)}")


async def _run(here: Here, workers: int, line: Line) -> None:
    import asyncio

    from casparian_flow import main

    stop = asyncio.Event()
    main.stop_on_signals(stop)
    async with main.running(
        here.settings, "casparian start", workers=workers, watch=True
    ) as daemon:
        line.write("".join(f"{words}\n" for words in [*daemon.adopted, _watched(here)]))
        while not stop.is_set():
            line.show(await asyncio.to_thread(_state, here, daemon))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await stop.wait()
        grace = here.settings.jobs.drain_seconds
        line.write(f"stopping: running jobs may finish, for at most {grace:g} s\n")


def _watched(here: Here) -> str:
    """What is watched, and what is missing."""
    from casparian_flow.db import views
    from casparian_flow.services.report import advise

    lines = [
        f"watching {root['name']} ({root['path']})"
        for root in here.ledger.read(views.roots)
        if root["active"]
    ]
    lines += [f"{words}\n  try: {command}" for words, command in advise(here.settings, here.ledger)]
    return context.printable("\n".join(lines))


def _state(here: Here, daemon: Daemon) -> str:
    from casparian_flow.db import views
    from casparian_flow.engine.committer import PAUSED

    files = sum(r["files"] for r in here.ledger.read(views.roots) if r["active"])
    workers = f"{daemon.sentinel.workers} workers"
    paused = here.ledger.read(lambda c: views.waiting(c, PAUSED)).reason
    refused = str(daemon.sentinel.refused)
    wire = f"wire refused: {refused}" if refused else ""
    return " | ".join(filter(None, [f"{files} files", _counts(here), workers, paused, wire]))


def _counts(here: Here) -> str:
    from casparian_flow.db import jobs

    counts = here.ledger.read(jobs.counts)
    shown = ("QUEUED", "RUNNING", "COMMITTING", "COMPLETED", "FAILED")
    return ", ".join(f"{counts.get(status, 0)} {status.lower()}" for status in shown)


def wait(
    ctx: typer.Context,
    idle: Annotated[
        bool, typer.Option("--idle", help="Until everything is scanned and done.")
    ] = False,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="How long at the most.")
    ] = None,
) -> None:
    """Wait until the daemon has seen and done everything.

    That is: a full scan begun after this call has finished, all files were at rest, and no job
    is queued, running or committing.
    """
    if not idle:
        raise typer.BadParameter("say what to wait for: --idle")
    from casparian_flow.services.idle import wait_until_idle

    with context.opened(ctx) as (settings, ledger):
        wait_until_idle(settings, ledger, timeout)
