"""What a file gave, row by row and reject by reject, as the host counts it.

A file of which nothing but rejects came has not been read, whatever the plugin thinks of it: the
attempt fails. Its topics publish nothing then, so its first rejects go into its log.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import pyarrow as pa
import pyarrow.compute as pc

from casparian_flow import topics
from casparian_flow.errors import OnlyRejects
from casparian_flow.wording import counted

SHOWN = 20
"""Rejects of a failed attempt that its log has."""

COLUMNS = 8
"""Columns of a reject that are shown; the bundled plugins have four at the most."""

CELL = 200
"""Characters of a value that are shown."""


class Rejects:
    """The rows and the rejects of one attempt.

    Args:
        known: every topic the plugin may publish to.
        may_be_empty: the topics of data that may get no row though there are rejects.
    """

    def __init__(self, known: Collection[str], may_be_empty: Collection[str]) -> None:
        self._known = set(known)
        self._may_be_empty = set(may_be_empty)
        self._reject_topics = topics.rejects(self._known)
        self._rows = 0
        self._rejects: dict[str, int] = {}
        self._first: list[str] = []

    def see(self, topic: str, batch: pa.RecordBatch) -> None:
        """Count a batch that was checked in full."""
        if topic not in self._reject_topics:
            self._rows += batch.num_rows
            return
        self._rejects[topic] = self._rejects.get(topic, 0) + batch.num_rows
        if room := SHOWN - len(self._first):
            self._first += _in_words(batch.slice(0, room))

    def judge(self) -> None:
        """Return if what came may be published.

        Raises:
            OnlyRejects: no row came, and rejects of a topic whose data may not be empty.
        """
        strict = {
            name
            for topic, number in self._rejects.items()
            if number and not self._data(topic) & self._may_be_empty
            for name in self._data(topic)
        }
        if self._rows or not strict:
            return
        number = counted(sum(self._rejects.values()), "reject")
        names = ", ".join(sorted(strict))
        raise OnlyRejects(
            f"nothing but rejects came of the file: {number}, and no row for {names}; "
            f"the first: {self._first[0]}"
        )

    def log(self) -> str:
        """The first rejects, a line each; what is said where they are not published."""
        total = sum(self._rejects.values())
        if not total:
            return ""
        head = f"{counted(total, 'reject')}, not published"
        if total > len(self._first):
            head += f"; the first {len(self._first)}"
        return "\n".join([f"{head}:", *(f"rejected: {words}" for words in self._first), ""])

    def _data(self, topic: str) -> set[str]:
        return topics.data_of(topic, self._known)


def _in_words(batch: pa.RecordBatch) -> Iterator[str]:
    """Each row as its columns' names and values."""
    names = [_printable(name[:CELL]) for name in batch.schema.names[:COLUMNS]]
    columns = [_texts(column) for column in batch.columns[:COLUMNS]]
    for row in zip(*columns, strict=True):
        yield "; ".join(
            f"{name} {_printable(value)}" for name, value in zip(names, row, strict=True) if value
        )


def _texts(column: pa.Array) -> list[str]:
    """The beginning of each value as text; empty where it is null, or no plain value."""
    try:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            # Before they become Python's: one may have as many bytes as a whole batch.
            column = pc.utf8_slice_codeunits(column, 0, CELL)
        elif pa.types.is_nested(column.type):
            return [""] * len(column)
        found = column.to_pylist()
    except Exception:  # noqa: BLE001  Python has no form for every value; the rest still says much
        return [""] * len(column)
    return ["" if value is None else str(value)[:CELL] for value in found]


def _printable(text: str) -> str:
    """The text on one line, with nothing in it that moves a terminal's cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
