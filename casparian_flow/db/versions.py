"""Directories, locations, versions and source roots: what Scout reads and records.

What a scan does for each directory and file is SQL on the driver's connection, which costs what
SQLite does; an ORM would cost ten times as much.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, Self

from casparian_flow.db import adopt, audit, jobs, moves, visibility
from casparian_flow.db.access import Connection, driver, execute, execute_many, returned_ids
from casparian_flow.db.routing import JobRequest, Routing
from casparian_flow.db.states import PASSED_OVER, RETRACT, utcnow
from casparian_flow.db.visibility import Change, Scope, query_of

ROUTE_CHUNK = 5_000
"""Locations routed in one transaction, so that other writers get their turn."""


Identity = tuple[int, int, int, int, int]
"""Device, inode, size, mtime and ctime of a file, as `stat` gives them."""

identity: Callable[[os.stat_result], Identity] = attrgetter(
    "st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns"
)

_WRAPS = 1 << 63


class Stat(NamedTuple):
    """What `stat` says about a file; where any field differs, the file is hashed again."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """From `os.stat`."""
        return cls.of_identity(identity(status))

    @classmethod
    def of_identity(cls, found: Identity) -> Self:
        """From an `identity`. Numbers above 2^63 wrap, since SQLite's are signed."""
        device, inode, *rest = found
        if device < _WRAPS and inode < _WRAPS:
            return cls._make(found)
        return cls(_signed(device), _signed(inode), *rest)


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
    return number - 2 * _WRAPS if number >= _WRAPS else number


def display(path: bytes) -> str:
    """A relative path as text: valid UTF-8 as it is, other bytes as `\\xNN`."""
    return path.decode("utf-8", "backslashreplace")


def route_text(path: bytes) -> str:
    """A relative path as text to match patterns against, without loss."""
    return os.fsdecode(path)


class KnownDirectory(NamedTuple):
    """What the ledger has of a directory."""

    directory_id: int
    digest: bytes | None
    """Of the listing that the rows of its files agree with. Else something that is no digest, and
    new each time that one of them changes."""
    is_linked: bool
    """Whether its parent is recorded: without one, its deletion would not be found."""


def directory(connection: Connection, root_id: int, path: bytes) -> KnownDirectory | None:
    """A directory of a source root; None where no scan has recorded it."""
    row = (
        driver(connection)
        .execute(
            "SELECT id, digest, parent_id IS NOT NULL OR path = x'' "
            "FROM cf_directory WHERE source_root_id = ? AND path = ?",
            (root_id, path),
        )
        .fetchone()
    )
    return None if row is None else KnownDirectory._make(row)


def child_directories(connection: Connection, directory_id: int) -> list[bytes]:
    """Paths of the directories known directly under a directory."""
    found = driver(connection).execute(
        "SELECT path FROM cf_directory WHERE parent_id = ?", (directory_id,)
    )
    return [path for (path,) in found.fetchall()]


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
    if not paths:
        return {}
    statement = _KNOWN.format(marks=",".join("?" * len(paths)))
    rows = driver(connection).execute(statement, (root_id, *paths)).fetchall()
    return {
        row[0]: LocationState(
            row[1],
            None if row[2] is None else Stat._make(row[2:7]),
            bool(row[7]), row[8] is None, row[9], row[10], row[11], bool(row[12]),
        )
        for row in rows
    }  # fmt: skip


class NewDigest(NamedTuple):
    """What a directory is to have as its digest, and what it had when a scan began to compare it.

    Two scans at once may each find the other's rows changed. Whoever changes a row changes the
    digest of its directory too, so one is saved only in the place of that which the scan has read.
    """

    before: bytes | None
    """`UNKNOWN` where it had none, or where that does not matter."""
    digest: bytes


UNKNOWN = b""


def save_directories(
    connection: Connection, root_id: int, directories: Mapping[bytes, NewDigest]
) -> set[bytes]:
    """Record directories, parents before children; the paths of those that were not recorded."""
    raw = driver(connection)
    fresh = set()
    for path, (before, digest) in directories.items():
        parent = root_id, _parent(path)
        if raw.execute(_ADD_DIRECTORY, (root_id, path, *parent, digest)).rowcount:
            fresh.add(path)
        else:
            raw.execute(_SAVE_DIRECTORY, (before, digest, *parent, root_id, path))
    return fresh


def invalidate_directories(connection: Connection, root_id: int, paths: Collection[bytes]) -> None:
    """Have the next scan compare the files of these directories."""
    execute_many(
        connection,
        "UPDATE cf_directory SET digest = randomblob(8) WHERE source_root_id = ? AND path = ?",
        [(root_id, path) for path in paths],
    )


