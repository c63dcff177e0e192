"""Where topics go: which sinks a MANIFEST and a person may choose, and the changes of that."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import delete, insert, select

from casparian_flow import config, durable, sink_uri
from casparian_flow.config import Settings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import plugins, rebuild, versions, visibility
from casparian_flow.db import topics as db_topics
from casparian_flow.db.access import Connection, Ledger
from casparian_flow.db.audit import Event
from casparian_flow.db.models import EmptyTopic, TopicConfig
from casparian_flow.db.rebuild import Started
from casparian_flow.db.visibility import Change, Scope
from casparian_flow.engine import sinks
from casparian_flow.errors import ConfigError, NotFound, counted
from casparian_flow.protocol import MODES, data_topics, reject_topics
from casparian_flow.security.manifest import Manifest
from casparian_flow.services import inventory, outputs

# A person may send a topic anywhere. A MANIFEST is somebody else's code: it may name folders under
# the configured output roots (`[output] roots`), and use variables that `[output] env` lists. They
# are expanded here, once, by the process that deploys: what is stored and part of every output key
# is a path, so that no later change of an environment moves a topic.


class TopicSink(NamedTuple):
    """A sink of a topic, as it is configured."""

    topic: str
    uri: str
    """Without options and variables."""
    mode: str

    def __str__(self) -> str:
        return f"{self.uri}?mode={self.mode}"


def of_manifest(settings: Settings, manifest: Manifest, roots: Sequence[str]) -> list[TopicSink]:
    """Where each topic of a plugin goes, unless somebody has placed it.

    Args:
        roots: paths of the active source roots.

    Raises:
        ConfigError: a sink cannot be opened, or a plugin may not write there.
    """
    result: list[TopicSink] = []
    mode = "replace" if manifest.is_table else "append"
    for topic in manifest.topics:
        said = manifest.sinks_of(topic)
        chosen = of_person(settings, topic, said or [settings.output.default_uri], mode, roots)
        for sink in chosen if said else []:
            _check_roots(settings, sink)
        result += chosen
    _check_unique_tables(result)
    return result


def of_person(
    settings: Settings, topic: str, uris: Sequence[str], mode: str, roots: Sequence[str]
) -> list[TopicSink]:
    """Where a person sends a topic.

    Args:
        uris: sinks as written.
        mode: of those that do not say one themselves.
        roots: paths of the active source roots.

    Raises:
        ConfigError: a sink or mode is not one we have, or a sink is there twice.
    """
    if mode not in MODES:
        raise ConfigError(f"there is no mode {mode!r}", f"use one of {', '.join(MODES)}")
    by_location: dict[str, TopicSink] = {}
    for written in uris:
        uri, own_mode = sink_uri.read(written)
        sink = TopicSink(topic, _expanded(settings, topic, uri), own_mode or mode)
        location = sinks.resolve(sink.uri, settings.home)
        sinks.check_usable(location, settings.database)
        sinks.check_reserved(location, topic, settings)
        sinks.check_reserved_content(location, topic)
        _check_sources(sink, location, roots)
        if other := by_location.get(location):
            raise ConfigError(
                f"topic {topic!r}: {other.uri} and {sink.uri} are the same sink: it would get "
                "every row twice",
                "name it once",
            )
        by_location[location] = sink
    return list(by_location.values())


def of_row(topic: str, uri: str, mode: str) -> TopicSink:
    """A row of `cf_topic_config`; a person may have written options into its URI."""
    with contextlib.suppress(ConfigError):
        uri, said = sink_uri.read(uri)
        return TopicSink(topic, uri, said or mode)
    return TopicSink(topic, uri, mode)


def locations_of(settings: Settings, configured: Sequence[TopicSink]) -> set[tuple[str, str]]:
    """The location and the mode of each; two spellings of a URI are one location."""
    found = set()
    for sink in configured:
        location = sink.uri
        with contextlib.suppress(ConfigError):
            location = sinks.resolve(sink.uri, settings.home)
        found.add((location, sink.mode))
    return found


def _expanded(settings: Settings, topic: str, uri: str) -> str:
    def value_of(name: str) -> str:
        if name not in settings.output.env:
            raise ConfigError(
                f"topic {topic!r}: the sink {uri} uses the variable {name}, which the "
                "configuration does not allow",
                f'list it in {config.FILE_NAME}: [output] env = ["{name}"]',
            )
        if not (value := config.variable(name)):
            raise ConfigError(
                f"topic {topic!r}: the sink {uri} uses the variable {name}, which is not set "
                "in the daemon's environment (or, if no daemon runs, in yours)",
                f"export {name}=...   (and start the daemon with it)",
            )
        if "?" in value or "${" in value:
            raise ConfigError(
                f"topic {topic!r}: the sink {uri} uses the variable {name}, whose value "
                f"{value[:80]!r} is not a valid path",
                f"export {name}=...   (a folder's path)",
            )
        return value

    return sink_uri.expanded(uri, value_of)


def _check_roots(settings: Settings, sink: TopicSink) -> None:
    """A MANIFEST's sinks lie under the output roots, whatever symlinks are on the way.

    The topic's own folder or database is what counts, and not only the folder it is in.
    """
    target = sinks.target_of(sinks.resolve(sink.uri, settings.home), sink.topic)
    if target is None:
        return
    allowed = [os.path.realpath(settings.home / root) for root in settings.output.roots]
    if not any(_is_inside(os.path.realpath(target), root) for root in allowed):
        raise ConfigError(
            f"topic {sink.topic!r}: the MANIFEST's sink {sink.uri} is outside the folders "
            f"where plugins may write ({', '.join(allowed) or 'nowhere'})",
            f"list its folder in {config.FILE_NAME}: [output] roots; or leave the sink out of the "
            "MANIFEST, and after publishing: casparian topics set PLUGIN TOPIC URI",
        )


def _check_sources(sink: TopicSink, location: str, roots: Sequence[str]) -> None:
    """Scans of a source root leave out outputs in it, by their names. So a topic's folder must not
    be a person's, whose files would be left out too, nor the root itself."""
    target = sinks.target_of(location, sink.topic)
    if target is None:
        return
    real = os.path.realpath(target)
    for root in map(os.path.realpath, roots):
        if real == root:
            fault = "it is a source root, so its outputs would be read as input"
        elif _is_inside(real, root) and target.exists() and not _is_ours(target):
            fault = f"{target} already exists in the source root {root}, and scans would ignore it"
        else:
            continue
        raise ConfigError(
            f"topic {sink.topic!r} cannot go to {sink.uri}: {fault}", "choose another place"
        )


