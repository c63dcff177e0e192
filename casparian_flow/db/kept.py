"""Which contents the store has, and which it may evict.

A row of `cf_kept_content` says that the store has a content's bytes, durably. It is written in the
transaction that records the versions, after the bytes, and deleted in a transaction before them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from casparian_flow.db.access import Connection, execute, execute_many
from casparian_flow.db.jobs import UNFINISHED
from casparian_flow.db.states import utcnow

_UNFINISHED = ", ".join(f"'{status}'" for status in UNFINISHED)

_NEEDED = f"""
    SELECT v.content_hash FROM cf_processing_queue j
    JOIN cf_file_version v ON v.id = j.file_version_id
    WHERE j.status IN ({_UNFINISHED})
"""  # noqa: S608
"""Contents that an unfinished job may still have to read."""

_CURRENT = """
    SELECT v.content_hash FROM cf_file_location l
    JOIN cf_file_version v ON v.id = l.current_version_id
    WHERE l.gone_at IS NULL
"""
"""Contents that a file has now."""


HAS_BYTES = """
((v.id = l.current_version_id AND l.gone_at IS NULL)
 OR EXISTS (SELECT 1 FROM cf_kept_content k WHERE k.content_hash = v.content_hash))
"""
"""Whether the bytes of the version `v` of the location `l` are in the store or in its file, as far
as the ledger knows."""


class Content(NamedTuple):
    """A content that is in the store, durable."""

    id: int
    content_hash: str
    size_bytes: int
    in_file: bool


class State(NamedTuple):
    """What the store holds in all."""

    contents: int
    bytes: int
    fault: str
    """Why the last contents were not taken; empty where they were."""
    missed: int
    """Contents recorded without their bytes since then."""
    since: str


class Coverage(NamedTuple):
    """How many versions there are, and how many of them have their bytes in the store."""

    versions: int
    kept: int
    evicted: int


def known(connection: Connection, hashes: Iterable[str]) -> set[str]:
    """Those of these contents that the store has."""
    query = f"SELECT content_hash FROM cf_kept_content WHERE content_hash IN {_LISTED}"  # noqa: S608
    return set(execute(connection, query, listed=list(hashes)).scalars())


_LISTED = "(SELECT value FROM json_each(:listed))"


def find(connection: Connection, content_hash: str) -> Content | None:
    """A content, if the store has it."""
    query = f"{_COLUMNS} WHERE content_hash = :content_hash"
    row = execute(connection, query, content_hash=content_hash).first()
    return Content._make(row) if row else None


_COLUMNS = "SELECT id, content_hash, size_bytes, in_file FROM cf_kept_content"


def after(connection: Connection, number: int, limit: int) -> list[Content]:
    """The next contents by their numbers."""
    query = f"{_COLUMNS} WHERE id > :number ORDER BY id LIMIT :limit"
    return [Content._make(row) for row in execute(connection, query, number=number, limit=limit)]


def numbers(connection: Connection, wanted: Iterable[int]) -> set[int]:
    """Those of these numbers that a content has."""
    query = f"SELECT id FROM cf_kept_content WHERE id IN {_LISTED}"  # noqa: S608
    return set(execute(connection, query, listed=list(wanted)).scalars())


def last_number(connection: Connection) -> int:
    """The highest number that a content has ever had."""
    query = "SELECT seq FROM sqlite_sequence WHERE name = 'cf_kept_content'"
    return connection.execute(query).scalar() or 0


def add(connection: Connection, contents: Sequence[Content]) -> None:
    """Record that the store has these contents."""
    now = utcnow().isoformat(" ")
    added = execute_many(
        connection,
        "INSERT INTO cf_kept_content (id, content_hash, size_bytes, in_file, kept_at) "
        "VALUES (?, ?, ?, ?, ?) ON CONFLICT (content_hash) DO NOTHING",
        [(*content, now) for content in contents],
    )
    if contents:
        hashes = [content.content_hash for content in contents]
        query = f"DELETE FROM cf_evicted_content WHERE content_hash IN {_LISTED}"  # noqa: S608
        execute(connection, query, listed=hashes)
    _count(connection, added, sum(content.size_bytes for content in contents))


def _count(connection: Connection, contents: int, size: int) -> None:
    query = "UPDATE cf_store SET contents = contents + :contents, bytes = max(0, bytes + :size)"
    execute(connection, query, contents=contents, size=size)


def evictable(connection: Connection, excess: int, outdated: Iterable[str] = ()) -> array[int]:
    """Numbers of contents to evict, so that `excess` bytes become free, or as many as may.

    Contents that are no file's current one come first, then the others, the oldest first. Those
    that an unfinished job needs are never among them.

    Args:
        outdated: current contents of files for which other ones are about to be recorded.
    """
    query = f"""
        SELECT id, size_bytes FROM cf_kept_content WHERE content_hash NOT IN ({_NEEDED})
        ORDER BY content_hash IN ({_CURRENT}) AND content_hash NOT IN {_LISTED}, id
        """  # noqa: S608
    chosen = array("q")
    rows = execute(connection, query, listed=list(outdated))
    for row in rows:
        if excess <= 0:
            break
        chosen.append(row.id)
        excess -= row.size_bytes
    rows.close()
    return chosen


def evict(connection: Connection, numbers: Sequence[int]) -> list[Content]:
    """Record that the store gives up these contents, but for those that a job needs by now.

    Returns:
        The contents that it gives up: their bytes are deleted once the transaction is durable.
    """
    query = f"{_COLUMNS} WHERE id IN {_LISTED} AND content_hash NOT IN ({_NEEDED})"
    contents = [Content._make(row) for row in execute(connection, query, listed=list(numbers))]
    now = utcnow().isoformat(" ")
    execute_many(
        connection,
        "INSERT INTO cf_evicted_content (content_hash, evicted_at) VALUES (?, ?) "
        "ON CONFLICT (content_hash) DO UPDATE SET evicted_at = excluded.evicted_at",
        [(content.content_hash, now) for content in contents],
    )
    forget(connection, contents)
    return contents


def forget(connection: Connection, contents: Sequence[Content]) -> None:
    """Record that the store does not have these contents any more."""
    deleted = execute_many(
        connection,
        "DELETE FROM cf_kept_content WHERE id = ?",
        [(content.id,) for content in contents],
    )
    _count(connection, -deleted, -sum(content.size_bytes for content in contents))


def is_kept(connection: Connection, content: Content) -> bool:
    """Whether the store still has a content, by the ledger."""
    return content == find(connection, content.content_hash)


def is_evicted(connection: Connection, content_hash: str) -> bool:
    """Whether the store had a content and gave it up."""
    query = "SELECT 1 FROM cf_evicted_content WHERE content_hash = :content_hash"
    return execute(connection, query, content_hash=content_hash).first() is not None


def set_fault(connection: Connection, words: str, missed: int) -> None:
    """Save why contents were not taken; empty words where the store takes contents again."""
    execute(
        connection,
        """
        UPDATE cf_store SET fault = :words,
            missed = CASE WHEN :missed THEN missed + :missed ELSE 0 END,
            since = CASE WHEN fault = '' OR :missed = 0 THEN :now ELSE since END
        WHERE fault <> '' OR :missed
        """,
        words=words, missed=missed, now=utcnow().isoformat(" "),
    )  # fmt: skip


def state(connection: Connection) -> State:
    """What the store holds, and why it does not take contents."""
    query = "SELECT contents, bytes, fault, missed, since FROM cf_store"
    return State._make(connection.execute(query).one())


def coverage(connection: Connection) -> Coverage:
    """How many versions have their bytes in the store."""
    query = """
        SELECT count(*), count(k.id), count(e.content_hash) FROM cf_file_version v
        LEFT JOIN cf_kept_content k ON k.content_hash = v.content_hash
        LEFT JOIN cf_evicted_content e ON e.content_hash = v.content_hash
        """
    return Coverage._make(connection.execute(query).one())


def unprotected(connection: Connection) -> int:
    """Unfinished jobs that read the file itself, since the store does not have its bytes."""
    query = f"""
        SELECT count(*) FROM ({_NEEDED}) needed
        WHERE content_hash NOT IN (SELECT content_hash FROM cf_kept_content)
        """  # noqa: S608
    found: int = connection.execute(query).scalar_one()
    return found


def versions(connection: Connection, root_id: int, path: bytes, rel_path: str) -> Sequence[Any]:
    """The versions of a location with their contents, in order.

    Args:
        path: its relative path, as bytes.
        rel_path: the path as it is displayed, for names that are not UTF-8.
    """
    query = """
        SELECT r.name AS source, r.path AS root_path, l.id AS location_id, l.path, l.rel_path,
               v.id AS version_id, v.ordinal, v.content_hash, v.size_bytes,
               v.id = l.current_version_id AS current, k.id AS kept_id, k.in_file AS kept_in_file
        FROM cf_file_location l
        JOIN cf_source_root r ON r.id = l.source_root_id
        JOIN cf_file_version v ON v.location_id = l.id
        LEFT JOIN cf_kept_content k ON k.content_hash = v.content_hash
        WHERE l.source_root_id = :root_id AND (l.path = :path OR l.rel_path = :rel_path)
        ORDER BY l.id, v.ordinal
        """
    values = {"root_id": root_id, "path": path, "rel_path": rel_path}
    return connection.execute(query, values).all()


def version_with(connection: Connection, content_hash: str) -> str:
    """A version that has this content, as people name it; empty where there is none."""
    query = """
        SELECT CAST('version ' || v.ordinal || ' of ' || r.name || '/' || l.rel_path AS BLOB)
        FROM cf_file_version v JOIN cf_file_location l ON l.id = v.location_id
        JOIN cf_source_root r ON r.id = l.source_root_id
        WHERE v.content_hash = :content_hash ORDER BY v.id DESC LIMIT 1
        """
    found: bytes = execute(connection, query, content_hash=content_hash).scalar() or b""
    return found.decode("utf-8", "backslashreplace")  # `verify` reads what others have written too