def unlinked_directories(connection: Connection, root_id: int) -> list[bytes]:
    """Directories with present files whose deletion would not be found (`KnownDirectory`)."""
    found = driver(connection).execute(
        "SELECT path FROM cf_directory d WHERE source_root_id = ? AND parent_id IS NULL "
        "AND path <> x'' AND EXISTS (SELECT 1 FROM cf_file_location "
        "WHERE directory_id = d.id AND gone_at IS NULL)",
        (root_id,),
    )
    return [path for (path,) in found.fetchall()]


def link_directories(connection: Connection, root_id: int, paths: Collection[bytes]) -> None:
    """Record what is above these directories, and have the next scan compare that."""
    raw = driver(connection)
    for path in paths:
        child = path
        while (parent := _parent(child)) is not None:
            raw.execute(_INVALIDATE_OR_ADD, (root_id, parent))
            raw.execute(_LINK, (root_id, parent, root_id, child))
            child = parent


_INVALIDATE_OR_ADD = """
INSERT INTO cf_directory (source_root_id, path, digest) VALUES (?, ?, randomblob(8))
ON CONFLICT (source_root_id, path) DO UPDATE SET digest = excluded.digest
"""

_LINK = """
UPDATE cf_directory
SET parent_id = (SELECT id FROM cf_directory WHERE source_root_id = ? AND path = ?)
WHERE source_root_id = ? AND path = ?
"""

_ADD_DIRECTORY = """
INSERT INTO cf_directory (source_root_id, path, parent_id, digest)
VALUES (?, ?, (SELECT id FROM cf_directory WHERE source_root_id = ? AND path = ?), ?)
ON CONFLICT (source_root_id, path) DO NOTHING
"""

_SAVE_DIRECTORY = """
UPDATE cf_directory
SET digest = CASE WHEN digest IS ? THEN ? ELSE randomblob(8) END,
    parent_id = (SELECT id FROM cf_directory WHERE source_root_id = ? AND path = ?)
WHERE source_root_id = ? AND path = ?
"""


def _parent(path: bytes) -> bytes | None:
    return None if not path else path.rpartition(b"/")[0]


def record(
    connection: Connection,
    root_id: int,
    sightings: Sequence[Sighting],
    routing: Routing,
    fresh: Collection[bytes] = (),
) -> RecordResult:
    """Write what a scan found: locations, new versions, and their jobs, in one transaction.

    A sighting counts only if the version it was compared with is still the current one. The rows
    of a file that is back, and that had taken them along, are visible again.

    Args:
        fresh: directories that this transaction has recorded, so that they have no location yet.
    """
    now = utcnow().isoformat(" ")
    before = known(connection, root_id, [s.path for s in sightings if s.directory not in fresh])
    added, again, stale = [], [], []
    for s in sightings:
        state = before.get(s.path)
        if s.compared != (state.version_id if state else None):
            stale.append(s.directory)
        elif state is None:
            added.append(s)
        else:
            again.append((s, state))
    _keep_routed(connection, root_id, routing, [s for s in sightings if s.content_hash])
    wanting = _add(connection, root_id, added, now)
    changed = [(s, state) for s, state in again if s.content_hash not in ("", state.content_hash)]
    wanting |= _add_versions(connection, changed, now)
    _save_stats(connection, again, wanting)
    recorded = len(wanting)
    confirmed = [
        state.version_id
        for s, state in again
        if state.version_id is not None and s.content_hash == state.content_hash
    ]
    back = [(s, state) for s, state in again if not state.present]
    # What comes back with its content may have been gone when a plugin was deployed.
    for s, state in back:
        if state.version_id is not None:
            wanting.setdefault(s.path, state.version_id)
    pairs = [
        (wanting[s.path], request)
        for s in (sightings if routing.takers else ())
        if s.path in wanting
        for request in routing.job_requests(route_text(s.path), root_id)
    ]
    job_ids = jobs.revive(connection, confirmed) if confirmed else []
    job_ids += jobs.enqueue(connection, pairs, now) if pairs else []
    contents = {s.content_hash for s in sightings}
    contents |= {state.content_hash for _, state in again if state.content_hash}
    moves.note(query_of(connection), contents - {""}, confirmed)
    places = [state.location_id for _, state in back]
    change = visibility.refresh(connection, Scope(places)) if places else Change()
    return RecordResult(recorded, job_ids, stale, change)


