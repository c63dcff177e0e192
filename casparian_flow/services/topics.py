"""A person says where a topic goes, and is told what stays where it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sqlalchemy import Connection

from casparian_flow.config import Settings
from casparian_flow.db import plugins, roots, wiring
from casparian_flow.db.access import Ledger
from casparian_flow.db.wiring import Standing
from casparian_flow.errors import ConfigError, NotFound
from casparian_flow.services import inventory, places
from casparian_flow.services.places import Place
from casparian_flow.topics import data_of, rejects


class Placed(NamedTuple):
    """Where a topic goes from now on, and what was before."""

    places: list[Place]
    declared: list[str]
    """The topics of the plugin so far: those of its MANIFEST, and what people added."""
    stays: list[str]
    """What was published elsewhere or in another mode and is not touched; a sentence each."""


def set_topic(
    ledger: Ledger, settings: Settings, plugin: str, topic: str, uris: Sequence[str], mode: str
) -> Placed:
    """Send a topic to these sinks, and no others, from now on.

    Args:
        uris: sinks as written.
        mode: of those that do not say one behind a `?`.

    Raises:
        NotFound: no such plugin.
        ConfigError: a sink's URI or a mode is not one we have.
    """
    known = ledger.read(lambda c: plugins.versions(c, plugin))
    if not known:
        raise NotFound(f"no plugin is named {plugin!r}", "casparian plugins")
    placed = places.of_person(settings, topic, uris, mode, ledger.read(roots.active_paths))

    def work(connection: Connection) -> Placed:
        newest = plugins.find(connection, plugin, str(known[-1]))
        declared = plugins.topics_of(connection, newest)
        wiring.set_topic(connection, plugin, topic, [(p.uri, p.mode) for p in placed])
        standing = wiring.standing(connection, plugin, topic)
        return Placed(placed, declared, list(_stays(placed, standing)))

    done = ledger.write(work)
    inventory.take(settings, ledger)
    return done


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
    if topic in rejects(names):
        data = sorted(data_of(topic, names))
        raise ConfigError(
            f"{topic} is a topic of rejects: it is empty where a file has none",
            f"casparian topics set {plugin} {data[0]} --allow-empty",
        )
    ledger.write(lambda c: wiring.allow_empty(c, plugin, topic, allow))
    if not allow:
        return [f"{plugin}: a file that gives rejects and no row of {topic} is FAILED"]
    return [
        f"{plugin}: a file that gives rejects and no row of {topic} is COMPLETED, "
        "and its rejects are published",
        f"those that failed for it: casparian jobs retry --failed --plugin {plugin}",
    ]


def _only_plugin(ledger: Ledger, topic: str) -> str:
    found = ledger.read(lambda c: wiring.plugins_with(c, topic))
    if not found:
        raise NotFound(f"no plugin has a topic {topic!r}", "casparian topics")
    if len(found) > 1:
        raise ConfigError(
            f"several plugins have a topic {topic!r}: {', '.join(found)}",
            f"casparian topics set {found[0]} {topic} --allow-empty",
        )
    return found[0]


def _stays(placed: Sequence[Place], standing: Sequence[Standing]) -> Iterator[str]:
    modes = {place.uri: place.mode for place in placed}
    for uri, mode, outputs, rows in standing:
        now = modes.get(uri)
        if now == mode:
            continue
        noun, verb = ("output", "stays") if outputs == 1 else ("outputs", "stay")
        counted = f"{outputs} {noun} ({rows} row{'' if rows == 1 else 's'})"
        if now is None:
            yield f"{counted} {verb} in {uri}"
        elif (mode, now) == ("append", "replace"):
            yield (
                f"{counted} appended to {uri} before {verb}: only what is published from now on "
                "replaces, and is replaced; `casparian retract PATH` takes a file's rows away"
            )
        else:
            yield f"{counted} published to {uri} in mode {mode} {verb}"
