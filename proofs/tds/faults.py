"""What is to go wrong, and the log of what was said."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from proofs.tds.packets import Cut, Kind
from proofs.tds.tables import SqlError

_SMALL = {"declare", "prepare", "unprepare", "select"}


@dataclass
class Said:
    """A statement as it came."""

    name: str
    """What it is, in the words of `statements.py`; or `login`, `bulk rows`, and `begin`, `commit`
    and `rollback` of the driver's own transactions."""
    text: str
    values: Mapping[str, Any]
    """Its parameters."""
    rows: int | None = None
    """Rows it answered or touched; None where it failed."""


@dataclass
class Entry:
    """One request and what became of it."""

    connection: int
    message: int
    kind: Kind
    outcome: str
    """`done`, `error 1205`, or `cut` where the line was severed before it was executed."""
    received: int
    """Bytes, headers too."""
    sent: int = 0
    """Bytes of the reply that passed before the line was severed."""
    said: list[Said] = field(default_factory=list)


class Log:
    """Every request in the order in which they came; several threads write."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: list[Entry] = []

    def add(self, entry: Entry) -> None:
        with self._lock:
            self._entries.append(entry)

    @property
    def entries(self) -> list[Entry]:
        with self._lock:
            return list(self._entries)

    def names(self) -> list[str]:
        """What was asked for, statement by statement, but for the small change."""
        return [
            said.name
            for entry in self.entries
            for said in entry.said
            if said.name not in _SMALL and not said.name.startswith("set ")
        ]


@dataclass
class Refusal:
    """An error instead of an answer."""

    where: str
    """A pattern found in the name or text of the statement that gets it."""
    error: SqlError
    after: int = 0
    """Statements that match and are still executed before."""
    times: int = 1
    """Statements that get it."""


class Faults:
    """A plan: cuts, and errors in place of answers.

    Args:
        cuts: where lines are severed.
        refusals: which statements get an error.
    """

    def __init__(self, cuts: Sequence[Cut] = (), refusals: Sequence[Refusal] = ()) -> None:
        self._cuts = {cut.connection: cut for cut in cuts}
        self._refusals = list(refusals)
        self._lock = threading.Lock()

    def cut(self, connection: int) -> Cut | None:
        """Where this connection is to be severed."""
        return self._cuts.get(connection)

    def refuse(self, said: Said) -> None:
        """Called before a statement is executed.

        Raises:
            SqlError: the plan says so.
        """
        with self._lock:
            for refusal in self._refusals:
                if refusal.times and re.search(refusal.where, f"{said.name}\n{said.text}"):
                    if refusal.after:
                        refusal.after -= 1
                        continue
                    refusal.times -= 1
                    raise refusal.error
