"""Every status change of every job: one guarded statement a verb, many jobs at a time.

    verb        from                 to           guard
    enqueue     -                    QUEUED       no job of that plugin for the version
    backfill    -                    QUEUED       none of that artifact, no unfinished one
    claim       QUEUED               RUNNING      fence + 1, attempt counted
    decide      RUNNING              COMMITTING   (id, fence)
    complete    COMMITTING           COMPLETED    every output published
    refuse      COMMITTING           FAILED       a sink said never
    requeue     RUNNING              QUEUED       (id, fence)
    fail        RUNNING              FAILED       (id, fence)
    supersede   RUNNING              SUPERSEDED   (id, fence)
    abort       QUEUED, RUNNING      ABORTED      -
    retry       FAILED, ABORTED      QUEUED       - (and SUPERSEDED with a snapshot)
    revive      SUPERSEDED           QUEUED       the version's bytes are there again
    remake      COMPLETED            QUEUED       a person has its output made again

No other module assigns a status. The guard is (id, fence): with the status alone, a slow loser
would complete the winner's job. A verb returns what it changed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    LargeBinary,
    bindparam,
    cast,
    func,
    or_,
    select,
    text,
    tuple_,
    update,
)

from casparian_flow.db import found
from casparian_flow.db.access import execute_many
from casparian_flow.db.models import (
    Attempt,
    FileLocation,
    FileVersion,
    JobStatus,
    Plugin,
    ProcessingJob,
    Snapshot,
    SourceRoot,
    utcnow,
)
from casparian_flow.db.routing import Wanted
from casparian_flow.protocol import Pair

UNFINISHED = (JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.COMMITTING)

ALONE_AFTER = 2
"""Deaths of the daemon with a job in hand after which the job runs with no other beside it."""

LONGEST_PAUSE_SECONDS = 3600.0
"""No job waits longer for its next attempt. One that would have to was queued before the clock was
set back: it is due."""


def enqueue(connection: Connection, pairs: Sequence[tuple[int, Wanted]], now: str) -> list[int]:
    """Queue a job for each (version id, wanted) that has none of that plugin; return new ids.

    What an inventory has found of the version counts: the same artifact's job comes back under its
    old id, another one of the same plugin needs no job (see `db.found`).
    """
    return _add(connection, found.ENQUEUE, pairs, now)


def backfill(connection: Connection, pairs: Sequence[tuple[int, Wanted]], now: str) -> list[int]:
    """Queue a job for each (version id, wanted) on a person's word, though another artifact of the
    plugin has worked the version; return new ids."""
    return _add(connection, found.BACKFILL, pairs, now)


def _add(
    connection: Connection, statement: str, pairs: Sequence[tuple[int, Wanted]], now: str
) -> list[int]:
    last, free = connection.execute(text(found.BEFORE_ENQUEUE)).one()
    execute_many(
        connection,
        statement,
        [{"version_id": version, "now": now, **wanted._asdict()} for version, wanted in pairs],
    )
    new = (ProcessingJob.id > last) | ProcessingJob.id.in_(json.loads(free))
    return list(connection.execute(select(ProcessingJob.id).where(new)).scalars())


def claim(
    connection: Connection, worker: str, epoch: int, limit: int, avoid: Iterable[int] = ()
) -> list[int]:
    """Take up to `limit` due jobs, highest priority first, and count an attempt of each.

    A job that was in hand when the daemon died too often takes its turn as any other, and then
    nothing else is claimed until it has ended.

    Args:
        avoid: plugin ids whose sinks or environment are out of order at the moment.
    """
    others, crashes = connection.execute(
        select(func.count(), func.max(ProcessingJob.crashes)).where(
            ProcessingJob.status == JobStatus.RUNNING
        )
    ).one()
    if others and crashes >= ALONE_AFTER:
        return []
    due = (
        select(ProcessingJob.id, ProcessingJob.crashes)
        .where(
            ProcessingJob.status == JobStatus.QUEUED,
            _is_due(),
            ProcessingJob.plugin_id.not_in(list(avoid)),
        )
        .order_by(ProcessingJob.priority.desc(), ProcessingJob.id)
        .limit(limit)
    )
    chosen = _in_turn(connection.execute(due).all(), others)
    return list(
        connection.execute(
            update(ProcessingJob)
            .where(ProcessingJob.id.in_(chosen))
            .values(
                status=JobStatus.RUNNING,
                fence=ProcessingJob.fence + 1,
                attempts=ProcessingJob.attempts + 1,
                worker=worker,
                epoch=epoch,
                reason="",
            )
            .returning(ProcessingJob.id)
        ).scalars()
    )


def _in_turn(due: Sequence[Any], others: int) -> list[int]:
    """The jobs before the first that must run alone; or that one, if it is first and nothing runs.

    Args:
        others: how many are running.
    """
    ids = [job.id for job in due]
    alone = next((n for n, job in enumerate(due) if job.crashes >= ALONE_AFTER), len(ids))
    return ids[:alone] or ([] if others else ids[:1])


def _is_due() -> ColumnElement[bool]:
    now = time.time()
    return or_(
        ProcessingJob.not_before <= now, ProcessingJob.not_before > now + LONGEST_PAUSE_SECONDS
    )


def claimed(connection: Connection, job_ids: Sequence[int]) -> Sequence[Any]:
    """What a worker must know of claimed jobs, in the order they should run."""
    return connection.execute(
        select(
            ProcessingJob.id, ProcessingJob.fence, ProcessingJob.attempts,
            ProcessingJob.plugin_id, Plugin.name.label("plugin_name"),
            Plugin.version.label("plugin_version"), Plugin.artifact_hash,
            cast(Plugin.manifest, LargeBinary).label("manifest"),  # it need not be text any more
            FileVersion.id.label("version_id"), FileVersion.ordinal, FileVersion.content_hash,
            FileVersion.size_bytes, FileLocation.path, FileLocation.rel_path,
            SourceRoot.name.label("source"), SourceRoot.path.label("root_path"),
            Snapshot.content_hash.label("snapshot"),
        )
        .join(Plugin, Plugin.id == ProcessingJob.plugin_id)
        .join(FileVersion, FileVersion.id == ProcessingJob.file_version_id)
        .join(FileLocation, FileLocation.id == FileVersion.location_id)
        .join(SourceRoot, SourceRoot.id == FileLocation.source_root_id)
        .outerjoin(Snapshot, Snapshot.content_hash == FileVersion.content_hash)
        .where(ProcessingJob.id.in_(job_ids))
        .order_by(ProcessingJob.priority.desc(), ProcessingJob.id)
    ).all()  # fmt: skip


_HELD = (
    update(ProcessingJob)
    .where(
        ProcessingJob.id == bindparam("job"),
        ProcessingJob.fence == bindparam("held_fence"),
        ProcessingJob.status == JobStatus.RUNNING,
    )
)  # fmt: skip


def decide(connection: Connection, held: Sequence[Pair]) -> set[Pair]:
    """Let attempts (job id, fence) win: from here their outputs will be published.

    Returns:
        Those that moved; the others came too late.
    """
    if not held:
        return set()
    moved = connection.exec_driver_sql(
        """
        UPDATE cf_processing_queue SET status = 'COMMITTING', worker = NULL
        WHERE status = 'RUNNING' AND (id, fence) IN
            (SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]') FROM json_each(?))
        RETURNING id, fence
        """,
        (json.dumps(held),),
    )
    return {(job_id, fence) for job_id, fence in moved}


def requeue(
    connection: Connection, job_id: int, fence: int, *,
    reason: str, delay_seconds: float = 0.0, refund: bool = False, crashed: bool = False,
) -> bool:  # fmt: skip
    """Give the job back to the queue.

    Args:
        delay_seconds: pause before it can be claimed again.
        refund: the attempt was not the job's fault and does not count.
        crashed: the daemon died with it in hand.
    """
    statement = _HELD.values(
        status=JobStatus.QUEUED,
        worker=None,
        not_before=time.time() + min(delay_seconds, LONGEST_PAUSE_SECONDS),
        reason=reason,
        attempts=ProcessingJob.attempts - (1 if refund else 0),
        crashes=ProcessingJob.crashes + (1 if crashed else 0),
    )
    return _moved(connection, statement, job_id, fence)


def fail(connection: Connection, job_id: int, fence: int, reason: str) -> bool:
    """Put the job among the dead letters, where a person can `retry` it."""
    return _ended(connection, JobStatus.FAILED, job_id, fence, reason)


def supersede(connection: Connection, job_id: int, fence: int, reason: str) -> bool:
    """End the job: the bytes of its version are gone or have changed."""
    return _ended(connection, JobStatus.SUPERSEDED, job_id, fence, reason)


def _ended(connection: Connection, status: JobStatus, job_id: int, fence: int, reason: str) -> bool:
    statement = _HELD.values(status=status, worker=None, reason=reason, finished_at=utcnow())
    return _moved(connection, statement, job_id, fence)


def _moved(connection: Connection, statement: Any, job_id: int, fence: int) -> bool:
    result = connection.execute(statement, {"job": job_id, "held_fence": fence})
    return bool(result.rowcount)


def complete(connection: Connection, job_ids: Sequence[int]) -> list[int]:
    """Finish decided jobs whose outputs are all published."""
    return list(
        connection.execute(
            update(ProcessingJob)
            .where(ProcessingJob.id.in_(job_ids), ProcessingJob.status == JobStatus.COMMITTING)
            .values(status=JobStatus.COMPLETED, reason="", finished_at=utcnow())
            .returning(ProcessingJob.id)
        ).scalars()
    )


def refuse(connection: Connection, job_id: int, reason: str) -> None:
    """End a decided job that a sink will never take; outputs already visible stay recorded."""
    connection.execute(
        update(ProcessingJob)
        .where(ProcessingJob.id == job_id, ProcessingJob.status == JobStatus.COMMITTING)
        .values(status=JobStatus.FAILED, reason=reason, finished_at=utcnow())
    )


def note(connection: Connection, job_ids: Sequence[int], reason: str) -> None:
    """Say why decided jobs wait, for whoever looks."""
    connection.execute(
        update(ProcessingJob)
        .where(ProcessingJob.id.in_(job_ids), ProcessingJob.status == JobStatus.COMMITTING)
        .values(reason=reason)
    )


def attempts(connection: Connection, job_id: int) -> int:
    """Attempts counted against the job so far, the running one among them; 0: no such job."""
    query = select(ProcessingJob.attempts).where(ProcessingJob.id == job_id)
    return connection.execute(query).scalar() or 0


def held(connection: Connection, before_epoch: int) -> Sequence[Any]:
    """RUNNING jobs of earlier epochs: their daemon is dead, since we hold its lock."""
    return _running(connection, ProcessingJob.epoch < before_epoch)


def granted(connection: Connection, pairs: Iterable[Pair]) -> Sequence[Any]:
    """Those of these attempts that run by the ledger's word."""
    return _running(connection, tuple_(ProcessingJob.id, ProcessingJob.fence).in_(list(pairs)))


