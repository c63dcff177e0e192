"""Rebuilds: everything of a plugin that stands is worked again, into the present sinks.

    start     each version that has outputs gets a job of the active artifact, which makes a new
              generation of its outputs; they are published hidden
    end       when every job has ended well: the new generation takes the place of the old one, and
              what is in sinks that the topics have left is withdrawn
    cancel    the new generation is removed, and the jobs are as they were before

Until the end the old rows show (`db.visibility`). Versions whose bytes are nowhere, and those that
no rule brings to the plugin any more, are left out: their rows stay. So do those of versions whose
bytes are found gone by the job. New files, edits and retractions meanwhile are nothing special.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import failures, jobs, plugins, trust, visibility
from casparian_flow.db.access import Connection, Ledger, execute, execute_many, returned_ids
from casparian_flow.db.audit import Event, actor
from casparian_flow.db.kept import HAS_BYTES
from casparian_flow.db.routing import JobRequest, Routing
from casparian_flow.db.states import JobStatus, utcnow
from casparian_flow.db.versions import route_text
from casparian_flow.db.visibility import Scope
from casparian_flow.errors import ArtifactRefused, CasparianError, NotFound, counted

GONE = "its bytes are neither in the store nor in its file"
UNWANTED = "no rule brings it to the plugin any more"


class Staying(NamedTuple):
    """A topic in a sink in which other rows stay beside what is rebuilt."""

    topic: str
    location: str


class LeftOut(NamedTuple):
    """A version that is not rebuilt: its rows stay."""

    source: str
    rel_path: str
    version: int
    why: str


class Started(NamedTuple):
    """A rebuild of one plugin; of a dry run, what it would be."""

    plugin: str
    version: str
    """The active one, which works everything again."""
    topic: str
    """Empty: all topics."""
    jobs: int
    waiting: int
    """Of the jobs: those that were queued or at work before."""
    left_out: list[LeftOut]
    beside: list[Staying]
    """Where other rows stay."""

    @property
    def name(self) -> str:
        """What a person types."""
        return self.topic or self.plugin


class _Found(NamedTuple):
    """What is to be worked again."""

    version: str
    existing: dict[int, str]
    """Job id -> its status."""
    lacking: list[tuple[int, JobRequest]]
    left_out: list[LeftOut]
    versions: list[int]
    """Ids of those that are worked again."""


def start(ledger: Ledger, name: str, *, dry_run: bool = False) -> list[Started]:
    """Begin a rebuild of a plugin, or of a topic: one for each plugin that has rows there.

    Args:
        name: that of a plugin; else of a topic.
        dry_run: say what it would be, and change nothing.

    Raises:
        NotFound: no plugin and no topic has that name, or nothing of it stands.
        ArtifactRefused: the active version may not run.
        CasparianError: no version of the plugin is active, a rebuild of it is open, or no version
            can be worked.
    """

    def work(connection: Connection) -> list[Started]:
        chosen = _chosen(connection, name)
        begun = [begin(connection, *each, dry_run=dry_run) for each in chosen]
        if len(begun) == 1:
            return begun
        # Rows of the other plugins are rebuilt as well.
        return [one if one.left_out else one._replace(beside=[]) for one in begun]

    if dry_run:
        return ledger.read(work)
    done = ledger.change(work, lambda done: map(event, done))
    crashpoint("rebuild.started")
    return done


class Restarted(NamedTuple):
    """A rebuild that was begun in the place of one that had become outdated."""

    cancelled: Progress
    started: Started | None
    """None: nothing of the plugin stands."""


def restart(ledger: Ledger, plugin: str) -> list[Restarted]:
    """Cancel a plugin's open rebuild whose jobs are of an artifact that is not the active one, and
    begin one of all its topics with the active one, in one transaction. The caller tells the sinks.

    Raises:
        ArtifactRefused, CasparianError: as for `start`; nothing was cancelled.
    """

    def work(connection: Connection) -> list[Restarted]:
        done = []
        for each in outdated(connection, plugin):
            _cancel(connection, each)
            try:
                done.append(Restarted(each, begin(connection, plugin, "")))
            except NotFound:
                done.append(Restarted(each, None))
        crashpoint("rebuild.restart_written")
        return done

    def events(done: list[Restarted]) -> list[Event]:
        made = []
        for cancelled, started in done:
            made += [_cancelled(cancelled), *([event(started)] if started else [])]
        return made

    if not ledger.read(lambda c: outdated(c, plugin)):
        return []
    done = ledger.change(work, events)
    crashpoint("rebuild.restarted")
    return done


def outdated(connection: Connection, plugin: str) -> list[Progress]:
    """The open rebuild of a plugin, if its jobs are of an artifact that is not the active one."""
    query = """
        SELECT EXISTS (
            SELECT 1 FROM cf_rebuild_job m JOIN cf_processing_queue j ON j.id = m.job_id
            JOIN cf_plugin p ON p.id = j.plugin_id
            JOIN cf_plugin_config c ON c.plugin_name = p.name
            JOIN cf_plugin a ON a.name = p.name AND a.version = c.active_version
            WHERE m.rebuild_id = :rebuild AND p.artifact_hash <> a.artifact_hash)
        """
    return [
        each
        for each in progress(connection)
        if each.plugin == plugin
        and each.is_open
        and execute(connection, query, rebuild=each.id).scalar()
    ]


def begin(connection: Connection, plugin: str, topic: str, *, dry_run: bool = False) -> Started:
    """Begin a rebuild of a plugin, or of one of its topics, in the caller's transaction.

    Raises:
        NotFound, ArtifactRefused, CasparianError: as for `start`.
    """
    check_none_open(connection, plugin)
    found = _find(connection, plugin, topic)
    if not dry_run:
        _queue(connection, plugin, topic, found)
        crashpoint("rebuild.written")
    waiting = sum(status in jobs.UNFINISHED for status in found.existing.values())
    number = len(found.existing) + len(found.lacking)
    beside = _staying(connection, plugin, found.versions, utcnow().isoformat(" "))
    return Started(plugin, found.version, topic, number, waiting, found.left_out, beside)


def event(started: Started) -> Event:
    """A rebuild that was begun, for the audit."""
    detail = {
        "topic": started.topic, "jobs": started.jobs, "left_out": len(started.left_out),
    }  # fmt: skip
    return Event("rebuild", f"plugin {started.plugin} {started.version}", detail)


def _chosen(connection: Connection, name: str) -> list[tuple[str, str]]:
    """(plugin, topic) of what a person names.

    Raises:
        NotFound: nothing is named so.
    """
    if plugins.versions(connection, name, stubs=True):
        return [(name, "")]
    rows = execute(
        connection,
        """
        SELECT plugin_name FROM cf_topic_config WHERE topic_name = :topic
        UNION SELECT j.plugin_name FROM cf_output o JOIN cf_processing_queue j ON j.id = o.job_id
        JOIN cf_visibility s ON s.output_id = o.id
        WHERE o.topic = :topic AND s.state <> 'removed'
          AND o.id NOT IN (SELECT output_id FROM cf_left_output)
        ORDER BY 1
        """,
        topic=name,
    ).all()
    if not rows:
        raise NotFound(f"no plugin and no topic is named {name!r}", "casparian topics")
    return [(row.plugin_name, name) for row in rows]


_VERSIONS = f"""
SELECT v.id, l.path, r.id AS root_id, r.name AS source, l.rel_path, v.ordinal,
       {HAS_BYTES} AS kept,
       (SELECT max(j.id) FROM cf_processing_queue j
        WHERE j.file_version_id = v.id AND j.plugin_id IN ({jobs.SAME_ARTIFACT})) AS job_id,
       (SELECT status FROM cf_processing_queue j
        WHERE j.file_version_id = v.id AND j.plugin_id IN ({jobs.SAME_ARTIFACT})
        ORDER BY j.id DESC LIMIT 1) AS status
