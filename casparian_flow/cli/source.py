"""`casparian source`: the directories that are watched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import AsJson
from casparian_flow.errors import counted

if TYPE_CHECKING:
    from casparian_flow.services.sources import SourceChange

app = context.group("Add, list and remove watched directories.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="As in `casparian source list`.")]
Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Ignore these files, as in a .gitignore; repeatable."),
]
Settle = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS", help="How long a file must stay unchanged before it is read; default: 2."
    ),
]
DoneFile = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Read a file only when this marker file is beside it: '{name}.done', "
        "'{stem}.ok', or one name for the whole folder; '' for none.",
    ),
]
MinAge = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", help="Leave files younger than this to a later scan."),
]
OnDelete = Annotated[
    str | None,
    typer.Option(
        metavar="keep|retract",
        help="The rows of a deleted file: keep them, or hide them until it is back; default: keep.",
    ),
]


@app.command("add")
def add_source(
    ctx: typer.Context,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The directory.")],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its name; default: the directory's name.")
    ] = None,
    ignore: Ignore = None,
    settle: Settle = None,
    done_file: DoneFile = None,
    min_age: MinAge = None,
    on_delete: OnDelete = None,
) -> None:
    """Watch a directory.

    A directory that was removed earlier comes back with its files, versions and jobs.
    """
    from casparian_flow.services import sources

    options = sources.SourceOptions(ignore or None, settle, done_file, min_age, on_delete)
    with context.opened(ctx) as (_, ledger):
        done = sources.add_source(ledger, folder, name=name, options=options)
    context.say(f"source root {done.name} added")
    _report(done)


@app.command("set")
def set_source(
    ctx: typer.Context,
    name: Name,
    ignore: Ignore = None,
    settle: Settle = None,
    done_file: DoneFile = None,
    min_age: MinAge = None,
    on_delete: OnDelete = None,
) -> None:
    """Change the options of a source root.

    Options that are not given stay as they are. `--ignore` replaces all patterns; `--ignore ''`
    clears them. `--on-delete` also counts for files that are gone already.
    """
    from casparian_flow.services import sources

    options = sources.SourceOptions(ignore or None, settle, done_file, min_age, on_delete)
    with context.opened(ctx) as (_, ledger):
        done = sources.set_source(ledger, name, options)
    context.say(f"source root {name}: {', '.join(done.options)} changed")
    _report(done)


def _report(done: SourceChange) -> None:
    """What readers see of files that are gone already."""
    if words := done.change.words:
        context.say(f"{counted(done.gone, 'file')} gone already: {words}")
    for sentence in done.notes:
        context.note(f"note: {sentence}")


@app.command("list")
def list_sources(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List the source roots, their options and their last scans."""
    from casparian_flow.services import report

    with context.opened(ctx) as (settings, ledger):
        rows = report.sources(settings, ledger)
    columns = (
        "name path active watch settle_seconds min_age_seconds done_file on_delete files "
        "unreadable unsettled waiting held missed hidden scanned_at scrubbed_at problem"
    )
    context.listing(rows, as_json, columns, "no source root\n  try: casparian source add DIR")


@app.command("show")
def show_source(
    ctx: typer.Context,
    name: Name,
    as_json: AsJson = False,
) -> None:
    """Show a source root in full, with its ignore patterns.

    `--ignore '!PATTERN'` undoes a default ignore pattern.
    """
    from casparian_flow.services import report

    with context.opened(ctx) as (settings, ledger):
        row = report.source(settings, ledger, name)
    if as_json:
        context.document(row)
        return
    patterns = {key: " ".join(row[key]) for key in ("ignore", "ignored_by_default")}
    context.facts({**row, **patterns})


@app.command("remove")
def remove_source(
    ctx: typer.Context,
    name: Name,
) -> None:
    """Stop watching a directory.

    Its files, versions, jobs and rows stay.
    """
    from casparian_flow.services import sources

    with context.opened(ctx) as (_, ledger):
        sources.remove_source(ledger, name)
    context.say(f"source root {name} removed; its files, versions, jobs and rows stay")
