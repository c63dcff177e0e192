"""Which contents the snapshot store has, and which it may evict.

A row is a reference: it says that the bytes are in the store, durable. It is written in the
transaction that records the versions, after the bytes, and deleted in a transaction before them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, func, select, text

from casparian_flow.db.access import execute_many
from casparian_flow.db.jobs import UNFINISHED
from casparian_flow.db.models import FileVersion, ProcessingJob, Snapshot, utcnow

CHUNK = 1_000
"""References deleted by one statement."""

_NEEDED = (
    select(FileVersion.content_hash)
    .join(ProcessingJob, ProcessingJob.file_version_id == FileVersion.id)
    .where(ProcessingJob.status.in_(UNFINISHED))
)
"""Contents that an unfinished job may still have to read."""


_THESE = "FROM cf_snapshot WHERE content_hash IN (SELECT value FROM json_each(?))"


class StoredContent(NamedTuple):
    """A content that is in the store, durable."""

    content_hash: str
    size_bytes: int


class Evictions(NamedTuple):
    """What `add` has evicted."""

    evicted: list[str]
    """Hashes without a reference now: delete their files once the transaction is durable."""
    refused: int
    """How many of them were just added: unfinished jobs leave no room for them."""


def add(connection: Connection, contents: Sequence[StoredContent], limit: int) -> Evictions:
    """Reference new contents, once the jobs that need them are queued, and evict down to the limit.

    Contents that no unfinished job needs are evicted first, the oldest capture first. Where that
    is not enough, the new contents are evicted.

    Args:
        limit: bytes that the store may hold.
    """
    known = set(_referenced(connection, [content.content_hash for content in contents]))
    now = utcnow().isoformat(" ")
    execute_many(
        connection,
        """
        INSERT INTO cf_snapshot (content_hash, size_bytes, kept_at) VALUES (?, ?, ?)
        ON CONFLICT (content_hash) DO UPDATE SET kept_at = excluded.kept_at
        """,
        [(*content, now) for content in contents],
    )
    excess = total(connection)[1] - limit
    evicted: list[str] = []
    while excess > 0 and (spare := _spare(connection)):
        chosen, excess = _until(spare, excess)
        delete(connection, chosen)
        evicted += chosen
    new = [content for content in contents if content.content_hash not in known.union(evicted)]
    refused, _ = _until(reversed(new), excess)
    delete(connection, refused)
    return Evictions(evicted + refused, len(refused))


def _spare(connection: Connection) -> Sequence[Any]:
    """The oldest contents that no unfinished job needs: (hash, bytes)."""
    return connection.execute(
        select(Snapshot.content_hash, Snapshot.size_bytes)
        .where(Snapshot.content_hash.not_in(_NEEDED))
        .order_by(Snapshot.kept_at, text("rowid"))
        .limit(CHUNK)
    ).all()


def _until(contents: Iterable[Any], excess: int) -> tuple[list[str], int]:
    """The first contents that free `excess` bytes, and the excess that is left."""
    chosen = []
    for content_hash, size in contents:
        if excess <= 0:
            break
        chosen.append(content_hash)
        excess -= size
    return chosen, excess


def _referenced(connection: Connection, hashes: Sequence[str]) -> list[str]:
    query = f"SELECT content_hash {_THESE}"
    return [row[0] for row in connection.exec_driver_sql(query, (json.dumps(hashes),))]


def delete(connection: Connection, hashes: Sequence[str]) -> None:
    """Delete the references to these contents."""
    connection.exec_driver_sql(f"DELETE {_THESE}", (json.dumps(hashes),))


def set_fault(connection: Connection, words: str, files: int) -> None:
    """Save why contents have no snapshot; empty words where the store takes contents again."""
    connection.execute(
        text(
            """
            INSERT INTO cf_snapshot_fault (id, words, files, since)
            VALUES (1, :words, :files, :now)
            ON CONFLICT (id) DO UPDATE SET words = excluded.words,
                files = CASE WHEN :files THEN files + :files ELSE 0 END,
                since = CASE WHEN words = '' OR :files = 0 THEN excluded.since ELSE since END
            WHERE words <> '' OR :files
            """
        ),
        {"words": words, "files": files, "now": utcnow().isoformat(" ")},
    )


def fault(connection: Connection) -> Any:
    """Why the store takes no contents (words, files, since); None where it does."""
    query = text("SELECT words, files, since FROM cf_snapshot_fault WHERE words <> ''")
    return connection.execute(query).one_or_none()


def total(connection: Connection) -> tuple[int, int]:
    """How many contents the store has, and their bytes."""
    size = func.coalesce(func.sum(Snapshot.size_bytes), 0)
    number, total = connection.execute(select(func.count(), size).select_from(Snapshot)).one()
    return number, total


def hashes(connection: Connection) -> list[str]:
    """The hash of every content that the store has."""
    return list(connection.execute(select(Snapshot.content_hash)).scalars())


def is_referenced(connection: Connection, content_hash: str) -> bool:
    """Whether the store has this content, by the ledger."""
    return bool(_referenced(connection, [content_hash]))


def unprotected(connection: Connection) -> int:
    """Unfinished jobs that read the file itself, since the store does not have its bytes."""
    needed = _NEEDED.where(FileVersion.content_hash.not_in(select(Snapshot.content_hash)))
    return connection.execute(select(func.count()).select_from(needed.subquery())).scalar_one()


def samples(connection: Connection) -> Sequence[Any]:
    """One present file of each active root that has any: (name, root_path, path)."""
    query = """
        SELECT r.name, r.path AS root_path, l.path FROM cf_source_root r
        JOIN cf_file_location l ON l.id = (
            SELECT id FROM cf_file_location
            WHERE source_root_id = r.id AND gone_at IS NULL LIMIT 1)
        WHERE r.active ORDER BY r.id
        """
    return connection.execute(text(query)).all()
