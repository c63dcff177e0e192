"""`casparian scan`: one scan, as for cron; with `--drain` it also runs the jobs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from casparian_flow.cli import context
from casparian_flow.errors import ExitCode, counted

if TYPE_CHECKING:
    import asyncio

    from casparian_flow.cli.context import Here, Line
    from casparian_flow.db.views import Waiting
    from casparian_flow.services.scan import ScanReport
    from casparian_flow.services.scout import ScrubReport

SHOWN = 20
"""At most so many files or jobs of a kind are listed; the rest is counted."""

POLL_SECONDS = 0.2
POLL_SHARE = 10
"""Reading a long queue is slow: at most a tenth of the time is spent on it."""

PATIENCE_SECONDS = 6.0
"""The Committer retries a paused job within this time; a job that still waits is stuck."""

STUCK_LOOKS = 8
"""Looks that find nothing running before a job that is free to run counts as stuck: more than
the Sentinel's slow poll."""


def scan(
    ctx: typer.Context,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Source roots; default: all.")
    ] = None,
    drain: Annotated[
        bool,
        typer.Option("--drain", help="Also run the jobs, or wait for the daemon to run them."),
    ] = False,
    scrub: Annotated[
        bool,
        typer.Option(
            "--scrub",
            help="Also read every file again, to find changes that its size and timestamps do "
            "not show.",
        ),
    ] = False,
    believe: Annotated[
        bool,
        typer.Option(
            "--believe-deletions", help="Mark missing files as deleted, however many they are."
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only what is wrong.")] = False,
) -> None:
    """Scan once for changed files and queue their jobs.

    For cron; it may also run beside a daemon. With --drain it exits with 1 if a job of this run
    failed or is held; those of earlier runs do not count.
    """
    from casparian_flow.services import inventory

    with context.opened(ctx) as here, context.line(quiet=quiet) as line:
        for words in inventory.take(here.settings, here.ledger):
            context.note(words)
        wanted = set(_unfinished(here) if drain else ())
        reports, scrubs = _look(here, names or (), line, believe=believe, scrub=scrub)
        line.clear()
        for report in reports:
            _print(report, quiet)
        for scrubbed in scrubs:
            _print_scrub(scrubbed, quiet)
        here.ledger.wake()
        reason = ""
        if drain:
            # A daemon may have scanned the files first: wait for the jobs that it queued for them.
            wanted.update(_unfinished(here), *(report.job_ids for report in reports))
            wanted.update(*(scrubbed.job_ids for scrubbed in scrubs))
        if wanted:
            import asyncio

            reason = asyncio.run(_see_through(here, sorted(wanted), line))
            line.clear()
        code = _verdict(here, reports, sorted(wanted), reason, quiet)
        if not code and any(scrubbed.unreadable for scrubbed in scrubs):
            code = ExitCode.PARTIAL
    raise typer.Exit(code)


def _look(
    here: Here, names: Sequence[str], line: Line, *, believe: bool, scrub: bool
) -> tuple[list[ScanReport], list[ScrubReport]]:
    from casparian_flow.services import scout
    from casparian_flow.services.scout import scrub as read_again

    reports, scrubs = [], []
    for root in scout.roots(here.ledger, names):
        line.show(f"scanning {root.name} ({root.path})")
        reports.append(scout.scan_until_settled(here.ledger, root, believe=believe))
        if scrub and not reports[-1].problem:
            line.show(f"scrubbing {root.name} ({root.path})")
            scrubs.append(read_again(here.ledger, root, anew=True))
    return reports, scrubs


def _unfinished(here: Here) -> list[int]:
    from casparian_flow.db import jobs, views

    return here.ledger.read(lambda c: views.job_ids(c, jobs.UNFINISHED))


def _print(report: ScanReport, quiet: bool) -> None:
    if report.problem:
        return
    if not quiet:
        context.say(f"{report.source}: {_found(report)}")
    _name("unreadable", report.unreadable, f"casparian files --source {report.source} --unreadable")
    for words in report.untold:
        context.note(f"  {words}\n    try: casparian scan   (tells it again)")
    _print_written(report)
    if report.waiting and not quiet:
        wait = "waits for its" if report.waiting == 1 else "wait for their"
        context.note(f"  {counted(report.waiting, 'file')} {wait} done file or minimum age")
    if report.passed_over:
        context.note(
            f"  {counted(report.passed_over, 'known file')} now ignored; the rows stay\n    "
            f"try: casparian source show {report.source}"
        )
    if report.held:
        context.note(
            f"  {counted(report.held, 'file')} disappeared at once; not marked deleted yet\n"
            f"    try: casparian scan {report.source} --believe-deletions   (if they were "
            "deleted)"
        )


def _found(report: ScanReport) -> str:
    """The counts of a scan; zeros are left out."""
    words = [
        (len(report.job_ids), f"{counted(len(report.job_ids), 'job')} queued"),
        (report.gone, f"{report.gone:,} deleted"),
        (report.change.any, report.change.words),
        (len(report.unreadable), f"{len(report.unreadable):,} unreadable"),
        (len(report.unsettled), f"{len(report.unsettled):,} still being written"),
    ]
    found = [counted(report.files, "file")]
    if report.versions:
        found.append(counted(report.versions, "new version"))
    return ", ".join([*found, *(said for number, said in words if number)])


def _print_written(report: ScanReport) -> None:
    """List files that are still being written, oldest first."""
    from casparian_flow.db.versions import display

    if not report.unsettled:
        return
    now = time.time()
    for path, since in sorted(report.writing.items(), key=lambda item: item[1])[:SHOWN]:
        context.note(
            f"  {report.source}/{display(path)}: still being written, first seen "
            f"{context.age(now - since)} ago"
        )
    if len(report.writing) > SHOWN:
        context.note(f"  and {len(report.writing) - SHOWN:,} more still being written")
    context.note("  the next scan checks them again")


def _name(what: str, all_of_them: Sequence[str], more: str) -> None:
    """List the first of these, and count the rest."""
    for words in all_of_them[:SHOWN]:
        context.note(f"  {what}: {words}")
    if len(all_of_them) > SHOWN:
        context.note(f"  and {len(all_of_them) - SHOWN:,} more: {more}")


def _print_scrub(report: ScrubReport, quiet: bool) -> None:
    if not quiet:
        words = [f"{counted(report.files, 'file')} read again"]
        if report.hidden:
            words.append(f"{len(report.hidden):,} changed with the same size and timestamps")
        if report.unreadable:
            words.append(f"{len(report.unreadable):,} unreadable")
        context.say(f"{report.source}: {', '.join(words)}")
    _name("changed", report.hidden, "casparian jobs   (each file has a new version)")
    _name("unreadable", report.unreadable, f"casparian files --source {report.source} --unreadable")


def _verdict(
    here: Here, reports: Sequence[ScanReport], wanted: Sequence[int], reason: str, quiet: bool
) -> ExitCode:
    """Print how it ended; returns the exit code.

    Raises:
        SourceError: a source root is frozen.
    """
    from casparian_flow.errors import SourceError
    from casparian_flow.services.report import advise

    waits = _print_jobs(here, wanted, reason, quiet) if wanted else False
    # The jobs were reported above.
    advice = advise(here.settings, here.ledger, of_jobs=not wanted)
    context.advise(each for each in advice if each.wrong or not quiet)
    for report in reports:
        if report.problem:
            raise SourceError(
                report.problem, "mount or restore it; until then its files count as unchanged"
            )
    if waits or reason:
        return ExitCode.INTERRUPTED if reason == _STOPPED else ExitCode.FAILED
    partial = any(r.unreadable or r.unsettled or r.held for r in reports)
    return ExitCode.PARTIAL if partial else ExitCode.DONE


def _print_jobs(here: Here, wanted: Sequence[int], reason: str, quiet: bool) -> bool:
    """Print how these jobs ended; returns whether any has an open failure or is held.

    All of them were unfinished at the start, so any failure is of this run.
    """
    from casparian_flow.db import failures, outputs
    from casparian_flow.services import report

    if not quiet:
        context.say(_became(here, wanted))
    if reason:
        context.note(f"error: not all jobs are done: {reason}\n  try: casparian status")
    named = here.ledger.read(lambda c: outputs.reject_counts(c, SHOWN, wanted))
    for row in named:
        context.note(f"  rejects: {context.rejected(row)}")
    if more := named.total - len(named):
        context.note(f"  and {more:,} more: casparian jobs --rejects --all")
    opened = here.ledger.read(lambda c: failures.job_ids(c, failures.OPEN))
    failed = sorted(set(opened).intersection(wanted))
    _print_failed(here, failed)
    waiting = report.held(here.ledger, wanted)
    context.advise(waiting)
    if earlier := len(opened) - len(failed):
        words = f"{counted(earlier, 'job')} failed in earlier runs"
        context.note(f"{words}\n  try: casparian jobs --status FAILED")
    held = here.ledger.read(lambda c: failures.job_ids(c, failures.HELD))
    if earlier := len(set(held).difference(wanted)):
        some = counted(earlier, "version")
        be = "is" if earlier == 1 else "are"
        context.note(f"{some} {be} held since earlier runs\n  try: casparian jobs --held")
    return bool(failed or waiting)


def _became(here: Here, wanted: Sequence[int]) -> str:
    """Jobs by outcome, rows and rejects; zeros are left out."""
    from casparian_flow.db import failures, jobs, outputs

    outcomes = here.ledger.read(lambda c: jobs.counts_of(c, wanted))
    if outcomes.pop("FAILED", 0):
        states = here.ledger.read(lambda c: failures.counts(c, wanted))
        states["FAILED"] = states.pop(failures.OPEN, 0)
        outcomes.update(states)
    words = [f"{counted(n, 'job')} {status}" for status, n in sorted(outcomes.items()) if n]
    came = context.amount(*here.ledger.read(lambda c: outputs.rejected_of_jobs(c, wanted)))
    return "; ".join(filter(None, [", ".join(words), came]))


def _print_failed(here: Here, failed: Sequence[int]) -> None:
    from casparian_flow.db import views

    for job_id in failed[:SHOWN]:
        job = here.ledger.read(lambda c, job_id=job_id: views.job(c, job_id)) or {}  # type: ignore[misc]
        context.note(f"  failed: {job['source']}/{job['rel_path']}: {job['reason']}")
        context.note(f"    try: casparian jobs show {job_id}")
    if len(failed) > SHOWN:
        context.note(f"  and {len(failed) - SHOWN:,} more: casparian jobs --status FAILED")


_STOPPED = "interrupted; unfinished jobs stay queued"


async def _see_through(here: Here, wanted: Sequence[int], line: Line) -> str:
    """Run the jobs, or wait for the daemon that does, until readers see what they gave; returns why
    not all is done, or empty."""
    import asyncio

    from casparian_flow.services import outputs

    outcome = await _worked(here, wanted, line)
    # A job in several stores is shown after it is COMPLETED.
    untold = await asyncio.to_thread(outputs.tell, here.ledger)
    return outcome or "; ".join(untold)


async def _worked(here: Here, wanted: Sequence[int], line: Line) -> str:
    """Run the jobs, or wait for the daemon that does; returns why not all are done, or empty."""
    import asyncio

    from casparian_flow import durable, main
    from casparian_flow.db import views
    from casparian_flow.errors import DaemonRunning

    stop = asyncio.Event()
    main.stop_on_signals(stop)
    lock = here.settings.database.daemon_lock
    workers = here.settings.workers.effective
    while True:
        if durable.daemon_lock_holder(lock) is None:
            # If another process becomes the daemon first, wait for it.
            with contextlib.suppress(DaemonRunning):
                async with main.running(
                    here.settings, "casparian scan --drain", workers=workers, watch=False
                ) as daemon:
                    here = here._replace(ledger=daemon.ledger)
                    return await _done(here, views.EVERY, line, stop, of_daemon=False) or ""
        outcome = await _done(here, wanted[-1], line, stop, of_daemon=True)
        if outcome is not None:
            return outcome


async def _done(
    here: Here, up_to: int, line: Line, stop: asyncio.Event, *, of_daemon: bool
) -> str | None:
    """Wait until no job up to this id is unfinished.

    Args:
        of_daemon: another process works them; give up when it ends.

    Returns:
        Empty when they are done; why they are not, when all that is left is paused or we are
        told to stop; None when the daemon we waited for has ended.

    Raises:
        LedgerError: nothing can be written, and has not been for a while.
    """
    import asyncio

    from casparian_flow import durable
    from casparian_flow.cli.context import waiting
    from casparian_flow.db import views
    from casparian_flow.db.states import PAUSED

    calm = 0
    patience = time.monotonic() + PATIENCE_SECONDS
    while True:
        began = time.monotonic()
        since, fault = here.ledger.failing or (began, None)
        if fault and began - since > PATIENCE_SECONDS:
            raise fault
        left = await here.ledger.read_soon(lambda c: views.waiting(c, PAUSED, up_to))
        if not left.unfinished:
            return ""
        line.show(waiting(left))
        calm = calm + 1 if _is_stuck(left) and began > patience else 0
        if calm and (left.paused == left.unfinished or calm > STUCK_LOOKS):
            return left.reason
        if of_daemon and durable.daemon_lock_holder(here.settings.database.daemon_lock) is None:
            return None
        pause = max(POLL_SECONDS, POLL_SHARE * (time.monotonic() - began))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await stop.wait()
            return _STOPPED


def _is_stuck(left: Waiting) -> bool:
    """Whether jobs are paused, none runs, and none has a retry scheduled."""
    return bool(left.paused) and not left.running and not left.later
