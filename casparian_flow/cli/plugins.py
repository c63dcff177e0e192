"""`casparian plugins`: what is deployed, whether it may run, and which version takes new jobs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import AsJson
from casparian_flow.errors import ExitCode
from casparian_flow.wording import counted

app = context.group(
    "List, show, check, activate and disable plugins.",
    invoke_without_command=True,
    no_args_is_help=False,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The plugin's name.")]

Reason = Annotated[str, typer.Option(metavar="WORDS", help="Why; it is signed and kept.")]


@app.callback()
def plugins(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List every deployed plugin version."""
    if ctx.invoked_subcommand is None:
        _list(ctx, as_json)


@app.command("list")
def list_(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List every deployed plugin version."""
    _list(ctx, as_json)


def _list(ctx: typer.Context, as_json: bool) -> None:
    from casparian_flow.db import views

    with context.opened(ctx) as (_, ledger):
        rows = ledger.read(views.plugins)
    columns = "name version active artifact key_id deployed_at topics subscriptions"
    context.listing(rows, as_json, columns, "no plugins\n  try: casparian publish PLUGIN")


@app.command()
def bundled(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Only this one, with what each option means."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the plugins that come with casparian.

    `casparian publish NAME` publishes one, from any directory.
    """
    from casparian_flow.services import plugins

    found = plugins.bundled_ones(name)
    if as_json:
        context.document(found)
        return
    for row in found:
        options = ", ".join(f"{key}={value!r}" for key, value in row["options"].items())
        context.say(f"{row['name']} {row['version']}")
        context.facts(
            {
                "  reads": row["reads"],
                "  patterns": ", ".join(row["patterns"]),
                "  topics": ", ".join(row["topics"]),
                "  options": options or "none",
                "  file": row["file"],
            }
        )
        if name:
            context.say(f"\n{row['description']}")


@app.command()
def show(
    ctx: typer.Context,
    name: Name,
    version: Annotated[
        str | None, typer.Argument(metavar="VERSION", help="Else the active one.")
    ] = None,
    source: Annotated[bool, typer.Option("--source", help="Its source as well.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a version in full.

    Who published it, whether it may run, what was signed, its limits, topics and packages.
    """
    from casparian_flow.services import plugins

    with context.opened(ctx) as (_, ledger):
        found = plugins.show(ledger, name, version)
    code = found.pop("source")
    if as_json:
        context.document({**found, **({"source": code} if source else {})})
        return
    _show(found)
    if source:
        context.say(f"\n{code}")


def _show(found: dict[str, Any]) -> None:
    tables = {name: found.pop(name) or {} for name in ("statement", "verdict", "manifest")}
    options = tables["manifest"].pop("options", {})
    tables["options"] = {name: repr(value) for name, value in options.items()}
    tables["topics"] = found.pop("topics")
    packages = found.pop("lock")
    context.facts({**found, "refusal": found["refusal"] or "none: it may run"})
    for title, table in tables.items():
        if table:
            context.say(f"\n{title}")
            context.facts({f"  {name}": value for name, value in table.items()})
    context.say(f"\nlocked to {counted(len(packages), 'package')}")
    for package in packages:
        context.say(f"  {package}")


@app.command()
def verify(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Only this plugin's versions.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every version as it is checked before it runs.

    Its bytes, its signature, what was signed, and the standing of the key. Ends with 1 if any may
    not run.
    """
    from casparian_flow.services import plugins

    with context.opened(ctx) as (_, ledger):
        rows = plugins.verify(ledger, name)
    if as_json:
        context.document(rows)
    for row in [] if as_json else rows:
        context.say(row["refusal"] or f"plugin {row['name']} {row['version']} may run")
    refused = any(row["refusal"] for row in rows)
    raise typer.Exit(ExitCode.FAILED if refused else ExitCode.DONE)


@app.command()
def activate(
    ctx: typer.Context,
    name: Name,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="A deployed one.")],
    reason: Reason,
) -> None:
    """Make a version the one that takes new jobs.

    Back to an older one, or one that was disabled.
    """
    from casparian_flow import config
    from casparian_flow.services import plugins

    with context.opened(ctx) as (settings, ledger):
        folder = config.keys_folder()
        context.say(plugins.activate(ledger, settings, folder, name, version, reason))


@app.command()
def disable(
    ctx: typer.Context,
    name: Name,
    reason: Reason,
    version: Annotated[
        str | None, typer.Argument(metavar="VERSION", help="Else every version.")
    ] = None,
) -> None:
    """Run a version, or a whole plugin, no more.

    Jobs that wait for it fail and say why.
    """
    from casparian_flow import config
    from casparian_flow.services import plugins

    with context.opened(ctx) as (settings, ledger):
        folder = config.keys_folder()
        context.say(plugins.disable(ledger, settings, folder, name, version, reason))


@app.command()
def diff(
    ctx: typer.Context,
    name: Name,
    old: Annotated[str, typer.Argument(metavar="OLD", help="A version.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Another one.")],
) -> None:
    """Show what changed between two versions.

    In the source, and in the packages it is locked to.
    """
    from casparian_flow.services import plugins

    with context.opened(ctx) as (_, ledger):
        changed = plugins.diff(ledger, name, old, new)
    if changed:
        context.say(changed)
    else:
        context.note(f"{name} {old} and {new} have the same source and the same packages")
