"""The stage on which system calls fail: a small tree, two sinks, one run of `casparian scan`.

Everything heavy is imported once, here; each run is a fork of this process, so that thousands of
runs take minutes. A run is whole: the command line's own `main`, guests and all.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas  # noqa: F401  pyarrow looks for it
import pyarrow.compute
import pyarrow.pandas_compat  # noqa: F401

from casparian_flow import config, main  # noqa: F401  for the runs
from casparian_flow.cli import main as casparian
from casparian_flow.cli import scan as scan_verb
from casparian_flow.config import Settings
from casparian_flow.db import jobs
from casparian_flow.db.access import open_ledger
from casparian_flow.db.states import JobStatus
from casparian_flow.engine import committer, sinks
from casparian_flow.engine.sinks import parquet, sqlite  # noqa: F401
from casparian_flow.errors import ExitCode
from casparian_flow.services import report, scout, sources  # noqa: F401
from casparian_flow.services.verify import verify
from proofs import sink_reader
from proofs.environment import private_process
from proofs.syscalls.supervisor import Call, Ended, supervise
from tests.factories import add_root
from tests.plugs import publish

SINKS = {"files": "parquet://output", "tables": "sqlite:///tables.sqlite3"}
"""Topic -> where it goes."""

PLUGIN = f"""
# /// script
# dependencies = ["pyarrow"]
# ///
from casparian_flow.sdk import BasePlugin, PluginMetadata
import pyarrow as pa

MANIFEST = PluginMetadata(pattern="*.txt", sinks={SINKS})

class Handler(BasePlugin):
    def execute(self, file_path: str):
        with open(file_path) as file:
            lines = file.read().splitlines()
        for topic in {[*SINKS]}:
            self.publish(topic, pa.table({{"line": pa.array(lines, pa.string())}}))
