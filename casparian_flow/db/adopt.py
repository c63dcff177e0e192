"""Adopt what sinks have and this ledger lacks: it was lost, or is older than its sinks.

The rows of the earlier ledger are written again from the facts that sinks keep of each output, in
one transaction and before any id is given:

    location, version    with the version's id and ordinal; the next scan reads the file
    plugin               a stub, which may not run until the same artifact is published
    job, output          COMPLETED and PUBLISHED, with the job's id
    retraction           of the version

An id that the ledger has given to something else is replaced by a new one. Outputs of source roots
that the ledger does not have only raise `cf_id_floor`, above which it gives ids; they are adopted
when the root is added. What is visible is then decided anew, and the sinks are told.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from packaging.version import Version

from casparian_flow.db import audit, jobs, visibility
from casparian_flow.db.access import Connection, driver, execute
from casparian_flow.db.states import JobStatus, OutputState, utcnow
from casparian_flow.db.visibility import Scope
from casparian_flow.protocol import Output, State

ACTOR = "inventory"


class _Work(NamedTuple):
    """What one job is for, as the outputs of an earlier ledger name it."""

    source: str
    path: bytes
    ordinal: int
    content_hash: str
    plugin: str
    artifact_hash: str


@dataclass
class Adoption:
    """What was adopted from one sink."""

    location: str
    outputs: int = 0
    rows: int = 0
    versions: list[int] = field(default_factory=list)
    """Ids of the versions that the ledger lacked."""
    jobs: list[int] = field(default_factory=list)
    """Ids of the jobs that are COMPLETED by it."""
    plugins: dict[str, str] = field(default_factory=dict)
    """`name version` of each stub -> artifact hash."""

    @property
    def event(self) -> audit.Event:
        """For the audit, by which `verify` knows what need not have run here."""
        detail = {
            "outputs": self.outputs, "rows": self.rows, "versions": _runs(self.versions),
            "jobs": _runs(self.jobs), "plugins": self.plugins,
        }  # fmt: skip
        return audit.Event("adopt", f"sink {self.location}", detail)


def _runs(ids: Iterable[int]) -> list[list[int]]:
    """Ids as [first, last] runs of adjacent ones."""
    runs: list[list[int]] = []
    for number in sorted(ids):
        if runs and runs[-1][1] + 1 == number:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return runs


def known_keys(connection: Connection) -> set[str]:
    """The keys of all outputs that are published, or will be. What a sink has refused may be there
    all the same: a later ledger had the job run again."""
    keys = "SELECT output_key FROM cf_output WHERE state <> :refused"
    return set(execute(connection, keys, refused=OutputState.REFUSED).scalars())


def last_version_id(connection: Connection) -> int:
    """The greatest version id that was given, by this ledger or an earlier one."""
    last = connection.execute("SELECT max(id) FROM cf_file_version").scalar() or 0
    floor: int = connection.execute("SELECT version_id FROM cf_id_floor").scalar_one()
    return max(last, floor)


def adopt(
    connection: Connection, found: Sequence[Output], doubted: Collection[str]
) -> list[Adoption]:
    """Write the rows of outputs that sinks have, in the caller's transaction.

    Args:
        found: what `Sink.records` gave, of all sinks. What the ledger has learned of since is
            passed over.
        doubted: locations of sinks that may be newer than this ledger: what is retracted there was
            retracted by a person. In all others the ledger's own word counts.
    """
    if not found:
        return []
    execute(
        connection,
        "UPDATE cf_id_floor SET version_id = max(version_id, :version), job_id = max(job_id, :job)",
        version=max(output.version_id for output in found),
        job=max(output.job_id for output in found),
    )
    roots = {row.name: row.id for row in connection.execute("SELECT name, id FROM cf_source_root")}
    known = known_keys(connection)
    by_work: dict[_Work, list[Output]] = defaultdict(list)
    seen = set(known)
    for output in sorted(found, key=lambda output: output.job_id):
        if output.output_key not in seen and output.source in roots and _is_usable(output):
            seen.add(output.output_key)
            by_work[_work_of(output)].append(output)
    fresh = {work: outputs for work, outputs in by_work.items() if _is_whole(outputs)}
    adopter = _Adopter(connection)
    adopter.adopt(fresh, roots)
    if fresh:  # a version that one plugin's outputs brought here may lack the jobs of others
        execute(connection, "UPDATE cf_scan_state SET routed = ''")
    adopter.retract(
        [
            output
            for output in found
            if output.state == State.RETRACTED
            and output.output_key in known
            and output.location in doubted
        ]
    )
    adopter.decide()
    adoptions = list(adopter.adoptions.values())
    audit.append(connection, ACTOR, [adoption.event for adoption in adoptions])
    return adoptions


def _is_usable(output: Output) -> bool:
    """Whether it has the facts that rows need; those of earlier releases lack some."""
    path = output.path.split(b"/")
    return (
        output.ordinal > 0
        and len(output.content_hash) == 64
        and output.file_bytes >= 0
        and bool(output.plugin and output.plugin_version and output.artifact_hash)
        and not {b"", b".", b".."}.intersection(path)
    )


def _work_of(output: Output) -> _Work:
    return _Work(
        output.source, output.path, output.ordinal, output.content_hash, output.plugin,
        output.artifact_hash,
    )  # fmt: skip


class _Adopter:
    """Writes the rows of one adoption."""

    def __init__(self, connection: Connection) -> None:
        self.adoptions: dict[str, Adoption] = {}
        self._connection = connection
        self._now = utcnow().isoformat(" ")
        floor = connection.execute("SELECT version_id, job_id FROM cf_id_floor").one()
        self._last: dict[str, int] = {
            "cf_file_version": max(floor.version_id, self._greatest("cf_file_version")),
            "cf_processing_queue": max(floor.job_id, self._greatest("cf_processing_queue")),
        }
        self._places: set[int] = set()
        """Ids of the locations whose outputs are decided anew."""
        self._outputs: list[int] = []
        """Ids of the outputs of which the sink's state is known."""
        self._moves: list[tuple[int, int]] = []
        """Versions whose queued jobs go to a later version with the same content."""

    def adopt(self, fresh: Mapping[_Work, list[Output]], roots: Mapping[str, int]) -> None:
        """Write the rows of these outputs."""
        plugins = self._plugins(fresh)
        by_path: dict[tuple[str, bytes], list[_Work]] = defaultdict(list)
        for work in fresh:
            by_path[work.source, work.path].append(work)
        for (source, path), works in by_path.items():
            place = self._location(roots[source], path)
            self._places.add(place)
            versions = self._versions(place, [fresh[work][0] for work in works])
            for work in works:
                version = versions[work.ordinal, work.content_hash]
                self._job(version, plugins[work], fresh[work])
        for old, new in self._moves:
            jobs.renumber(self._connection, old, new)

    def retract(self, outputs: Sequence[Output]) -> None:
        """Retract the versions of outputs that the ledger has, and that their sink hides."""
        keys = {(output.output_key, output.location): output for output in outputs}
        rows = self._all(
            """
            SELECT o.output_key, o.location, j.file_version_id, v.location_id, o.id, s.told
            FROM cf_output o JOIN cf_processing_queue j ON j.id = o.job_id
            JOIN cf_file_version v ON v.id = j.file_version_id
            JOIN cf_visibility s ON s.output_id = o.id
            WHERE o.output_key IN (SELECT value FROM json_each(?)) AND o.state = 'PUBLISHED'
            """,
            json.dumps([key for key, _ in keys]),
        )
        for key, location, version, place, number, told in rows:
            output = keys.get((key, location))
            # Where it was told so, a person has undone it since, and it is still to be told that.
            if output is not None and not told.startswith(State.RETRACTED):
                self._retracted(version)
                self._write(
                    "UPDATE cf_visibility SET told = ? WHERE output_id = ?", _told(output), number
                )
                self._outputs.append(number)
                self._places.add(place)

    def decide(self) -> None:
        """Decide anew what stands in the locations that changed.

        What the ledger believed that a sink shows of them may be out of date: the sink is told
        again.
        """
        places = list(self._places)
        execute(
            self._connection,
            """
            UPDATE cf_visibility SET told = '' WHERE state <> 'removed' AND output_id IN (
                SELECT o.id FROM cf_file_version v
                CROSS JOIN cf_processing_queue j ON j.file_version_id = v.id
                CROSS JOIN cf_output o ON o.job_id = j.id
                WHERE v.location_id IN (SELECT value FROM json_each(:places))
            ) AND output_id NOT IN (SELECT value FROM json_each(:added))
            """,
            places=places,
            added=self._outputs,
        )
        if places:
            visibility.refresh(self._connection, Scope(places))

    def _plugins(self, fresh: Mapping[_Work, list[Output]]) -> dict[_Work, int]:
        """The plugin of each job, in the order of their smallest job ids: in that of deployment."""
        found: dict[tuple[str, str, str], int] = {}
        for work, outputs in fresh.items():
            for one in outputs:
                version = one.plugin_version
                key = work.plugin, version, work.artifact_hash
                if key not in found:
                    found[key] = self._plugin(*key, one.location)
        return {
            work: found[work.plugin, outputs[0].plugin_version, work.artifact_hash]
            for work, outputs in fresh.items()
        }

    def _plugin(self, name: str, version: str, artifact: str, sink: str) -> int:
        rows = self._all("SELECT version, artifact_hash, id FROM cf_plugin WHERE name = ?", name)
        there = {row[0]: row[1:] for row in rows}
        if version in there and there[version][0] != artifact:
            # Other bytes were published under this version before the sink could be asked.
            version = f"{Version(version).public}+{artifact[:12]}"
        if version in there:
            return int(there[version][1])
        self._adoption(sink).plugins[f"{name} {version}"] = artifact
        return self._write(
            """
            INSERT INTO cf_plugin (name, version, source, lock, manifest, artifact_hash, public_key,
                                   signature, publisher, deployed_at)
            VALUES (?, ?, x'', '', '', ?, x'', x'', '', ?)
            """,
            name, version, artifact, self._now,
        )  # fmt: skip

    def _location(self, root_id: int, path: bytes) -> int:
        row = self._one(
            "SELECT id FROM cf_file_location WHERE source_root_id = ? AND path = ?", root_id, path
        )
        if row is not None:
            return int(row[0])
        return self._write(
            """
            INSERT INTO cf_file_location
                (source_root_id, directory_id, path, rel_path, discovered_at, problem, racy)
            VALUES (?, ?, ?, ?, ?, '', 0)
            """,
            root_id, self._directory(root_id, path.rpartition(b"/")[0]), path,
            path.decode("utf-8", "backslashreplace"), self._now,
        )  # fmt: skip

    def _directory(self, root_id: int, path: bytes) -> int:
        """A directory with all above it. The next scan compares their files one by one."""
        parent = self._directory(root_id, path.rpartition(b"/")[0]) if path else None
        self._write(
            """
            INSERT INTO cf_directory (source_root_id, path, parent_id, digest)
            VALUES (?, ?, ?, NULL)
            ON CONFLICT (source_root_id, path) DO UPDATE SET digest = randomblob(8)
            """,
            root_id, path, parent,
        )  # fmt: skip
        row = self._one(
            "SELECT id FROM cf_directory WHERE source_root_id = ? AND path = ?", root_id, path
        )
        assert row is not None
        return int(row[0])

    def _versions(self, place: int, wanted: Sequence[Output]) -> dict[tuple[int, str], int]:
        """The ids of a location's versions, by ordinal and content hash; those that it lacks are
        added.

        Where the ledger has numbered the location itself, since it did not know the sink, the
        versions that do not fit follow its own, and its newest content follows them once more.
        """
        rows = self._all(
            "SELECT ordinal, content_hash, id, size_bytes FROM cf_file_version "
            "WHERE location_id = ? ORDER BY ordinal",
            place,
        )
        taken = {ordinal for ordinal, *_ in rows}
        ids: dict[tuple[int, str], int] = {(row[0], row[1]): row[2] for row in rows}
        first = {(output.ordinal, output.content_hash): output for output in reversed(wanted)}
        lacking = [first[key] for key in sorted(first) if key not in ids]
        if not lacking:
            return ids
        last, clashes = max(taken, default=0), False
        added: dict[str, int] = {}
        for output in lacking:
            clashes = clashes or output.ordinal in taken
            ordinal = last + 1 if clashes else output.ordinal
            taken.add(ordinal)
            last = max(last, ordinal)
            number = self._version(place, output, ordinal)
            ids[output.ordinal, output.content_hash] = added[output.content_hash] = number
        if clashes:
            own = rows[-1]
            if own[1] != lacking[-1].content_hash:
                again = self._take("cf_file_version", 0)
                self._insert_version(again, place, last + 1, own[1], own[3])
                added[own[1]] = again
            unknown = [row for row in rows if (row[0], row[1]) not in first]
            self._moves += [(row[2], added[row[1]]) for row in unknown if row[1] in added]
        self._look_again(place)
        return ids

    def _version(self, place: int, output: Output, ordinal: int) -> int:
        number = self._take("cf_file_version", output.version_id)
        self._insert_version(number, place, ordinal, output.content_hash, output.file_bytes)
        self._adoption(output.location).versions.append(number)
        return number

    def _insert_version(
        self, number: int, place: int, ordinal: int, digest: str, size: int
    ) -> None:
        self._write(
            """
            INSERT INTO cf_file_version
                (id, location_id, ordinal, content_hash, size_bytes, detected_at)
            VALUES (?, ?, ?, ?, ?, ?)
            """,
            number, place, ordinal, digest, size, self._now,
        )  # fmt: skip

    def _look_again(self, place: int) -> None:
        """Have the next scan compare a location's file with the newest version."""
        self._write(
            """
            UPDATE cf_file_location SET device = NULL, inode = NULL, gone_at = NULL,
                current_version_id = (SELECT id FROM cf_file_version WHERE location_id = ?
                                      ORDER BY ordinal DESC LIMIT 1)
            WHERE id = ?
            """,
            place, place,
        )  # fmt: skip
        row = self._one("SELECT source_root_id, path FROM cf_file_location WHERE id = ?", place)
        assert row is not None
        self._directory(row[0], row[1].rpartition(b"/")[0])

    def _job(self, version: int, plugin: int, outputs: Sequence[Output]) -> None:
        """Complete the job of these outputs, and add them to it.

        A job that runs, or is being published, is left alone: the sink adopts its outputs by their
        keys.
        """
        first = outputs[0]
        row = self._one(
            """
            SELECT j.id, j.status FROM cf_processing_queue j JOIN cf_plugin p ON p.id = j.plugin_id
            WHERE j.file_version_id = ? AND p.name = ? AND p.artifact_hash = ?
            ORDER BY j.status = 'COMPLETED' DESC, j.id LIMIT 1
            """,
            version, first.plugin, first.artifact_hash,
        )  # fmt: skip
        if row is None:
            job = self._take("cf_processing_queue", first.job_id)
            jobs.adopt(self._connection, [jobs.AdoptedJob(job, version, plugin, first.plugin)])
            self._adoption(first.location).jobs.append(job)
        elif row[1] in (JobStatus.RUNNING, JobStatus.COMMITTING):
            return
        else:
            job = int(row[0])
            self._write("DELETE FROM cf_output WHERE job_id = ? AND state <> 'PUBLISHED'", job)
        for output in outputs:
            self._output(job, output)
        if any(output.state == State.RETRACTED for output in outputs):
            self._retracted(version)
        if row is not None and jobs.take_over(self._connection, [job]):
            self._adoption(first.location).jobs.append(job)

    def _output(self, job: int, output: Output) -> None:
        shown_at, hidden_at = _time(output.shown_at), _time(output.hidden_at)
        number = self._write(
            """
            INSERT INTO cf_output (job_id, topic, uri, location, mode, output_key, slot, state,
                                   stage, target, rows, size_bytes, digest, published_at,
                                   generation)
            VALUES (?, ?, ?, ?, ?, ?, ?, 'PUBLISHED', '', ?, ?, ?, ?, ?, ?)
            ON CONFLICT (job_id, topic, uri, generation) DO NOTHING
            """,
            job, output.topic, output.uri, output.location, output.mode, output.output_key,
            output.location_slot, output.target, output.rows, output.size_bytes, output.digest,
            shown_at or self._now, output.generation,
        )  # fmt: skip
        if not number:
            return
        self._write(
            """
            INSERT INTO cf_visibility
                (output_id, state, mode, told, shown_at, hidden_at, changed_at)
            VALUES (?, ?, ?, ?, ?, ?, ?)
            """,
            number, output.state, output.mode, _told(output), shown_at, hidden_at, self._now,
        )  # fmt: skip
        self._outputs.append(number)
        adoption = self._adoption(output.location)
        adoption.outputs += 1
        adoption.rows += output.rows

    def _retracted(self, version: int) -> None:
        self._write(
            "INSERT INTO cf_retracted_version (file_version_id, retracted_at) VALUES (?, ?) "
            "ON CONFLICT DO NOTHING",
            version, self._now,
        )  # fmt: skip

    def _adoption(self, location: str) -> Adoption:
        return self.adoptions.setdefault(location, Adoption(location))

    def _take(self, table: str, wanted: int) -> int:
        """The id that a sink names, or a new one where the ledger has given it to another row."""
        taken = self._one(f"SELECT 1 FROM {table} WHERE id = ?", wanted)  # noqa: S608  ours
        if wanted > 0 and taken is None:
            return wanted
        self._last[table] += 1
        return self._last[table]

    def _greatest(self, table: str) -> int:
        row = self._one(f"SELECT coalesce(max(id), 0) FROM {table}")  # noqa: S608  ours
        assert row is not None
        return int(row[0])

    # On the driver's connection: SQLAlchemy would cost several times what SQLite does.

    def _all(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        return driver(self._connection).execute(query, values).fetchall()

    def _one(self, query: str, *values: Any) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = driver(self._connection).execute(query, values).fetchone()
        return row

    def _write(self, statement: str, *values: Any) -> int:
        """The id of the row that was inserted; 0 where none was."""
        cursor = driver(self._connection).execute(statement, values)
        return int(cursor.lastrowid or 0) if cursor.rowcount > 0 else 0


def _is_whole(outputs: Sequence[Output]) -> bool:
    """Whether these are all outputs of their job.

    A job whose outputs go to several stores is published hidden in each, and shown when all have
    taken theirs. If its ledger was lost in between, it is to run again.
    """
    first = outputs[0]
    seen = any(output.shown_at or output.state != State.HIDDEN for output in outputs)
    return seen or set(first.topics.split("/")) <= {"", *(output.topic for output in outputs)}


def _told(output: Output) -> str:
    return f"{output.state}/{output.mode}"


def _time(written: str) -> str | None:
    """A sink's time as the ledger has it; None where there is none."""
    return written.removesuffix("Z").replace("T", " ") or None
