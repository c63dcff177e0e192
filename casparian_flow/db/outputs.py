"""Outputs: planned when a job is decided, marked as published by the Committer, and listed.

What a person changes about them is in `services.outputs`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from casparian_flow.db import debts, jobs, visibility
from casparian_flow.db.access import Connection, Page, execute, execute_many, page, returned_ids
from casparian_flow.db.states import REMOVED, TAKEN, JobStatus, OutputState, utcnow
from casparian_flow.errors import counted
from casparian_flow.protocol import Output as OutputRecord


def plan(connection: Connection, decided: Sequence[tuple[int, list[OutputRecord]]]) -> None:
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
                               target, rows, size_bytes, digest, generation)
        VALUES (?, ?, ?, ?, ?, ?, ?, 'PLANNED', ?, '', ?, ?, ?, ?)
        ON CONFLICT (job_id, topic, uri, generation) DO NOTHING
        """,
        [
            (job_id, o.topic, o.uri, o.location, o.mode, o.output_key, o.location_slot, o.stage,
             o.rows, o.size_bytes, o.digest, o.generation)
            for job_id, staged in decided
            for o in staged
        ],
    )  # fmt: skip


def stages(connection: Connection, job_ids: Sequence[int] | None = None) -> set[str]:
    """The staged files that are still to be published.

    Args:
        job_ids: for these jobs; None means for all decided ones.
    """
    decided = "SELECT id FROM cf_processing_queue WHERE status = :committing"
    which = decided if job_ids is None else _LISTED
    query = f"""
        SELECT stage FROM cf_output
        WHERE state = :planned AND stage <> '' AND job_id IN ({which})
        """  # noqa: S608
    found = execute(
        connection, query, planned=OutputState.PLANNED, committing=JobStatus.COMMITTING,
        ids=job_ids or (),
    )  # fmt: skip
    return set(found.scalars())


_LISTED = "SELECT value FROM json_each(:ids)"


def all_published(connection: Connection) -> list[int]:
    """Decided jobs whose outputs are all published: they only have to be completed."""
    query = """
        SELECT j.id FROM cf_processing_queue j WHERE j.status = :committing AND NOT EXISTS (
            SELECT 1 FROM cf_output o WHERE o.job_id = j.id AND o.state <> :published)
        """
    return returned_ids(
        connection, query, committing=JobStatus.COMMITTING, published=OutputState.PUBLISHED
    )


def mark_published(connection: Connection, done: Mapping[int, OutputRecord]) -> None:
    """Record that these outputs are in their sinks, by id, in the states that they have there."""
    if not done:
        return
    now = utcnow().isoformat(" ")
    execute_many(
        connection,
        "UPDATE cf_output SET state = ?, target = ?, rows = ?, digest = ?, published_at = ? "
        "WHERE id = ?",
        [
            (OutputState.PUBLISHED, o.target, o.rows, o.digest, now, number)
            for number, o in done.items()
        ],
    )
    debts.published(connection, done)


def given(connection: Connection, job_ids: Sequence[int]) -> dict[int, list[str]]:
    """Job id -> a text for each of its published outputs with rows: topic, sink and how many."""
    found: dict[int, list[str]] = {job_id: [] for job_id in job_ids}
    query = f"""
        SELECT job_id, topic, uri, rows FROM cf_output
        WHERE job_id IN ({_LISTED}) AND state = :published AND rows > 0 ORDER BY id
        """  # noqa: S608
    rows = execute(connection, query, ids=job_ids, published=OutputState.PUBLISHED)
    for job_id, topic, uri, count in rows:
        found[job_id].append(f"{topic} in {uri}: {counted(count, 'row')}")
    return found


def mark_refused(connection: Connection, job_ids: Sequence[int]) -> list[str]:
    """Record that nothing more of these jobs will be published, since a sink will never take an
    output of theirs; the staged files that nobody needs any more."""
    if not job_ids:
        return []
    statement = f"""
        UPDATE cf_output SET state = :refused
        WHERE job_id IN ({_LISTED}) AND state = :planned RETURNING stage
        """  # noqa: S608
    refused = execute(
        connection, statement, ids=job_ids,
        planned=OutputState.PLANNED, refused=OutputState.REFUSED,
    )  # fmt: skip
    return [stage for stage in refused.scalars() if stage]


