"""The state of a failure, for every count and every list; the job's status stays FAILED.

open          a user has to act; also, whatever else holds, while an open rebuild waits for it
mended        since the job was queued, the plugin has completed a newer version of its
              location, or the same version with another artifact; or the plugin's active
              artifact had completed that version before; or it was held, and a newer job of the
              plugin has the version: what that one comes to counts
dismissed     a user has accepted it, and the job was not claimed again since
held          neither, and the version does not fit its table's contract: a person has to decide
gone unread   none of these, and the file was deleted
open          none of these
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from casparian_flow.db.access import Connection, Row, execute, returned_ids, rows
from casparian_flow.db.states import utcnow

OPEN, MENDED, DISMISSED, GONE_UNREAD = "open", "mended", "dismissed", "gone unread"
HELD = "held"

CLOSED = (MENDED, DISMISSED, GONE_UNREAD)

WAITING = (OPEN, HELD)
"""A person has to act."""

_ACTIVE = """
SELECT p.artifact_hash FROM cf_plugin_config c
JOIN cf_plugin p ON p.name = c.plugin_name AND p.version = c.active_version
WHERE c.plugin_name = j.plugin_name
"""

_ENDED = """
CASE WHEN +done.status = 'COMPLETED' THEN done.finished_at
     WHEN EXISTS (SELECT 1 FROM cf_rebuild_job m JOIN cf_rebuild b ON b.id = m.rebuild_id
                  WHERE m.job_id = done.id AND m.was = 'COMPLETED' AND b.ended_at IS NULL)
     THEN (SELECT max(o.published_at) FROM cf_output o WHERE o.job_id = done.id) END
"""
"""When the job `done` was completed, also if an open rebuild has it run again; else NULL."""

# Not `finished_at` alone: an older version that was backfilled since may fail again. The `+` keeps
# SQLite from the index on the status, by which it would read every completed job for each failure.
_MENDED = f"""
EXISTS (
    SELECT 1 FROM cf_file_version mine
    JOIN cf_file_version other
        ON other.location_id = mine.location_id AND other.ordinal >= mine.ordinal
    JOIN cf_processing_queue done ON done.file_version_id = other.id
    WHERE mine.id = j.file_version_id AND done.plugin_name = j.plugin_name
    AND ({_ENDED}) IS NOT NULL AND (({_ENDED}) >= j.created_at OR (
        (SELECT p.artifact_hash FROM cf_plugin p WHERE p.id = done.plugin_id) = ({_ACTIVE})
        AND (SELECT p.artifact_hash FROM cf_plugin p WHERE p.id = j.plugin_id) IS NOT ({_ACTIVE})
    ))
)
"""  # noqa: S608

_DISMISSED = """
EXISTS (SELECT 1 FROM cf_dismissed_failure d WHERE d.job_id = j.id AND d.fence = j.fence)
"""

_GONE = """
EXISTS (SELECT 1 FROM cf_file_version mine JOIN cf_file_location l ON l.id = mine.location_id
        WHERE mine.id = j.file_version_id AND l.gone_at IS NOT NULL)
"""

_AWAITED = """
EXISTS (SELECT 1 FROM cf_rebuild_job m JOIN cf_rebuild b ON b.id = m.rebuild_id
        WHERE m.job_id = j.id AND b.ended_at IS NULL)
"""

# Each contract that held a version has a job of its own. One that was aborted decides nothing.
_OUTDONE = """
EXISTS (SELECT 1 FROM cf_processing_queue newer
        WHERE newer.file_version_id = j.file_version_id AND newer.plugin_name = j.plugin_name
        AND newer.id > j.id AND +newer.status NOT IN ('ABORTED', 'SUPERSEDED'))
