"""Every claim of the ledger, checked: against itself, its audit, its signatures and its sinks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Connection

from casparian_flow import daemon_lock
from casparian_flow.config import Settings
from casparian_flow.db import audit, found, invariants, outputs, plugins, replay, seals, trust
from casparian_flow.db.access import Ledger, driver
from casparian_flow.db.replay import told
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks.base import Claim
from casparian_flow.services import snapshot_checks

Claims = dict[str, list[Claim]]
"""Location of a sink -> what the ledger says is there."""


@dataclass
class Verdict:
    """What was looked at, and what does not hold."""

    checked: dict[str, int] = field(default_factory=dict)
    """What -> how many of it."""
    problems: list[str] = field(default_factory=list)
    """A sentence each; empty where everything holds."""
    notes: list[str] = field(default_factory=list)
    """What could not be checked, though nothing is wrong with it."""


def verify(settings: Settings, ledger: Ledger) -> Verdict:
    """Check everything. Reads every byte of every published file and snapshot; changes nothing.

    It may run beside a daemon: what the ledger claimed when this began is what is checked. A
    ledger that is damaged is read as far as it can be.
    """
    verdict, claims = ledger.read(check_ledger)
    if daemon_lock.holder(settings.database.daemon_lock) is None:
        running = ledger.read(lambda c: list(told("the jobs", invariants.running(c))))
        verdict.problems += running
    verdict.checked["outputs"] = sum(map(len, claims.values()))
    verdict.checked["rows"] = sum(claim.rows for group in claims.values() for claim in group)
    for location, group in claims.items():
        verdict.problems += _check_sink(ledger, location, group)
    verdict.problems += snapshot_checks.problems(ledger)
    return verdict


def check_ledger(connection: Connection) -> tuple[Verdict, Claims]:
    """One snapshot of the ledger: its breaks, and what it claims of each sink."""
    verdict, claims = Verdict(), defaultdict[str, list[Claim]](list)
    with seals.exact(driver(connection)):
        for what, found in (
            ("the ledger", _count(connection, verdict)),
            ("the ledger", invariants.breaks(connection)),
            ("the audit", audit.problems(connection)),
            ("the seals", replay.problems(connection)),
            ("the plugins", _faults(connection, verdict)),
            ("the outputs", _claims(connection, claims)),
        ):
            verdict.problems += told(what, found)
    # Damage is met by many questions.
    verdict.problems = list(dict.fromkeys(verdict.problems))
    return verdict, claims


def _count(connection: Connection, verdict: Verdict) -> Iterator[str]:
    verdict.checked.update(invariants.sizes(connection))
    verdict.notes += filter(None, [replay.since(connection)])
    yield from ()


def _faults(connection: Connection, verdict: Verdict) -> Iterator[str]:
    """What is wrong with the trust log and with each artifact.

    That somebody disabled an artifact or revoked its key is not; nor that an earlier release signed
    it in its own form, where the audit has its bytes: it may not run, and that is noted.
    """
    trusted = trust.read(connection)
    artifacts = plugins.stored(connection)
    verdict.checked |= {"plugins": len(artifacts), "trust statements": trusted.seq}
    yield from filter(None, [trusted.broken])
    for plugin in artifacts:
        if words := plugins.fault(plugin, trusted):
            about = f"plugin {plugin.name} {plugin.version}: {words}"
            if not trusted.broken and plugins.from_earlier(connection, plugin):
                verdict.notes.append(f"{about}; it may not run")
            else:
                yield about


def _claims(connection: Connection, claims: Claims) -> Iterator[str]:
    """Collect what can be asked of the sinks; rows that make no sense were named already."""
    for row in [*outputs.published(connection), *found.claims(connection)]:
        if isinstance(row.rows, int) and isinstance(row.location, str):
            claim = Claim(
                topic=row.topic,
                output_key=row.output_key,
                job_id=row.job_id,
                target=row.target,
                rows=row.rows,
                digest=row.digest,
            )
            claims[row.location].append(claim)
    yield from ()


def _check_sink(ledger: Ledger, location: str, group: Sequence[Claim]) -> list[str]:
    try:
        return list(sinks.open_sink(location, ledger.database).check(group))
    except Exception as error:  # noqa: BLE001 - what somebody wrote into a row can be anything
        return [f"sink {location} cannot be checked: {type(error).__name__}: {error}"]