def forget(connection: Connection, keys: Sequence[str]) -> None:
    """Expect these outputs in their sinks no more. The caller decides anew what stands."""
    now = utcnow().isoformat(" ")
    execute_many(
        connection,
        "INSERT INTO cf_forgotten_output (output_key, forgotten_at) VALUES (?, ?)",
        [(key, now) for key in keys],
    )


def retract(connection: Connection, version_ids: Sequence[int], *, undo: bool) -> None:
    """Hide the rows of these versions, or cease to. The caller decides anew what stands."""
    ids = [(number,) for number in version_ids]
    execute_many(connection, "DELETE FROM cf_retracted_version WHERE file_version_id = ?", ids)
    if not undo:
        now = utcnow().isoformat(" ")
        execute_many(
            connection,
            "INSERT INTO cf_retracted_version (file_version_id, retracted_at) VALUES (?, ?)",
            [(number, now) for number in version_ids],
        )


# Making an output again that its sink has no more.


def restore(connection: Connection, output_ids: Sequence[int]) -> list[int]:
    """Queue the completed jobs of published outputs again, which then publish them; the jobs.

    What stands without them is decided anew.
    """
    wanted = f"SELECT DISTINCT job_id FROM cf_output WHERE id IN ({_LISTED})"  # noqa: S608
    queued = jobs.restore(connection, returned_ids(connection, wanted, ids=output_ids))
    these = f"""
        SELECT id, output_key FROM cf_output WHERE id IN ({_LISTED}) AND state = :published
        AND job_id IN (SELECT value FROM json_each(:queued))
        """  # noqa: S608
    owed = execute(
        connection, these, ids=output_ids, queued=queued, published=OutputState.PUBLISHED
    ).all()
    keys = [(row.output_key,) for row in owed]
    numbers = [(row.id,) for row in owed]
    execute_many(connection, "DELETE FROM cf_forgotten_output WHERE output_key = ?", keys)
    execute_many(connection, "DELETE FROM cf_visibility WHERE output_id = ?", numbers)
    execute_many(connection, "DELETE FROM cf_left_output WHERE output_id = ?", numbers)
    execute_many(
        connection,
        "UPDATE cf_output SET state = 'PLANNED', published_at = NULL, target = '' WHERE id = ?",
        numbers,
    )
    visibility.refresh(connection, visibility.of_jobs(connection, queued))
    return queued


def restore_removed(connection: Connection, plugin: str) -> list[int]:
    """Queue the jobs of a plugin's active artifact whose outputs were removed as replaced, where
    they would stand now; the jobs."""
    ids = returned_ids(
        connection,
        f"""
        SELECT o.id FROM cf_visibility s JOIN cf_output o ON o.id = s.output_id
        JOIN cf_processing_queue j ON j.id = o.job_id
        JOIN cf_plugin p ON p.id = j.plugin_id
        WHERE s.state = :removed AND j.plugin_name = :plugin AND j.status = 'COMPLETED'
        AND o.output_key NOT IN (SELECT output_key FROM cf_forgotten_output)
        AND o.id NOT IN (SELECT output_id FROM cf_left_output) AND NOT {visibility.CANCELLED}
        AND j.file_version_id NOT IN (SELECT file_version_id FROM cf_retracted_version)
        AND p.artifact_hash = (
            SELECT a.artifact_hash FROM cf_plugin_config c
            JOIN cf_plugin a ON a.name = c.plugin_name AND a.version = c.active_version
            WHERE c.plugin_name = :plugin)
        AND NOT EXISTS (
            SELECT 1 FROM cf_processing_queue k JOIN cf_plugin q ON q.id = k.plugin_id
            JOIN cf_output n ON n.job_id = k.id JOIN cf_visibility t ON t.output_id = n.id
            WHERE k.file_version_id = j.file_version_id AND k.plugin_name = j.plugin_name
            AND n.topic = o.topic AND n.location = o.location AND t.state <> :removed
            AND q.artifact_hash = p.artifact_hash)
        """,  # noqa: S608
        removed=REMOVED,
        plugin=plugin,
    )
    return restore(connection, ids) if ids else []


# Lists.


STATE = """
CASE WHEN o.state <> 'PUBLISHED' THEN o.state
     WHEN o.output_key IN (SELECT output_key FROM cf_forgotten_output) THEN 'FORGOTTEN'
     ELSE upper(coalesce(s.state, 'hidden')) END
"""
"""The state of the output `o` as users see it: PLANNED and REFUSED before it is published, then
FORGOTTEN or what its row `s` of `cf_visibility` has, in capitals."""

