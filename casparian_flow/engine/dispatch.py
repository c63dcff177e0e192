"""Claim jobs as assignments for Workers; retry, fail or take back jobs whose attempt ended."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import random
import re
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any

import msgspec

from casparian_flow import sink_uri
from casparian_flow.config import JobSettings, Settings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import asked, audit, jobs, plugins, rebuild, taken, trust
from casparian_flow.db.access import Connection
from casparian_flow.db.jobs import AttemptResult, add_attempts, counted_attempts
from casparian_flow.engine import contents, endings, sinks
from casparian_flow.engine.endings import Ending
from casparian_flow.errors import (
    CasparianError,
    ConfigError,
    GuestDied,
    JobError,
    OutOfMemory,
    PluginFailed,
)
from casparian_flow.protocol import Artifact, Assignment, Output, Pair, Receipt, key_of

log = logging.getLogger(__name__)


class Dispatcher:
    """Claims jobs for one epoch.

    Args:
        settings: limits, and the default sink.
        epoch: number of this run of the daemon; part of every attempt's name.
    """

    def __init__(self, settings: Settings, epoch: int) -> None:
        self._settings = settings
        self._epoch = epoch
        self._tag = ledger_tag(settings.database.path)
        self._small = contents.SmallContents(settings.database.store_folder)
        self._staying: dict[rebuild.Open, set[tuple[str, str]]] = {}
        """Topics and sink locations in which other rows stay beside what a rebuild makes."""

    def claim(
        self, connection: Connection, worker: str, limit: int, paused: frozenset[str]
    ) -> list[Assignment]:
        """Claim up to `limit` jobs for a Worker, in the caller's write transaction.

        Args:
            paused: paused stores (`sinks.store`); plugins that write there get no jobs.
        """
        topics = plugins.topics(connection)
        avoid = self._avoided(connection, topics, paused)
        job_ids = jobs.claim(connection, worker, self._epoch, limit, avoid)
        crashpoint("dispatch.claim_written")
        assignments = []
        empty = plugins.may_be_empty(connection) if job_ids else {}
        claimed = jobs.describe(connection, job_ids) if job_ids else []
        given_up = taken.give_up(connection, [job for job in claimed if job.fence > 1])
        for job in claimed:
            if job.id in given_up:
                continue
            name = job.plugin_name
            try:
                made = self._assignment(job, topics.get(name, []), empty.get(name, []))
                assignments.append(self._kept_apart(connection, made) if job.generation else made)
            except CasparianError as error:
                # For example, a user wrote an invalid sink URI into the table.
                jobs.fail(connection, job.id, job.fence, error.message)
                event = audit.Event("fail", f"job {job.id}", {"reason": error.message})
                audit.append(connection, "sentinel", [event])
        return assignments

    def _kept_apart(self, connection: Connection, made: Assignment) -> Assignment:
        """An assignment of a rebuild, with what its topics may not change."""
        own = rebuild.open_of(connection, made.job_id)
        if own is None:
            return made
        if own not in self._staying:
            self._staying = {own: rebuild.staying_beside(connection, own)}
        outputs = [
            msgspec.structs.replace(output, keeps_columns=True)
            if (output.topic, output.location) in self._staying[own]
            else output
            for output in made.outputs
        ]
        return msgspec.structs.replace(made, outputs=outputs)

    def _avoided(
        self, connection: Connection, topics: dict[str, list[Any]], paused: frozenset[str]
    ) -> list[int]:
        """Plugins that write to a paused sink, to one that was not asked for its outputs yet, since
        it may have what their jobs would give (`db.adopt`), or to one that is yet to show their
        rebuild."""
        known = asked.known(connection)
        avoided = {}
        for topic, uri in {(row.topic_name, row.uri) for rows in topics.values() for row in rows}:
            try:
                location = sinks.resolve(uri, self._settings.home)
                sinks.check_reserved(location, topic, self._settings)
            except CasparianError:
                continue  # its jobs are claimed, and fail for that
            avoided[uri] = location not in known or sinks.store(location) in paused
        names = {name for name, rows in topics.items() if any(avoided.get(row.uri) for row in rows)}
        return plugins.ids(connection, names | rebuild.being_shown(connection))

    def _assignment(self, job: Any, placed: Sequence[Any], empty: list[str]) -> Assignment:
        manifest = plugins.manifest_of(job.manifest)
        declared = set(manifest.topics) - {row.topic_name for row in placed}
        targets = [(row.topic_name, row.uri, row.mode) for row in placed]
        targets += [
            (topic, self._settings.output.default_uri, "append") for topic in sorted(declared)
        ]
        outputs = [self._plan(job, *target, manifest.topics) for target in targets]
        for first, second in itertools.combinations(outputs, 2):
            if (first.topic, first.location) == (second.topic, second.location):
                raise ConfigError(
                    f"topic {first.topic!r} goes to {first.uri} twice", "casparian topics"
                )
        ceiling = self._settings.jobs.timeout_seconds
        return Assignment(
            job_id=job.id,
            fence=job.fence,
            attempt=f"{self._tag}-{self._epoch}-{job.id}-{job.fence}",
            plugin_id=job.plugin_id,
            plugin_version=job.plugin_version,
            version_id=job.version_id,
            source=job.source,
            path=os.path.join(os.fsencode(job.root_path), job.path),
            rel_path=job.rel_path,
            content_hash=job.content_hash,
            size_bytes=job.size_bytes,
            timeout_seconds=min(manifest.timeout_seconds or ceiling, ceiling),
            outputs=outputs,
            kept_file=self._kept_file(job.content_hash) if job.kept_in_file else "",
            kept_row=job.kept_id if job.kept_id and not job.kept_in_file else 0,
            may_be_empty=empty,
        )

    def _kept_file(self, content_hash: str) -> str:
        return str(contents.content_file(self._settings.database.store_folder, content_hash))

    def with_bytes(self, assignments: list[Assignment]) -> list[Assignment]:
        """The assignments, with the small contents that the store has as rows.

        They travel with the assignment: 29 of 2 KB cost 1.5 us each here and less than 1 us on the
        way, against 7 us each for a Worker that has the store open, and 48 us for one that opens
        it. Called outside the transaction of the claim, which must not wait for the store.
        """
        rows = [job.kept_row for job in assignments if job.kept_row]
        if not rows:
            return assignments
        try:
            found = self._small.read_all(rows)
        except contents.FAULTS as error:
            log.warning("cannot read the store %s: %s", self._small.path, contents.words(error))
            found = {}
        return [
            msgspec.structs.replace(job, kept_bytes=found.get(job.kept_row, b""))
            if job.kept_row
            else job
            for job in assignments
        ]

    def close(self) -> None:
        """Close the store."""
        self._small.close()

    def _plan(self, job: Any, topic: str, uri: str, mode: str, topics: Sequence[str]) -> Output:
        uri, own_mode = sink_uri.read(uri)  # users also write options into the table
        location = sinks.resolve(uri, self._settings.home)
        sinks.check_reserved(location, topic, self._settings)
        key = (job.source, job.path, job.content_hash, str(job.ordinal), job.artifact_hash)
        rebuilt = [f"generation {job.generation}"] if job.generation else []
        return Output(
            output_key=key_of(*key, topic, uri, *rebuilt),
            topic=topic,
            uri=uri,
            location=location,
            mode=own_mode or mode,
            source=job.source,
            path=job.path,
            ordinal=job.ordinal,
            content_hash=job.content_hash,
            file_bytes=job.size_bytes,
            plugin=job.plugin_name,
            plugin_version=job.plugin_version,
            artifact_hash=job.artifact_hash,
            version_id=job.version_id,
            job_id=job.id,
            topics="/".join(topics),  # a topic's name has no slash
            split_bytes=self._settings.output.split_bytes,
            generation=job.generation,
        )


def artifact(connection: Connection, plugin_id: int) -> Artifact:
    """A plugin for a Worker, verified as it is in the ledger now.

    If the plugin may not run, the result has the reason instead of the source. A stub is run as the
    version that was published of the same bytes.
    """
    rows = plugins.stored(connection, id=plugin_id)
    if not rows:
        return _refused(plugin_id, f"plugin {plugin_id} does not exist")
    asked = rows[0]
    same = {"name": asked.name, "artifact_hash": asked.artifact_hash}
    whole = [] if asked.manifest else plugins.stored(connection, **same)
    plugin = next((one for one in reversed(whole) if one.manifest), asked)
    if refusal := plugins.refusal(plugin, trust.read(connection)):
        return _refused(plugin_id, refusal)
    manifest = plugins.manifest_of(plugin.manifest)
    return Artifact(
        plugin_id=plugin_id,
        name=plugin.name,
        version=asked.version,
        source=plugin.source,
        lock=plugin.lock,
        topics=plugins.topics_of(connection, plugin),
        memory_bytes=manifest.memory_bytes,
        scratch_bytes=manifest.scratch_bytes,
        network=manifest.network,
    )


def _refused(plugin_id: int, refusal: str) -> Artifact:
    return Artifact(
        plugin_id=plugin_id, name="", version="", source=b"", lock="", topics=[], refusal=refusal
    )


def ledger_tag(database: Path) -> str:
    """Prefix of the ledger's staged files, since several ledgers may share a sink."""
    return hashlib.sha256(os.fsencode(database)).hexdigest()[:8]


