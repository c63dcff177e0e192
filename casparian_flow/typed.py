"""Hold the records of one file against a contract: each becomes a typed row or a reject.

Used in the plugin's process, by a reader that finds the records. It counts them before it hands
them over; published and rejected add up to what was read.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal, localcontext
from hashlib import blake2b
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from casparian_flow.cells import Cells, Fault, has_all
from casparian_flow.contract import (
    EXTRA,
    LINE,
    Column,
    Contract,
    ContractError,
    Held,
    kind_of,
    precision_of,
    sum_group,
)
from casparian_flow.sdk import column_names, printable

REJECTS = pa.schema(
    [
        ("line", pa.int64()),
        ("record", pa.int64()),
        ("column", pa.string()),
        ("value", pa.string()),
        ("rule", pa.string()),
        ("reason", pa.string()),
        ("raw", pa.string()),
    ]
)
"""`line`: the physical line where the record starts; `column`, `value`, `rule`: its first fault;
`reason`: all of them in words; `raw`: the record's text."""

VALUE_CHARACTERS = 1 << 20
SHOWN = 100
"""Characters of a cell that a reason shows."""
REASONS = 20
"""Faults of one record that its reason names."""
HASHED = 64
"""Longer texts are remembered by their hash, to find those that are there twice."""


class Reject(NamedTuple):
    """A row of `REJECTS`."""

    line: int
    record: int
    column: str | None
    value: str | None
    rule: str
    reason: str
    raw: str


def reject_table(rejects: Iterable[Reject]) -> Any:
    """Rejects as a table with the columns of `REJECTS`."""
    columns = list(zip(*rejects, strict=True)) or [()] * len(REJECTS)
    arrays = [pa.array(values, f.type) for values, f in zip(columns, REJECTS, strict=True)]
    return pa.Table.from_arrays(arrays, schema=REJECTS)


