"""The queue: every status change of every job is a verb here, and no other module assigns one.

    verb           from             to          SQL guard             caller ensures
    enqueue        -                QUEUED      no job of the plugin  a rule routes the version
                                                for the version       to the plugin
    enqueue_again  -                QUEUED      none of the artifact  a user asked; the version's
                                                and none unfinished   bytes are there
    claim          QUEUED           RUNNING     due; a suspect runs   the epoch is the running
                                                alone                 daemon's
    decide         RUNNING          COMMITTING  (id, fence)           the outputs are planned in the
                                                                      same transaction
    complete       COMMITTING       COMPLETED   id                    every output is published
                                                                      (outputs.decided_without_debts)
    refuse         COMMITTING       FAILED      id                    a sink will never take one of
                                                                      the outputs
    requeue        RUNNING          QUEUED      (id, fence)           an attempt is left, or it does
                                                                      not count
    fail           RUNNING          FAILED      (id, fence)           no attempt is left, or the
                                                                      error would repeat
    supersede      RUNNING          SUPERSEDED  (id, fence)           the version's bytes are gone
    abort          QUEUED, RUNNING  ABORTED     id                    a user asked
    retry          FAILED, ABORTED  QUEUED      id                    a user asked
                   SUPERSEDED       QUEUED      id, its bytes kept    a user asked
    revive         SUPERSEDED       QUEUED      version id            a scan found its bytes again
    restore        COMPLETED        QUEUED      id                    a user asked; its outputs are
                                                                      out of their sinks
    enqueue_first  -                QUEUED      none of the artifact  a user asked for a rebuild
    rebuild        any but RUNNING  QUEUED      id                    the same
                   and COMMITTING
    put_back       any but RUNNING  COMPLETED,  id, and whether it    its rebuild was cancelled, or
                   and COMMITTING   or ABORTED  has older outputs     left it out
    adopt          -                COMPLETED   -                     a sink has all that the job
                                                                      gives
    take_over      QUEUED, FAILED,  COMPLETED   id, a published       the same
                   ABORTED,                     output
                   SUPERSEDED
    renumber       QUEUED           SUPERSEDED  version id            its content is a later version

The status in the `from` column is part of every guard. An attempt ends under (id, fence): with the
id alone, an attempt that lost its job could end the attempt that has the job now. A COMMITTING job
needs no fence: `claim` and `abort` leave it alone, so it has no other attempt. Whoever ends an
attempt adds it to the history in the same transaction (`add_attempts`); `abort` does so itself.

`requeue`, `fail` and `supersede` take one attempt and return whether it still had the job; `refuse`
takes one job. The others take many jobs and return those that they changed.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from casparian_flow.db.access import Connection, execute, execute_many, returned_ids
from casparian_flow.db.routing import JobRequest
from casparian_flow.db.states import TAKEN, JobStatus, utcnow
from casparian_flow.protocol import Pair

UNFINISHED = (JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.COMMITTING)

ALONE_AFTER = 2
"""After so many crashes of the daemon during a job, the job runs with no other beside it."""

LONGEST_PAUSE_SECONDS = 3600.0
"""No job waits longer for its next attempt. A job whose `not_before` is further away was queued
before the clock was set back: it is due."""

# `+status` where ids are given: SQLite would look through the index of the status instead.

_DUE = "status = 'QUEUED' AND (not_before <= :now OR not_before > :now + :longest_pause)"

SAME_ARTIFACT = """
SELECT other.id FROM cf_plugin this JOIN cf_plugin other
ON other.name = this.name AND other.artifact_hash = this.artifact_hash WHERE this.id = :plugin_id
"""
"""The plugin's versions with the bytes of `:plugin_id`: a new version of the same bytes is a new
label, and has worked what they have."""

_AFRESH = "status = 'QUEUED', attempts = 0, not_before = 0.0, reason = '', finished_at = NULL"
"""Queued, and its attempts count from 0."""

_INSERT = """
INSERT INTO cf_processing_queue
    (id, file_version_id, plugin_id, plugin_name, priority, created_at,
     status, fence, attempts, not_before, reason)
