"""Having the next scan look again at a file whose bytes were not what was recorded."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, select, update

from casparian_flow.db.access import execute_many
from casparian_flow.db.models import Directory, FileLocation, FileVersion, ProcessingJob


def doubt(connection: Connection, job_id: int) -> None:
    """Have the next scan read a job's file again: its bytes were not what was recorded.

    Should they be back by then, the scan finds no new version, and revives the job.
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


def uphold(connection: Connection, root_id: int, folders: Sequence[bytes]) -> None:
    """Keep what was doubted meanwhile in doubt: a scan has just saved the digests of these folders,
    and may have looked at them before."""
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