def _running(connection: Connection, which: ColumnElement[bool]) -> Sequence[Any]:
    return connection.execute(
        select(
            ProcessingJob.id, ProcessingJob.fence, ProcessingJob.attempts, ProcessingJob.crashes,
            ProcessingJob.epoch, ProcessingJob.worker,
        )
        .where(ProcessingJob.status == JobStatus.RUNNING, which)
        .order_by(ProcessingJob.worker, ProcessingJob.id)
    ).all()  # fmt: skip


def abort(connection: Connection, job_ids: Sequence[int], who: str) -> list[int]:
    """End queued and running jobs on a person's word; decided ones are left alone.

    What a running attempt still brings is refused, since its job runs no more.
    """
    for job in _running(connection, ProcessingJob.id.in_(job_ids)):
        ended = Ended(job.id, job.fence, job.worker, "ABORTED", f"aborted by {who}")
        add_attempts(connection, job.epoch, [ended])
    return list(
        connection.execute(
            update(ProcessingJob)
            .where(
                ProcessingJob.id.in_(job_ids),
                ProcessingJob.status.in_([JobStatus.QUEUED, JobStatus.RUNNING]),
            )
            .values(
                status=JobStatus.ABORTED, worker=None, reason=f"aborted by {who}",
                finished_at=utcnow(),
            )
            .returning(ProcessingJob.id)
        ).scalars()
    )  # fmt: skip