SELECT 1 + max((SELECT coalesce(max(id), 0) FROM cf_processing_queue),
               (SELECT coalesce(max(job_id), 0) FROM cf_id_floor)),
       :version_id, :plugin_id, :plugin_name, :priority, :now, 'QUEUED', 0, 0, 0.0, ''
"""
"""A new id is above every other, and above those that an earlier ledger has given."""


def _now() -> str:
    return utcnow().isoformat(" ")


def _insert(
    connection: Connection, statement: str, pairs: Sequence[tuple[int, JobRequest]], now: str
) -> list[int]:
    """Run an INSERT for each pair; the ids of the jobs it made.

    The driver returns no ids from many statements at once.
    """
    last = execute(connection, "SELECT coalesce(max(id), 0) FROM cf_processing_queue").scalar_one()
    execute_many(
        connection,
        statement,
        [{"version_id": version, "now": now, **request._asdict()} for version, request in pairs],
    )
    return returned_ids(
        connection, "SELECT id FROM cf_processing_queue WHERE id > :last", last=last
    )


def enqueue(connection: Connection, pairs: Sequence[tuple[int, JobRequest]], now: str) -> list[int]:
    """Queue a job for each (version id, job) whose plugin has none for the version; the new ids."""
    return _insert(
        connection,
        f"""
        {_INSERT}
        WHERE NOT EXISTS (SELECT 1 FROM cf_processing_queue
                          WHERE file_version_id = :version_id AND plugin_name = :plugin_name)
        """,  # noqa: S608
        pairs,
        now,
    )


def enqueue_again(
    connection: Connection, pairs: Sequence[tuple[int, JobRequest]], now: str
) -> list[int]:
    """Queue jobs for versions that another artifact of the plugin has already processed; the new
    ids. Only on a user's request."""
    return _insert(
        connection,
        f"""
        {_INSERT}
        WHERE NOT EXISTS (SELECT 1 FROM cf_processing_queue
                          WHERE file_version_id = :version_id AND plugin_name = :plugin_name
                            AND (plugin_id IN ({SAME_ARTIFACT})
                                 OR status IN ('QUEUED', 'RUNNING', 'COMMITTING')))
        """,  # noqa: S608
        pairs,
        now,
    )


def enqueue_first(
    connection: Connection, pairs: Sequence[tuple[int, JobRequest]], now: str
) -> list[int]:
    """Queue jobs for versions that the artifact has not processed, whatever others do; the new
    ids."""
    return _insert(
        connection,
        f"""
        {_INSERT}
        WHERE NOT EXISTS (SELECT 1 FROM cf_processing_queue
                          WHERE file_version_id = :version_id AND plugin_name = :plugin_name
                            AND plugin_id IN ({SAME_ARTIFACT}))
        """,  # noqa: S608
        pairs,
        now,
    )


def claim(
    connection: Connection, worker: str, epoch: int, limit: int, avoid: Iterable[int] = ()
) -> list[int]:
    """Take up to `limit` due jobs, highest priority first, and count an attempt of each.

    Args:
        avoid: ids of plugins whose sinks are unavailable.
    """
    return returned_ids(
        connection,
        f"""
        WITH due AS (
            SELECT id, priority, crashes FROM cf_processing_queue
            WHERE {_DUE}
              AND plugin_id NOT IN (SELECT value FROM json_each(:avoid))
            ORDER BY priority DESC, id LIMIT :limit
        ),
        running AS (
            SELECT count(*) AS jobs, coalesce(max(crashes), 0) AS crashes
            FROM cf_processing_queue WHERE status = 'RUNNING'
        ),
        -- A suspect, a job with `alone_after` crashes or more, keeps its place in the queue and
        -- runs alone: it waits until nothing runs, and the jobs behind it wait until it ends.
        in_order AS (
            SELECT id, row_number() OVER (ORDER BY priority DESC, id) AS place,
                   max(crashes) OVER (ORDER BY priority DESC, id) AS crashes_up_to_here
            FROM due
        ),
        admitted AS (
            SELECT in_order.id FROM in_order, running
            WHERE running.crashes < :alone_after
              AND (crashes_up_to_here < :alone_after OR (place = 1 AND running.jobs = 0))
        )
        UPDATE cf_processing_queue
        SET status = 'RUNNING', worker = :worker, epoch = :epoch,
            fence = fence + 1, attempts = attempts + 1, reason = ''
        WHERE id IN (SELECT id FROM admitted)
        RETURNING id
        """,  # noqa: S608
        worker=worker, epoch=epoch, limit=limit, avoid=list(avoid), now=time.time(),
        longest_pause=LONGEST_PAUSE_SECONDS, alone_after=ALONE_AFTER,
    )  # fmt: skip


