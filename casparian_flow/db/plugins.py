"""Deployed plugins, their subscriptions and their topics."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Sequence
from typing import Any

from packaging.version import Version
from sqlalchemy import Connection, insert, select, update

from casparian_flow.db.models import Epoch, Plugin, PluginConfig, RoutingRule, TopicConfig
from casparian_flow.db.routing import tags_of
from casparian_flow.errors import CasparianError
from casparian_flow.security import signing


def find(connection: Connection, name: str, version: str) -> Any:
    """The Plugin row of this version; None where it was never deployed."""
    columns = Plugin.__table__.columns
    return connection.execute(
        select(*columns).where(Plugin.name == name, Plugin.version == version)
    ).first()


def get(connection: Connection, plugin_id: int) -> Any:
    """The Plugin row with this id; None where there is none."""
    columns = Plugin.__table__.columns
    return connection.execute(select(*columns).where(Plugin.id == plugin_id)).first()


def versions(connection: Connection, name: str) -> list[Version]:
    """Every deployed version of a plugin, oldest first by PEP 440."""
    return sorted(
        map(
            Version, connection.execute(select(Plugin.version).where(Plugin.name == name)).scalars()
        )
    )


def add(connection: Connection, **columns: Any) -> int:
    """Insert an artifact; immutable from here on. Returns its id."""
    return connection.execute(insert(Plugin).values(**columns).returning(Plugin.id)).scalar_one()


def subscribe(connection: Connection, name: str, tags: Sequence[str], active: str) -> None:
    """Make a version the one that takes new jobs, and add to the tags it subscribes to."""
    row = connection.execute(
        select(PluginConfig.subscription_tags).where(PluginConfig.plugin_name == name)
    ).first()
    if row is None:
        connection.execute(
            insert(PluginConfig).values(
                plugin_name=name, subscription_tags=",".join(tags), active_version=active
            )
        )
        return
    known = tags_of(row.subscription_tags)
    added = [tag for tag in tags if tag not in known]
    connection.execute(
        update(PluginConfig)
        .where(PluginConfig.plugin_name == name)
        .values(
            subscription_tags=",".join(filter(None, [row.subscription_tags, *added])),
            active_version=active,
        )
    )


def replace_rules(connection: Connection, tag: str, patterns: Sequence[str], priority: int) -> None:
    """Give a tag exactly these patterns: what a plugin's own rules become at each publish."""
    connection.execute(RoutingRule.__table__.delete().where(RoutingRule.tag == tag))  # type: ignore[attr-defined]
    connection.execute(
        insert(RoutingRule),
        [{"pattern": pattern, "tag": tag, "priority": priority} for pattern in patterns],
    )


def add_topics(connection: Connection, name: str, uris: dict[str, str]) -> None:
    """Place topics that nobody placed yet; what a person set with `topics set` stays."""
    placed = set(
        connection.execute(
            select(TopicConfig.topic_name).where(TopicConfig.plugin_name == name)
        ).scalars()
    )
    rows = [
        {"plugin_name": name, "topic_name": topic, "uri": uri, "mode": "append"}
        for topic, uri in uris.items()
        if topic not in placed
    ]
    if rows:
        connection.execute(insert(TopicConfig), rows)


def topics(connection: Connection) -> dict[str, list[Any]]:
    """Plugin name -> its TopicConfig rows (topic_name, uri, mode)."""
    found: dict[str, list[Any]] = {}
    rows = connection.execute(
        select(
            TopicConfig.plugin_name, TopicConfig.topic_name, TopicConfig.uri, TopicConfig.mode
        ).order_by(TopicConfig.id)
    )
    for row in rows:
        found.setdefault(row.plugin_name, []).append(row)
    return found


def begin_epoch(connection: Connection) -> int:
    """A number for this run of a process that claims jobs; the caller holds the daemon lock."""
    return connection.execute(
        insert(Epoch).values(pid=os.getpid(), host=socket.gethostname()).returning(Epoch.id)
    ).scalar_one()


def ids(connection: Connection, names: Iterable[str]) -> list[int]:
    """Ids of every deployed version of these plugins."""
    return list(connection.execute(select(Plugin.id).where(Plugin.name.in_(list(names)))).scalars())


def topics_of(connection: Connection, plugin: Any) -> list[str]:
    """Every topic a plugin may publish to: what its MANIFEST declares and what people added."""
    placed = [row.topic_name for row in topics(connection).get(plugin.name, [])]
    return list(dict.fromkeys([*json.loads(plugin.manifest)["topics"], *placed]))


def refusal(plugin: Any) -> str:
    """Why an artifact may not be run: its bytes are not those that were signed. Empty: it may."""
    statement = signing.Statement(
        plugin=plugin.name,
        version=plugin.version,
        artifact_sha256=signing.artifact_hash(plugin.source, plugin.lock),
    )
    try:
        signing.verify(plugin.public_key, plugin.signature, statement)
    except CasparianError as error:
        return f"plugin {plugin.name} {plugin.version} was not run: {error.message}"
    return ""
