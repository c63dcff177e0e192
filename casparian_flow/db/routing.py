"""Which plugins get a file: rules give tags to paths, plugins subscribe to tags.

A pattern without a slash matches the file's name at any depth; with a slash it is anchored at the
source root, and `**` crosses directories. Capital and small letters are the same, unless the rule
asks for the exact case.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, and_, select
from wcmatch import glob

from casparian_flow.db.models import Plugin, PluginConfig, RoutingRule, SourceRoot

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
        raise ValueError(f"{pattern[:80]!r} expands to too many patterns: {error}") from error
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
    """The rules and subscriptions as of one moment."""

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


# Source roots by what a person types.


def every_root(connection: Connection) -> Sequence[Any]:
    """Every source root, removed ones among them: id, path, name, active."""
    columns = (SourceRoot.id, SourceRoot.path, SourceRoot.name, SourceRoot.active)
    return connection.execute(select(*columns).order_by(SourceRoot.id)).all()


def resolve_argument(connection: Connection, path: str) -> Iterator[tuple[Any, bytes, str]]:
    """The files that a person may mean by `NAME/path` or by a path from here.

    Yields:
        The source root, the path below it, and the same path as it is shown.
    """
    for root in every_root(connection):
        given = {path, path.removeprefix(f"{root.name}/")}
        given.add(os.path.relpath(os.path.abspath(path), root.path))
        for below in sorted(given):
            raw = os.fsencode(below)
            yield root, raw, raw.decode("utf-8", "backslashreplace")
