"""What a person does to have a plugin work versions that were recorded before it.

By itself a deployed plugin gets each file's current version, and only where no artifact of it has
worked that. Everything else, older versions and what another artifact did, it gets on this word.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from sqlalchemy import Connection

from casparian_flow.config import Settings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import backfill as versions
from casparian_flow.db import jobs, plugins
from casparian_flow.db import routing as wiring
from casparian_flow.db.access import Ledger
from casparian_flow.db.backfill import Choice
from casparian_flow.db.models import utcnow
from casparian_flow.db.routing import JobRequest, Routing
from casparian_flow.errors import CasparianError, NotFound
from casparian_flow.services.changes import ring


class Backfilled(NamedTuple):
    """What became of the versions that were asked for."""

    version: str
    """The plugin's, whose jobs were queued."""
    queued: int
    """Jobs; of a dry run, how many there would be."""
    routed: int
    """Versions that the rules bring to the plugin."""
    bytes_gone: int
    """Versions that nobody can work any more: their file has other bytes or is gone, and they have
    no snapshot."""
    worked: int
    """Versions that another version of the plugin has worked, and that were not to be redone."""
    waits: int
    """Versions that still wait for another version of the plugin, or are being worked by it."""
    again: int = 0
    """Of `worked`: those whose bytes are there, which `redo` would queue."""
    retracted: int = 0
    """Versions whose rows a person has retracted: they are worked again once that is undone."""


def backfill(
    ledger: Ledger,
    settings: Settings,
    plugin: str,
    *,
    path: str | None = None,
    since: str | None = None,
    redo: bool = False,
    dry_run: bool = False,
) -> Backfilled:
    """Queue jobs of a plugin's active version for recorded versions of active source roots.

    It can be told again after a crash: what was queued has its job.

    Args:
        path: only of files whose path matches this glob; `*` crosses directories.
        since: only versions recorded at or after this time: ISO 8601 with a space, UTC.
        redo: also those that another version of the plugin has worked. What it gave stays.
        dry_run: count, and change nothing.

    Raises:
        NotFound: no plugin has that name.
        CasparianError: none of its versions takes jobs.
    """
    version = _active(ledger, plugin)
    choice = Choice(plugin, version, path, since, redo)
    routing = ledger.read(Routing)
    add = jobs.backfill if redo else jobs.enqueue
    tally = Backfilled(version, 0, 0, 0, 0, 0)
    last: int | None = 0
    while last is not None:
        look = partial(versions.look, choice=choice, routing=routing, after=last)
        last, lacking, *counts = ledger.read(look)

        def work(connection: Connection, lacking: list[tuple[int, JobRequest]] = lacking) -> int:
            queued = len(add(connection, lacking, utcnow().isoformat(" ")))
            detail = {"jobs": queued, "path": path, "since": since, "redo": redo}
            wiring.note(connection, "backfill", [f"plugin {plugin} {version}"], **detail)
            return queued

        queued = len(lacking)
        if lacking and not dry_run:
            queued = ledger.write(work)
            crashpoint("backfill.queued")
        sums = (old + new for old, new in zip(tally[1:], (queued, *counts), strict=True))
        tally = Backfilled(version, *sums)
    if tally.queued and not dry_run:
        ring(settings)
    return tally


def _active(ledger: Ledger, plugin: str) -> str:
    """The version that takes new jobs.

    Raises:
        NotFound: no plugin has that name.
        CasparianError: none of its versions takes jobs.
    """
    if not ledger.read(lambda c: plugins.versions(c, plugin)):
        raise NotFound(f"no plugin is named {plugin!r}", "casparian plugins list")
    version = ledger.read(lambda c: plugins.active(c, plugin))
    if version is None:
        raise CasparianError(
            f"no version of {plugin} takes jobs; nothing was queued",
            f"casparian plugins activate {plugin} VERSION --reason WORDS",
        )
    return version
