"""`casparian outputs`: what stands in the sinks, and what a person took away there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import All, AsJson, Limit
from casparian_flow.errors import counted

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
    from casparian_flow.services.outputs import with_places

    most = context.wanted(limit, every)
    with context.opened(ctx) as (_, ledger):
        rows = ledger.read(lambda c: outputs.listed(c, most, topic))
    with_places(rows)
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

    Queues its job again. The store or the file must still have the version's content.
    """
    from casparian_flow.services import outputs

    with context.opened(ctx) as (_, ledger):
        queued = outputs.restore(ledger, name)
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
    for (path, version, topic), rows in _by_topic(done).items():
        context.say(f"{word}: {counted(rows, 'row')} of {path} version {version} in topic {topic}")


def _by_topic(done: Sequence[Any]) -> dict[tuple[str, int, str], int]:
    """(path, version, topic) -> its rows, which each of its sinks has. Topics that got none are
    left out, if others got some."""
    by_sink: dict[tuple[str, int, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in [row for row in done if row.rows] or done:
        by_sink[row.rel_path, row.ordinal, row.topic][row.location] += row.rows
    return {name: max(rows.values()) for name, rows in by_sink.items()}
