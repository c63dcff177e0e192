"""The long proofs of detection: `python -m proofs.detection edits|writers|missed`; --help has more.

Root is needed for the loop mounts; a filesystem that cannot be mounted is named and left out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from proofs import arguments
from proofs.detection import bench, edits, missed, writers


def say(words: str) -> None:
    print(words, flush=True)


def _progress(tally: edits.Tally) -> None:
    say(f"  {tally.edits} edits, {len(tally.missed)} missed ({tally.seconds:.0f} s)")


def _edits(options: argparse.Namespace) -> bool:
    good = True
    for kind in options.filesystem or bench.FILESYSTEMS:
        try:
            with bench.mounted(kind) as place, bench.scratch(place) as scratch:
                tally = edits.run(scratch, options.seed, options.edits, options.files, _progress)
                edits.run_mapped(scratch, options.seed, options.stores, 500, tally)
        except PermissionError as error:
            say(f"{kind}: NOT TRIED, it cannot be mounted here: {error}")
            good = False
            continue
        say(
            f"{kind}: {tally.edits} edits, {tally.scans} scans, {tally.recorded} versions, "
            f"{len(tally.missed)} missed, {tally.foreign} with bytes nobody wrote "
            f"({tally.seconds:.0f} s)"
        )
        say(
            f"  mmap: {tally.hidden + tally.shown} stores into dirty pages, {tally.hidden} of them "
            f"hidden from every stamp; missed by scans {tally.missed_by_scan}, "
            f"missed by a scrub {tally.missed_by_scrub}"
        )
        for words in tally.missed[:10]:
            say(f"  missed: {words}")
        good &= not tally.missed and not tally.foreign and not tally.missed_by_scrub
    return good


def _writers(options: argparse.Namespace) -> bool:
    good = True
    short = (0.05, 0.7)
    for words, count, pauses, done_file in (
        ("pauses shorter than the window", options.writers, short, ""),
        ("pauses longer than the window", options.writers // 50, (1.2, 2.0), ""),
        ("longer pauses, with done files", options.writers // 50, (1.2, 2.0), "{name}.done"),
    ):
        with tempfile.TemporaryDirectory(prefix="casparian-writers-", dir=bench.MEMORY) as folder:
            root = {"settle_seconds": options.window, "done_file": done_file}
            with bench.scratch(Path(folder), **root) as scratch:
                tally = writers.run(scratch, options.seed, count, options.at_once, pauses)
        say(
            f"{words}: {tally.writers} writers, {tally.writes} writes, {tally.scans} scans, "
            f"{tally.versions} versions; {len(tally.never_at_rest)} never at rest, {tally.lost} "
            f"lost, {tally.unfinished} of contents that stayed for the window and were not the "
            f"last; {tally.overslept} pauses became longer than meant ({tally.seconds:.0f} s)"
        )
        good &= not tally.never_at_rest and not tally.lost
        good &= not (done_file and tally.unfinished)
    return good


def _missed(options: argparse.Namespace) -> bool:
    with tempfile.TemporaryDirectory(prefix="casparian-missed-") as folder:
        tally = missed.run(Path(folder), options.files, folders=options.folders)
    say(
        f"{tally.files} files created while the daemon was stopped: {tally.recorded} recorded, "
        f"{tally.recorded_after:.1f} s after it went on (scan interval: 60 s); missed by the "
        f"watcher: {tally.missed}, shown after {tally.missed_after:.1f} s; {tally.watch}, "
        f"{tally.replaced} observers replaced"
    )
    return tally.recorded == tally.files and tally.missed > 0 and tally.recorded_after < 60


def main() -> None:
    parser = arguments.parser("detection", __doc__)
    arguments.add_seed(parser)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("edits", help="random edits on three filesystems, and mmap stores")
    verb.add_argument("--edits", type=int, default=100_000)
    verb.add_argument("--files", type=int, default=2000)
    verb.add_argument("--stores", type=int, default=2000)
    verb.add_argument("--filesystem", action="append", choices=bench.FILESYSTEMS)
    verb.set_defaults(run=_edits)
    verb = verbs.add_parser("writers", help="slow writers, with and without done files")
    verb.add_argument("--writers", type=int, default=10_000)
    verb.add_argument("--at-once", type=int, default=300)
    verb.add_argument("--window", type=float, default=2.0)
    verb.set_defaults(run=_writers)
    verb = verbs.add_parser("missed", help="files created while the daemon is stopped")
    verb.add_argument("--files", type=int, default=20_000)
    verb.add_argument("--folders", type=int, default=missed.FOLDERS)
    verb.set_defaults(run=_missed)
    options = parser.parse_args()
    say(f"seed {options.seed}")
    sys.exit(0 if options.run(options) else 1)


if __name__ == "__main__":
    main()