"""

FILES = {"a.txt": "one\ntwo\n", "deep/b.txt": "three\n"}
"""What lies in the source root, and all that may come of it, once."""
LINES = Counter(line for text in FILES.values() for line in text.splitlines())

LEDGER = "casparian_flow.sqlite3"
CONFIGURATION = f"""
[database]
db_location = "{LEDGER}"
[jobs]
retry_seconds = 0.1
[workers]
count = 1
[guest]
sandbox = "off"
"""
"""One worker, so that calls come in the same order every time. The guest's sandbox makes no call
that is counted here, and its trial takes a while."""

WITHIN_SECONDS = 60.0
"""A run takes a second; one that waits for a sick disk a few. Longer is spinning."""

CODES = {*ExitCode} - {ExitCode.USAGE, ExitCode.BUG, ExitCode.INTERRUPTED}
"""Exit codes of docs/cli.md that a disk may cause; 70 is a bug of ours."""

_BETWEEN = ("is RUNNING, but no daemon runs", "does not know yet what readers are to see of")
"""What `verify` says of jobs whose daemon is dead, and of sinks that could not be told: true after
a fault, and not a violation."""


class Run(NamedTuple):
    """One run of the command, and what it said."""

    ended: Ended
    out: str
    err: str


class Stage:
    """A scratch folder that is the same before every run.

    Args:
        folder: empty; the tree is `folder/tree`, with the configuration in `flow`.
    """

    def __init__(self, folder: Path) -> None:
        self.tree = folder / "tree"
        self.home = self.tree / "flow"
        self._fresh = folder / "fresh"
        self._said = folder / "said"

    def build(self) -> None:
        """Make the tree, publish the plugin, and have its environment built."""
        self.home.mkdir(parents=True)
        (self.home / config.FILE_NAME).write_text(CONFIGURATION)
        settings = config.load(str(self.home / config.FILE_NAME))
        source = self.tree / "in"
        for name, text in FILES.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_text(text)
        with open_ledger(settings.database) as ledger:
            add_root(ledger, source)
            publish(ledger, settings, "lines", PLUGIN, "1.0.0")
        shutil.copytree(self.tree, self._fresh)
        problems = [*self.clean_run(), *self.look(after_fault=False)]
        if problems:
            raise AssertionError("the stage does not work: " + "; ".join(problems))

    def reset(self) -> None:
        """Put the tree back as it was built: two files, and no run yet."""
        shutil.rmtree(self.tree)
        shutil.copytree(self._fresh, self.tree)

    def scratch(self, name: str) -> Path:
        """An empty folder beside the tree."""
        folder = self._fresh.with_name(name)
        folder.mkdir()
        return folder

    def run(
        self, judge: Callable[[Call], int] = lambda call: 0, patience: float = WITHIN_SECONDS / 2
    ) -> Run:
        """`casparian scan --drain` in a process of its own.

        Args:
            judge: sees the calls on the tree.
            patience: seconds; how soon the command gives up a sink that stays sick.
        """

        def ours(call: Call) -> int:
            return judge(call) if any(p.is_relative_to(self.tree) for p in call.paths) else 0

        ended = supervise(partial(self._scan, patience), ours, WITHIN_SECONDS)
        out, err = (self._said.with_suffix(f".{name}").read_text() for name in ("out", "err"))
        return Run(ended, out, err)

    def _scan(self, patience: float) -> int:
        """The supervised process: the command as a shell starts it, but for its patience."""
        for descriptor, name in ((1, "out"), (2, "err")):
            file = os.open(
                self._said.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            )
            os.dup2(file, descriptor)
        committer.PAUSE_SECONDS, scan_verb.PATIENCE_SECONDS = 0.2, patience
        os.chdir(self.home)
        sys.argv = ["casparian", "scan", "--drain"]
        casparian()
        return 0

    def faulted(self, run: Run) -> Iterator[str]:
        """What is wrong with a run in which calls failed."""
        if run.ended.late:
            yield f"it did not end within {WITHIN_SECONDS:g} s"
        elif run.ended.code not in CODES:
            yield f"it ended with exit code {run.ended.code}: {run.err.strip()[-500:]}"
        if "Traceback" in run.err or "Exception ignored" in run.err:
            yield f"a traceback: {run.err.strip()[-1500:]}"
        if run.ended.code and not run.err.strip():
            yield "it failed without a word"
        yield from self.look(after_fault=True)

    def clean_run(self) -> Iterator[str]:
        """Run without faults; what it did not finish."""
        run = self.run()
        if run.ended.code or run.ended.late:
            yield f"a clean run ended with {run.ended}: {(run.err or run.out).strip()[-500:]}"

    def look(self, *, after_fault: bool) -> list[str]:
        """Judge what is there, in a process of its own: this one must stay as it was.

        Args:
            after_fault: not everything must be done, but what a reader sees must be whole.
        """
        ours, theirs = os.pipe()
        process = os.fork()
        if process == 0:
            try:
                found = list(self._problems(after_fault))
            except BaseException:
                found = [f"it cannot be looked at: {traceback.format_exc()}"]
            os.write(theirs, "\0".join(found).encode())
            os._exit(0)
        os.close(theirs)
        with open(ours) as pipe:
            words = pipe.read()
        os.waitpid(process, 0)
        return words.split("\0") if words else []

    def _problems(self, after_fault: bool) -> Iterator[str]:
        settings = config.load(str(self.home / config.FILE_NAME))
        files, tables = (self._read(settings, topic) for topic in SINKS)
        with open_ledger(settings.database) as ledger:
            problems = verify(settings, ledger).problems
            counts = ledger.read(jobs.counts)
        yield from (p for p in problems if not (after_fault and any(w in p for w in _BETWEEN)))
        done = {job: rows for found in (files, tables) for job, rows in found.items()}
        for topic, found in (("files", files), ("tables", tables)):
            seen = sum(found.values(), Counter())
            if seen - LINES:
                yield f"{topic}: rows twice, or of nobody: {dict(seen - LINES)}"
            for job, lines in found.items():
                if sorted(lines.elements()) not in [sorted(t.splitlines()) for t in FILES.values()]:
                    yield f"{topic}: a reader sees a part of job {job}: {dict(lines)}"
            if not after_fault and seen != LINES:
                yield f"{topic}: rows are missing: {dict(LINES - seen)}"
        if after_fault:
            if counts.get(JobStatus.FAILED):
                yield f"a fault of the disk made jobs fail: {counts}"
            return
        if counts != {JobStatus.COMPLETED: len(FILES)}:
            yield f"not everything is done: {counts}; {len(done)} jobs have rows"
        yield from (f"left behind: {left}" for left in self._left())

    def _read(self, settings: Settings, topic: str) -> dict[int, Counter[str]]:
        """What a reader sees of a topic: job -> lines."""
        found: dict[int, Counter[str]] = {}
        for row in sink_reader.rows(sinks.resolve(SINKS[topic], settings.home), topic):
            found.setdefault(row["_cf_job_id"], Counter())[row["line"]] += 1
        return found

    def _left(self) -> Iterator[Path]:
        """Staged and temporary files that nobody needs any more.

        A guest's folder may be left: the next start of a daemon sweeps it, and a run that finds
        everything done starts none.
        """
        for path in self.tree.rglob("*"):
            if path.parent.name == "stage" or path.name.endswith((".tmp", ".part")):
                yield path


@contextmanager
def built(folder: Path) -> Iterator[Stage]:
    """A stage with keys, environments and sockets of its own, for as long as the block runs."""
    sys.argv = ["casparian", "scan", "--help"]
    with redirect_stdout(io.StringIO()), suppress(SystemExit):
        casparian()  # typer imports what it needs when it is first used
    with private_process(folder / "config", folder / "cache"):
        stage = Stage(folder)
        stage.build()
        yield stage
