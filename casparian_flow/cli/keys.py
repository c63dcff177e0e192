"""`casparian keys`: whose plugins this ledger runs."""

from __future__ import annotations

from typing import Annotated

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import AsJson

app = context.group("Generate, list, trust, revoke and rotate keys.")


@app.command()
def generate(ctx: typer.Context) -> None:
    """Make your signing key, and print its public half.

    Where you have one, it stays. Whoever is trusted in a ledger can trust it there.
    """
    from casparian_flow import config
    from casparian_flow.security import keys

    folder = config.keys_folder()
    made = "there is a key already in" if keys.has_local_key(folder) else "made a key in"
    public_key = keys.local_key(folder).verify_key.encode().hex()
    context.note(f"{made} {folder}; it stays on this machine. Its public half:")
    context.say(public_key)
    context.note(f"  try: casparian keys trust {public_key} --owner NAME")


@app.command("list")
def list_(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List the keys this ledger has trusted, and your own."""
    from casparian_flow import config
    from casparian_flow.db import trust

    with context.opened(ctx) as (_, ledger):
        rows = trust.listing(ledger, config.keys_folder())
    columns = "key_id mine owner plugins standing trusted_at reason"
    empty = (
        "no key is trusted yet: the first that publishes will be\n  try: casparian keys generate"
    )
    context.listing(rows, as_json, columns, empty)


@app.command()
def trust(
    ctx: typer.Context,
    public_key: Annotated[
        str,
        typer.Argument(metavar="PUBLIC_KEY", help="As its owner's `casparian keys generate` says."),
    ],
    owner: Annotated[str, typer.Option(metavar="NAME", help="Whose key it is.")],
    plugins: Annotated[
        str, typer.Option(metavar="GLOB", help="What it may publish; * includes keys.")
    ] = "*",
) -> None:
    """Trust a key with plugins.

    Signed by your key. In a ledger that trusts none yet, yours is trusted first.
    """
    from casparian_flow import config
    from casparian_flow.db.trust import trust_key

    with context.opened(ctx) as (_, ledger):
        context.say(trust_key(ledger, config.keys_folder(), public_key, owner, plugins))


@app.command()
def revoke(
    ctx: typer.Context,
    key_id: Annotated[
        str, typer.Argument(metavar="KEY_ID", help="As in `casparian keys list`; its beginning.")
    ],
    reason: Annotated[str, typer.Option(metavar="WORDS", help="Why; it is signed and kept.")],
) -> None:
    """Run nothing any more that a key has published."""
    from casparian_flow import config
    from casparian_flow.db import trust

    with context.opened(ctx) as (_, ledger):
        context.say(trust.revoke(ledger, config.keys_folder(), key_id, reason))


@app.command()
def rotate(ctx: typer.Context) -> None:
    """Put a new key in the place of yours.

    What the old one published stays valid. Run it again for each other ledger that trusts you.
    """
    from casparian_flow import config
    from casparian_flow.db import trust

    with context.opened(ctx) as (_, ledger):
        context.say(trust.rotate(ledger, config.keys_folder()))
