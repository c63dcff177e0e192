"""Claimed jobs become assignments: everything a worker needs, and nothing it must look up."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from casparian_flow import sink_uri
from casparian_flow.config import Settings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import audit, jobs, plugins, trust
from casparian_flow.db.models import Plugin
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks import reserved
from casparian_flow.errors import CasparianError, ConfigError
from casparian_flow.protocol import Artifact, Assignment, OutputPlan


class Dispatcher:
    """Claims for one epoch.

    Args:
        settings: limits, and the default sink.
        epoch: this daemon run; part of every attempt's name.
    """

    def __init__(self, settings: Settings, epoch: int) -> None:
        self._settings = settings
        self._epoch = epoch
        self._tag = ledger_tag(settings.database.path)

    def claim(
        self, connection: Connection, worker: str, limit: int, sick: frozenset[str]
    ) -> list[Assignment]:
        """Claim up to `limit` jobs for a worker, in the caller's writing transaction.

        Args:
            sick: paused stores (`sinks.store`); plugins that write there get no jobs.
        """
        topics = plugins.topics(connection)
        avoid = self._paused(connection, topics, sick) if sick else []
        job_ids = jobs.claim(connection, worker, self._epoch, limit, avoid)
        crashpoint("dispatch.claim_written")
        assignments = []
        empty = plugins.may_be_empty(connection) if job_ids else {}
        for job in jobs.claimed(connection, job_ids) if job_ids else []:
            name = job.plugin_name
            try:
                made = self._assignment(job, topics.get(name, []), empty.get(name, []))
                assignments.append(made)
            except CasparianError as error:
                # A sink URI that a person wrote into the table and nobody can open, for one.
                jobs.fail(connection, job.id, job.fence, error.message)
                event = audit.Event("fail", f"job {job.id}", {"reason": error.message})
                audit.append(connection, "sentinel", [event])
        return assignments

    def _paused(
        self, connection: Connection, topics: dict[str, list[Any]], sick: frozenset[str]
    ) -> list[int]:
        names = {
            name
            for name, rows in topics.items()
            if any(self._is_sick(row.uri, sick) for row in rows)
        }
        return plugins.ids(connection, names)

    def _is_sick(self, uri: str, sick: frozenset[str]) -> bool:
        try:
            return sinks.store(sinks.resolve(uri, self._settings.home)) in sick
        except CasparianError:
            return False

    def _assignment(self, job: Any, placed: Sequence[Any], empty: list[str]) -> Assignment:
        manifest = plugins.manifest_of(job.manifest)
        declared = set(manifest.topics) - {row.topic_name for row in placed}
        places = [(row.topic_name, row.uri, row.mode) for row in placed]
        places += [
            (topic, self._settings.output.default_uri, "append") for topic in sorted(declared)
        ]
        outputs = [self._plan(job, *place, manifest.topics) for place in places]
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
            snapshot=str(self._settings.database.snapshot(job.snapshot)) if job.snapshot else "",
            may_be_empty=empty,
        )

    def _plan(self, job: Any, topic: str, uri: str, mode: str, topics: Sequence[str]) -> OutputPlan:
        uri, said = sink_uri.read(uri)  # people write options into the table as well
        location = sinks.resolve(uri, self._settings.home)
        reserved.check(location, topic, self._settings)
        key = (job.source, job.path, job.content_hash, job.ordinal, job.artifact_hash, topic, uri)
        place = (job.source, job.path, job.plugin_name, topic, uri)
        return OutputPlan(
            topic=topic,
            uri=uri,
            location=location,
            mode=said or mode,
            output_key=output_key(*key),
            slot=slot(*place),
            ordinal=job.ordinal,
            split_bytes=self._settings.output.split_bytes,
            facts={
                "source": job.source,
                "path": job.path.hex(),
                "size_bytes": str(job.size_bytes),
                "artifact_hash": job.artifact_hash,
                "plugin": job.plugin_name,
                "topics": "/".join(topics),  # no topic of a sink has a slash
                "uri": uri,
            },
        )


def artifact(connection: Connection, plugin_id: int) -> Artifact:
    """A plugin's bytes for a worker, checked as they stand in the ledger at this moment.

    What may not be run is not sent, but why.
    """
    found = plugins.stored(connection, Plugin.id == plugin_id)
    if not found:
        return _refused(plugin_id, f"there is no plugin {plugin_id}")
    plugin = found[0]
    if refusal := plugins.refusal(plugin, trust.read(connection)):
        return _refused(plugin_id, refusal)
    manifest = plugins.manifest_of(plugin.manifest)
    return Artifact(
        plugin_id=plugin_id,
        name=plugin.name,
        version=plugin.version,
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


def output_key(
    source: str, path: bytes, content_hash: str, ordinal: int,
    artifact_hash: str, topic: str, uri: str,
) -> str:  # fmt: skip
    """The name of an output: facts, so that every attempt gives the same one."""
    return _name(source, path, content_hash, str(ordinal), artifact_hash, topic, uri)


def slot(source: str, path: bytes, plugin: str, topic: str, uri: str) -> str:
    """The name of what the outputs of all versions of a location share in one topic of one plugin
    in one sink: see `OutputPlan.slot`."""
    return _name(source, path, plugin, topic, uri)


def _name(*parts: str | bytes) -> str:
    """SHA-256, hexadecimal. Each part is preceded by its length (8 bytes, big endian): no two
    lists of parts share a name."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogateescape")
        digest.update(len(data).to_bytes(8) + data)
    return digest.hexdigest()


def ledger_tag(database: Path) -> str:
    """Marks the staged files of one ledger, since ledgers may share a sink."""
    return hashlib.sha256(os.fsencode(database)).hexdigest()[:8]