def decide(connection: Connection, attempts: Sequence[Pair]) -> set[Pair]:
    """Let attempts (job id, fence) win: their outputs will be published from here on.

    Returns:
        Those whose jobs moved; the others came too late.
    """
    if not attempts:
        return set()
    decided = execute(
        connection,
        """
        UPDATE cf_processing_queue SET status = 'COMMITTING', worker = NULL
        WHERE status = 'RUNNING' AND (id, fence) IN
            (SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]')
             FROM json_each(:attempts))
        RETURNING id, fence
        """,
        attempts=attempts,
    )
    return {(row.id, row.fence) for row in decided}


def complete(connection: Connection, job_ids: Sequence[int]) -> list[int]:
    """Finish decided jobs whose outputs are all published."""
    return returned_ids(
        connection,
        """
        UPDATE cf_processing_queue SET status = 'COMPLETED', reason = '', finished_at = :now
        WHERE status = 'COMMITTING' AND id IN (SELECT value FROM json_each(:job_ids))
        RETURNING id
        """,
        job_ids=job_ids,
        now=_now(),
    )


def refuse(connection: Connection, job_id: int, reason: str) -> None:
    """End a decided job whose output a sink will never take; what is published stays recorded."""
    execute(
        connection,
        """
        UPDATE cf_processing_queue SET status = 'FAILED', reason = :reason, finished_at = :now
        WHERE status = 'COMMITTING' AND id = :job_id
        """,
        job_id=job_id,
        reason=reason,
        now=_now(),
    )


OVERTAKEN = "a rebuild of its plugin was completed while it ran"
"""The reason of a job at work that is queued again if it fails: what the rebuild has mended, such
as a column's type, may have been in its way."""


def overtake(connection: Connection, plugin_ids: Collection[int]) -> None:
    """Note that a rebuild was completed while jobs of these plugins were at work."""
    execute(
        connection,
        """
        UPDATE cf_processing_queue SET reason = :reason
        WHERE status IN ('RUNNING', 'COMMITTING')
          AND plugin_id IN (SELECT value FROM json_each(:plugin_ids))
        """,
        plugin_ids=plugin_ids,
        reason=OVERTAKEN,
    )


def overtaken(connection: Connection, job_ids: Collection[int]) -> list[int]:
    """Those of these jobs at work of which `overtake` has noted that."""
    return returned_ids(
        connection,
        """
        SELECT id FROM cf_processing_queue
        WHERE +status IN ('RUNNING', 'COMMITTING') AND reason = :reason
          AND id IN (SELECT value FROM json_each(:job_ids))
        """,
        job_ids=job_ids,
        reason=OVERTAKEN,
    )


def requeue(
    connection: Connection, job_id: int, fence: int, *,
    reason: str, delay_seconds: float = 0.0, refund: bool = False, crashed: bool = False,
) -> bool:  # fmt: skip
    """Give the job back to the queue; False if the fence is stale.

    Args:
        delay_seconds: pause before it can be claimed again.
        refund: the attempt was not the job's fault and does not count.
        crashed: the daemon crashed while the job ran.
    """
    requeued = execute(
        connection,
        """
        UPDATE cf_processing_queue
        SET status = 'QUEUED', worker = NULL, not_before = :not_before, reason = :reason,
            attempts = attempts - :refund, crashes = crashes + :crashed
        WHERE status = 'RUNNING' AND id = :job_id AND fence = :fence
        """,
        job_id=job_id, fence=fence, reason=reason, refund=refund, crashed=crashed,
        not_before=time.time() + min(delay_seconds, LONGEST_PAUSE_SECONDS),
    )  # fmt: skip
    return requeued.rowcount == 1