"""

# The host begins the reason so where the plugin raised `contract.Held`, and no other reason.
_HELD = "j.reason GLOB 'held: *'"

STATE = f"""
CASE WHEN j.status <> 'FAILED' THEN ''
     WHEN {_HELD} AND {_AWAITED} THEN '{HELD}'
     WHEN {_AWAITED} THEN '{OPEN}'
     WHEN {_MENDED} THEN '{MENDED}'
     WHEN {_HELD} AND {_OUTDONE} THEN '{MENDED}'
     WHEN {_DISMISSED} THEN '{DISMISSED}'
     WHEN {_HELD} THEN '{HELD}'
     WHEN {_GONE} THEN '{GONE_UNREAD}'
     ELSE '{OPEN}' END
"""
"""The failure state of a job that the query calls `j`; empty where it has not failed."""


def counts(connection: Connection, job_ids: Sequence[int] | None = None) -> dict[str, int]:
    """How many FAILED jobs are in each failure state that has any.

    Args:
        job_ids: only of these.
    """
    rows = execute(
        connection,
        f"""
        SELECT {STATE} AS state, count(*) AS jobs FROM cf_processing_queue j
        WHERE j.status = 'FAILED'
          AND (:job_ids IS NULL OR j.id IN (SELECT value FROM json_each(:job_ids)))
        GROUP BY 1
        """,  # noqa: S608
        job_ids=job_ids,
    )
    return {row.state: row.jobs for row in rows}


def job_ids(
    connection: Connection, state: str, plugin: str | None = None, path: str | None = None
) -> list[int]:
    """FAILED jobs in one failure state.

    Args:
        path: a glob over the path relative to the source root; `*` crosses directories.
    """
    return returned_ids(
        connection,
        f"""
        SELECT j.id FROM cf_processing_queue j
        WHERE j.status = 'FAILED' AND (:plugin IS NULL OR j.plugin_name = :plugin)
          AND (:path IS NULL OR EXISTS (
              SELECT 1 FROM cf_file_version v JOIN cf_file_location l ON l.id = v.location_id
              WHERE v.id = j.file_version_id AND l.rel_path GLOB :path))
          AND {STATE} = :state ORDER BY j.id
        """,  # noqa: S608
        state=state,
        plugin=plugin,
        path=path,
    )


def held(connection: Connection, job_ids: Sequence[int] | None = None) -> list[Row]:
    """The held versions of each plugin: plugin, is_table, versions, and one of them with its
    reason.

    Args:
        job_ids: only of these jobs.
    """
    return rows(
        connection,
        f"""
        SELECT j.plugin_name AS plugin, count(*) AS versions, max(j.id) AS job,
               r.name AS source, l.rel_path, v.ordinal AS version, j.reason,
               EXISTS (SELECT 1 FROM cf_plugin p WHERE p.id = j.plugin_id AND
                       json_valid(p.manifest) AND json_type(p.manifest, '$.contract.columns')
                       IS NOT NULL) AS is_table
        FROM cf_processing_queue j JOIN cf_file_version v ON v.id = j.file_version_id
        JOIN cf_file_location l ON l.id = v.location_id
        JOIN cf_source_root r ON r.id = l.source_root_id
        WHERE j.status = 'FAILED'
          AND (:job_ids IS NULL OR j.id IN (SELECT value FROM json_each(:job_ids)))
          AND {STATE} = '{HELD}'
        GROUP BY j.plugin_name ORDER BY j.plugin_name
        """,  # noqa: S608
        job_ids=None if job_ids is None else json.dumps(list(job_ids)),
    )


def dismiss(connection: Connection, job_ids: Sequence[int]) -> list[int]:
    """Accept the failures of those jobs that are FAILED, until they fail again."""
    return returned_ids(
        connection,
        """
        INSERT INTO cf_dismissed_failure (job_id, fence, dismissed_at)
        SELECT id, fence, :now FROM cf_processing_queue
        WHERE +status = 'FAILED' AND id IN (SELECT value FROM json_each(:job_ids))
        ON CONFLICT (job_id) DO UPDATE
        SET fence = excluded.fence, dismissed_at = excluded.dismissed_at
        RETURNING job_id
        """,
        job_ids=job_ids,
        now=utcnow().isoformat(" "),
    )
