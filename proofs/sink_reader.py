"""What any reader sees in a sink, read without the code that publishes: for proofs."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
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


def groups(location: str, topic: str) -> Iterator[Group]:
    """Everything a topic holds, job by job; nothing where the sink is not there yet.

    Raises:
        OSError, sqlite3.Error, pyarrow.ArrowException: something there cannot be read.
    """
    if location.startswith(PREFIXES["parquet"]):
        folder = Path(location.removeprefix(PREFIXES["parquet"])) / topic
        for output in _outputs(folder):
            yield from _grouped(table_rows(output))
    else:
        query = "SELECT {0}, {1}, {2}, {3} FROM {topic} ORDER BY rowid"
        yield from _grouped(_ask(Path(location.removeprefix(PREFIXES["sqlite"])), topic, query))


def counts(location: str, topic: str, known: set[Path]) -> Iterator[tuple[str, int]]:
    """Source hash and number of rows of each job: what a reader can look at all the time.

    Args:
        known: Parquet outputs that need no further look, since none ever changes; those that were
            read are added.

    Raises:
        OSError, sqlite3.Error, pyarrow.ArrowException: as `groups`.
    """
    if location.startswith(PREFIXES["parquet"]):
        folder = Path(location.removeprefix(PREFIXES["parquet"])) / topic
        for output in sorted(set(_outputs(folder)) - known):
            for group in _grouped(table_rows(output)):
                yield group.source_hash, len(group.rows)
            known.add(output)
    else:
        query = "SELECT {0}, count(*) FROM {topic} GROUP BY {0}, {1}, {2}"
        yield from _ask(Path(location.removeprefix(PREFIXES["sqlite"])), topic, query)


def _outputs(folder: Path) -> list[Path]:
    """Files of rows, and folders of such."""
    found = {*folder.glob("*.parquet"), *(file.parent for file in folder.glob("*/*.parquet"))}
    return sorted(found)


def table_rows(output: Path) -> list[tuple[str, int, int, str]]:
    """(source hash, version id, job id, value) of each row of a Parquet file, or of a folder."""
    files = sorted(output.glob("*.parquet")) if output.is_dir() else [output]
    table = pa.concat_tables([pq.ParquetFile(file).read() for file in files])
    version_id, job_id, source_hash, _ = (table[name].to_pylist() for name in LINEAGE)
    return list(zip(source_hash, version_id, job_id, table[0].to_pylist(), strict=True))


def _ask(path: Path, topic: str, query: str) -> list[Any]:
    """The answer of a topic's table; {0}, {1} and {2} are hash, version and job, {3} its first."""
    if not path.exists():
        return []
    uri = f"{path.as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
        has = connection.execute("SELECT 1 FROM sqlite_schema WHERE name = ?", [topic]).fetchone()
        if not has:
            return []
        version_id, job_id, source_hash, _ = LINEAGE
        value = connection.execute(f"SELECT * FROM {topic} LIMIT 0").description[0][0]
        columns = source_hash, version_id, job_id, value
        return connection.execute(query.format(*columns, topic=topic)).fetchall()


def _grouped(rows: list[tuple[str, int, int, str]]) -> Iterator[Group]:
    found: dict[tuple[str, int, int], list[str]] = {}
    for *lineage, value in rows:
        found.setdefault(tuple(lineage), []).append(value)  # type: ignore[arg-type]
    for (source_hash, version_id, job_id), values in found.items():
        yield Group(source_hash, version_id, job_id, values)
