"""`casparian rebuild`: process everything of a plugin or a topic again, beside what shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from casparian_flow.cli import context
from casparian_flow.errors import counted

if TYPE_CHECKING:
    from casparian_flow.db.rebuild import Started

NAMED = 20
"""At most so many versions that are left out are named."""


def rebuild(
    ctx: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="TOPIC|PLUGIN", help="A plugin's name, else a topic's.")
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what it would do, and do nothing.")
    ] = False,
    cancel: Annotated[
        bool,
        typer.Option("--cancel", help="End a rebuild that is not complete, and keep the old rows."),
    ] = False,
) -> None:
    """Process again, with the active version, everything that a plugin or topic shows.

    The new rows go to the present sinks. The old rows show until every job has ended well, and then
    the new ones in their place. A topic that went elsewhere before leaves its old sinks then. A
    version whose content is gone keeps its rows.
    """
    from casparian_flow.db import rebuild as rebuilds
    from casparian_flow.services import outputs

    if dry_run and cancel:
        raise typer.BadParameter("--dry-run cannot be combined with --cancel")
    with context.opened(ctx) as (_, ledger):
        if cancel:
            ended, notes = outputs.cancel_rebuild(ledger, name)
            for each in ended:
                context.say(f"{each.words}; it is cancelled, and the old rows stay")
            for sentence in notes:
                context.note(f"note: {sentence}")
            return
        for started in rebuilds.start(ledger, name, dry_run=dry_run):
            report(started, dry_run=dry_run)


def report(started: Started, *, dry_run: bool = False) -> None:
    """Say what was begun."""
    from casparian_flow.engine.sinks import PREFIXES

    what = f"topic {started.topic} of {started.plugin}" if started.topic else started.plugin
    would = "would be " if dry_run else ""
    context.say(
        f"rebuild of {what} with {started.plugin} {started.version}: "
        f"{counted(started.jobs, 'job')} {would}queued; the old rows show until all have ended well"
    )
    if started.waiting:
        context.say(f"{started.waiting:,} of them waited or ran before")
    for topic, location in started.beside:
        if location.startswith(PREFIXES["parquet"]):
            context.note(
                f"note: other rows of topic {topic} stay in {location}, where all have the same "
                "columns: a job that gives it columns of other types fails, and the old rows stay"
            )
    if not started.left_out:
        return
    context.say(f"{counted(len(started.left_out), 'version')} left out, whose rows stay:")
    shown = started.left_out[:NAMED]
    rows = [each._asdict() for each in shown]
    context.listing(rows, False, "source rel_path version why", "")
    if len(shown) < len(started.left_out):
        context.say(f"{len(shown)} of {len(started.left_out):,}")
