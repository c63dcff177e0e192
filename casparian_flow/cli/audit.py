"""`casparian audit`: what people did and what was committed, and whether anybody altered it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import All, AsJson, Limit
from casparian_flow.errors import ExitCode

app = context.group("Show and check the audit.")


@app.command()
def show(
    ctx: typer.Context,
    subject: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Only about this: 'plugin sales*'.")
    ] = None,
    seals: Annotated[
        bool, typer.Option("--seals", help="The seals too, which say what each transaction wrote.")
    ] = False,
    limit: Limit = None,
    every: All = False,
    as_json: AsJson = False,
) -> None:
    """Show what people did and what was committed, the newest first."""
    from casparian_flow.db import views

    most = context.wanted(limit, every)
    with context.opened(ctx) as (_, ledger):
        rows = ledger.read(lambda c: views.audit(c, most, subject, seals))
    if not as_json:
        for row in rows:
            row["detail"] = _in_short(row)
    context.listing(
        rows, as_json, "seq recorded_at actor action subject detail", "no such audit rows"
    )


def _in_short(row: dict[str, Any]) -> str:
    """A row's detail; of a seal, how many rows it holds: the digests are for `verify`."""
    from casparian_flow.db import replay

    return replay.in_short(row["detail"]) if row["action"] == "seal" else str(row["detail"])


@app.command()
def verify(
    ctx: typer.Context,
    head: Annotated[
        str | None,
        typer.Option(metavar="SEQ:HASH", help="A head noted earlier; proves it is still there."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that no row of the audit was altered or removed.

    Prints its head. Note that elsewhere: rows cut off at the end, or all of them written anew, can
    only be seen by whoever has an earlier head. Ends with 1 if anything is wrong.
    """
    from casparian_flow.db import audit

    noted = audit.Head(*_parse(head)) if head else None
    with context.opened(ctx) as (_, ledger):
        found = ledger.read(audit.head)
        problems = ledger.read(lambda c: list(audit.problems(c)))
        if noted:
            problems += ledger.read(lambda c: list(audit.lost(c, noted)))
    if as_json:
        context.document({"head": str(found), "problems": problems})
    else:
        for problem in problems:
            context.say(f"problem: {problem}")
        context.say(f"head {found}")
    raise typer.Exit(ExitCode.FAILED if problems else ExitCode.DONE)


def _parse(text: str) -> tuple[int, str]:
    seq, _, digest = text.partition(":")
    if not seq.isdecimal() or len(digest) != 64:
        raise typer.BadParameter(f"{text!r} is not a head, such as `casparian audit verify` prints")
    return int(seq), digest
