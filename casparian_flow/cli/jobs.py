"""`casparian jobs`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import All, AsJson, Limit
from casparian_flow.errors import counted

if TYPE_CHECKING:
    from casparian_flow.db.access import Ledger

app = context.group(
    "List, show, retry, dismiss and abort jobs.", invoke_without_command=True, no_args_is_help=False
)

Ids = Annotated[list[int], typer.Argument(metavar="ID", help="As in `casparian jobs`.")]


@app.callback()
def jobs(
    ctx: typer.Context,
    status: Annotated[
        str | None,
        typer.Option(metavar="STATUS", help="Only this status: QUEUED, FAILED, GONE-UNREAD, ..."),
    ] = None,
    plugin: Annotated[str | None, typer.Option(metavar="PLUGIN", help="Only this plugin.")] = None,
    path: Annotated[
        str | None,
        typer.Option(metavar="GLOB", help="Only files whose path matches; * also matches /."),
    ] = None,
    rejects: Annotated[
        bool,
        typer.Option(
            "--rejects",
            help="Only jobs of a file's latest version with more than 1 % rejects.",
        ),
    ] = False,
    held: Annotated[
        bool,
        typer.Option("--held", help="Only versions that wait for a person; as --status HELD."),
    ] = False,
    limit: Limit = None,
    every: All = False,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first.

    A failed job is listed as FAILED while somebody must act, or as HELD where its version does not
    fit a table's contract; later as MENDED, GONE UNREAD or DISMISSED.
    """
    if ctx.invoked_subcommand is not None:
        return
    from casparian_flow.db import failures, rebuild, views

    if held and status:
        raise typer.BadParameter("--held and --status cannot be combined")
    most = context.wanted(limit, every)
    ledgers, failure = _statuses(failures.HELD if held else status)
    with context.opened(ctx) as (_, ledger):
        named = _with_rejects(ledger) if rejects else None
        rows = ledger.read(
            lambda c: views.jobs(c, most, ledgers, plugin, path, failure, job_ids=named)
        )
        open_rebuilds = ledger.read(rebuild.progress)
    if not as_json:
        for row in rows:
            row.update(_in_words(row))
    columns = (
        "id status plugin plugin_version source rel_path version attempts rows rejects "
        "finished_at reason"
    )
    context.listing(rows, as_json, columns, "no matching jobs\n  try: casparian status")
    if not as_json:
        for each in open_rebuilds:
            context.note(f"note: {each.words}; {each.command}")


def _statuses(asked: str | None) -> tuple[str | None, str | None]:
    """The job status and the state of the failure that `--status` stands for."""
    from casparian_flow.db import failures
    from casparian_flow.db.states import JobStatus

    if asked is None:
        return None, None
    words = asked.upper().replace("-", " ").replace("_", " ")
    apart = {state.upper(): state for state in (failures.HELD, *failures.CLOSED)}
    if words in apart:
        return JobStatus.FAILED, apart[words]
    if words not in list(JobStatus):
        known = ", ".join([*JobStatus, *apart])
        raise typer.BadParameter(f"{asked!r} is no status; use {known}")
    return words, failures.OPEN if words == JobStatus.FAILED else None


def _with_rejects(ledger: Ledger) -> list[int]:
    from casparian_flow.db import outputs

    return [row["job"] for row in ledger.read(lambda c: outputs.reject_counts(c, None))]


def _in_words(job: dict[str, Any]) -> dict[str, Any]:
    """The columns that a table shows differently from `--json`."""
    from casparian_flow.db import failures
    from casparian_flow.db.outputs import NAMED_PERCENT

    apart = job["failure"] in (failures.HELD, *failures.CLOSED)
    total = job["rows"] + job["rejects"]
    share = 100 * job["rejects"] / total if total else 0
    named = f" ({share:.1f} %)" if share > NAMED_PERCENT else ""
    return {
        "status": job["failure"].upper() if apart else job["status"],
        "rows": job["rows"] or None,
        "rejects": f"{job['rejects']}{named}" if job["rejects"] else None,
    }


@app.command()
def show(
    ctx: typer.Context,
    job_id: Annotated[int, typer.Argument(metavar="ID", help="As in `casparian jobs`.")],
    as_json: AsJson = False,
) -> None:
    """Show a job in full.

    With its file, its attempts and their logs, and its outputs.
    """
    from casparian_flow.db import views
    from casparian_flow.errors import NotFound
    from casparian_flow.services.outputs import with_places

    with context.opened(ctx) as (_, ledger):
        job = ledger.read(lambda c: views.job(c, job_id))
    if job is None:
        raise NotFound(f"job {job_id} does not exist", "casparian jobs")
    with_places(job["outputs"])
    if as_json:
        context.document(job)
    else:
        _show(job)


