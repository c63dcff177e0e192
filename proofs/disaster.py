"""Disasters at full length, with real processes: what the suite has no time for.

    python -m proofs.disaster [restore] [lose] [remove] [stop] [race] [--rounds N] [--seed N]

Each drill works in a scratch folder, then asks `verify`, and counts every line of every file in the
sinks against what was written. It ends with 1 where anything is lost, doubled or unexplained.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from casparian_flow import durable
from casparian_flow.config import Settings
from casparian_flow.db.access import open_ledger
from casparian_flow.engine import sinks
from casparian_flow.services import backup
from casparian_flow.services.verify import verify
from proofs import arguments, sink_reader
from proofs.environment import private_process
from tests.conftest import write_config
from tests.daemons import CLI, WORKER, free_endpoint, start
from tests.eventually import wait_until
from tests.factories import add_root
from tests.plugs import ROWS, publish

PATIENCE_SECONDS = 300


class Drill:
    """A folder with a source root, whose every line is written once and counted at the end."""

    def __init__(self, folder: Path, seed: int, extra: str = "") -> None:
        self.random = random.Random(seed)
        self.settings: Settings = write_config(folder / "flow", extra)
        self.source = folder / "source"
        self.source.mkdir()
        self.written: set[str] = set()
        self.current: dict[str, str] = {}
        self.set_up()

    def set_up(self) -> None:
        with open_ledger(self.settings.database) as ledger:
            add_root(ledger, self.source)
            publish(ledger, self.settings, "rows", ROWS, "1.0.0")

    def edit(self, files: int) -> None:
        """Write so many files, some of them anew, each content one of its own."""
        for _ in range(files):
            name = f"{self.random.randrange(30)}.txt"
            line = f"{name} {len(self.written)}"
            (self.source / name).write_text(line)
            self.written.add(line)
            self.current[name] = line

    def start(self, module: str = CLI, *words: str) -> subprocess.Popen[str]:
        return start(self.settings, module, *words or ["start"])

    def casparian(self, *words: str) -> None:
        """A command that must succeed; `wait` first lets the daemon begin."""
        if words[0] == "wait":
            lock = self.settings.database.daemon_lock
            wait_until(lambda: durable.daemon_lock_holder(lock), PATIENCE_SECONDS)
        with self.start(CLI, *words) as process:
            said = process.communicate(timeout=PATIENCE_SECONDS)[1]
        assert process.returncode == 0, said

    def problems(self) -> list[str]:
        """What is wrong in ledger and sinks; every current content must be there, none twice."""
        with open_ledger(self.settings.database) as ledger:
            found = verify(self.settings, ledger).problems
        location = sinks.resolve(self.settings.output.default_uri, self.settings.home)
        lines = Counter(row["line"] for row in sink_reader.rows(location, "lines"))
        found += [f"twice: {line}" for line, count in lines.items() if count > 1]
        found += [f"lost: {line}" for line in self.current.values() if line not in lines]
        found += [f"nobody wrote: {line}" for line in lines if line not in self.written]
        return found

    def lose(self) -> None:
        for file in self.settings.home.glob(f"{self.settings.database.path.name}*"):
            file.unlink()


def restore(drill: Drill, folder: Path) -> None:
    """A backup taken while a daemon works, restored over what was published since."""
    drill.edit(20)
    with drill.start() as daemon:
        drill.casparian("wait", "--idle")
        drill.edit(10)
        with open_ledger(drill.settings.database) as ledger:
            backup.make(drill.settings, ledger, str(folder / "copy"))
        drill.edit(20)
        drill.casparian("wait", "--idle")
        daemon.terminate()
        daemon.communicate()
    drill.lose()
    shutil.copyfile(folder / "copy", drill.settings.database.path)
    drill.edit(10)
    drill.casparian("scan", "--drain")


def lose(drill: Drill, _folder: Path) -> None:
    """The ledger deleted; set up anew, with the same source root and plugin."""
    for _ in range(3):
        drill.edit(15)
        drill.casparian("scan", "--drain")
    drill.lose()
    drill.set_up()
    drill.edit(5)
    drill.casparian("scan", "--drain")


def remove(drill: Drill, folder: Path) -> None:
    """The database moved away under a working daemon, and put back after it has stopped."""
    drill.edit(5)
    with drill.start() as daemon:
        drill.casparian("wait", "--idle")
        names = [drill.settings.database.path.name + end for end in ("", "-wal", "-shm")]
        began = time.monotonic()
        for name in names:
            (drill.settings.home / name).rename(folder / name)
        drill.edit(5)
        said = daemon.communicate(timeout=PATIENCE_SECONDS)[1]
        print(f"  the daemon left after {time.monotonic() - began:.1f} s with {daemon.returncode}")
    assert daemon.returncode == 74, said
    assert "was deleted" in said, said
    drill.lose()
    for name in names:
        if (folder / name).exists():
            (folder / name).rename(drill.settings.home / name)
    drill.casparian("scan", "--drain")


def stop(drill: Drill, _folder: Path) -> None:
    """The Sentinel stopped for longer than a Worker's lease while jobs run, then continued."""
    endpoint = drill.settings.listen.endpoint
    drill.edit(25)
    with (
        start(drill.settings, "casparian_flow.main") as sentinel,
        start(drill.settings, WORKER, "--connect", endpoint) as worker,
    ):
        drill.casparian("wait", "--idle")
        drill.edit(25)
        drill.casparian("scan")
        sentinel.send_signal(signal.SIGSTOP)
        drill.edit(5)
        time.sleep(45)  # a lease has 30 seconds
        sentinel.send_signal(signal.SIGCONT)
        drill.casparian("scan")
        drill.casparian("wait", "--idle")
        sentinel.terminate()
        sentinel.communicate()
        worker.communicate()
    assert (sentinel.returncode, worker.returncode) == (0, 0)


