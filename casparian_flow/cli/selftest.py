"""`casparian selftest`: the crash matrix, on this machine and the filesystem of one's choice."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from casparian_flow.cli import context

if TYPE_CHECKING:
    from casparian_flow.selftest.matrix import Point, Tally

ACTS = ("reinstate", "retract", "first", "second")
"""The acts that take files to tables, and their rows out of sight and back, each point being tried
in the last of them that comes to it; what comes before them is tried with `--all`."""


def selftest(
    folder: Annotated[
        str,
        typer.Option("--folder", metavar="DIR", help="A directory on the filesystem to try."),
    ] = ".",
    everything: Annotated[
        bool, typer.Option("--all", help="Every point of every step: takes many minutes.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Repeat the choice of an earlier run.")
    ] = None,
) -> None:
    """Kill it at its crash points, here, and see that nothing is lost.

    Runs a small flow in a scratch directory, kills it where a crash could hurt, starts it again,
    and compares every row. Nothing of yours is touched; the scratch is removed.
    """
    from casparian_flow.errors import CasparianError
    from casparian_flow.selftest.matrix import Matrix, staged
    from casparian_flow.selftest.scene import Ground

    began = time.monotonic()
    seed = random.randrange(1 << 32) if seed is None else seed  # noqa: S311 - to be repeated
    try:
        with tempfile.TemporaryDirectory(prefix="casparian-selftest-", dir=folder) as scratch:
            ground = Ground(Path(scratch).absolute())
            ground.prepare()
            context.note(f"seed {seed}; a scratch flow in {scratch}, first without any crash")
            with staged(ground, ["parquet", "sqlite"], context.say, Matrix) as matrix:
                tally = matrix.tally
                points = _chosen(matrix.record(), everything, seed)
                context.note(f"kill -9 at each of {len(points)} points:")
                for point in points:
                    matrix.try_point(point)
    except OSError as error:
        raise CasparianError(
            f"cannot use {folder}: {error.strerror or error}", "casparian selftest --folder DIR"
        ) from error
    raise typer.Exit(_verdict(tally, seed, time.monotonic() - began))


def _chosen(points: list[Point], everything: bool, seed: int) -> list[Point]:
    from casparian_flow.selftest.matrix import sample

    if everything:
        return points
    chosen = [point for point in sample(points, seed) if point.act in ACTS]
    chosen.sort(key=lambda point: ACTS.index(point.act))
    return list({point.name: point for point in chosen}.values())


def _verdict(tally: Tally, seed: int, seconds: float) -> int:
    """Sum up; the exit code."""
    again = f", {tally.missed} points not reached again" if tally.missed else ""
    context.say(
        f"{tally.trials} crashes in {seconds:.0f} s{again}: "
        f"{len(tally.violations) or 'no'} violations "
        f"(lost, doubled or partial rows, breaks of the ledger, files left behind)"
    )
    if not tally.violations:
        return 0
    context.note(
        "  try: another filesystem (--folder DIR): this one does not keep what it was told to.\n"
        f"  If it happens on a local one too, report it with: casparian selftest --seed {seed}"
    )
    return 1
