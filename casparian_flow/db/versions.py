"""Directories, locations, versions and source roots: what Scout reads and records.

Rows are written with executemany on the driver's connection, which costs about three times a plain
directory walk; the ORM costs twenty times.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import func, select, text, update
from sqlalchemy.dialects.sqlite import insert

from casparian_flow.db import adopt, audit, jobs, visibility
from casparian_flow.db.access import Connection, execute_many
from casparian_flow.db.models import (
    Directory,
    FileLocation,
    FileVersion,
    ProcessingJob,
    ScanState,
    SourceRoot,
    Unsettled,
)
from casparian_flow.db.routing import JobRequest, Routing
from casparian_flow.db.states import PASSED_OVER, RETRACT, utcnow
from casparian_flow.db.visibility import Change, Scope

ROUTE_CHUNK = 5_000
"""Locations routed in one transaction, so that other writers get their turn."""


class Stat(NamedTuple):
    """What `stat` says about a file; where any field differs, the file is hashed again."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stat:
        """From `os.stat`. Numbers above 2^63 wrap, since SQLite's are signed."""
        return cls(
            _signed(status.st_dev),
            _signed(status.st_ino),
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )


class LocationState(NamedTuple):
    """What the ledger knows of a location."""

    location_id: int
    stat: Stat | None
    racy: bool
    present: bool
    version_id: int | None
    content_hash: str | None
    problem: str
    captured: bool
    """Whether the store has the bytes of the current version, or had them."""


class Sighting(NamedTuple):
    """What a scan found at one path, and the version it compared that with."""

    path: bytes
    directory: bytes
    stat: Stat
    content_hash: str
    """Empty when the file could not be read."""
    racy: bool
    compared: int | None
    """Id of the current version when the scan read the ledger; the sighting counts only if it still
    is."""
    problem: str = ""


class RecordResult(NamedTuple):
    """What `record` changed."""

    versions: int
    job_ids: list[int]
    stale: list[bytes]
    """Directories of sightings that another scan was faster to record: to be scanned again."""
    change: Change
    """What readers see since files are back."""


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def display(path: bytes) -> str:
    """A relative path as text: valid UTF-8 as it is, other bytes as `\\xNN`."""
    return path.decode("utf-8", "backslashreplace")


def route_text(path: bytes) -> str:
    """A relative path as text to match patterns against, without loss."""
    return os.fsdecode(path)


def directory_digest(connection: Connection, root_id: int, path: bytes) -> bytes | None:
    """The digest stored for a directory; None where it must be compared file by file.

    None too where its parent is not recorded: without one, its deletion would not be found.
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
       l.current_version_id, v.content_hash, l.problem,
       k.id IS NOT NULL OR e.evicted_at IS NOT NULL
FROM cf_file_location l LEFT JOIN cf_file_version v ON v.id = l.current_version_id
LEFT JOIN cf_kept_content k ON k.content_hash = v.content_hash
LEFT JOIN cf_evicted_content e ON e.content_hash = v.content_hash
WHERE l.source_root_id = ? AND l.path IN ({marks})
"""


def known(
    connection: Connection, root_id: int, paths: Sequence[bytes]
) -> dict[bytes, LocationState]:
    """The state of these locations, by path; unknown ones are left out."""
    statement = _KNOWN.format(marks=",".join("?" * len(paths)))
    rows = connection.exec_driver_sql(statement, (root_id, *paths))
    return {
        row[0]: LocationState(
            row[1],
            None if row[2] is None else Stat._make(row[2:7]),
            bool(row[7]), row[8] is None, row[9], row[10], row[11], bool(row[12]),
        )
        for row in rows
    }  # fmt: skip


def save_directories(
    connection: Connection, root_id: int, directories: Iterable[tuple[bytes, bytes | None]]
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
            for path, digest in directories
        ],
    )


def _parent(path: bytes) -> bytes | None:
    return None if not path else path.rpartition(b"/")[0]


