"""`casparian backup`."""

from __future__ import annotations

from typing import Annotated

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import AsJson
from casparian_flow.wording import tallied


def backup(
    ctx: typer.Context,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The file to write.")],
    force: Annotated[
        bool, typer.Option("--force", help="Replace the file if it is there.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Copy the ledger to a file, while work goes on.

    The copy is checked before it gets its name. Outputs are not in it: they are in their sinks.
    """
    from casparian_flow.services import backup as service

    with context.opened(ctx) as (settings, ledger):
        made = service.make(settings, ledger, target, force=force)
    if as_json:
        context.document(made._asdict())
        return
    context.say(f"backup  {made.path} ({made.size_bytes:,} bytes)")
    context.say(f"holds   {tallied(made.holds)}")
    context.say(f"head    {made.head}")