class Typed:
    """The table that one file gives.

    Args:
        names: the names of the file's columns, in its order, as `sdk.column_names` gives them.
        path: what `contract.path_values` gives for the file.

    Raises:
        Held: the file's columns are not the contract's, and a person has to decide.
        ContractError: a regular expression of the contract is none.
    """

    def __init__(self, contract: Contract, names: Sequence[str], path: Mapping[str, str]) -> None:
        check_patterns(contract)
        self.contract = contract
        self.published = 0
        self.rejects = 0
        self._path = path
        self._place = {name: index for index, name in enumerate(names)}
        new = _drifted(contract, names, path)
        added = [Column(name=name, type="text", missing=()) for name in new]
        columns = [*contract.columns, *(added if contract.drift == "evolve" else [])]
        self._cells = [
            Cells(column, column.required or column.name in contract.key) for column in columns
        ]
        self._extra = new if contract.drift == "rescue" else []
        fields = [pa.field(cells.column.name, cells.type) for cells in self._cells]
        if contract.drift == "rescue":
            fields.append(pa.field(EXTRA, pa.map_(pa.string(), pa.string())))
        if contract.lines:
            fields.append(pa.field(LINE, pa.int64()))
        self.schema = pa.schema(fields)
        once = [("unique", [at]) for at, column in enumerate(columns) if column.unique]
        if contract.key:
            once.append(("key", [self.schema.get_field_index(name) for name in contract.key]))
        self._once = [
            _Once(rule, places, [self.schema.types[place] for place in places])
            for rule, places in once
        ]
        self._totals = _Totals(contract)

    def rows(
        self, records: Sequence[tuple[int, int, Sequence[str | None], str]]
    ) -> tuple[Any, list[Reject]]:
        """Make rows of records that have as many fields as the file has columns.

        Args:
            records: physical line, record number, fields and raw text of each.

        Returns:
            the rows that are to be published, as a table of `schema`, and the rejects.
        """
        lines, numbers, fields, raws = zip(*records, strict=True) if records else ((), (), (), ())
        cells = list(zip(*fields, strict=True)) if fields else [()] * len(self._place)
        arrays = [pa.array(column, pa.string()) for column in cells]
        return self.columns(arrays, lines, numbers, raws.__getitem__)

    def columns(
        self,
        arrays: Sequence[Any],
        lines: Sequence[int],
        records: Sequence[int],
        raw_of: Callable[[int], str],
    ) -> tuple[Any, list[Reject]]:
        """Make rows of columns of text.

        Args:
            arrays: a pyarrow array of strings for each of the file's columns; null is missing.
            lines: the physical line of each record.
            records: the number of each record.
            raw_of: gives the raw text of the record at an index; called for rejects only.
        """
        count = len(lines)
        made, faults = [], []
        for place, cells in enumerate(self._cells):
            texts = self._texts(cells.column, arrays, count)
            values, broken = cells.of(texts)
            made.append(values)
            faults += [(place, texts, fault) for fault in broken]
        self._totals.add(self.schema.names, made)
        good = _without(None, faults)
        if self._once:
            twice = []
            found = _repeated(self._once, made, good, count)
            for once, rows in zip(self._once, found, strict=True):
                if rows is not None:
                    place = once.places[0]
                    texts = self._texts(self._cells[place].column, arrays, count)
                    twice.append((place, texts, Fault(rows, once.rule, "was there before")))
            good = _without(good, twice)
            faults += twice
        table = self._table(made, arrays, lines)
        if good is not None:
            table = table.filter(good)
        rejects = self._rejects(faults, lines, records, raw_of) if good is not None else []
        self.published += len(table)
        self.rejects += len(rejects)
        assert len(table) + len(rejects) == count
        return table, rejects

    def structure(self, line: int, record: int, reason: str, raw: str) -> Reject:
        """Count and return the reject of a record whose fields could not be read."""
        self.rejects += 1
        return Reject(line, record, None, None, "structure", printable(reason), printable(raw))

    def fits(self, arrays: Sequence[Any]) -> list[tuple[int, bool]]:
        """Of each record: how many cells fit a type other than text, and whether none is at fault.

        Nothing is counted or remembered, so records that are no part of the table may be asked of.
        """
        count = len(arrays[0])
        typed, good = [0] * count, [True] * count
        for cells in self._cells:
            place = self._place.get(cells.column.name)
            if cells.column.from_path or place is None:
                continue
            values, faults = cells.of(arrays[place])
            fit = _without(None, [(place, None, fault) for fault in faults])
            fit = [True] * count if fit is None else fit.to_pylist()
            is_typed = cells.type != pa.string()
            for at, value in enumerate(values.is_valid().to_pylist()):
                typed[at] += is_typed and value and fit[at]
                good[at] = good[at] and fit[at]
        return list(zip(typed, good, strict=True))

    def finish(self, skipped: Iterable[str] = ()) -> None:
        """Check the file as a whole, once all records were handed over.

        Args:
            skipped: the raw lines above and below the table; one may have control totals.

        Raises:
            ValueError: more rejects than the contract allows, or control totals that differ; the
                version is refused whole.
        """
        read = self.published + self.rejects
        limit = self.contract.max_rejects
        if limit.endswith("%"):
            beyond = 100 * self.rejects > Decimal(limit[:-1]) * read
        else:
            beyond = bool(limit) and self.rejects > int(limit)
        if beyond:
            raise ValueError(
                f"{self.rejects:,} of {read:,} records are rejected, and max_rejects is {limit}: "
                "nothing of this version is published"
            )
        self._totals.check(skipped, read, self.rejects)

    def _texts(self, column: Column, arrays: Sequence[Any], count: int) -> Any:
        """The column's texts: those of the file, of its path, or nulls."""
        if column.from_path:
            return pa.repeat(pa.scalar(self._path.get(column.name), pa.string()), count)
        place = self._place.get(column.name)
        return pa.nulls(count, pa.string()) if place is None else arrays[place]

    def _table(self, made: list[Any], arrays: Sequence[Any], lines: Sequence[int]) -> Any:
        columns = list(made)
        if self.contract.drift == "rescue":
            columns.append(self._extras(arrays, len(lines)))
        if self.contract.lines:
            columns.append(pa.array(lines, pa.int64()))
        return pa.Table.from_arrays(columns, schema=self.schema)

    def _extras(self, arrays: Sequence[Any], count: int) -> Any:
        kind = self.schema.field(EXTRA).type
        width = len(self._extra)
        if not width:
            return pa.nulls(count, kind)
        cells = [arrays[self._place[name]].to_pylist() for name in self._extra]
        items = [cell for row in zip(*cells, strict=True) for cell in row]
        offsets = pa.array(range(0, width * count + 1, width), pa.int32())
        keys = pa.array(self._extra * count, pa.string())
        return pa.MapArray.from_arrays(offsets, keys, pa.array(items, pa.string()))

    def _rejects(
        self,
        faults: list[tuple[int, Any, Fault]],
        lines: Sequence[int],
        records: Sequence[int],
        raw_of: Callable[[int], str],
    ) -> list[Reject]:
        of_row: dict[int, list[tuple[int, str | None, Fault]]] = {}
        for place, texts, fault in faults:
            for at in pc.indices_nonzero(fault.rows).to_pylist():
                of_row.setdefault(at, []).append((place, texts[at].as_py(), fault))
        rejects = []
        for at, found in sorted(of_row.items()):
            found.sort(key=lambda each: each[0])
            place, value, fault = found[0]
            reason = "; ".join(self._reason(*each) for each in found[:REASONS])
            reason += f"; and {len(found) - REASONS} more" if len(found) > REASONS else ""
            column = self._cells[place].column.name
            shown = None if value is None else printable(value[:VALUE_CHARACTERS])
            raw = printable(raw_of(at))
            rejects.append(
                Reject(lines[at], records[at], column, shown, fault.rule, printable(reason), raw)
            )
        return rejects

    def _reason(self, place: int, value: str | None, fault: Fault) -> str:
        cells = self._cells[place]
        name = cells.column.name
        if fault.rule == "required":
            return f"{name}: missing"
        if fault.rule == "key":
            return f"{', '.join(self.contract.key)}: was there before"
        value = value or ""
        shown = repr(value) if len(value) <= SHOWN else f"{value[:SHOWN]!r}..."
        cause = cells.cause(value) if fault.rule == cells.column.type else ""
        return f"{name}: {shown} {fault.why}" + (f": {cause}" if cause else "")