def record(
    connection: Connection, root_id: int, sightings: Sequence[Sighting], routing: Routing
) -> RecordResult:
    """Write what a scan found: locations, new versions, and their jobs, in one transaction.

    A sighting counts only if the version it was compared with is still the current one. The rows
    of a file that is back, and that had taken them along, are visible again.
    """
    now = utcnow().isoformat(" ")
    before = known(connection, root_id, [s.path for s in sightings])
    _add_locations(connection, root_id, [s for s in sightings if s.path not in before], now)
    current = {**before, **known(connection, root_id, [s.path for s in sightings])}

    stale = [s for s in sightings if current[s.path].version_id != s.compared]
    lost = {s.path for s in stale}
    fresh = [s for s in sightings if s.path not in lost]
    changed = [
        s for s in fresh if s.content_hash and s.content_hash != current[s.path].content_hash
    ]
    version_ids = _add_versions(connection, changed, current, now)
    _save_stats(connection, fresh, current, version_ids)
    confirmed = [
        state.version_id
        for s, state in ((s, current[s.path]) for s in fresh)
        if state.version_id is not None
        and s.content_hash == state.content_hash
        and s.path not in version_ids
    ]
    back = [s for s in fresh if not current[s.path].present]
    # What comes back with its content may have been gone when a plugin was deployed.
    wanting = {
        s.path: version_id
        for s in [*changed, *back]
        if (version_id := version_ids.get(s.path, current[s.path].version_id)) is not None
    }
    job_ids = jobs.revive(connection, confirmed) + jobs.enqueue(
        connection,
        [
            (version_id, request)
            for path, version_id in wanting.items()
            for request in routing.job_requests(route_text(path), root_id)
        ],
        now,
    )
    places = [current[s.path].location_id for s in back]
    change = visibility.refresh(connection, Scope(places)) if places else Change()
    return RecordResult(len(changed), job_ids, [s.directory for s in stale], change)


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
    current: dict[bytes, LocationState],
    now: str,
) -> dict[bytes, int]:
    """Insert the next version of each location; path -> its id."""
    last = adopt.last_version_id(connection)
    ids = {s.path: last + n for n, s in enumerate(changed, start=1)}
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


