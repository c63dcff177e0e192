"""`casparian keys`: whose plugins this ledger runs."""

from __future__ import annotations

from typing import Annotated

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import AsJson

app = context.group("Generate, list, trust, revoke and rotate keys.")


@app.command()
def generate(ctx: typer.Context) -> None:
    """Make your signing key, and print its public key.

    An existing key stays as it is. Somebody whose key a ledger trusts can trust yours there.
    """
    from casparian_flow import config
    from casparian_flow.security import keys

    folder = config.keys_folder()
    made = (
        "there is already a signing key in"
        if keys.has_local_key(folder)
        else "made a signing key in"
    )
    public_key = keys.local_key(folder).verify_key.encode().hex()
    context.note(f"{made} {folder}; it stays on this machine. Its public key:")
    context.say(public_key)
    context.note(f"  try: casparian keys trust {public_key} --owner NAME")


@app.command("list")
def list_(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List the keys this ledger has trusted, and your own."""
    from casparian_flow import config
    from casparian_flow.services import keys

    with context.opened(ctx) as (_, ledger):
        rows = keys.listing(ledger, config.keys_folder())
    columns = "key_id mine owner plugins standing trusted_at reason"
    empty = (
        "no key is trusted yet: the first key that publishes becomes trusted\n  try: casparian "
        "keys generate"
    )
    context.listing(rows, as_json, columns, empty)


@app.command()
def trust(
    ctx: typer.Context,
    public_key: Annotated[
        str,
        typer.Argument(
            metavar="PUBLIC_KEY", help="As its owner's `casparian keys generate` prints it."
        ),
    ],
    owner: Annotated[str, typer.Option(metavar="NAME", help="Whose key it is.")],
    plugins: Annotated[
        str,
        typer.Option(
            metavar="GLOB", help="Which plugins it may publish; * includes managing keys."
        ),
    ] = "*",
) -> None:
    """Let a key publish plugins.

    Your key signs this. If the ledger trusts no key yet, it trusts yours first.
    """
    from casparian_flow import config
    from casparian_flow.services import keys

    with context.opened(ctx) as (_, ledger):
        done = keys.trust(ledger, config.keys_folder(), public_key, owner, plugins)
    if done.first is not None:
        context.say(keys.FIRST.format(done.first))
    if done.key is not None:
        beyond = ", and with managing keys" if plugins == "*" else ""
        context.say(f"{done.key} is trusted with plugins {plugins}{beyond}")
    _say_deactivated(done.deactivated)


@app.command()
def revoke(
    ctx: typer.Context,
    key_id: Annotated[
        str,
        typer.Argument(
            metavar="KEY_ID", help="The beginning of its id, as in `casparian keys list`."
        ),
    ],
    reason: Annotated[
        str, typer.Option(metavar="WORDS", help="The reason; it is signed and kept in the audit.")
    ],
) -> None:
    """Stop everything that a key has published."""
    from casparian_flow import config
    from casparian_flow.services import keys

    with context.opened(ctx) as (_, ledger):
        done = keys.revoke(ledger, config.keys_folder(), key_id, reason)
    if done.already:
        context.say(f"{done.key} is already revoked: {done.key.reason}")
        return
    context.say(f"{done.key} is revoked: plugins that it has published no longer run")
    _say_deactivated(done.deactivated)


def _say_deactivated(versions: list[str]) -> None:
    if versions:
        context.say(
            f"no longer active: {', '.join(versions)} (publish a new version with a trusted key, "
            "or activate an older one)"
        )


@app.command()
def rotate(ctx: typer.Context) -> None:
    """Replace your signing key with a new one.

    What the old key published stays valid. Run this again for each other ledger that trusts you.
    """
    from casparian_flow import config
    from casparian_flow.services import keys

    with context.opened(ctx) as (_, ledger):
        new, old = keys.rotate(ledger, config.keys_folder())
    context.say(f"key {new[:16]} signs from now on; key {old[:16]} is retired")