def fail(connection: Connection, job_id: int, fence: int, reason: str) -> bool:
    """End the job, unless a user retries it; False if the fence is stale."""
    failed = execute(
        connection,
        """
        UPDATE cf_processing_queue
        SET status = 'FAILED', worker = NULL, reason = :reason, finished_at = :now
        WHERE status = 'RUNNING' AND id = :job_id AND fence = :fence
        """,
        job_id=job_id, fence=fence, reason=reason, now=_now(),
    )  # fmt: skip
    return failed.rowcount == 1


def supersede(connection: Connection, job_id: int, fence: int, reason: str) -> bool:
    """End the job: its version's bytes are gone or changed. False if the fence is stale."""
    superseded = execute(
        connection,
        """
        UPDATE cf_processing_queue
        SET status = 'SUPERSEDED', worker = NULL, reason = :reason, finished_at = :now
        WHERE status = 'RUNNING' AND id = :job_id AND fence = :fence
        """,
        job_id=job_id, fence=fence, reason=reason, now=_now(),
    )  # fmt: skip
    return superseded.rowcount == 1


def abort(connection: Connection, job_ids: Sequence[int], who: str) -> list[int]:
    """End queued and running jobs at a user's request; decided jobs are left alone.

    It also records the end of running attempts: the receipt that they may still send is too late.
    """
    reason, now = f"aborted by {who}", _now()
    execute(
        connection,
        """
        INSERT INTO cf_attempt
            (job_id, fence, epoch, worker, outcome, error, log, seconds, ended_at)
        SELECT id, fence, epoch, worker, 'ABORTED', :reason, '', 0.0, :now
        FROM cf_processing_queue
        WHERE +status = 'RUNNING' AND id IN (SELECT value FROM json_each(:job_ids))
        ORDER BY worker, id
        """,
        job_ids=job_ids, reason=reason, now=now,
    )  # fmt: skip
    return returned_ids(
        connection,
        """
        UPDATE cf_processing_queue
        SET status = 'ABORTED', worker = NULL, reason = :reason, finished_at = :now
        WHERE +status IN ('QUEUED', 'RUNNING') AND id IN (SELECT value FROM json_each(:job_ids))
        RETURNING id
        """,
        job_ids=job_ids, reason=reason, now=now,
    )  # fmt: skip


def retry(connection: Connection, job_ids: Sequence[int]) -> list[int]:
    """Queue failed and aborted jobs, and superseded ones whose bytes the store has; their attempts
    count from 0."""
    return returned_ids(
        connection,
        f"""
        UPDATE cf_processing_queue
        SET {_AFRESH}
        WHERE id IN (SELECT value FROM json_each(:job_ids))
          AND (status IN ('FAILED', 'ABORTED') OR status = 'SUPERSEDED' AND EXISTS (
              SELECT 1 FROM cf_file_version v
              JOIN cf_kept_content k ON k.content_hash = v.content_hash
              WHERE v.id = file_version_id))
        RETURNING id
        """,  # noqa: S608
        job_ids=job_ids,
    )


def give_up(connection: Connection, yielded: Sequence[tuple[int, str, str]]) -> None:
    """Abort the queued jobs of catch-all plugins whose file a table has taken, but for those of an
    open rebuild: the rows that they replace stay.

    Args:
        yielded: version id, catch-all plugin and table, each.
    """
    execute_many(
        connection,
        """
        UPDATE cf_processing_queue SET status = 'ABORTED', reason = ?, finished_at = ?
        WHERE file_version_id = ? AND plugin_name = ? AND +status = 'QUEUED'
          AND NOT EXISTS (SELECT 1 FROM cf_rebuild_job m JOIN cf_rebuild b ON b.id = m.rebuild_id
                          WHERE m.job_id = cf_processing_queue.id AND b.ended_at IS NULL)
        """,
        [(f"{TAKEN}{table}", _now(), version, plugin) for version, plugin, table in yielded],
    )


