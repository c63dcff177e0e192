"""Which plugins want a file: rules give tags to paths, plugins subscribe to tags.

A pattern without a slash matches the file's name at any depth; with a slash it is anchored at the
source root, and `**` crosses directories. Capital and small letters are the same, unless the rule
asks for the exact case.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, and_, delete, func, insert, select, text, update
from wcmatch import glob

from casparian_flow.db import audit
from casparian_flow.db.found import INVISIBLE
from casparian_flow.db.models import (
    EmptyTopic,
    Output,
    OutputState,
    Plugin,
    PluginConfig,
    ProcessingJob,
    RoutingRule,
    SourceRoot,
    TopicConfig,
)

_FLAGS = glob.GLOBSTAR | glob.DOTGLOB | glob.BRACE | glob.EXTGLOB | glob.FORCEUNIX


def compile_pattern(pattern: str, *, any_case: bool = True) -> re.Pattern[str]:
    """A routing pattern as one regular expression over the path relative to the root.

    Args:
        any_case: capital and small letters are the same, in every part of the path.

    Raises:
        ValueError: the pattern is empty or not a glob.
    """
    if not pattern.strip("/"):
        raise ValueError(f"not a pattern: {pattern!r}")
    anchored = pattern.lstrip("/") if "/" in pattern else f"**/{pattern}"
    case = glob.IGNORECASE if any_case else glob.CASE
    try:
        wanted, _ = glob.translate(anchored, flags=_FLAGS | case)
    except Exception as error:
        raise ValueError(f"{pattern[:80]!r} stands for too many patterns: {error}") from error
    return re.compile("|".join(f"(?:{part})" for part in wanted))


def tags_of(text: str) -> set[str]:
    """The tags in a comma separated list."""
    return {tag.strip() for tag in text.split(",") if tag.strip()}


class JobRequest(NamedTuple):
    """A job to be queued for a version."""

    plugin_id: int
    plugin_name: str
    priority: int


class _Rule(NamedTuple):
    pattern: re.Pattern[str]
    tag: str
    priority: int


class Routing:
    """The rules and subscriptions of one moment."""

    def __init__(self, connection: Connection) -> None:
        """Read them.

        A rule that is not a glob cannot be made with our commands; one that was written into the
        table by other means matches nothing, and `casparian rules list` says so.
        """
        self._rules: list[_Rule] = []
        rules = connection.execute(
            select(
                RoutingRule.pattern, RoutingRule.tag, RoutingRule.priority, RoutingRule.any_case
            ).order_by(RoutingRule.id)
        ).all()
        for pattern, tag, priority, any_case in rules:
            try:
                compiled = compile_pattern(pattern, any_case=any_case)
                self._rules.append(_Rule(compiled, tag, priority))
            except (ValueError, re.error):
                continue
        plugins = connection.execute(
            select(Plugin.id, Plugin.name, PluginConfig.subscription_tags)
            .join(
                PluginConfig,
                and_(
                    PluginConfig.plugin_name == Plugin.name,
                    PluginConfig.active_version == Plugin.version,
                ),
            )
            .order_by(Plugin.id)
        ).all()
        self._subscribers: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for plugin_id, name, tags in plugins:
            for tag in tags_of(tags):
                self._subscribers[tag].append((plugin_id, name))
        facts = repr([[tuple(row) for row in rules], [tuple(row) for row in plugins]])
        self.fingerprint = hashlib.sha256(facts.encode("utf-8", "surrogateescape")).hexdigest()

    def tags(self, path: str) -> set[str]:
        """The tags a relative path gets: those of all rules that match."""
        return {rule.tag for rule in self._rules if rule.pattern.match(path)}

    def job_requests(self, path: str) -> list[JobRequest]:
        """The jobs a version at this relative path gives, one a plugin."""
        best: dict[tuple[int, str], int] = {}
        for rule in self._rules:
            if rule.tag in self._subscribers and rule.pattern.match(path):
                for plugin in self._subscribers[rule.tag]:
                    best[plugin] = max(rule.priority, best.get(plugin, rule.priority))
        return [JobRequest(*plugin, priority) for plugin, priority in best.items()]


# What people change: source roots, rules and topics. Each change stands in the audit.


def actor() -> str:
    """Who the audit says did it: this process's user."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return f"uid {os.getuid()}"


def note(connection: Connection, action: str, subjects: Iterable[str], **detail: Any) -> None:
    """Write down, in the caller's transaction, that a person did something to each subject."""
    audit.append(connection, actor(), [audit.Event(action, s, detail) for s in subjects])


def every_root(connection: Connection) -> Sequence[Any]:
    """Every source root, removed ones among them: id, path, name, active."""
    columns = (SourceRoot.id, SourceRoot.path, SourceRoot.name, SourceRoot.active)
    return connection.execute(select(*columns).order_by(SourceRoot.id)).all()


def meant(connection: Connection, path: str) -> Iterator[tuple[Any, bytes, str]]:
    """(source root, path below it, the same as we show it) that a person may mean by `NAME/path`
    or by a path from here."""
    for root in every_root(connection):
        given = {path, path.removeprefix(f"{root.name}/")}
        given.add(os.path.relpath(os.path.abspath(path), root.path))
        for below in sorted(given):
            raw = os.fsencode(below)
            yield root, raw, raw.decode("utf-8", "backslashreplace")