def race(drill: Drill, _folder: Path) -> None:
    """Daemons started at once: one lives, the others leave with 75."""
    drill.edit(5)
    crowd = [drill.start() for _ in range(4)]
    wait_until(lambda: sum(one.poll() is None for one in crowd) == 1)
    drill.casparian("wait", "--idle")
    for one in crowd:
        if one.poll() is None:
            one.terminate()
        one.communicate()
    codes = sorted(one.returncode for one in crowd)
    assert codes == [0, 75, 75, 75], codes


DRILLS: dict[str, Callable[[Drill, Path], None]] = {
    each.__name__: each for each in (restore, lose, remove, stop, race)
}


def main() -> int:
    parser = arguments.parser("disaster", __doc__)
    parser.add_argument("drills", nargs="*", choices=[*DRILLS, []], help="which; else all")
    parser.add_argument("--rounds", type=int, default=1)
    arguments.add_seed(parser)
    options = parser.parse_args()
    print(f"seed {options.seed}")
    failed = 0
    for number in range(options.rounds):
        for name in options.drills or DRILLS:
            began = time.monotonic()
            with (
                tempfile.TemporaryDirectory(prefix="casparian-drill-") as scratch,
                private_process(Path(scratch) / "config"),
            ):
                listen = f'[listen]\nendpoint = "{free_endpoint()}"\n'
                drill = Drill(Path(scratch), options.seed + number, listen)
                try:
                    DRILLS[name](drill, Path(scratch))
                    found = drill.problems()
                except AssertionError as error:
                    found = [str(error)]
            seconds = time.monotonic() - began
            print(f"{name:8} round {number + 1}: {len(drill.written)} contents, "
                  f"{len(found)} problems, {seconds:.0f} s", flush=True)  # fmt: skip
            for words in found:
                print(f"  {words}")
            failed += bool(found)
    print("nothing lost, nothing twice" if not failed else f"{failed} drills failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
