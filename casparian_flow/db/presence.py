"""What is there by the ledger, and marking what is no longer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Connection, func, select, update

from casparian_flow.db.access import execute_many
from casparian_flow.db.models import Directory, FileLocation, SourceRoot, utcnow


class Present(NamedTuple):
    """A location that is there, as the ledger last saw it."""

    path: bytes
    device: int | None
    inode: int | None
    ctime_ns: int | None


_PRESENT = (
    FileLocation.path, FileLocation.device, FileLocation.inode, FileLocation.ctime_ns,
)  # fmt: skip


def count_present(connection: Connection, root_id: int) -> int:
    """How many locations of a source root are there."""
    query = select(func.count()).where(
        FileLocation.source_root_id == root_id, FileLocation.gone_at.is_(None)
    )
    return connection.execute(query).scalar_one()


def present_in(connection: Connection, root_id: int, directory: bytes) -> list[Present]:
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
    return [Present(*row) for row in rows]


def present_under(connection: Connection, root_id: int, directory: bytes) -> list[Present]:
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
    return [Present(*row) for row in rows]


def forget_directory(connection: Connection, root_id: int, directory: bytes) -> None:
    """Drop the digests of a directory that is gone and of all below it; locations stay."""
    connection.execute(
        update(Directory)
        .where(
            Directory.source_root_id == root_id,
            (Directory.path == directory)
            | ((Directory.path >= directory + b"/") & (Directory.path < directory + b"0")),
        )
        .values(digest=None, parent_id=None)
    )


PASSED_OVER = "not deleted: scans pass it over, by an ignore pattern or since it is ours"
"""The `problem` of a location that is still on the disk and that no scan takes any more."""


def mark_gone(
    connection: Connection, root_id: int, gone: Sequence[Present], problem: str = ""
) -> int:
    """Mark that locations are no longer there, unless another scan has seen them anew; their
    versions stay.

    One that is doubted since (`db.doubts`) was not seen anew.

    Args:
        problem: `PASSED_OVER` where they are on the disk.

    Returns:
        How many were marked.
    """
    return execute_many(
        connection,
        """
        UPDATE cf_file_location SET gone_at = ?, problem = coalesce(nullif(?, ''), problem)
        WHERE source_root_id = ? AND path = ? AND (inode IS ? OR inode IS NULL)
          AND ctime_ns IS ? AND gone_at IS NULL
        """,
        [(utcnow().isoformat(" "), problem, root_id, p.path, p.inode, p.ctime_ns) for p in gone],
    )


def count_passed_over(connection: Connection, root: str) -> int:
    """How many locations of the source root of this name were known, and are passed over by now."""
    ids = select(SourceRoot.id).where(SourceRoot.name == root).scalar_subquery()
    query = select(func.count()).where(
        FileLocation.source_root_id == ids, FileLocation.problem == PASSED_OVER
    )
    return connection.execute(query).scalar_one()
