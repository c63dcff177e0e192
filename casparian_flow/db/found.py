"""Outputs that an inventory found in a sink and not in this ledger, and what follows from them.

    ids         the ids that a found output names are given to nothing else
    versions    the next version of a location follows the greatest ordinal found of it; the same
                content gets its old version, with its id
    jobs        the same version and artifact get their old job, with its id; a version that
                another artifact of the plugin has processed gets no new job

`db.versions` and `db.jobs` ask this module before they assign an id.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, func, insert, select, text

from casparian_flow.db.access import execute_many
from casparian_flow.db.models import (
    FileVersion,
    FoundOutput,
    Output,
    OutputState,
    SourceRoot,
    TopicConfig,
    utcnow,
)

# Published outputs that readers do not see; the sinks follow the same rule.
#
#     forgotten   a person deleted them in the sink
#     retracted   a person retracted their rows
#     replaced    in mode replace, another output of the slot is greater by (ordinal, job id)
#
# The greater output replaces when it is decided, before it is published; until then nothing is
# expected of the slot, since its sink may have either. It still replaces when it is retracted.


RETRACTED = "SELECT output_key FROM cf_retracted_output"

REPLACED = """
SELECT output_key FROM (
    SELECT output_key, row_number() OVER (
        PARTITION BY slot ORDER BY ordinal DESC, job_id DESC) AS place
    FROM (
        SELECT o.slot, v.ordinal, o.job_id, o.output_key
        FROM cf_output o JOIN cf_processing_queue j ON j.id = o.job_id
        JOIN cf_file_version v ON v.id = j.file_version_id
        WHERE o.mode = 'replace' AND o.state <> 'REFUSED'
        UNION ALL
        SELECT f.slot, f.ordinal, f.job_id, f.output_key FROM cf_found_output f
        WHERE f.mode = 'replace'
        AND NOT EXISTS (SELECT 1 FROM cf_output o WHERE o.output_key = f.output_key
                        AND o.state <> 'REFUSED')
    )
) WHERE place > 1
"""

INVISIBLE = f"""
SELECT output_key FROM cf_forgotten_output UNION ALL {RETRACTED} UNION ALL {REPLACED}
"""  # noqa: S608
"""The keys of all three."""


class MissingVersion(NamedTuple):
    """A version that a found output names and this ledger lacks."""

    version_id: int
    ordinal: int
    content_hash: str
    size_bytes: int


def known_keys(connection: Connection) -> list[str]:
    """Every output key in this ledger."""
    keys = select(Output.output_key).union(select(FoundOutput.output_key))
    return list(connection.execute(keys).scalars())


def placed_uris(connection: Connection) -> set[str]:
    """The sinks that topics go to, as written in the configuration of topics."""
    return set(connection.execute(select(TopicConfig.uri)).scalars())


def add(connection: Connection, rows: Sequence[dict[str, Any]]) -> int:
    """Record found outputs, in the caller's transaction; how many were new.

    Retractions are recorded of known outputs too. The next scan reads the files of locations that
    have had more versions than this ledger has.
    """
    known = set(known_keys(connection))
    note_retracted(connection, [row["output_key"] for row in rows if row["retracted"]])
    fresh = [row for row in rows if row["output_key"] not in known]
    if not fresh:
        return 0
    columns = [{**row, "found_at": utcnow()} for row in fresh]
    for row in columns:
        del row["retracted"]
    connection.execute(insert(FoundOutput), columns)
    for statement in _DOUBT:
        connection.execute(text(statement))
    return len(fresh)


def note_retracted(connection: Connection, keys: Sequence[str]) -> None:
    """Record that these outputs are retracted in their sink."""
    execute_many(
        connection,
        "INSERT INTO cf_retracted_output (output_key, state, retracted_at) "
        "VALUES (?, 'RETRACTED', ?) ON CONFLICT DO NOTHING",
        [(key, str(utcnow())) for key in keys],
    )


_BEHIND = """
    SELECT l.id FROM cf_found_output f
    JOIN cf_source_root r ON r.name = f.source
    JOIN cf_file_location l ON l.source_root_id = r.id AND l.path = f.path
    WHERE f.ordinal >
        (SELECT coalesce(max(ordinal), 0) FROM cf_file_version WHERE location_id = l.id)
