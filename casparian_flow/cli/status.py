"""Commands that only read: status, files, versions, cat, verify, audit; and backup."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import All, AsJson, Limit
from casparian_flow.errors import ExitCode, counted, tallied

File = Annotated[
    str, typer.Argument(metavar="PATH", help="The file, as SOURCE/path or as a path from here.")
]


def status(
    ctx: typer.Context,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Print only what is wrong; exit with 1 if anything is, else with 0."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the state of everything, and what to do next."""
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
        context.say(f"network   refused: {_counted(found['refused'])}")
    context.say(f"store     {_store(found['store'])}")
    counts = ", ".join(f"{n:,} {s}" for s, n in sorted(found["jobs"].items()))
    context.say(f"jobs      {counts or 'none'}")
    context.say(f"output    {context.amount(found['rows'], found['rejects']) or 'none'}")
    _say_seen("stale", found["stale"], "whose newer version was not processed")
    _say_seen("gone", found["gone"], "deleted or ignored since   (casparian files --gone)")
    context.say(f"scrub     {found['scrub']}")
    columns = "name path active watch files unreadable waiting held missed hidden scanned_at"
    _section("sources", found["sources"], f"{columns} scrubbed_at problem")
    written = [{**row, "age": context.age(row["seconds"])} for row in found["still_written"]]
    _section("still being written", written, "source rel_path age")
    if found["still_written_in_all"] > len(written):
        context.say(f"{len(written)} of {found['still_written_in_all']:,}")
    columns = "plugin topic started_at jobs ended_well stopped problem"
    _section("rebuilds", found["rebuilds"], columns)
    for table in found["tables"]:
        table["instead_of"] = ", ".join(table["instead_of"])
    _section("tables", found["tables"], "name version files rows rejects instead_of")
    _section("plugins", found["plugins"], "name version topics subscriptions")
    _section("sinks", found["sinks"], "uri topics rows place")
    _section("why jobs wait or failed", found["reasons"], "status jobs example reason")
    more = " ".join(["casparian jobs", *_of_one_status(found["reasons"]), "--all"])
    context.left_out(len(found["reasons"]), found["reasons_in_all"], more)
    columns = "job plugin source rel_path version rows rejects"
    _section("more than 1 % rejects", found["rejected_most"], columns)
    more = "casparian jobs --rejects --all"
    context.left_out(len(found["rejected_most"]), found["rejected_most_in_all"], more)


def _say_seen(title: str, seen: dict[str, int], which: str) -> None:
    """A line about some of the output, if it is any."""
    if seen["files"]:
        amount = context.amount(seen["rows"], seen["rejects"])
        context.say(f"{title:<9} {amount} of {counted(seen['files'], 'file')} {which}")


def _of_one_status(reasons: list[dict[str, Any]]) -> list[str]:
    """The option that selects the jobs of these reasons, if they have one status."""
    found = {row["status"] for row in reasons}
    return ["--status", *found] if len(found) == 1 else []


def _who(daemon: dict[str, Any] | None) -> str:
    if not daemon:
        return "not running"
    return "{role}, process {pid} on {host}, since {since}".format_map(daemon)


def _sandbox(mode: str, held_by: str) -> str:
    if mode == "required":
        return f"{mode} (the last plugin ran under {held_by})" if held_by else mode
    return (
        f"{mode.upper()}: layers that this machine lacks do not confine plugins (the last "
        f"plugin ran under {held_by or 'nothing yet'})"
    )


def _store(found: dict[str, Any]) -> str:
    """What share of the versions has its bytes, what the store holds, what it could not take."""
    versions, kept = found["versions"], found["kept_versions"]
    share = f"{kept:,} of {counted(versions, 'version')} ({_share(kept, versions)})"
    words = [f"the bytes of {share}"]
    if not found["keep"]:
        words.insert(0, "OFF ([store] keep = false)")
    words.append(
        f"{counted(found['contents'], 'content')} kept "
        f"({found['bytes']:,} of {found['limit']:,} bytes)"
    )
    if number := found["evicted_versions"]:
        words.append(f"{counted(number, 'version')} evicted")
    if number := found["unprotected_jobs"]:
        words.append(f"{counted(number, 'unfinished job')} without kept bytes")
    if found["fault"]:
        words.append(f"PAUSED: {found['fault']}")
    return "; ".join(words)


def _share(part: int, whole: int) -> str:
    """A share in per cent; 100 only where it is all."""
    return f"{100 if part == whole else min(99.9, 100 * part / whole):.3g} %"


def _counted(refused: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in refused.items())


def _section(title: str, rows: list[dict[str, Any]], columns: str) -> None:
    if rows:
        context.say(f"\n{title}")
        context.listing(list(rows), False, columns, "")


