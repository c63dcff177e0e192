"""The command line: a function for each command, a file for each group.

Only typer is imported before a command runs, so that `casparian --help` is quick.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from casparian_flow.cli import (
    backfill,
    context,
    demo,
    jobs,
    keys,
    later,
    outputs,
    plugins,
    query,
    rebuild,
    rules,
    scan,
    source,
    start,
    status,
    table,
    topics,
    try_file,
    upgrade,
)
from casparian_flow.errors import CasparianError, ExitCode, first_error

EXIT_CODES = "\n".join(["\b", "Exit codes:", *(f"{code:5}  {code.meaning}" for code in ExitCode)])

app = context.group(
    "Turn files dropped into directories into tables, and trace every row to its file.",
    epilog=EXIT_CODES,
    add_completion=True,
)
later.command(app, start.init)
later.group(app, source.app, "source")
later.command(app, plugins.publish)
later.group(app, table.app, "table")
later.command(app, try_file.try_file, "try")
later.command(app, start.start)
later.command(app, scan.scan)
later.command(app, start.wait)
later.command(app, status.status)
later.group(app, jobs.app, "jobs")
later.command(app, backfill.backfill)
later.command(app, rebuild.rebuild)
later.command(app, status.files)
later.command(app, status.versions)
later.command(app, status.cat)
later.group(app, plugins.app, "plugins")
later.group(app, keys.app, "keys")
later.group(app, rules.app, "rules")
later.group(app, topics.app, "topics")
later.command(app, query.query)
later.group(app, outputs.app, "outputs")
later.command(app, outputs.retract)
later.command(app, status.verify)
later.group(app, status.audit_app, "audit")
later.command(app, status.backup)
later.command(app, upgrade.upgrade)
later.command(app, demo.demo)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        context.say(f"casparian-flow {version('casparian-flow')}, Python {sys.version.split()[0]}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="The configuration file; default: $CASPARIAN_CONFIG, else the nearest "
            "global_config.toml in this directory or above it.",
        ),
    ] = None,
    debug: Annotated[
        bool, typer.Option("--debug", help="Log everything, and show tracebacks.")
    ] = False,
    _: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=_show_version,
            help="Print the name, the version and Python's version, and exit.",
        ),
    ] = False,
) -> None:
    """Options of every command."""
    ctx.obj = config
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
    )
    logging.getLogger("watchdog").setLevel(logging.INFO)  # else every event is a line


def main() -> None:
    """The entry point: run a command and exit with its `ExitCode`."""
    try:
        code = app(prog_name="casparian", standalone_mode=False)
    except typer.Abort:
        code = ExitCode.INTERRUPTED
    except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001 - the last place to say it
        code = _explain(error)
    sys.exit(code or ExitCode.DONE)


def _misuse(error: BaseException) -> str:
    """A message for errors in the user's input or terminal; empty for other errors."""
    match error:
        case FileNotFoundError(filename=None):
            return "the current directory was deleted\n  try: cd to another one"
        case OverflowError():
            return "number out of range"
        case UnicodeEncodeError(encoding="utf-8"):
            return f"{error.object!a} is not UTF-8"
        case UnicodeEncodeError():
            return (
                f"the output's encoding {error.encoding} has no {error.object[error.start]!a}\n"
                "  try: PYTHONIOENCODING=utf-8 casparian ..."
            )
    return ""


def _explain(error: BaseException) -> int:
    """Print an error and its hint; returns the exit code."""
    error = first_error(error)
    if show := getattr(error, "show", None):  # typer's own: wrong usage, and it says so itself
        show()
        return ExitCode.USAGE
    debug = logging.getLogger().isEnabledFor(logging.DEBUG)
    if debug:
        logging.getLogger(__name__).debug("this is where it happened", exc_info=error)
    if isinstance(error, CasparianError):
        context.note(f"error: {error.message}")
        if error.hint:
            context.note(f"  try: {error.hint}")
        return error.exit_code
    if fault := _misuse(error):
        context.note(f"error: {fault}")
        return ExitCode.USAGE
    context.note(f"error: a bug in casparian: {type(error).__name__}: {error}")
    if not debug:
        context.note(
            "  try: casparian --debug ...   (the same command; then report what it prints)"
        )
    return ExitCode.BUG
