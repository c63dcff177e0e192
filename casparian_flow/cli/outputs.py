"""`casparian outputs`: what stands in the sinks, and what a person took away there."""

from __future__ import annotations

from typing import Annotated

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import All, AsJson, Limit
from casparian_flow.wording import counted

app = context.group("List, forget and restore outputs.")

Name = Annotated[str, typer.Argument(metavar="TARGET|JOB", help="As in `casparian outputs list`.")]


@app.command("list")
def list_outputs(
    ctx: typer.Context,
    topic: Annotated[str | None, typer.Option(metavar="TOPIC", help="Only of this topic.")] = None,
    limit: Limit = None,
    every: All = False,
    as_json: AsJson = False,
) -> None:
    """List what was published, the newest first."""
    from casparian_flow.db import outputs

    most = context.wanted(limit, every)
    with context.opened(ctx) as (_, ledger):
        rows = ledger.read(lambda c: outputs.listed(c, most, topic))
    columns = "job topic state rows source rel_path version target"
    context.listing(rows, as_json, columns, "no outputs\n  try: casparian status")


@app.command()
def forget(ctx: typer.Context, name: Name) -> None:
    """Claim an output no more that was deleted or altered in its sink.

    `casparian verify` is content then, and queries pass it over. The audit keeps who said so.
    """
    from casparian_flow.services import outputs

    with context.opened(ctx) as (_, ledger):
        for target in outputs.forget(ledger, name):
            context.say(f"forgotten: {target}")


@app.command()
def restore(ctx: typer.Context, name: Name) -> None:
    """Have an output made again that was deleted or altered in its sink.

    Its job is queued again; the bytes of its version must still be there.
    """
    from casparian_flow.services import outputs

    with context.opened(ctx) as (settings, ledger):
        queued = outputs.restore(ledger, settings, name)
    context.say(f"{counted(len(queued), 'job')} queued")
