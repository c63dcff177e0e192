"""Check the ledger against its own rules, its audit, its signatures, its sinks and the store."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Connection

from casparian_flow import durable
from casparian_flow.config import Settings
from casparian_flow.db import audit, integrity, outputs, plugins, seals, trust
from casparian_flow.db import found as found_outputs
from casparian_flow.db.access import Ledger, driver
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks.base import Claim
from casparian_flow.services import store_upkeep

Claims = dict[str, list[Claim]]
"""Location of a sink -> the outputs that the ledger expects there."""


@dataclass
class Verdict:
    """What was checked, and what is wrong."""

    checked: dict[str, int] = field(default_factory=dict)
    """Kind of thing -> how many of it."""
    problems: list[str] = field(default_factory=list)
    """A sentence each; empty where nothing is wrong."""
    notes: list[str] = field(default_factory=list)
    """What could not be checked."""


def verify(settings: Settings, ledger: Ledger) -> Verdict:
    """Check everything. Reads every byte of every published file and of the store; changes nothing.

    It may run beside a daemon: it checks what the ledger had when it began. A damaged ledger is
    read as far as it can be.
    """
    verdict, claims = ledger.read(check_ledger)
    if durable.daemon_lock_holder(settings.database.daemon_lock) is None:
        running = ledger.read(
            lambda c: list(integrity.report_damage("the jobs", integrity.running_jobs(c)))
        )
        verdict.problems += running
    verdict.checked["outputs"] = sum(map(len, claims.values()))
    verdict.checked["rows"] = sum(claim.rows for group in claims.values() for claim in group)
    for location, group in claims.items():
        verdict.problems += _check_sink(ledger, location, group)
    verdict.problems += store_upkeep.problems(ledger)
    return verdict


def check_ledger(connection: Connection) -> tuple[Verdict, Claims]:
    """Check the ledger in one read transaction; what is wrong, and what each sink should hold."""
    verdict, claims = Verdict(), defaultdict[str, list[Claim]](list)
    with seals.exact(driver(connection)):
        for what, problems in (
            ("the ledger", _count(connection, verdict)),
            ("the ledger", integrity.broken_invariants(connection)),
            ("the audit", audit.problems(connection)),
            ("the seals", integrity.seal_problems(connection)),
            ("the plugins", _plugin_problems(connection, verdict)),
            ("the outputs", _collect_claims(connection, claims)),
        ):
            verdict.problems += integrity.report_damage(what, problems)
    # One damaged page may fail many of the checks.
    verdict.problems = list(dict.fromkeys(verdict.problems))
    return verdict, claims


def _count(connection: Connection, verdict: Verdict) -> Iterator[str]:
    verdict.checked.update(integrity.sizes(connection))
    verdict.notes += filter(None, [integrity.since(connection)])
    yield from ()


def _plugin_problems(connection: Connection, verdict: Verdict) -> Iterator[str]:
    """What is wrong with the trust log and with each artifact.

    A disabled artifact or a revoked key is no problem. Neither is an artifact that an earlier
    release signed in its own form, where the audit has its bytes: it may not run, which is noted.
    """
    trusted = trust.read(connection)
    artifacts = plugins.stored(connection)
    verdict.checked |= {"plugins": len(artifacts), "trust statements": trusted.seq}
    yield from filter(None, [trusted.broken])
    for plugin in artifacts:
        if fault := plugins.fault(plugin, trusted):
            message = f"plugin {plugin.name} {plugin.version}: {fault}"
            if not trusted.broken and plugins.from_earlier(connection, plugin):
                verdict.notes.append(f"{message}; it may not run")
            else:
                yield message


def _collect_claims(connection: Connection, claims: Claims) -> Iterator[str]:
    """Collect what the sinks should hold. Damaged rows are left out: another check names them."""
    for row in [*outputs.published(connection), *found_outputs.expected(connection)]:
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
    except Exception as error:  # noqa: BLE001 - a tampered row can make a sink raise anything
        return [f"sink {location} cannot be checked: {type(error).__name__}: {error}"]
