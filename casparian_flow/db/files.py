"""Directories, locations and versions: what Scout reads and records.

The inventory goes through executemany on the driver's connection: the ORM costs twenty times a
plain directory walk here, this costs about three.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sqlalchemy import Connection, select

from casparian_flow.db import found, jobs
from casparian_flow.db.access import execute_many
from casparian_flow.db.models import (
    Directory,
    FileLocation,
    utcnow,
)
from casparian_flow.db.routing import Routing

ROUTE_CHUNK = 5_000
"""Locations routed in one transaction, so that others get their turn."""


class Stat(NamedTuple):
    """The identity of a look at a file; any difference means: hash again."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stat:
        """From the operating system; numbers above 2^63 wrap, since SQLite's are signed."""
        return cls(
            _signed(status.st_dev),
            _signed(status.st_ino),
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )


class Known(NamedTuple):
    """What the ledger knows of a location."""

    location_id: int
    stat: Stat | None
    racy: bool
    present: bool
    version_id: int | None
    content_hash: str | None
    problem: str


class Sighting(NamedTuple):
    """What a scan found at one path."""

    path: bytes
    directory: bytes
    stat: Stat
    content_hash: str
    """Empty when the file could not be read."""
    racy: bool
    compared: int | None
    """The version that was current when the scan looked; another one by now wins."""
    problem: str = ""


class Recorded(NamedTuple):
    """What `record` changed."""

    versions: int
    job_ids: list[int]
    stale: list[bytes]
    """Directories of sightings that lost to a faster scan, to be looked at again."""


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def display(path: bytes) -> str:
    """A relative path as text: valid UTF-8 as it is, other bytes as `\\xNN`."""
    return path.decode("utf-8", "backslashreplace")


def route_text(path: bytes) -> str:
    """A relative path for matching against patterns, losslessly."""
    return os.fsdecode(path)


def directory_digest(connection: Connection, root_id: int, path: bytes) -> bytes | None:
    """The digest stored for a directory; None where it must be compared file by file.

    One that was recorded before its parent was known has to be recorded again: nobody would find
    it missing.
    """
    return connection.execute(
        select(Directory.digest).where(
            Directory.source_root_id == root_id,
            Directory.path == path,
            Directory.parent_id.is_not(None) | (Directory.path == b""),
        )
    ).scalar()


def child_directories(connection: Connection, root_id: int, path: bytes) -> list[bytes]:
    """Paths of the directories known directly under a directory."""
    parent = (
        select(Directory.id)
        .where(Directory.source_root_id == root_id, Directory.path == path)
        .scalar_subquery()
    )
    return list(
        connection.execute(select(Directory.path).where(Directory.parent_id == parent)).scalars()
    )


_KNOWN = """
SELECT l.path, l.id, l.device, l.inode, l.size_bytes, l.mtime_ns, l.ctime_ns, l.racy, l.gone_at,
       l.current_version_id, v.content_hash, l.problem
FROM cf_file_location l LEFT JOIN cf_file_version v ON v.id = l.current_version_id
WHERE l.source_root_id = ? AND l.path IN ({marks})
"""


def known(connection: Connection, root_id: int, paths: Sequence[bytes]) -> dict[bytes, Known]:
    """What the ledger knows of these locations."""
    statement = _KNOWN.format(marks=",".join("?" * len(paths)))
    rows = connection.exec_driver_sql(statement, (root_id, *paths))
    return {
        row[0]: Known(
            row[1],
            None if row[2] is None else Stat._make(row[2:7]),
            bool(row[7]), row[8] is None, row[9], row[10], row[11],
        )
        for row in rows
    }  # fmt: skip


def save_directories(
    connection: Connection, root_id: int, found: Iterable[tuple[bytes, bytes | None]]
) -> None:
    """Record directories (path, digest), parents before children."""
    execute_many(
        connection,
        """
        INSERT INTO cf_directory (source_root_id, path, parent_id, digest)
        VALUES (:root, :path, (
            SELECT id FROM cf_directory WHERE source_root_id = :root AND path = :parent), :digest)
        ON CONFLICT (source_root_id, path)
        DO UPDATE SET digest = excluded.digest, parent_id = excluded.parent_id
        """,
        [
            {"root": root_id, "path": path, "parent": _parent(path), "digest": digest}
            for path, digest in found
        ],
    )


def _parent(path: bytes) -> bytes | None:
    return None if not path else path.rpartition(b"/")[0]


