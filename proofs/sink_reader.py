"""What any reader sees in a sink, read without the code that publishes."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from casparian_flow.engine.sinks import PREFIXES
from casparian_flow.engine.sinks.base import LINEAGE

UNREADABLE = (OSError, sqlite3.Error)
"""What reading a sink raises that is not made yet, or is just being recovered."""


class Group(NamedTuple):
    """The rows of one job in one topic."""

    source_hash: str
    version_id: int
    job_id: int
    rows: list[str]
    """The topic's own first column, in the order of the rows."""


@contextlib.contextmanager
def read_only(database: Path, timeout: float = 5.0) -> Iterator[sqlite3.Connection]:
    """A database, to be read and not written.

    Args:
        timeout: seconds that a lock is waited for.

    Raises:
        sqlite3.Error: it is not there, or cannot be read.
    """
    uri = f"{database.as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=timeout)) as connection:
        yield connection


def rows(location: str, topic: str) -> Iterator[dict[str, Any]]:
    """Every row of a topic, those of a version beside each other; none where there is no topic.

    Raises:
        OSError, sqlite3.Error, pyarrow.ArrowException: something there cannot be read.
    """
    if location.startswith(PREFIXES["parquet"]):
        for output in _outputs(location, topic):
            yield from _table(output).to_pylist()
    else:
        names, found = _ask(location, topic, f"SELECT * FROM {topic} ORDER BY {LINEAGE[0]}, rowid")
        for row in found:
            yield dict(zip(names, row, strict=True))


def groups(location: str, topic: str) -> Iterator[Group]:
    """Everything a topic holds, job by job; nothing where the sink is not there yet.

    Raises:
        OSError, sqlite3.Error, pyarrow.ArrowException: something there cannot be read.
    """
    if location.startswith(PREFIXES["parquet"]):
        for output in _outputs(location, topic):
            yield from _grouped(_table(output).to_pylist())
    else:
        yield from _grouped(rows(location, topic))


def counts(location: str, topic: str, known: set[Path]) -> Iterator[tuple[str, int]]:
    """Source hash and number of rows of each job: what a reader can look at all the time.

    Args:
        known: Parquet outputs that need no further look, since none ever changes; those that were
            read are added.

    Raises:
        OSError, sqlite3.Error, pyarrow.ArrowException: as `groups`.
    """
    version_id, job_id, source_hash, _ = LINEAGE
    if location.startswith(PREFIXES["parquet"]):
        for output in sorted(set(_outputs(location, topic)) - known):
            table = _table(output, [source_hash, version_id, job_id])
            found = Counter(zip(*(column.to_pylist() for column in table.columns), strict=True))
            yield from ((key[0], count) for key, count in found.items())
            known.add(output)
    else:
        group = f"{source_hash}, {version_id}, {job_id}"
        query = f"SELECT {source_hash}, count(*) FROM {topic} GROUP BY {group}"
        yield from _ask(location, topic, query)[1]


def _outputs(location: str, topic: str) -> list[Path]:
    """Files of rows, and folders of such."""
    folder = Path(location.removeprefix(PREFIXES["parquet"])) / topic
    found = {*folder.glob("*.parquet"), *(file.parent for file in folder.glob("*/*.parquet"))}
    return sorted(found)


def _table(output: Path, columns: list[str] | None = None) -> Any:
    """A Parquet file, or a folder of parts."""
    files = sorted(output.glob("*.parquet")) if output.is_dir() else [output]
    return pa.concat_tables([pq.ParquetFile(file).read(columns) for file in files])


def _ask(location: str, topic: str, query: str) -> tuple[list[str], list[Any]]:
    """Column names and rows; none where the table is not there yet."""
    path = Path(location.removeprefix(PREFIXES["sqlite"]))
    if not path.exists():
        return [], []
    with read_only(path) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = ?", [topic]).fetchone():
            return [], []
        cursor = connection.execute(query)
        return [column[0] for column in cursor.description], cursor.fetchall()


def _grouped(found: Iterable[dict[str, Any]]) -> Iterator[Group]:
    version_id, job_id, source_hash, _ = LINEAGE
    jobs: dict[tuple[str, int, int], list[str]] = {}
    for row in found:
        key = row[source_hash], row[version_id], row[job_id]
        jobs.setdefault(key, []).append(next(iter(row.values())))
    for key, values in jobs.items():
        yield Group(*key, values)