# Which jobs are tried again, and when.
#
#     the attempt failed    try again after a pause while attempts are left, unless an error that
#                           will not pass has come twice (`_repeats`)
#     the Worker is gone    a begun attempt counts; one that only waited there does not
#     the daemon is gone    no attempt counts, since most ends have nothing to do with a job. But a
#                           begun job is suspected of the crash, unless its Worker still lives:
#                           after two crashes it runs alone (`jobs.claim`), and after more of them,
#                           alone, it is FAILED as poison
#
# How many more depends on the trace that the daemon left (`engine.endings`). After a crash, an OOM
# kill or the machine's own end, the third is the last. Without a trace a user may have killed the
# daemon, which may happen a dozen times while the same job runs.
#
# If the machine itself ended, the marks of begun jobs may be lost: all its jobs are suspected.

PAUSE_LIMIT_SECONDS = 900.0
"""Longest pause before a job is tried again."""

POISON_AFTER = jobs.ALONE_AFTER + 1
"""Daemon crashes during a job after which it is not tried again, if the last left a trace."""

POISON_AFTER_KILLS = 14
"""The same, if the last left no trace."""

SUSPECT_PAUSES = 3
"""Daemon crashes up to which the pause before a suspected job's next run grows."""

_DETERMINISTIC = {error.__name__ for error in (PluginFailed, GuestDied, JobError)}
"""Errors that plugin and bytes cause if the message repeats. Not timeouts, kills from outside or
missing environments: at the next attempt the machine may be less busy, or the index may answer."""

