"""The commands that only look: status, files, versions, verify."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import All, AsJson, Limit
from casparian_flow.errors import ExitCode, counted, tallied

if TYPE_CHECKING:
    pass


def status(
    ctx: typer.Context,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Say only what is wrong; end with 1 if anything is, else with 0."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show how things stand, and what is missing."""
    from casparian_flow.services import report

    with context.opened(ctx) as (settings, ledger):
        if check and not as_json:
            advice = report.advise(settings, ledger)
            found: dict[str, Any] = {}
        else:
            found = report.status(settings, ledger)
            advice = [report.Advice(**each) for each in found["advice"]]
    wrong = [each for each in advice if each.wrong]
    if as_json:
        context.document(found)
    elif check:
        context.advise(wrong)
    else:
        _print_status(found)
        if advice:
            context.say("")
        context.advise(advice)
    raise typer.Exit(ExitCode.FAILED if check and wrong else ExitCode.DONE)


def _print_status(found: dict[str, Any]) -> None:
    context.say(f"database  {found['database']}")
    context.say(f"daemon    {_who(found['daemon'])}")
    context.say(f"sandbox   {_sandbox(found['sandbox'], found['held_by'])}")
    if found["refused"]:
        context.say(f"wire      refused: {_counted(found['refused'])}")
    context.say(f"snapshots {_snapshots(found['snapshots'])}")
    counts = ", ".join(f"{n:,} {s}" for s, n in sorted(found["jobs"].items()))
    context.say(f"jobs      {counts or 'none'}")
    context.say(f"output    {context.amount(found['rows'], found['rejects']) or 'none'}")
    context.say(f"scrub     {found['scrub']}")
    columns = "name path active watch files unreadable waiting held missed hidden scanned_at"
    _section("sources", found["sources"], f"{columns} scrubbed_at problem")
    written = [{**row, "age": context.age(row["seconds"])} for row in found["still_written"]]
    _section("still being written", written, "source rel_path age")
    if found["still_written_in_all"] > len(written):
        context.say(f"{len(written)} of {found['still_written_in_all']:,}")
    _section("plugins", found["plugins"], "name version topics subscriptions")
    _section("sinks", found["sinks"], "uri topics rows place")
    _section("why jobs wait or failed", found["reasons"], "status jobs example reason")
    more = " ".join(["casparian jobs", *_of_one_status(found["reasons"]), "--all"])
    context.left_out(len(found["reasons"]), found["reasons_in_all"], more)
    columns = "job plugin source rel_path version rows rejects"
    _section("more than 1 % rejects", found["rejected_most"], columns)
    more = "casparian jobs --rejects --all"
    context.left_out(len(found["rejected_most"]), found["rejected_most_in_all"], more)


def _of_one_status(reasons: list[dict[str, Any]]) -> list[str]:
    """Options that leave out the jobs that wait for nothing and have not failed."""
    found = {row["status"] for row in reasons}
    return ["--status", *found] if len(found) == 1 else []


def _who(daemon: dict[str, Any] | None) -> str:
    if not daemon:
        return "not running"
    return "{role}, process {pid} on {host}, since {since}".format_map(daemon)


def _sandbox(mode: str, held_by: str) -> str:
    if mode == "required":
        return f"{mode} (the last guest was held by {held_by})" if held_by else mode
    return f"{mode.upper()}: plugins may do what the missing layers would forbid ({held_by or '?'})"


def _snapshots(store: dict[str, Any]) -> str:
    """What is in force, for which sources, and what the store holds."""
    held = f"{store['snapshots']} kept, {store['bytes']:,} of {store['keep_bytes']:,} bytes"
    words = [f"{store['mode']} ({held})"]
    if store["mode"] != "off":
        otherwise = "copied" if store["mode"] == "copy" else "not kept, since blocks are not shared"
        kinds = {True: "blocks shared", False: otherwise, None: "not tried: unreadable"}
        sources = store["sources"] or {"this filesystem": store["shares"]}
        for shares, kind in kinds.items():
            if names := ", ".join(name for name, found in sources.items() if found is shares):
                words.append(f"{kind}: {names}")
    if store["unprotected_jobs"]:
        without = counted(store["unprotected_jobs"], "unfinished job")
        words.append(f"{without} without one")
    return "; ".join(words)


def _counted(refused: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in refused.items())


def _section(title: str, rows: list[dict[str, Any]], columns: str) -> None:
    if rows:
        context.say(f"\n{title}")
        context.listing(list(rows), False, columns, "")