FROM cf_file_version v JOIN cf_file_location l ON l.id = v.location_id
JOIN cf_source_root r ON r.id = l.source_root_id
WHERE v.id IN (
    SELECT j.file_version_id FROM cf_processing_queue j JOIN cf_output o ON o.job_id = j.id
    JOIN cf_visibility s ON s.output_id = o.id
    WHERE j.plugin_name = :plugin AND (:topic = '' OR o.topic = :topic)
      AND s.state <> 'removed' AND o.id NOT IN (SELECT output_id FROM cf_left_output))
ORDER BY v.id
"""  # noqa: S608
"""Each version that has outputs which stand, and the last job of the active artifact for it."""


def _find(connection: Connection, plugin: str, topic: str) -> _Found:
    """What is to be worked again.

    Raises:
        NotFound: nothing stands.
        ArtifactRefused: the active version may not run.
        CasparianError: no version is active, the active one does not have the topic, or nothing of
            it can be worked.
    """
    active = _active(connection, plugin)
    what = f"topic {topic} of {plugin}" if topic else plugin
    if topic and topic not in plugins.topics_of(connection, active):
        raise CasparianError(
            f"{plugin} {active.version} gives no topic {topic!r}: its rows stay as they are",
            f"casparian topics remove {plugin} {topic}   (takes them away)",
        )
    routing = Routing(connection)
    existing: dict[int, str] = {}
    lacking: list[tuple[int, JobRequest]] = []
    left_out: list[LeftOut] = []
    again: list[int] = []
    values = {"plugin": plugin, "topic": topic, "plugin_id": active.id}
    for row in execute(connection, _VERSIONS, **values):
        requests = routing.job_requests(route_text(row.path), row.root_id)
        wanted = next((each for each in requests if each.plugin_name == plugin), None)
        if wanted is None or not row.kept:
            why = GONE if wanted else UNWANTED
            left_out.append(LeftOut(row.source, row.rel_path, row.ordinal, why))
            continue
        again.append(row.id)
        if row.job_id is None:
            lacking.append((row.id, wanted))
        else:
            existing[row.job_id] = row.status
    if not (existing or lacking or left_out):
        raise NotFound(f"{what} has no rows; nothing was queued", f"casparian backfill {plugin}")
    if not (existing or lacking):
        first = left_out[0]
        raise CasparianError(
            f"nothing of {what} can be worked again, so its rows stay: of "
            f"{counted(len(left_out), 'version')} the first is version {first.version} of "
            f"{first.rel_path}, and {first.why}",
            f"casparian rebuild {topic or plugin} --dry-run   (lists them)",
        )
    return _Found(active.version, existing, lacking, left_out, again)


def _active(connection: Connection, plugin: str) -> Any:
    """The version that works everything again.

    Raises:
        ArtifactRefused: it may not run.
        CasparianError: there is none.
    """
    version = plugins.active(connection, plugin)
    if version is None:
        raise CasparianError(
            f"no version of {plugin} is active, so nothing of it can be worked again",
            f"casparian plugins activate {plugin} VERSION --reason WORDS",
        )
    (stored,) = plugins.stored(connection, name=plugin, version=version)
    if refusal := plugins.refusal(stored, trust.read(connection)):
        raise ArtifactRefused(refusal, f"casparian plugins show {plugin} {version}")
    return stored


def check_none_open(connection: Connection, plugin: str) -> None:
    """Return if no rebuild of a plugin is open.

    Raises:
        CasparianError: one is, and how it can be ended.
    """
    for each in progress(connection):
        if each.plugin == plugin and each.is_open:
            raise CasparianError(f"{each.words}; nothing was changed", each.command)


def _queue(connection: Connection, plugin: str, topic: str, found: _Found) -> None:
    """Queue the jobs of a rebuild.

    A job that runs is aborted first: its attempt would make outputs of the generation before.
    """
    rebuild = execute(
        connection,
        "INSERT INTO cf_rebuild (plugin_name, topic, started_at) "
        "VALUES (:plugin, :topic, :now) RETURNING id",
        plugin=plugin,
        topic=topic,
        now=utcnow().isoformat(" "),
    ).scalar_one()
    was = dict(found.existing)
    running = [number for number, status in was.items() if status == JobStatus.RUNNING]
    jobs.abort(connection, running, actor())
    for number in jobs.enqueue_first(connection, found.lacking, utcnow().isoformat(" ")):
        was[number] = ""
    jobs.rebuild(connection, list(was))
    execute_many(
        connection,
        "INSERT INTO cf_rebuild_job (rebuild_id, job_id, generation, was) "
        "SELECT ?, id, generation, ? FROM cf_processing_queue WHERE id = ?",
        [(rebuild, status, number) for number, status in was.items()],
    )


# Rows that stay beside those that are rebuilt.


class Open(NamedTuple):
    """An open rebuild, and what else decides what `staying_beside` finds."""

    id: int
    plugin: str
    started_at: str
    retracted: int
    """How many versions are: their rows are in nobody's way."""
    last: int
    """Id of the last rebuild: rows of another one do not stay either."""


