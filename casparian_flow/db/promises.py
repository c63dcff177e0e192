"""Whether readers see what they are promised, asked of the ledger's rows without `standing`.

For each present file and each plugin that its rules bring it to: the rows of its current version
are visible once, or the ledger has the reason. What a completed job gave is visible, or something
took its place. `visibility.differences` asks whether the rules were applied; this asks whether
their outcome is right, and so finds a fault of the rules themselves.
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterator

from casparian_flow.db import moves
from casparian_flow.db.access import Connection
from casparian_flow.db.routing import Routing
from casparian_flow.db.states import TAKEN
from casparian_flow.db.versions import route_text
from casparian_flow.db.visibility import CANCELLED, OPEN, query_of


def broken(connection: Connection) -> Iterator[str]:
    """A sentence for each promise that is not kept, with what to type."""
    yield from _without_job(connection)
    yield from _wrongly_seen(connection)
    yield from moves.broken(query_of(connection))


# A source root that was routed by other rules than today's waits for its next scan.
_PRESENT = """
SELECT r.name AS source, r.id AS root_id, l.path, l.rel_path, v.id, v.ordinal
FROM cf_source_root r CROSS JOIN cf_scan_state s ON s.source_root_id = r.id
CROSS JOIN cf_file_location l ON l.source_root_id = r.id
JOIN cf_file_version v ON v.id = l.current_version_id
WHERE r.active AND s.routed = :routed AND l.gone_at IS NULL
AND v.id NOT IN (SELECT file_version_id FROM cf_retracted_version)
ORDER BY l.id
"""

_JOBS = """
SELECT DISTINCT j.file_version_id, j.plugin_name
FROM cf_file_location l JOIN cf_processing_queue j ON j.file_version_id = l.current_version_id
WHERE l.gone_at IS NULL
"""


def _without_job(connection: Connection) -> Iterator[str]:
    """Present files whose current version lacks the job of a plugin that is to get it."""
    routing = Routing(connection)
    known: dict[int, set[str]] = defaultdict(set)
    for version, plugin in connection.exec_driver_sql(_JOBS):
        known[version].add(plugin)
    for row in connection.execute(_PRESENT, {"routed": routing.fingerprint}):
        for wanted in routing.job_requests(route_text(row.path), row.root_id):
            if wanted.plugin_name not in known[row.id]:
                yield (
                    f"{row.source}/{row.rel_path} version {row.ordinal} has no job of plugin "
                    f"{wanted.plugin_name}, to which a rule brings it (casparian backfill "
                    f"{wanted.plugin_name} --path {shlex.quote(row.rel_path)})"
                )


# One row for each version slot: (version, plugin, topic, sink). What a rebuild has not shown yet is
# not promised to readers, and what its jobs gave before stands until then; what one has left behind
# keeps its place and shows nothing.
_SLOTS = f"""
SELECT v.location_id, v.id AS version_id, v.ordinal, j.plugin_name, o.topic, o.location,
       max(o.job_id) AS job, group_concat(o.job_id, ' and ') AS jobs,
       sum(s.state = 'current') AS is_current,
       sum(s.state IN ('current', 'past')) AS is_seen,
       sum(s.state = 'retracted') AS is_hidden_on_request,
       sum(s.state IN ('current', 'past', 'retracted')) AS stand,
       sum(f.output_key IS NOT NULL) AS forgotten, sum(b.output_id IS NOT NULL) AS is_left,
       sum(s.state <> 'removed') AS in_sink,
       max(s.state <> 'removed' AND b.output_id IS NULL AND f.output_key IS NULL
           AND p.artifact_hash = a.artifact_hash) AS has_active,
       max(s.state IN ('current', 'past', 'retracted') AND p.artifact_hash = a.artifact_hash)
           AS active_stands
FROM cf_output o JOIN cf_processing_queue j ON j.id = o.job_id
JOIN cf_file_version v ON v.id = j.file_version_id
JOIN cf_plugin p ON p.id = j.plugin_id
LEFT JOIN cf_visibility s ON s.output_id = o.id
LEFT JOIN cf_forgotten_output f ON f.output_key = o.output_key
LEFT JOIN cf_left_output b ON b.output_id = o.id
LEFT JOIN cf_plugin_config c ON c.plugin_name = j.plugin_name
LEFT JOIN cf_plugin a ON a.name = c.plugin_name AND a.version = c.active_version
WHERE o.state = 'PUBLISHED' AND (j.status = 'COMPLETED' OR j.id IN (
    SELECT m.job_id FROM cf_rebuild_job m JOIN cf_rebuild b ON b.id = m.rebuild_id
    WHERE b.ended_at IS NULL))
