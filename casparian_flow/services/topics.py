"""A person says where a topic goes, and is told what stays where it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sqlalchemy import Connection

from casparian_flow.config import Settings
from casparian_flow.db import plugins, roots, wiring
from casparian_flow.db.access import Ledger
from casparian_flow.db.wiring import Standing
from casparian_flow.errors import NotFound
from casparian_flow.services import inventory, places
from casparian_flow.services.places import Place


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
