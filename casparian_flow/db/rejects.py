"""How many rows and rejects came of versions, by what the host counted of each output.

A topic of rejects is one whose name ends in `_rejects`, where its plugin has another topic besides:
`casparian_flow.topics` says the same in Python. A topic that goes to several sinks counts once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Connection, text

from casparian_flow.db.pages import Page, page
from casparian_flow.db.shown import HIDDEN

NAMED_PERCENT = 1
"""A version of which more than this was rejected is named."""

_SUFFIX = "GLOB '*_rejects'"  # `_` stands for itself there, and case counts

_REJECTED = f"""
o.topic {_SUFFIX} AND EXISTS (
    SELECT 1 FROM cf_topic_config t
    WHERE t.plugin_name = j.plugin_name AND NOT t.topic_name {_SUFFIX})
"""  # noqa: S608

_FIRST = """
NOT EXISTS (SELECT 1 FROM cf_output p WHERE p.job_id = o.job_id AND +p.topic = o.topic
            AND +p.state = 'PUBLISHED' AND p.id < o.id)
"""
"""Of the outputs of a job in one topic, the one that is counted. The `+` keeps SQLite from looking
through every output of the topic, where the job has a few."""


def _of_job(which: str) -> str:
    return f"""
    (SELECT coalesce(sum(o.rows), 0) FROM cf_output o
     WHERE o.job_id = j.id AND +o.state = 'PUBLISHED' AND {which} AND {_FIRST})
    """  # noqa: S608


ROWS, REJECTS = _of_job(f"NOT ({_REJECTED})"), _of_job(_REJECTED)
"""What came of the job that the query calls `j`."""


class Amount(NamedTuple):
    """What came of jobs."""

    rows: int
    rejects: int


def shown(connection: Connection) -> Amount:
    """What readers may see, of all jobs."""
    query = text(
        f"""
        SELECT coalesce(sum(CASE WHEN {_REJECTED} THEN 0 ELSE o.rows END), 0),
               coalesce(sum(CASE WHEN {_REJECTED} THEN o.rows ELSE 0 END), 0)
        FROM cf_output o JOIN cf_processing_queue j ON j.id = o.job_id
        WHERE o.state = 'PUBLISHED' AND o.output_key NOT IN ({HIDDEN}) AND {_FIRST}
        """  # noqa: S608
    )
    return Amount(*connection.execute(query).one())


def of_jobs(connection: Connection, job_ids: Sequence[int]) -> Amount:
    """What came of these jobs."""
    query = text(
        f"""
        SELECT coalesce(sum({ROWS}), 0), coalesce(sum({REJECTS}), 0)
        FROM cf_processing_queue j WHERE j.id IN (SELECT value FROM json_each(:ids))
        """  # noqa: S608
    )
    return Amount(*connection.execute(query, {"ids": json.dumps(list(job_ids))}).one())


def committed(connection: Connection, after: int) -> tuple[list[int], int]:
    """The jobs that were completed after this row of the audit; and the audit's last row."""
    last: int = connection.execute(text("SELECT coalesce(max(seq), 0) FROM cf_audit")).scalar_one()
    query = text(
        "SELECT DISTINCT CAST(substr(subject, 5) AS INTEGER) FROM cf_audit "
        "WHERE seq > :after AND seq <= :last AND action = 'commit'"
    )
    found = connection.execute(query, {"after": after, "last": last}).scalars()
    return list(found), last


_LAST = """
NOT EXISTS (
    SELECT 1 FROM cf_file_version later JOIN cf_processing_queue k ON k.file_version_id = later.id
    WHERE later.location_id = v.location_id AND k.plugin_name = j.plugin_name
    AND +k.status = 'COMPLETED' AND (later.ordinal > v.ordinal OR
                                    (later.ordinal = v.ordinal AND k.id > j.id)))
"""
"""Whether the plugin has completed no newer version of the location, and this one not again."""


def named(connection: Connection, limit: int | None, job_ids: Sequence[int] | None = None) -> Page:
    """The last worked version of each location of which more than 1 % was rejected, the newest
    first.

    Args:
        job_ids: only what these jobs worked, last or not.
    """
    ids = None if job_ids is None else json.dumps(list(job_ids))
    return page(
        connection,
        f"""
        WITH rejecting AS (
            SELECT DISTINCT o.job_id FROM cf_output o
            WHERE o.state = 'PUBLISHED' AND o.rows > 0 AND o.topic IN (
                SELECT DISTINCT topic_name FROM cf_topic_config WHERE topic_name {_SUFFIX})
            AND (:ids IS NULL OR o.job_id IN (SELECT value FROM json_each(:ids)))
        ), amounts AS MATERIALIZED (  -- else the sums are made anew wherever they are named
            SELECT j.id AS job, j.plugin_name AS plugin, r.name AS source, l.rel_path,
                   v.ordinal AS version, {ROWS} AS "rows", {REJECTS} AS rejects
            FROM rejecting JOIN cf_processing_queue j ON j.id = rejecting.job_id
            JOIN cf_file_version v ON v.id = j.file_version_id
            JOIN cf_file_location l ON l.id = v.location_id
            JOIN cf_source_root r ON r.id = l.source_root_id
            WHERE +j.status = 'COMPLETED' AND (:ids IS NOT NULL OR {_LAST})
        )
        SELECT * FROM amounts WHERE 100 * rejects > :percent * ("rows" + rejects) ORDER BY job DESC
        """,  # noqa: S608
        limit, ids=ids, percent=NAMED_PERCENT,
    )  # fmt: skip
