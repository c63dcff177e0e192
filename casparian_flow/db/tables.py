"""What the ledger has of tables: the versions that a contract may take, and what became of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from casparian_flow.db import failures, plugins
from casparian_flow.db import outputs as published
from casparian_flow.db.access import Connection, Page, Row, page, rows

_VERSIONS = """
    SELECT v.id AS version_id, r.name AS source, r.path AS root_path, l.id AS location_id, l.path,
           l.rel_path, v.ordinal, v.content_hash, v.size_bytes,
           v.id = l.current_version_id AS current, k.id AS kept_id, k.in_file AS kept_in_file
    FROM cf_file_location l
    JOIN cf_source_root r ON r.id = l.source_root_id
    JOIN cf_file_version v ON v.location_id = l.id
    LEFT JOIN cf_kept_content k ON k.content_hash = v.content_hash
    """


def current(connection: Connection, source: str = "") -> Iterator[Any]:
    """The current version of every present file, by source and path.

    Args:
        source: only those of this source root.
    """
    query = f"""
        {_VERSIONS}
        WHERE v.id = l.current_version_id AND l.gone_at IS NULL AND r.active
          AND (:source = '' OR r.name = :source)
        ORDER BY r.id, l.path
        """
    yield from connection.execute(query, {"source": source})


def held(connection: Connection, table: str) -> Sequence[Any]:
    """The versions that wait until a person has decided, as `current` has them."""
    query = f"""
        {_VERSIONS} JOIN cf_processing_queue j ON j.file_version_id = v.id
        WHERE j.plugin_name = :table AND {failures.STATE} = '{failures.HELD}'
        ORDER BY r.id, l.path, v.ordinal
        """
    return connection.execute(query, {"table": table}).all()


def contract_of(connection: Connection, name: str, version: str | None = None) -> dict[str, Any]:
    """The contract of a plugin; empty where it is no table.

    Args:
        version: None takes the active one, else the newest.

    Raises:
        NotFound: there is no such plugin, or version of it.
        ArtifactRefused: its stored MANIFEST is damaged.
    """
    found = plugins.choose(connection, name, version)
    return plugins.manifest_of(found.manifest).contract if found.manifest else {}


def listed(connection: Connection) -> list[Row]:
    """Every table: the version that is active or was last, columns, and what it shows."""
    query = f"""
        SELECT p.name AS "table", p.version, c.active_version = p.version AS active,
               json_array_length(p.manifest, '$.contract.columns') AS columns,
               (SELECT count(DISTINCT j.file_version_id) FROM cf_processing_queue j
                WHERE j.plugin_name = p.name AND j.status = 'COMPLETED') AS versions,
               (SELECT count(*) FROM cf_processing_queue j
                WHERE j.plugin_name = p.name AND {failures.STATE} = '{failures.HELD}') AS held,
               json_extract(p.manifest, '$.contract.files') AS files
        FROM cf_plugin p LEFT JOIN cf_plugin_config c ON c.plugin_name = p.name
        WHERE p.manifest <> '' AND json_type(p.manifest, '$.contract.columns') IS NOT NULL
          AND p.id = coalesce(
              (SELECT a.id FROM cf_plugin a
               WHERE a.name = p.name AND a.version = c.active_version),
              (SELECT max(n.id) FROM cf_plugin n WHERE n.name = p.name AND n.manifest <> ''))
        ORDER BY p.name
        """  # noqa: S608
    return rows(connection, query)


def history(connection: Connection, table: str) -> list[Row]:
    """The versions of a table, the newest first: who signed each, and when."""
    query = """
        SELECT p.version, c.active_version = p.version AS active, p.publisher AS key_id,
               p.deployed_at,
               json_array_length(p.manifest, '$.contract.columns') AS columns
        FROM cf_plugin p LEFT JOIN cf_plugin_config c ON c.plugin_name = p.name
        WHERE p.name = :table AND p.manifest <> '' ORDER BY p.id DESC
        """
    return rows(connection, query, table=table)


def files(connection: Connection, table: str, limit: int | None) -> Page:
    """The present files with a job of the table: what became of each one's current version."""
    query = f"""
        SELECT r.name AS source, l.rel_path, v.ordinal AS version, p.version AS contract,
               CASE {failures.STATE} WHEN '' THEN j.status
                    WHEN '{failures.OPEN}' THEN j.status
                    ELSE upper({failures.STATE}) END AS status,
               {published.ROWS_COUNTED} AS "rows", {published.REJECTS_COUNTED} AS rejects, j.reason
        FROM cf_processing_queue j JOIN cf_plugin p ON p.id = j.plugin_id
        JOIN cf_file_version v ON v.id = j.file_version_id
        JOIN cf_file_location l ON l.id = v.location_id AND l.current_version_id = v.id
        JOIN cf_source_root r ON r.id = l.source_root_id
        WHERE j.plugin_name = :table AND l.gone_at IS NULL AND j.id = (
            SELECT max(n.id) FROM cf_processing_queue n
            WHERE n.file_version_id = v.id AND n.plugin_name = j.plugin_name)
        ORDER BY r.id, l.path
        """  # noqa: S608
    return page(connection, query, limit, table=table)


def worked_by_others(
    connection: Connection, table: str, version_ids: Sequence[int]
) -> dict[str, int]:
    """Which other plugins have completed how many of these versions."""
    query = """
        SELECT j.plugin_name, count(DISTINCT j.file_version_id) FROM cf_processing_queue j
        WHERE j.status = 'COMPLETED' AND j.plugin_name <> :table
          AND j.file_version_id IN (SELECT value FROM json_each(:ids))
        GROUP BY 1 ORDER BY 1
        """
    values = {"table": table, "ids": json.dumps(list(version_ids))}
    return {plugin: number for plugin, number in connection.execute(query, values)}  # noqa: C416