def open_of(connection: Connection, job_id: int) -> Open | None:
    """The open rebuild that a job is of."""
    query = """
        SELECT b.id, b.plugin_name, b.started_at, (SELECT count(*) FROM cf_retracted_version),
               (SELECT max(id) FROM cf_rebuild)
        FROM cf_rebuild_job m JOIN cf_rebuild b ON b.id = m.rebuild_id
        WHERE m.job_id = :job_id AND b.ended_at IS NULL
        """
    row = execute(connection, query, job_id=job_id).first()
    return Open._make(row) if row else None


def staying_beside(connection: Connection, own: Open) -> set[tuple[str, str]]:
    """The topics and sink locations in which rows stay that no rebuild works again. Where all files
    of a topic have the same columns, this one cannot give it others."""
    found = _staying(connection, own.plugin, (), own.started_at)
    return {(each.topic, each.location) for each in found}


def _staying(
    connection: Connection, plugin: str, versions: Sequence[int], before: str
) -> list[Staying]:
    """Where rows stay that were published before a time, in topics of a plugin, and are neither of
    an open rebuild nor the plugin's own of these versions."""
    rows: Sequence[Any] = execute(
        connection,
        """
        SELECT DISTINCT o.topic, o.location FROM cf_output o
        JOIN cf_visibility s ON s.output_id = o.id JOIN cf_processing_queue j ON j.id = o.job_id
        WHERE s.state IN ('current', 'past') AND o.rows > 0 AND o.published_at <= :before
        AND o.topic IN (SELECT topic_name FROM cf_topic_config WHERE plugin_name = :plugin)
        AND NOT (j.plugin_name = :plugin
                 AND j.file_version_id IN (SELECT value FROM json_each(:versions)))
        AND NOT EXISTS (
            SELECT 1 FROM cf_processing_queue k JOIN cf_rebuild_job m ON m.job_id = k.id
            JOIN cf_rebuild b ON b.id = m.rebuild_id AND b.ended_at IS NULL
            WHERE k.file_version_id = j.file_version_id AND k.plugin_name = j.plugin_name)
        ORDER BY 1, 2
        """,
        plugin=plugin,
        versions=list(versions),
        before=before,
    ).all()
    return [Staying(*row) for row in rows]


