"""`casparian retract`."""

from __future__ import annotations

from typing import Annotated

import typer

from casparian_flow.cli import context
from casparian_flow.wording import counted


def retract(
    ctx: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            metavar="PATH|VERSION",
            help="A file, as NAME/path or as a path from here: all its versions. Or the id of one "
            "version.",
        ),
    ],
    undo: Annotated[
        bool, typer.Option("--undo", help="Bring back what was retracted, as it was.")
    ] = False,
) -> None:
    """Take a file's rows out of every sink's sight.

    The sinks keep them, and no reader, query or later version brings them back but --undo. The
    audit has who did it.
    """
    from casparian_flow.services.retract import retract as ask

    with context.opened(ctx) as (settings, ledger):
        done = ask(ledger, settings, name, undo=undo)
    word = "reinstated" if undo else "retracted"
    for row in done:
        rows = counted(row.rows, "row")
        context.say(f"{word}: {rows} of {row.rel_path} version {row.ordinal}: {row.target}")
