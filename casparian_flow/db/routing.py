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

from wcmatch import glob

from casparian_flow.db.access import Connection

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


class Taker(NamedTuple):
    """An active plugin."""

    plugin_id: int
    name: str
    version: str
    is_table: bool
    is_catch_all: bool
    root_ids: frozenset[int] | None
    """The source roots whose files it takes; None: of every one."""


class Routed(NamedTuple):
    """Who gets a file."""

    jobs: list[JobRequest]
    tables: list[str]
    """Of those that get it, the tables."""
    yielding: list[str]
    """The catch-all plugins that would get it if no table did."""


# The MANIFEST of an earlier release's plugin need not be JSON: it says none of this.
_ACTIVE = """
SELECT p.id, p.name, p.version, c.subscription_tags,
       CASE WHEN json_valid(p.manifest)
            THEN json_type(p.manifest, '$.contract.table') IS NOT NULL END,
       CASE WHEN json_valid(p.manifest) THEN json_extract(p.manifest, '$.catch_all') END,
       CASE WHEN json_valid(p.manifest) THEN json_extract(p.manifest, '$.contract.source') END
FROM cf_plugin p JOIN cf_plugin_config c
ON c.plugin_name = p.name AND c.active_version = p.version
ORDER BY p.id
"""


class Routing:
    """The rules and subscriptions as of one moment."""

    def __init__(self, connection: Connection) -> None:
        """Read them.

        A rule that is not a glob cannot be made with our commands; one that was written into the
        table by other means matches nothing, and `casparian rules list` says so.
        """
        self._rules: list[_Rule] = []
        query = "SELECT pattern, tag, priority, any_case FROM cf_routing_rule ORDER BY id"
        rules = [(*rule, bool(any_case)) for *rule, any_case in connection.execute(query)]
        for pattern, tag, priority, any_case in rules:
            try:
                compiled = compile_pattern(pattern, any_case=any_case)
                self._rules.append(_Rule(compiled, tag, priority))
            except (ValueError, re.error):
                continue
        plugins = connection.execute(_ACTIVE).all()
        # What the fingerprint covers: a source root matters only where a table names one.
        named = {source for *_, source in plugins if source}
        roots = [(r.id, r.name) for r in every_root(connection) if r.active and r.name in named]
        self.takers: list[Taker] = []
        """The active plugins."""
        self._subscribers: dict[str, list[Taker]] = defaultdict(list)
        for plugin_id, name, version, tags, is_table, is_catch_all, source in plugins:
            ids = frozenset(i for i, root in roots if root == source) if source else None
            yields = bool(is_catch_all) and not is_table
            taker = Taker(plugin_id, name, version, bool(is_table), yields, ids)
            self.takers.append(taker)
            for tag in tags_of(tags):
                self._subscribers[tag].append(taker)
        facts = repr([rules, [tuple(row) for row in plugins], roots])
        self.fingerprint = hashlib.sha256(facts.encode("utf-8", "surrogateescape")).hexdigest()

    def tags(self, path: str) -> set[str]:
        """The tags a relative path gets: those of all rules that match."""
        return {rule.tag for rule in self._rules if rule.pattern.match(path)}

    def route(self, path: str, root_id: int) -> Routed:
        """Who gets a version at this relative path below a source root.

        A file that is a table's is not routed to plugins that take any file of its kind.
        """
        best: dict[Taker, int] = {}
        for rule in self._rules:
            if rule.tag in self._subscribers and rule.pattern.match(path):
                for taker in self._subscribers[rule.tag]:
                    if taker.root_ids is None or root_id in taker.root_ids:
                        best[taker] = max(rule.priority, best.get(taker, rule.priority))
        tables = [taker.name for taker in best if taker.is_table]
        yielding = [taker.name for taker in best if tables and taker.is_catch_all]
        jobs = [
            JobRequest(taker.plugin_id, taker.name, priority)
            for taker, priority in best.items()
            if taker.name not in yielding
        ]
        return Routed(jobs, tables, yielding)

    def job_requests(self, path: str, root_id: int) -> list[JobRequest]:
        """The jobs a version at this relative path below a source root gives, one a plugin."""
        return self.route(path, root_id).jobs


# Source roots by what a person types.


def every_root(connection: Connection) -> Sequence[Any]:
    """Every source root, removed ones among them: id, path, name, active."""
    return connection.execute("SELECT id, path, name, active FROM cf_source_root ORDER BY id").all()


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