"""
"""Locations that have had more versions than this ledger has."""

_DOUBT = (
    f"UPDATE cf_file_location SET device = NULL, inode = NULL WHERE id IN ({_BEHIND})",  # noqa: S608
    f"""
    UPDATE cf_directory SET digest = NULL WHERE id IN
        (SELECT directory_id FROM cf_file_location WHERE id IN ({_BEHIND}))
    """,  # noqa: S608
)


def last_version_id(connection: Connection) -> int:
    """The greatest version id in this ledger and in found outputs."""
    return _greatest(connection, FileVersion.id, FoundOutput.file_version_id)


def _greatest(connection: Connection, *columns: Any) -> int:
    return max(connection.execute(select(func.max(c))).scalar() or 0 for c in columns)


def missing_versions(
    connection: Connection, root_id: int, paths: Sequence[bytes]
) -> dict[bytes, list[MissingVersion]]:
    """The versions that each of these locations lacks, in order, by path."""
    if connection.execute(select(FoundOutput.id).limit(1)).first() is None:
        return {}
    marks = ",".join("?" * len(paths))
    rows = connection.exec_driver_sql(
        f"""
        SELECT f.path, min(f.file_version_id), f.ordinal, f.content_hash, max(f.size_bytes)
        FROM cf_found_output f JOIN cf_source_root r ON r.name = f.source
        JOIN cf_file_location l ON l.source_root_id = r.id AND l.path = f.path
        WHERE r.id = ? AND f.path IN ({marks}) AND f.ordinal >
            (SELECT coalesce(max(ordinal), 0) FROM cf_file_version WHERE location_id = l.id)
        GROUP BY f.path, f.ordinal ORDER BY f.path, f.ordinal
        """,  # noqa: S608
        (root_id, *paths),
    )
    lacking: dict[bytes, list[MissingVersion]] = defaultdict(list)
    for path, *version in rows:
        lacking[path].append(MissingVersion(*version))
    return dict(lacking)


def restore_versions(
    connection: Connection, location_id: int, versions: Sequence[MissingVersion], now: str
) -> dict[str, int]:
    """Record versions that a location lacks, with their ids; the last one's hash -> its id.

    A version whose id another version has, since before the inventory, gets a new id.
    """
    last: dict[str, int] = {}
    for version in versions:
        (number,) = connection.exec_driver_sql(
            """
            INSERT INTO cf_file_version
                (id, location_id, ordinal, content_hash, size_bytes, detected_at)
            SELECT CASE WHEN EXISTS (SELECT 1 FROM cf_file_version WHERE id = :version_id)
                   THEN :fresh_id ELSE :version_id END,
                   :location_id, :ordinal, :content_hash, :size_bytes, :now
            RETURNING id
            """,
            {
                **version._asdict(),
                "fresh_id": last_version_id(connection) + 1,
                "location_id": location_id,
                "now": now,
            },
        ).one()
        last = {version.content_hash: number}
    return last


def expected(connection: Connection) -> Sequence[Any]:
    """Found outputs of this ledger's source roots that no job has taken over: sinks must have them.

    An output of another source root may be another ledger's.
    """
    ours = select(SourceRoot.name)
    own = select(Output.output_key).where(Output.state == OutputState.PUBLISHED)
    return connection.execute(
        select(FoundOutput)
        .with_only_columns(*FoundOutput.__table__.columns)
        .where(
            FoundOutput.source.in_(ours),
            FoundOutput.output_key.not_in(own),
            FoundOutput.output_key.not_in(text(f"({INVISIBLE})")),
        )
        .order_by(FoundOutput.id)
    ).all()


# Parts of the statements in `db.jobs` that queue a job: `:version_id`, `:plugin_id` and
# `:plugin_name` are the job's.

_OF_VERSION = """
FROM cf_found_output f JOIN cf_file_version v ON v.id = :version_id
JOIN cf_file_location l ON l.id = v.location_id AND l.path = f.path
JOIN cf_source_root r ON r.id = l.source_root_id AND r.name = f.source
"""
"""Found outputs of the version's location."""

_ARTIFACT = "(SELECT artifact_hash FROM cf_plugin WHERE id = :plugin_id)"

