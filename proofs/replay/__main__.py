"""Replay a real revision history into a watched root under a running daemon, and compare.

    python -m proofs.replay sp500 [--commits N] [--flood]
    python -m proofs.replay sp500 --mode replace|append|both [--kills N [--seed S]]
    python -m proofs.replay countries

With a mode, every topic goes to a SQLite database and to Parquet (with both, to two of each), and
the tables are held to the files as well (`tables`): under `replace` after every commit, under
`append` after every hundredth and the last. With kills a Sentinel and two Workers run instead of
one daemon; they and their guests are killed in between (`upsets`). The histories are not in the
repository.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from proofs import arguments
from proofs.environment import private_process
from proofs.replay.history import Way, replay


def main() -> None:
    parser = arguments.parser("replay", __doc__)
    parser.add_argument("name", choices=["sp500", "countries"])
    parser.add_argument("--commits", type=int)
    parser.add_argument("--flood", action="store_true")
    parser.add_argument("--mode", choices=["replace", "append", "both"])
    parser.add_argument("--kills", type=int, default=0, metavar="N")
    arguments.add_seed(parser)
    options = parser.parse_args()
    modes = ["replace", "append"] if options.mode == "both" else filter(None, [options.mode])
    way = Way(
        options.commits, options.flood, tuple(modes), kills=options.kills, seed=options.seed
    )  # fmt: skip
    print(f"seed {way.seed}", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="replay-") as name:
        folder = Path(name)
        with private_process(folder / "config", folder / "cache"):
            figures = replay(folder, options.name, way)
    took = time.monotonic() - started
    what = "the ledger and every table equal" if way.modes else "the ledger equals"
    print(f"{options.name}: {what} the history after {took:.0f} s: {figures}")


if __name__ == "__main__":
    main()
