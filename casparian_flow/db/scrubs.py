"""What a scrub reads again, and what it records of it."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection, text

from casparian_flow.db import audit, files, roots
from casparian_flow.db.files import Recorded, Sighting, Stat
from casparian_flow.db.routing import Routing

BATCH = 100
"""Files between two notes of how far a scrub has come."""


class Claim(NamedTuple):
    """What the ledger says of a file that is there: this content under these stamps."""

    location_id: int
    path: bytes
    stat: Stat
    version_id: int
    content_hash: str


def batch(connection: Connection, root_id: int, after: int) -> list[Claim]:
    """The next files of a root, by location id; racy ones are the next scan's."""
    rows = connection.execute(
        text(
            """
            SELECT l.id, l.path, l.device, l.inode, l.size_bytes, l.mtime_ns, l.ctime_ns,
                   v.id, v.content_hash
            FROM cf_file_location l JOIN cf_file_version v ON v.id = l.current_version_id
            WHERE l.source_root_id = :root_id AND l.id > :after AND l.gone_at IS NULL
              AND l.inode IS NOT NULL AND NOT l.racy
            ORDER BY l.id LIMIT :batch
            """
        ),
        {"root_id": root_id, "after": after, "batch": BATCH},
    )
    return [Claim(row[0], row[1], Stat._make(row[2:7]), row[7], row[8]) for row in rows]


def record(
    connection: Connection, root_id: int, subject: str, claim: Claim, found: str, routing: Routing
) -> Recorded:
    """Make other bytes under the very same stamps a version, and write down how it was found.

    Args:
        subject: the file, as the audit names it.
        found: SHA-256 of what is there.
    """
    folder = claim.path.rpartition(b"/")[0]
    sighting = Sighting(claim.path, folder, claim.stat, found, False, claim.version_id)
    recorded = files.record(connection, root_id, [sighting], routing)
    if recorded.versions:
        roots.count_up(connection, root_id, hidden=recorded.versions)
        detail = {"was": claim.content_hash, "is": found, "stamps": "did not show it"}
        audit.append(connection, "scrub", [audit.Event("hidden-change", subject, detail)])
    return recorded