def retry(connection: Connection, job_ids: Sequence[int]) -> list[int]:
    """Queue dead letters, and superseded jobs with a snapshot, with a fresh budget of attempts."""
    kept = select(FileVersion.id).join(Snapshot, Snapshot.content_hash == FileVersion.content_hash)
    ended = ProcessingJob.status.in_([JobStatus.FAILED, JobStatus.ABORTED]) | (
        ProcessingJob.file_version_id.in_(kept) & (ProcessingJob.status == JobStatus.SUPERSEDED)
    )
    return _queue_again(connection, ProcessingJob.id.in_(job_ids), ended)


def revive(connection: Connection, version_ids: Sequence[int]) -> list[int]:
    """Queue superseded jobs of versions whose bytes a scan has found in their place again."""
    versions = ProcessingJob.file_version_id.in_(version_ids)
    return _queue_again(connection, versions, ProcessingJob.status == JobStatus.SUPERSEDED)


def remake(connection: Connection, job_ids: Sequence[int]) -> list[int]:
    """Queue completed jobs whose output is in its sink no more, on a person's word."""
    completed = ProcessingJob.status == JobStatus.COMPLETED
    return _queue_again(connection, ProcessingJob.id.in_(job_ids), completed)


def _queue_again(connection: Connection, *which: ColumnElement[bool]) -> list[int]:
    return list(
        connection.execute(
            update(ProcessingJob)
            .where(*which)
            .values(
                status=JobStatus.QUEUED, attempts=0, not_before=0.0, reason="", finished_at=None
            )
            .returning(ProcessingJob.id)
        ).scalars()
    )


