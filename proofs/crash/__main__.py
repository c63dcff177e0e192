"""The crash matrix: crash points, a second crash during recovery, and power cuts.

    python -m proofs.crash [kill|power1|power2] [parquet|sqlite|both] [--folder DIR] [--seed S]
                           [--short | --sample | --pairs N] [--share I/N]

kill is `kill -9`; power1 and power2 cut the power of a loop-mounted ext4, with database and sink
on one filesystem and on two (root only); both is one topic in each kind of sink. Without options:
every point that a clean run comes to. --folder names the filesystem to try.
The exit code is 1 after any violation, and 77 where power cannot be cut.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from proofs import arguments
from proofs.crash.matrix import Matrix, Point, sample, staged
from proofs.crash.power import LoopGround, PowerMatrix, why_not
from proofs.crash.scene import Ground

CANNOT = 77
ACTS = ("reinstate", "retract", "first", "second")
"""The acts that `--short` tries: files become tables, and rows are retracted and reinstated."""


def options() -> argparse.Namespace:
    """What was asked for."""
    parser = arguments.parser("crash", __doc__)
    parser.add_argument("how", choices=["kill", "power1", "power2"], nargs="?", default="kill")
    parser.add_argument("sink", choices=["parquet", "sqlite", "both"], nargs="?", default="both")
    parser.add_argument("--folder", metavar="DIR", help="a directory on the filesystem to try")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--short", action="store_true", help="one hit of each point: minutes")
    which.add_argument("--sample", action="store_true", help="one hit of each point and act")
    which.add_argument("--pairs", type=int, metavar="N", help="so many pairs of crashes")
    arguments.add_seed(parser)
    parser.add_argument("--share", default="1/1", help="I/N: every N-th point, from the I-th")
    return parser.parse_args()


def ground(how: str, scratch: Path) -> Ground:
    """Where it takes place."""
    return Ground(scratch) if how == "kill" else LoopGround(scratch, int(how[-1]))


def run(asked: argparse.Namespace, matrix: Matrix, began: float) -> int:
    """Try what was asked for, and sum up; the exit code."""
    points = matrix.record()
    print(f"{len(points)} points recorded in {time.monotonic() - began:.0f} s", flush=True)
    choose = random.Random(asked.seed)
    if asked.pairs:
        for _ in range(asked.pairs):
            matrix.try_pair(choose.choice(points), choose)
    else:
        for point in chosen(asked, points):
            matrix.try_point(point)
    tally, seconds = matrix.tally, time.monotonic() - began
    print(
        f"{asked.how} {asked.sink}, seed {asked.seed}: {tally.trials} trials of {len(points)} "
        f"points in {seconds:.0f} s, {tally.missed} not reached again, a reader saw rows "
        f"{tally.looks} times, {len(tally.violations)} violations"
    )
    return 1 if tally.violations else 0


def chosen(asked: argparse.Namespace, points: list[Point]) -> list[Point]:
    """The points to try."""
    number, of = map(int, asked.share.split("/"))
    if asked.short:
        points = [point for point in sample(points, asked.seed) if point.act in ACTS]
        points.sort(key=lambda point: ACTS.index(point.act))
        points = list({point.name: point for point in points}.values())
    elif asked.sample:
        points = sample(points, asked.seed)
    return points[number - 1 :: of]


def main() -> int:
    """The command line."""
    asked, began = options(), time.monotonic()
    if asked.how != "kill" and (reason := why_not()):
        print(f"SKIPPED: {reason}", file=sys.stderr)
        return CANNOT
    with tempfile.TemporaryDirectory(prefix="casparian-crash-", dir=asked.folder) as folder:
        place = ground(asked.how, Path(folder))
        place.prepare()
        kinds = ["parquet", "sqlite"] if asked.sink == "both" else [asked.sink] * 2
        kind = Matrix if asked.how == "kill" else PowerMatrix
        try:
            with staged(place, kinds, lambda words: print(words, flush=True), kind) as m:
                return run(asked, m, began)
        finally:
            if isinstance(place, LoopGround):
                place.close()


if __name__ == "__main__":
    sys.exit(main())