def _save_stats(
    connection: Connection,
    sightings: Sequence[Sighting],
    current: dict[bytes, LocationState],
    version_ids: dict[bytes, int],
) -> None:
    """Save the stat of each file with its location; a version never changes."""
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
    """Queue the jobs that the current versions of the next locations lack under this routing.

    A plugin with a job for the version gets none, whichever of its artifacts the job has: redoing
    that is a `backfill`. The queued job of a catch-all plugin is aborted where a table has taken
    the file meanwhile, and queued again where it has given the file back.

    Returns:
        The last of these location ids (None when there are no more), and the new jobs' ids.
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
    pairs: list[tuple[int, JobRequest]] = []
    yielded: list[tuple[int, str, str]] = []
    for _, path, version_id in rows:
        if version_id is not None:
            routed = routing.route(route_text(path), root_id)
            pairs += [(version_id, request) for request in routed.jobs]
            table = ", ".join(routed.tables)
            yielded += [(version_id, plugin, table) for plugin in routed.yielding]
    jobs.give_up(connection, yielded)
    queued = jobs.take_back(connection, [(v, request.plugin_name) for v, request in pairs])
    return rows[-1][0], queued + jobs.enqueue(connection, pairs, utcnow().isoformat(" "))


# Present locations, and marking those that are gone.


class PresentLocation(NamedTuple):
    """A location that the ledger has as present, with the stat of the last scan."""

    location_id: int
    path: bytes
    device: int | None
    inode: int | None
    ctime_ns: int | None


_PRESENT = (
    FileLocation.id, FileLocation.path, FileLocation.device, FileLocation.inode,
    FileLocation.ctime_ns,
)  # fmt: skip


def count_present(connection: Connection, root_id: int) -> int:
    """How many locations of a source root are present."""
    query = select(func.count()).where(
        FileLocation.source_root_id == root_id, FileLocation.gone_at.is_(None)
    )
    return connection.execute(query).scalar_one()


def present_in(connection: Connection, root_id: int, directory: bytes) -> list[PresentLocation]:
    """The present locations directly in a directory."""
    rows = connection.execute(
        select(*_PRESENT)
        .join(Directory, Directory.id == FileLocation.directory_id)
        .where(
            Directory.source_root_id == root_id,
            Directory.path == directory,
            FileLocation.gone_at.is_(None),
        )
    )
    return [PresentLocation(*row) for row in rows]


def present_under(connection: Connection, root_id: int, directory: bytes) -> list[PresentLocation]:
    """The present locations anywhere under a directory."""
    low, high = directory + b"/", directory + b"0"  # '0' is the byte after '/'
    rows = connection.execute(
        select(*_PRESENT).where(
            FileLocation.source_root_id == root_id,
            FileLocation.path >= low,
            FileLocation.path < high,
            FileLocation.gone_at.is_(None),
        )
    )
    return [PresentLocation(*row) for row in rows]


def drop_digests(connection: Connection, root_id: int, directory: bytes) -> None:
    """Drop the digests of a directory that is gone, and of all below it; the locations stay."""
    connection.execute(
        update(Directory)
        .where(
            Directory.source_root_id == root_id,
            (Directory.path == directory)
            | ((Directory.path >= directory + b"/") & (Directory.path < directory + b"0")),
        )
        .values(digest=None, parent_id=None)
    )


class Gone(NamedTuple):
    """What `mark_gone` marked."""

    locations: int
    change: Change = Change()
    """What readers see since then."""


def mark_gone(
    connection: Connection, root_id: int, gone: Sequence[PresentLocation], problem: str = ""
) -> Gone:
    """Mark locations as gone, unless another scan has found them since; their versions stay.

    A location that was invalidated since was not found since. What is deleted takes its rows along
    where its source root says so.

    Args:
        problem: `PASSED_OVER` where they are still on the disk.
    """
    marked = execute_many(
        connection,
        """
        UPDATE cf_file_location SET gone_at = ?, problem = coalesce(nullif(?, ''), problem)
        WHERE source_root_id = ? AND path = ? AND (inode IS ? OR inode IS NULL)
          AND ctime_ns IS ? AND gone_at IS NULL
        """,
        [(utcnow().isoformat(" "), problem, root_id, p.path, p.inode, p.ctime_ns) for p in gone],
    )
    takes_along = select(SourceRoot.on_delete == RETRACT).where(SourceRoot.id == root_id)
    if not marked or problem or not connection.execute(takes_along).scalar_one():
        return Gone(marked)
    return Gone(marked, visibility.refresh(connection, Scope([p.location_id for p in gone])))


def count_gone(connection: Connection, root: str) -> int:
    """How many deleted files the source root of this name has."""
    ids = select(SourceRoot.id).where(SourceRoot.name == root).scalar_subquery()
    query = select(func.count()).where(
        FileLocation.source_root_id == ids,
        FileLocation.gone_at.is_not(None),
        FileLocation.problem != PASSED_OVER,
    )
    return connection.execute(query).scalar_one()


def decide_gone(connection: Connection, root: str) -> Change:
    """Decide anew what readers see of the deleted files of the source root of this name."""
    gone = (
        select(FileLocation.id)
        .join(SourceRoot, SourceRoot.id == FileLocation.source_root_id)
        .where(SourceRoot.name == root, FileLocation.gone_at.is_not(None))
    )
    return visibility.refresh(connection, Scope(list(connection.execute(gone).scalars())))


def count_passed_over(connection: Connection, root: str) -> int:
    """How many recorded locations of the source root of this name scans now pass over."""
    ids = select(SourceRoot.id).where(SourceRoot.name == root).scalar_subquery()
    query = select(func.count()).where(
        FileLocation.source_root_id == ids, FileLocation.problem == PASSED_OVER
    )
    return connection.execute(query).scalar_one()


# Source roots, and what the last scan of each found.


def active_roots(connection: Connection) -> Sequence[Any]:
    """The row of every active source root."""
    columns = SourceRoot.__table__.columns
    return connection.execute(
        select(*columns).where(SourceRoot.active).order_by(SourceRoot.id)
    ).all()


def active_paths(connection: Connection) -> list[str]:
    """The directory of every active source root."""
    return list(connection.execute(select(SourceRoot.path).where(SourceRoot.active)).scalars())


def scan_state(connection: Connection, root_id: int) -> Any:
    """The root's ScanState row; None before its first scan."""
    columns = ScanState.__table__.columns
    return connection.execute(select(*columns).where(ScanState.source_root_id == root_id)).first()


