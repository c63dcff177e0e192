"""`casparian topics`: where the outputs of plugins go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import AsJson

if TYPE_CHECKING:
    from casparian_flow.services.topics import Placed

app = context.group(
    "List and set where outputs go.", invoke_without_command=True, no_args_is_help=False
)


@app.callback()
def topics(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List every topic and its sink."""
    if ctx.invoked_subcommand is None:
        _list(ctx, as_json)


@app.command("list")
def list_(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List every topic and its sink."""
    _list(ctx, as_json)


def _list(ctx: typer.Context, as_json: bool) -> None:
    from casparian_flow.db import views

    with context.opened(ctx) as (_, ledger):
        rows = ledger.read(views.topics)
    columns = "plugin topic uri mode outputs rows may_be_empty"
    context.listing(rows, as_json, columns, "no topics\n  try: casparian publish PLUGIN")


@app.command("set")
def set_(
    ctx: typer.Context,
    plugin: Annotated[
        str,
        typer.Argument(
            metavar="PLUGIN", help="The plugin's name; with --allow-empty a topic's will do."
        ),
    ],
    topic: Annotated[str | None, typer.Argument(metavar="TOPIC", help="One of its topics.")] = None,
    uris: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="URI",
            help="One sink or several: parquet://DIR, sqlite:///FILE, mssql://TABLE.",
        ),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            metavar="append|replace|error",
            help="Of URIs without ?mode=. Add each version's rows; or put them in place of the "
            "file's earlier ones; or add them, and refuse to where the sink has rows of others.",
        ),
    ] = "append",
    allow_empty: Annotated[
        bool | None,
        typer.Option(
            "--allow-empty/--no-allow-empty",
            help="Whether a file that gives rejects and no row of TOPIC is COMPLETED, and its "
            "rejects published; else it is FAILED.",
        ),
    ] = None,
) -> None:
    """Send a topic to these sinks, and no others, from now on.

    What was published before stays where it is. A URI may say its mode itself, as in
    parquet://output?mode=replace. Without a URI the sinks stay, and --allow-empty is what is set.
    """
    from casparian_flow.services import topics

    if allow_empty is None and not (topic and uris):
        raise typer.BadParameter("name a plugin, a topic and its sinks, or say --allow-empty")
    with context.opened(ctx) as (settings, ledger):
        if topic and uris:
            _report(plugin, topic, topics.set_topic(ledger, settings, plugin, topic, uris, mode))
        if allow_empty is not None:
            named = (plugin, topic) if topic else ("", plugin)
            deed, *hints = topics.allow_empty(ledger, *named, allow_empty)
            context.say(deed)
            for hint in hints:
                context.note(f"note: {hint}")


def _report(plugin: str, topic: str, placed: Placed) -> None:
    for place in placed.places:
        context.say(f"{plugin}: topic {topic} goes to {place.uri} (mode {place.mode})")
    for sentence in placed.stays:
        context.note(f"note: {sentence}")
    if topic not in placed.declared:
        known = ", ".join(placed.declared) or "none"
        context.note(f"note: {plugin} had no topic {topic!r} so far (it has: {known})")
