"""Outputs: planned when a job is decided, marked as published by the Committer, and listed.

What a person changes about them is in `services.outputs`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, select, text, update

from casparian_flow.db.access import Page, execute_many, page
from casparian_flow.db.found import INVISIBLE, REPLACED, RETRACTED, note_retracted
from casparian_flow.db.models import (
    FileVersion,
    JobStatus,
    Output,
    OutputState,
    ProcessingJob,
    utcnow,
)
from casparian_flow.protocol import Published, StagedOutput


def plan(connection: Connection, decided: Sequence[tuple[int, list[StagedOutput]]]) -> None:
    """Record what decided jobs will publish.

    What an earlier attempt of a job planned and did not publish is deleted: its sinks may have
    changed since. What it did publish stays as it is.
    """
    execute_many(
        connection,
        "DELETE FROM cf_output WHERE job_id = ? AND state <> 'PUBLISHED'",
        [(job_id,) for job_id, _ in decided],
    )
    execute_many(
        connection,
        """
        INSERT INTO cf_output (job_id, topic, uri, location, mode, output_key, slot, state, stage,
                               target, rows, size_bytes, digest)
        VALUES (?, ?, ?, ?, ?, ?, ?, 'PLANNED', ?, '', ?, ?, ?)
        ON CONFLICT (job_id, topic, uri) DO NOTHING
        """,
        [
            (job_id, s.topic, s.uri, s.location, s.mode, s.output_key, s.slot, s.stage, s.rows,
             s.size_bytes, s.digest)
            for job_id, staged in decided
            for s in staged
        ],
    )  # fmt: skip


def unpublished(connection: Connection) -> list[tuple[int, int, StagedOutput]]:
    """(output id, job id, staged) of every output a decided job still owes, oldest first."""
    rows = connection.execute(
        select(Output)
        .with_only_columns(*Output.__table__.columns, FileVersion.ordinal)
        .join(ProcessingJob, ProcessingJob.id == Output.job_id)
        .join(FileVersion, FileVersion.id == ProcessingJob.file_version_id)
        .where(Output.state == OutputState.PLANNED, ProcessingJob.status == JobStatus.COMMITTING)
        .order_by(Output.id)
    ).all()
    return [
        (
            row.id,
            row.job_id,
            StagedOutput(
                topic=row.topic, uri=row.uri, location=row.location, mode=row.mode,
                output_key=row.output_key, slot=row.slot, ordinal=row.ordinal,
                job_id=row.job_id, stage=row.stage, rows=row.rows,
                size_bytes=row.size_bytes, digest=row.digest,
            ),
        )
        for row in rows
    ]  # fmt: skip


def stages(connection: Connection, job_ids: Sequence[int]) -> set[str]:
    """The staged files that are still to be published for these jobs."""
    query = select(Output.stage).where(
        Output.job_id.in_(job_ids), Output.state == OutputState.PLANNED
    )
    return set(connection.execute(query).scalars())


def decided_without_debts(connection: Connection) -> list[int]:
    """Decided jobs whose outputs are all published: they only have to be completed."""
    return list(
        connection.execute(
            select(ProcessingJob.id).where(
                ProcessingJob.status == JobStatus.COMMITTING,
                ~select(Output.id)
                .where(Output.job_id == ProcessingJob.id, Output.state != OutputState.PUBLISHED)
                .exists(),
            )
        ).scalars()
    )


def mark_published(connection: Connection, done: Sequence[tuple[int, Published]]) -> None:
    """Record that these outputs are in their sinks."""
    if done:
        connection.execute(
            update(Output)
            .where(Output.id == bindparam("output"))
            .values(
                state=OutputState.PUBLISHED,
                target=bindparam("to"),
                rows=bindparam("seen_rows"),
                digest=bindparam("seen_digest"),
                published_at=utcnow(),
            ),
            [
                {
                    "output": output_id,
                    "to": published.target,
                    "seen_rows": published.rows,
                    "seen_digest": published.digest,
                }
                for output_id, published in done
            ],
        )
        note_retracted(connection, _keys(connection, [id for id, seen in done if seen.retracted]))


def targets(connection: Connection, job_ids: Sequence[int]) -> dict[int, list[str]]:
    """Job id -> a text for each of its published outputs: its target and number of rows."""
    found: dict[int, list[str]] = {job_id: [] for job_id in job_ids}
    rows = connection.execute(
        select(Output.job_id, Output.target, Output.rows)
        .where(Output.job_id.in_(job_ids), Output.state == OutputState.PUBLISHED)
        .order_by(Output.id)
    )
    for job_id, target, count in rows:
        found[job_id].append(f"{target}: {count} rows")
    return found


def _keys(connection: Connection, output_ids: Sequence[int]) -> list[str]:
    query = select(Output.output_key).where(Output.id.in_(output_ids))
    return list(connection.execute(query).scalars()) if output_ids else []


def mark_refused(connection: Connection, job_ids: Sequence[int]) -> list[str]:
    """Record that nothing more of these jobs will be published, since a sink will never take an
    output of theirs; the staged files that nobody needs any more."""
    if not job_ids:
        return []
    refused = (
        update(Output)
        .where(Output.job_id.in_(job_ids), Output.state == OutputState.PLANNED)
        .values(state=OutputState.REFUSED)
        .returning(Output.stage)
    )
    return list(connection.execute(refused).scalars())


def published(connection: Connection) -> Iterable[Any]:
    """Every published output that is not hidden (`db.found`), with its version, job and plugin:
    what readers may see."""
    return connection.execute(
        select(
            Output.topic, Output.location, Output.target, Output.output_key, Output.rows,
            Output.digest, Output.job_id, ProcessingJob.plugin_name,
            FileVersion.id.label("version_id"), FileVersion.location_id, FileVersion.ordinal,
        )
        .join(ProcessingJob, ProcessingJob.id == Output.job_id)
        .join(FileVersion, FileVersion.id == ProcessingJob.file_version_id)
        .where(
            Output.state == OutputState.PUBLISHED,
            Output.output_key.not_in(text(f"({INVISIBLE})")),
        )
        .order_by(Output.id)
    )  # fmt: skip


NAMED = f"""
SELECT o.output_key, o.topic, o.location, o.target, o.rows, o.digest, o.job_id, j.status,
       r.name AS source, r.path AS root_path, l.path, l.rel_path, v.id AS version_id, v.ordinal,
       v.content_hash,
       o.output_key IN (SELECT output_key FROM cf_forgotten_output) AS forgotten,
       o.output_key IN ({RETRACTED}) AS retracted, o.output_key IN ({REPLACED}) AS replaced,
       v.content_hash IN (SELECT content_hash FROM cf_kept_content) AS kept
