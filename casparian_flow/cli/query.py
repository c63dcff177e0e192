"""`casparian query`."""

from __future__ import annotations

import csv
import itertools
import json
import math
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from casparian_flow.cli import context
from casparian_flow.cli.context import All, AsJson

TAKEN_AT_ONCE = 1024
"""Rows that become Python objects at once."""


def query(
    ctx: typer.Context,
    sql: Annotated[
        str, typer.Argument(metavar="SQL", help="One SELECT over <topic> or <topic>_history.")
    ],
    as_json: AsJson = False,
    as_csv: Annotated[
        bool,
        typer.Option(
            "--csv", help="Print CSV with a header. On a terminal, control characters are escaped."
        ),
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="At most N rows; default: 50 in a table, all with --json or --csv.",
        ),
    ] = None,
    every: All = False,
) -> None:
    """Run SQL over the committed outputs.

    Each topic is a table with the rows of each file's latest version; <topic>_history has the rows
    of every version. SHOW TABLES lists the tables, DESCRIBE <topic> shows the columns. A query only
    reads, and reads no files but the outputs.

    If a query names _cf_path, each topic also has a column of that name: each row's file, as
    SOURCE/path.
    """
    from casparian_flow.db import views
    from casparian_flow.engine.sinks.query import answer, asks_for_paths
    from casparian_flow.services import inventory

    if as_json and as_csv:
        raise typer.BadParameter("use --json or --csv, not both")
    most = context.wanted(limit, every or (limit is None and (as_json or as_csv)))
    with context.opened(ctx) as (settings, ledger):
        outputs = ledger.read(views.committed)
        paths = ledger.read(views.paths) if asks_for_paths(sql) else None
        if inventory.may_be_older(settings.database, ledger):
            context.note(
                "note: this ledger may be older than its sinks, and the answer too"
                "\n  try: casparian scan   (asks the sinks)"
            )
    with answer(sql, outputs, paths) as reader:
        names, rows = list(reader.schema.names), _Rows(reader)
        if as_csv:
            writer = csv.writer(_Terminal() if sys.stdout.isatty() else sys.stdout,
                                lineterminator="\n")  # fmt: skip
            writer.writerow(names)
            writer.writerows(itertools.islice(rows, most))
        elif as_json:
            _print_json(names, itertools.islice(rows, most))
        else:
            context.table(names, list(itertools.islice(rows, most)), shown)
        if most is not None and (more := rows.rest()):
            context.left_out(most, most + more)


class _Terminal:
    """Standard output of a terminal, with control characters escaped."""

    def write(self, text: str) -> None:
        sys.stdout.write(context.printable(text))


def shown(_name: str, value: Any) -> str:
    """A value of a user's column, unabridged."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return context.printable(context.plain(value), keep="")


class _Rows(Iterator[tuple[Any, ...]]):
    """The rows of an answer. Those that are not taken cost little to count."""

    def __init__(self, reader: Any) -> None:
        self._batches = iter(reader)
        self._taken: list[tuple[Any, ...]] = []
        self._batch: Any = None
        """What is left of the present batch, but for the rows taken."""

    def __next__(self) -> tuple[Any, ...]:
        while not self._taken:
            while not self._batch:
                self._batch = next(self._batches)
            now, self._batch = self._batch[:TAKEN_AT_ONCE], self._batch[TAKEN_AT_ONCE:]
            columns = [column.to_pylist() for column in now.columns]
            self._taken = list(zip(*columns, strict=True))[::-1]
        return self._taken.pop()

    def rest(self) -> int:
        """Read the rows that were not taken; returns their number."""
        here = len(self._taken) + (len(self._batch) if self._batch is not None else 0)
        return here + sum(len(batch) for batch in self._batches)


def _print_json(names: list[str], rows: Iterator[tuple[Any, ...]]) -> None:
    """Print one row at a time, since there may be many."""
    separator = "[\n"
    for row in rows:
        fields = {name: _jsonable(value) for name, value in zip(names, row, strict=True)}
        typer.echo(separator + json.dumps(fields, default=context.plain), nl=False)
        separator = ",\n"
    typer.echo("[]" if separator == "[\n" else "\n]")


def _jsonable(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _jsonable(inner) for name, inner in value.items()}
    return [_jsonable(inner) for inner in value] if isinstance(value, list) else value
