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


app = context.group("List, forget and restore published outputs.")

Name = Annotated[str, typer.Argument(metavar="TARGET|JOB", help="As in `casparian outputs list`.")]


@app.command("list")
def list_outputs(
    ctx: typer.Context,
    topic: Annotated[str | None, typer.Option(metavar="TOPIC", help="Only this topic.")] = None,
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
    """Stop tracking an output that was deleted or changed in its sink.

    `casparian verify` then passes, and queries leave the output out. The audit records who did it.
    """
    from casparian_flow.services import outputs

    with context.opened(ctx) as (_, ledger):
        for target in outputs.forget(ledger, name):
            context.say(f"forgotten: {target}")


@app.command()
def restore(ctx: typer.Context, name: Name) -> None:
    """Make an output again that was deleted or changed in its sink.

    Queues its job again. The file or a snapshot must still have the version's content.
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
            help="A file, as SOURCE/path or as a path from here: all its versions. Or the "
            "id of one version.",
        ),
    ],
    undo: Annotated[bool, typer.Option("--undo", help="Show the retracted rows again.")] = False,
) -> None:
    """Hide a file's rows in every sink (reversible).

    The sinks keep the rows; readers and queries no longer see them. Only --undo shows them again.
    The audit records who did it.
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
        typer.Option(metavar="GLOB", help="Only files whose path matches; * also matches /."),
    ] = None,
    since: Annotated[
        datetime | None,
        typer.Option(
            formats=["%Y-%m-%d"],
            metavar="DATE",
            help="Only versions recorded since this day (UTC).",
        ),
    ] = None,
    redo: Annotated[
        bool,
        typer.Option(
            "--redo", help="Also versions that another version of the plugin has already processed."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print how many jobs it would queue, and queue none.")
    ] = False,
) -> None:
    """Queue jobs for versions recorded before the plugin was published.

    Includes older versions of files whose content is still there, in the file or as a snapshot. The
    new rows are added to the existing ones; in mode replace they replace the rows of an older
    version of the file or of the plugin.
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
        context.note(f"no matching version is routed to {plugin}")
        context.note("  try: casparian rules list")
    if done.bytes_gone:
        context.say(
            f"{counted(done.bytes_gone, 'version')} skipped, since the content is gone: the "
            "file has changed or was deleted, and no snapshot was kept (docs/snapshots.md)"
        )
    if done.retracted:
        context.say(
            f"{counted(done.retracted, 'version')} skipped, since retracted; casparian retract "
            "PATH --undo shows the rows again"
        )
    if done.worked:
        context.say(
            f"{counted(done.worked, 'version')} already processed by another version of "
            f"{plugin}{_redo(done)}"
        )
    if done.waits:
        context.say(
            f"{counted(done.waits, 'version')} skipped: another version of {plugin} has an "
            f"unfinished job for {_them(done.waits)}"
        )
    if done.queued:
        context.say(
            "the new rows have their own _cf_plugin_version; they are added to the existing "
            "rows, or replace them in mode replace. `casparian query` shows each file's latest "
            "version once"
        )


def _them(number: int) -> str:
    return "it" if number == 1 else "them"


def _redo(done: Backfill) -> str:
    if not done.again:
        return ""
    some = _them(done.worked)
    if done.again < done.worked:
        some = f"the {done.again} whose content is still there"
    return f" (--redo processes {some} with {done.version} too)"