FROM cf_output o JOIN cf_processing_queue j ON j.id = o.job_id
JOIN cf_file_version v ON v.id = j.file_version_id
JOIN cf_file_location l ON l.id = v.location_id
JOIN cf_source_root r ON r.id = l.source_root_id
WHERE o.state = 'PUBLISHED'
UNION ALL
SELECT f.output_key, f.topic, f.location, f.target, f.rows, f.digest, f.job_id, NULL,
       f.source, r.path, f.path, CAST(f.path AS TEXT), f.file_version_id, f.ordinal,
       f.content_hash,
       f.output_key IN (SELECT output_key FROM cf_forgotten_output),
       f.output_key IN ({RETRACTED}), f.output_key IN ({REPLACED}), 0
FROM cf_found_output f JOIN cf_source_root r ON r.name = f.source
WHERE f.output_key NOT IN (SELECT output_key FROM cf_output WHERE state = 'PUBLISHED')
"""  # noqa: S608
"""Every output in the sinks. One that an inventory found, and no job here made, has no status."""


def listed(connection: Connection, limit: int | None, topic: str | None) -> Page:
    """Published outputs, the newest first, as people and programs look at them."""
    query = f"""
        SELECT job_id AS job, topic, CASE WHEN forgotten THEN 'FORGOTTEN'
               WHEN retracted THEN 'RETRACTED' WHEN replaced THEN 'REPLACED'
               WHEN status IS NULL THEN 'ADOPTED' ELSE 'PUBLISHED' END AS state,
               rows, source, rel_path, ordinal AS version, target, location AS sink, output_key
        FROM ({NAMED}) WHERE :topic IS NULL OR topic = :topic ORDER BY job_id DESC
        """  # noqa: S608
    return page(connection, query, limit, topic=topic)


# How many rows and rejects came of versions, by what the host counted of each output.
#
# A topic of rejects is one whose name ends in `_rejects`, where its plugin has another topic
# besides: `casparian_flow.protocol` says the same in Python. A topic that goes to several sinks
# counts once.


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
            AND +p.state = 'PUBLISHED' AND p.id < o.id{condition})
"""
"""Of the outputs of a job in one topic, the one that is counted. The `+` keeps SQLite from looking
through every output of the topic, where the job has a few."""