def take_back(connection: Connection, wanted: Sequence[tuple[int, str]]) -> list[int]:
    """Queue the jobs again that were aborted because a table had taken the file; their ids.

    Args:
        wanted: version id and plugin, each.
    """
    rows = execute(
        connection,
        f"""
        SELECT id, file_version_id, plugin_name FROM cf_processing_queue
        WHERE +status = 'ABORTED' AND reason GLOB '{TAKEN}*'
          AND file_version_id IN (SELECT value FROM json_each(:versions))
        """,  # noqa: S608
        versions={version for version, _ in wanted},
    ).all()
    pairs = set(wanted)
    return retry(
        connection, [row.id for row in rows if (row.file_version_id, row.plugin_name) in pairs]
    )


def revive(connection: Connection, version_ids: Sequence[int]) -> list[int]:
    """Queue the superseded jobs of versions whose bytes a scan has found in their files again."""
    return returned_ids(
        connection,
        f"""
        UPDATE cf_processing_queue
        SET {_AFRESH}
        WHERE status = 'SUPERSEDED'
          AND file_version_id IN (SELECT value FROM json_each(:version_ids))
        RETURNING id
        """,  # noqa: S608
        version_ids=version_ids,
    )


def restore(connection: Connection, job_ids: Sequence[int]) -> list[int]:
    """Queue completed jobs whose sink has lost their output, at a user's request."""
    return returned_ids(
        connection,
        f"""
        UPDATE cf_processing_queue
        SET {_AFRESH}
        WHERE +status = 'COMPLETED' AND id IN (SELECT value FROM json_each(:job_ids))
        RETURNING id
        """,  # noqa: S608
        job_ids=job_ids,
    )


_NEXT_GENERATION = """
1 + max(generation,
        coalesce((SELECT max(o.generation) FROM cf_output o
                  WHERE o.job_id = cf_processing_queue.id), 0),
        coalesce((SELECT max(m.generation) FROM cf_rebuild_job m
                  WHERE m.job_id = cf_processing_queue.id), 0))
"""
"""A generation of which the job has made no output, and no rebuild has asked for any."""


def rebuild(connection: Connection, job_ids: Sequence[int]) -> list[int]:
    """Queue jobs so that they make a new generation of their outputs; those of before stay."""
    return returned_ids(
        connection,
        f"""
        UPDATE cf_processing_queue SET {_AFRESH}, generation = {_NEXT_GENERATION}
        WHERE +status NOT IN ('RUNNING', 'COMMITTING')
          AND id IN (SELECT value FROM json_each(:job_ids))
        RETURNING id
        """,  # noqa: S608
        job_ids=job_ids,
    )


_PUBLISHED_BEFORE = """
SELECT o.generation, o.published_at FROM cf_output o
WHERE o.job_id = cf_processing_queue.id AND o.state = 'PUBLISHED'
  AND o.generation < cf_processing_queue.generation
"""


def put_back(connection: Connection, job_ids: Sequence[int], reason: str) -> None:
    """Take jobs out of their rebuild: COMPLETED as before it, where they have older outputs; else
    ABORTED for this reason, and a retry makes outputs that nobody has removed."""
    these = "id IN (SELECT value FROM json_each(:job_ids))"
    ended = "'COMPLETED', 'FAILED', 'ABORTED', 'SUPERSEDED'"
    execute(
        connection,
        f"""
        UPDATE cf_processing_queue SET {_AFRESH} WHERE +status IN ({ended}) AND {these}
        """,  # noqa: S608
        job_ids=job_ids,
    )
    execute(
        connection,
        f"""
        UPDATE cf_processing_queue
        SET status = 'COMPLETED',
            finished_at = (SELECT max(published_at) FROM ({_PUBLISHED_BEFORE})),
            generation = (SELECT max(generation) FROM ({_PUBLISHED_BEFORE}))
        WHERE +status = 'QUEUED' AND {these} AND EXISTS ({_PUBLISHED_BEFORE})
        """,  # noqa: S608
        job_ids=job_ids,
    )
    execute(
        connection,
        f"""
        UPDATE cf_processing_queue
        SET status = 'ABORTED', reason = :reason, finished_at = :now,
            generation = {_NEXT_GENERATION}
        WHERE +status = 'QUEUED' AND {these}
        """,  # noqa: S608
        job_ids=job_ids,
        reason=reason,
        now=_now(),
    )


