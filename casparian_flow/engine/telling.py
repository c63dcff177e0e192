"""Telling the sinks what readers are to see: the debts of `db.visibility`.

Whoever computes what a sink is to be given or told holds `lock` until the result is in the ledger,
so that no sink is told an older state after a newer one.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

from casparian_flow import durable
from casparian_flow.config import DatabaseSettings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import adopt, visibility
from casparian_flow.db.access import Ledger
from casparian_flow.db.visibility import Debt
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
    by_store: dict[str, list[Debt]] = defaultdict(list)
    unasked = ledger.read(adopt.unasked)
    for location, group in ledger.read(visibility.debts).items():
        if location in unasked:
            continue  # it may have newer outputs than the ledger knows
        by_store[sinks.store(location)] += [d for d in group if d.output_id not in skipped]
    for store, group in by_store.items():
        if store in paused or not group:
            continue
        confirmed = _tell_store(ledger.database, store, group, done)
        crashpoint("telling.told")
        states = {d.output_id: (d.state, d.output.mode) for d in confirmed}
        ledger.write(partial(visibility.told, states=states))
        done.outputs += len(states)
        crashpoint("telling.recorded")
    return done


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
    """Tell a sink a group in one step; without the location slots that it cannot be told of.

    Returns:
        the debts that it has confirmed.
    """
    if not group:
        return []
    try:
        verb([debt.output for debt in group])
    except SinkConflict as error:
        slots: dict[str, list[Debt]] = defaultdict(list)
        for debt in group:
            slots[debt.output.location_slot].append(debt)
        if len(slots) == 1:
            done.conflicts |= {debt.output_id: error for debt in group}
            return []
        halves = list(slots.values())
        middle = len(halves) // 2
        return [
            debt
            for half in (halves[:middle], halves[middle:])
            for debt in _each(verb, list(chain.from_iterable(half)), done)
        ]
    return list(group)