def _of_job(which: str) -> str:
    return f"""
    (SELECT coalesce(sum(o.rows), 0) FROM cf_output o
     WHERE o.job_id = j.id AND +o.state = 'PUBLISHED' AND {which}
     AND {_FIRST.format(condition="")})
    """  # noqa: S608


ROWS_COUNTED, REJECTS_COUNTED = _of_job(f"NOT ({_REJECTED})"), _of_job(_REJECTED)
"""What came of the job that the query calls `j`."""


class Rejected(NamedTuple):
    """What came of jobs."""

    rows: int
    rejects: int


def rejected_shown(connection: Connection) -> Rejected:
    """What readers may see, of all jobs; a topic in several sinks counts once."""
    visible = f" AND p.output_key NOT IN ({INVISIBLE})"
    query = text(
        f"""
        SELECT coalesce(sum(CASE WHEN {_REJECTED} THEN 0 ELSE o.rows END), 0),
               coalesce(sum(CASE WHEN {_REJECTED} THEN o.rows ELSE 0 END), 0)
        FROM cf_output o JOIN cf_processing_queue j ON j.id = o.job_id
        WHERE o.state = 'PUBLISHED' AND o.output_key NOT IN ({INVISIBLE})
          AND {_FIRST.format(condition=visible)}
        """  # noqa: S608
    )
    return Rejected(*connection.execute(query).one())


def rejected_of_jobs(connection: Connection, job_ids: Sequence[int]) -> Rejected:
    """What came of these jobs."""
    query = text(
        f"""
        SELECT coalesce(sum({ROWS_COUNTED}), 0), coalesce(sum({REJECTS_COUNTED}), 0)
        FROM cf_processing_queue j WHERE j.id IN (SELECT value FROM json_each(:ids))
        """  # noqa: S608
    )
    return Rejected(*connection.execute(query, {"ids": json.dumps(list(job_ids))}).one())


def rejected_since(connection: Connection, after: int) -> tuple[list[int], int]:
    """The jobs that were completed after this row of the audit; and the audit's last row."""
    last: int = connection.execute(text("SELECT coalesce(max(seq), 0) FROM cf_audit")).scalar_one()
    query = text(
        "SELECT DISTINCT CAST(substr(subject, 5) AS INTEGER) FROM cf_audit "
        "WHERE seq > :after AND seq <= :last AND action = 'commit'"
    )
    found = connection.execute(query, {"after": after, "last": last}).scalars()
    return list(found), last


_LAST_OF_FILES = """
NOT EXISTS (
    SELECT 1 FROM cf_file_version later JOIN cf_processing_queue k ON k.file_version_id = later.id
    WHERE later.location_id = v.location_id AND k.plugin_name = j.plugin_name
    AND +k.status = 'COMPLETED' AND (later.ordinal > v.ordinal OR
                                    (later.ordinal = v.ordinal AND k.id > j.id)))
"""
"""Whether the plugin has completed no newer version of the location, and this one not again."""


def reject_counts(
    connection: Connection, limit: int | None, job_ids: Sequence[int] | None = None
) -> Page:
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
                   v.ordinal AS version, {ROWS_COUNTED} AS "rows", {REJECTS_COUNTED} AS rejects
            FROM rejecting JOIN cf_processing_queue j ON j.id = rejecting.job_id
            JOIN cf_file_version v ON v.id = j.file_version_id
            JOIN cf_file_location l ON l.id = v.location_id
            JOIN cf_source_root r ON r.id = l.source_root_id
            WHERE +j.status = 'COMPLETED' AND (:ids IS NOT NULL OR {_LAST_OF_FILES})
        )
        SELECT * FROM amounts WHERE 100 * rejects > :percent * ("rows" + rejects) ORDER BY job DESC
        """,  # noqa: S608
        limit, ids=ids, percent=NAMED_PERCENT,
    )  # fmt: skip