def set_reason(connection: Connection, job_ids: Sequence[int], reason: str) -> None:
    """Say why decided jobs are not completed yet."""
    execute(
        connection,
        """
        UPDATE cf_processing_queue SET reason = :reason
        WHERE status = 'COMMITTING' AND id IN (SELECT value FROM json_each(:job_ids))
        """,
        job_ids=job_ids,
        reason=reason,
    )


# Queries.


def describe(connection: Connection, job_ids: Sequence[int]) -> Sequence[Any]:
    """What a worker must know of claimed jobs, in the order they should run."""
    return execute(
        connection,
        """
        SELECT j.id, j.fence, j.attempts, j.generation, j.plugin_id, p.name AS plugin_name,
               p.version AS plugin_version, p.artifact_hash,
               CAST(coalesce(nullif(p.manifest, ''), (
                   SELECT whole.manifest FROM cf_plugin whole  -- of the same bytes, for a stub
                   WHERE whole.name = p.name AND whole.artifact_hash = p.artifact_hash
                     AND whole.manifest <> '' ORDER BY whole.id DESC LIMIT 1
               ), '') AS BLOB) AS manifest,  -- text may be damaged
               v.id AS version_id, v.ordinal, v.content_hash, v.size_bytes,
               l.path, l.rel_path, r.id AS root_id, r.name AS source, r.path AS root_path,
               k.id AS kept_id, k.in_file AS kept_in_file
        FROM cf_processing_queue j
        JOIN cf_plugin p ON p.id = j.plugin_id
        JOIN cf_file_version v ON v.id = j.file_version_id
        JOIN cf_file_location l ON l.id = v.location_id
        JOIN cf_source_root r ON r.id = l.source_root_id
        LEFT JOIN cf_kept_content k ON k.content_hash = v.content_hash
        WHERE j.id IN (SELECT value FROM json_each(:job_ids))
        ORDER BY j.priority DESC, j.id
        """,
        job_ids=job_ids,
    ).all()


def orphans(connection: Connection, epoch: int) -> Sequence[Any]:
    """RUNNING jobs of earlier epochs, whose daemon is dead: the caller holds the daemon lock."""
    return execute(
        connection,
        """
        SELECT id, fence, attempts, crashes, epoch, worker FROM cf_processing_queue
        WHERE status = 'RUNNING' AND epoch < :epoch ORDER BY worker, id
        """,
        epoch=epoch,
    ).all()


def running(connection: Connection, attempts: Iterable[Pair]) -> Sequence[Any]:
    """The attempts (job id, fence) that the ledger has as RUNNING, by worker."""
    return execute(
        connection,
        """
        SELECT id, fence, attempts, crashes, epoch, worker FROM cf_processing_queue
        WHERE status = 'RUNNING' AND (id, fence) IN
            (SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]')
             FROM json_each(:attempts))
        ORDER BY worker, id
        """,
        attempts=list(attempts),
    ).all()


def claimable(connection: Connection) -> bool:
    """Whether any job is due."""
    due = execute(
        connection,
        f"SELECT 1 FROM cf_processing_queue WHERE {_DUE} LIMIT 1",  # noqa: S608
        now=time.time(),
        longest_pause=LONGEST_PAUSE_SECONDS,
    )
    return due.first() is not None


def counts(connection: Connection) -> dict[str, int]:
    """Jobs in each status that has any."""
    query = "SELECT status, count(*) AS jobs FROM cf_processing_queue GROUP BY status"
    return {row.status: row.jobs for row in execute(connection, query)}


def counts_of(connection: Connection, job_ids: Sequence[int]) -> dict[str, int]:
    """These jobs in each status that has any of them."""
    rows = execute(
        connection,
        """
        SELECT status, count(*) AS jobs FROM cf_processing_queue
        WHERE id IN (SELECT value FROM json_each(:job_ids)) GROUP BY status
        """,
        job_ids=job_ids,
    )
    return {row.status: row.jobs for row in rows}


