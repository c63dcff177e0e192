"""Queue a plugin's jobs for versions that were recorded before it.

By itself a deployed plugin gets each file's current version, and only where no artifact of it has
worked that. Older versions, and what another artifact has worked, are queued by `backfill`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from sqlalchemy import Connection, text

from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import jobs, plugins
from casparian_flow.db.access import Ledger
from casparian_flow.db.audit import Event
from casparian_flow.db.kept import HAS_BYTES
from casparian_flow.db.models import utcnow
from casparian_flow.db.routing import JobRequest, Routing
from casparian_flow.db.versions import route_text
from casparian_flow.errors import CasparianError, NotFound

CHUNK = 5_000
"""Versions looked at in one read, and jobs queued in one transaction."""

_VERSIONS = f"""
SELECT v.id, l.path,
       {HAS_BYTES} AS kept,
       EXISTS (SELECT 1 FROM cf_processing_queue j
               JOIN cf_plugin q ON q.id = j.plugin_id
               WHERE j.file_version_id = v.id AND j.plugin_name = p.name
               AND q.artifact_hash = p.artifact_hash) AS own,
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

    done = Backfill(version)
    last: int | None = 0
    while last is not None:
        read = partial(_candidates, choice=choice, version=version, routing=routing, after=last)
        last, lacking, counts = ledger.read(read)
        if lacking and not dry_run:
            work = partial(add, pairs=lacking, now=utcnow().isoformat(" "))
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
        last, _, counts = _candidates(connection, Choice(plugin), version, routing, last)
        done = done.plus(counts)
    return done


def _candidates(
    connection: Connection, choice: Choice, version: str, routing: Routing, after: int
) -> tuple[int | None, list[tuple[int, JobRequest]], Backfill]:
    """Look at the next versions of files, in the order they were recorded.

    Returns:
        The last version id that was looked at, None when there are no more; the versions to queue,
        with the job of each; and their counts, as if those jobs were queued.
    """
    values = {
        "plugin": choice.plugin, "version": version, "path": choice.path, "since": choice.since,
        "after": after, "chunk": CHUNK,
    }  # fmt: skip
    rows = connection.execute(text(_VERSIONS), values).all()
    lacking: list[tuple[int, JobRequest]] = []
    routed = bytes_gone = worked = waits = again = retracted = 0
    for row in rows:
        wanted = _wanted(routing, row, choice.plugin)
        if wanted is None:
            continue
        routed += 1
        if row.own or (choice.had and not row.had):
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
    queued = len(lacking)
    counts = Backfill(version, queued, routed, bytes_gone, worked, waits, again, retracted)
    return last, lacking, counts


def _wanted(routing: Routing, row: Any, plugin: str) -> JobRequest | None:
    requests = routing.job_requests(route_text(row.path))
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