# The end.

_UNENDED = """
(SELECT m.job_id FROM cf_rebuild_job m CROSS JOIN cf_processing_queue j ON j.id = m.job_id
 WHERE m.rebuild_id = b.id AND j.status NOT IN ('COMPLETED', 'SUPERSEDED')
 ORDER BY m.job_id DESC LIMIT 1)
"""
"""A job of the rebuild `b` that has not ended well. The last first: they are worked in order."""

_OVER = f"""
SELECT b.id, b.plugin_name FROM cf_rebuild b WHERE b.ended_at IS NULL AND {_UNENDED} IS NULL
"""  # noqa: S608


def is_over(connection: Connection) -> bool:
    """Whether every job of an open rebuild has ended well."""
    return connection.execute(f"{_OVER} LIMIT 1").first() is not None


_LEAVE = """
INSERT INTO cf_left_output (output_id, rebuild_id)
SELECT DISTINCT o.id, b.id
FROM cf_rebuild b JOIN cf_rebuild_job m ON m.rebuild_id = b.id
CROSS JOIN cf_processing_queue j ON j.id = m.job_id AND j.status = 'COMPLETED'
CROSS JOIN cf_processing_queue k
    ON k.file_version_id = j.file_version_id AND k.plugin_name = j.plugin_name
CROSS JOIN cf_output o ON o.job_id = k.id AND o.state = 'PUBLISHED'
WHERE b.id = :rebuild AND (b.topic = '' OR o.topic = b.topic)
  AND NOT (o.job_id = m.job_id AND o.generation = m.generation)
  AND EXISTS (SELECT 1 FROM cf_output n WHERE n.job_id = m.job_id
              AND n.generation = m.generation AND n.topic = o.topic)
  AND NOT EXISTS (SELECT 1 FROM cf_output n WHERE n.job_id = m.job_id
                  AND n.generation = m.generation AND n.topic = o.topic
                  AND n.location = o.location)
ON CONFLICT (output_id) DO NOTHING
"""
"""Outputs of rebuilt versions in sinks where the rebuild has put no output of their topic."""