def files(
    ctx: typer.Context,
    source: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only of this source root.")
    ] = None,
    gone: Annotated[
        bool, typer.Option("--gone", help="Those that were deleted, instead of those there.")
    ] = False,
    unreadable: Annotated[
        bool, typer.Option("--unreadable", help="Only those that could not be read.")
    ] = False,
    no_plugin: Annotated[
        bool,
        typer.Option("--unrouted", help="Only those that no plugin wants, with the nearest rule."),
    ] = False,
    limit: Limit = None,
    every: All = False,
    as_json: AsJson = False,
) -> None:
    """List the files that are known.

    Each with its current version and the jobs of it.
    """
    from casparian_flow.db import views

    most = context.wanted(limit, every)
    if no_plugin:
        if gone or unreadable:
            raise typer.BadParameter("--unrouted goes with neither --gone nor --unreadable")
        _unrouted(ctx, source, most, as_json)
        return
    with context.opened(ctx) as (_, ledger):
        rows = ledger.read(lambda c: views.files(c, most, source, gone, unreadable))
    columns = "source rel_path size_bytes versions content_hash detected_at jobs problem"
    context.listing(rows, as_json, columns, "no such files\n  try: casparian status")


def _unrouted(ctx: typer.Context, source: str | None, limit: int | None, as_json: bool) -> None:
    from casparian_flow.db import views

    with context.opened(ctx) as (_, ledger):
        rows = ledger.read(lambda c: views.unrouted_files(c, limit, source))
    columns = "source rel_path size_bytes detected_at nearest"
    context.listing(rows, as_json, columns, "every file is wanted by some plugin")


def versions(
    ctx: typer.Context,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="Under its source root, as NAME/path, or as a path from here."
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """List every content a file has had.

    Each with its jobs.
    """
    from casparian_flow.db import routing, views
    from casparian_flow.errors import NotFound

    with context.opened(ctx) as (_, ledger):
        rows = ledger.read(
            lambda c: [
                row
                for root, below, shown in routing.resolve_argument(c, path)
                for row in views.versions(c, root.id, below, shown)
            ]
        )
    if not rows:
        raise NotFound(f"no file {path} is known", "casparian files   (or: casparian scan)")
    columns = "source rel_path version current content_hash size_bytes detected_at jobs"
    context.listing(rows, as_json, columns, "")


def verify(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Check every claim of the ledger.

    Against itself, its audit and the seals in it, the signatures of plugins, every output in its
    sink, and every snapshot. A row that was altered, added or removed by other hands is named.
    Ends with 1 if anything is wrong.
    """
    from dataclasses import asdict

    from casparian_flow.services.verify import verify as check

    with context.opened(ctx) as (settings, ledger):
        verdict = check(settings, ledger)
    if as_json:
        context.document(asdict(verdict))
    else:
        context.say(f"checked: {tallied(verdict.checked)}")
        for problem in verdict.problems:
            context.say(f"problem: {problem}")
        for note in verdict.notes:
            context.say(f"note: {note}")
        found = counted(len(verdict.problems), "problem")
        context.say(found if verdict.problems else "everything holds")
    raise typer.Exit(ExitCode.FAILED if verdict.problems else ExitCode.DONE)


# `casparian audit`: what people did and what was committed, and whether anybody altered it.


audit_app = context.group("Show and check the audit.")


@audit_app.command("show")
def show_audit(
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
    from casparian_flow.db import integrity

    return integrity.in_short(row["detail"]) if row["action"] == "seal" else str(row["detail"])


@audit_app.command("verify")
def verify_audit(
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

    noted = audit.Head(*_parse_head(head)) if head else None
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


def _parse_head(text: str) -> tuple[int, str]:
    seq, _, digest = text.partition(":")
    if not seq.isdecimal() or len(digest) != 64:
        raise typer.BadParameter(f"{text!r} is not a head, such as `casparian audit verify` prints")
    return int(seq), digest


# `casparian backup`.


def backup(
    ctx: typer.Context,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The file to write.")],
    force: Annotated[
        bool, typer.Option("--force", help="Replace the file if it is there.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Copy the ledger to a file, while work goes on.

    The copy is checked before it gets its name. Outputs are not in it: they are in their sinks.
    """
    from casparian_flow.services import backup as service

    with context.opened(ctx) as (settings, ledger):
        made = service.make(settings, ledger, target, force=force)
    if as_json:
        context.document(made._asdict())
        return
    context.say(f"backup  {made.path} ({made.size_bytes:,} bytes)")
    context.say(f"holds   {tallied(made.holds)}")
    context.say(f"head    {made.head}")
