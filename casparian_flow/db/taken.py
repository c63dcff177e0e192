"""What tables take from catch-all plugins, and what these have given of the same files before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from casparian_flow.db import jobs, outputs, rebuild
from casparian_flow.db.access import Connection, Row
from casparian_flow.db.outputs import Seen
from casparian_flow.db.routing import Routing
from casparian_flow.db.versions import route_text

EXAMINED = 1_000
"""Files of a table that are looked at to find the catch-all plugins that read such files."""

_FILES = """
FROM cf_file_location l JOIN cf_source_root r ON r.id = l.source_root_id AND r.active
JOIN cf_processing_queue j ON j.file_version_id = l.current_version_id
WHERE l.gone_at IS NULL AND j.plugin_name IN (SELECT value FROM json_each(:tables))
"""


def listed(connection: Connection) -> list[Row]:
    """Every active table: name, version, files, rows, rejects, instead_of and left.

    `files` are present ones. `instead_of` names the catch-all plugins that do not get them, and
    `left` what each of those gave before, which stays: plugin, files, rows, rejects.
    """
    routing = Routing(connection)
    tables = [taker for taker in routing.takers if taker.is_table]
    if not tables:
        return []
    names = [taker.name for taker in tables]
    catch_alls = [taker.name for taker in routing.takers if taker.is_catch_all]
    counted = f"SELECT j.plugin_name, count(DISTINCT l.id) AS files {_FILES} GROUP BY 1"
    found = connection.execute(counted, {"tables": json.dumps(names)})
    files: dict[str, int] = {row.plugin_name: row.files for row in found}
    seen = outputs.of_plugins(connection, names)
    before = outputs.left_to_tables(connection, names, catch_alls) if catch_alls else {}
    made = []
    for table in tables:
        left = [
            {"plugin": plugin, **amount._asdict()}
            for (owner, plugin), amount in before.items()
            if owner == table.name
        ]
        instead_of = _instead_of(connection, table.name, routing) if catch_alls else set()
        amount = seen.get(table.name, Seen(0, 0, 0))
        made.append(
            {
                "name": table.name,
                "version": table.version,
                "files": files.get(table.name, 0),
                "rows": amount.rows,
                "rejects": amount.rejects,
                "instead_of": sorted({*instead_of, *(row["plugin"] for row in left)}),
                "left": left,
            }
        )
    return made


def _instead_of(connection: Connection, table: str, routing: Routing) -> set[str]:
    query = f"SELECT l.path, l.source_root_id {_FILES} LIMIT {EXAMINED}"
    return {
        plugin
        for path, root_id in connection.execute(query, {"tables": json.dumps([table])})
        for plugin in routing.route(route_text(path), root_id).yielding
    }


_YIELDS = """
SELECT EXISTS (
    SELECT 1 FROM cf_plugin p JOIN cf_plugin_config c
    ON c.plugin_name = p.name AND c.active_version = p.version
    WHERE p.name IN (SELECT value FROM json_each(:names)) AND json_valid(p.manifest)
    AND json_extract(p.manifest, '$.catch_all')
) AND EXISTS (
    SELECT 1 FROM cf_plugin p JOIN cf_plugin_config c
    ON c.plugin_name = p.name AND c.active_version = p.version
    WHERE json_valid(p.manifest) AND json_type(p.manifest, '$.contract.table') IS NOT NULL
)
"""
"""Whether a table may take what one of the plugins would read."""


def give_up(connection: Connection, claimed: Sequence[Any]) -> set[int]:
    """Abort jobs that were just claimed, of catch-all plugins whose file is a table's; their ids.

    A new table has the queued ones aborted. One that ran then, or had failed, comes to the queue
    later. A job of an open rebuild goes on: the rows that it replaces stay.
    """
    names = json.dumps(sorted({job.plugin_name for job in claimed}))
    if not claimed or not connection.execute(_YIELDS, {"names": names}).scalar():
        return set()
    routing, given_up = Routing(connection), set()
    for job in claimed:
        routed = routing.route(route_text(job.path), job.root_id)
        if job.plugin_name in routed.yielding and not rebuild.open_of(connection, job.id):
            jobs.requeue(connection, job.id, job.fence, reason="", refund=True)
            jobs.give_up(connection, [(job.version_id, job.plugin_name, ", ".join(routed.tables))])
            given_up.add(job.id)
    return given_up