def was_scanned(connection: Connection, root_id: int) -> bool:
    """Whether a scan of the root has ever finished."""
    state = scan_state(connection, root_id)
    return state is not None and state.finished > 0


def save_scan_state(connection: Connection, root_id: int, **values: Any) -> None:
    """Change columns of the root's ScanState, creating it."""
    fresh = {
        "started": 0.0, "finished": 0.0, "files": 0, "unreadable": 0, "unsettled": 0,
        "problem": "", "routed": "", "waiting": 0, "held": 0, "held_since": 0.0, "watch": "",
        "missed": 0, "scrub_after": 0, "scrubbed": 0.0, "hidden": 0,
    }  # fmt: skip
    connection.execute(
        insert(ScanState)
        .values(source_root_id=root_id, **{**fresh, **values})
        .on_conflict_do_update(index_elements=["source_root_id"], set_=values)
    )


def count_up(connection: Connection, root_id: int, **counts: int) -> None:
    """Add to counters of the root's ScanState: `missed`, `hidden`."""
    columns = ScanState.__table__.columns
    connection.execute(
        update(ScanState)
        .where(ScanState.source_root_id == root_id)
        .values({name: columns[name] + count for name, count in counts.items()})
    )


# Having the next scan read a file again, whose bytes were not those of its version.


def invalidate(connection: Connection, job_id: int) -> None:
    """Have the next scan read a job's file again: its bytes were not those of its version.

    If they are again by then, the scan finds no new version, and revives the job.
    """
    location = (
        select(FileVersion.location_id)
        .join(ProcessingJob, ProcessingJob.file_version_id == FileVersion.id)
        .where(ProcessingJob.id == job_id)
        .scalar_subquery()
    )
    connection.execute(
        update(FileLocation).where(FileLocation.id == location).values(device=None, inode=None)
    )
    folder = select(FileLocation.directory_id).where(FileLocation.id == location)
    connection.execute(
        update(Directory).where(Directory.id == folder.scalar_subquery()).values(digest=None)
    )


def keep_invalidated(connection: Connection, root_id: int, folders: Sequence[bytes]) -> None:
    """Drop the digests that a scan has just saved of folders with an invalidated file: it may have
    listed them before the file was invalidated."""
    execute_many(
        connection,
        """
        UPDATE cf_directory SET digest = NULL
        WHERE source_root_id = ? AND path = ? AND EXISTS (
            SELECT 1 FROM cf_file_location l
            WHERE l.directory_id = cf_directory.id AND l.inode IS NULL AND l.gone_at IS NULL)
        """,
        [(root_id, folder) for folder in folders],
    )


# Unsettled files: each scan so far found them being written, so their content has no version.


UNSETTLED_KEPT = 1000
"""Of one source root, at most: of many that have just been copied there, most settle soon."""


def known_unsettled(connection: Connection, root_id: int) -> dict[bytes, float]:
    """The unsettled files of a source root -> when first found so, seconds since the epoch."""
    query = select(Unsettled.path, Unsettled.first_seen).where(Unsettled.source_root_id == root_id)
    return {row.path: row.first_seen for row in connection.execute(query)}