def status(connection: Connection, job_id: int) -> str | None:
    """The job's status; None: no such job."""
    query = "SELECT status FROM cf_processing_queue WHERE id = :job_id"
    found: str | None = execute(connection, query, job_id=job_id).scalar()
    return found


def attempt_count(connection: Connection, job_id: int) -> int:
    """Attempts counted against the job so far, with the running one; 0: no such job."""
    query = "SELECT attempts FROM cf_processing_queue WHERE id = :job_id"
    return execute(connection, query, job_id=job_id).scalar() or 0


# Adopting jobs: a sink has what they give, and this ledger has not seen them run (`db.adopt`).


class AdoptedJob(NamedTuple):
    """A job of an earlier ledger."""

    id: int
    version_id: int
    plugin_id: int
    plugin_name: str


def adopt(connection: Connection, adopted: Sequence[AdoptedJob]) -> None:
    """Record jobs as COMPLETED; the caller records their outputs."""
    now = _now()
    execute_many(
        connection,
        """
        INSERT INTO cf_processing_queue
            (id, file_version_id, plugin_id, plugin_name, priority, created_at, finished_at,
             status, fence, attempts, not_before, reason)
        VALUES (?, ?, ?, ?, 0, ?, ?, 'COMPLETED', 0, 0, 0.0, '')
        """,
        [(*job, now, now) for job in adopted],
    )


def take_over(connection: Connection, job_ids: Sequence[int]) -> list[int]:
    """Complete jobs that do not run, whose outputs were adopted."""
    return returned_ids(
        connection,
        """
        UPDATE cf_processing_queue SET status = 'COMPLETED', reason = '', finished_at = :now
        WHERE +status IN ('QUEUED', 'FAILED', 'ABORTED', 'SUPERSEDED')
          AND id IN (SELECT value FROM json_each(:job_ids))
        RETURNING id
        """,
        job_ids=job_ids,
        now=_now(),
    )


def renumber(connection: Connection, old: int, new: int) -> None:
    """Give the queued jobs of a version to a later one with the same content; a plugin that has a
    job for that has processed it."""
    now = _now()
    waiting = execute(
        connection,
        "SELECT plugin_id, plugin_name, priority FROM cf_processing_queue "
        "WHERE +status = 'QUEUED' AND file_version_id = :old ORDER BY id",
        old=old,
    ).all()
    enqueue(connection, [(new, JobRequest(**row._asdict())) for row in waiting], now)
    execute(
        connection,
        """
        UPDATE cf_processing_queue SET status = 'SUPERSEDED', finished_at = :now,
            reason = 'sinks had versions of the file that the ledger did not know: this content '
                     || 'is version '
                     || (SELECT ordinal FROM cf_file_version WHERE id = :new) || ' now'
        WHERE +status = 'QUEUED' AND file_version_id = :old
        """,
        old=old,
        new=new,
        now=now,
    )


# The history of attempts: one row each, written when it ends, never changed.


class AttemptResult(NamedTuple):
    """How an attempt ended; `db.models.Attempt` has the meanings of the fields."""

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


def add_attempts(connection: Connection, epoch: int, results: Sequence[AttemptResult]) -> None:
    """Record how attempts of an epoch ended."""
    now = _now()
    execute_many(
        connection,
        """
        INSERT INTO cf_attempt
            (epoch, ended_at, job_id, fence, worker, outcome, error, log, seconds, sandbox,
             fault, signal, exit_code, batches, rows, max_rss_bytes, cpu_seconds)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
        """,
        [(epoch, now, *result) for result in results],
    )


def counted_attempts(connection: Connection, job_id: int, number: int) -> Sequence[Any]:
    """The last attempts that count against the job: outcome, fault, error.

    Args:
        number: how many at most. Released and aborted attempts do not count.
    """
    return execute(
        connection,
        """
        SELECT outcome, fault, error FROM cf_attempt
        WHERE job_id = :job_id AND outcome IN ('FAILED', 'LOST')
        ORDER BY fence DESC LIMIT :number
        """,
        job_id=job_id,
        number=number,
    ).all()