def _show(job: dict[str, Any]) -> None:
    attempts, outputs = job.pop("attempt_log"), job.pop("outputs")
    context.facts(job)
    for attempt in attempts:
        context.say(
            f"\nattempt {attempt['fence']}: {attempt['outcome']} after {attempt['seconds']:.2f} s"
            f" on {attempt['worker']}, {context.cell('ended_at', attempt['ended_at'])}"
        )
        if attempt["sandbox"]:
            context.say(f"  sandbox: {attempt['sandbox']}")
        if evidence := _evidence(attempt):
            context.say(f"  {evidence}")
        if attempt["error"]:
            context.say(f"  {attempt['error']}")
        for line in attempt["log"].splitlines():
            context.say(f"  | {line}")
    if outputs:
        context.say("")
        columns = "topic state rows size_bytes target uri"
        context.listing(outputs, False, columns, "")
    elif job["status"] == "COMPLETED":
        context.say("\nthe plugin published nothing for this file")


def _received(attempt: dict[str, Any]) -> str:
    if not attempt["batches"]:
        return ""
    batches = counted(attempt["batches"], "batch", "batches")
    return f"{batches}, {counted(attempt['rows'], 'row')}"


def _evidence(attempt: dict[str, Any]) -> str:
    """What was measured of an attempt; zeros are left out."""
    code = attempt["exit_code"]
    facts = {
        "fault": attempt["fault"],
        "signal": attempt["signal"],
        "exit status": str(code) if code is not None else "",
        "received": _received(attempt),
        "memory": f"{attempt['max_rss_bytes'] >> 20} MiB at most",
        "processor": f"{attempt['cpu_seconds']:.2f} s",
    }
    measured = attempt["max_rss_bytes"] or attempt["batches"]
    if not measured and not attempt["fault"]:
        return ""
    return "; ".join(f"{name}: {words}" for name, words in facts.items() if words)


@app.command()
def retry(
    ctx: typer.Context,
    job_ids: Annotated[
        list[int] | None, typer.Argument(metavar="ID", help="As in `casparian jobs`.")
    ] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Every FAILED job.")] = False,
    plugin: Annotated[
        str | None, typer.Option(metavar="PLUGIN", help="With --failed: only this plugin.")
    ] = None,
    path: Annotated[
        str | None,
        typer.Option(
            metavar="GLOB",
            help="With --failed: only files whose path matches; * also matches /.",
        ),
    ] = None,
) -> None:
    """Queue failed or aborted jobs again.

    Their attempts start from zero again. Superseded jobs too, if the store has their bytes.
    """
    from casparian_flow.services import jobs

    if bool(job_ids) == failed:
        raise typer.BadParameter("give job ids, or --failed")
    if not failed and (plugin or path):
        raise typer.BadParameter("--plugin and --path need --failed")
    with context.opened(ctx) as (_, ledger):
        count = jobs.retry(ledger, job_ids or None, plugin=plugin, path=path)
    context.say(f"{counted(count, 'job')} queued")


@app.command()
def dismiss(
    ctx: typer.Context,
    job_ids: Annotated[
        list[int] | None, typer.Argument(metavar="ID", help="As in `casparian jobs`.")
    ] = None,
    all_gone: Annotated[
        bool,
        typer.Option(
            "--all-gone", help="Every failure whose file was deleted before it could be processed."
        ),
    ] = False,
) -> None:
    """Accept failures, so that they are no longer counted.

    The audit records who did it. A job that is retried and fails again is counted again.
    """
    from casparian_flow.services import jobs

    if bool(job_ids) == all_gone:
        raise typer.BadParameter("give job ids, or --all-gone")
    with context.opened(ctx) as (_, ledger):
        count = jobs.dismiss(ledger, job_ids or None)
    context.say(f"{counted(count, 'failure')} dismissed")


@app.command()
def abort(ctx: typer.Context, job_ids: Ids) -> None:
    """Abort queued and running jobs.

    A running job ends within seconds. A job that is COMMITTING cannot be aborted.
    """
    from casparian_flow.services import jobs

    with context.opened(ctx) as (_, ledger):
        count = jobs.abort(ledger, job_ids)
    context.say(f"{counted(count, 'job')} aborted")
