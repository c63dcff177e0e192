"""Check the ledger against its own rules, its audit, its signatures, its sinks and the store."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from casparian_flow import durable
from casparian_flow.config import Settings
from casparian_flow.db import audit, debts, integrity, plugins, promises, seals, trust, visibility
from casparian_flow.db.access import Connection, Ledger, driver
from casparian_flow.db.debts import Debt
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks import Sink
from casparian_flow.errors import CasparianError, counted
from casparian_flow.protocol import Output
from casparian_flow.services import store_upkeep

Expected = dict[str, list[Output]]
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
    owed = _owed(ledger)
    verdict, expected = ledger.read(check_ledger)
    if durable.daemon_lock_holder(settings.database.daemon_lock) is None:
        running = ledger.read(
            lambda c: list(integrity.report_damage("the jobs", integrity.running_jobs(c)))
        )
        verdict.problems += running
    verdict.checked["outputs"] = sum(map(len, expected.values()))
    verdict.checked["rows"] = sum(output.rows for group in expected.values() for output in group)
    for location, group in expected.items():
        verdict.problems += _check_sink(ledger, location, group, owed.get(location, {}))
    # What was owed only before or only after is being told by a daemon.
    still = _owed(ledger)
    for location in owed.keys() & still.keys():
        if count := len(owed[location].keys() & still[location].keys()):
            verdict.problems.append(
                f"sink {location} does not know yet what readers are to see of "
                f"{counted(count, 'output')}; the daemon tells it when it starts"
            )
    verdict.problems += store_upkeep.problems(ledger)
    return verdict


def check_ledger(connection: Connection) -> tuple[Verdict, Expected]:
    """Check the ledger in one read transaction; what is wrong, and what each sink should hold."""
    verdict, expected = Verdict(), defaultdict[str, list[Output]](list)
    with seals.exact(driver(connection)):
        for what, problems in (
            ("the ledger", _count(connection, verdict)),
            ("the ledger", integrity.broken_invariants(connection)),
            ("the audit", audit.problems(connection)),
            ("the seals", integrity.seal_problems(connection)),
            ("the schema", integrity.schema_problems(connection)),
            ("the plugins", _plugin_problems(connection, verdict)),
            ("the outputs", visibility.differences(connection)),
            ("what readers see", promises.broken(connection)),
            ("the outputs", _collect(connection, expected)),
        ):
            verdict.problems += integrity.report_damage(what, problems)
    # One damaged page may fail many of the checks.
    verdict.problems = list(dict.fromkeys(verdict.problems))
    return verdict, expected


def _count(connection: Connection, verdict: Verdict) -> Iterator[str]:
    verdict.checked.update(integrity.sizes(connection))
    verdict.notes += integrity.since(connection)
    yield from ()


def _plugin_problems(connection: Connection, verdict: Verdict) -> Iterator[str]:
    """What is wrong with the trust log and with each artifact.

    A disabled artifact or a revoked key is no problem. Neither is an artifact that an earlier
    release signed in its own form, where the audit has its bytes: it may not run, which is noted.
    So is a stub, of which only outputs were adopted.
    """
    trusted = trust.read(connection)
    artifacts = plugins.stored(connection)
    verdict.checked |= {"plugins": len(artifacts), "trust statements": trusted.seq}
    yield from filter(None, [trusted.broken])
    for plugin in artifacts:
        if plugins.is_stub(connection, plugin):
            verdict.notes.append(
                f"plugin {plugin.name} {plugin.version} may not run: {plugins.STUB}"
            )
        elif fault := plugins.fault(plugin, trusted):
            message = f"plugin {plugin.name} {plugin.version}: {fault}"
            if not trusted.broken and plugins.from_earlier(connection, plugin):
                verdict.notes.append(f"{message}; it may not run")
            else:
                yield message


def _collect(connection: Connection, expected: Expected) -> Iterator[str]:
    """Collect what the sinks should hold, in the state that each was told last. Damaged rows are
    left out: another check names them."""
    for output in debts.every_record(connection):
        if isinstance(output.rows, int) and isinstance(output.location, str):
            expected[output.location].append(output)
    yield from ()


def _owed(ledger: Ledger) -> dict[str, dict[str, Debt]]:
    """Location of a sink -> what it is to be told of outputs, by their keys."""
    try:
        owed = ledger.read(debts.owed)
    except (CasparianError, ValueError, TypeError):
        return {}  # a damaged row, which another check names
    return {
        location: {debt.output.output_key: debt for debt in group}
        for location, group in owed.items()
    }


def _check_sink(
    ledger: Ledger, location: str, group: Sequence[Output], owed: Mapping[str, Debt]
) -> list[str]:
    settled = [output for output in group if output.output_key not in owed]
    between = [
        (output, owed[output.output_key].output) for output in group if output.output_key in owed
    ]
    try:
        sink = sinks.open_sink(location, ledger.database)
        return [*sink.check(settled), *_check_between(sink, between)]
    except Exception as error:  # noqa: BLE001 - a tampered row can make a sink raise anything
        return [f"sink {location} cannot be checked: {type(error).__name__}: {error}"]


def _check_between(sink: Sink, pairs: Sequence[tuple[Output, Output]]) -> list[str]:
    """What is wrong with outputs that a sink has in the first state or already in the second: it
    may have taken what it was told, and nobody could note that."""
    if not pairs:
        return []
    before, after = zip(*pairs, strict=True)
    problems = list(sink.check(before))
    if not problems or not list(sink.check(after)):
        return []
    if len(pairs) == 1:
        return problems
    middle = len(pairs) // 2
    return [*_check_between(sink, pairs[:middle]), *_check_between(sink, pairs[middle:])]
