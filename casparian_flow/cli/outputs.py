"""`casparian outputs`: what stands in the sinks, and what a person took away there."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import All, AsJson, Limit
from casparian_flow.errors import counted

if TYPE_CHECKING:
    from casparian_flow.db.backfill import Backfill


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


# `casparian retract`.


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
    from casparian_flow.services import outputs

    with context.opened(ctx) as (_, ledger):
        done = outputs.retract(ledger, name, undo=undo)
    word = "reinstated" if undo else "retracted"
    for row in done:
        rows = counted(row.rows, "row")
        context.say(f"{word}: {rows} of {row.rel_path} version {row.ordinal}: {row.target}")


# `casparian backfill`.


def backfill(
    ctx: typer.Context,
    plugin: Annotated[str, typer.Argument(metavar="PLUGIN", help="As in `casparian plugins`.")],
    path: Annotated[
        str | None,
        typer.Option(metavar="GLOB", help="Only of files whose path matches; * crosses /."),
    ] = None,
    since: Annotated[
        datetime | None,
        typer.Option(
            formats=["%Y-%m-%d"], metavar="DATE", help="Only versions recorded since, UTC."
        ),
    ] = None,
    redo: Annotated[
        bool, typer.Option("--redo", help="Also what another version of the plugin has worked.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say how many jobs, and queue none.")
    ] = False,
) -> None:
    """Have a plugin work versions that were recorded before it.

    Older contents of files too, as far as their bytes are there: in the file, or in the snapshot
    store. New rows come beside those that are there; in mode replace, in the place of what an
    older version of the file or of the plugin gave.
    """
    from casparian_flow.db.backfill import Choice
    from casparian_flow.db.backfill import backfill as queue

    choice = Choice(plugin, path, since.isoformat(" ") if since else None, redo)
    with context.opened(ctx) as (_, ledger):
        done = queue(ledger, choice, dry_run=dry_run)
    _report(plugin, done, dry_run=dry_run)


def _report(plugin: str, done: Backfill, *, dry_run: bool) -> None:
    would = "would be " if dry_run else ""
    context.say(f"{plugin} {done.version}: {counted(done.queued, 'job')} {would}queued")
    if not done.routed:
        context.note(f"no version that was asked for is routed to {plugin}")
        context.note("  try: casparian rules list")
    if done.bytes_gone:
        have = "has" if done.bytes_gone == 1 else "have"
        context.say(
            f"{counted(done.bytes_gone, 'version')} {have} no bytes any more: the file has changed "
            "or is gone, and no snapshot was kept (docs/snapshots.md)"
        )
    if done.retracted:
        context.say(
            f"{counted(done.retracted, 'version')} {_were(done.retracted)} retracted and not "
            "worked again; casparian retract PATH --undo brings the rows back"
        )
    if done.worked:
        context.say(
            f"{counted(done.worked, 'version')} {_were(done.worked)} worked by another version of "
            f"{plugin} (--redo has {done.version} work {_as_many(done)} too)"
        )
    if done.waits:
        context.say(
            f"{counted(done.waits, 'version')} with an unfinished job of another version of "
            f"{plugin}: that job comes first"
        )
    if done.queued:
        context.say(
            "their rows come beside those that are there, with their own _cf_plugin_version, or in "
            "mode replace in their place; `casparian query` shows each file's latest version once"
        )


def _were(number: int) -> str:
    return "was" if number == 1 else "were"


def _as_many(done: Backfill) -> str:
    if done.again == done.worked:
        return "it" if done.worked == 1 else "them"
    return f"{done.again} of them, whose bytes are there,"
