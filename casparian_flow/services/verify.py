"""Every claim of the ledger, checked: against itself, its audit, its signatures and its sinks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection

from casparian_flow import daemon_lock
from casparian_flow.config import Settings
from casparian_flow.db import audit, invariants, outputs, plugins, trust
from casparian_flow.db.access import Ledger
from casparian_flow.db.plugins import Stored
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks.base import Claim
from casparian_flow.security.trust import Trust


@dataclass
class Verdict:
    """What was looked at, and what does not hold."""

    checked: dict[str, int]
    """What -> how many of it."""
    problems: list[str]
    """A sentence each; empty where everything holds."""


def verify(settings: Settings, ledger: Ledger) -> Verdict:
    """Check everything. Reads every byte of every published file; changes nothing.

    It may run beside a daemon: what the ledger claimed when this began is what is checked.
    """
    verdict, claims = ledger.read(_check_ledger)
    if daemon_lock.holder(settings.database.daemon_lock) is None:
        verdict.problems += ledger.read(lambda c: list(invariants.running(c)))
    verdict.checked["outputs"] = sum(map(len, claims.values()))
    verdict.checked["rows"] = sum(claim.rows for group in claims.values() for claim in group)
    for location, group in claims.items():
        verdict.problems += sinks.open_sink(location).check(group)
    return verdict


def _check_ledger(connection: Connection) -> tuple[Verdict, dict[str, list[Claim]]]:
    """One snapshot of the ledger: its breaks, and what it claims of each sink."""
    trusted = trust.read(connection)
    artifacts = plugins.stored(connection)
    problems = [
        *invariants.breaks(connection),
        *audit.problems(connection),
        *filter(None, [trusted.broken]),
        *_faults(artifacts, trusted),
    ]
    checked = {
        **invariants.sizes(connection),
        "plugins": len(artifacts),
        "trust statements": trusted.seq,
    }
    claims: dict[str, list[Claim]] = defaultdict(list)
    for row in outputs.published(connection):
        claims[row.location].append(
            Claim(
                topic=row.topic,
                output_key=row.output_key,
                job_id=row.job_id,
                target=row.target,
                rows=row.rows,
                digest=row.digest,
            )
        )
    return Verdict(checked, problems), claims


def _faults(artifacts: Sequence[Stored], trusted: Trust) -> Iterator[str]:
    """What is wrong with each artifact. That somebody disabled it or revoked its key is not."""
    for plugin in artifacts:
        if words := plugins.fault(plugin, trusted):
            yield f"plugin {plugin.name} {plugin.version}: {words}"
