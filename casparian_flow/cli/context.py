"""What every command shares: opening the ledger, and printing.

What a command found or did goes to standard output, everything else to standard error.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from casparian_flow.errors import counted

if TYPE_CHECKING:
    from casparian_flow.config import DatabaseSettings, Settings
    from casparian_flow.db.access import Ledger
    from casparian_flow.db.views import Waiting
    from casparian_flow.services.report import Advice


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

LIMIT = 50
"""Default number of rows in a list."""

Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="At most N rows; default: 50.")]

All = Annotated[bool, typer.Option("--all", help="All rows.")]


LEGEND = {
    "waiting": "files that wait for their done file or minimum age",
    "held": "files that disappeared at once and are not marked deleted yet",
    "missed": "changes that a full scan found and no file event announced",
    "hidden": "changes that kept the file's size and timestamps",
}
"""Column -> what its numbers count, where the name alone does not say."""

USUALLY_EMPTY = {*LEGEND, "unreadable", "unsettled", "done_file", "min_age_seconds", "problem"}


def wanted(limit: int | None, every: bool) -> int | None:
    """The number of rows that `--limit` and `--all` ask for; None for all rows."""
    if every and limit is not None:
        raise typer.BadParameter("use --limit or --all, not both")
    return None if every else limit or LIMIT


class Here(NamedTuple):
    """The configuration and its ledger."""

    settings: Settings
    ledger: Ledger


def group(words: str, **options: Any) -> typer.Typer:
    """A group of commands with plain help."""
    return typer.Typer(
        help=words,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        **{"no_args_is_help": True, "add_completion": False, **options},
    )


@contextlib.contextmanager
def opened(ctx: typer.Context) -> Iterator[Here]:
    """The configuration and the open ledger of a command."""
    from casparian_flow import config
    from casparian_flow.db.access import open_ledger

    config.arm_crashpoints()
    settings = config.load(ctx.obj)
    with open_ledger(settings.database, _wake) as ledger:
        yield Here(settings, ledger)


def _wake(database: DatabaseSettings, scan: bool) -> None:
    from casparian_flow import durable

    if durable.daemon_lock_holder(database.daemon_lock) is None:
        return  # most commands run without one: do not load ZeroMQ
    from casparian_flow.engine import control

    control.wake(database, scan)


def say(words: str) -> None:
    """Print a result to standard output."""
    typer.echo(printable(words))


def note(words: str) -> None:
    """Print a remark to standard error."""
    typer.echo(printable(words), err=True)


def advise(advice: Iterable[Advice]) -> None:
    """Print each advice and its command."""
    for each in advice:
        note(f"{each.words}\n  try: {each.command}")


def amount(rows: int, rejects: int) -> str:
    """`3 rows, 1 reject`; zeros are left out."""
    some = [(rows, "row"), (rejects, "reject")]
    return ", ".join(counted(number, noun) for number, noun in some if number)


def rejected(row: Mapping[str, Any]) -> str:
    """A line about a version with many rejects, from a row of `db.outputs.reject_counts`."""
    total = row["rows"] + row["rejects"]
    return (
        f"{row['source']}/{row['rel_path']}, version {row['version']}: {row['rejects']:,} of "
        f"{total:,} rejected ({100 * row['rejects'] / total:.1f} %)"
        f"\n    try: casparian jobs show {row['job']}"
    )


def document(data: Any) -> None:
    """Print the JSON document of `--json`."""
    typer.echo(json.dumps(data, indent=2, default=plain))


def plain(value: Any) -> Any:
    """A value that JSON lacks: times in ISO 8601, bytes in hexadecimal."""
    if isinstance(value, date | datetime):
        return value.isoformat()
    return value.hex() if isinstance(value, bytes) else str(value)


def listing(rows: Sequence[Mapping[str, Any]], as_json: bool, columns: str, empty: str) -> None:
    """Print rows as a table, or as JSON.

    Columns of USUALLY_EMPTY appear only where a row has something in them. Where the rows are the
    first of more (`db.access.Page`), it says so, beside JSON as well.

    Args:
        columns: names, separated by spaces.
        empty: what to say where there are no rows.
    """
    if as_json:
        document(list(rows))
    elif rows:
        names = [
            name
            for name in columns.split()
            if name not in USUALLY_EMPTY or any(row[name] for row in rows)
        ]
        table(names, ([_short(name, row[name]) for name in names] for row in rows))
        for name in names:
            if name in LEGEND:
                note(f"{name}: {LEGEND[name]}")
    else:
        note(empty)
    left_out(len(rows), getattr(rows, "total", len(rows)))


def left_out(shown: int, total: int, more: str = "--limit N or --all") -> None:
    """Say how many rows are not shown, if any.

    Args:
        more: what shows the others.
    """
    if shown < total:
        note(f"{shown:,} of {total:,}; {more}")


def _short(name: str, value: Any) -> Any:
    """Hashes are shown by their first 12 digits."""
    return value[:12] if value and name in ("content_hash", "artifact", "key_id") else value


def table(
    names: Sequence[str],
    rows: Iterable[Sequence[Any]],
    shown: Callable[[str, Any], str] | None = None,
) -> None:
    """Print a table. Only a terminal has a width; elsewhere no cell is folded.

    Args:
        shown: a column's name and a value as text; else `cell`, which knows our own columns.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console() if sys.stdout.isatty() else Console(width=1 << 16)
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        drawn.add_column(Text(printable(name)), overflow="fold")
    for row in rows:
        drawn.add_row(*(Text((shown or cell)(n, v)) for n, v in zip(names, row, strict=True)))
    console.print(drawn)


