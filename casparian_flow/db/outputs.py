"""Outputs: planned when a job is decided, published by the Committer, found again by readers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, select, update

from casparian_flow.db.access import execute_many
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
    """Write down what decided jobs will publish.

    What an earlier try of a job planned and did not publish is forgotten: its sinks may be others
    by now. What it did publish stays as it is.
    """
    execute_many(
        connection,
        "DELETE FROM cf_output WHERE job_id = ? AND state <> 'PUBLISHED'",
        [(job_id,) for job_id, _ in decided],
    )
    execute_many(
        connection,
        """
        INSERT INTO cf_output (job_id, topic, uri, location, mode, output_key, state, stage,
                               target, rows, size_bytes, digest)
        VALUES (?, ?, ?, ?, ?, ?, 'PLANNED', ?, '', ?, ?, ?)
        ON CONFLICT (job_id, topic, uri) DO NOTHING
        """,
        [
            (job_id, s.topic, s.uri, s.location, s.mode, s.output_key, s.stage, s.rows,
             s.size_bytes, s.digest)
            for job_id, staged in decided
            for s in staged
        ],
    )  # fmt: skip


def unpublished(connection: Connection) -> list[tuple[int, int, StagedOutput]]:
    """(output id, job id, staged) of every output a decided job still owes, oldest first."""
    rows = connection.execute(
        select(Output)
        .with_only_columns(*Output.__table__.columns)
        .join(ProcessingJob, ProcessingJob.id == Output.job_id)
        .where(Output.state == OutputState.PLANNED, ProcessingJob.status == JobStatus.COMMITTING)
        .order_by(Output.id)
    ).all()
    return [
        (
            row.id,
            row.job_id,
            StagedOutput(
                topic=row.topic, uri=row.uri, location=row.location, mode=row.mode,
                output_key=row.output_key, stage=row.stage, rows=row.rows,
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
    """Record what readers can see now."""
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


def targets(connection: Connection, job_ids: Sequence[int]) -> dict[int, list[str]]:
    """Where the published outputs of each of these jobs are, with their rows, in words."""
    found: dict[int, list[str]] = {job_id: [] for job_id in job_ids}
    rows = connection.execute(
        select(Output.job_id, Output.target, Output.rows)
        .where(Output.job_id.in_(job_ids), Output.state == OutputState.PUBLISHED)
        .order_by(Output.id)
    )
    for job_id, target, count in rows:
        found[job_id].append(f"{target}: {count} rows")
    return found


def mark_refused(connection: Connection, output_ids: Sequence[int]) -> None:
    """Record that a sink will never take these."""
    if output_ids:
        connection.execute(
            update(Output).where(Output.id.in_(output_ids)).values(state=OutputState.REFUSED)
        )


def published(connection: Connection) -> Iterable[Any]:
    """Every published output with its version, job and plugin: what readers may see."""
    return connection.execute(
        select(
            Output.topic, Output.location, Output.target, Output.output_key, Output.rows,
            Output.digest, Output.job_id, ProcessingJob.plugin_name,
            FileVersion.id.label("version_id"), FileVersion.location_id, FileVersion.ordinal,
        )
        .join(ProcessingJob, ProcessingJob.id == Output.job_id)
        .join(FileVersion, FileVersion.id == ProcessingJob.file_version_id)
        .where(Output.state == OutputState.PUBLISHED)
        .order_by(Output.id)
    )  # fmt: skip