def record(
    connection: Connection, root_id: int, sightings: Sequence[Sighting], routing: Routing
) -> Recorded:
    """Write what a scan found: locations, new versions, and the jobs they give.

    The caller's transaction makes it whole: no version without its jobs, no job without a
    version. A sighting counts only if the version it was compared with is still the current one.
    """
    now = utcnow().isoformat(" ")
    before = known(connection, root_id, [seen.path for seen in sightings])
    _add_locations(connection, root_id, [s for s in sightings if s.path not in before], now)
    current = {**before, **known(connection, root_id, [s.path for s in sightings])}

    stale = [s for s in sightings if current[s.path].version_id != s.compared]
    lost = {s.path for s in stale}
    fresh = [s for s in sightings if s.path not in lost]
    lacking = found.resumed(connection, root_id, [s.path for s in fresh if s.content_hash])
    changed = [
        s
        for s in fresh
        if s.content_hash and (s.path in lacking or s.content_hash != current[s.path].content_hash)
    ]
    version_ids = _add_versions(connection, changed, current, lacking, now)
    _save_looks(connection, fresh, current, version_ids)
    confirmed = [
        now_known.version_id
        for s, now_known in ((s, current[s.path]) for s in fresh)
        if now_known.version_id is not None
        and s.content_hash == now_known.content_hash
        and s.path not in version_ids
    ]
    job_ids = jobs.revive(connection, confirmed) + jobs.enqueue(
        connection,
        [
            (version_ids[s.path], wanted)
            for s in changed
            for wanted in routing.wanted(route_text(s.path))
        ],
        now,
    )
    return Recorded(len(changed), job_ids, [s.directory for s in stale])


def _add_locations(
    connection: Connection, root_id: int, sightings: Sequence[Sighting], now: str
) -> None:
    execute_many(
        connection,
        """
        INSERT INTO cf_file_location
            (source_root_id, directory_id, path, rel_path, discovered_at, problem, racy)
        VALUES (:root, (
            SELECT id FROM cf_directory WHERE source_root_id = :root AND path = :folder),
            :path, :shown, :now, '', 0)
        """,
        [
            {
                "root": root_id,
                "folder": s.directory,
                "path": s.path,
                "shown": display(s.path),
                "now": now,
            }
            for s in sightings
        ],
    )


def _add_versions(
    connection: Connection,
    changed: Sequence[Sighting],
    current: dict[bytes, Known],
    lacking: dict[bytes, list[found.Resumed]],
    now: str,
) -> dict[bytes, int]:
    """Insert the next version of each location; ids are ours to give, under the write lock.

    Versions that outputs in the sinks name and this ledger lacks come first; where the last of
    them has the content that was seen, it is the one.
    """
    back = {
        path: found.bring_back(connection, current[path].location_id, versions, now)
        for path, versions in lacking.items()
    }
    ids = {
        s.path: back[s.path][s.content_hash]
        for s in changed
        if s.content_hash in back.get(s.path, {})
    }
    changed = [s for s in changed if s.path not in ids]
    last = found.last_version_id(connection)
    ids |= {s.path: last + n for n, s in enumerate(changed, start=1)}
    execute_many(
        connection,
        """
        INSERT INTO cf_file_version
            (id, location_id, ordinal, content_hash, size_bytes, detected_at)
        VALUES (:id, :location, 1 + (SELECT coalesce(max(ordinal), 0) FROM cf_file_version
                                     WHERE location_id = :location), :hash, :size, :now)
        """,
        [
            {
                "id": ids[s.path],
                "location": current[s.path].location_id,
                "hash": s.content_hash,
                "size": s.stat.size,
                "now": now,
            }
            for s in changed
        ],
    )
    return ids


def _save_looks(
    connection: Connection,
    sightings: Sequence[Sighting],
    current: dict[bytes, Known],
    version_ids: dict[bytes, int],
) -> None:
    """Remember the stat identity of each look, beside the version and not in it."""
    execute_many(
        connection,
        """
        UPDATE cf_file_location
        SET current_version_id = ?, device = ?, inode = ?, size_bytes = ?, mtime_ns = ?,
            ctime_ns = ?, racy = ?, problem = ?, gone_at = NULL
        WHERE id = ?
        """,
        [
            (
                version_ids.get(s.path, current[s.path].version_id),
                *(s.stat if s.content_hash else (None,) * 5),
                s.racy,
                s.problem,
                current[s.path].location_id,
            )
            for s in sightings
        ],
    )


def route_chunk(
    connection: Connection, root_id: int, after: int, routing: Routing
) -> tuple[int | None, list[int]]:
    """Queue what the current versions of the next locations lack under this routing.

    A plugin that has a job for the version under any of its versions is left alone: redoing what
    an older version did is `backfill`'s business.

    Returns:
        The last location id looked at (None when there are no more), and the new jobs' ids.
    """
    rows = connection.execute(
        select(FileLocation.id, FileLocation.path, FileLocation.current_version_id)
        .where(
            FileLocation.source_root_id == root_id,
            FileLocation.id > after,
            FileLocation.gone_at.is_(None),
        )
        .order_by(FileLocation.id)
        .limit(ROUTE_CHUNK)
    ).all()
    if not rows:
        return None, []
    pairs = [
        (version_id, wanted)
        for _, path, version_id in rows
        if version_id is not None
        for wanted in routing.wanted(route_text(path))
    ]
    return rows[-1][0], jobs.enqueue(connection, pairs, utcnow().isoformat(" "))