def files(
    ctx: typer.Context,
    source: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only this source root.")
    ] = None,
    gone: Annotated[
        bool, typer.Option("--gone", help="Deleted and moved files instead of existing ones.")
    ] = False,
    unreadable: Annotated[
        bool, typer.Option("--unreadable", help="Only files that could not be read.")
    ] = False,
    no_plugin: Annotated[
        bool,
        typer.Option(
            "--unrouted", help="Only files that match no plugin, each with the nearest rule."
        ),
    ] = False,
    copies: Annotated[
        bool,
        typer.Option(
            "--copies",
            help="Only files with the content of a deleted file whose rows are still visible.",
        ),
    ] = False,
    limit: Limit = None,
    every: All = False,
    as_json: AsJson = False,
) -> None:
    """List the known files.

    Each with its current version, that version's jobs, and how many rows readers see of the file.
    `table` is the table that has the file, and in brackets the plugin that would have it else.
    """
    from casparian_flow.db import views

    most = context.wanted(limit, every)
    if no_plugin + copies + (gone or unreadable) > 1:
        words = "--unrouted, --copies, and --gone with --unreadable cannot be combined"
        raise typer.BadParameter(words)
    with context.opened(ctx) as (_, ledger):
        if no_plugin:
            rows = ledger.read(lambda c: views.unrouted_files(c, most, source))
            columns, empty = "size_bytes detected_at nearest", "every file matches a plugin"
        elif copies:
            rows = ledger.read(lambda c: views.copies(c, most, source))
            columns, empty = "size_bytes detected_at copy_of", "no file is such a copy"
        else:
            rows = ledger.read(lambda c: views.files(c, most, source, gone, unreadable))
            when = "gone_at moved_to" if gone else "detected_at"
            columns = f"size_bytes versions content_hash rows {when} table jobs problem"
            empty = "no matching files\n  try: casparian status"
    context.listing(rows, as_json, f"source rel_path {columns}", empty)


def versions(
    ctx: typer.Context,
    path: File,
    as_json: AsJson = False,
) -> None:
    """List every version of a file.

    A version is one content that the file has had. Each is listed with its jobs, and with what
    became of its bytes in the store: kept, evicted, or not kept. `casparian cat` prints them.
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
        raise NotFound(f"no file is known as {path}", "casparian files   (or: casparian scan)")
    columns = "source rel_path version version_id current content_hash size_bytes bytes"
    columns += " detected_at jobs"
    context.listing(rows, as_json, columns, "")


def cat(
    ctx: typer.Context,
    path: File,
    version: Annotated[
        int | None,
        typer.Option(
            "--version", min=1, metavar="N", help="As in `casparian versions`; default: current."
        ),
    ] = None,
) -> None:
    """Print the bytes of a version.

    They come from the store, else from the file if it still has them, and are checked before the
    first byte is printed. Exits with 1 if neither has them, and with 66 if there is no such
    version; then nothing is printed.
    """
    import shutil
    import sys

    from casparian_flow.services import store_upkeep

    with context.opened(ctx) as (_, ledger):
        wanted = store_upkeep.find_version(ledger, path, version)
        with store_upkeep.opened(ledger, wanted) as content:
            shutil.copyfileobj(content, sys.stdout.buffer, 1 << 20)
            sys.stdout.buffer.flush()


def verify(ctx: typer.Context, as_json: AsJson = False) -> None:
    """Check the ledger, every output in it, and the store.

    Checks the ledger against its audit, the signatures of plugins, every output in its sink, and
    every byte in the store. Names each row that was changed, inserted or deleted outside Casparian
    Flow.
    Exits with 1 if anything is wrong.
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
        context.say(found if verdict.problems else "no problems found")
    raise typer.Exit(ExitCode.FAILED if verdict.problems else ExitCode.DONE)


# `casparian audit`.


audit_app = context.group("Show and check the audit.")


@audit_app.command("show")
def show_audit(
    ctx: typer.Context,
    subject: Annotated[
        str | None,
        typer.Option(metavar="GLOB", help="Only rows about this, such as 'plugin sales*'."),
    ] = None,
    seals: Annotated[
        bool, typer.Option("--seals", help="Also the seals: hashes of what each transaction wrote.")
    ] = False,
    limit: Limit = None,
    every: All = False,
    as_json: AsJson = False,
) -> None:
    """Show what people did and what was committed, newest first."""
    from casparian_flow.db import views

    most = context.wanted(limit, every)
    with context.opened(ctx) as (_, ledger):
        rows = ledger.read(lambda c: views.audit(c, most, subject, seals))
    if not as_json:
        for row in rows:
            row["detail"] = _in_short(row)
    context.listing(
        rows, as_json, "seq recorded_at actor action subject detail", "no matching audit rows"
    )


def _in_short(row: dict[str, Any]) -> str:
    """A row's detail; for a seal only how many rows it covers."""
    from casparian_flow.db import integrity

    return integrity.in_short(row["detail"]) if row["action"] == "seal" else str(row["detail"])


@audit_app.command("verify")
def verify_audit(
    ctx: typer.Context,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="SEQ:HASH", help="A head printed earlier; check that it is still in the audit."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that no row of the audit was changed or deleted.

    Prints the audit's head. Keep a copy elsewhere: only an earlier head shows that the last rows
    were cut off, or that all of them were rewritten. Exits with 1 if anything is wrong.
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
        raise typer.BadParameter(f"{text!r} is not a head; `casparian audit verify` prints one")
    return int(seq), digest


# `casparian backup`.


def backup(
    ctx: typer.Context,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    with_bytes: Annotated[
        bool,
        typer.Option("--with-bytes", help="Copy the store too, to the folder TARGET.store."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Copy the ledger to a file, while the daemon may run.

    The copy is checked before it gets its name. It has no outputs in it: they are in their sinks.
    The bytes of versions are in it only with --with-bytes.
    """
    from casparian_flow.services import backup as service

    with context.opened(ctx) as (settings, ledger):
        made = service.make(settings, ledger, target, force=force, with_bytes=with_bytes)
    if as_json:
        context.document(made._asdict())
        return
    context.say(f"backup  {made.path} ({made.size_bytes:,} bytes)")
    context.say(f"holds   {tallied(made.holds)}")
    contents = counted(made.bytes_kept, "content")
    context.say(
        f"bytes   {contents} in {made.store}"
        if made.store
        else f"bytes   none: {contents} stay in the store (--with-bytes copies them)"
    )
    context.say(f"head    {made.head}")
