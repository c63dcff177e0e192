"""Adopt outputs that sinks have and the ledger does not: it was lost, or is older than its sinks.

Sinks list their outputs by output key, so this needs no clock: every output whose key the ledger
does not have is found. Found outputs are recorded before the ledger assigns any id, so that no
output is made twice and no id names two things (see `db.found`).

The sinks that a ledger has used are listed beside it (`<database>.sinks`), so that a new ledger in
the place of a lost one asks them too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from sqlalchemy import Connection

from casparian_flow import durable
from casparian_flow.config import DatabaseSettings, Settings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import audit, found
from casparian_flow.db.access import Ledger
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks.base import KEY_DIGITS, Found
from casparian_flow.errors import CasparianError, counted

log = logging.getLogger(__name__)

ACTOR = "inventory"


def take(settings: Settings, ledger: Ledger, uris: Iterable[str] = ()) -> list[str]:
    """Adopt the outputs that the ledger does not have; a sentence for each sink that has any.

    Args:
        uris: sinks to ask besides those that topics go to.

    Raises:
        LedgerError: the ledger could not be read or written.
    """
    wanted = {settings.output.default_uri, *uris, *ledger.read(found.placed_uris)}
    return _take(settings.database, ledger, _locations(wanted, settings.home))


def before_scan(database: DatabaseSettings, ledger: Ledger) -> list[str]:
    """`take` from the listed sinks, unless a daemon runs, which has done so at its start."""
    if durable.daemon_lock_holder(database.daemon_lock) is not None:
        return []
    return _take(database, ledger, [])


def _take(database: DatabaseSettings, ledger: Ledger, locations: list[str]) -> list[str]:
    noted = _noted(database)
    _note(database, noted, locations)
    known = {key[:KEY_DIGITS] for key in ledger.read(found.known_keys)}
    messages = []
    for location in dict.fromkeys([*locations, *noted]):
        try:
            new = list(sinks.inventory(location, database, known))
        except CasparianError as error:
            log.warning("cannot list the outputs in sink %s: %s", location, error.message)
            continue
        if new:
            messages += _adopt(ledger, location, new)
            known.update(output.output_key[:KEY_DIGITS] for output in new)
    for message in messages:
        log.warning("%s", message)
    return messages


def _adopt(ledger: Ledger, location: str, new: list[Found]) -> list[str]:
    """Record them in one transaction, with its audit row."""

    def work(connection: Connection) -> int:
        count = found.add(connection, [_row(location, output) for output in new])
        if count:
            detail = {
                "outputs": count,
                "rows": sum(output.rows for output in new),
                "last_version_id": max(output.file_version_id for output in new),
                "last_job_id": max(output.job_id for output in new),
            }
            audit.append(connection, ACTOR, [audit.Event("adopt", f"sink {location}", detail)])
        return count

    count = ledger.write(work)
    crashpoint("inventory.adopted")
    if not count:
        return []
    return [
        f"{location} holds {counted(count, 'output')} that this ledger did not "
        "know (it was lost, or is older than its sinks): adopted, so that they are not made "
        "twice"
    ]


def _row(location: str, output: Found) -> dict[str, object]:
    return {
        "location": location, "output_key": output.output_key, "topic": output.topic,
        "uri": output.uri, "target": output.target, "rows": output.rows, "digest": output.digest,
        "job_id": output.job_id, "file_version_id": output.file_version_id,
        "source": output.source, "path": output.path, "ordinal": output.ordinal,
        "content_hash": output.content_hash, "size_bytes": output.size_bytes,
        "artifact_hash": output.artifact_hash, "plugin_name": output.plugin,
        "plugin_version": output.plugin_version, "mode": output.mode, "slot": output.slot,
        "retracted": output.retracted,
    }  # fmt: skip


def _locations(uris: Iterable[str], home: Path) -> list[str]:
    """The locations of these sinks; a URI that cannot be opened is left out."""
    locations = []
    for uri in sorted(uris):
        try:
            locations.append(sinks.resolve(uri, home))
        except CasparianError as error:
            log.warning("cannot list the outputs in sink %s: %s", uri, error.message)
    return locations


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