def _check_unique_tables(every: Sequence[TopicSink]) -> None:
    """SQL takes names of tables that differ in case only for the same."""
    tables = [sink for sink in every if not sink.uri.startswith(sinks.PREFIXES["parquet"])]
    for one, other in itertools.combinations(tables, 2):
        if one.topic != other.topic and one.topic.lower() == other.topic.lower():
            raise ConfigError(
                f"topics {one.topic!r} and {other.topic!r} differ only in case, which "
                f"{other.uri} ignores",
                "rename one of them",
            )


def _is_inside(path: str, root: str) -> bool:
    return os.path.commonpath([path, root]) == root


def _is_ours(target: Path) -> bool:
    """Whether scans know the name as one of ours."""
    patterns = durable.owned(target.parent / durable.STATE_FOLDER)
    return any(fnmatchcase(target.name, pattern) for pattern in patterns)


class TopicChange(NamedTuple):
    """Where a topic goes from now on, and what was before."""

    sinks: list[TopicSink]
    declared: list[str]
    """The topics of the plugin so far: those of its MANIFEST, and what people added."""
    change: Change
    """What became visible and invisible in its sinks."""
    notes: list[str]
    """What stays in sinks that it went to before, and which sinks could not be told; a sentence
    each."""
    rebuild: Started | None = None
    """What brings that to the present sinks, where it was asked for."""


