"""Whether the sink asked in the right order, from the log of what it said.

    1  it locks an output's key before it asks the ledger for it
    2  it asks the ledger in the transaction in which it brings rows in, and brings in none that
       the ledger has
    3  rows and the ledger's row come in one transaction

A commit of which nobody knows how it ended is safe by these three: whoever comes next waits for
the lock, and then learns from the ledger what became of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from casparian_flow.engine.sinks.sql import LEDGER, ROWS
from proofs.tds.faults import Entry, Said


@dataclass
class Span:
    """What one connection said in one transaction."""

    connection: int
    said: list[Said] = field(default_factory=list)
    end: str = ""
    """`commit`, `rollback`, or empty where it was undone without being asked to."""


def spans(entries: Sequence[Entry]) -> list[Span]:
    """All transactions, in the order in which they began."""
    found: list[Span] = []
    current: dict[int, Span] = {}
    for entry in entries:
        for said in entry.said:
            if said.name == "begin":
                current[entry.connection] = Span(entry.connection)
                found.append(current[entry.connection])
            elif said.rows is not None and (span := current.get(entry.connection)):
                span.said.append(said)
                if said.name in {"commit", "rollback"}:
                    span.end = said.name
                    del current[entry.connection]
    return found


def is_lookup(said: Said) -> bool:
    """Whether the ledger is asked for one output key."""
    return said.name == f"select {LEDGER}" and "[output_key] = " in said.text


def committed(entries: Sequence[Entry], key: str) -> bool:
    """Whether the server has committed the ledger's row of a key."""
    return any(
        span.end == "commit" and said.name == f"insert {LEDGER}" and key in said.values.values()
        for span in spans(entries)
        for said in span.said
    )


def faults(entries: Sequence[Entry], table: str) -> Iterator[str]:
    """What is not as the module says, a sentence each."""
    for span in spans(entries):
        where = f"connection {span.connection}"
        locked: set[str] = set()
        answers: dict[str, int | None] = {}
        recorded = False
        for said in span.said:
            values = [value for value in said.values.values() if isinstance(value, str)]
            if said.name == "applock":
                locked |= {value.removeprefix("casparian:") for value in values}
            elif is_lookup(said):
                answers |= dict.fromkeys(values, said.rows)
                if not locked >= set(values):
                    yield f"{where}: asked the ledger for {values} without their locks"
            elif said.name == f"insert {LEDGER}":
                recorded = True
                asked = [answers[value] for value in values if value in answers]
                if asked != [0]:
                    yield f"{where}: wrote to the ledger, which had answered {asked} rows"
            elif said.name == f"insert {ROWS}{table}" and not recorded:
                yield f"{where}: brought rows in before the ledger's row"