def counts(connection: Connection) -> dict[str, int]:
    """Jobs in each status that has any."""
    rows = connection.execute(
        select(ProcessingJob.status, func.count()).group_by(ProcessingJob.status)
    )
    return {row[0]: row[1] for row in rows}


def claimable(connection: Connection) -> bool:
    """Whether any job could be claimed now."""
    ready = select(ProcessingJob.id).where(ProcessingJob.status == JobStatus.QUEUED, _is_due())
    return connection.execute(ready.limit(1)).first() is not None


def outcomes(connection: Connection, job_ids: Sequence[int]) -> dict[str, int]:
    """The statuses of these jobs, counted."""
    tally: dict[str, int] = {}
    for start in range(0, len(job_ids), 10_000):
        rows = connection.execute(
            select(ProcessingJob.status, func.count())
            .where(ProcessingJob.id.in_(job_ids[start : start + 10_000]))
            .group_by(ProcessingJob.status)
        )
        for status, number in rows:
            tally[status] = tally.get(status, 0) + number
    return tally


# The history of attempts: one row each, written when it ended, never changed.


class Ended(NamedTuple):
    """How an attempt ended, as it goes into the ledger; `db.models.Attempt` has the meanings."""

    job_id: int
    fence: int
    worker: str
    outcome: str
    error: str
    log: str = ""
    seconds: float = 0.0
    sandbox: str = ""
    fault: str = ""
    signal: str = ""
    exit_code: int | None = None
    batches: int = 0
    rows: int = 0
    max_rss_bytes: int = 0
    cpu_seconds: float = 0.0


def add_attempts(connection: Connection, epoch: int, ended: Sequence[Ended]) -> None:
    """Keep how attempts of an epoch ended."""
    now = utcnow().isoformat(" ")
    execute_many(
        connection,
        """
        INSERT INTO cf_attempt
            (epoch, ended_at, job_id, fence, worker, outcome, error, log, seconds, sandbox,
             fault, signal, exit_code, batches, rows, max_rss_bytes, cpu_seconds)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
        """,
        [(epoch, now, *end) for end in ended],
    )


def counted(connection: Connection, job_id: int, number: int) -> list[Any]:
    """The last attempts of the job that count against its budget: outcome, fault, error.

    Args:
        number: how many; those that were released or aborted are not among them.
    """
    query = (
        select(Attempt.outcome, Attempt.fault, Attempt.error)
        .where(Attempt.job_id == job_id, Attempt.outcome.in_(["FAILED", "LOST"]))
        .order_by(Attempt.fence.desc())
        .limit(number)
    )
    return list(connection.execute(query))


# Which failures are open: one rule, for every count and every list.
#
#     mended        since the job was queued, the plugin has completed a newer version of its
#                   location, or the same version under another artifact; or the plugin's active
#                   artifact had completed that version before
#     dismissed     a person has accepted it, and the job was not claimed again since
#     gone unread   neither, and the file was deleted
#     open          none of these: it is counted, and a person has to do something
#
# Only FAILED jobs have one of these words; their status stays FAILED in the ledger.


OPEN_FAILURE, MENDED_FAILURE, DISMISSED_FAILURE, GONE_UNREAD = (
    "open",
    "mended",
    "dismissed",
    "gone unread",
)

CLOSED_FAILURE = (MENDED_FAILURE, DISMISSED_FAILURE, GONE_UNREAD)

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

FAILURE_STATE = f"""
CASE WHEN j.status <> 'FAILED' THEN ''
     WHEN {_MENDED} THEN '{MENDED_FAILURE}'
     WHEN {_DISMISSED} THEN '{DISMISSED_FAILURE}'
     WHEN {_GONE} THEN '{GONE_UNREAD}'
     ELSE '{OPEN_FAILURE}' END
"""
"""Of a job that the query calls `j`: one of the words, empty where it has not failed."""


def failure_counts(connection: Connection, job_ids: Sequence[int] | None = None) -> dict[str, int]:
    """FAILED jobs by these words; those that nobody has are left out.

    Args:
        job_ids: only of these.
    """
    query = text(
        f"""
        SELECT {FAILURE_STATE}, count(*) FROM cf_processing_queue j
        WHERE j.status = 'FAILED'
          AND (:ids IS NULL OR j.id IN (SELECT value FROM json_each(:ids)))
        GROUP BY 1
        """  # noqa: S608
    )
    ids = None if job_ids is None else json.dumps(list(job_ids))
    return {row[0]: row[1] for row in connection.execute(query, {"ids": ids})}


def failed_job_ids(
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
          AND {FAILURE_STATE} = :state ORDER BY j.id
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
