"""What the tables of a history must hold, read without the plugin and without the code that
publishes.

The plugin is `plugins/delimited.py`. Every record of a file with as many fields as its header is a
row of `delimited`, every other one of `delimited_rejects`. Columns are compared by name without
case, as SQLite does, and what is null is not there: files of one topic have other columns.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import delete, insert, select

from casparian_flow.config import Settings
from casparian_flow.db.access import Connection, Ledger
from casparian_flow.db.models import FileLocation, FileVersion, ProcessingJob, TopicConfig
from casparian_flow.db.states import JobStatus
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks.base import LINEAGE
from proofs import sink_reader

TOPICS = ("delimited", "delimited_rejects")
APPEND_EVERY = 100
"""Commits between two looks at everything that was ever appended."""

SINKS = {"sqlite": "sqlite:///{}.sqlite3", "parquet": "parquet://{}"}
"""Kind of sink -> its URI, for a mode. One topic goes to all of them."""

Row = frozenset[tuple[str, Any]]
"""(column, value) of what is not null."""


class Version(NamedTuple):
    """A version whose job has completed."""

    id: int
    path: str
    ordinal: int
    content_hash: str


class Tables:
    """The topics of `delimited`, placed in some sinks under one mode.

    Args:
        ledger: of the flow.
        settings: of the flow.
        mode: of every topic.
        kinds: of `SINKS`.
        blobs: a folder with each content, named by its hash.
    """

    def __init__(
        self, ledger: Ledger, settings: Settings, mode: str, kinds: Sequence[str], blobs: Path
    ) -> None:
        self.mode = mode
        self.looks = 0
        """Times that all of them were held to the files."""
        self._ledger = ledger
        self._blobs = blobs
        self._default = settings.output.default_uri
        self._uris = [SINKS[kind].format(mode) for kind in kinds]
        self._locations = [sinks.resolve(uri, settings.home) for uri in self._uris]
        self._contents: dict[str, dict[str, Counter[Row]]] = {}

    def place_topics(self) -> None:
        """Send each topic to every sink, and to no other than those of `Tables`."""
        placed = [
            {"plugin_name": "delimited", "topic_name": topic, "uri": uri, "mode": self.mode}
            for topic in TOPICS
            for uri in self._uris
        ]

        def work(connection: Connection) -> None:
            connection.execute(delete(TopicConfig).where(TopicConfig.uri == self._default))
            connection.execute(insert(TopicConfig), placed)

        self._ledger.write(work)

    def look(self, number: int, commits: int) -> list[str]:
        """`problems`, after commit `number` out of so many, where it is time to look."""
        done = number + 1
        if self.mode == "append" and done != commits and done % APPEND_EVERY:
            return []
        self.looks += 1
        return self.problems()

    def problems(self) -> list[str]:
        """How what a reader sees differs from what the files hold; empty where it does not."""
        completed = self._completed()
        if self.mode == "replace":
            # The last of each path: `completed` is in the order of ordinals.
            completed = list({version.path: version for version in completed}.values())
        found: list[str] = []
        for location in self._locations:
            for topic in TOPICS:
                due = {
                    (version.id, version.content_hash): version
                    for version in completed
                    if self._rows(version)[topic]
                }
                for (version_id, content_hash), rows in shown(location, topic):
                    version = due.pop((version_id, content_hash), None)
                    if version is None:
                        found.append(
                            f"{location}: {topic}: {rows.total()} rows of version {version_id} "
                            f"are there again, or should not be there"
                        )
                    elif rows != self._rows(version)[topic]:
                        found.append(
                            f"{location}: {topic}: {rows.total()} rows of version {version_id} "
                            f"({version.path}) are not those of the file"
                        )
                found += [f"{location}: {topic}: the rows of {v} are lost" for v in due.values()]
        return found

    def _rows(self, version: Version) -> dict[str, Counter[Row]]:
        if version.content_hash not in self._contents:
            data = (self._blobs / version.content_hash).read_bytes()
            self._contents[version.content_hash] = expected(data)
        return self._contents[version.content_hash]

    def _completed(self) -> list[Version]:
        query = (
            select(
                FileVersion.id, FileLocation.rel_path, FileVersion.ordinal, FileVersion.content_hash
            )
            .join(FileLocation, FileLocation.id == FileVersion.location_id)
            .join(ProcessingJob, ProcessingJob.file_version_id == FileVersion.id)
            .where(ProcessingJob.status == JobStatus.COMPLETED)
            .order_by(FileVersion.ordinal)
        )
        return [Version(*row) for row in self._ledger.read(lambda c: c.execute(query).all())]


def expected(data: bytes) -> dict[str, Counter[Row]]:
    """The rows that each topic must have of a file, as the standard library reads it."""
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for line in io.StringIO(data.decode(), newline=""):
            taken.append(line)
            yield line

    reader = csv.reader(lines())
    rows: dict[str, Counter[Row]] = {topic: Counter() for topic in TOPICS}
    names = [" ".join(cell.split()).casefold() for cell in next(reader, [])]
    while True:
        taken.clear()
        line = reader.line_num + 1
        fields = next(reader, None)
        if fields is None:
            return rows
        if len(fields) == len(names):
            rows["delimited"][frozenset(zip(names, fields, strict=True))] += 1
        elif fields:
            rows["delimited_rejects"][frozenset({("line", line), ("raw", "".join(taken))})] += 1


def shown(location: str, topic: str) -> Iterator[tuple[tuple[int, str], Counter[Row]]]:
    """(version id, source hash) and the rows of each version that a reader of a topic sees."""
    version_id, _, source_hash, _ = LINEAGE
    columns = ("line", "raw") if topic == "delimited_rejects" else ()
    found = sink_reader.rows(location, topic)
    for key, rows in groupby(found, key=itemgetter(version_id, source_hash)):
        counted: Counter[Row] = Counter()
        for row in rows:
            counted[
                frozenset(
                    (name.casefold(), value)
                    for name, value in row.items()
                    if value is not None and (name in columns or not columns)
                    if name not in LINEAGE
                )
            ] += 1
        yield key, counted
