"""Topics that a plugin ceased to declare: their rows stay until a user removes the topic, and come
back when what gave them is active again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from casparian_flow.db import plugins, visibility
from casparian_flow.db.access import Connection, execute, execute_many

_OF_TOPIC = """
SELECT o.id FROM cf_output o JOIN cf_processing_queue j ON j.id = o.job_id
WHERE o.topic = :topic AND o.state = 'PUBLISHED' AND j.plugin_name = :plugin
  AND o.id NOT IN (SELECT output_id FROM cf_left_output)
"""


def has_outputs(connection: Connection, plugin: str, topic: str) -> bool:
    """Whether a topic of a plugin has outputs that were not left behind."""
    return execute(connection, _OF_TOPIC, plugin=plugin, topic=topic).first() is not None


def remove(connection: Connection, plugin: str, topic: str) -> None:
    """Leave all outputs of a topic behind, since a user removed it. The caller decides anew what
    stands."""
    statement = f"INSERT INTO cf_left_output (output_id) {_OF_TOPIC}"
    execute(connection, statement, plugin=plugin, topic=topic)


def take_back(
    connection: Connection, plugin: str, version: str, topics: Sequence[str]
) -> list[str]:
    """Take back what a version gave to topics that were removed: it declares them, and is active
    again. The caller decides anew what stands.

    Returns:
        Those topics.
    """
    rows: Sequence[Any] = execute(
        connection,
        """
        SELECT o.topic, o.id FROM cf_left_output f JOIN cf_output o ON o.id = f.output_id
        JOIN cf_processing_queue j ON j.id = o.job_id JOIN cf_plugin p ON p.id = j.plugin_id
        JOIN cf_plugin this ON this.name = p.name AND this.artifact_hash = p.artifact_hash
        WHERE f.rebuild_id IS NULL AND this.name = :plugin AND this.version = :version
        AND o.topic IN (SELECT value FROM json_each(:topics))
        """,
        plugin=plugin,
        version=version,
        topics=list(topics),
    ).all()
    statement = "DELETE FROM cf_left_output WHERE output_id = ?"
    execute_many(connection, statement, [(number,) for _, number in rows])
    return sorted({topic for topic, _ in rows})


class Undeclared(NamedTuple):
    """A topic that the active version of its plugin does not declare, and an earlier one did."""

    plugin: str
    topic: str
    rows: int
    """That show."""


def undeclared(connection: Connection) -> list[Undeclared]:
    """Topics whose rows stay although no new ones come."""
    rows: Sequence[Any] = execute(
        connection,
        f"""
        SELECT j.plugin_name, o.topic, sum(o.rows) FROM cf_visibility s
        JOIN cf_output o ON o.id = s.output_id JOIN cf_processing_queue j ON j.id = o.job_id
        WHERE {visibility.SHOWN} GROUP BY 1, 2 ORDER BY 1, 2
        """,  # noqa: S608
    ).all()
    if not rows:
        return []
    found = connection.execute(
        "SELECT p.name, p.manifest, p.version = c.active_version FROM cf_plugin p "
        "JOIN cf_plugin_config c ON c.plugin_name = p.name "
        "WHERE p.manifest <> '' AND c.active_version IS NOT NULL"
    )
    declared: dict[bool, set[tuple[str, str]]] = {True: set(), False: set()}
    for name, manifest, is_active in found:
        topics = plugins.manifest_of(manifest).topics
        declared[bool(is_active)] |= {(name, topic) for topic in topics}
    ceased = declared[False] - declared[True]
    return [
        Undeclared(plugin, topic, number)
        for plugin, topic, number in rows
        if (plugin, topic) in ceased
    ]