def set_topic(
    ledger: Ledger, settings: Settings, plugin: str, topic: str, uris: Sequence[str], mode: str,
    *, again: bool = False,
) -> TopicChange:  # fmt: skip
    """Set the sinks that a topic goes to from now on.

    Args:
        uris: sinks as written.
        mode: of those that do not say one behind a `?`.
        again: begin a rebuild of the topic too, into these sinks.

    Raises:
        NotFound: no such plugin.
        ConfigError: a sink's URI or a mode is not one we have.
        ArtifactRefused, CasparianError: it cannot be rebuilt; nothing was changed.
    """
    known = ledger.read(lambda c: plugins.versions(c, plugin))
    if not known:
        raise NotFound(f"no plugin is named {plugin!r}", "casparian plugins")
    sinks_now = of_person(settings, topic, uris, mode, ledger.read(versions.active_paths))

    def work(connection: Connection) -> TopicChange:
        newest = plugins.find(connection, plugin, str(known[-1]))
        declared = plugins.topics_of(connection, newest)
        this = (TopicConfig.plugin_name == plugin, TopicConfig.topic_name == topic)
        connection.execute(delete(TopicConfig).where(*this))
        rows = [
            {"plugin_name": plugin, "topic_name": topic, "uri": p.uri, "mode": p.mode}
            for p in sinks_now
        ]
        connection.execute(insert(TopicConfig), rows)
        change = visibility.refresh(connection, Scope(plugin=plugin, topic=topic))
        started = None
        if again:
            with contextlib.suppress(NotFound):  # it has no rows
                started = rebuild.begin(connection, plugin, topic)
        until = " until the rebuild is complete" if started else ""
        stays = [f"{sentence}{until}" for sentence in staying(connection, plugin, topic)]
        return TopicChange(sinks_now, declared, change, stays, started)

    def events(done: TopicChange) -> list[Event]:
        detail = {"sinks": [str(sink) for sink in sinks_now]}
        begun = [rebuild.event(done.rebuild)] if done.rebuild else []
        return [Event("set-topic", f"topic {plugin} {topic}", detail), *begun]

    done = ledger.change(work, events)
    crashpoint("topics.set")
    inventory.note(settings, ledger)
    return done._replace(notes=[*done.notes, *outputs.tell(ledger)])


def staying(connection: Connection, plugin: str, topic: str) -> list[str]:
    """What a topic shows in sinks that it does not go to; a sentence each."""
    this = (TopicConfig.plugin_name == plugin, TopicConfig.topic_name == topic)
    rows = connection.execute(select(TopicConfig.uri, TopicConfig.mode).where(*this))
    present = {of_row(topic, row.uri, row.mode).uri for row in rows}
    return [
        f"{counted(usage.outputs, 'output')} ({counted(usage.rows, 'row')}) "
        f"{'stays' if usage.outputs == 1 else 'stay'} in {usage.uri}"
        for usage in visibility.usage(connection, plugin, topic)
        if usage.uri not in present
    ]


class Removal(NamedTuple):
    """What goes with a topic."""

    change: Change
    notes: list[str]
    """Which sinks could not be told; a sentence each."""


def check_removable(ledger: Ledger, plugin: str, topic: str) -> None:
    """Return if `remove` would take the topic away.

    Raises:
        NotFound, ConfigError: as for `remove`.
    """
    ledger.read(lambda c: _check_removable(c, plugin, topic))


def _check_removable(connection: Connection, plugin: str, topic: str) -> None:
    known = plugins.versions(connection, plugin, stubs=True)
    if not known:
        raise NotFound(f"no plugin is named {plugin!r}", "casparian plugins")
    version = plugins.active(connection, plugin) or str(known[-1])
    manifest = plugins.find(connection, plugin, version).manifest
    if manifest and topic in plugins.manifest_of(manifest).topics:
        raise ConfigError(
            f"{plugin} {version} declares the topic {topic!r}; nothing was changed",
            f"casparian topics set {plugin} {topic} URI   (sends it elsewhere)",
        )
    this = (TopicConfig.plugin_name == plugin, TopicConfig.topic_name == topic)
    configured = connection.execute(select(TopicConfig.id).where(*this)).first()
    if not configured and not db_topics.has_outputs(connection, plugin, topic):
        raise NotFound(f"{plugin} has no topic {topic!r}", "casparian topics")


