"""What tables show, beside the model of what they must show.

    python -m proofs.truth [--runs 500] [--steps 40] [--seed N]
    python -m proofs.truth --commands [--runs 30] [--steps 15] [--seed N]

Each run draws a sequence of events (files change, plugins are published, rolled back and redone,
rows retracted, topics moved, ledgers restored, sinks refuse or are away), tells it to the model
(tests/truth/model.py) and to the product, and compares every table after each event. Without
`--commands` plugins run in this process; with it every event is a command, in a process of its own
where it is killed at a random crash point, and plugins run in their guests. Where they differ, the
sequence is made as short as leaving out steps makes it, and told with the rows of both.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from proofs import arguments
from proofs.environment import private_process
from proofs.truth.commands import Commands
from tests.truth import walks
from tests.truth.product import Product


def main() -> int:
    parser = arguments.parser("truth", __doc__)
    parser.add_argument("--runs", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--commands", action="store_true")
    arguments.add_seed(parser)
    given = parser.parse_args()
    make = Commands if given.commands else Product
    runs, steps = given.runs or (30 if given.commands else 500), given.steps
    steps = steps or (15 if given.commands else 40)
    print(f"seed {given.seed}")
    found, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cf-truth-") as folder, private_process(Path(folder)):
        for seed in range(given.seed, given.seed + runs):
            with tempfile.TemporaryDirectory(dir=folder) as own:
                try:
                    walks.compare(Path(own), seed, steps, make=make)
                except walks.Difference as difference:
                    found += 1
                    print(
                        f"seed {seed}: {difference}\n{' '.join(difference.__notes__)}", flush=True
                    )
    seconds = time.monotonic() - began
    print(f"{runs} runs of {steps} steps, {found} differences, {seconds:.0f} s")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
