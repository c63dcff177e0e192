"""Replay a real revision history into a sink under a mode, and compare the sink after each commit.

    python -m tests.e2e.modes --sink sqlite --mode replace [--commits N] [--kills N] [--seed S]

Under `replace` a reader must see after every commit what each file holds, line by line; under
`append` every content that each file has had, told apart by the lineage columns. In some commits,
chosen by the seed, the daemon is killed at a crash point of the sink or the Committer, and another
one is started. At the end `casparian verify` must hold.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from contextlib import closing
from itertools import groupby
from pathlib import Path

import pyarrow.parquet as pq

from casparian_flow import config
from casparian_flow.config import Settings
from casparian_flow.db.access import open_ledger
from casparian_flow.services.idle import wait_until_idle
from casparian_flow.services.verify import verify
from tests.conftest import write_config
from tests.e2e.replay import HISTORIES, IDLE_SECONDS, Event, apply, daemon, events
from tests.factories import add_root
from tests.plugs import ROWS, publish

URIS = {"parquet": "parquet://tables", "sqlite": "sqlite:///tables.sqlite3"}

POINTS = {
    "parquet": ["committer.decided", "committer.published", "committer.outputs_marked"],
    "sqlite": [
        "committer.decided", "sqlite.begun", "sqlite.ledger_written", "sqlite.rows_written",
        "sqlite.all_written", "sqlite.committed", "sqlite.unstaged", "committer.published",
    ],
}  # fmt: skip

Seen = Counter[tuple[str, str]]
"""(SHA-256 of the content, line) -> how often a reader sees it."""


def seen(settings: Settings, sink: str) -> Seen:
    """What a reader sees, without our code."""
    if sink == "sqlite":
        file = settings.home / "tables.sqlite3"
        if not file.exists():
            return Counter()
        with closing(sqlite3.connect(file)) as reader:
            return Counter(reader.execute("SELECT _cf_source_hash, line FROM lines"))
    found: Seen = Counter()
    for file in (settings.home / "tables" / "lines").rglob("*.parquet"):
        table = pq.ParquetFile(file).read(["_cf_source_hash", "line"]).to_pydict()
        found.update(zip(table["_cf_source_hash"], table["line"], strict=True))
    return found


class Oracle:
    """What must be seen, from the history's own files."""

    def __init__(self, blobs: Path, mode: str) -> None:
        self._blobs = blobs
        self._mode = mode
        self.contents: dict[str, list[str]] = {}

    def take(self, burst: list[Event]) -> bool:
        """Note a commit; whether it has a new content."""
        news = False
        for event in burst:
            had = self.contents.setdefault(event.path, [])
            if event.status != "D" and had[-1:] != [event.sha256]:
                had.append(event.sha256)
                news = True
        return news

    def seen(self) -> Seen:
        found: Seen = Counter()
        for had in self.contents.values():
            for content in had[-1:] if self._mode == "replace" else had:
                text = (self._blobs / content).read_text("utf-8", "replace")
                found.update((content, line) for line in text.splitlines())
        return found


def killed(settings: Settings, at: str, burst: list[Event], blobs: Path, files: Path) -> None:
    """Have a daemon work a commit that dies at a crash point."""
    command = [sys.executable, "-m", "casparian_flow.cli", "start"]
    environment = {
        **os.environ,
        "CASPARIAN_CONFIG": str(settings.home / config.FILE_NAME),
        "CASPARIAN_CRASH_AT": at,
    }
    apply(burst, blobs, files)
    ended = subprocess.run(
        command, env=environment, capture_output=True, timeout=IDLE_SECONDS, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    settings.database.control_socket.unlink()  # by which the next one is known


def replay(
    folder: Path, sink: str, mode: str, *, commits: int | None, kills: int, seed: int
) -> dict[str, int]:
    """Run the history in `folder`; the figures of the run.

    Raises:
        AssertionError: a reader saw something else than the files hold.
    """
    history = [list(burst) for _, burst in groupby(events("sp500", commits), lambda e: e.seq)]
    with tarfile.open(HISTORIES / "sp500.blobs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    blobs, files = folder / "blobs", folder / "root"
    files.mkdir()
    settings = write_config(folder / "flow")
    chance = random.Random(seed)
    oracle, figures = Oracle(blobs, mode), Counter[str]()
    deadly = set(chance.sample(range(len(history)), min(kills, len(history))))
    with open_ledger(settings.database) as ledger:
        add_root(ledger, files)
        publish(ledger, settings, "rows", ROWS.replace("*.txt", "*"), "1.0.0")
        command = ["--config", str(settings.home / config.FILE_NAME), "topics", "set", "rows"]
        command += ["lines", URIS[sink], "--mode", mode]
        subprocess.run([sys.executable, "-m", "casparian_flow.cli", *command], check=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(daemon(settings))
            for number, burst in enumerate(history):
                if oracle.take(burst) and number in deadly:
                    stack.close()
                    killed(settings, chance.choice(POINTS[sink]), burst, blobs, files)
                    stack.enter_context(daemon(settings))
                    figures["kills"] += 1
                else:
                    apply(burst, blobs, files)
                wait_until_idle(settings, ledger, IDLE_SECONDS)
                assert seen(settings, sink) == oracle.seen(), f"after {burst}"
                figures["commits"] += 1
        assert verify(settings, ledger).problems == []
        figures["rows"] = seen(settings, sink).total()
    return dict(figures)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.modes")
    parser.add_argument("--sink", choices=URIS, default="sqlite")
    parser.add_argument("--mode", choices=["append", "replace"], default="replace")
    parser.add_argument("--commits", type=int)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="modes-") as folder:
        figures = replay(
            Path(folder), options.sink, options.mode, commits=options.commits,
            kills=options.kills, seed=options.seed,
        )  # fmt: skip
    took = time.monotonic() - started
    what = f"sp500 into {options.sink} under {options.mode}"
    print(f"{what}: as the files hold, after {took:.0f} s: {figures}")


if __name__ == "__main__":
    main()