def facts(row: Mapping[str, Any]) -> None:
    """Print a mapping, one line for each item."""
    width = max(map(len, row))
    for name, value in row.items():
        say(f"{name:<{width}}  {cell(name, value)}".rstrip())


def cell(name: str, value: Any) -> str:
    """A value as text, by its column's name."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_at"):
        return f"{value[:19]}Z"
    if isinstance(value, float):
        return f"{value:g}"
    return printable(value.hex() if isinstance(value, bytes) else str(value), keep="")


def age(seconds: float) -> str:
    """A duration: 40 s, 12 min, 3 h, 2 days."""
    for size, name, least in ((86_400, "days", 2), (3600, "h", 1), (60, "min", 1)):
        if seconds >= least * size:
            return f"{seconds // size:.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"


def printable(words: str, keep: str = "\n\t") -> str:
    """Text with control characters escaped, since file names may contain terminal codes."""
    if words.isprintable():
        return words
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "surrogatepass").decode()
        for c in words
    )


# The live line: redrawn in place on a terminal; elsewhere one line for each change.


QUIET_SECONDS = 1.0
"""Without a terminal, at most one line in this time."""

_ERASE = "\r\x1b[2K"


class Line:
    """Standard error with a status line at the end.

    Args:
        chatty: without a terminal, write a line for each change; else nothing.
        quiet: show nothing on a terminal either; what is written stays.
    """

    def __init__(self, chatty: bool, quiet: bool = False) -> None:
        self._live = sys.stderr.isatty() and not quiet
        self._chatty = chatty
        self._shown = ""
        self._last = 0.0

    def show(self, words: str) -> None:
        """Replace the status line."""
        words = printable(words)
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            _say(f"{_ERASE}{words[:width]}")
        elif self._chatty and words != self._shown and time.monotonic() > self._last:
            _say(f"{words}\n")
            self._last = time.monotonic() + QUIET_SECONDS
        else:
            return
        self._shown = words

    def write(self, text: str) -> None:
        """Print lines above the status line; logging handlers call this."""
        _say(f"{_ERASE}{text}" if self._live else text)

    def flush(self) -> None:
        """For logging handlers; there is no buffer."""

    def clear(self) -> None:
        """Remove the status line."""
        if self._live:
            _say(_ERASE)


def _say(text: str) -> None:
    """Write to standard error; after an error, such as a broken pipe, print nothing any more.

    A daemon goes on when its terminal or pipe was closed.
    """
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)


@contextlib.contextmanager
def line(chatty: bool = False, quiet: bool = False) -> Iterator[Line]:
    """A live line with log messages above it."""
    live = Line(chatty, quiet)
    handlers = [h for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler)]
    streams = [handler.setStream(live) for handler in handlers]
    try:
        yield live
    finally:
        live.clear()
        for handler, stream in zip(handlers, streams, strict=True):
            handler.setStream(stream)


def waiting(jobs: Waiting) -> str:
    """The unfinished jobs in words: `3 queued, 1 running`, and why they wait."""
    states = ("queued", "running", "committing")
    some = (f"{number:,} {state}" for state in states if (number := getattr(jobs, state)))
    return "; ".join(filter(None, [", ".join(some), jobs.reason]))
