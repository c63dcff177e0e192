"""What a reader hands over of a table's file: rows, faults, and the lines that are neither.

Used in the plugin's process. A contract types and publishes the rows; a survey only looks at them.
The reader counts what it reads before it judges it, and `finish` compares: read = published +
rejected + skipped.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from casparian_flow import contract
from casparian_flow.contract import Held
from casparian_flow.sdk import BasePlugin, PluginMetadata, printable
from casparian_flow.typed import Reject, Typed, reject_table

if TYPE_CHECKING:
    from casparian_flow.survey import Survey

TOTAL = r"(?i)\A\W*(?:summen?|gesamt\w*|(?:grand |sub)?total\w*|sums?|sommes?|totaa?le?s?|suma)\b"
"""The first cell of totals below a table."""
ALONE = TOTAL + r"[^A-Za-z\u00c0-\u024f]*\Z"
"""Such a cell with no other word in it: `Total Energies` may be a customer."""
NUMBER = re.compile(r"[-+]?\d[\d., '\u00a0\u2019]*%?")
MOMENT = re.compile(r"\d[\d.:/T -]*[.:/T-][\d.:/T -]*\d")
YEAR = re.compile(r"(?:19|20)\d\d")
PAIRS = 20
"""More pairs of a text and a value above the header, and they are rows of another table."""
SKIPPED = ("preamble", "comment", "header", "empty", "footer")
FOOTER_RECORDS = 1000
"""More records below a line that matches the footer, and it was a row that looks like one."""
KEPT_LINES = 100
EXAMPLES = 3
EXAMPLE_CHARACTERS = 300

Records = Sequence[tuple[int, int, Sequence[str | None], str]]
"""Line, number, fields and text of each record."""

log = logging.getLogger("table")


class Intake:
    """Takes one file's records in.

    Args:
        handler: publishes the rows.
        manifest: its `contract` is that of a table, or orders a survey.
    """

    def __init__(self, handler: BasePlugin, manifest: PluginMetadata) -> None:
        self._handler = handler
        self._topics = list(manifest.topic)
        self.is_guessed = False
        """Whether the file's encoding is."""
        self.skipped = Counter[str]()
        self._kept: list[str] = []
        self._faults = 0
        self._examples: list[tuple[int, str, str]] = []
        self._typed: Typed | None = None
        self._survey: Survey | None = None
        self._surveyed = 0
        self._sums: list[_Sums] = []
        self._totals = 0
        """Records of a survey that begin like totals."""
        if contract.is_survey(manifest.contract):
            self.contract = None
            self._orders = manifest.contract["survey"]
            self.dialect: Mapping[str, Any] = self._orders.get("dialect", {})
        else:
            self.contract = contract.read(manifest.contract)
            self.dialect = self.contract.dialect

    def known_names(self) -> set[str]:
        """The columns that every file of the table has; none in a survey."""
        columns = self.contract.columns if self.contract else ()
        return {c.name for c in columns if not c.from_path and not c.optional}

    def doubt_encoding(self, doubt: str) -> None:
        """Hold a file whose encoding is not clear; a survey says that it was guessed."""
        self.is_guessed = True
        if self.contract is not None:
            raise Held(
                f"held: the encoding of the file is not clear: {doubt}; to settle it: "
                f"casparian table set {self.contract.table} --encoding ENCODING --redo"
            )

    def check(self, names: Sequence[str]) -> None:
        """Raise Held if a part of the file, such as a sheet, has not the contract's columns."""
        if self.contract is not None:
            path = contract.path_values(self.contract.files, self._handler.file.rel_path)
            Typed(self.contract, names, path)

    def start(self, names: Sequence[str]) -> None:
        """Begin with the table's rows, which have these columns.

        Raises:
            Held: they are not the contract's.
        """
        if self.contract is None:
            from casparian_flow.survey import Survey

            self._survey = Survey(names, self._orders.get("hints", {}))
        else:
            path = contract.path_values(self.contract.files, self._handler.file.rel_path)
            self._typed = Typed(self.contract, names, path)
            self._width = len(names)
            own = [c.name for c in self.contract.columns if c.name in names]
            types = [self._typed.schema.field(name).type for name in own]
            self._has_types = any(kind != pa.string() for kind in types)
            self._handler.publish(self._topics[0], self._typed.schema.empty_table())
            self._handler.publish(self._topics[1], reject_table([]))

    def columns(
        self,
        arrays: Sequence[Any],
        lines: Sequence[int],
        records: Sequence[int],
        raw_of: Callable[[int], str],
        more: Iterable[Reject] = (),
    ) -> None:
        """Take in rows as columns of text, and the rejects of records among them."""
        if self._survey is not None:
            self._survey.add(arrays, lines)
            self._surveyed += len(lines)
            totals = pc.match_substring_regex(arrays[0], TOTAL)
            self._totals += pc.sum(totals, min_count=0).as_py()
            self._sums = self._sums or [_Sums() for _ in arrays]
            for sums, array in zip(self._sums, arrays, strict=True):
                sums.add(array)
        elif self._typed is not None:
            table, rejects = self._typed.columns(arrays, lines, records, raw_of)
            if len(table):
                self._handler.publish(self._topics[0], table)
            rejects = sorted([*rejects, *more], key=lambda reject: (reject.record, reject.line))
            if rejects:
                self._handler.publish(self._topics[1], reject_table(rejects))

    def rows(self, width: int, good: Records, faults: Iterable[tuple[int, int, str, str]]) -> None:
        """Take in rows, and records that are none: line, number, reason and text of each."""
        rejects = []
        for line, number, reason, raw in faults:
            self._faults += 1
            if self._typed is not None:
                rejects.append(self._typed.structure(line, number, reason, raw))
                continue
            self._totals += bool(re.match(TOTAL, raw))
            if len(self._examples) < EXAMPLES:
                example = printable(raw[:EXAMPLE_CHARACTERS].rstrip("\r\n"))
                self._examples.append((line, printable(reason), example))
        lines, numbers, fields, raws = zip(*good, strict=True) if good else ((), (), (), ())
        cells = zip(*fields, strict=True) if good else [()] * width
        arrays = [pa.array(column, pa.string()) for column in cells]
        self.columns(arrays, lines, numbers, raws.__getitem__, rejects)

    def first(self, word: str, lines: Sequence[str]) -> int:
        """The index of the first line that matches the header or the footer; -1 if none does."""
        pattern = self.dialect.get(word, "")
        if not pattern or not lines:
            return -1
        return int(pc.index(_matches(lines, pattern), True).as_py())

    def footer_of(
        self, last: Sequence[tuple[str, Sequence[str | None] | None]], delimiter: str
    ) -> str:
        """A regular expression for the totals that end a table; empty if there are others too.

        Args:
            last: the text of the last records, and the cells of those that look like rows.
        """
        rows = [cells for _, cells in last if cells is not None]
        first, count = "", 0
        for text, cells in reversed(last):
            if re.match(TOTAL, text) and (cells is None or self._is_total(cells, rows)):
                first, count = text, count + 1
            elif cells is not None:
                break
        return label(first, delimiter, 1) if count and count == self._totals else ""

    def _is_total(self, cells: Sequence[str | None], rows: Sequence[Sequence[str | None]]) -> bool:
        """Whether a record of the table's width is its totals, and not a row that begins alike."""
        if not re.match(ALONE, cells[0] or ""):
            return False
        rows = [row for row in rows if not re.match(ALONE, row[0] or "")]
        for place, cell in enumerate(cells):
            if not cell and 2 * sum(bool(row[place]) for row in rows) > len(rows):
                return True
        return any(sums.has(cell or "") for sums, cell in zip(self._sums, cells, strict=True))

    def check_above(self, records: Sequence[tuple[str, Sequence[str | None]]], line: int) -> None:
        """Check that records above the header are no rows, unless a person said where it is.

        Args:
            records: the text and the cells of each.
            line: that of the header.

        Raises:
            Held: some are rows. Without a word, they would not be there.
        """
        if self._typed is None or {"header_line", "skip_lines"} & self.dialect.keys():
            return
        if control := self.dialect.get("control", ""):
            own = _matches([text for text, _ in records], control).to_pylist()
            records = [each for each, is_own in zip(records, own, strict=True) if not is_own]
        all_cells = [[(cell or "").strip() for cell in cells] for _, cells in records]
        some = [cells for cells in all_cells if any(cells) and not _first(cells).endswith(":")]
        if self._has_rows(some) or self._other_rows(some):
            raise Held(
                f"held: above the header in line {line} are rows of another table; if they are "
                "not, say header_line instead of header in the contract's dialect"
            )

    def _has_rows(self, records: Sequence[list[str]]) -> bool:
        """Whether records of the table's width fit its types as rows do."""
        wide = [cells for cells in records if len(cells) == self._width > 1]
        if not wide or self._typed is None:
            return False
        arrays = [pa.array(column, pa.string()) for column in zip(*wide, strict=True)]
        like = 0
        for cells, (typed, fit) in zip(wide, self._typed.fits(arrays), strict=True):
            values = [cell for cell in cells if _kind(cell)]
            if not typed or not values or 2 * sum(map(bool, cells)) <= len(cells):
                continue
            if len(cells) == 2 and not _kind(cells[0]):
                like += fit  # a name and a value: two of them are no chance
            elif not all(YEAR.fullmatch(cell) for cell in values):
                return True
        if self._has_types:
            return like > 1
        return sum(all(cells) for cells in wide) > 2  # two rows may be names above the names

    def _other_rows(self, records: Sequence[list[str]]) -> bool:
        """Whether several records have cells of the same kinds, or names of columns are above."""
        known = self.known_names()
        alike = Counter[tuple[str, ...]]()
        headers: set[int] = set()
        for cells in records:
            while not cells[-1]:
                cells.pop()
            if len(cells) < 2 or not all(cells):
                continue
            if len(cells) in headers:
                return True
            if set(cells) <= known:
                headers.add(len(cells))
            elif any(kinds := tuple(map(_kind, cells))):
                alike[kinds] += 1
        return any(
            count > (1 if len(kinds) > 2 or kinds[0] else PAIRS) for kinds, count in alike.items()
        )

    def check_below(
        self, arrays: Sequence[Any], lines: Sequence[int], starts: Sequence[str]
    ) -> None:
        """Check that records of the table's width from the footer on are no rows.

        Args:
            starts: the first lines of the records; what matches the footer as well may be much.

        Raises:
            ValueError: one is a row. Without a word, it and those below it would not be there.
        """
        if self._typed is None or not starts:
            return
        pattern = self.dialect["footer"]
        ends = _matches(starts, pattern).to_pylist()
        control = self.dialect.get("control", "")
        own = _matches(starts, control).to_pylist() if control else [False] * len(starts)
        records = zip(*(array.to_pylist() for array in arrays), strict=True)
        fits = self._typed.fits(arrays)
        for at, (cells, (typed, fit)) in enumerate(zip(records, fits, strict=True)):
            filled = sum(bool(cell and cell.strip()) for cell in cells)
            is_whole = filled == len(cells)
            if own[at] or re.match(ALONE, cells[0] or ""):
                continue
            if ends[at]:
                is_row = bool(typed and fit and is_whole)
            elif self._has_types:
                is_row = bool(typed and (fit or 2 * filled > len(cells)))
            else:
                is_row = is_whole and len(cells) > 1
            if is_row:
                raise ValueError(
                    f"{'at' if ends[at] else 'below'} the footer {pattern!r}, in line {lines[at]} "
                    "or later, are rows of the table: write a footer that no line above them "
                    "matches; lines that are no rows can match it or control too"
                )

    def skip(self, reason: str, lines: Sequence[str]) -> None:
        """Count lines that are no part of the table, and look for control totals in them.

        Raises:
            ValueError: the footer has more of them than a footer has.
        """
        self.skipped[reason] += len(lines)
        control = self.dialect.get("control", "")
        if control and lines:
            found = pc.indices_nonzero(_matches(lines, control)).to_pylist()
            self._kept += [_plain(lines[index]) for index in found]
            del self._kept[:-KEPT_LINES]
        if self.skipped["footer"] > FOOTER_RECORDS:
            raise ValueError(
                f"a line matches the footer {self.dialect.get('footer', '')!r}, and more than "
                f"{FOOTER_RECORDS:,} records follow it: that is no footer; write a narrower one"
            )

    def finish(self, read: int, facts: Mapping[str, Any]) -> None:
        """Check the file as a whole, and log its balance.

        Args:
            read: how many records and other lines that are not empty the reader has read.
            facts: what a survey says besides: the encoding and the like.

        Raises:
            ValueError: control totals differ, or more is rejected than the contract allows.
        """
        if self._typed is not None:
            published, rejected = self._typed.published, self._typed.rejects
        else:
            published, rejected = self._surveyed, self._faults
        skipped = self.skipped.total()
        reasons = ", ".join(f"{why} {self.skipped[why]:,}" for why in SKIPPED if self.skipped[why])
        log.info(
            "read %s = %s published + %s rejected + %s skipped%s",
            *(f"{number:,}" for number in (read, published, rejected, skipped)),
            f" ({reasons})" if reasons else "",
        )
        if read != published + rejected + skipped:
            raise AssertionError("the balance above does not hold: nothing is published")
        if self._typed is not None:
            self._typed.finish(self._kept)
        elif self.contract is not None and "control" in self.dialect:
            raise ValueError(f"the file is empty: no line matches {self.dialect['control']!r}")
        elif self.contract is None:
            structure = {"count": self._faults, "examples": self._examples}
            of_rows = {"records": published, "read": read, "skipped": dict(self.skipped)}
            found = self._survey.facts() if self._survey else {"records": 0, "columns": []}
            columns = {"structure": structure, "columns": found}
            empty = {"names": [], "dialect": {}, "header_line": 0, "encoding": ""}
            text = json.dumps({**empty, **facts, **of_rows, **columns}, ensure_ascii=False)
            self._handler.publish(self._topics[0], pa.table({"facts": [text]}))