def _without(good: Any | None, faults: Iterable[tuple[int, Any, Fault]]) -> Any | None:
    """The rows that have none of these faults either; None: all rows."""
    for _, _, fault in faults:
        fits = pc.invert(fault.rows)
        good = fits if good is None else pc.and_(good, fits)
    return good


def check_patterns(contract: Contract) -> None:
    """Check the regular expressions of a contract, which must be those of RE2.

    Raises:
        ContractError: one is none, or too large.
    """
    where = f"table {contract.table}"
    patterns = [
        (f"{where}, column {column.name}: pattern", column.pattern)
        for column in contract.columns
        if column.pattern
    ]
    for word in ("header", "footer", "control"):
        if pattern := contract.dialect.get(word):
            patterns.append((f"{where}, dialect: {word}", str(pattern)))
    for what, pattern in patterns:
        try:  # by itself first: an error shows the expression
            for each in (pattern, rf"\A(?:{pattern})\z"):
                pc.match_substring_regex(pa.array([""]), each)
        except (pa.ArrowInvalid, ValueError) as error:
            why = str(error).partition("Invalid regular expression: ")[2] or str(error)
            raise ContractError(
                f"{what} {printable(pattern)[:60]!r} is no regular expression of RE2: {why}"
            ) from None


def _drifted(contract: Contract, names: Sequence[str], path: Mapping[str, str]) -> list[str]:
    """The file's columns that the contract does not have.

    Raises:
        Held: the contract does not say what becomes of them, or columns that it needs are missing.
    """
    of_file = {column.name for column in contract.columns if not column.from_path}
    from_path = [column for column in contract.columns if column.from_path]
    new = [name for name in names if name not in of_file]
    needed = [
        column.name
        for column in contract.columns
        if (contract.drift == "hold" and not column.optional)
        or column.required
        or column.name in contract.key
    ]
    lost = [name for name in needed if name in of_file and name not in names]
    unsaid = [
        column.name for column in from_path if column.name not in path and not column.optional
    ]
    both = [column.name for column in from_path if column.name in names]
    taken = {column.name.casefold() for column in contract.columns}
    alike = [name for name in new if contract.drift == "evolve" and name.casefold() in taken]
    found = [
        _listed(new if contract.drift == "hold" else alike, "is new", "are new"),
        _listed(lost, "is missing", "are missing"),
        _listed(unsaid, "is not in the path", "are not in the path"),
        _listed(both, "is in the file and in the path", "are in the file and in the path"),
    ]
    if contract.drift != "hold" and not lost:
        found.append(_other_table(contract, names))
    if any(found):
        found.append(_other_delimiter(contract, names))
        raise Held("held: " + "; ".join(filter(None, found)))
    return new


