"""`casparian source`: the directories that are watched."""

from __future__ import annotations

from typing import Annotated

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import AsJson

app = context.group("Add, list and remove watched directories.")


Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Pass these over, as in a .gitignore; repeatable."),
]
Settle = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", help="How long a file must be at rest; else 2."),
]
DoneFile = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Take a file only when this marker is beside it: '{name}.done', '{stem}.ok', or one "
        "for the whole folder; '' for none.",
    ),
]
MinAge = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS", help="Leave younger files to a later scan, without waiting for them."
    ),
]


@app.command()
def add(
    ctx: typer.Context,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The directory.")],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What to call it; else the directory's name.")
    ] = None,
    ignore: Ignore = None,
    settle: Settle = None,
    done_file: DoneFile = None,
    min_age: MinAge = None,
) -> None:
    """Watch a directory.

    One that was removed before comes back with all that is known of it.
    """
    from casparian_flow.services import changes

    options = changes.SourceOptions(ignore or None, settle, done_file, min_age)
    with context.opened(ctx) as (settings, ledger):
        added = changes.add_source(ledger, settings, folder, name=name, options=options)
    context.say(f"source root {added} added")


@app.command("set")
def set_(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="As in `casparian source list`.")],
    ignore: Ignore = None,
    settle: Settle = None,
    done_file: DoneFile = None,
    min_age: MinAge = None,
) -> None:
    """Change the options of a source root.

    What is not named stays. `--ignore` replaces the patterns there are; `--ignore ''` clears them.
    """
    from casparian_flow.services import changes

    options = changes.SourceOptions(ignore or None, settle, done_file, min_age)
    with context.opened(ctx) as (settings, ledger):
        changed = changes.set_source(ledger, settings, name, options)
    context.say(f"source root {name}: {', '.join(changed)} changed")


@app.command("list")
def list_(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List every source root, its options and its last scan."""
    from casparian_flow.services import report

    with context.opened(ctx) as (settings, ledger):
        rows = report.sources(settings, ledger)
    columns = (
        "name path active watch settle_seconds min_age_seconds done_file files unreadable "
        "unsettled waiting held missed hidden scanned_at scrubbed_at problem"
    )
    context.listing(rows, as_json, columns, "no source root\n  try: casparian source add DIR")


@app.command()
def show(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="As in `casparian source list`.")],
    as_json: AsJson = False,
) -> None:
    """Show a source root in full, with what is passed over.

    `--ignore '!PATTERN'` takes back what is passed over by default.
    """
    from casparian_flow.services import report

    with context.opened(ctx) as (settings, ledger):
        row = report.source(settings, ledger, name)
    if as_json:
        context.document(row)
        return
    patterns = {key: " ".join(row[key]) for key in ("ignore", "ignored_by_default")}
    context.facts({**row, **patterns})


@app.command()
def remove(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="As in `casparian source list`.")],
) -> None:
    """Stop watching a directory.

    Its files, versions, jobs and rows stay.
    """
    from casparian_flow.services import changes

    with context.opened(ctx) as (settings, ledger):
        changes.remove_source(ledger, settings, name)
    context.say(f"source root {name} removed; what is known of it stays")