def change_unsettled(
    connection: Connection, root_id: int, ended: Collection[bytes], began: Collection[bytes]
) -> None:
    """Remove the files that are settled or gone, and add those that are now being written."""
    execute_many(
        connection,
        "DELETE FROM cf_unsettled WHERE source_root_id = ? AND path = ?",
        [(root_id, path) for path in ended],
    )
    execute_many(
        connection,
        "INSERT INTO cf_unsettled (source_root_id, path, first_seen) VALUES (?, ?, ?) "
        "ON CONFLICT DO NOTHING",
        [(root_id, path, time.time()) for path in began],
    )


def unsettled_files(connection: Connection, limit: int) -> list[dict[str, Any]]:
    """The unsettled files of active source roots, the oldest first."""
    columns = (SourceRoot.name, Unsettled.path, Unsettled.first_seen)
    rows = connection.execute(
        select(*columns)
        .join(SourceRoot, SourceRoot.id == Unsettled.source_root_id)
        .where(SourceRoot.active)
        .order_by(Unsettled.first_seen, Unsettled.path)
        .limit(limit)
    )
    now = time.time()
    return [
        {
            "source": name,
            "rel_path": display(path),
            "seconds": max(0.0, now - first_seen),
        }
        for name, path, first_seen in rows
    ]


def count_unsettled(connection: Connection) -> int:
    """How many unsettled files active source roots have."""
    query = (
        select(func.count())
        .select_from(Unsettled)
        .join(SourceRoot, SourceRoot.id == Unsettled.source_root_id)
        .where(SourceRoot.active)
    )
    return connection.execute(query).scalar_one()


# Scrubs: what to read again, and recording what differs.


BATCH = 100
"""Files a scrub reads before it saves how far it has come."""


class ScrubTarget(NamedTuple):
    """A present file with the content and the stat that the ledger has for it."""

    location_id: int
    path: bytes
    stat: Stat
    version_id: int
    content_hash: str
    captured: bool
    """As in `LocationState`."""


def scrub_batch(connection: Connection, root_id: int, after: int) -> list[ScrubTarget]:
    """The next files of a root, by location id, without racy ones: the next scan hashes those."""
    rows = connection.execute(
        text(
            """
            SELECT l.id, l.path, l.device, l.inode, l.size_bytes, l.mtime_ns, l.ctime_ns,
                   v.id, v.content_hash, k.id IS NOT NULL OR e.evicted_at IS NOT NULL
            FROM cf_file_location l JOIN cf_file_version v ON v.id = l.current_version_id
            LEFT JOIN cf_kept_content k ON k.content_hash = v.content_hash
            LEFT JOIN cf_evicted_content e ON e.content_hash = v.content_hash
            WHERE l.source_root_id = :root_id AND l.id > :after AND l.gone_at IS NULL
              AND l.inode IS NOT NULL AND NOT l.racy
            ORDER BY l.id LIMIT :batch
            """
        ),
        {"root_id": root_id, "after": after, "batch": BATCH},
    )
    return [
        ScrubTarget(row[0], row[1], Stat._make(row[2:7]), row[7], row[8], bool(row[9]))
        for row in rows
    ]


def record_scrubbed(
    connection: Connection,
    root_id: int,
    subject: str,
    target: ScrubTarget,
    content_hash: str,
    routing: Routing,
) -> RecordResult:
    """Record other bytes under the same stat as a version, with an audit row.

    Args:
        subject: the file, as the audit names it.
        content_hash: SHA-256 of its bytes.
    """
    folder = target.path.rpartition(b"/")[0]
    sighting = Sighting(target.path, folder, target.stat, content_hash, False, target.version_id)
    recorded = record(connection, root_id, [sighting], routing)
    if recorded.versions:
        count_up(connection, root_id, hidden=recorded.versions)
        detail = {"was": target.content_hash, "is": content_hash, "stamps": "did not show it"}
        audit.append(connection, "scrub", [audit.Event("hidden-change", subject, detail)])
    return recorded
