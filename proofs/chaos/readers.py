"""Readers that poll both sinks all the time, and hold every output they see to the history.

Whatever a reader sees must be whole at that moment: a Parquet file with all rows of its version,
and in SQLite all new rows of a version at once.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from proofs import sink_reader
from proofs.chaos.history import History
from proofs.chaos.place import Place

POLL_SECONDS = 0.1

Complain = Callable[[str, str], None]
"""Told of a kind of violation, and what it is."""

QUERIES = {
    "entries": "SELECT _cf_job_id, _cf_file_version_id, _cf_source_hash, number, line FROM entries",
    "sizes": "SELECT _cf_job_id, _cf_file_version_id, _cf_source_hash, lines, NULL FROM sizes",
}

SHOWN = "SELECT job_id FROM _cf_outputs WHERE topic = ? AND state IN ('current', 'past')"
"""The jobs of whose rows a topic is to show something: a job may show long after a later one."""


class Seen(NamedTuple):
    """One output in a sink."""

    version_id: int
    source_hash: str


class Readers(threading.Thread):
    """Polls until told to end.

    Args:
        place: whose sinks are read.
        history: what each content's rows are.
        complain: called for each violation.
    """

    def __init__(self, place: Place, history: History, complain: Complain) -> None:
        super().__init__(name="readers", daemon=True)
        self.files: dict[tuple[str, int], Seen] = {}
        """Parquet files that were read, by name and inode, each once: a published file never
        changes, but another may take its name."""
        self.polls = 0
        self._place = place
        self._history = history
        self._complain = complain
        self._jobs: dict[str, set[int]] = {topic: set() for topic in QUERIES}
        """Topic -> the jobs of which its rows were read, each once."""
        self._ended = threading.Event()
        self.turn = threading.Lock()

    def run(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            self.poll()

    def end(self) -> None:
        self._ended.set()
        if self.ident is not None:
            self.join()

    def comes(self) -> Callable[[], bool]:
        """Whether an output has come since this call."""
        before = len(self.files)
        return lambda: len(self.files) > before

    def poll(self) -> None:
        """Look once at both sinks; any thread may call it."""
        with self.turn:
            self._poll_parquet()
            self._poll_sqlite()
            self.polls += 1

    def _poll_parquet(self) -> None:
        for file in self._place.parquet.glob("*.parquet"):
            try:
                with file.open("rb") as opened:
                    key = file.name, os.fstat(opened.fileno()).st_ino
                    if key not in self.files:
                        self.files[key] = self._read(file, opened)
            except FileNotFoundError:  # it was listed, and does not show any more
                continue
            except (OSError, KeyError, pa.ArrowException) as error:
                self._complain("partial", f"{file.name} is no whole file: {error}")

    def _read(self, file: Path, opened: BinaryIO) -> Seen:
        table = pq.read_table(opened)
        footer = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
        seen = Seen(int(footer["casparian.file_version_id"]), footer["casparian.source_hash"])
        rows = list(zip(table["number"].to_pylist(), table["line"].to_pylist(), strict=True))
        self._hold("lines", seen, rows, file.name)
        lineage = set(
            zip(
                table["_cf_file_version_id"].to_pylist(),
                table["_cf_source_hash"].to_pylist(),
                strict=True,
            )
        )
        if lineage - {seen}:
            self._complain("partial", f"{file.name} has rows of {lineage - {seen}}")
        return seen

    def _poll_sqlite(self) -> None:
        """Look at what came since the last look, in one snapshot."""
        if not self._place.sink.exists():
            return
        with sink_reader.read_only(self._place.sink, timeout=30.0) as connection:
            for topic, query in QUERIES.items():
                known = self._jobs[topic]
                try:
                    connection.execute("BEGIN")
                    new = {job for (job,) in connection.execute(SHOWN, [topic])} - known
                    found = connection.execute(
                        f"{query} WHERE _cf_job_id IN (SELECT value FROM json_each(?))",
                        [json.dumps(sorted(new))],
                    ).fetchall()
                except sqlite3.OperationalError as error:
                    if "no such table" not in str(error) and "locked" not in str(error):
                        raise
                    continue
                finally:
                    connection.rollback()
                for seen, rows in by_version(found).items():
                    self._hold(topic, seen, rows, "sink.sqlite3")
                known |= new

    def _hold(self, topic: str, seen: Seen, rows: list[Any], where: str) -> None:
        """Compare one output's rows with those its content has."""
        content = self._history.contents.get(seen.source_hash)
        if content is None:
            self._complain("partial", f"{where}: rows of bytes that nobody wrote: {seen}")
        elif sorted(rows) != expected(topic, content.rows):
            self._complain(
                "partial", f"{where}: {topic} of {seen}: {len(rows)} rows are not its own"
            )


def by_version(found: list[tuple[Any, ...]]) -> dict[Seen, list[Any]]:
    """Rows of one of `QUERIES` by the output they belong to."""
    outputs: dict[Seen, list[Any]] = defaultdict(list)
    for _, version_id, source_hash, first, second in found:
        outputs[Seen(version_id, source_hash)].append(
            (first,) if second is None else (first, second)
        )
    return outputs


def expected(topic: str, rows: list[tuple[int, int]]) -> list[Any]:
    """What a topic has of a content with these rows."""
    return [(len(rows),)] if topic == "sizes" else rows
