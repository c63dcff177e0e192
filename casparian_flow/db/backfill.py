"""Queue a plugin's jobs for versions that were recorded before it.

By itself a deployed plugin gets each file's current version, and only where no artifact of it has
worked that. Older versions, and what another artifact has worked, are queued by `backfill`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import jobs, plugins
from casparian_flow.db.access import Connection, Ledger
from casparian_flow.db.audit import Event
from casparian_flow.db.kept import HAS_BYTES
from casparian_flow.db.routing import JobRequest, Routing
from casparian_flow.db.states import TAKEN, utcnow
from casparian_flow.db.versions import route_text
from casparian_flow.errors import CasparianError, NotFound

CHUNK = 5_000
"""Versions looked at in one read, and jobs queued in one transaction."""

_VERSIONS = f"""
SELECT v.id, l.path, r.id AS root_id,
       {HAS_BYTES} AS kept,
       EXISTS (SELECT 1 FROM cf_processing_queue j
               JOIN cf_plugin q ON q.id = j.plugin_id
               WHERE j.file_version_id = v.id AND j.plugin_name = p.name
               AND q.artifact_hash = p.artifact_hash) AS own,
       (SELECT CASE WHEN +j.status IN ('FAILED', 'ABORTED') THEN j.id END
        FROM cf_processing_queue j JOIN cf_plugin q ON q.id = j.plugin_id
        WHERE j.file_version_id = v.id AND j.plugin_name = p.name
        AND q.artifact_hash = p.artifact_hash ORDER BY j.id DESC LIMIT 1) AS stopped,
       (SELECT CASE WHEN count(*) = sum(+j.status = 'ABORTED' AND j.reason GLOB '{TAKEN}*')
                    THEN max(j.id) END
        FROM cf_processing_queue j
        WHERE j.file_version_id = v.id AND j.plugin_name = p.name) AS taken,
       EXISTS (SELECT 1 FROM cf_processing_queue j
               WHERE j.file_version_id = v.id AND j.plugin_name = p.name
               AND j.status IN ('COMPLETED', 'FAILED')) AS had,
       EXISTS (SELECT 1 FROM cf_processing_queue j
               WHERE j.file_version_id = v.id AND j.plugin_name = p.name
               AND j.status IN ('QUEUED', 'RUNNING', 'COMMITTING')) AS waits,
       EXISTS (SELECT 1 FROM cf_processing_queue j
               WHERE j.file_version_id = v.id AND j.plugin_name = p.name) AS worked,
       EXISTS (SELECT 1 FROM cf_retracted_version t WHERE t.file_version_id = v.id) AS retracted
FROM cf_file_version v JOIN cf_file_location l ON l.id = v.location_id
JOIN cf_source_root r ON r.id = l.source_root_id AND r.active
JOIN cf_plugin p ON p.name = :plugin AND p.version = :version
WHERE v.id > :after AND (:path IS NULL OR l.rel_path GLOB :path)
  AND (:since IS NULL OR v.detected_at >= :since)
  AND (:versions IS NULL OR v.id IN (SELECT value FROM json_each(:versions)))
ORDER BY v.id LIMIT :chunk
"""  # noqa: S608


class Choice(NamedTuple):
    """Which plugin, and which versions of files."""

    plugin: str
    path: str | None = None
    """A glob over the path relative to the source root; `*` crosses directories."""
    since: str | None = None
    """Only versions recorded at or after this time: ISO 8601 with a space, UTC."""
    redo: bool = False
    """Those too that another version of the plugin has worked: the active one's rows then stand."""
    had: bool = False
    """Only those that a version of the plugin has worked or failed at."""
    versions: Sequence[int] | None = None
    """Only these, by their ids."""
    retry: bool = False
    """Those too whose job of the active artifact has FAILED or was aborted: that job again."""


class Backfill(NamedTuple):
    """What became of the versions that were asked for."""

    version: str
    """The plugin's, whose jobs were queued."""
    queued: int = 0
    """Jobs; of a dry run, how many there would be."""
    routed: int = 0
    """Versions that the rules bring to the plugin."""
    bytes_gone: int = 0
    """Versions that cannot be worked any more: their file has other bytes or is gone, and the store
    does not have theirs."""
    worked: int = 0
    """Versions that another version of the plugin has worked or failed at, and that were not to be
    redone."""
    waits: int = 0
    """Versions with an unfinished job of another version of the plugin."""
    again: int = 0
    """Of `worked`: those whose bytes are there, which `redo` would queue."""
    retracted: int = 0
    """Versions whose rows a person has retracted: they are worked again once that is undone."""

    def plus(self, other: Backfill) -> Backfill:
        """The counts of both."""
        sums = (one + two for one, two in zip(self[1:], other[1:], strict=True))
        return Backfill(self.version, *sums)


