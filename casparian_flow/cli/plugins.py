"""`casparian plugins`: what is deployed, whether it may run, and which version takes new jobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import AsJson
from casparian_flow.errors import ExitCode, counted

if TYPE_CHECKING:
    from casparian_flow.cli.context import Here
    from casparian_flow.config import Settings
    from casparian_flow.protocol import Deploy
    from casparian_flow.security.choices import Choices
    from casparian_flow.security.manifest import Manifest
    from casparian_flow.security.signing import AzureAuth, LocalAuth


app = context.group(
    "List, show, check, activate and disable plugins.",
    invoke_without_command=True,
    no_args_is_help=False,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The plugin's name.")]

Reason = Annotated[
    str, typer.Option(metavar="WORDS", help="The reason; it is signed and kept in the audit.")
]


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
    from casparian_flow.db import taken, views

    with context.opened(ctx) as (_, ledger):
        rows = ledger.read(views.plugins)
        tables = ledger.read(taken.listed)
    for row in rows:
        taking = [table["name"] for table in tables if row["name"] in table["instead_of"]]
        row["yields_to"] = ", ".join(taking) if row["active"] else ""
    columns = "name version active kind yields_to artifact key_id deployed_at topics subscriptions"
    context.listing(rows, as_json, columns, "no plugins\n  try: casparian publish PLUGIN")


@app.command()
def bundled(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Only this plugin, with what each option means."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the plugins that come with casparian.

    `casparian publish NAME` publishes one, from any directory.
    """
    from casparian_flow.bundled import describe

    found = describe(name)
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
        str | None, typer.Argument(metavar="VERSION", help="The version; default: the active one.")
    ] = None,
    source: Annotated[bool, typer.Option("--source", help="Print its source as well.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show everything about a plugin version.

    Who published it, whether it may run, what was signed, its limits, topics and packages.
    """
    from casparian_flow.db import plugins

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
    """Check every version, as a worker does before it runs one.

    Checks its bytes, its signature, what was signed, and whether the key is trusted. Ends with 1 if
    any version may not run.
    """
    from casparian_flow.db import plugins

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
    version: Annotated[str, typer.Argument(metavar="VERSION", help="A deployed version.")],
    reason: Reason,
) -> None:
    """Make a version the one that gets new jobs.

    For going back to an older version, or to one that was disabled. Its rows show where it has
    some; what only other versions have processed is queued for it.
    """
    from casparian_flow import config
    from casparian_flow.services import architect

    with context.opened(ctx) as (settings, ledger):
        folder = config.keys_folder()
        context.say(architect.activate(ledger, settings, folder, name, version, reason))


@app.command()
def disable(
    ctx: typer.Context,
    name: Name,
    reason: Reason,
    version: Annotated[
        str | None, typer.Argument(metavar="VERSION", help="The version; default: every version.")
    ] = None,
) -> None:
    """Stop a version, or a whole plugin.

    Jobs queued for it fail, with the reason.
    """
    from casparian_flow import config
    from casparian_flow.db import plugins
    from casparian_flow.services import outputs

    with context.opened(ctx) as (_, ledger):
        context.say(plugins.disable(ledger, config.keys_folder(), name, version, reason))
        for sentence in outputs.tell(ledger):
            context.note(f"note: {sentence}")


@app.command()
def diff(
    ctx: typer.Context,
    name: Name,
    old: Annotated[str, typer.Argument(metavar="OLD", help="The older version.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="The newer version.")],
) -> None:
    """Show what changed between two versions.

    In the source, and in the packages it is locked to.
    """
    from casparian_flow.db import plugins

    with context.opened(ctx) as (_, ledger):
        changed = plugins.diff(ledger, name, old, new)
    if changed:
        context.say(changed)
    else:
        context.note(f"{name} {old} and {new} have the same source and the same packages")


# `casparian publish`.


def publish(
    ctx: typer.Context,
    plugin: Annotated[
        str,
        typer.Argument(
            metavar="PLUGIN",
            help="A bundled plugin's name (casparian plugins bundled); or a file, if it has a / "
            "or ends in .py.",
        ),
    ],
    version: Annotated[
        str | None,
        typer.Option(
            metavar="V", help="The version; default: the MANIFEST's, else the next patch release."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The plugin's name; default: the MANIFEST's.")
    ] = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB", help="Files it gets, instead of the MANIFEST's pattern; repeatable."
        ),
    ] = None,
    topic: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOPIC",
            help="Name of a topic; once for each topic of the MANIFEST, in that order.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help=r"An option that the MANIFEST declares; repeatable. In text, \t \n \r \0 \\ \xNN "
            r"and \uNNNN are escapes.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Lock, sign and check, but deploy nothing.")
    ] = False,
) -> None:
    """Lock, sign and deploy a plugin.

    Queues a job for each known file that matches. The first key that publishes into a ledger is
    trusted there; other keys must be trusted first (casparian keys trust). --name, --pattern,
    --topic and --option change the MANIFEST of what is deployed; the file stays as it is. So one
    file can be published as several plugins.
    """
    from casparian_flow.security.choices import Choices

    choices = Choices(name, pattern or (), topic or (), _options(option or ()))
    with context.opened(ctx) as here:
        _publish(here, plugin, choices, version, dry_run)


def _publish(here: Here, plugin: str, choices: Choices, version: str | None, dry_run: bool) -> None:
    from casparian_flow import config
    from casparian_flow.security import signing
    from casparian_flow.services import architect

    file = _file(plugin)
    source, lock, name, chosen = _artifact(here, file, choices, version)
    context.note(f"artifact     sha256 {signing.artifact_hash(source, lock)}")
    auth, token = sign_in(here)
    message = architect.sign(
        here.ledger, file, source, lock, name, chosen, config.keys_folder(),
        auth=auth, token=token, dry_run=dry_run,
    )  # fmt: skip
    context.note(f"signed       by key {signing.key_id(message.public_key)}")
    words = deploy(here, message)
    context.note("checked      signature, statement, artifact, and what the key may publish")
    context.say(words)


def _file(plugin: str) -> Path:
    """The file of what was named, and a note of which was taken.

    Raises:
        NotFound: it is a name, and no bundled plugin has it.
    """
    from casparian_flow import bundled
    from casparian_flow.errors import NotFound

    here = Path(plugin)
    if plugin.endswith(".py") or "/" in plugin:
        context.note(f"file         {here.absolute()}")
        return here.absolute()
    if plugin in bundled.names():
        file = bundled.path(plugin)
        context.note(f"bundled      {file}")
        for mine in (here, here.with_suffix(".py")):
            if mine.is_file():
                context.note(f"             not the file {mine}: casparian publish ./{mine}")
        return file
    known = ", ".join(bundled.names())
    hint = (
        f"casparian publish NAME, where NAME is one of {known}   (a file's path has a / "
        "or ends in .py)"
    )
    if here.is_file():
        hint = (
            f"casparian publish ./{plugin}   (publishes the file; the bundled plugins are {known})"
        )
    raise NotFound(f"no bundled plugin is named {plugin!r}", hint)


def _artifact(
    here: Here, file: Path, choices: Choices, version: str | None
) -> tuple[bytes, str, str, str]:
    """The plugin's source with what was chosen in it, its lock, name and version.

    It is inspected, and its environment is built; each step is said.
    """
    from casparian_flow import config, durable
    from casparian_flow.engine.environments import EnvironmentStore
    from casparian_flow.engine.locking import check_imports
    from casparian_flow.security import gatekeeper
    from casparian_flow.security.manifest import normal_version
    from casparian_flow.security.rules import RULESET, Policy
    from casparian_flow.services import architect

    source, manifest = architect.read_plugin(file, choices, context.note)
    chosen = normal_version(version or manifest.version, file.name)
    chosen = chosen or architect.next_version(here.ledger, manifest.name)
    context.note(f"plugin       {manifest.name} {chosen}")
    for line in _shown(manifest, choices):
        context.note(line)
    gatekeeper.inspect(source, file.name, Policy.of(here.settings.gatekeeper)).require()
    context.note(f"gatekeeper   nothing found (ruleset {RULESET})")
    context.note(f"limits       {_limits(manifest, here.settings)}")
    lock = _lock(here, file, source, manifest.name, chosen)
    pins = sum("==" in line for line in lock.splitlines())
    context.note(f"locked       {counted(pins, 'package')}, each with its hashes")
    durable.make_private(config.cache_folder())
    store = EnvironmentStore(
        config.cache_folder() / "envs", here.settings.guest.environments_bytes,
        one_limit_bytes=here.settings.guest.environment_limit_bytes,
    )  # fmt: skip
    with store.lease(lock) as lease:
        context.note(f"environment  {lease.site_packages}")
        for note in check_imports(file, source, lease.site_packages):
            context.note(note)
    return source, lock, manifest.name, chosen


def _options(written: Sequence[str]) -> dict[str, str]:
    """Each `--option KEY=VALUE`, by its key."""
    options: dict[str, str] = {}
    for text in written:
        key, sign, value = text.partition("=")
        if not key or not sign:
            raise typer.BadParameter(f"--option is KEY=VALUE, not {text[:60]!r}")
        if key in options:
            raise typer.BadParameter(f"--option {key[:60]} is given twice")
        options[key] = value
    return options


def _shown(manifest: Manifest, choices: Choices) -> Iterator[str]:
    """What was chosen as the MANIFEST has it now, and all options."""
    if choices.patterns:
        yield f"patterns     {', '.join(manifest.patterns)}"
    if choices.topics:
        yield f"topics       {', '.join(manifest.topics)}"
    if manifest.options:
        shown = (f"{name}={value!r}" for name, value in manifest.options.items())
        yield f"options      {', '.join(shown)}"


def _limits(manifest: Manifest, settings: Settings) -> str:
    """What the plugin will be held to, and whether it asks for what it does not get."""
    guest = settings.guest
    memory = min(manifest.memory_bytes or guest.memory_bytes, guest.memory_bytes)
    seconds = min(manifest.timeout_seconds or settings.jobs.timeout_seconds,
                  settings.jobs.timeout_seconds)  # fmt: skip
    scratch = min(manifest.scratch_bytes, guest.scratch_bytes)
    network = "granted" if guest.network else "NOT granted ([guest] network is false)"
    return (
        f"{memory >> 20} MiB of memory, {seconds:g} s, "
        f"scratch {f'{scratch >> 20} MiB' if scratch else 'none'}, "
        f"network {network if manifest.network else 'none'}, sandbox {guest.sandbox}"
    )


def sign_in(here: Here) -> tuple[LocalAuth | AzureAuth, str]:
    """Who publishes, and the token that proves it; the key alone where no sign-in is configured."""
    from casparian_flow.security.signing import LOCAL, AzureAuth

    azure = here.settings.azure
    if not azure.required:
        return LOCAL, ""
    from casparian_flow.security import identity

    token = identity.sign_in(azure, context.note)
    who = identity.validate(azure, token)
    context.note(f"signed in    as {who.name} (object {who.object_id})")
    auth = AzureAuth(tenant=who.tenant, object_id=who.object_id, issuer=who.issuer)
    return auth, token


def _lock(here: Here, file: Path, source: bytes, name: str, version: str) -> str:
    """The dependencies' lock; that of the same source under the same version, where deployed.

    Newer packages may have appeared since: without this, publishing again would be a conflict.
    """
    from casparian_flow.db import plugins
    from casparian_flow.engine.locking import lock_dependencies

    known = here.ledger.read(lambda c: plugins.find(c, name, version))
    if known is not None and known.source == source:
        return str(known.lock)
    return lock_dependencies(file)


def deploy(here: Here, message: Deploy) -> str:
    """Through the daemon where one runs, else directly; what was done, in words."""
    from casparian_flow.engine import control
    from casparian_flow.errors import CasparianError
    from casparian_flow.services import architect

    reply = control.ask(here.settings.database, message, control.DEPLOY_SECONDS)
    if reply is None:
        return architect.deploy(here.ledger, here.settings, message)
    if not reply.ok:
        error = CasparianError(reply.text, reply.hint)
        error.exit_code = reply.exit_code
        raise error
    return reply.text
