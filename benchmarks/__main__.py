"""Run benchmarks and write their sections of RESULTS.md; other sections stay as they are."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks import report
from benchmarks.catalogue import BENCHMARKS
from benchmarks.inputs import SEED
from benchmarks.measure import measure

RESULTS = Path(__file__).with_name("RESULTS.md")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--rounds", type=int, default=5, help="measured runs of each side (5)")
    parser.add_argument("--quick", action="store_true", help="small inputs; print, write nothing")
    parser.add_argument("--scratch", help="a folder on a real disk (the temporary folder)")
    options = parser.parse_args()
    if unknown := set(options.names) - BENCHMARKS.keys():
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    for name in options.names or BENCHMARKS:
        with tempfile.TemporaryDirectory(prefix="cf-bench-", dir=options.scratch) as scratch:
            facts = report.machine(Path(scratch))
            print(f"{name}: input from seed {SEED}", file=sys.stderr)
            inputs = Path(scratch) / "inputs"
            inputs.mkdir()
            benchmark = BENCHMARKS[name](inputs, options.quick)
            runs = measure(benchmark.sides, options.rounds, Path(scratch))
        section = report.section(name, benchmark, runs, facts)
        print(section, end="\n\n")
        if not options.quick:
            report.save(RESULTS, name, section, order=list(BENCHMARKS))


if __name__ == "__main__":
    main()