NAMED = f"""
SELECT o.id, o.output_key, o.topic, o.location, o.target, o.rows, o.job_id, j.status,
       r.name AS source, r.path AS root_path, l.path, l.rel_path, v.id AS version_id, v.ordinal,
       v.content_hash, {STATE} AS state,
       v.content_hash IN (SELECT content_hash FROM cf_kept_content) AS kept,
       EXISTS (SELECT 1 FROM cf_gone_version g
               WHERE g.file_version_id = v.id AND g.to_version_id IS NOT NULL) AS has_moved
FROM cf_output o JOIN cf_processing_queue j ON j.id = o.job_id
JOIN cf_file_version v ON v.id = j.file_version_id
JOIN cf_file_location l ON l.id = v.location_id
JOIN cf_source_root r ON r.id = l.source_root_id
LEFT JOIN cf_visibility s ON s.output_id = o.id
WHERE o.state = 'PUBLISHED'
"""  # noqa: S608
"""Every published output."""


def locations(connection: Connection) -> list[str]:
    """The sinks that have had outputs."""
    return list(connection.execute("SELECT DISTINCT location FROM cf_output").scalars())


def listed(connection: Connection, limit: int | None, topic: str | None) -> Page:
    """Published outputs, the newest first, as people and programs look at them."""
    query = f"""
        SELECT job_id AS job, topic, state, rows, source, rel_path, ordinal AS version,
               CASE WHEN rows THEN target ELSE '' END AS target, location AS sink, output_key
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
            AND +p.state = 'PUBLISHED'
            AND (p.generation > o.generation OR p.generation = o.generation AND p.id < o.id)
            {condition})
"""
"""Of the outputs of a job in one topic, the one that is counted: of the last rebuild. The `+` keeps
SQLite from looking through every output of the topic, where the job has a few."""


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


_SHOWN = f"SELECT s.output_id FROM cf_visibility s WHERE {visibility.SHOWN}"  # noqa: S608


def rejected_shown(connection: Connection) -> Rejected:
    """What readers may see, of all jobs; a topic in several sinks counts once."""
    _, rows, rejects = _seen(connection, _SHOWN)
    return Rejected(rows, rejects)


class Seen(NamedTuple):
    """Files, and what readers may see of them; a topic in several sinks counts once."""

    files: int
    rows: int
    rejects: int


def of_gone(connection: Connection) -> Seen:
    """The files that are gone, deleted or passed over, and have rows that readers may see."""
    return _seen(
        connection,
        f"""
        SELECT s.output_id FROM cf_file_location l
        JOIN cf_file_version v ON v.location_id = l.id
        JOIN cf_processing_queue j ON j.file_version_id = v.id
        JOIN cf_output o ON o.job_id = j.id JOIN cf_visibility s ON s.output_id = o.id
        WHERE l.gone_at IS NOT NULL AND o.rows > 0 AND {visibility.SHOWN}
        """,  # noqa: S608
    )


def stale(connection: Connection) -> Seen:
    """The present files whose rows are of an earlier version than the plugin is to work, or has
    failed at. The `+` keeps SQLite from reading every completed job."""
    return _seen(
        connection,
        f"""
        SELECT s.output_id FROM cf_processing_queue unworked
        JOIN cf_file_version newer ON newer.id = unworked.file_version_id
        JOIN cf_file_location l ON l.id = newer.location_id AND l.gone_at IS NULL
        JOIN cf_file_version v ON v.location_id = l.id AND v.ordinal < newer.ordinal
        JOIN cf_processing_queue j
            ON j.file_version_id = v.id AND j.plugin_name = unworked.plugin_name
        JOIN cf_output o ON o.job_id = j.id JOIN cf_visibility s ON s.output_id = o.id
        WHERE unworked.status IN
            ('QUEUED', 'RUNNING', 'COMMITTING', 'FAILED', 'ABORTED', 'SUPERSEDED')
        AND NOT (unworked.status = 'ABORTED' AND unworked.reason GLOB '{TAKEN}*')
        AND s.state = 'current' AND o.rows > 0 AND NOT EXISTS (
            SELECT 1 FROM cf_file_version w JOIN cf_processing_queue k ON k.file_version_id = w.id
            WHERE w.location_id = l.id AND w.ordinal >= newer.ordinal
            AND k.plugin_name = unworked.plugin_name AND +k.status = 'COMPLETED')
        """,  # noqa: S608
    )


