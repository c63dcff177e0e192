"""`casparian try`: what a plugin makes of one file, without a trace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import AsJson
from casparian_flow.errors import ExitCode, counted

if TYPE_CHECKING:
    import pyarrow as pa

    from casparian_flow.config import Settings
    from casparian_flow.db.access import Ledger
    from casparian_flow.protocol import Assignment
    from casparian_flow.services.trial import First, Subject, Tried

ROWS = 10
"""Rows and rejects that are shown of each topic."""


def try_file(
    ctx: typer.Context,
    plugin: Annotated[
        str,
        typer.Argument(
            metavar="PLUGIN",
            help="A published plugin or table, else a bundled plugin; or a file, if it has a / or "
            "ends in .py.",
        ),
    ],
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="A path from here; or SOURCE/path of a known file."),
    ],
    version: Annotated[
        int | None,
        typer.Option(
            "--version", min=1, metavar="N", help="This version of it, as in `casparian versions`."
        ),
    ] = None,
    rows: Annotated[
        int, typer.Option(min=0, metavar="N", help="At most N rows of each topic.")
    ] = ROWS,
    as_json: AsJson = False,
) -> None:
    """Show what a plugin makes of one file, and record nothing.

    Runs it as a job would, in its environment and the sandbox, and prints the first rows of each
    topic with their types, the rejects and the log. Exits with 1 if a job would fail.
    """
    from casparian_flow import config
    from casparian_flow.services.trial import First, Trials, subject

    with context.opened(ctx) as (settings, ledger):
        found = subject(ledger, settings, plugin, context.note)
        given = _file(ledger, settings, file, version)
        with Trials(settings, config.cache_folder(), found) as trials:
            (tried,) = trials.run([given], lambda: First(found.artifact.topics, rows, rows))
    if as_json:
        context.document(_document(found, tried))
    else:
        _print(found, tried)
    raise typer.Exit(ExitCode.FAILED if tried.error else ExitCode.DONE)


def _file(ledger: Ledger, settings: Settings, file: str, version: int | None) -> Assignment:
    """The file of a path from here, else the version of a known one."""
    from casparian_flow.services import store_upkeep, trial

    if version is None and Path(file).is_file():
        return trial.of_file(ledger, Path(file))
    wanted = store_upkeep.find_version(ledger, file, version)
    return trial.of_version(settings, wanted)


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _document(found: Subject, tried: Tried[First]) -> dict[str, Any]:
    from casparian_flow.services.trial import balance

    closed = balance(tried.log)
    error = tried.error
    return {
        "plugin": found.artifact.name,
        "version": found.artifact.version,
        "file": tried.name,
        "content_hash": tried.file.content_hash,
        "would": "fail" if error else "complete",
        "error": error.message if error else "",
        "hint": error.hint if error else "",
        "topics": {
            topic: {
                "rows": tried.output.rows[topic],
                "columns": {field.name: str(field.type) for field in table.schema},
                "first": _rows(table),
            }
            for topic, table in tried.output.tables.items()
        },
        "balance": closed._asdict() if closed else None,
        "log": tried.log,
        "seconds": tried.seconds,
    }


def _print(found: Subject, tried: Tried[First]) -> None:
    from casparian_flow.cli.query import shown

    context.note(f"{found.words} with {tried.name} (sha256 {tried.file.content_hash[:12]})")
    for topic, table in tried.output.tables.items():
        noun = "reject" if topic in tried.output.reject_topics else "row"
        total = tried.output.rows[topic]
        context.say(f"{topic}: {counted(total, noun)}")
        names = [f"{field.name} {field.type}" for field in table.schema]
        if table.num_rows:
            context.table(names, [list(row.values()) for row in _rows(table)], shown)
        else:
            context.say(f"  {', '.join(names)}")
        context.left_out(table.num_rows, total, "--rows N")
        context.say("")
    for line in tried.log.splitlines():
        context.say(f"| {line}")
    if tried.error:
        context.note(f"a job would fail: {tried.error.message}")
        if tried.error.hint:
            context.note(f"  try: {tried.error.hint}")
    else:
        context.note(f"a job would complete after {tried.seconds:.1f} s; nothing was recorded")