def end(connection: Connection, ended_jobs: Sequence[int]) -> list[Event]:
    """End the rebuilds of which every job has ended well; the events for the audit.

    Args:
        ended_jobs: jobs that have just ended: those of a cancelled rebuild are put back.
    """
    _put_back_late(connection, ended_jobs)
    events = []
    for rebuild, plugin in connection.execute(_OVER).all():
        left_out = _superseded(connection, rebuild)
        jobs.put_back(connection, left_out, "")
        again = jobs.retry(connection, _failed(connection, rebuild))
        jobs.overtake(connection, _artifact(connection, plugin))
        now = utcnow().isoformat(" ")
        execute(
            connection,
            "UPDATE cf_rebuild SET outcome = 'done', ended_at = :now WHERE id = :rebuild",
            now=now,
            rebuild=rebuild,
        )
        left = execute(connection, _LEAVE, rebuild=rebuild).rowcount
        change = visibility.refresh(connection, Scope(plugin=plugin))
        detail = {"shown": change.shown, "hidden": change.hidden, "left_behind": left}
        detail |= {"retried": len(again)} if again else {}
        events.append(Event("end-rebuild", f"plugin {plugin}", detail))
        crashpoint("rebuild.ended")
    return events


def _superseded(connection: Connection, rebuild: int) -> list[int]:
    """Jobs of a rebuild whose versions' bytes were gone, and which have the outputs of before."""
    return returned_ids(
        connection,
        """
        SELECT j.id FROM cf_rebuild_job m JOIN cf_processing_queue j ON j.id = m.job_id
        WHERE m.rebuild_id = :rebuild AND j.status = 'SUPERSEDED' AND EXISTS (
            SELECT 1 FROM cf_output o WHERE o.job_id = j.id AND o.state = 'PUBLISHED'
            AND o.generation < j.generation)
        """,
        rebuild=rebuild,
    )


def _failed(connection: Connection, rebuild: int) -> list[int]:
    """Jobs of the plugin's active artifact whose failure is open, and which are not the rebuild's
    own: what it mends, such as a column's type, may have been in their way."""
    return returned_ids(
        connection,
        f"""
        SELECT j.id FROM cf_rebuild b JOIN cf_processing_queue j ON j.plugin_name = b.plugin_name
        JOIN cf_plugin p ON p.id = j.plugin_id
        JOIN cf_plugin_config c ON c.plugin_name = p.name
        JOIN cf_plugin a ON a.name = p.name AND a.version = c.active_version
        WHERE b.id = :rebuild AND j.status = 'FAILED' AND p.artifact_hash = a.artifact_hash
        AND j.id NOT IN (SELECT job_id FROM cf_rebuild_job WHERE rebuild_id = b.id)
        AND {failures.STATE} = '{failures.OPEN}'
        """,  # noqa: S608
        rebuild=rebuild,
    )