def of_plugins(connection: Connection, plugins: Sequence[str]) -> dict[str, Seen]:
    """Plugin -> the files of which readers may see rows that it gave; none where they see none."""
    query = f"""
        WITH chosen AS MATERIALIZED ({_OF_PLUGINS})
        SELECT j.plugin_name, {_SUMS} {_CHOSEN} GROUP BY 1
        """
    found = connection.execute(query, {"plugins": json.dumps(list(plugins))})
    return {plugin: Seen(*counts) for plugin, *counts in found}


def left_to_tables(
    connection: Connection, tables: Sequence[str], plugins: Sequence[str]
) -> dict[tuple[str, str], Seen]:
    """Table and plugin -> the files that the table has, or had, of which readers may see rows that
    the plugin gave."""
    query = f"""
        WITH chosen AS MATERIALIZED ({_OF_PLUGINS}), owned AS MATERIALIZED (
            SELECT DISTINCT w.location_id, k.plugin_name AS owner FROM cf_processing_queue k
            JOIN cf_file_version w ON w.id = k.file_version_id
            WHERE k.plugin_name IN (SELECT value FROM json_each(:tables)))
        SELECT owned.owner, j.plugin_name, {_SUMS}
        {_CHOSEN.replace(" WHERE", " JOIN owned ON owned.location_id = v.location_id WHERE")}
        GROUP BY 1, 2
        """  # noqa: S608
    names = {"tables": json.dumps(list(tables)), "plugins": json.dumps(list(plugins))}
    found = connection.execute(query, names)
    return {(table, plugin): Seen(*counts) for table, plugin, *counts in found}


_OF_PLUGINS = f"""
SELECT s.output_id FROM cf_visibility s JOIN cf_output o ON o.id = s.output_id
JOIN cf_processing_queue j ON j.id = o.job_id
WHERE j.plugin_name IN (SELECT value FROM json_each(:plugins)) AND o.rows > 0
AND {visibility.SHOWN}
"""  # noqa: S608

_SUMS = f"""
count(DISTINCT v.location_id),
coalesce(sum(CASE WHEN {_REJECTED} THEN 0 ELSE o.rows END), 0),
coalesce(sum(CASE WHEN {_REJECTED} THEN o.rows ELSE 0 END), 0)
"""

_CHOSEN = f"""
FROM cf_output o JOIN cf_processing_queue j ON j.id = o.job_id
JOIN cf_file_version v ON v.id = j.file_version_id
 WHERE o.id IN chosen AND {_FIRST.format(condition=" AND p.id IN chosen")}
"""


def _seen(connection: Connection, chosen: str) -> Seen:
    """
    Args:
        chosen: a query of the ids of outputs.
    """
    query = f"WITH chosen AS MATERIALIZED ({chosen}) SELECT {_SUMS} {_CHOSEN}"
    return Seen(*connection.execute(query).one())


_IS_SHOWN = f"""
EXISTS (SELECT 1 FROM cf_visibility s WHERE s.output_id = {{output}}.id AND {visibility.SHOWN})
"""  # noqa: S608

ROWS_OF_FILE = f"""
(SELECT coalesce(sum(o.rows), 0) FROM cf_file_version w
 JOIN cf_processing_queue j ON j.file_version_id = w.id JOIN cf_output o ON o.job_id = j.id
 WHERE w.location_id = l.id AND {_IS_SHOWN.format(output="o")}
 AND {_FIRST.format(condition=f" AND {_IS_SHOWN.format(output='p')}")})
"""  # noqa: S608
"""What readers may see of the location that the query calls `l`, rejects among it."""


def rejected_of_jobs(connection: Connection, job_ids: Sequence[int]) -> Rejected:
    """What came of these jobs."""
    query = f"""
        SELECT coalesce(sum({ROWS_COUNTED}), 0), coalesce(sum({REJECTS_COUNTED}), 0)
        FROM cf_processing_queue j WHERE j.id IN (SELECT value FROM json_each(:ids))
        """  # noqa: S608
    return Rejected(*connection.execute(query, {"ids": json.dumps(list(job_ids))}).one())


def rejected_since(connection: Connection, after: int) -> tuple[list[int], int]:
    """The jobs that were completed after this row of the audit; and the audit's last row."""
    last: int = connection.execute("SELECT coalesce(max(seq), 0) FROM cf_audit").scalar_one()
    query = (
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