def _keep_routed(
    connection: Connection, root_id: int, routing: Routing, sightings: Sequence[Sighting]
) -> None:
    """Keep true that `routed` names a routing by which every present version got its jobs.

    A root without locations is routed by whatever its first ones are. What is recorded by another
    routing than the rest has a full scan route all of it.
    """
    state = scan_state(connection, root_id)
    routed = state.routed if state is not None else ""
    if not sightings or routed.rpartition(" ")[2] == routing.fingerprint:
        return
    first = "SELECT 1 FROM cf_file_location WHERE source_root_id = ? LIMIT 1"
    is_first = driver(connection).execute(first, (root_id,)).fetchone() is None
    if is_first or routed:
        save_scan_state(connection, root_id, routed=routing.fingerprint if is_first else "")


def _add(
    connection: Connection, root_id: int, added: Sequence[Sighting], now: str
) -> dict[bytes, int]:
    """Add locations that the ledger does not have, with their first versions; path -> version id.

    The ids are given here: those of the locations with a content are as far above one another as
    those of their versions, so that one statement makes the versions current.
    """
    if not added:
        return {}
    raw = driver(connection)
    # In the order of the paths, as the index has them.
    added = sorted(added, key=lambda s: (not s.content_hash, s.path))
    folders = _directory_ids(raw, root_id, {s.directory for s in added})
    (place,) = raw.execute("SELECT 1 + coalesce(max(id), 0) FROM cf_file_location").fetchone()
    version = 1 + adopt.last_version_id(connection)
    read = [s for s in added if s.content_hash]
    raw.executemany(
        "INSERT INTO cf_file_location (id, source_root_id, directory_id, path, rel_path, "
        "discovered_at, problem, racy, device, inode, size_bytes, mtime_ns, ctime_ns) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (n, root_id, folders[s.directory], s.path, display(s.path), now, s.problem, s.racy,
             *(s.stat if s.content_hash else (None,) * 5))
            for n, s in enumerate(added, place)
        ],
    )  # fmt: skip
    raw.executemany(
        "INSERT INTO cf_file_version (id, location_id, ordinal, content_hash, size_bytes, "
        "detected_at) VALUES (?, ?, 1, ?, ?, ?)",
        [(version + n, place + n, s.content_hash, s.stat.size, now) for n, s in enumerate(read)],
    )
    raw.execute(
        "UPDATE cf_file_location SET current_version_id = id + ? WHERE id >= ? AND id < ?",
        (version - place, place, place + len(read)),
    )
    return {s.path: version + n for n, s in enumerate(read)}


def _directory_ids(
    raw: sqlite3.Connection, root_id: int, paths: Collection[bytes]
) -> dict[bytes, int]:
    marks = ",".join("?" * len(paths))
    query = f"SELECT path, id FROM cf_directory WHERE source_root_id = ? AND path IN ({marks})"  # noqa: S608
    return dict(raw.execute(query, (root_id, *paths)).fetchall())


def _add_versions(
    connection: Connection, changed: Sequence[tuple[Sighting, LocationState]], now: str
) -> dict[bytes, int]:
    """Insert the next version of each location; path -> its id."""
    if not changed:
        return {}
    first = 1 + adopt.last_version_id(connection)
    driver(connection).executemany(
        "INSERT INTO cf_file_version (id, location_id, ordinal, content_hash, size_bytes, "
        "detected_at) VALUES (?, ?, 1 + (SELECT coalesce(max(ordinal), 0) FROM cf_file_version "
        "WHERE location_id = ?), ?, ?, ?)",
        [
            (n, state.location_id, state.location_id, s.content_hash, s.stat.size, now)
            for n, (s, state) in enumerate(changed, first)
        ],
    )
    return {s.path: n for n, (s, _) in enumerate(changed, first)}


def _save_stats(
    connection: Connection,
    again: Sequence[tuple[Sighting, LocationState]],
    version_ids: Mapping[bytes, int],
) -> None:
    """Save the stat of each file with its location; a version never changes."""
    driver(connection).executemany(
        """
        UPDATE cf_file_location
        SET current_version_id = ?, device = ?, inode = ?, size_bytes = ?, mtime_ns = ?,
            ctime_ns = ?, racy = ?, problem = ?, gone_at = NULL
        WHERE id = ?
        """,
        [
            (
                version_ids.get(s.path, state.version_id),
                *(s.stat if s.content_hash else (None,) * 5),
                s.racy,
                s.problem,
                state.location_id,
            )
            for s, state in again
        ],
    )


