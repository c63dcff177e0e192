"""Random faults under load, for as long as one likes; proofs/README.md says what must hold.

    python -m proofs.chaos kills --count 500 --state DIR [--seed N]
    python -m proofs.chaos soak --minutes 60 --state DIR [--seed N]

`kills` goes on where the folder's tally ended. Both exit with 1 when something is violated; the
folder then holds the evidence.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from proofs import arguments
from proofs.chaos.kills import Chaos
from proofs.chaos.place import Place
from proofs.chaos.soak import soak
from proofs.chaos.tally import Tally
from proofs.environment import private_process


def main() -> None:
    parser = arguments.parser("chaos", __doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    kills = verbs.add_parser("kills", help="kill -9, checked every few kills")
    kills.add_argument("--count", type=int, default=500, help="kills the tally shall have")
    kills.add_argument("--every", type=int, default=25, help="kills between two checkpoints")
    soaks = verbs.add_parser("soak", help="load and faults for a long time")
    soaks.add_argument("--minutes", type=float, default=60.0)
    soaks.add_argument("--every", type=float, default=30.0, help="seconds between two faults")
    for verb in (kills, soaks):
        verb.add_argument("--state", type=Path, required=True, help="folder that keeps everything")
        arguments.add_seed(verb)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.verb == "soak" and options.state.exists():
        parser.error(f"{options.state} is there: a soak begins in a folder of its own")
    options.state.mkdir(parents=True, exist_ok=True)
    with private_process(options.state / "config", options.state / "cache"):
        sys.exit(run(options))


def run(options: argparse.Namespace) -> int:
    """Do what was asked for; the exit code."""
    tally = Tally(options.state, aloud=True)
    tally.note("begin", verb=options.verb, seed=options.seed, kills=tally.total)
    seed = f"{options.seed}-{tally.total}"
    chaos = Chaos(Place(options.state), tally, seed)
    if options.verb == "soak":
        verdict = soak(chaos, seed, options.every, options.minutes * 60)
        print(tally.soaked(verdict))
        return 1 if tally.violations or not verdict.flat else 0
    try:
        with chaos.going():
            chaos.kills(options.count, options.every)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here")
    print(tally.summary())
    return 1 if tally.violations else 0


if __name__ == "__main__":
    main()