def _artifact(connection: Connection, plugin: str) -> list[int]:
    """The ids of the versions of a plugin that have its active artifact."""
    return returned_ids(
        connection,
        """
        SELECT p.id FROM cf_plugin_config c
        JOIN cf_plugin a ON a.name = c.plugin_name AND a.version = c.active_version
        JOIN cf_plugin p ON p.name = a.name AND p.artifact_hash = a.artifact_hash
        WHERE c.plugin_name = :plugin
        """,
        plugin=plugin,
    )


def being_shown(connection: Connection) -> set[str]:
    """Plugins of which a rebuild is complete and sinks have yet to be told to show it: until then
    these refuse the types that it has mended."""
    query = """
        SELECT DISTINCT b.plugin_name FROM cf_visibility s
        CROSS JOIN cf_output o ON o.id = s.output_id
        CROSS JOIN cf_rebuild_job m ON m.job_id = o.job_id AND m.generation = o.generation
        JOIN cf_rebuild b ON b.id = m.rebuild_id
        WHERE s.told <> s.state || '/' || s.mode AND s.told LIKE 'hidden/%'
        AND s.state IN ('current', 'past') AND b.outcome = 'done' AND b.problem = ''
        """
    return set(execute(connection, query).scalars())


_OF_CANCELLED = """
SELECT m.job_id FROM cf_rebuild_job m JOIN cf_rebuild b ON b.id = m.rebuild_id
JOIN cf_processing_queue j ON j.id = m.job_id AND j.generation = m.generation
WHERE b.outcome = 'cancelled' AND m.was NOT IN ('QUEUED', 'RUNNING', 'COMMITTING')
"""


def _put_back_late(connection: Connection, ended_jobs: Sequence[int]) -> None:
    """Put back jobs that were already decided when their rebuild was cancelled."""
    late = returned_ids(
        connection,
        f"{_OF_CANCELLED} AND m.job_id IN (SELECT value FROM json_each(:ids))",  # noqa: S608
        ids=list(ended_jobs),
    )
    if late:
        jobs.put_back(connection, late, _REASON)
        visibility.refresh(connection, visibility.of_jobs(connection, late))


# Cancelling.

_REASON = "its rebuild was cancelled"


def cancel(ledger: Ledger, name: str) -> list[Progress]:
    """Cancel the open rebuilds of a plugin, or of a topic: everything is as before them; what
    they had done.

    Jobs that were queued before go on. The caller tells the sinks.

    Raises:
        NotFound: none is open.
    """

    def work(connection: Connection) -> list[Progress]:
        chosen = [each for each in progress(connection) if each.is_open and name in each[1:3]]
        if not chosen:
            raise NotFound(f"no rebuild of {name} is open", "casparian status")
        for each in chosen:
            _cancel(connection, each)
        crashpoint("rebuild.cancel_written")
        return chosen

    def events(done: list[Progress]) -> list[Event]:
        return [_cancelled(each) for each in done]

    done = ledger.change(work, events)
    crashpoint("rebuild.cancelled")
    return done


def _cancelled(done: Progress) -> Event:
    detail = {"topic": done.topic, "jobs": done.jobs, "ended_well": done.ended_well}
    return Event("cancel-rebuild", f"plugin {done.plugin}", detail)


def _cancel(connection: Connection, rebuild: Progress) -> None:
    execute(
        connection,
        "UPDATE cf_rebuild SET outcome = 'cancelled', ended_at = :now WHERE id = :rebuild",
        now=utcnow().isoformat(" "),
        rebuild=rebuild.id,
    )
    own = returned_ids(connection, f"{_OF_CANCELLED} AND b.id = :id", id=rebuild.id)
    jobs.abort(connection, own, actor())
    jobs.put_back(connection, own, _REASON)
    visibility.refresh(connection, Scope(plugin=rebuild.plugin))


