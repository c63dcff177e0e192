"""The long proofs of the queue.

    python -m proofs.queue machine [--examples 500] [--steps 60]
    python -m proofs.queue lossy   [--runs 20] [--files 200] [--seed N]
    python -m proofs.queue drain   [--stops 20] [--seed N]

`machine` plays the life of jobs against the real database in any order. `lossy` works files over a
wire that loses, repeats and delays messages. `drain` stops a daemon by SIGTERM at random moments;
then by two signals; then it works off what is left and has everything verified.
"""

from __future__ import annotations

import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy import select

from casparian_flow.config import Settings
from casparian_flow.db import integrity, jobs
from casparian_flow.db.access import Ledger, open_ledger
from casparian_flow.db.models import Output
from casparian_flow.db.states import OutputState
from casparian_flow.services import scout
from casparian_flow.services.scan import scan
from casparian_flow.services.verify import verify
from proofs import arguments
from proofs.environment import private_process
from proofs.queue.lossy import lossy
from proofs.queue.machine import Life
from tests.conftest import write_config
from tests.daemons import CLI, start, work_off
from tests.factories import add_root
from tests.plugs import BEHAVES, publish

STOP_SECONDS = 60.0
PATIENCE_SECONDS = 1800.0
"""All that several stops left is worked off in the end."""


def machine(examples: int, steps: int) -> str:
    """Play the machine; what was played."""
    checks = list(HealthCheck)
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None,
            suppress_health_check=checks, print_blob=True,
        ),
    )  # fmt: skip
    return f"{examples} lives of at most {steps} steps: the ledger agreed with the model after each"


def prepared(folder: Path) -> tuple[Settings, Path]:
    """A configuration whose plugin does what its files tell it to."""
    found = write_config(folder / "flow")
    source = folder / "source"
    source.mkdir()
    with open_ledger(found.database) as ledger:
        add_root(ledger, source)
        publish(ledger, found, "behaves", BEHAVES, "1.0.0")
    return found, source


def check(found: Settings, ledger: Ledger, wanted: int) -> None:
    """Every file completed, with its one row, and all that is recorded is true."""
    counts = ledger.read(jobs.counts)
    assert counts == {"COMPLETED": wanted}, counts
    query = select(Output.rows).where(Output.state == OutputState.PUBLISHED)
    assert ledger.read(lambda c: list(c.execute(query).scalars())) == [1] * wanted
    problems = verify(found, ledger).problems
    assert not problems, problems


def lossy_runs(folder: Path, runs: int, files: int, seed: int) -> str:
    """Work files over a bad wire, again and again; what was done to it."""
    found, source = prepared(folder)
    total: Counter[str] = Counter()
    with open_ledger(found.database) as ledger:
        (root,) = scout.roots(ledger, ())
        for run in range(runs):
            for n in range(files):
                (source / f"{run}-{n}.do").write_text(f"{run} {n}")
            scan(ledger, root)
            with lossy(seed + run) as tally:
                work_off(found, seconds=PATIENCE_SECONDS)
            total += tally
            check(found, ledger, (run + 1) * files)
    return f"{runs * files} files came through once each: {dict(total)}"


def drain(folder: Path, stops: int, seed: int) -> str:
    """Stop a daemon at random moments; how it went."""
    chance = random.Random(seed)
    found, source = prepared(folder)
    files = 0
    longest = 0.0
    with open_ledger(found.database) as ledger:
        for stop in range(stops):
            twice = stop % 5 == 4
            for _ in range(40):
                work = f"slow {chance.uniform(0, 0.2):.2f}"
                (source / f"{files}.do").write_text(f"{work} {files}")
                files += 1
            with start(found, CLI, "start", "--workers", "2", stderr=subprocess.DEVNULL) as daemon:
                time.sleep(chance.uniform(0, 6))
                daemon.terminate()
                began = time.monotonic()
                code = _second(daemon) if twice else daemon.wait(STOP_SECONDS)
                longest = max(longest, time.monotonic() - began)
            counts = ledger.read(jobs.counts)
            print(f"stop {stop + 1}: exit {code}{' (two signals)' if twice else ''}: {counts}")
            # Before it can hear a signal it ends by it, and has claimed nothing.
            assert code in ({0, 130, -signal.SIGTERM} if twice else {0, -signal.SIGTERM}), code
            if code != 130:
                assert not list(ledger.read(lambda c: list(integrity.running_jobs(c))))
            assert not list(ledger.read(lambda c: list(integrity.broken_invariants(c))))
        (root,) = scout.roots(ledger, ())
        scan(ledger, root)
        work_off(found, seconds=PATIENCE_SECONDS)
        check(found, ledger, files)
    return f"{stops} stops; the longest took {longest:.1f} s; {files} files came through once each"


def _second(daemon: subprocess.Popen[str]) -> int:
    """Wait as long as two signals must be apart to be two, and send the second."""
    try:
        return daemon.wait(1.2)
    except subprocess.TimeoutExpired:
        daemon.terminate()
        return daemon.wait(STOP_SECONDS)


def main() -> None:
    parser = arguments.parser("queue", __doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    playing = verbs.add_parser("machine")
    playing.add_argument("--examples", type=int, default=500)
    playing.add_argument("--steps", type=int, default=60)
    losing = verbs.add_parser("lossy")
    losing.add_argument("--runs", type=int, default=20)
    losing.add_argument("--files", type=int, default=200)
    draining = verbs.add_parser("drain")
    draining.add_argument("--stops", type=int, default=20)
    for verb in (losing, draining):
        arguments.add_seed(verb)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="queue-") as name:
        folder = Path(name)
        with private_process(folder / "config"):
            if options.verb == "machine":
                words = machine(options.examples, options.steps)
            else:
                print(f"seed {options.seed}", flush=True)
                if options.verb == "lossy":
                    words = lossy_runs(folder, options.runs, options.files, options.seed)
                else:
                    words = drain(folder, options.stops, options.seed)
    print(f"{options.verb}: {words}; {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