AND NOT {OPEN} AND NOT {CANCELLED}
GROUP BY v.location_id, v.id, j.plugin_name, o.topic, o.location
"""  # noqa: S608

# Moved versions with the plugins whose rows of them are to show at another place: where the plugin
# has a job it is done, or all others that have one there are.
_ELSEWHERE = f"""
went(version_id, place, ordinal) AS (
    SELECT g.file_version_id, t.location_id, t.ordinal
    FROM cf_gone_version g JOIN cf_file_version t ON t.id = g.to_version_id
    UNION SELECT went.version_id, t.location_id, t.ordinal
    FROM went JOIN cf_file_location l ON l.id = went.place
    JOIN cf_gone_version g ON g.file_version_id = l.current_version_id
    JOIN cf_file_version t ON t.id = g.to_version_id
), there AS MATERIALIZED (
    SELECT went.version_id, went.place, j.plugin_name,
           max(j.status = 'COMPLETED' OR o.id IS NOT NULL) AS is_done
    FROM went CROSS JOIN cf_file_version v
        ON v.location_id = went.place AND v.ordinal >= went.ordinal
    CROSS JOIN cf_processing_queue j ON j.file_version_id = v.id
        AND NOT (j.status = 'ABORTED' AND j.reason GLOB '{TAKEN}*')
    LEFT JOIN cf_output o ON o.job_id = j.id AND o.state = 'PUBLISHED'
        AND NOT {OPEN} AND NOT {CANCELLED}
    GROUP BY 1, 2, 3
), gave AS MATERIALIZED (
    SELECT DISTINCT g.file_version_id AS version_id, j.plugin_name
    FROM cf_gone_version g JOIN cf_file_version v ON v.id = g.file_version_id
    JOIN cf_file_version u ON u.location_id = v.location_id
    JOIN cf_processing_queue j ON j.file_version_id = u.id WHERE g.to_version_id IS NOT NULL
), elsewhere AS MATERIALIZED (
    SELECT DISTINCT version_id, plugin_name FROM (
        SELECT gave.version_id, gave.plugin_name FROM gave
        JOIN there ON there.version_id = gave.version_id
        GROUP BY gave.version_id, gave.plugin_name, there.place
        HAVING max(there.plugin_name = gave.plugin_name AND there.is_done)
            OR (NOT max(there.plugin_name = gave.plugin_name) AND min(there.is_done)))
)
"""  # noqa: S608

_WRONG = f"""
WITH RECURSIVE {_ELSEWHERE}, slots AS ({_SLOTS}), placed AS (
    SELECT slots.*, moved.version_id IS NOT NULL AS has_moved,
           has_left.version_id IS NOT NULL AS is_left_by,
           max(CASE WHEN stand OR is_left THEN ordinal END) OVER place AS newest,
           sum(is_current) OVER place AS currents,
           slots.version_id IN (SELECT file_version_id FROM cf_retracted_version) AS is_retracted
    FROM slots JOIN cf_file_location l ON l.id = slots.location_id
    LEFT JOIN elsewhere moved
        ON moved.version_id = slots.version_id AND moved.plugin_name = slots.plugin_name
    LEFT JOIN elsewhere has_left
        ON has_left.version_id = l.current_version_id AND has_left.plugin_name = slots.plugin_name
    WINDOW place AS (PARTITION BY location_id, slots.plugin_name, topic, location)
), judged AS (
    SELECT *, CASE
        WHEN stand > 1 OR (is_current AND currents > 1) THEN 'twice'
        WHEN is_retracted AND is_seen THEN 'retracted'
        WHEN is_hidden_on_request AND NOT is_retracted THEN 'not retracted'
        WHEN has_active AND stand AND NOT active_stands THEN 'not active'
        WHEN is_seen AND has_moved OR is_current AND is_left_by THEN 'moved'
        WHEN is_current AND ordinal < newest THEN 'old'
        WHEN is_seen AND NOT is_current AND ordinal = newest AND NOT is_left_by THEN 'not current'
        WHEN NOT stand AND NOT forgotten AND NOT is_left AND NOT has_moved
             AND (in_sink OR ordinal >= coalesce(newest, 0)) THEN 'unseen' END AS fault
    FROM placed
)
SELECT fault, r.name AS source, l.rel_path, k.ordinal, k.plugin_name, k.topic, k.location, k.job,
       k.jobs
FROM judged k JOIN cf_file_location l ON l.id = k.location_id
JOIN cf_source_root r ON r.id = l.source_root_id
WHERE fault IS NOT NULL
AND NOT (fault = 'unseen' AND (
    l.gone_at IS NOT NULL AND r.on_delete = 'retract' AND NOT EXISTS (
        SELECT 1 FROM cf_gone_version g JOIN cf_file_version t ON t.id = g.to_version_id
        JOIN cf_file_location n ON n.id = t.location_id
        WHERE g.file_version_id = l.current_version_id AND n.gone_at IS NULL)
    OR EXISTS (SELECT 1 FROM cf_processing_queue w WHERE w.file_version_id = k.version_id
               AND w.plugin_name = k.plugin_name AND w.status <> 'COMPLETED')))
ORDER BY l.id, k.ordinal, k.plugin_name, k.topic, k.location
"""  # noqa: S608

_FAULTS = {
    "twice": "are visible twice or stand twice, from job {jobs}",
    "retracted": "are visible, though the version is retracted",
    "not retracted": "are hidden as retracted, though nobody has retracted the version",
    "not active": "are not those of the plugin's active version, which has worked it too",
    "moved": "are shown, though the file has moved, and its rows are published at its new place",
    "old": "are shown as current, though a later version was worked",
    "not current": "are not shown as current, though no later version was worked",
    "unseen": "nobody can see: job {job} is COMPLETED, and nothing took the place of its output",
}


def _wrongly_seen(connection: Connection) -> Iterator[str]:
    """Version slots of which readers see too much, too little or the wrong thing."""
    for row in connection.execute(_WRONG):
        yield (
            f"rows of {row.source}/{row.rel_path} version {row.ordinal} by plugin "
            f"{row.plugin_name} in topic {row.topic} of {row.location} "
            f"{_FAULTS[row.fault].format(job=row.job, jobs=row.jobs)} "
            f"(casparian jobs show {row.job})"
        )