_VARYING = re.compile(r"\b0x[0-9a-fA-F]+\b|(?<=/)tmp\w{8}\b")
"""Parts of a message that differ between equal errors: addresses, names of scratch folders."""

_RECOVERY = "recovery"


def pause_seconds(limits: JobSettings, attempts: int) -> float:
    """Seconds before the next attempt: exponential with full jitter, so that jobs that failed
    together do not retry together (M. Brooker, Exponential Backoff And Jitter, 2015).

    Args:
        attempts: the job's attempts so far, including the one that failed.
    """
    longest = limits.retry_seconds * 4.0 ** min(max(attempts - 1, 0), 16)
    return random.uniform(0.0, min(longest, PAUSE_LIMIT_SECONDS))  # noqa: S311  no secret


def after_failure(connection: Connection, end: Receipt, limits: JobSettings, actor: str) -> bool:
    """Give a failed attempt its consequence; False when the job was another's by now."""
    attempts = jobs.attempt_count(connection, end.job_id)
    # Those before this one, since a person last gave the job a fresh budget.
    earlier = counted_attempts(connection, end.job_id, max(attempts - 1, 0))
    vain = any(_repeats(end, each.fault, each.error) for each in earlier)
    if end.retryable and attempts < limits.max_attempts and not vain:
        delay = pause_seconds(limits, attempts)
        return jobs.requeue(
            connection, end.job_id, end.fence, reason=end.error, delay_seconds=delay
        )
    return _fail(connection, end.job_id, end.fence, end.error, actor)


def _repeats(end: Receipt, fault: str, error: str) -> bool:
    """Whether an attempt repeats an earlier error (`fault`, `error`) that will not pass."""
    if fault != end.evidence.fault:
        return False
    if fault == OutOfMemory.__name__:  # the amounts in the message differ
        return True
    return fault in _DETERMINISTIC and _VARYING.sub("", error) == _VARYING.sub("", end.error)