JOB_ID = f"""coalesce(
    (SELECT f.job_id {_OF_VERSION} WHERE f.ordinal = v.ordinal
     AND f.content_hash = v.content_hash AND f.artifact_hash = {_ARTIFACT}
     AND NOT EXISTS (SELECT 1 FROM cf_processing_queue WHERE id = f.job_id)),
    1 + max((SELECT coalesce(max(id), 0) FROM cf_processing_queue),
            (SELECT coalesce(max(job_id), 0) FROM cf_found_output)))"""  # noqa: S608
"""The id that the found output of this version and artifact names; else the next free one."""

PROCESSED_BY_ANOTHER_ARTIFACT = f"""EXISTS (
    SELECT 1 {_OF_VERSION} WHERE f.ordinal = v.ordinal AND f.content_hash = v.content_hash
    AND f.plugin_name = :plugin_name AND f.artifact_hash <> {_ARTIFACT})"""

LACKS_VERSIONS = f"""EXISTS (
    SELECT 1 {_OF_VERSION} WHERE f.ordinal > (
        SELECT max(ordinal) FROM cf_file_version WHERE location_id = l.id))"""  # noqa: S608
"""The location has had more versions than this ledger knows: the next scan records them."""

JOB_IDS_WITHOUT_JOB = """(
    SELECT json_group_array(DISTINCT job_id) FROM cf_found_output f
    WHERE NOT EXISTS (SELECT 1 FROM cf_processing_queue WHERE id = f.job_id))"""
"""Ids that the old jobs of found outputs get when they are queued, as JSON."""

COMMITTED = f"""
WITH active AS (
    SELECT p.id FROM cf_plugin p JOIN cf_plugin_config c
    ON c.plugin_name = p.name AND c.active_version = p.version
), done AS (
    SELECT j.id, l.source_root_id, l.path, v.ordinal, j.plugin_name, j.plugin_id
    FROM cf_processing_queue j JOIN cf_file_version v ON v.id = j.file_version_id
    JOIN cf_file_location l ON l.id = v.location_id
    WHERE j.status = 'COMPLETED'
), found AS (
    SELECT f.job_id AS id, r.id AS source_root_id, f.path, f.ordinal, f.plugin_name,
           coalesce(p.id, 0) AS plugin_id, f.mode,
           f.topic, f.location, f.target, f.output_key, f.id AS number
    FROM cf_found_output f JOIN cf_source_root r ON r.name = f.source
    LEFT JOIN cf_plugin p ON p.artifact_hash = f.artifact_hash
    WHERE NOT EXISTS (SELECT 1 FROM cf_output o JOIN done ON done.id = o.job_id
                      WHERE o.output_key = f.output_key)
), work AS (
    SELECT id, rank() OVER (
        PARTITION BY source_root_id, path, plugin_name
        ORDER BY ordinal DESC, plugin_id IN active DESC, plugin_id DESC) = 1 AS latest,
        rank() OVER (PARTITION BY source_root_id, path, plugin_name
                     ORDER BY ordinal DESC) = 1 AS newest
    FROM (SELECT id, source_root_id, path, ordinal, plugin_name, plugin_id FROM done UNION
          SELECT id, source_root_id, path, ordinal, plugin_name, plugin_id FROM found)
)
SELECT topic, location, target, output_key, latest, min(number) AS id FROM (
    SELECT o.topic, o.location, o.target, o.output_key, o.id AS number, o.job_id,
           CASE o.mode WHEN 'replace' THEN w.newest ELSE w.latest END AS latest
    FROM cf_output o JOIN done ON done.id = o.job_id JOIN work w ON w.id = o.job_id
    WHERE o.state = 'PUBLISHED'
    UNION ALL
    SELECT f.topic, f.location, f.target, f.output_key, f.number, f.id,
           CASE f.mode WHEN 'replace' THEN w.newest ELSE w.latest END
    FROM found f JOIN work w ON w.id = f.id
)
WHERE output_key NOT IN ({INVISIBLE})
GROUP BY job_id, topic ORDER BY id
"""  # noqa: S608  - in mode replace the sink chooses between the plugin's versions
"""Outputs of completed jobs, and found ones without a job here: see `views.committed`."""