# How far they are.


class Progress(NamedTuple):
    """A rebuild that is open, or whose rows a sink cannot show."""

    id: int
    plugin: str
    topic: str
    started_at: str
    is_open: bool
    jobs: int
    ended_well: int
    """COMPLETED, or left out since the bytes were gone."""
    stopped: list[int]
    """Jobs that somebody must retry."""
    stopped_as: str
    """FAILED, ABORTED or both."""
    problem: str
    """Why a sink cannot show it; else empty."""
    is_held: bool
    """Whether a table's contract holds one of them, and would again."""

    @property
    def name(self) -> str:
        """What a person types."""
        return self.topic or self.plugin

    @property
    def words(self) -> str:
        """Such as `rebuild of sales: 120 of 121 jobs ended well, 1 FAILED`."""
        if not self.is_open:
            return f"rebuild of {self.name} is complete, and its rows do not show: {self.problem}"
        words = (
            f"rebuild of {self.name}: {self.ended_well:,} of {counted(self.jobs, 'job')} ended well"
        )
        return f"{words}, {len(self.stopped):,} {self.stopped_as}" if self.stopped else words

    @property
    def is_stuck(self) -> bool:
        """Whether somebody must act."""
        return bool(self.stopped or self.problem)

    @property
    def command(self) -> str:
        """What to type next."""
        if not self.is_open:
            return "casparian verify   (then: casparian retract what is in the way)"
        cancel = f"casparian rebuild {self.name} --cancel"
        if not self.stopped:
            return f"casparian wait --idle   (or: {cancel})"
        if self.is_held:
            return f"casparian table accept {self.plugin}, or: {cancel}"
        some = " ".join(map(str, self.stopped[:5]))
        return f"casparian jobs retry {some}, or: {cancel}"


def progress(connection: Connection) -> list[Progress]:
    """The rebuilds that are open, or whose rows a sink cannot show."""
    rows: Sequence[Any] = execute(
        connection,
        """
        SELECT b.id, b.plugin_name, b.topic, b.started_at, b.ended_at IS NULL,
               count(j.id), coalesce(sum(j.status IN ('COMPLETED', 'SUPERSEDED')), 0),
               json_group_array(j.id) FILTER (WHERE j.status IN ('FAILED', 'ABORTED')),
               group_concat(DISTINCT j.status) FILTER (WHERE j.status IN ('FAILED', 'ABORTED')),
               b.problem, coalesce(max(j.status = 'FAILED' AND j.reason GLOB 'held: *' AND EXISTS (
                   SELECT 1 FROM cf_plugin p WHERE p.id = j.plugin_id AND json_valid(p.manifest)
                   AND json_type(p.manifest, '$.contract.table') IS NOT NULL)), 0)
        FROM cf_rebuild b LEFT JOIN cf_rebuild_job m ON m.rebuild_id = b.id
        LEFT JOIN cf_processing_queue j ON j.id = m.job_id
        WHERE b.ended_at IS NULL OR b.problem <> '' GROUP BY b.id ORDER BY b.id
        """,
    ).all()
    return [
        Progress(
            number, plugin, topic, started, bool(is_open), count, well, sorted(json.loads(stopped)),
            " or ".join(sorted((statuses or "").split(","))), problem, bool(is_held),
        )
        for (number, plugin, topic, started, is_open, count, well, stopped, statuses,
             problem, is_held) in rows
    ]  # fmt: skip


def note_problem(connection: Connection, rebuild: int, problem: str) -> None:
    """Record why a sink cannot show a rebuild that is done; empty: it can."""
    execute(
        connection,
        "UPDATE cf_rebuild SET problem = :problem WHERE id = :rebuild AND problem <> :problem",
        problem=problem,
        rebuild=rebuild,
    )
