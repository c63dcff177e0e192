"""`casparian topics`: where the outputs of plugins go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import AsJson
from casparian_flow.errors import counted

if TYPE_CHECKING:
    from casparian_flow.services.topics import TopicChange


app = context.group(
    "List and set where outputs go.", invoke_without_command=True, no_args_is_help=False
)


@app.callback()
def topics(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List every topic and its sink."""
    if ctx.invoked_subcommand is None:
        _list(ctx, as_json)


@app.command("list")
def list_topics(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List every topic and its sink."""
    _list(ctx, as_json)


def _list(ctx: typer.Context, as_json: bool) -> None:
    from casparian_flow.db import views

    with context.opened(ctx) as (_, ledger):
        rows = ledger.read(views.topics)
    columns = "plugin topic uri mode outputs rows may_be_empty"
    context.listing(rows, as_json, columns, "no topics\n  try: casparian publish PLUGIN")


@app.command("set")
def set_topic(
    ctx: typer.Context,
    plugin: Annotated[
        str,
        typer.Argument(
            metavar="PLUGIN", help="The plugin's name. With --allow-empty a topic's name is enough."
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
            help="Mode of URIs without ?mode=. append: add each version's rows. replace: "
            "replace the file's earlier rows. error: like append, but refuse a table "
            "or folder that holds foreign rows.",
        ),
    ] = "append",
    allow_empty: Annotated[
        bool | None,
        typer.Option(
            "--allow-empty/--no-allow-empty",
            help="A file that gives rejects but no row of TOPIC: complete the job and "
            "publish the rejects, instead of failing it.",
        ),
    ] = None,
    again: Annotated[
        bool,
        typer.Option(
            "--rebuild",
            help="Process the topic's files again into these sinks, as `casparian rebuild` does; "
            "when all are done, its rows leave the sinks it went to before.",
        ),
    ] = False,
) -> None:
    """Set the sinks that a topic goes to from now on.

    Outputs published before stay in their sinks; a new mode also counts for them. A URI may contain
    its mode, as in parquet://output?mode=replace. Without a URI only --allow-empty is set.
    """
    from casparian_flow.cli import rebuild
    from casparian_flow.services import topics

    if again and not uris:
        raise typer.BadParameter("--rebuild needs the sinks to rebuild into")
    if allow_empty is None and not (topic and uris):
        raise typer.BadParameter("give a plugin, a topic and its sinks, or --allow-empty")
    with context.opened(ctx) as (settings, ledger):
        if topic and uris:
            change = topics.set_topic(ledger, settings, plugin, topic, uris, mode, again=again)
            _report(plugin, topic, change)
            if change.rebuild:
                rebuild.report(change.rebuild)
            elif again:
                context.say(f"{plugin}: topic {topic} has no rows to rebuild")
        if allow_empty is not None:
            named = (plugin, topic) if topic else ("", plugin)
            deed, *hints = topics.allow_empty(ledger, *named, allow_empty)
            context.say(deed)
            for hint in hints:
                context.note(f"note: {hint}")


def _report(plugin: str, topic: str, change: TopicChange) -> None:
    for sink in change.sinks:
        context.say(f"{plugin}: topic {topic} goes to {sink.uri} (mode {sink.mode})")
    if words := change.change.words:
        context.say(words)
    for sentence in change.notes:
        context.note(f"note: {sentence}")
    if topic not in change.declared:
        known = ", ".join(change.declared) or "none"
        context.note(
            f"note: {plugin} declares no topic {topic!r} (it declares: {known}); check the spelling"
        )


@app.command()
def remove(
    ctx: typer.Context,
    plugin: Annotated[str, typer.Argument(metavar="PLUGIN", help="As in `casparian plugins`.")],
    topic: Annotated[
        str, typer.Argument(metavar="TOPIC", help="One that the plugin no longer declares.")
    ],
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove it; without this only say what would go.")
    ] = False,
) -> None:
    """Remove a topic that its plugin no longer declares, with its rows.

    The rows are hidden in every sink, and deleted there after [output] keep_replaced_days.
    """
    from casparian_flow.db import visibility
    from casparian_flow.errors import CasparianError
    from casparian_flow.services import topics

    with context.opened(ctx) as (_, ledger):
        if not yes:
            shown = ledger.read(lambda c: visibility.usage(c, plugin, topic))
            topics.check_removable(ledger, plugin, topic)
            rows = counted(sum(usage.rows for usage in shown), "row")
            raise CasparianError(
                f"this would take {rows} of topic {topic} of {plugin} away; nothing was changed",
                f"casparian topics remove {plugin} {topic} --yes",
            )
        removal = topics.remove(ledger, plugin, topic)
    context.say(f"{plugin}: topic {topic} is removed")
    if words := removal.change.words:
        context.say(words)
    for sentence in removal.notes:
        context.note(f"note: {sentence}")