def end_routing(connection: Connection, root_id: int, begun: str, routing: Routing) -> None:
    """Every present version was routed so, unless one was recorded by another routing meanwhile.

    Args:
        begun: what was saved as `routed` before: something unique, a space and the fingerprint.
    """
    state = scan_state(connection, root_id)
    if state is not None and state.routed == begun:
        save_scan_state(connection, root_id, routed=routing.fingerprint)


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
    query = """
        SELECT id, path, current_version_id FROM cf_file_location
        WHERE source_root_id = :root AND id > :after AND gone_at IS NULL ORDER BY id LIMIT :chunk
        """
    rows = execute(connection, query, root=root_id, after=after, chunk=ROUTE_CHUNK).all()
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


def count_present(connection: Connection, root_id: int) -> int:
    """How many locations of a source root are present."""
    query = "SELECT count(*) FROM cf_file_location WHERE source_root_id = :root AND gone_at IS NULL"
    found: int = execute(connection, query, root=root_id).scalar_one()
    return found


def present_in(connection: Connection, directory_id: int) -> list[PresentLocation]:
    """The present locations directly in a directory."""
    rows = driver(connection).execute(
        "SELECT id, path, device, inode, ctime_ns FROM cf_file_location "
        "WHERE directory_id = ? AND gone_at IS NULL",
        (directory_id,),
    )
    return [PresentLocation._make(row) for row in rows.fetchall()]


def present_under(connection: Connection, root_id: int, directory: bytes) -> list[PresentLocation]:
    """The present locations anywhere under a directory."""
    rows = driver(connection).execute(
        "SELECT id, path, device, inode, ctime_ns FROM cf_file_location "
        "WHERE source_root_id = ? AND path >= ? AND path < ? AND gone_at IS NULL",
        (root_id, directory + b"/", directory + b"0"),  # '0' is the byte after '/'
    )
    return [PresentLocation._make(row) for row in rows.fetchall()]


def drop_digests(connection: Connection, root_id: int, directory: bytes) -> None:
    """Drop the digests of a directory that is gone, and of all below it; the locations stay."""
    execute(
        connection,
        "UPDATE cf_directory SET digest = randomblob(8), parent_id = NULL "
        "WHERE source_root_id = :root AND (path = :path OR (path >= :low AND path < :high))",
        root=root_id, path=directory, low=directory + b"/", high=directory + b"0",
    )  # fmt: skip


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
    places = [p.location_id for p in gone]
    if marked:
        moves.gone(query_of(connection), places)
    if not marked or problem:
        return Gone(marked)
    on_delete = "SELECT on_delete FROM cf_source_root WHERE id = :root"
    takes_along = execute(connection, on_delete, root=root_id).scalar() == RETRACT
    if not takes_along and not visibility.has_origins(connection, places):
        return Gone(marked)
    return Gone(marked, visibility.refresh(connection, Scope(places)))


def count_gone(connection: Connection, root: str) -> int:
    """How many deleted files the source root of this name has."""
    query = f"SELECT count(*) {_OF_ROOT} AND l.gone_at IS NOT NULL AND l.problem <> :passed_over"
    found: int = execute(connection, query, root=root, passed_over=PASSED_OVER).scalar_one()
    return found


_OF_ROOT = """
FROM cf_source_root r JOIN cf_file_location l ON l.source_root_id = r.id WHERE r.name = :root
"""


def decide_gone(connection: Connection, root: str) -> Change:
    """Decide anew what readers see of the deleted files of the source root of this name."""
    gone = returned_ids(connection, f"SELECT l.id {_OF_ROOT} AND l.gone_at IS NOT NULL", root=root)
    return visibility.refresh(connection, Scope(gone))


def count_passed_over(connection: Connection, root: str) -> int:
    """How many recorded locations of the source root of this name scans now pass over."""
    query = f"SELECT count(*) {_OF_ROOT} AND l.problem = :passed_over"
    found: int = execute(connection, query, root=root, passed_over=PASSED_OVER).scalar_one()
    return found


# Source roots, and what the last scan of each found.


def active_roots(connection: Connection) -> Sequence[Any]:
    """The row of every active source root."""
    return connection.execute("SELECT * FROM cf_source_root WHERE active ORDER BY id").all()


def active_paths(connection: Connection) -> list[str]:
    """The directory of every active source root."""
    return list(connection.execute("SELECT path FROM cf_source_root WHERE active").scalars())


