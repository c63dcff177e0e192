"""The phases of a publish on the wire, and cuts chosen at random in each of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from casparian_flow.engine.sinks.sql import LEDGER
from proofs.tds.faults import Entry
from proofs.tds.packets import Cut, Kind

PHASES = ("login", "ddl", "bulk", "transaction", "commit", "cleanup")
"""Connecting; looking at tables and making them; the bulk load with its own connection; from the
beginning of the transaction that publishes; its commit; what is tidied after it."""


def phases(entries: Sequence[Entry]) -> list[str]:
    """The phase of each request of one publish that went well."""
    writes = [n for n, entry in enumerate(entries) if _says(entry, f"insert {LEDGER}")]
    connection = entries[writes[0]].connection
    own = [n for n, entry in enumerate(entries) if entry.connection == connection]
    begin = max((n for n in own if n < writes[0] and _says(entries[n], "begin")), default=own[0])
    end = min(n for n in own if n > writes[-1] and _says(entries[n], "commit"))
    return [
        "login" if entry.kind in {Kind.PRELOGIN, Kind.LOGIN}
        else "bulk" if any("bulk" in said.name for said in entry.said)
        else "ddl" if n < begin
        else "transaction" if n < end
        else "commit" if n == end
        else "cleanup"
        for n, entry in enumerate(entries)
    ]  # fmt: skip


def choose(entries: Sequence[Entry], phase: str, chance: random.Random) -> Cut:
    """A cut at a random byte of a random request of that phase, or of its reply."""
    of_phase = zip(entries, phases(entries), strict=True)
    entry = chance.choice([entry for entry, its in of_phase if its == phase])
    inbound = chance.random() < 0.5
    # One more than it has: all passes, and the line is severed after it.
    at = chance.randrange((entry.received if inbound else entry.sent) + 1)
    return Cut(entry.connection, entry.message, inbound, at, abrupt=chance.random() < 0.5)


def _says(entry: Entry, name: str) -> bool:
    return any(said.name == name for said in entry.said)
