"""Look at every value of a file's columns and say which types it leaves possible.

Each candidate (a type in one notation) is tried on every value and eliminated by those that do not
fit; none is guessed from a sample. `proposal` makes types of the facts of all versions. Used in the
plugin's process; memory does not grow with the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from casparian_flow.candidates import (
    NOTATIONS,
    VALUE_CHARACTERS,
    Batch,
    Candidate,
    Family,
    Numbers,
    Origin,
    other_families,
)
from casparian_flow.cells import Cells
from casparian_flow.contract import Column, read, words_of
from casparian_flow.time_formats import kind_of_format

FEW = 3
"""Columns with so few different texts may be yes and no."""
REPEATED = 4
BETWEEN_TRIES = 16

MISSING = (
    "", "NA", "N/A", "n/a", "na", "N.A.", "n.a.", "NULL", "null", "Null", "(null)", "<null>",
    "None", "none", "NaN", "nan", "NAN", "#N/A", "#NV", "#N/V", "#NA", "-", "--", "---", "\u2013",
    "\u2014",
    ".", "..", "...", "?", "*", "\\N", "nil", "NIL", "k.A.", "k. A.", "keine Angabe", "n.v.", "n/v",
    "Unknown", "unknown", "UNKNOWN", "missing", "Missing", "N/D", "n/d", "ND", "n.d.", "s/d", "S/D",
)  # fmt: skip
"""Texts that mean that there is no value, in columns whose other values have a type."""


class Survey:
    """What the values of one file say about the types of its columns.

    Args:
        names: the names of the file's columns.
        hints: what a person said: `decimalChar` and `missingValues` for all columns, and `columns`:
            name -> words of a column in a contract.

    Raises:
        ContractError: a hint is none.
    """

    def __init__(self, names: Sequence[str], hints: Mapping[str, Any]) -> None:
        said = hints.get("columns", {})
        self.records = 0
        self._names = list(names)
        self._columns = [
            Fixed(_said(name, said[name], hints)) if {"type", "format"} & set(said.get(name, {}))
            else Open({**hints, **said.get(name, {})})
            for name in names
        ]  # fmt: skip

    def add(self, arrays: Sequence[Any], lines: Sequence[int]) -> None:
        """Look at records: an array of strings for each column, and the line of each record."""
        self.records += len(lines)
        for column, texts in zip(self._columns, arrays, strict=True):
            column.add(texts, lines)

    def facts(self) -> dict[str, Any]:
        """What was found, as JSON has it."""
        columns = [
            {"name": name, **column.facts()}
            for name, column in zip(self._names, self._columns, strict=True)
        ]
        return {"records": self.records, "columns": columns}


def _said(name: str, words: Mapping[str, Any], hints: Mapping[str, Any]) -> Column:
    """The column that a person asked for."""
    made = dict(words)
    made.setdefault("type", kind_of_format(str(words.get("format", ""))))
    if "missingValues" in hints and made["type"] != "text":
        made.setdefault("missingValues", ["", *hints["missingValues"]])
    if "decimalChar" in hints and str(made["type"]).startswith(("decimal", "double")):
        made.setdefault("decimalChar", hints["decimalChar"])
    return read({"table": "survey", "files": ["*"], "columns": {name: made}}).columns[0]


class Fixed:
    """A column whose type a person said: what does not fit is counted."""

    def __init__(self, column: Column) -> None:
        self._column = column
        self._cells = Cells(column, column.required)
        self._found = Candidate(column.type)
        self._values = 0
        self._missing: dict[str, int] = {}

    def add(self, texts: Any, lines: Sequence[int]) -> None:
        texts = pc.fill_null(texts, "")
        _, faults = self._cells.of(texts)
        self._values += len(texts)
        for token in self._column.missing:
            count = pc.sum(pc.equal(texts, token), min_count=0).as_py()
            if count:
                self._missing[token] = self._missing.get(token, 0) + count
        bad = None
        for fault in faults:
            bad = fault.rows if bad is None else pc.or_(bad, fault.rows)
        if bad is not None:
            self._found.misfit(Batch(texts, None, Origin(texts, lines)).only(bad))

    def facts(self) -> dict[str, Any]:
        said = words_of(self._column)
        return {"values": self._values, "said": said, "misfits": self._found.misfits,
                "first": self._found.first, "missing": self._missing}  # fmt: skip


class Open:
    """A column whose type is to be found."""

    def __init__(self, hints: Mapping[str, Any]) -> None:
        chosen = {word: hints[word] for word in ("decimalChar", "groupChar") if word in hints}
        notations = [
            (decimal, group)
            for decimal, group in NOTATIONS
            if chosen.get("decimalChar", decimal) == decimal
            and chosen.get("groupChar", group) == group
        ] or [(chosen.get("decimalChar", "."), chosen.get("groupChar", ""))]
        self._tokens = pa.array({*MISSING, *hints.get("missingValues", ())}, pa.string())
        self._numbers = Numbers(notations)
        dates, *others = other_families()
        self._families = [dates, self._numbers, *others]  # 31.12.2026 has the shape of a number
        self._missing: dict[str, int] = {}
        self._values = 0
        self._blanks = 0
        self._sample: str | None = None
        self._few: set[str] | None = set()
        self._tries = 0
        self._leader: tuple[Family, Candidate] | None = None
        self._is_open = True

    def add(self, texts: Any, lines: Sequence[int]) -> None:
        if not self._is_open and self._few is None:
            return
        texts = pc.fill_null(texts, "")
        batch = self._batch(texts, lines)
        self._note_few(batch)
        if not self._is_open:
            return
        if self._leader:
            family, leader = self._leader
            known, batch = batch.parted(family.fits(leader, batch.texts))
            self._sort(known, family, leader)
        if len(batch):
            self._add(batch)
        self._choose_leader()

    def _batch(self, texts: Any, lines: Sequence[int]) -> Batch:
        origin = Origin(texts, lines)
        if self._tries:
            self._tries -= 1
            return Batch(texts, None, origin)
        counted = texts.value_counts()
        if len(counted) * REPEATED > len(texts):
            self._tries = BETWEEN_TRIES
            return Batch(texts, None, origin)
        return Batch(counted.field("values"), counted.field("counts"), origin)

    def _note_few(self, batch: Batch) -> None:
        if self._few is not None:
            texts = batch.texts.unique().slice(0, FEW + 2)
            self._few |= set(pc.utf8_slice_codeunits(texts, 0, VALUE_CHARACTERS).to_pylist()) - {""}
            self._few = self._few if len(self._few) <= FEW else None

    def _add(self, batch: Batch) -> None:
        """Look at values of which nothing is known."""
        trimmed = batch.trimmed()
        blank = batch.only(pc.not_equal(batch.texts, trimmed.texts))
        self._blanks += blank.count
        missing, batch = trimmed.parted(pc.is_in(trimmed.texts, value_set=self._tokens))
        for token, texts in missing.tally().items():
            self._missing[token] = self._missing.get(token, 0) + texts
        for family in self._families:
            if not len(batch):
                break
            shaped, batch = family.shaped(batch)
            self._sort(shaped, family)
        self._sort(batch, None)

    def _sort(self, batch: Batch, family: Family | None, leader: Candidate | None = None) -> None:
        """Give values to the family of their shape; they fit no candidate of the others."""
        if not len(batch):
            return
        self._values += batch.count
        if self._sample is None:
            self._sample = batch.first()[1]
        for other in self._families:
            if other is not family and other.is_open:
                other.miss(batch)
        if family:
            family.add(batch, leader)

    def _choose_leader(self) -> None:
        """The candidate that most values of the next batch will fit, if there is one."""
        alive = [
            (family, each) for family in self._families if family.is_open for each in family.alive
        ]
        self._is_open = any(family.is_open for family in self._families)
        self._leader = None
        if alive:
            family, best = min(alive, key=lambda pair: pair[0].misfits(pair[1]))
            if family.misfits(best) * 2 < self._values:
                self._leader = family, best

    def facts(self) -> dict[str, Any]:
        made: dict[str, Any] = {
            "open": self._is_open, "values": self._values, "missing": self._missing,
            "blanks": self._blanks, "sample": self._sample,
            "few": None if self._few is None else sorted(self._few),
            "candidates": {},
        }  # fmt: skip
        for family in self._families:
            made["candidates"] |= family.facts(self._values)
        return made | self._numbers.more()
