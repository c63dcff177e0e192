"""`casparian rules`: which files get which tag."""

from __future__ import annotations

from typing import Annotated

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import AsJson
from casparian_flow.wording import counted

app = context.group("Say which files get which tag.")


@app.command("list")
def list_(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List every rule and who subscribes to its tag."""
    from casparian_flow.db import views
    from casparian_flow.services.report import rule_fault

    with context.opened(ctx) as (_, ledger):
        rows = [{**r, "problem": rule_fault(r["pattern"])} for r in ledger.read(views.rules)]
    columns = "id pattern case tag priority plugins problem"
    context.listing(rows, as_json, columns, "no rules\n  try: casparian rules add PATTERN TAG")


@app.command()
def add(
    ctx: typer.Context,
    pattern: Annotated[
        str,
        typer.Argument(
            metavar="PATTERN",
            help="A glob: without a slash over the file's name, with one over its path.",
        ),
    ],
    tag: Annotated[str, typer.Argument(metavar="TAG", help="The tag that plugins subscribe to.")],
    priority: Annotated[
        int, typer.Option(metavar="N", help="Order of the jobs; higher runs first.")
    ] = 0,
    exact_case: Annotated[
        bool,
        typer.Option("--exact-case", help="Tell *.csv from *.CSV; else one rule matches both."),
    ] = False,
) -> None:
    """Give a tag to the files that match a pattern.

    Jobs that follow from it are queued at once.
    """
    from casparian_flow.services import changes

    with context.opened(ctx) as (settings, ledger):
        rule_id, queued = changes.add_rule(
            ledger, settings, pattern, tag, priority, any_case=not exact_case
        )
    some = counted(queued, "job")
    context.say(f"rule {rule_id} added; {some} queued for files already known")


@app.command()
def remove(
    ctx: typer.Context,
    rule_id: Annotated[int, typer.Argument(metavar="ID", help="As in `casparian rules list`.")],
) -> None:
    """Remove a rule; jobs it has queued stay."""
    from casparian_flow.services import changes

    with context.opened(ctx) as (settings, ledger):
        words = changes.remove_rule(ledger, settings, rule_id)
    context.say(f"rule {rule_id} removed: {words}")
