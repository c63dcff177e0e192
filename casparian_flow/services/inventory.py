"""Ask the sinks for outputs that the ledger does not know: it was lost, or is older than its sinks.

Sinks record their outputs by output key, so this needs no clock: every output whose key the ledger
does not have is found, and `db.adopt` writes its rows before the ledger gives any id. It is done
when a daemon starts, before scans, before the first scan of a source root, and while a daemon runs
as soon as a topic goes to a sink that was never asked.

A sink that cannot be asked is named, and jobs that would write there wait until it was. A ledger
that is known to have all its outputs waits for none (see `db.asked`).

Two files beside the ledger outlive it: `<database>.sinks` lists the sinks that it has used, so that
a new ledger in its place asks them too; `<database>.epoch` has its id and its last epoch.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from shlex import quote

from casparian_flow import durable
from casparian_flow.config import DatabaseSettings, Settings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import adopt, asked, kept, visibility
from casparian_flow.db.access import Connection, Ledger
from casparian_flow.db.adopt import Adoption
from casparian_flow.db.asked import Mark
from casparian_flow.engine import sinks
from casparian_flow.errors import CasparianError, LedgerError, counted
from casparian_flow.protocol import Output
from casparian_flow.services import outputs, store_upkeep

log = logging.getLogger(__name__)

ASK_SECONDS = 1.0
"""How often a daemon looks for topics that go to a sink which was not asked yet."""

AGAIN_SECONDS = 5.0
"""Pause before a sink that could not be asked is asked again."""


def take(settings: Settings, ledger: Ledger) -> list[str]:
    """Ask the sinks that topics go to, and those that the ledger has used; what was adopted and
    what could not be asked, in words.

    Raises:
        LedgerError: the ledger could not be read or written.
    """
    return _take(settings.database, ledger, [*_configured(settings, ledger)])


def before_scan(database: DatabaseSettings, ledger: Ledger) -> list[str]:
    """`take` from the sinks that the ledger has used, unless a daemon runs: it has done so."""
    if durable.daemon_lock_holder(database.daemon_lock) is not None:
        return []
    return _logged(_take(database, ledger, []))


def before_first_scan(ledger: Ledger) -> None:
    """`take` from the sinks that the ledger has used, before a source root is scanned first: their
    outputs of it could not be adopted without it. A sink that cannot be asked is asked later."""
    _logged(_take(ledger.database, ledger, [], doubted=True))


def _logged(messages: list[str]) -> list[str]:
    for message in messages:
        log.warning("%s", message)
    return messages


def may_be_older(database: DatabaseSettings, ledger: Ledger) -> bool:
    """Whether the ledger was restored, or is a new one in the place of another, and its sinks were
    not asked yet: they may have more than it knows. Looks at the ledger and one small file."""
    beside = _beside(database)
    if "" in ledger.read(asked.unknown).values():
        return True  # it was doubted, and nobody has asked since
    is_known = beside is not None or ledger.read(asked.used)
    return bool(is_known) and ledger.read(partial(asked.is_doubtful, beside=beside))


def waiting(settings: Settings, ledger: Ledger) -> dict[str, str]:
    """The sinks that topics go to and that were not asked yet -> why; empty if nobody tried."""
    failed = ledger.read(asked.unknown)
    known = ledger.read(asked.known)
    return {
        location: failed.get(location, "")
        for location in _configured(settings, ledger)
        if location not in known
    }


def every_location(settings: Settings, ledger: Ledger) -> list[str]:
    """The sinks that topics go to, that the ledger has used, or that any output is in."""
    used = ledger.read(asked.used)
    return list(dict.fromkeys([*_configured(settings, ledger), *_noted(settings.database), *used]))


def note(settings: Settings, ledger: Ledger) -> None:
    """List the sinks that topics go to beside the ledger, so that scans ask them too."""
    _note(settings.database, _noted(settings.database), _configured(settings, ledger))


async def keep_asking(settings: Settings, ledger: Ledger, on_change: Callable[[], None]) -> None:
    """Ask sinks that were not asked yet, until cancelled.

    Args:
        on_change: called when jobs may be claimed that waited for a sink.
    """
    import asyncio

    while True:
        pause = ASK_SECONDS
        try:
            before = await asyncio.to_thread(waiting, settings, ledger)
            before |= await ledger.read_soon(asked.unknown)
            if before:
                ask = partial(_take, settings.database, ledger, list(before), only=before)
                _logged(await asyncio.to_thread(ask))
                left = await ledger.read_soon(asked.unknown)
                pause = AGAIN_SECONDS if left.keys() >= before.keys() else ASK_SECONDS
                on_change()
        except LedgerError as error:
            log.error("cannot ask the sinks for their outputs: %s", error.message)
        await asyncio.sleep(pause)


def begin(database: DatabaseSettings, ledger: Ledger) -> None:
    """Note beside the ledger which epoch has begun."""
    ours = ledger.read(asked.mark)
    durable.write_once(_epoch_file(database), f"{ours.ledger_id} {ours.epoch}\n".encode())
    crashpoint("inventory.marked")


def _take(
    database: DatabaseSettings,
    ledger: Ledger,
    locations: list[str],
    *,
    only: Iterable[str] | None = None,
    doubted: bool = False,
) -> list[str]:
    """Ask, and adopt what is found in one transaction.

    Args:
        locations: of sinks to ask besides those that the ledger has used.
        only: ask these alone.
        doubted: what a sink has that does not answer is unknown from now on.
    """
    noted = _noted(database)
    _note(database, noted, locations)
    doubtful = ledger.read(partial(asked.is_doubtful, beside=_beside(database)))
    if doubtful:
        ledger.write(asked.doubt)
        crashpoint("inventory.doubted")
        begin(database, ledger)
    known, trusted = ledger.read(adopt.known_keys), ledger.read(asked.known)
    said = ledger.read(asked.unknown)
    wanted = dict.fromkeys([*locations, *noted] if only is None else only)
    found, there, failed = _ask(database, wanted, known, trusted)
    fresh = there.keys() - trusted
    if not found and not failed and not doubtful and not fresh:
        return []

    with store_upkeep.nameless(ledger, (output.content_hash for output in found)) as contents:
        deleted: dict[tuple[str, str], int] = {}

        def work(connection: Connection) -> list[Adoption]:
            deleted.clear()
            adopted = adopt.adopt(connection, found, fresh)
            asked_now = {location: there[location] for location in fresh}
            deleted.update(visibility.remove_deleted(connection, asked_now))
            kept.add(connection, contents)
            asked.note(connection, there, failed, doubt=doubted)
            return adopted

        adopted = ledger.write(work)
    crashpoint("inventory.adopted")
    messages = [_words(one) for one in adopted if one.outputs]
    messages += [_words_of_deleted(*each) for each in deleted.items()]
    if adopted:
        new = [output for output in found if output.output_key not in known]
        messages += ledger.read(partial(_moved, found=new))
    if adopted or doubtful:
        messages += outputs.tell(ledger)
    for location, why in failed.items():
        if doubted or location not in trusted:
            message = (
                f"sink {location} cannot be asked what it has: {why}; no job that writes there is "
                "begun until it can"
            )
            if only is None or said.get(location) != why:  # a daemon asks again and again
                messages.append(message)
    return messages


def _ask(
    database: DatabaseSettings,
    locations: Iterable[str],
    known: Collection[str],
    trusted: Collection[str],
) -> tuple[list[Output], dict[str, set[str]], dict[str, str]]:
    """Ask these sinks: of those whose outputs the ledger knows, only for what it may lack.

    Args:
        known: keys of the ledger's outputs.
        trusted: the sinks whose outputs it knows.

    Returns:
        What they have; the keys of it for each that answered; why the others did not.
    """
    found: list[Output] = []
    there: dict[str, set[str]] = {}
    failed: dict[str, str] = {}
    for location in locations:
        try:
            records = list(sinks.records(location, database, known if location in trusted else ()))
        except CasparianError as error:
            failed[location] = error.message
            if location in trusted:
                log.warning("cannot list the outputs in sink %s: %s", location, error.message)
        else:
            found += records
            there[location] = {output.output_key for output in records}
    return found, there, failed


def _words(adoption: Adoption) -> str:
    return (
        f"{adoption.location} holds {counted(adoption.outputs, 'output')} that this ledger did not "
        "know (it was lost, or is older than its sinks): adopted, so that they are not made "
        "twice"
    )


def _words_of_deleted(place: tuple[str, str], count: int) -> str:
    location, topic = place
    return (
        f"{location} no longer has {counted(count, 'output')} of topic {topic} that this ledger "
        "knew: others of the same file versions stand in their place; to make all of it anew: "
        f"casparian rebuild {topic}"
    )


def _moved(connection: Connection, found: Iterable[Output]) -> list[str]:
    """A sentence for each topic that went to other sinks, or in another mode, when its sinks got
    what was adopted than by this ledger, which is older."""
    configured = visibility.modes(connection)
    went: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for output in sorted(found, key=lambda output: output.job_id):
        went[output.plugin, output.topic][output.uri] = output.mode
    messages = []
    for (plugin, topic), then in sorted(went.items()):
        now = configured.get((plugin, topic), {})
        if not now or then.items() <= now.items():
            continue
        back = f"casparian topics set {plugin} {topic} " + " ".join(
            quote(f"{uri}?mode={mode}") for uri, mode in then.items()
        )
        words = f"topic {topic} of {plugin} went to {_named(then)} since this ledger was copied"
        again = [
            f"{counted(usage.rows, 'row')} in {usage.uri}"
            for usage in visibility.usage(connection, plugin, topic)
            if usage.uri not in then
        ]
        if again:
            words += f", and shows again {', '.join(again)}"
        else:
            words += f"; by this ledger it goes to {_named(now)}"
        messages.append(f"{words}; to have it as it was: {back}{' --rebuild' if again else ''}")
    return messages


def _named(sinks_and_modes: Mapping[str, str]) -> str:
    return ", ".join(f"{uri} (mode {mode})" for uri, mode in sinks_and_modes.items())


def _configured(settings: Settings, ledger: Ledger) -> list[str]:
    """The locations that topics go to."""
    uris = ledger.read(asked.configured)
    return _locations({settings.output.default_uri, *uris}, settings.home)


def _locations(uris: Iterable[str], home: Path) -> list[str]:
    """The locations of these sinks; a URI that cannot be opened is left out."""
    locations = []
    for uri in sorted(uris):
        try:
            locations.append(sinks.resolve(uri, home))
        except CasparianError as error:
            log.warning("cannot list the outputs in sink %s: %s", uri, error.message)
    return list(dict.fromkeys(locations))


def _beside(database: DatabaseSettings) -> Mark | None:
    """What the file beside the ledger says; None where it is not there or cannot be read."""
    try:
        ledger_id, epoch = _epoch_file(database).read_text("utf-8").split()
        return Mark(ledger_id, int(epoch))
    except (FileNotFoundError, ValueError):
        return None


def _epoch_file(database: DatabaseSettings) -> Path:
    return database.state_folder / f"{database.path.name}.epoch"


def _notes(database: DatabaseSettings) -> Path:
    return database.state_folder / f"{database.path.name}.sinks"


def _noted(database: DatabaseSettings) -> list[str]:
    """The sinks that a ledger in this place has used. Paths are relative to the database's folder,
    so that a copy of the whole folder means its own outputs."""
    try:
        lines = _notes(database).read_text("utf-8", "surrogateescape").splitlines()
    except FileNotFoundError:
        return []
    return _locations(lines, database.path.parent)


def _note(database: DatabaseSettings, noted: list[str], locations: list[str]) -> None:
    if set(locations) <= set(noted):
        return
    lines = [_relative(sink, database.path.parent) for sink in dict.fromkeys([*noted, *locations])]
    text = "".join(f"{line}\n" for line in lines)
    durable.write_once(_notes(database), text.encode("utf-8", "surrogateescape"))


def _relative(location: str, folder: Path) -> str:
    """The sink's URI, relative to a folder where the sink is below it."""
    if location.startswith(sinks.SERVER):
        return location
    prefix = next(p for p in sinks.PREFIXES.values() if location.startswith(p))
    path = location.removeprefix(prefix)
    inside = os.path.commonpath([path, folder]) == str(folder)
    return prefix + (os.path.relpath(path, folder) if inside else path)