def scan_state(connection: Connection, root_id: int) -> Any:
    """The root's row of cf_scan_state; None before its first scan."""
    query = "SELECT * FROM cf_scan_state WHERE source_root_id = :root"
    return execute(connection, query, root=root_id).first()


def save_scan_state(connection: Connection, root_id: int, **values: Any) -> None:
    """Change columns of the root's row of cf_scan_state, creating it."""
    fresh = {
        "started": 0.0, "finished": 0.0, "files": 0, "unreadable": 0, "unsettled": 0,
        "problem": "", "routed": "", **values,
    }  # fmt: skip
    changes = ", ".join(f"{name} = excluded.{name}" for name in values)
    execute(
        connection,
        f"INSERT INTO cf_scan_state (source_root_id, {', '.join(fresh)}) "  # noqa: S608  our names
        f"VALUES (:root, :{', :'.join(fresh)}) "
        f"ON CONFLICT (source_root_id) DO UPDATE SET {changes}",
        root=root_id,
        **fresh,
    )


def count_up(connection: Connection, root_id: int, **counts: int) -> None:
    """Add to counters of the root's ScanState: `missed`, `hidden`."""
    changes = ", ".join(f"{name} = {name} + :{name}" for name in counts)
    statement = f"UPDATE cf_scan_state SET {changes} WHERE source_root_id = :root"  # noqa: S608
    execute(connection, statement, root=root_id, **counts)


def newest(connection: Connection) -> int:
    """The id of the newest version; 0 where there is none."""
    query = "SELECT coalesce(max(id), 0) FROM cf_file_version"
    return int(connection.execute(query).scalar_one())


def found_since(connection: Connection, root_id: int, after: int, since: float) -> list[bytes]:
    """The paths of newer versions than `after`, of files that changed since this time."""
    query = (
        "SELECT l.path FROM cf_file_version v JOIN cf_file_location l ON l.id = v.location_id "
        "WHERE v.id > :after AND l.source_root_id = :root AND l.ctime_ns > :since"
    )
    values = {"after": after, "root": root_id, "since": int(since * 1e9)}
    return list(connection.execute(query, values).scalars())


# Having the next scan read a file again, whose bytes were not those of its version.


def invalidate(connection: Connection, job_id: int) -> None:
    """Have the next scan read a job's file again: its bytes were not those of its version.

    If they are again by then, the scan finds no new version, and revives the job.
    """
    statement = """
        UPDATE cf_file_location SET device = NULL, inode = NULL WHERE id = (
            SELECT v.location_id FROM cf_file_version v
            JOIN cf_processing_queue j ON j.file_version_id = v.id WHERE j.id = :job)
        RETURNING directory_id
        """
    for folder in returned_ids(connection, statement, job=job_id):
        execute(
            connection, "UPDATE cf_directory SET digest = randomblob(8) WHERE id = :id", id=folder
        )


# Unsettled files: each scan so far found them being written, so their content has no version.


UNSETTLED_KEPT = 1000
"""Of one source root, at most: of many that have just been copied there, most settle soon."""


def known_unsettled(connection: Connection, root_id: int) -> dict[bytes, float]:
    """The unsettled files of a source root -> when first found so, seconds since the epoch."""
    query = "SELECT path, first_seen FROM cf_unsettled WHERE source_root_id = :root"
    return {row.path: row.first_seen for row in execute(connection, query, root=root_id)}


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
    query = f"SELECT r.name, u.path, u.first_seen {_UNSETTLED} ORDER BY 3, 2 LIMIT :n"
    rows = execute(connection, query, n=limit)
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
    found: int = connection.execute(f"SELECT count(*) {_UNSETTLED}").scalar_one()
    return found


_UNSETTLED = """
FROM cf_unsettled u JOIN cf_source_root r ON r.id = u.source_root_id WHERE r.active
"""


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
    query = """
        SELECT l.id, l.path, l.device, l.inode, l.size_bytes, l.mtime_ns, l.ctime_ns,
               v.id, v.content_hash, k.id IS NOT NULL OR e.evicted_at IS NOT NULL
        FROM cf_file_location l JOIN cf_file_version v ON v.id = l.current_version_id
        LEFT JOIN cf_kept_content k ON k.content_hash = v.content_hash
        LEFT JOIN cf_evicted_content e ON e.content_hash = v.content_hash
        WHERE l.source_root_id = :root_id AND l.id > :after AND l.gone_at IS NULL
          AND l.inode IS NOT NULL AND NOT l.racy
        ORDER BY l.id LIMIT :batch
        """
    rows = execute(connection, query, root_id=root_id, after=after, batch=BATCH)
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
