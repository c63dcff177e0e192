"""`casparian source`: the directories that are watched."""

from __future__ import annotations

from typing import Annotated

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import AsJson

app = context.group("Add, list and remove watched directories.")


@app.command()
def add(
    ctx: typer.Context,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The directory.")],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What to call it; else the directory's name.")
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Pass these over, as in a .gitignore; repeatable."),
    ] = None,
    settle: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="How long a file must be at rest; else 2."),
    ] = None,
) -> None:
    """Watch a directory.

    One that was removed before comes back with all that is known of it.
    """
    from casparian_flow.services import changes

    with context.opened(ctx) as (settings, ledger):
        added = changes.add_source(
            ledger, settings, folder, name=name, ignore=ignore or (), settle_seconds=settle
        )
    context.say(f"source root {added} added")


@app.command("list")
def list_(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List every source root and its last scan."""
    from casparian_flow.db import views

    with context.opened(ctx) as (_, ledger):
        rows = ledger.read(views.roots)
    columns = "name path active files unreadable unsettled scanned_at problem"
    context.listing(rows, as_json, columns, "no source root\n  try: casparian source add DIR")


@app.command()
def remove(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="As in `casparian source list`.")],
) -> None:
    """Stop watching a directory.

    Its files, versions, jobs and rows stay.
    """
    from casparian_flow.services import changes

    with context.opened(ctx) as (settings, ledger):
        changes.remove_source(ledger, settings, name)
    context.say(f"source root {name} removed; what is known of it stays")
