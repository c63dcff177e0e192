"""`casparian rules`: which files get which tag."""

from __future__ import annotations

from typing import Annotated

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import AsJson
from casparian_flow.errors import counted

app = context.group("List, add and remove the rules that tag files.")


@app.command("list")
def list_rules(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List every rule and the plugins that subscribe to its tag."""
    from casparian_flow.db import views
    from casparian_flow.services.report import rule_fault

    with context.opened(ctx) as (_, ledger):
        rows = [{**r, "problem": rule_fault(r["pattern"])} for r in ledger.read(views.rules)]
    columns = "id pattern case tag priority plugins problem"
    context.listing(rows, as_json, columns, "no rules\n  try: casparian rules add PATTERN TAG")


@app.command("add")
def add_rule(
    ctx: typer.Context,
    pattern: Annotated[
        str,
        typer.Argument(
            metavar="PATTERN",
            help="A glob. Without a slash it matches the file's name, with one its path.",
        ),
    ],
    tag: Annotated[str, typer.Argument(metavar="TAG", help="The tag that plugins subscribe to.")],
    priority: Annotated[
        int, typer.Option(metavar="N", help="Order of the jobs; higher runs first.")
    ] = 0,
    exact_case: Annotated[
        bool,
        typer.Option(
            "--exact-case", help="Distinguish *.csv from *.CSV; default: one rule matches both."
        ),
    ] = False,
) -> None:
    """Tag the files that match a pattern.

    Queues the jobs that follow at once.
    """
    from casparian_flow.services import sources

    with context.opened(ctx) as (_, ledger):
        rule_id, queued = sources.add_rule(ledger, pattern, tag, priority, any_case=not exact_case)
    some = f"; {counted(queued, 'job')} queued for known files" if queued else ""
    context.say(f"rule {rule_id} added{some}")


@app.command("remove")
def remove_rule(
    ctx: typer.Context,
    rule_id: Annotated[int, typer.Argument(metavar="ID", help="As in `casparian rules list`.")],
) -> None:
    """Remove a rule; the jobs it has queued stay."""
    from casparian_flow.services import sources

    with context.opened(ctx) as (_, ledger):
        words = sources.remove_rule(ledger, rule_id)
    context.say(f"rule {rule_id} removed: {words}")