def backfill(ledger: Ledger, choice: Choice, *, dry_run: bool = False) -> Backfill:
    """Queue jobs of a plugin's active version for recorded versions of active source roots.

    It can be repeated after a crash: a version that was queued has its job.

    Args:
        dry_run: count, and change nothing.

    Raises:
        NotFound: no plugin has that name.
        CasparianError: none of its versions takes jobs.
    """
    version = _active(ledger, choice.plugin)
    routing = ledger.read(Routing)
    add = jobs.enqueue_again if choice.redo else jobs.enqueue
    detail = {"path": choice.path, "since": choice.since, "redo": choice.redo}

    def events(job_ids: list[int]) -> list[Event]:
        subject = f"plugin {choice.plugin} {version}"
        return [Event("backfill", subject, {"jobs": len(job_ids), **detail})]

    def queue(
        connection: Connection, lacking: list[tuple[int, JobRequest]], stopped: list[int]
    ) -> list[int]:
        again = jobs.retry(connection, stopped)
        return again + add(connection, lacking, utcnow().isoformat(" "))

    done = Backfill(version)
    last: int | None = 0
    while last is not None:
        read = partial(_candidates, choice=choice, version=version, routing=routing, after=last)
        last, lacking, stopped, counts = ledger.read(read)
        if (lacking or stopped) and not dry_run:
            work = partial(queue, lacking=lacking, stopped=stopped)
            counts = counts._replace(queued=len(ledger.change(work, events, wake=False)))
            crashpoint("backfill.queued")
        done = done.plus(counts)
    if done.queued and not dry_run:
        ledger.wake()
    return done


def of_others(connection: Connection, plugin: str, version: str) -> Backfill:
    """What a backfill of all versions would find now; `worked` and `waits` are of others."""
    routing, done = Routing(connection), Backfill(version)
    last: int | None = 0
    while last is not None:
        last, _, _, counts = _candidates(connection, Choice(plugin), version, routing, last)
        done = done.plus(counts)
    return done


def _candidates(
    connection: Connection, choice: Choice, version: str, routing: Routing, after: int
) -> tuple[int | None, list[tuple[int, JobRequest]], list[int], Backfill]:
    """Look at the next versions of files, in the order they were recorded.

    Returns:
        The last version id that was looked at, None when there are no more; the versions to queue,
        with the job of each; jobs that are there and are to be queued again, which a table had
        taken and has given back, or which are to be retried; and the counts, as if all those were
        queued.
    """
    values = {
        "plugin": choice.plugin, "version": version, "path": choice.path, "since": choice.since,
        "after": after, "chunk": CHUNK,
        "versions": None if choice.versions is None else json.dumps(list(choice.versions)),
    }  # fmt: skip
    rows = connection.execute(_VERSIONS, values).all()
    lacking: list[tuple[int, JobRequest]] = []
    stopped: list[int] = []
    routed = bytes_gone = worked = waits = again = retracted = 0
    for row in rows:
        wanted = _wanted(routing, row, choice.plugin)
        if wanted is None:
            continue
        routed += 1
        again_job = row.stopped if choice.retry else None
        if row.taken and (row.own or not choice.redo):
            again_job = row.taken
        if (row.own and not again_job) or (choice.had and not row.had):
            continue
        if row.waits:
            waits += 1
        elif row.retracted:
            retracted += 1
        elif row.worked and not choice.redo and not again_job:
            worked += 1
            again += bool(row.kept)
        elif not row.kept:
            bytes_gone += 1
        elif again_job:
            stopped.append(again_job)
        else:
            lacking.append((row.id, wanted))
    last = rows[-1].id if rows else None
    queued = len(lacking) + len(stopped)
    counts = Backfill(version, queued, routed, bytes_gone, worked, waits, again, retracted)
    return last, lacking, stopped, counts


def _wanted(routing: Routing, row: Any, plugin: str) -> JobRequest | None:
    requests = routing.job_requests(route_text(row.path), row.root_id)
    return next((wanted for wanted in requests if wanted.plugin_name == plugin), None)


def _active(ledger: Ledger, plugin: str) -> str:
    """The version that takes new jobs.

    Raises:
        NotFound: no plugin has that name.
        CasparianError: none of its versions takes jobs.
    """
    if not ledger.read(lambda c: plugins.versions(c, plugin)):
        raise NotFound(f"no plugin is named {plugin!r}", "casparian plugins list")
    version = ledger.read(lambda c: plugins.active(c, plugin))
    if version is None:
        raise CasparianError(
            f"no version of {plugin} is active; nothing was queued",
            f"casparian plugins activate {plugin} VERSION --reason WORDS",
        )
    return version
