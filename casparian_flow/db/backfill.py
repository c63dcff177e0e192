"""Recorded versions that a plugin has not worked, and those that another artifact of it has."""

from __future__ import annotations

from typing import Any, NamedTuple

from sqlalchemy import Connection, text

from casparian_flow.db.routing import JobRequest, Routing
from casparian_flow.db.versions import route_text

CHUNK = 5_000
"""Versions looked at in one read, and jobs queued in one transaction."""

_VERSIONS = """
SELECT v.id, l.path,
       (v.id = l.current_version_id AND l.gone_at IS NULL)
         OR EXISTS (SELECT 1 FROM cf_snapshot s WHERE s.content_hash = v.content_hash) AS kept,
       EXISTS (SELECT 1 FROM cf_processing_queue j
               WHERE j.file_version_id = v.id AND j.plugin_id = p.id) AS own,
       EXISTS (SELECT 1 FROM cf_processing_queue j
               WHERE j.file_version_id = v.id AND j.plugin_name = p.name
               AND j.status IN ('QUEUED', 'RUNNING', 'COMMITTING')) AS waits,
       EXISTS (SELECT 1 FROM cf_processing_queue j
               WHERE j.file_version_id = v.id AND j.plugin_name = p.name)
         OR EXISTS (SELECT 1 FROM cf_found_output f
                    WHERE f.source = r.name AND f.path = l.path AND f.ordinal = v.ordinal
                    AND f.content_hash = v.content_hash AND f.plugin_name = p.name
                    AND f.artifact_hash <> p.artifact_hash) AS worked,
       EXISTS (SELECT 1 FROM cf_processing_queue j JOIN cf_output o ON o.job_id = j.id
               JOIN cf_retracted_output t ON t.output_key = o.output_key
               WHERE j.file_version_id = v.id AND j.plugin_name = p.name
               AND t.state <> 'REINSTATING')
         OR EXISTS (SELECT 1 FROM cf_found_output f
                    JOIN cf_retracted_output t ON t.output_key = f.output_key
                    WHERE f.source = r.name AND f.path = l.path AND f.ordinal = v.ordinal
                    AND f.content_hash = v.content_hash AND f.plugin_name = p.name
                    AND t.state <> 'REINSTATING') AS retracted
FROM cf_file_version v JOIN cf_file_location l ON l.id = v.location_id
JOIN cf_source_root r ON r.id = l.source_root_id AND r.active
JOIN cf_plugin p ON p.name = :plugin AND p.version = :version
WHERE v.id > :after AND (:path IS NULL OR l.rel_path GLOB :path)
  AND (:since IS NULL OR v.detected_at >= :since)
ORDER BY v.id LIMIT :chunk
"""


class Choice(NamedTuple):
    """Which versions, and of which plugin version."""

    plugin: str
    version: str
    path: str | None = None
    """A glob over the path relative to the source root; `*` crosses directories."""
    since: str | None = None
    """Only versions recorded at or after this time: ISO 8601 with a space, UTC."""
    redo: bool = False
    """Those too that another artifact of the plugin has worked."""


class Looked(NamedTuple):
    """What some versions lack."""

    last: int | None
    """The last version id looked at; None when there are no more."""
    lacking: list[tuple[int, JobRequest]]
    """Versions to queue, with the job of each."""
    routed: int
    """Versions that the rules bring to the plugin."""
    bytes_gone: int
    """Of those: they would be queued, were their bytes still there."""
    worked: int
    """Of those: another artifact has worked them, and nobody said to redo it."""
    waits: int
    """Of those: a job of another artifact is unfinished."""
    again: int
    """Of `worked`: their bytes are there, so that to redo them would queue them."""
    retracted: int
    """Of those: a person has retracted what the plugin gave, and nothing else may bring it back."""


def look(connection: Connection, choice: Choice, routing: Routing, after: int) -> Looked:
    """Look at the next versions of active source roots, in the order they were recorded."""
    values = {**choice._asdict(), "after": after, "chunk": CHUNK}
    del values["redo"]
    rows = connection.execute(text(_VERSIONS), values).all()
    lacking: list[tuple[int, JobRequest]] = []
    routed = bytes_gone = worked = waits = again = retracted = 0
    for row in rows:
        wanted = _wanted(routing, row, choice.plugin)
        if wanted is None:
            continue
        routed += 1
        if row.own:
            continue
        if row.waits:
            waits += 1
        elif row.retracted:
            retracted += 1
        elif row.worked and not choice.redo:
            worked += 1
            again += bool(row.kept)
        elif not row.kept:
            bytes_gone += 1
        else:
            lacking.append((row.id, wanted))
    last = rows[-1].id if rows else None
    return Looked(last, lacking, routed, bytes_gone, worked, waits, again, retracted)


class WorkOfOthers(NamedTuple):
    """What other versions of a plugin did with file versions that it would get."""

    worked: int
    """Also those that they failed at."""
    again: int
    """Of those: their bytes are there."""
    waits: int
    """Versions that are queued for another version of the plugin, or being worked by it."""


def of_others(connection: Connection, plugin: str, version: str) -> WorkOfOthers:
    """Count what the other versions of a plugin have worked and this one has not."""
    choice = Choice(plugin, version)
    routing = Routing(connection)
    worked = again = waits = 0
    last: int | None = 0
    while last is not None:
        looked = look(connection, choice, routing, last)
        worked, again, waits = worked + looked.worked, again + looked.again, waits + looked.waits
        last = looked.last
    return WorkOfOthers(worked, again, waits)


def _wanted(routing: Routing, row: Any, plugin: str) -> JobRequest | None:
    jobs = routing.job_requests(route_text(row.path))
    return next((wanted for wanted in jobs if wanted.plugin_name == plugin), None)
