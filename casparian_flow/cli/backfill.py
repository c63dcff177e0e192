"""`casparian backfill`: queue a plugin's jobs for versions that were recorded before it."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from casparian_flow.cli import context
from casparian_flow.errors import counted

if TYPE_CHECKING:
    from casparian_flow.db.backfill import Backfill


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

    Includes older versions of files whose content is still there, in the file or in the store. With
    --redo the new rows take the place of those that another version of the plugin gave.
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
            "file has changed or was deleted, and the store does not have it (docs/store.md)"
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
            "the new rows have their own _cf_plugin_version; they take the place of those that "
            "another version of the plugin gave for the same file version"
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