def add_root(connection: Connection, root_id: int | None, **columns: Any) -> str:
    """Make a directory a source root, or an earlier one active again; its name."""
    if root_id is None:
        statement: Any = insert(SourceRoot).values(active=True, **columns)
    else:
        statement = update(SourceRoot).where(SourceRoot.id == root_id)
        statement = statement.values(active=True, **columns)
    name: str = connection.execute(statement.returning(SourceRoot.name)).scalar_one()
    note(connection, "add-source", [f"source {name}"], **columns)
    return name


def set_root(connection: Connection, name: str, **columns: Any) -> bool:
    """Change an active root's options. False: no active root has that name."""
    changed = connection.execute(
        update(SourceRoot).where(SourceRoot.name == name, SourceRoot.active).values(**columns)
    )
    if not changed.rowcount:
        return False
    note(connection, "set-source", [f"source {name}"], **columns)
    return True


def remove_root(connection: Connection, name: str) -> bool:
    """Scan it no more; what is known of it stays. False: no active root has that name."""
    found = connection.execute(
        update(SourceRoot)
        .where(SourceRoot.name == name, SourceRoot.active)
        .values(active=False)
        .returning(SourceRoot.path)
    ).scalar()
    if found is None:
        return False
    note(connection, "remove-source", [f"source {name}"], path=found)
    return True


def add_rule(
    connection: Connection, pattern: str, tag: str, priority: int, any_case: bool = True
) -> int | None:
    """A routing rule's id; None where there is one with that pattern and tag."""
    same = (RoutingRule.pattern == pattern, RoutingRule.tag == tag)
    if connection.execute(select(RoutingRule.id).where(*same)).first():
        return None
    rule_id: int = connection.execute(
        insert(RoutingRule)
        .values(pattern=pattern, tag=tag, priority=priority, any_case=any_case)
        .returning(RoutingRule.id)
    ).scalar_one()
    detail = {"pattern": pattern, "tag": tag, "priority": priority, "any_case": any_case}
    note(connection, "add-rule", [f"rule {rule_id}"], **detail)
    return rule_id


def remove_rule(connection: Connection, rule_id: int) -> str | None:
    """The removed rule in words; None where there was none."""
    row = connection.execute(
        delete(RoutingRule)
        .where(RoutingRule.id == rule_id)
        .returning(RoutingRule.pattern, RoutingRule.tag)
    ).first()
    if row is None:
        return None
    note(connection, "remove-rule", [f"rule {rule_id}"], pattern=row.pattern, tag=row.tag)
    return f"{row.pattern} -> {row.tag}"


def set_topic(
    connection: Connection, plugin: str, topic: str, sinks: Sequence[tuple[str, str]]
) -> None:
    """Send a topic to these sinks and no others; what was published elsewhere stays there.

    Args:
        sinks: URI and mode of each.
    """
    connection.execute(
        delete(TopicConfig).where(
            TopicConfig.plugin_name == plugin, TopicConfig.topic_name == topic
        )
    )
    rows = [
        {"plugin_name": plugin, "topic_name": topic, "uri": uri, "mode": mode}
        for uri, mode in sinks
    ]
    connection.execute(insert(TopicConfig), rows)
    written = [f"{uri}?mode={mode}" for uri, mode in sinks]
    note(connection, "set-topic", [f"topic {plugin} {topic}"], sinks=written)


def allow_empty(connection: Connection, plugin: str, topic: str, allow: bool) -> None:
    """Say whether a file may give a topic of data no row while it gives rejects."""
    connection.execute(
        delete(EmptyTopic).where(EmptyTopic.plugin_name == plugin, EmptyTopic.topic_name == topic)
    )
    if allow:
        connection.execute(insert(EmptyTopic).values(plugin_name=plugin, topic_name=topic))
    note(connection, "set-topic", [f"topic {plugin} {topic}"], allow_empty=allow)


def plugins_with(connection: Connection, topic: str) -> list[str]:
    """The plugins that have a topic of this name."""
    query = select(TopicConfig.plugin_name).where(TopicConfig.topic_name == topic).distinct()
    return list(connection.execute(query.order_by(TopicConfig.plugin_name)).scalars())


class Standing(NamedTuple):
    """What a topic has published to one sink in one mode."""

    uri: str
    mode: str
    outputs: int
    rows: int


def standing(connection: Connection, plugin: str, topic: str) -> list[Standing]:
    """What readers may see of a plugin's topic, sink by sink."""
    query = (
        select(Output.uri, Output.mode, func.count(), func.sum(Output.rows))
        .join(ProcessingJob, ProcessingJob.id == Output.job_id)
        .where(
            ProcessingJob.plugin_name == plugin,
            Output.topic == topic,
            Output.state == OutputState.PUBLISHED,
            Output.output_key.not_in(text(f"({INVISIBLE})")),
        )
        .group_by(Output.uri, Output.mode)
        .order_by(Output.uri, Output.mode)
    )
    return [Standing(*row) for row in connection.execute(query)]