def label(line: str, delimiter: str, cells: int) -> str:
    """A regular expression for lines that begin with the same cells, whatever numbers are there."""
    text = line.lstrip("\ufeff").rstrip("\r\n")
    parts = text.split(delimiter)
    start = delimiter.join(parts[:cells])[:60] + (delimiter if len(parts) > cells else "")
    quoted = re.sub(r"[\\.^$|?*+()\[\]{}]", r"\\\g<0>", printable(start))
    return "^" + re.sub("[0-9]+", "[0-9]+", quoted) if re.search(r"[^\W\d]", start) else ""


class _Sums:
    """The sum of a column's numbers, by either decimal sign: a survey does not know it yet."""

    def __init__(self) -> None:
        self._of = {".": 0.0, ",": 0.0}

    def add(self, texts: Any) -> None:
        for sign in list(self._of):
            numbers = _floats(texts, sign)
            if len(numbers) * 2 < pc.sum(pc.not_equal(texts, ""), min_count=0).as_py():
                del self._of[sign]  # it is no column of numbers
            else:
                self._of[sign] += pc.sum(numbers, min_count=0).as_py()

    def has(self, text: str) -> bool:
        """Whether a cell of the column is the sum of the other ones."""
        for sign, total in self._of.items():
            numbers = _floats(pa.array([text], pa.string()), sign)
            if (
                len(numbers)
                and abs(total - 2 * (value := numbers[0].as_py())) < 0.005 + abs(value) * 1e-9
            ):
                return True
        return False


def _floats(texts: Any, sign: str) -> Any:
    """The numbers with this decimal sign among the texts."""
    other = "," if sign == "." else "."
    plain = pc.replace_substring_regex(texts, rf"[\s'\x{{a0}}\x{{2019}}{other}]", "")
    plain = pc.replace_substring(plain, ",", ".") if sign == "," else plain
    return plain.filter(pc.match_substring_regex(plain, r"\A-?[0-9]+(\.[0-9]+)?\z")).cast(
        pa.float64()
    )


def _first(cells: Sequence[str]) -> str:
    return next(filter(None, cells), "")


def _kind(cell: str) -> str:
    return (
        "moment"
        if MOMENT.fullmatch(cell) and not re.fullmatch(r"\d+\.\d+", cell)
        else ("number" if NUMBER.fullmatch(cell) else "")
    )


def _plain(line: str) -> str:
    """The line as a regular expression sees it: without its end and a mark of byte order."""
    return printable(line.lstrip("\ufeff").rstrip("\r\n"))


def _matches(lines: Sequence[str], pattern: str) -> Any:
    return pc.match_substring_regex(pa.array(map(_plain, lines), pa.string()), pattern)
