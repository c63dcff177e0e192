"""`casparian source`: the directories that are watched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import AsJson
from casparian_flow.errors import counted

if TYPE_CHECKING:
    from casparian_flow.services.topics import TopicChange


app = context.group("Add, list and remove watched directories.")


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
) -> None:
    """Watch a directory.

    A directory that was removed earlier comes back with its files, versions and jobs.
    """
    from casparian_flow.services import sources

    options = sources.SourceOptions(ignore or None, settle, done_file, min_age)
    with context.opened(ctx) as (_, ledger):
        added = sources.add_source(ledger, folder, name=name, options=options)
    context.say(f"source root {added} added")


@app.command("set")
def set_source(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="As in `casparian source list`.")],
    ignore: Ignore = None,
    settle: Settle = None,
    done_file: DoneFile = None,
    min_age: MinAge = None,
) -> None:
    """Change the options of a source root.

    Options that are not given stay as they are. `--ignore` replaces all patterns; `--ignore ''`
    clears them.
    """
    from casparian_flow.services import sources

    options = sources.SourceOptions(ignore or None, settle, done_file, min_age)
    with context.opened(ctx) as (_, ledger):
        changed = sources.set_source(ledger, name, options)
    context.say(f"source root {name}: {', '.join(changed)} changed")


@app.command("list")
def list_sources(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List the source roots, their options and their last scans."""
    from casparian_flow.services import report

    with context.opened(ctx) as (settings, ledger):
        rows = report.sources(settings, ledger)
    columns = (
        "name path active watch settle_seconds min_age_seconds done_file files unreadable "
        "unsettled waiting held missed hidden scanned_at scrubbed_at problem"
    )
    context.listing(rows, as_json, columns, "no source root\n  try: casparian source add DIR")


@app.command("show")
def show_source(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="As in `casparian source list`.")],
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
    name: Annotated[str, typer.Argument(metavar="NAME", help="As in `casparian source list`.")],
) -> None:
    """Stop watching a directory.

    Its files, versions, jobs and rows stay.
    """
    from casparian_flow.services import sources

    with context.opened(ctx) as (_, ledger):
        sources.remove_source(ledger, name)
    context.say(f"source root {name} removed; its files, versions, jobs and rows stay")


# `casparian rules`: which files get which tag.


rules_app = context.group("List, add and remove the rules that tag files.")


@rules_app.command("list")
def list_rules(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List every rule and the plugins that subscribe to its tag."""
    from casparian_flow.db import views
    from casparian_flow.services.report import rule_fault

    with context.opened(ctx) as (_, ledger):
        rows = [{**r, "problem": rule_fault(r["pattern"])} for r in ledger.read(views.rules)]
    columns = "id pattern case tag priority plugins problem"
    context.listing(rows, as_json, columns, "no rules\n  try: casparian rules add PATTERN TAG")


@rules_app.command("add")
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


@rules_app.command("remove")
def remove_rule(
    ctx: typer.Context,
    rule_id: Annotated[int, typer.Argument(metavar="ID", help="As in `casparian rules list`.")],
) -> None:
    """Remove a rule; the jobs it has queued stay."""
    from casparian_flow.services import sources

    with context.opened(ctx) as (_, ledger):
        words = sources.remove_rule(ledger, rule_id)
    context.say(f"rule {rule_id} removed: {words}")


# `casparian topics`: where the outputs of plugins go.


topics_app = context.group(
    "List and set where outputs go.", invoke_without_command=True, no_args_is_help=False
)


@topics_app.callback()
def topics(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List every topic and its sink."""
    if ctx.invoked_subcommand is None:
        _list(ctx, as_json)


@topics_app.command("list")
def list_topics(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List every topic and its sink."""
    _list(ctx, as_json)


def _list(ctx: typer.Context, as_json: bool) -> None:
    from casparian_flow.db import views

    with context.opened(ctx) as (_, ledger):
        rows = ledger.read(views.topics)
    columns = "plugin topic uri mode outputs rows may_be_empty"
    context.listing(rows, as_json, columns, "no topics\n  try: casparian publish PLUGIN")


@topics_app.command("set")
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
) -> None:
    """Set the sinks that a topic goes to from now on.

    Outputs published before stay where they are. A URI may contain its mode, as in
    parquet://output?mode=replace. Without a URI only --allow-empty is set, and the sinks stay.
    """
    from casparian_flow.services import topics

    if allow_empty is None and not (topic and uris):
        raise typer.BadParameter("give a plugin, a topic and its sinks, or --allow-empty")
    with context.opened(ctx) as (settings, ledger):
        if topic and uris:
            _report(plugin, topic, topics.set_topic(ledger, settings, plugin, topic, uris, mode))
        if allow_empty is not None:
            named = (plugin, topic) if topic else ("", plugin)
            deed, *hints = topics.allow_empty(ledger, *named, allow_empty)
            context.say(deed)
            for hint in hints:
                context.note(f"note: {hint}")


def _report(plugin: str, topic: str, change: TopicChange) -> None:
    for sink in change.sinks:
        context.say(f"{plugin}: topic {topic} goes to {sink.uri} (mode {sink.mode})")
    for sentence in change.stays:
        context.note(f"note: {sentence}")
    if topic not in change.declared:
        known = ", ".join(change.declared) or "none"
        context.note(
            f"note: {plugin} declares no topic {topic!r} (it declares: {known}); check the spelling"
        )
