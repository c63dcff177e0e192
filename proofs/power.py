"""The power is cut at every crash point of every act on a Parquet sink; root only.

    python -m proofs.power

Each act runs on a loop-mounted ext4 that forgets what was not made durable (`proofs.crash.power`).
After the cut a reader must see whole outputs, and of a slot one version; then the act is asked for
again, and all must be as if nothing had happened. At last the power is cut once more, when the act
has ended: what it gave must be there. The exit code is 1 after any violation, and 77 where power
cannot be cut.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from proofs.crash.power import LoopGround, why_not
from tests.sinks.parquet_acts import Story, dies, finish, seen, small_groups, stories
from tests.sinks.stages import Place

CANNOT = 77


def violations(story: Story, ground: LoopGround) -> tuple[int, list[str]]:
    """How many trials there were, and what did not hold."""
    home = ground.home / "place"
    home.mkdir()
    place = Place("parquet", home)
    story.prepare(place)
    ground.save("before")
    story.act(place)
    expected = seen(place)
    found, number = [], 0
    while True:
        number += 1
        ground.restore("before")
        reached = dies(place, story, number, ground.cut)
        if reached:
            ground.power_on()
        words = finish(place, story, expected)
        if not words:
            ground.cut()
            ground.power_on()
            if seen(place) != expected:
                words = "what it gave is gone after a later cut"
        if words:
            found.append(f"{story.name}, crash point {number}: {words}")
        if not reached:
            return number, found


def main() -> int:
    if words := why_not():
        print(words, file=sys.stderr)
        return CANNOT
    small_groups()
    started, trials, all_found = time.monotonic(), 0, []
    for story in stories():
        with tempfile.TemporaryDirectory() as folder:
            ground = LoopGround(Path(folder), filesystems=1)
            try:
                ground.prepare()
                count, found = violations(story, ground)
            finally:
                ground.close()
        print(f"{story.name:32} {count:3} trials  {len(found)} violations", flush=True)
        for each in found:
            print(f"    {each}", flush=True)
        trials += count
        all_found += found
    seconds = time.monotonic() - started
    print(f"{trials} trials, {len(all_found)} violations, {seconds:.0f} s")
    return int(bool(all_found))


if __name__ == "__main__":
    sys.exit(main())
