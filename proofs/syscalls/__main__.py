"""Every system call of a run fails once and for ever, with every error; nothing may be lost.

    python -m proofs.syscalls                       the whole matrix: an hour or two
    python -m proofs.syscalls --call fsync rename   these calls only
    python -m proofs.syscalls --fault "fsync 3 EIO once"   one fault, and all that is said
    python -m proofs.syscalls --short               what the suite runs: a line a check

Prints each violation as it is found, and a table at the end; the exit code is 1 if there was any.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from proofs import arguments
from proofs.syscalls.faults import ERRORS, SPANS, Fault, Tried, attempt, count, sweep
from proofs.syscalls.short import NAMES, checks
from proofs.syscalls.stage import Stage, built
from proofs.syscalls.supervisor import FAULTED, Call, missing


def show(tried: Tried) -> None:
    """Print what a fault did wrong, and where."""
    print(f"VIOLATION {tried.fault} ({_words(tried.hit[0]) if tried.hit else 'no such call'})")
    for words in tried.violations:
        print(f"    {words}")
    sys.stdout.flush()


def _words(call: Call) -> str:
    return f"{call.kind} {' -> '.join(map(str, call.paths))}"


def explain(tried: Tried) -> None:
    """Print everything about one fault."""
    print(f"{tried.fault}: {len(tried.hit)} calls failed")
    print("".join(f"    {_words(hit)}\n" for hit in tried.hit[:10]), end="")
    print(f"{tried.run.ended}\n{tried.run.out}{tried.run.err[-4000:]}", end="")
    print("\n".join(tried.violations) or "nothing is violated")


def matrix(stage: Stage, options: argparse.Namespace) -> int:
    """Run the matrix; the number of violated faults."""
    print(f"calls of a run without faults: {dict(count(stage))}")
    print(f"{'call':8} {'error':8} {'span':9} {'faults':>7} {'violated':>9} {'seconds':>8}")
    total = bad = 0
    for kind in options.call:
        for error in options.error:
            for span in options.span:
                started = time.monotonic()
                tried = violated = 0
                for one in sweep(stage, kind, error, span, options.step):
                    tried += bool(one.hit)
                    violated += bool(one.violations)
                    if one.violations:
                        show(one)
                took = time.monotonic() - started
                print(f"{kind:8} {error:8} {span:9} {tried:7} {violated:9} {took:8.0f}", flush=True)
                total, bad = total + tried, bad + violated
    print(f"{total} faults tried, {bad} of them violated something")
    return bad


def short(stage: Stage, names: Sequence[str]) -> int:
    """The checks of `proofs.syscalls.short`, a line each; how many found something."""
    bad = 0
    for name, found in checks(stage, names):
        bad += bool(found)
        print(f"{name}: {' | '.join(found).replace(chr(10), ' ') or 'holds'}", flush=True)
    return bad


def main(words: Sequence[str] | None = None) -> int:
    parser = arguments.parser("syscalls", __doc__)
    parser.add_argument("--call", nargs="+", choices=FAULTED, default=FAULTED)
    parser.add_argument("--error", nargs="+", choices=ERRORS, default=ERRORS)
    parser.add_argument("--span", nargs="+", choices=SPANS, default=SPANS)
    parser.add_argument("--step", type=int, default=1, help="every STEP-th call only")
    parser.add_argument("--fault", help='one fault: "CALL NUMBER ERROR once", or "... for ever"')
    parser.add_argument("--short", nargs="*", choices=NAMES, help="the suite's checks, or these")
    options = parser.parse_args(words)
    if why := missing():
        print(f"SKIPPED: {why}", file=sys.stderr)
        return 2
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, built(Path(folder)) as stage:
        if options.short is not None:
            bad = short(stage, options.short or NAMES)
        elif options.fault:
            kind, number, error, span = options.fault.split(maxsplit=3)
            one = attempt(stage, Fault(kind, int(number), error, span))
            explain(one)
            bad = len(one.violations)
        else:
            bad = matrix(stage, options)
    print(f"{time.monotonic() - started:.0f} s")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
