"""`casparian upgrade`: bring sinks of an earlier release up to date."""

from __future__ import annotations

import dataclasses

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import AsJson
from casparian_flow.errors import ExitCode


def upgrade(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Bring sinks that an earlier release wrote up to date.

    The ledger has been brought up to date already, after a backup beside it. Readers see the same
    rows before and after; what the rules of this release show otherwise is listed. It may be
    stopped at any step and run again, also while the daemon runs.
    """
    from casparian_flow.services import upgrade as service

    with context.opened(ctx) as (settings, ledger):
        done = service.upgrade(settings, ledger)
    if as_json:
        context.document([dataclasses.asdict(one) for one in done])
    else:
        for one in done:
            for sentence in one.converted:
                context.say(f"converted  {sentence}")
            for sentence in one.changed:
                context.say(f"changed    {one.location}: {sentence}")
            if one.problem:
                context.note(f"error: {one.location}: {one.problem}")
                context.note(f"  try: {one.hint}" if one.hint else "  it was left as it was")
        if not any(one.converted or one.changed or one.problem for one in done):
            context.say("every sink is up to date")
    if any(one.problem for one in done):
        raise typer.Exit(ExitCode.FAILED)
