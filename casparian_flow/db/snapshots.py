"""Which contents the snapshot store has, and which it may let go.

A row is a claim: the bytes are in the store, durable. It is written in the transaction that
records the versions, after the bytes, and deleted in a transaction before they are.
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
"""Snapshots let go of at a time."""

_NEEDED = (
    select(FileVersion.content_hash)
    .join(ProcessingJob, ProcessingJob.file_version_id == FileVersion.id)
    .where(ProcessingJob.status.in_(UNFINISHED))
)
"""What an unfinished job may yet have to read."""


_THESE = "FROM cf_snapshot WHERE content_hash IN (SELECT value FROM json_each(?))"


class StoredContent(NamedTuple):
    """A content that is in the store, durable, and that no row claims yet."""

    content_hash: str
    size_bytes: int


class Evictions(NamedTuple):
    """What `keep` decided."""

    evicted: list[str]
    """Hashes that are claimed no more: their files can go when the transaction is durable."""
    refused: int
    """Of those: contents just placed, for which unfinished jobs leave no room."""


def add(connection: Connection, placed: Sequence[StoredContent], limit: int) -> Evictions:
    """Claim what was placed, after the jobs that need it are queued, and keep within the limit.

    What no unfinished job needs makes room, that first which no scan has captured for longest.
    What unfinished jobs need stays; where that is too much, it is the newcomers that go.

    Args:
        limit: bytes that the store may hold.
    """
    known = set(_referenced(connection, [each.content_hash for each in placed]))
    now = utcnow().isoformat(" ")
    execute_many(
        connection,
        """
        INSERT INTO cf_snapshot (content_hash, size_bytes, kept_at) VALUES (?, ?, ?)
        ON CONFLICT (content_hash) DO UPDATE SET kept_at = excluded.kept_at
        """,
        [(*each, now) for each in placed],
    )
    excess = held(connection)[1] - limit
    evicted: list[str] = []
    while excess > 0 and (spare := _spare(connection)):
        chosen, excess = _until(spare, excess)
        forget(connection, chosen)
        evicted += chosen
    newcomers = [each for each in placed if each.content_hash not in known.union(evicted)]
    refused, _ = _until(reversed(newcomers), excess)
    forget(connection, refused)
    return Evictions(evicted + refused, len(refused))


def _spare(connection: Connection) -> Sequence[Any]:
    """The next contents that no unfinished job needs: (hash, bytes)."""
    return connection.execute(
        select(Snapshot.content_hash, Snapshot.size_bytes)
        .where(Snapshot.content_hash.not_in(_NEEDED))
        .order_by(Snapshot.kept_at, text("rowid"))
        .limit(CHUNK)
    ).all()


def _until(contents: Iterable[Any], excess: int) -> tuple[list[str], int]:
    """The first contents that free as much, and what is then still too much."""
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


def forget(connection: Connection, hashes: Sequence[str]) -> None:
    """Claim these contents no more."""
    connection.exec_driver_sql(f"DELETE {_THESE}", (json.dumps(hashes),))


def note(connection: Connection, words: str, files: int) -> None:
    """Remember why contents have no snapshot; empty words: the store takes them again."""
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
    """Why the store does not take contents (words, files, since); None where it does."""
    query = text("SELECT words, files, since FROM cf_snapshot_fault WHERE words <> ''")
    return connection.execute(query).one_or_none()


def held(connection: Connection) -> tuple[int, int]:
    """How many contents are claimed, and their bytes."""
    size = func.coalesce(func.sum(Snapshot.size_bytes), 0)
    number, total = connection.execute(select(func.count(), size).select_from(Snapshot)).one()
    return number, total


def every(connection: Connection) -> list[str]:
    """The hash of every content that is claimed."""
    return list(connection.execute(select(Snapshot.content_hash)).scalars())


def is_referenced(connection: Connection, content_hash: str) -> bool:
    """Whether the store should have this content."""
    return bool(_referenced(connection, [content_hash]))


def unprotected(connection: Connection) -> int:
    """Unfinished jobs that need the file itself: the store does not have its bytes."""
    needed = _NEEDED.where(FileVersion.content_hash.not_in(select(Snapshot.content_hash)))
    return connection.execute(select(func.count()).select_from(needed.subquery())).scalar_one()


def samples(connection: Connection) -> Sequence[Any]:
    """One present file of each active root: (name, root_path, path), where there is one."""
    query = """
        SELECT r.name, r.path AS root_path, l.path FROM cf_source_root r
        JOIN cf_file_location l ON l.id = (
            SELECT id FROM cf_file_location
            WHERE source_root_id = r.id AND gone_at IS NULL LIMIT 1)
        WHERE r.active ORDER BY r.id
        """
    return connection.execute(text(query)).all()
