"""Bring the sinks up to date after an upgrade of Casparian Flow.

    convert    each sink takes the new form; readers see the same rows before and after
    compare    the ledger names what readers are to see otherwise from now on
    tell       the sinks are told so

Each step may be killed and repeated. Until a sink is converted it is read and not written: its jobs
wait.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from casparian_flow.config import Settings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import debts, visibility
from casparian_flow.db.access import Ledger
from casparian_flow.engine import sinks
from casparian_flow.errors import CasparianError, counted
from casparian_flow.protocol import Output
from casparian_flow.services import inventory, outputs


@dataclass
class SinkUpgrade:
    """What became of one sink."""

    location: str
    converted: list[str] = field(default_factory=list)
    """A sentence for each topic that took the new form."""
    changed: list[str] = field(default_factory=list)
    """A sentence for each topic that readers see otherwise now."""
    problem: str = ""
    """Why it could not be converted; it was left as it was."""
    hint: str = ""


def upgrade(settings: Settings, ledger: Ledger) -> list[SinkUpgrade]:
    """Convert every sink that the ledger has used; what became of each.

    Raises:
        LedgerError: the ledger could not be read or written.
    """
    done = []
    for location in inventory.every_location(settings, ledger):
        one = SinkUpgrade(location)
        try:
            one.converted = sinks.open_sink(location, settings.database).upgrade()
        except CasparianError as error:
            one.problem, one.hint = error.message, error.hint
        crashpoint("upgrade.converted")
        done.append(one)
    inventory.take(settings, ledger)
    for one in done:
        if not one.problem:
            there = {o.output_key for o in sinks.records(one.location, settings.database, ())}
            ledger.write(partial(visibility.remove_absent, location=one.location, there=there))
            one.changed = list(_changes(settings, ledger, one.location))
    outputs.tell(ledger)
    return done


def _changes(settings: Settings, ledger: Ledger, location: str) -> Iterator[str]:
    """What the debts to a sink will make visible and invisible, topic by topic."""
    owed = ledger.read(debts.owed).get(location, [])
    if not owed:
        return
    there = {o.output_key: o for o in sinks.open_sink(location, settings.database).records({})}
    shown: dict[str, list[Output]] = defaultdict(list)
    hidden: dict[str, list[Output]] = defaultdict(list)
    for debt in owed:
        before = there.get(debt.output.output_key)
        will = debt.output.visible
        if before and debt.output.rows and before.visible != will:
            (shown if will else hidden)[debt.output.topic].append(debt.output)
    for topic, group in sorted(hidden.items()):
        yield (
            f"topic {topic}: {_counted(group)} no longer shown, since another artifact of the "
            "plugin stands for the same file versions"
        )
    for topic, group in sorted(shown.items()):
        yield f"topic {topic}: {_counted(group)} shown again, since nothing else stands for them"


def _counted(group: list[Output]) -> str:
    rows = sum(output.rows for output in group)
    verb = "is" if len(group) == 1 else "are"
    return f"{counted(len(group), 'output')} ({counted(rows, 'row')}) {verb}"
