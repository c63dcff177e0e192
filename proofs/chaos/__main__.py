"""Random faults under load, for as long as one likes; proofs/README.md says what is held to what.

    python -m proofs.chaos kills --count 500 --state DIR [--seed N]
    python -m proofs.chaos soak --minutes 60 --state DIR [--seed N]

`kills` goes on where the folder's tally ended. Both exit with 1 when something is violated; the
folder then holds the evidence.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
from pathlib import Path

from proofs.chaos.kills import Chaos
from proofs.chaos.place import Place, private_environment
from proofs.chaos.soak import soak
from proofs.chaos.tally import Tally


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m proofs.chaos")
    verbs = parser.add_subparsers(dest="verb", required=True)
    kills = verbs.add_parser("kills", help="kill -9, checked every few kills")
    kills.add_argument("--count", type=int, default=500, help="kills the tally shall have")
    kills.add_argument("--every", type=int, default=25, help="kills between two checkpoints")
    soaks = verbs.add_parser("soak", help="load and faults for a long time")
    soaks.add_argument("--minutes", type=float, default=60.0)
    soaks.add_argument("--every", type=float, default=30.0, help="seconds between two faults")
    for verb in (kills, soaks):
        verb.add_argument("--state", type=Path, required=True, help="folder that keeps everything")
        verb.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.verb == "soak" and options.state.exists():
        parser.error(f"{options.state} is there: a soak begins in a folder of its own")
    options.state.mkdir(parents=True, exist_ok=True)
    private_environment(options.state)
    tally = Tally(options.state, aloud=True)
    tally.note("begin", verb=options.verb, seed=options.seed, kills=tally.total)
    seed = f"{options.seed}-{tally.total}"
    chaos = Chaos(Place(options.state), tally, seed)
    if options.verb == "soak":
        verdict = soak(chaos, seed, options.every, options.minutes * 60)
        print(tally.soaked(verdict))
        sys.exit(1 if tally.violations or not verdict.flat else 0)
    try:
        with chaos.going():
            chaos.kills(options.count, options.every)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here")
    print(tally.summary())
    sys.exit(1 if tally.violations else 0)


if __name__ == "__main__":
    main()