def begin_epoch(
    connection: Connection, limits: JobSettings, ending: Ending, guests_folder: Path
) -> int:
    """Start an epoch and return it; take back the RUNNING jobs of older ones.

    Nobody runs them any more, since this process holds the daemon lock.

    Args:
        ending: how the last daemon ended.
    """
    epoch = plugins.begin_epoch(connection)
    hands = endings.read_held(guests_folder)
    for job in jobs.orphans(connection, epoch):
        if _lives(job.worker):
            _give_back(connection, job, "the daemon ended, but its worker still runs")
        elif ending.machine or (job.id, job.fence) in hands:
            _suspect(connection, job, limits, ending)
        else:
            _give_back(connection, job, "the daemon ended before the job began")
        crashpoint("retries.job_taken_back")
    return epoch


def lose(
    connection: Connection, pairs: Iterable[Pair], hands: Set[Pair], limits: JobSettings, why: str
) -> None:
    """Take back the jobs of a Worker that seems to be gone.

    Args:
        hands: the begun attempts (`endings.read_held`).
        why: for the attempt: which Worker, and what happened.
    """
    for _, group in itertools.groupby(jobs.running(connection, pairs), lambda job: job.worker):
        crew = list(group)
        suspects = {(job.id, job.fence) for job in crew} & hands
        for job in crew:
            if suspects and (job.id, job.fence) not in suspects:
                _give_back(connection, job, f"{why} before it began")
            else:
                _count(connection, job, limits, f"{why} while it ran")
            crashpoint("retries.lost_job_taken_back")


def release(connection: Connection, pairs: Iterable[Pair], why: str) -> None:
    """Take their jobs from a Worker that leaves; their attempts do not count."""
    for job in jobs.running(connection, pairs):
        _give_back(connection, job, why)


def _lives(worker: str) -> bool:
    """Whether a Worker in its own process on this machine still lives: then its job did not end the
    daemon. Another process with the same pid is taken for it."""
    host, _, number = worker.rpartition("-")
    if host != os.uname().nodename or not number.isdecimal():
        return False
    try:
        os.kill(int(number), 0)
    except (OSError, OverflowError):
        return False
    return True


def _give_back(connection: Connection, job: Any, why: str) -> None:
    ended = AttemptResult(job.id, job.fence, job.worker, "RELEASED", why)
    add_attempts(connection, job.epoch, [ended])
    jobs.requeue(connection, job.id, job.fence, reason="", refund=True)


def _count(connection: Connection, job: Any, limits: JobSettings, why: str) -> None:
    """An attempt that its Worker did not live to end: it may have been the cause."""
    reason = f"{why} ({job.attempts} of {limits.max_attempts} attempts)"
    add_attempts(
        connection, job.epoch, [AttemptResult(job.id, job.fence, job.worker, "LOST", reason)]
    )
    if job.attempts >= limits.max_attempts:
        _fail(connection, job.id, job.fence, reason, _RECOVERY)
    else:
        jobs.requeue(connection, job.id, job.fence, reason=reason)


def _suspect(connection: Connection, job: Any, limits: JobSettings, ending: Ending) -> None:
    """A job that was in hand when the daemon ended; no attempt of it counts for that."""
    deaths = job.crashes + 1
    times = "once" if deaths == 1 else f"{deaths} times"
    reason = f"the daemon ended {times} while this job ran"
    poison = deaths >= (POISON_AFTER if ending.traced else POISON_AFTER_KILLS)
    if poison:
        reason = f"POISON: {reason}, the last time with no other job; it is not retried"
    elif deaths >= jobs.ALONE_AFTER:
        reason += "; it will run alone next time"
    add_attempts(
        connection, job.epoch, [AttemptResult(job.id, job.fence, job.worker, "LOST", reason)]
    )
    if poison:
        _fail(connection, job.id, job.fence, reason, _RECOVERY)
        return
    # With growing pauses, so that other jobs run between two crashes.
    delay = pause_seconds(limits, min(deaths, SUSPECT_PAUSES))
    jobs.requeue(
        connection, job.id, job.fence, reason=reason, delay_seconds=delay, refund=True, crashed=True
    )


def _fail(connection: Connection, job_id: int, fence: int, reason: str, actor: str) -> bool:
    overtaken = jobs.overtaken(connection, [job_id])
    moved = jobs.fail(connection, job_id, fence, reason)
    if moved:
        audit.append(connection, actor, [audit.Event("fail", f"job {job_id}", {"reason": reason})])
        jobs.retry(connection, overtaken)
    return moved
