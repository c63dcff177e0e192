"""Telling the sinks what readers are to see: `db.debts`.

Whoever computes what a sink is to be given or told holds `lock` until the result is in the ledger,
so that no sink is told an older state after a newer one.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

from casparian_flow import durable
from casparian_flow.config import DatabaseSettings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import asked, debts, rebuild
from casparian_flow.db.access import Connection, Ledger
from casparian_flow.db.debts import Debt
from casparian_flow.engine import sinks
from casparian_flow.errors import CasparianError, SinkConflict, SinkUnavailable, Unavailable
from casparian_flow.protocol import Output, State

log = logging.getLogger(__name__)


@contextmanager
def lock(database: DatabaseSettings) -> Iterator[None]:
    """Wait for and hold the lock of those who tell the sinks."""
    with durable.exclusive(database.telling_lock):
        yield


@dataclass
class Told:
    """What became of the debts."""

    outputs: int = 0
    """How many were told."""
    away: dict[str, CasparianError] = field(default_factory=dict)
    """Stores that could not be told, and why: they are told later."""
    conflicts: dict[int, CasparianError] = field(default_factory=dict)
    """Outputs that a sink cannot show, by id: they are gone there or were altered."""

    problems: dict[int, str] = field(default_factory=dict)
    """Rebuild -> why a sink cannot show it, or empty where it does."""

    @property
    def faults(self) -> list[CasparianError]:
        """Why sinks could not be told."""
        return [*self.away.values(), *self.conflicts.values()]


def tell(ledger: Ledger, paused: Collection[str] = (), skipped: Collection[int] = ()) -> Told:
    """Tell every sink its debts, store by store. The caller holds the lock.

    Args:
        paused: stores that are not asked now.
        skipped: ids of outputs that are not told now.

    Raises:
        LedgerError: the ledger could not be read or written.
    """
    done = Told()
    unasked = ledger.read(asked.unknown)  # they may have newer outputs than the ledger knows
    due: dict[str, list[Debt]] = defaultdict(list)
    left: dict[str, list[Debt]] = defaultdict(list)
    waiting: set[int] = set()
    for location, group in ledger.read(debts.owed).items():
        store = sinks.store(location)
        for debt in group:
            if debt.is_left:
                left[store].append(debt)
            elif location in unasked or store in paused or debt.output_id in skipped:
                waiting.add(debt.rebuild)
            else:
                due[store].append(debt)
    told = _tell_each(ledger, due, done)
    waiting |= {d.rebuild for group in due.values() for d in group if d.output_id not in told}
    # What a rebuild left behind in other sinks is hidden when the present ones show all of it.
    rest = {
        store: [
            d
            for d in group
            if d.rebuild not in waiting
            and d.output.location not in unasked
            and d.output_id not in skipped
        ]
        for store, group in left.items()
        if store not in paused
    }
    _tell_each(ledger, rest, done)
    return done


def _tell_each(ledger: Ledger, due: Mapping[str, list[Debt]], done: Told) -> set[int]:
    """Tell each store; the ids of the outputs that it has confirmed."""
    told: set[int] = set()
    for store, group in due.items():
        if not group:
            continue
        confirmed = _tell_store(ledger.database, store, group, done)
        crashpoint("telling.told")
        states = {d.output_id: (d.state, d.output.mode) for d in confirmed}
        ledger.write(partial(_record, states=states, problems=done.problems))
        done.outputs += len(states)
        told |= states.keys()
        crashpoint("telling.recorded")
    return told


def _record(
    connection: Connection, states: Mapping[int, tuple[str, str]], problems: Mapping[int, str]
) -> None:
    debts.told(connection, states)
    for number, problem in problems.items():
        rebuild.note_problem(connection, number, problem)


def _tell_store(
    database: DatabaseSettings, store: str, group: Sequence[Debt], done: Told
) -> list[Debt]:
    """Tell one store; the debts that it has confirmed."""
    sink = sinks.open_sink(group[0].output.location, database)
    confirmed: list[Debt] = []
    try:
        # What is removed is hidden first, in one step with what is shown in its place.
        known = [d for d in group if d.is_expired and d.told.startswith(State.HIDDEN)]
        changed = [d for d in group if d not in known]
        confirmed += _each(sink.change, changed, done)
        removed = [d for d in (*known, *confirmed) if d.is_expired]
        confirmed = [d for d in confirmed if not d.is_expired]
        confirmed += _each(sink.delete, removed, done)
    except Unavailable as error:
        done.away[store] = error
    except Exception as error:
        # A bug in one sink must not end the daemon, nor keep the others from being told.
        log.exception("sink %s failed unexpectedly", store)
        done.away[store] = SinkUnavailable(f"{type(error).__name__}: {error}")
    return confirmed


def _each(
    verb: Callable[[Sequence[Output]], None], group: Sequence[Debt], done: Told
) -> list[Debt]:
    """Tell a sink a group in one step; without the location slots, and the rebuilds, that it cannot
    be told of.

    Returns:
        the debts that it has confirmed.
    """
    if not group:
        return []
    rebuilds = {debt.rebuild for debt in group if debt.rebuild}
    try:
        verb([debt.output for debt in group])
    except SinkConflict as error:
        halves = _units(group)
        if len(halves) == 1:
            done.conflicts |= {debt.output_id: error for debt in group}
            done.problems |= dict.fromkeys(rebuilds, error.message)
            return []
        middle = len(halves) // 2
        return [
            debt
            for half in (halves[:middle], halves[middle:])
            for debt in _each(verb, list(chain.from_iterable(half)), done)
        ]
    done.problems |= {number: done.problems.get(number, "") for number in rebuilds}
    return list(group)


def _units(group: Sequence[Debt]) -> list[list[Debt]]:
    """The parts of a group that are told whole or not at all: a location slot; and a rebuild, with
    all slots that it is in."""
    slots = {debt.output.location_slot: debt.rebuild for debt in group if debt.rebuild}
    units: dict[str | int, list[Debt]] = defaultdict(list)
    for debt in group:
        slot = debt.output.location_slot
        units[slots.get(slot, slot)].append(debt)
    return list(units.values())
