"""Moves: a file that was renamed or moved takes its rows with it, also between source roots.

L2 is where L1 went when L1 is gone, L2's content is L1's last, and the two share the inode or the
modification time, to what the filesystem kept of it. `cf_gone_version` has a row for the last
version of each location that is gone, and what that file is now, once it is found.

    note, gone       which of these rows the next settlement looks at, by what a scan recorded
    find, record     look for where those files are now, and write it down
    follow           both at once, for what a scan has found under another name
    Moves            what the rows mean for readers, as `db.visibility` asks

The moved version shows until it is published at its new place: by the plugin itself, or, if that
does not want the file there, by all who do.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple, cast

from casparian_flow.crashpoints import crashpoint
from casparian_flow.db.states import PASSED_OVER, TAKEN, utcnow

Query = Callable[[str, tuple[Any, ...]], Sequence[Any]]
"""Runs one driver-level statement; its rows. What writes has to return some."""

_PASSED_OVER = PASSED_OVER.replace("'", "''")


# Finding where files went.


def note(query: Query, hashes: Collection[str], back: Collection[int]) -> None:
    """Note what a scan recorded, in its transaction.

    Args:
        hashes: contents that locations have by it, or had before it: a gone file with one of them
            is looked for again.
        back: versions that are in their locations again.
    """
    if not query("SELECT 1 FROM cf_gone_version LIMIT 1", ()):
        return
    query(
        """
        DELETE FROM cf_gone_version
        WHERE file_version_id IN (SELECT value FROM json_each(?)) RETURNING 1
        """,
        (json.dumps(list(back)),),
    )
    _look_for(query, hashes)


def _look_for(query: Query, hashes: Collection[str]) -> None:
    query(
        """
        UPDATE cf_gone_version SET due = 1 WHERE to_version_id IS NULL AND NOT due
        AND content_hash IN (SELECT value FROM json_each(?)) RETURNING 1
        """,
        (json.dumps(list(hashes)),),
    )


def gone(query: Query, location_ids: Collection[int]) -> None:
    """Note that the files of these locations are gone, or passed over, where they are marked so."""
    these = (json.dumps(list(location_ids)),)
    query(
        f"""
        INSERT INTO cf_gone_version (file_version_id, content_hash)
        SELECT v.id, v.content_hash FROM json_each(?) m CROSS JOIN cf_file_location l
        ON l.id = m.value AND l.gone_at IS NOT NULL AND l.problem <> '{_PASSED_OVER}'
        JOIN cf_file_version v ON v.id = l.current_version_id AND v.size_bytes > 0
        WHERE true ON CONFLICT (file_version_id) DO NOTHING RETURNING 1
        """,  # noqa: S608
        these,
    )
    # One candidate less may be what another gone file lacked.
    hashes = query(
        """
        SELECT DISTINCT v.content_hash FROM json_each(?) m
        CROSS JOIN cf_file_location l ON l.id = m.value
        JOIN cf_file_version v ON v.id = l.current_version_id
        """,
        these,
    )
    _look_for(query, [row[0] for row in hashes])


def leave(query: Query, left: Collection[tuple[int, int | None, int | None]]) -> None:
    """Mark locations as gone whose files are elsewhere, unless another scan has found them since.

    Args:
        left: id, inode and ctime of each.
    """
    query(
        """
        UPDATE cf_file_location AS l SET gone_at = ? FROM json_each(?) m
        WHERE l.id = json_extract(m.value, '$[0]') AND l.gone_at IS NULL
        AND (l.inode IS json_extract(m.value, '$[1]') OR l.inode IS NULL)
        AND l.ctime_ns IS json_extract(m.value, '$[2]') RETURNING 1
        """,
        (utcnow().isoformat(" "), json.dumps(list(left))),
    )
    gone(query, [each[0] for each in left])


def is_due(query: Query) -> bool:
    """Whether a scan that has found nothing missing has to look for gone files all the same."""
    return bool(query("SELECT 1 FROM cf_gone_version WHERE due LIMIT 1", ()))


def on_the_way(
    query: Query, missing: Collection[int], unsettled: Collection[tuple[int, ...]]
) -> set[int]:
    """Missing files that are elsewhere already, and not settled there.

    Args:
        unsettled: device, inode, size and mtime of each file that a scan left for later.
    """
    if not unsettled:
        return set()
    rows = query(
        """
        SELECT l.id, l.device, l.inode, l.size_bytes, l.mtime_ns
        FROM json_each(?) m CROSS JOIN cf_file_location l ON l.id = m.value
        """,
        (json.dumps(list(missing)),),
    )
    return {row[0] for row in rows if tuple(row[1:]) in unsettled}


class _File(NamedTuple):
    """What a location has, or had when its file went."""

    location_id: int
    version_id: int
    content_hash: str
    path: bytes
    device: int | None
    inode: int | None
    mtime_ns: int | None
    ctime_ns: int | None
    root: str

    @property
    def name(self) -> bytes:
        return self.path.rpartition(b"/")[2]

    @property
    def whole_path(self) -> bytes:
        return os.path.join(os.fsencode(self.root), self.path)


class Move(NamedTuple):
    """A gone file, and where it is now."""

    location_id: int
    version_id: int
    to_location_id: int
    to_version_id: int


CHUNK = 2_000
"""Gone files that are looked for at once; all of one content together."""

_GONE = f"""
WITH missing AS MATERIALIZED (
    SELECT l.current_version_id AS id FROM json_each(?) m
    CROSS JOIN cf_file_location l ON l.id = m.value
), hashes AS MATERIALIZED (
    SELECT content_hash FROM cf_gone_version WHERE due AND to_version_id IS NULL
    UNION SELECT v.content_hash FROM missing JOIN cf_file_version v ON v.id = missing.id
), every AS (
    SELECT id FROM missing
    UNION SELECT g.file_version_id FROM hashes CROSS JOIN cf_gone_version g
    ON g.content_hash = hashes.content_hash AND g.to_version_id IS NULL
    JOIN cf_file_version v ON v.id = g.file_version_id
    JOIN cf_file_location l ON l.current_version_id = v.id AND l.id = v.location_id
    WHERE l.gone_at IS NOT NULL AND l.problem <> '{_PASSED_OVER}'
)
SELECT l.id, v.id, v.content_hash, l.path, l.device, l.inode, l.mtime_ns, l.ctime_ns, r.path
FROM every CROSS JOIN cf_file_version v ON v.id = every.id
CROSS JOIN cf_file_location l ON l.id = v.location_id
JOIN cf_source_root r ON r.id = l.source_root_id
WHERE v.size_bytes > 0 ORDER BY v.content_hash, l.id
"""  # noqa: S608

# What is to be read again may have another content by now: it is looked at when that is recorded.
_PRESENT = """
WITH alike AS (
    SELECT l.id FROM json_each(?) k CROSS JOIN cf_file_location l ON l.inode = k.value
    UNION SELECT l.id FROM json_each(?) k CROSS JOIN cf_file_location l ON l.mtime_ns = k.value
)
SELECT l.id, v.id, v.content_hash, l.path, l.device, l.inode, l.mtime_ns, l.ctime_ns, r.path
FROM alike CROSS JOIN cf_file_location l ON l.id = alike.id
JOIN cf_file_version v ON v.id = l.current_version_id
JOIN cf_source_root r ON r.id = l.source_root_id AND r.active
WHERE l.gone_at IS NULL AND l.inode IS NOT NULL
"""


Born = Callable[[bytes], int | None]
"""When the file at a path was made, in nanoseconds since the epoch; None where that is unknown."""


def find(query: Query, missing: Collection[int], born: Born) -> list[Move]:
    """Where gone files are now, of those that are due.

    Args:
        missing: locations whose files a scan did not find. They may yet turn out to be held.
        born: asked of files that have the inode of a gone one, and not its time.
    """
    lost = set(missing)
    files = (_File(*row) for row in query(_GONE, (json.dumps(list(lost)),)))
    return [
        move
        for chunk in _chunks(files)
        for move in _pairs(chunk, list(_proven(chunk, _candidates(query, chunk, lost), born)))
    ]


def _chunks(files: Iterable[_File]) -> Iterator[list[_File]]:
    """Parts of files that are ordered by content; none has a content in two parts."""
    chunk: list[_File] = []
    for _, same in groupby(files, key=lambda file: file.content_hash):
        chunk += same
        if len(chunk) >= CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _candidates(query: Query, chunk: Sequence[_File], lost: Collection[int]) -> list[_File]:
    keys = [key for file in chunk for key in _kept_of(file)]
    inodes = {key[2] for key in keys if key[0] == _INODE}
    times = {key[2] for key in keys if key[0] == _TIME}
    hashes = {file.content_hash for file in chunk}
    rows = query(_PRESENT, (json.dumps(list(inodes)), json.dumps(list(times))))
    found = (_File(*row) for row in rows)
    return [f for f in found if f.content_hash in hashes and f.location_id not in lost]


def _proven(olds: Sequence[_File], news: Sequence[_File], born: Born) -> Iterator[_File]:
    """The candidates, without an inode where that proves nothing: filesystems give the inode of a
    deleted file to the next one. A file that is older than the gone one was at its last change has
    not got it so."""
    seen: dict[tuple[Any, ...], int] = {}
    times = {(old.content_hash, key) for old in olds for key in _kept_of(old) if key[0] == _TIME}
    for old in olds:
        key = (old.content_hash, old.device, old.inode)
        seen[key] = min(old.ctime_ns or 0, seen.get(key, old.ctime_ns or 0))
    for new in news:
        last = seen.get((new.content_hash, new.device, new.inode))
        is_proven = last is None or (new.content_hash, (_TIME, None, new.mtime_ns)) in times
        if not is_proven:
            made = born(new.whole_path)
            is_proven = made is not None and made <= cast(int, last)
        yield new if is_proven else new._replace(inode=None)


_Key = tuple[str, int | None, int]

_INODE, _TIME = "inode", "time"

GRAINS = (1, 100, 1_000, 1_000_000, 1_000_000_000, 2_000_000_000)
"""Nanoseconds to which filesystems and archives keep a modification time; they cut off the rest."""


def _kept_of(file: _File) -> set[_Key]:
    """What may be left of a gone file's inode and time at its new place."""
    keys = _keys(file)
    if file.mtime_ns is not None:
        keys |= {(_TIME, None, file.mtime_ns // grain * grain) for grain in GRAINS}
    return keys


def _keys(file: _File) -> set[_Key]:
    keys: set[_Key] = set()
    if file.inode is not None:
        keys.add((_INODE, file.device, file.inode))
    if file.mtime_ns is not None:
        keys.add((_TIME, None, file.mtime_ns))
    return keys


class _Index:
    """Files of one side by content, and inode or time, also with their name."""

    def __init__(self, files: Iterable[_File], keys: Callable[[_File], set[_Key]]) -> None:
        self._by: dict[tuple[Any, ...], list[_File]] = defaultdict(list)
        for file in files:
            for key in keys(file):
                self._by[file.content_hash, key].append(file)
                self._by[file.content_hash, key, file.name].append(file)

    def like(self, file: _File, keys: set[_Key], *name: bytes) -> list[_File]:
        """Files that share the content and a key, and the name if one is given; at most two."""
        found: dict[int, _File] = {}
        for key in keys:
            for other in self._by.get((file.content_hash, key, *name), ()):
                found[other.location_id] = other
                if len(found) > 1:
                    return list(found.values())
        return list(found.values())


def _pairs(olds: Sequence[_File], news: Sequence[_File]) -> Iterator[Move]:
    """Pair gone files with present ones: those that are the only ones for each other; of several
    those of one name, if it is the only pair of that name."""
    of_new, of_old = _Index(news, _keys), _Index(olds, _kept_of)
    for old in olds if news else ():
        for name in ((), (old.name,)):
            ahead = of_new.like(old, _kept_of(old), *name)
            if len(ahead) == 1 and len(of_old.like(ahead[0], _keys(ahead[0]), *name)) == 1:
                new = ahead[0]
                yield Move(old.location_id, old.version_id, new.location_id, new.version_id)
                break


class Recorded(NamedTuple):
    """What `record` wrote."""

    moved: int = 0
    """Files."""
    retracted: int = 0
    """Versions that are retracted since their file was, where it was before."""
    places: tuple[int, ...] = ()
    """Locations of which readers may see something else by it."""


def record(query: Query, found: Sequence[Move]) -> Recorded:
    """Write down what `find` gave, for files that are marked gone by now; a retraction goes with
    its file."""
    if not found:
        return Recorded()
    now = utcnow().isoformat(" ")
    moves = json.dumps([(move.version_id, move.to_version_id) for move in found])
    moved = query(
        """
        UPDATE cf_gone_version
        SET to_version_id = json_extract(m.value, '$[1]'), found_at = ?, due = 0
        FROM json_each(?) m WHERE file_version_id = json_extract(m.value, '$[0]')
        AND to_version_id IS NULL RETURNING 1
        """,
        (now, moves),
    )
    retracted = query(
        """
        INSERT INTO cf_retracted_version (file_version_id, retracted_at)
        SELECT g.to_version_id, ? FROM json_each(?) m
        CROSS JOIN cf_gone_version g ON g.file_version_id = json_extract(m.value, '$[0]')
        AND g.to_version_id = json_extract(m.value, '$[1]')
        JOIN cf_retracted_version t ON t.file_version_id = g.file_version_id
        WHERE true ON CONFLICT DO NOTHING RETURNING 1
        """,
        (now, moves),
    )
    crashpoint("moves.written")
    places = {place for move in found for place in (move.location_id, move.to_location_id)}
    return Recorded(len(moved), len(retracted), tuple(places))


def looked_for(query: Query) -> None:
    """Note that what was due was looked for."""
    query("UPDATE cf_gone_version SET due = 0 WHERE due RETURNING 1", ())


def follow(
    query: Query, inodes: Collection[int], is_there: Callable[[bytes], bool], born: Born
) -> Recorded:
    """Find and record the moves of files that a scan has recorded just now, in its transaction: no
    job of theirs is to publish while their old places still count.

    It takes a file for moved whose inode says so, and which is not at its old place any more. What
    was copied and deleted, or could be any of several, the end of the scan decides.

    Args:
        inodes: of what the scan has recorded.
        is_there: whether there is a file at a path.
        born: as for `find`.
    """
    linked = [row[0] for row in query(_LINKED, (json.dumps(list(inodes)),))]
    if not linked:
        return Recorded()
    alike = [_File(*row) for row in query(_PRESENT, (json.dumps(linked), "[]"))]
    here = {file.location_id for file in alike if is_there(file.whole_path)}
    known = {(f.content_hash, f.device, f.inode) for f in alike if f.location_id in here}
    left = [
        f
        for f in alike
        if f.location_id not in here and (f.content_hash, f.device, f.inode) in known
    ]
    if not left:
        return Recorded()
    # What has gone too, and is like one of them, counts when they are paired.
    hashes = {file.content_hash for file in left}
    times = json.dumps(list({file.mtime_ns for file in left}))
    rivals = [_File(*row) for row in query(_PRESENT, ("[]", times))]
    left += [f for f in rivals if f.content_hash in hashes and not is_there(f.whole_path)]
    at = {file.location_id: (file.device, file.inode) for file in (*alike, *left)}
    found = [
        move
        for move in find(query, {file.location_id for file in left}, born)
        if move.location_id in at and at[move.location_id] == at.get(move.to_location_id)
    ]
    at_last = {file.location_id: (file.location_id, file.inode, file.ctime_ns) for file in left}
    leave(query, [at_last[move.location_id] for move in found])
    # Should one come back there before that directory is looked at, this is to be noticed.
    query(
        """
        UPDATE cf_directory SET digest = randomblob(8) WHERE id IN (
            SELECT directory_id FROM cf_file_location
            WHERE id IN (SELECT value FROM json_each(?))) RETURNING 1
        """,
        (json.dumps([move.location_id for move in found]),),
    )
    return record(query, found)


_LINKED = """
SELECT DISTINCT k.value FROM json_each(?) k
WHERE (SELECT count(*) FROM cf_file_location l
       WHERE l.inode = k.value AND l.gone_at IS NULL) > 1
"""


def same_file(query: Query, version_ids: Collection[int]) -> list[int]:
    """These versions, and those that their files were before they moved, and are since."""
    rows = query(
        """
        WITH RECURSIVE same(id) AS (
            SELECT value FROM json_each(?)
            UNION SELECT g.to_version_id FROM same CROSS JOIN cf_gone_version g
            ON g.file_version_id = same.id AND g.to_version_id IS NOT NULL
            UNION SELECT g.file_version_id FROM same CROSS JOIN cf_gone_version g
            ON g.to_version_id = same.id)
        SELECT id FROM same ORDER BY id
        """,
        (json.dumps(list(version_ids)),),
    )
    return [row[0] for row in rows]


# What moves mean for readers.


def with_origins(query: Query, locations: Collection[int]) -> list[int]:
    """Locations, and those whose files moved to them, at once or step by step."""
    rows = query(
        """
        WITH RECURSIVE place(id) AS (
            SELECT value FROM json_each(?)
            UNION SELECT v.location_id FROM place
            CROSS JOIN cf_file_version t ON t.location_id = place.id
            CROSS JOIN cf_gone_version g ON g.to_version_id = t.id
            CROSS JOIN cf_file_version v ON v.id = g.file_version_id)
        SELECT id FROM place
        """,
        (json.dumps(list(locations)),),
    )
    return [row[0] for row in rows]


class _Link(NamedTuple):
    """A move, with what the ledger has of both places now."""

    version_id: int
    location_id: int
    is_last: bool
    """Whether it is the last version of its location."""
    to_location_id: int
    to_ordinal: int
    is_there: bool
    """Whether its new place still has a file."""


_LINKS = f"""
WITH RECURSIVE moved(id) AS (
    {{first}}
    UNION SELECT l.current_version_id FROM moved
    CROSS JOIN cf_gone_version g ON g.file_version_id = moved.id
    CROSS JOIN cf_file_version t ON t.id = g.to_version_id
    CROSS JOIN cf_file_location l ON l.id = t.location_id
    JOIN cf_gone_version n ON n.file_version_id = l.current_version_id
    AND n.to_version_id IS NOT NULL)
SELECT v.id, v.location_id, v.id = o.current_version_id, l.id, t.ordinal,
       l.gone_at IS NULL OR l.problem = '{_PASSED_OVER}'
FROM moved CROSS JOIN cf_gone_version g ON g.file_version_id = moved.id
CROSS JOIN cf_file_version v ON v.id = moved.id
CROSS JOIN cf_file_location o ON o.id = v.location_id
CROSS JOIN cf_file_version t ON t.id = g.to_version_id
CROSS JOIN cf_file_location l ON l.id = t.location_id
"""  # noqa: S608

_EVERY = "SELECT file_version_id FROM cf_gone_version WHERE to_version_id IS NOT NULL"

_OF_PLACES = """
SELECT v.id FROM json_each(?) k CROSS JOIN cf_file_version v ON v.location_id = k.value
CROSS JOIN cf_gone_version g ON g.file_version_id = v.id AND g.to_version_id IS NOT NULL
"""

# A job that works a version again has published before: that counts until it has ended.
_WORK = f"""
SELECT v.location_id, v.ordinal, j.plugin_name, j.status = 'COMPLETED' OR EXISTS (
    SELECT 1 FROM cf_output o WHERE o.job_id = j.id AND o.state = 'PUBLISHED'
    AND NOT EXISTS (SELECT 1 FROM cf_rebuild_job m JOIN cf_rebuild b ON b.id = m.rebuild_id
                    WHERE m.job_id = o.job_id AND m.generation = o.generation
                    AND b.outcome <> 'done'))
FROM json_each(?) k CROSS JOIN cf_file_version v ON v.location_id = k.value
CROSS JOIN cf_processing_queue j ON j.file_version_id = v.id
WHERE NOT (j.status = 'ABORTED' AND j.reason GLOB '{TAKEN}*')
"""  # noqa: S608


class Moves:
    """The moves from some locations, and how far the work at their new places is.

    Args:
        locations: None for all.
    """

    def __init__(self, query: Query, locations: Collection[int] | None = None) -> None:
        if locations is None:
            rows = query(_LINKS.format(first=_EVERY), ())
        else:
            rows = query(_LINKS.format(first=_OF_PLACES), (json.dumps(list(locations)),))
        links = [_Link(*row) for row in rows]
        self._links = {link.version_id: link for link in links}
        self._left = {link.location_id: link for link in links if link.is_last}
        self._origins: dict[int, set[int]] = defaultdict(set)
        for link in links:
            self._origins[link.to_location_id].add(link.location_id)
        self._work: dict[int, list[tuple[int, str, bool]]] = defaultdict(list)
        for place, *work in query(_WORK, (json.dumps(list(self._origins)),)) if links else ():
            self._work[place].append((work[0], work[1], bool(work[2])))

    def has_moved(self, version_id: int, plugin: str) -> bool:
        """Whether what a plugin gave for a version shows at the new place of its file."""
        return self._is_published(self._links.get(version_id), plugin)

    def has_left(self, location_id: int, plugin: str) -> bool:
        """Whether nothing that a plugin gave is current in a location: its file has moved."""
        return self._is_published(self._left.get(location_id), plugin)

    def is_deleted(self, location_id: int) -> bool:
        """Whether the file of a gone location is nowhere."""
        link = self._left.get(location_id)
        return link is None or (not link.is_there and self.is_deleted(link.to_location_id))

    def _is_published(self, link: _Link | None, plugin: str) -> bool:
        """It may have moved on before it was published where it moved first."""
        while link is not None:
            work = [each for each in self._work[link.to_location_id] if each[0] >= link.to_ordinal]
            work = [each for each in work if each[1] == plugin] or work
            if work and {each[1] for each in work} == {each[1] for each in work if each[2]}:
                return True
            link = self._left.get(link.to_location_id)
        return False

    def publish(self, location_id: int, ordinal: int, plugin: str) -> None:
        """Count a version as published by a plugin."""
        self._work[location_id].append((ordinal, plugin, True))

    def origins(self, location_id: int) -> set[int]:
        """The locations from which files came to this one, at once or step by step."""
        places, new = set[int](), {location_id}
        while new := {one for place in new for one in self._origins.get(place, ())} - places:
            places |= new
        return places


# What must hold of the record.


def broken(query: Query) -> Iterator[str]:
    """A sentence for each recorded move that cannot be one."""
    for here, ordinal, there, to_ordinal in query(_IMPOSSIBLE, ()):
        yield (
            f"{here} version {ordinal} is recorded as moved to {there} version {to_ordinal}, which "
            "has another content or is the same file"
        )


_IMPOSSIBLE = """
SELECT r.name || '/' || l.rel_path, v.ordinal, q.name || '/' || m.rel_path, t.ordinal
FROM cf_gone_version g JOIN cf_file_version v ON v.id = g.file_version_id
JOIN cf_file_location l ON l.id = v.location_id JOIN cf_source_root r ON r.id = l.source_root_id
JOIN cf_file_version t ON t.id = g.to_version_id
JOIN cf_file_location m ON m.id = t.location_id JOIN cf_source_root q ON q.id = m.source_root_id
WHERE v.content_hash <> t.content_hash OR v.size_bytes = 0 OR v.location_id = t.location_id
   OR g.content_hash <> v.content_hash
ORDER BY l.id
"""