def _other_delimiter(contract: Contract, names: Sequence[str]) -> str:
    """Words if a file's only name is several columns of the contract with a sign between them."""
    delimiter = contract.dialect.get("delimiter", "")
    if len(names) != 1 or not delimiter:
        return ""
    known = {column.name for column in contract.columns}
    for sign, shown in ((",", "','"), (";", "';'"), ("|", "'|'"), (" ", "a tab")):
        if len(known.intersection(column_names(names[0].replace('"', "").split(sign)))) > 1:
            return f"the file seems to be delimited by {shown}, and the contract by {delimiter!r}"
    return ""


def _other_table(contract: Contract, names: Sequence[str]) -> str:
    """Words if a file has none of the contract's columns, or fewer than half of those that files
    have. It is another table, or its header is not there and its first row would become names."""
    known = [column for column in contract.columns if not column.from_path]
    there = sum(column.name in names for column in known)
    usual = [column.name for column in known if not column.optional]
    have = sum(name in names for name in usual)
    if not known or (there and 2 * have >= len(usual)):
        return ""
    shown = _listed([name for name in names if name not in {c.name for c in known}], "is", "are")
    shown = f"; {shown} in it" if shown else ""
    return (
        f"the file has {have or there} of the contract's {len(usual) or len(known)} columns{shown}"
    )


def _listed(names: Sequence[str], one: str, many: str) -> str:
    if not names:
        return ""
    shown = ", ".join(printable(name) for name in names[:10])
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"column {shown} {one}" if len(names) == 1 else f"columns {shown}{more} {many}"


class _Once:
    """What may be there once: the values of a unique column, or of a key."""

    def __init__(self, rule: str, places: list[int], types: list[Any]) -> None:
        self.rule = rule
        self.places = places
        self._is_whole = len(places) == 1 and (
            pa.types.is_integer(types[0]) or pa.types.is_temporal(types[0])
        )
        self._rising = array("q")
        """Whole numbers, each above the one before: 8 bytes each, where others need 100. The
        numbers of most exports go up."""
        self._others: set[Any] = set()

    def values(self, made: Sequence[Any], good: Any | None) -> list[Any]:
        """What each row has, in a form that can be remembered; None: nothing that counts."""
        columns = [self._comparable(made[place], good).to_pylist() for place in self.places]
        if self._is_whole:
            return [*columns[0]]
        return [
            None if None in row else tuple(map(_short, row)) for row in zip(*columns, strict=True)
        ]

    def take_rising(self, made: Sequence[Any], good: Any | None) -> Any | None:
        """The whole numbers of a batch, if each is above all that were there before."""
        if not self._is_whole:
            return None
        numbers = self._comparable(made[self.places[0]], good).drop_null()
        if not len(numbers):
            return numbers
        first = numbers[0].as_py()
        rises = has_all(pc.greater(numbers[1:], numbers[:-1]))
        return numbers if rises and (not self._rising or first > self._rising[-1]) else None

    def remember_rising(self, numbers: Any) -> None:
        self._rising.extend(numbers.to_pylist())

    def has(self, value: Any) -> bool:
        if self._is_whole and self._rising:
            at = bisect_left(self._rising, value)
            if at < len(self._rising) and self._rising[at] == value:
                return True
        return value in self._others

    def remember(self, value: Any) -> None:
        if self._is_whole and (not self._rising or value > self._rising[-1]):
            self._rising.append(value)
        else:
            self._others.add(value)

    def _comparable(self, values: Any, good: Any | None) -> Any:
        values = values if good is None else values.filter(good)
        if pa.types.is_date32(values.type):
            values = values.cast(pa.int32())
        if self._is_whole:
            return values.cast(pa.int64())
        return values.cast(pa.string()) if pa.types.is_decimal(values.type) else values