def remove(ledger: Ledger, plugin: str, topic: str) -> Removal:
    """Take away a topic that a plugin ceased to declare: where it goes, and its rows.

    The rows are hidden in every sink, and removed there when their time is over.

    Raises:
        NotFound: the plugin does not exist, or has neither rows nor a sink of such a topic.
        ConfigError: the plugin declares the topic.
    """

    def work(connection: Connection) -> Change:
        _check_removable(connection, plugin, topic)
        for table in (TopicConfig, EmptyTopic):
            this = (table.plugin_name == plugin, table.topic_name == topic)
            connection.execute(delete(table).where(*this))
        db_topics.remove(connection, plugin, topic)
        return visibility.refresh(connection, Scope(plugin=plugin, topic=topic))

    def events(change: Change) -> list[Event]:
        detail = {"outputs": change.hidden, "rows": change.hidden_rows}
        return [Event("remove-topic", f"topic {plugin} {topic}", detail)]

    change = ledger.change(work, events)
    crashpoint("topics.removed")
    return Removal(change, outputs.tell(ledger))


def allow_empty(ledger: Ledger, plugin: str, topic: str, allow: bool) -> list[str]:
    """Say whether a file of which nothing but rejects came may be COMPLETED; what follows, a
    sentence each.

    Args:
        plugin: empty where only one has such a topic.
        topic: a topic of data.

    Raises:
        NotFound: no such plugin, or it has no such topic.
        ConfigError: it is a topic of rejects, or several plugins have it.
    """
    plugin = plugin or _only_plugin(ledger, topic)
    known = ledger.read(lambda c: plugins.versions(c, plugin))
    if not known:
        raise NotFound(f"no plugin is named {plugin!r}", "casparian plugins")

    def declared(connection: Connection) -> list[str]:
        newest = plugins.find(connection, plugin, str(known[-1]))
        return plugins.topics_of(connection, newest)

    names = ledger.read(declared)
    if topic not in names:
        have = ", ".join(names) or "none"
        raise NotFound(f"{plugin} has no topic {topic!r} (it has: {have})", "casparian topics")
    if topic in reject_topics(names):
        data = sorted(data_topics(topic, names))
        raise ConfigError(
            f"{topic} is a topic of rejects: it may always be empty",
            f"casparian topics set {plugin} {data[0]} --allow-empty",
        )

    def work(connection: Connection) -> None:
        this = (EmptyTopic.plugin_name == plugin, EmptyTopic.topic_name == topic)
        connection.execute(delete(EmptyTopic).where(*this))
        if allow:
            connection.execute(insert(EmptyTopic).values(plugin_name=plugin, topic_name=topic))

    detail = {"allow_empty": allow}
    ledger.change(work, lambda _: [Event("set-topic", f"topic {plugin} {topic}", detail)])
    if not allow:
        return [f"{plugin}: a file that gives rejects and no row of {topic} is FAILED"]
    return [
        f"{plugin}: a file that gives rejects and no row of {topic} is COMPLETED, "
        "and its rejects are published",
        f"to run the jobs that failed for this: casparian jobs retry --failed --plugin {plugin}",
    ]


def _only_plugin(ledger: Ledger, topic: str) -> str:
    query = select(TopicConfig.plugin_name).where(TopicConfig.topic_name == topic).distinct()
    query = query.order_by(TopicConfig.plugin_name)
    found = ledger.read(lambda c: c.execute(query).scalars().all())
    if not found:
        raise NotFound(f"no plugin has a topic {topic!r}", "casparian topics")
    if len(found) > 1:
        raise ConfigError(
            f"several plugins have a topic {topic!r}: {', '.join(found)}",
            f"casparian topics set {found[0]} {topic} --allow-empty",
        )
    return found[0]
