"""Which failures are open: one rule, for every count and every list.

    mended        since the job was queued, the plugin has completed a newer version of its
                  location, or the same version under another artifact; or the plugin's active
                  artifact had completed that version before
    dismissed     a person has accepted it, and the job was not claimed again since
    gone unread   neither, and the file was deleted
    open          none of these: it is counted, and a person has to do something

Only FAILED jobs have one of these words; their status stays FAILED in the ledger.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, text

from casparian_flow.db.access import execute_many
from casparian_flow.db.models import utcnow

OPEN, MENDED, DISMISSED, GONE = "open", "mended", "dismissed", "gone unread"

CLOSED = (MENDED, DISMISSED, GONE)

# Not `finished_at` alone: an older version that a person has backfilled since may fail anew.
_MENDED = """
EXISTS (
    SELECT 1 FROM cf_file_version mine
    JOIN cf_file_version other
        ON other.location_id = mine.location_id AND other.ordinal >= mine.ordinal
    JOIN cf_processing_queue done ON done.file_version_id = other.id
    WHERE mine.id = j.file_version_id AND +done.status = 'COMPLETED'
    AND done.plugin_name = j.plugin_name
    AND (done.finished_at >= j.created_at OR (
        (SELECT p.version FROM cf_plugin p WHERE p.id = done.plugin_id) =
            (SELECT active_version FROM cf_plugin_config c WHERE c.plugin_name = j.plugin_name)
        AND (SELECT p.version FROM cf_plugin p WHERE p.id = j.plugin_id) IS NOT
            (SELECT active_version FROM cf_plugin_config c WHERE c.plugin_name = j.plugin_name)
    ))
)
"""

_DISMISSED = """
EXISTS (SELECT 1 FROM cf_dismissed_failure d WHERE d.job_id = j.id AND d.fence = j.fence)
"""

_GONE = """
EXISTS (SELECT 1 FROM cf_file_version mine JOIN cf_file_location l ON l.id = mine.location_id
        WHERE mine.id = j.file_version_id AND l.gone_at IS NOT NULL)
"""

STATE = f"""
CASE WHEN j.status <> 'FAILED' THEN ''
     WHEN {_MENDED} THEN '{MENDED}'
     WHEN {_DISMISSED} THEN '{DISMISSED}'
     WHEN {_GONE} THEN '{GONE}'
     ELSE '{OPEN}' END
"""
"""Of a job that the query calls `j`: one of the words, empty where it has not failed."""


def counts(connection: Connection, job_ids: Sequence[int] | None = None) -> dict[str, int]:
    """FAILED jobs by these words; those that nobody has are left out.

    Args:
        job_ids: only of these.
    """
    query = text(
        f"""
        SELECT {STATE}, count(*) FROM cf_processing_queue j
        WHERE j.status = 'FAILED'
          AND (:ids IS NULL OR j.id IN (SELECT value FROM json_each(:ids)))
        GROUP BY 1
        """  # noqa: S608
    )
    ids = None if job_ids is None else json.dumps(list(job_ids))
    return {row[0]: row[1] for row in connection.execute(query, {"ids": ids})}


def job_ids(
    connection: Connection, state: str, plugin: str | None = None, path: str | None = None
) -> list[int]:
    """FAILED jobs in one of these states.

    Args:
        path: a glob over the path relative to the source root; `*` crosses directories.
    """
    query = text(
        f"""
        SELECT j.id FROM cf_processing_queue j
        WHERE j.status = 'FAILED' AND (:plugin IS NULL OR j.plugin_name = :plugin)
          AND (:path IS NULL OR EXISTS (
              SELECT 1 FROM cf_file_version v JOIN cf_file_location l ON l.id = v.location_id
              WHERE v.id = j.file_version_id AND l.rel_path GLOB :path))
          AND {STATE} = :state ORDER BY j.id
        """  # noqa: S608
    )
    chosen: dict[str, Any] = {"state": state, "plugin": plugin, "path": path}
    return list(connection.execute(query, chosen).scalars())


def dismiss(connection: Connection, job_ids: Sequence[int]) -> list[int]:
    """Accept these failures; those that were FAILED. What fails again later is open again."""
    execute_many(
        connection,
        """
        INSERT OR REPLACE INTO cf_dismissed_failure (job_id, fence, dismissed_at)
        SELECT id, fence, ? FROM cf_processing_queue WHERE id = ? AND status = 'FAILED'
        """,
        [(str(utcnow()), job_id) for job_id in job_ids],
    )
    failed = "SELECT id FROM cf_processing_queue WHERE id = :id AND status = 'FAILED'"
    return [
        job_id
        for job_id in job_ids
        if connection.execute(text(failed), {"id": job_id}).first() is not None
    ]