def _short(value: Any) -> Any:
    """A value, or a hash that stands for a long one."""
    if isinstance(value, str | bytes) and len(value) > HASHED:
        data = value.encode() if isinstance(value, str) else value
        return blake2b(data, digest_size=20).digest(), len(data)
    return value


def _repeated(rules: list[_Once], made: Sequence[Any], good: Any | None, count: int) -> list[Any]:
    """For each rule an array that says in which rows it is broken; None: in none.

    Rows count that are rejected for nothing else, so that the first good one is published.
    """
    rising = [rule.take_rising(made, good) for rule in rules]
    if all(numbers is not None for numbers in rising):
        for rule, numbers in zip(rules, rising, strict=True):
            rule.remember_rising(numbers)
        return [None] * len(rules)
    broken: list[list[int]] = [[] for _ in rules]
    places = range(count) if good is None else pc.indices_nonzero(good).to_pylist()
    columns = [rule.values(made, good) for rule in rules]
    for at, row in zip(places, zip(*columns, strict=True), strict=True):
        known = [
            index
            for index, value in enumerate(row)
            if value is not None and rules[index].has(value)
        ]
        for index in known:
            broken[index].append(at)
        if not known:
            for rule, value in zip(rules, row, strict=True):
                if value is not None:
                    rule.remember(value)
    return [_at(rows, count) if rows else None for rows in broken]


def _at(rows: list[int], count: int) -> Any:
    mask = [False] * count
    for row in rows:
        mask[row] = True
    return pa.array(mask)


class _Totals:
    """Control totals: what the file says of itself, and what was read."""

    def __init__(self, contract: Contract) -> None:
        self._control = str(contract.dialect.get("control", ""))
        self._columns = {
            sum_group(column.name): column
            for column in contract.columns
            if f"<{sum_group(column.name)}>" in self._control
            and kind_of(column.type) in ("integer", "decimal")
        }
        self._sums = {column.name: Decimal(0) for column in self._columns.values()}

    def add(self, names: Sequence[str], made: Sequence[Any]) -> None:
        """Add the values of a batch, also of rows that are rejected for something else."""
        for name, total in self._sums.items():
            values = made[names.index(name)]
            scale = values.type.scale if pa.types.is_decimal(values.type) else 0
            wide = values.cast(pa.decimal128(38, scale)) if scale == 0 else values
            more = pc.sum(wide.cast(pa.decimal256(76, scale)), min_count=0).as_py()
            with localcontext(prec=200):
                self._sums[name] = total + more

    def check(self, skipped: Iterable[str], read: int, rejects: int) -> None:
        """Raises ValueError if the file says otherwise, or nothing."""
        if not self._control:
            return
        lines = pa.array([line.rstrip("\r\n") for line in skipped], pa.string())
        found = pc.extract_regex(lines, self._control).drop_null().to_pylist()
        if not found:
            raise ValueError(f"no line outside of the table matches control {self._control!r}")
        for group, text in found[-1].items():
            if group == "rows":
                separator = next((sign for sign in text.strip() if not sign.isdecimal()), "")
                column = Column(name=group, type="integer", missing=(), group=separator)
                real = Decimal(read)
            else:
                column = self._columns[group]
                real = self._sums[column.name]
            if _number(text, column) != real:
                rejected = f", {rejects:,} of the records are rejected" if rejects else ""
                raise ValueError(
                    f"control total {group}: the file says {text!r}, but it is {real:,}{rejected}: "
                    "nothing of this version is published"
                )


def _number(text: str, column: Column) -> Decimal | None:
    """A control total, in the form of its column; None if it is no number."""
    scale = 0 if column.type == "integer" else precision_of(column.type)[1]
    wide = replace(column, type=f"decimal(38,{scale})", missing=(), minimum=None, maximum=None,
                   enum=(), trim=True)  # fmt: skip
    values, _ = Cells(wide, required=False).of(pa.array([text], pa.string()))
    number: Decimal | None = values[0].as_py()
    return number
