"""The types that a column of texts may have, each in its notations, and what speaks against them.

Each candidate is tried on every value and eliminated by those that do not fit: `survey` hands them
over. Used in the plugin's process.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from casparian_flow.cells import SAFE_DIGITS, Cells, has_all
from casparian_flow.contract import FALSE, TRUE, Column
from casparian_flow.time_formats import format_pieces

MISFITS = 1000
"""A candidate with more misfits is hopeless, however many values fit."""
UNIQUE = 50_000
"""Whole numbers that do not go up are compared with each other up to so many."""
VALUE_CHARACTERS = 200

NOTATIONS = (
    (".", ""), (",", ""), (".", ","), (",", "."), (",", " "), (".", " "), (".", "'"),
    (",", "\u00a0"), (".", "\u00a0"), (",", "\u202f"), (".", "\u202f"), (".", "\u2019"), (",", "'"),
)  # fmt: skip
"""Decimal signs and separators of groups, in the order in which they are preferred."""
DATES = (
    "", "%d.%m.%Y", "%-d.%-m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%-d/%-m/%Y", "%-m/%-d/%Y", "%Y/%m/%d",
    "%Y.%m.%d", "%Y/%-m/%-d", "%d-%m-%Y", "%m-%d-%Y", "%-d-%-m-%Y", "%-m-%-d-%Y", "%Y-%-m-%-d",
)  # fmt: skip
"""Formats of dates; the empty one is that of ISO 8601."""
SHORT_DATES = (
    "%d.%m.%y", "%-d.%-m.%y", "%d/%m/%y", "%m/%d/%y", "%-d/%-m/%y", "%-m/%-d/%y", "%d-%m-%y",
    "%m-%d-%y", "%y-%m-%d", "%y/%m/%d",
)  # fmt: skip
NAMED_DATES = (
    "%-d %b %Y", "%-d-%b-%Y", "%-d-%b-%y", "%-d %b %y", "%b %-d, %Y", "%-d %B %Y", "%B %-d, %Y",
    "%-d/%b/%Y", "%b %-d %Y", "%-d-%B-%Y", "%-d. %B %Y", "%-d. %b %Y",
)  # fmt: skip
"""Formats with two digits of the year or a month's name: they count only where a person says so."""
TIMES_OF_DAY = (
    "%H:%M:%S", "%H:%M", "%H:%M:%S.%f", "%-H:%M", "%-H:%M:%S", "%-I:%M %p", "%-I:%M:%S %p",
    "%-I:%M:%S%p", "%-I:%M%p",
)  # fmt: skip


class Batch:
    """Texts of a column: each once with its number, where many repeat, else as they are."""

    def __init__(self, texts: Any, weights: Any | None, origin: Origin) -> None:
        self.texts = texts
        self._weights = weights
        self._origin = origin

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def count(self) -> int:
        """How many values there are."""
        if self._weights is None:
            return len(self)
        return int(pc.sum(self._weights, min_count=0).as_py() or 0)

    def only(self, rows: Any) -> Batch:
        """Those where `rows` is true."""
        weights = None if self._weights is None else self._weights.filter(rows)
        return Batch(self.texts.filter(rows), weights, self._origin)

    def slice(self, start: int, length: int | None = None) -> Batch:
        weights = self._weights if self._weights is None else self._weights.slice(start, length)
        return Batch(self.texts.slice(start, length), weights, self._origin)

    def parted(self, rows: Any) -> tuple[Batch, Batch]:
        """Those where `rows` is true, and the others."""
        if has_all(rows):
            return self, self.only(pc.invert(rows))
        return self.only(rows), self.only(pc.invert(rows))

    def tally(self) -> dict[str, int]:
        """Each text, and how often it is there."""
        if self._weights is None:
            counted = self.texts.value_counts()
            texts, counts = counted.field("values"), counted.field("counts")
        else:
            texts, counts = self.texts, self._weights
        return dict(zip(texts.to_pylist(), counts.to_pylist(), strict=True))

    def trimmed(self) -> Batch:
        """The same without white space around the texts."""
        return Batch(pc.utf8_trim_whitespace(self.texts), self._weights, self._origin)

    def first(self) -> list[Any]:
        """The physical line of the first one, and its text as it is in the file."""
        return self._origin.find(self.texts[0].as_py())


class Origin:
    """Where the texts of a batch come from, to find a text's line."""

    def __init__(self, texts: Any, lines: Sequence[int]) -> None:
        self._texts = texts
        self._lines = lines

    def find(self, text: str) -> list[Any]:
        """The line and the whole of the first such text, which may have white space around it."""
        at = pc.index(self._texts, text).as_py()
        if at < 0:
            at = pc.index(pc.utf8_trim_whitespace(self._texts), text).as_py()
        return [int(self._lines[at]), self._texts[at].as_py()[:VALUE_CHARACTERS]]


class Candidate:
    """A type in one notation, and what speaks against it."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.misfits = 0
        self.first: list[Any] | None = None
        self.whole = 0
        """Of numbers: the most digits before the decimal sign."""
        self.scale = 0
        """Of numbers: the most digits behind it."""

    @property
    def is_dead(self) -> bool:
        return self.misfits > MISFITS

    def misfit(self, batch: Batch) -> None:
        """Count what does not fit."""
        if len(batch):
            self.misfits += batch.count
            self.first = self.first or batch.first()

    def measured(self, whole: int, scale: int) -> None:
        """Note numbers of digits."""
        self.whole, self.scale = max(self.whole, whole), max(self.scale, scale)

    def facts(self) -> dict[str, Any]:
        made = {"misfits": self.misfits, "first": self.first}
        return made | ({"whole": self.whole, "scale": self.scale} if self.whole else {})


class Family(ABC):
    """Candidates that a text of one shape may fit; a text of another shape fits none of them."""

    shape = ""

    def __init__(self, candidates: Iterable[Candidate]) -> None:
        self.candidates = list(candidates)
        self._hopeless: list[Candidate] = []
        self.outside = Candidate("")
        """Counts the texts of another shape."""

    @property
    def alive(self) -> list[Candidate]:
        """The candidates that may still be right. The hopeless ones are put aside."""
        hopeless = [each for each in self.candidates if self.misfits(each) > MISFITS]
        if hopeless:
            self._hopeless += hopeless
            self.candidates = [each for each in self.candidates if each not in hopeless]
        return self.candidates

    @property
    def is_open(self) -> bool:
        return not self.outside.is_dead and bool(self.candidates)

    def miss(self, batch: Batch) -> None:
        """Count texts of another shape."""
        self.outside.misfit(batch)

    def misfits(self, candidate: Candidate) -> int:
        return candidate.misfits + self.outside.misfits

    def shaped(self, batch: Batch) -> tuple[Batch, Batch]:
        """The texts of this shape, and the others."""
        return batch.parted(pc.match_substring_regex(batch.texts, self.shape))

    @abstractmethod
    def add(self, batch: Batch, known: Candidate | None = None) -> None:
        """Try the candidates on texts of this shape; `known` fits all of them."""

    @abstractmethod
    def fits(self, candidate: Candidate, texts: Any) -> Any:
        """Which texts fit a candidate."""

    def facts(self, values: int) -> dict[str, Any]:
        """Facts of the candidates that fit something."""
        made: dict[str, Any] = {}
        for each in [*self.candidates, *self._hopeless]:
            if self.misfits(each) < values:
                facts = each.facts()
                first = [found for found in (each.first, self.outside.first) if found]
                made[each.key] = facts | {
                    "misfits": self.misfits(each), "first": min(first, default=None)
                }  # fmt: skip
        return made


CODE = r"\A[A-Za-z0-9-]*(?:[A-Za-z]-?[0-9]|[0-9]-?[A-Za-z])[A-Za-z0-9-]*\z"
"""Letters and digits, as identifiers have them."""


class Numbers(Family):
    """Integers, and numbers in each notation."""

    shape = r"\A-?[.,]?[0-9](?:[0-9.,' \x{00a0}\x{202f}\x{2019}]*[0-9])?(?:[eE][-+]?[0-9]{1,4})?\z"

    def __init__(self, notations: Sequence[tuple[str, str]]) -> None:
        self.integer = Candidate("integer")
        self.double = Candidate("double")
        self.notations = {
            notation: Candidate("number " + "".join(notation)) for notation in notations
        }
        super().__init__([self.integer, *self.notations.values(), self.double])
        self.low: int | None = None
        self.high: int | None = None
        self._rises = True
        self._seen: set[int] | None = set()
        self.zero: list[Any] | None = None
        self.codes = 0
        self.days = Candidate("date %Y%m%d")
        self.is_beyond = False
        """Whether a whole number is beyond 64 bits."""

    def fits(self, candidate: Candidate, texts: Any) -> Any:
        if candidate is self.integer:
            return pc.match_substring_regex(texts, r"\A-?(?:0|[1-9][0-9]*)\z")
        if candidate is self.double:
            return _cells_fit(_DOUBLE, texts)
        decimal, group = candidate.key[7], candidate.key[8:]
        point, whole = _literal(decimal), "(?:0|[1-9][0-9]*)"
        if group:
            whole = f"(?:0|[1-9][0-9]*|[1-9][0-9]{{0,2}}(?:{_literal(group)}[0-9]{{3}})+)"
        return pc.match_substring_regex(
            texts, rf"\A-?(?:{whole}(?:{point}[0-9]+)?|{point}[0-9]+)\z"
        )

    def add(self, batch: Batch, known: Candidate | None = None) -> None:
        if known is self.integer:
            self._add_integers(batch)
            return
        if self.integer in self.alive:
            integers, batch = batch.parted(self.fits(self.integer, batch.texts))
            self._add_integers(integers)
            self.integer.misfit(batch)
            self._note_zeros(batch)
        if len(batch):
            self._add_others(batch, known)

    def _add_others(self, batch: Batch, known: Candidate | None) -> None:
        """Try the notations, and doubles on what is no plain decimal."""
        alive = set(self.candidates)
        for sign in dict.fromkeys(decimal for decimal, _ in self.notations):
            plain = self.notations.get((sign, ""))
            rest, digits = batch, (0, 0)
            if plain in alive:
                fitting = batch
                if plain is known:
                    rest = batch.slice(0, 0)
                else:
                    fitting, rest = batch.parted(self.fits(plain, batch.texts))
                digits = _digits(fitting.texts, sign, "")
            for (decimal, group), candidate in self.notations.items():
                if decimal == sign and candidate in alive:
                    candidate.measured(*digits)  # what fits without groups fits with them
                    if len(rest):
                        self._try(candidate, group, rest, candidate is known)
            if sign == "." and self.double in alive:
                # Of what is a plain decimal, only long numbers may be no doubles.
                doubtful = batch if sum(digits) > SAFE_DIGITS else rest
                fits = self.fits(self.double, doubtful.texts)
                self.double.misfit(doubtful.parted(fits)[1])

    def _try(self, candidate: Candidate, group: str, batch: Batch, is_known: bool) -> None:
        """Try a notation on what does not fit without groups."""
        fitting, others = batch, batch
        if is_known:
            others = batch.slice(0, 0)
        elif group:
            fitting, others = batch.parted(self.fits(candidate, batch.texts))
        else:
            fitting = batch.slice(0, 0)
        candidate.misfit(others)
        candidate.measured(*_digits(fitting.texts, candidate.key[7], group))

    def miss(self, batch: Batch) -> None:
        super().miss(batch)
        self.codes += batch.only(pc.match_substring_regex(batch.texts, CODE)).count

    def _add_integers(self, batch: Batch) -> None:
        if not len(batch):
            return
        digits = pc.binary_length(batch.texts)
        longest = pc.max(digits).as_py()
        if longest > 18:
            digits = pc.binary_length(pc.utf8_ltrim(batch.texts, "-"))
            longest = pc.max(digits).as_py()
        self.integer.whole = max(self.integer.whole, longest)
        if longest > SAFE_DIGITS and self.double in self.candidates:
            self.double.misfit(batch.parted(self.fits(self.double, batch.texts))[1])
        if longest > 18:
            self._check_long(batch)
            return
        values = batch.texts.cast(pa.int64())
        ends = pc.min_max(values)
        low, high = ends["min"].as_py(), ends["max"].as_py()
        self._check_unique(values, batch)
        self.low = low if self.low is None else min(self.low, low)
        self.high = high if self.high is None else max(self.high, high)
        if not self.days.is_dead:
            is_day = longest == 8 and low >= 10**7
            fits = _cells_fit(_DAYS, batch.texts) if is_day else pc.is_null(batch.texts)
            self.days.misfit(batch.parted(fits)[1])

    @property
    def is_unique(self) -> bool:
        """Whether no whole number is there twice, as far as is known."""
        return self._rises or self._seen is not None

    def _check_long(self, batch: Batch) -> None:
        self._rises, self._seen = False, None
        self.days.misfit(batch)
        try:
            batch.texts.cast(pa.int64())
        except pa.ArrowInvalid:
            self.is_beyond = True

    def _check_unique(self, values: Any, batch: Batch) -> None:
        """Compare whole numbers with those before, as long as they go up or are not too many."""
        above = self.high is None or values[0].as_py() > self.high
        self._rises = self._rises and above and has_all(pc.greater(values[1:], values[:-1]))
        if self._seen is not None:
            more = set(values.to_pylist())
            if batch.count != len(more) or more & self._seen:
                self._rises, self._seen = False, None
            else:
                self._seen = self._seen | more if len(self._seen) < UNIQUE else None

    def more(self) -> dict[str, Any]:
        """Facts of the whole numbers."""
        return {
            "low": self.low, "high": self.high, "unique": self.is_unique, "zero": self.zero,
            "codes": self.codes,
            "days": bool(self.integer.whole) and not self.days.misfits, "beyond": self.is_beyond,
        }  # fmt: skip

    def _note_zeros(self, batch: Batch) -> None:
        """Note what would lose its zeros as a number."""
        zeros = batch.only(pc.match_substring_regex(batch.texts, r"\A-?0[0-9]+\z"))
        if len(zeros):
            self.codes += zeros.count
            self.zero = self.zero or zeros.first()


class Times(Family):
    """Dates, times or timestamps, each in its formats.

    A format can fit only texts whose signs between the letters and digits are its own: the others
    are not tried, and a format whose signs are nowhere is not even a candidate.
    """

    def __init__(self, kind: str, formats: Sequence[str], shape: str) -> None:
        self._iso = Candidate(kind)
        super().__init__([] if "" not in formats else [self._iso])
        self.shape = shape
        self._kind = kind
        self._formats: dict[str, list[str]] = {}
        for form in filter(None, formats):
            self._formats.setdefault(signs(form), []).append(form)
        self._cells = {kind: _plain_cells(kind)}
        self._signs: dict[Candidate, str] = {}
        self._all = Candidate("")
        """Counts all texts of the shape."""

    @property
    def is_open(self) -> bool:
        return not self.outside.is_dead and (not self._all.misfits or bool(self.candidates))

    def fits(self, candidate: Candidate, texts: Any) -> Any:
        return _cells_fit(self._cells[candidate.key], texts)

    def add(self, batch: Batch, known: Candidate | None = None) -> None:
        if known is self._iso:
            for candidate in self.alive:
                if candidate is not known and not candidate.key.startswith(f"{self._kind} %Y-"):
                    candidate.misfit(batch)
        elif known:
            self._try(batch, self._signs[known], known)
        else:
            of_signs = pc.replace_substring_regex(batch.texts, "[0-9A-Za-z]+", "")
            for text in of_signs.unique().to_pylist():
                part = batch.only(pc.equal(of_signs, text))
                self._make(text)
                if len(self.candidates) > 10 and len(part) > 2 * MISFITS:
                    self._try(part.slice(0, MISFITS + 1), text)  # most end in it
                    part = part.slice(MISFITS + 1)
                self._try(part, text)
                self._all.misfit(part)

    def _make(self, text: str) -> None:
        """Make the candidates that have these signs."""
        for form in self._formats.pop(text, ()):
            candidate = Candidate(f"{self._kind} {form}")
            candidate.misfits, candidate.first = self._all.misfits, self._all.first
            self._cells[candidate.key] = _plain_cells(self._kind, form)
            self._signs[candidate] = text
            self.candidates.append(candidate)

    def _try(self, batch: Batch, text: str, known: Candidate | None = None) -> None:
        fitted = {known.key} if known else set()
        for candidate in self.alive:
            strict = candidate.key.replace("%-", "%")
            if candidate is known or (strict != candidate.key and strict in fitted):
                continue
            others = batch
            if self._signs.get(candidate, text) == text:
                others = batch.parted(self.fits(candidate, batch.texts))[1]
            candidate.misfit(others)
            if not len(others):
                fitted.add(candidate.key)


def signs(form: str) -> str:
    """What a text of a format has besides letters and digits."""
    return "".join(re.sub("[0-9A-Za-z]", "", text) for _, text in format_pieces(form))


class Booleans(Family):
    """true and false."""

    shape = rf"\A(?:{'|'.join(TRUE + FALSE)})\z"

    def __init__(self) -> None:
        super().__init__([Candidate("boolean")])

    def fits(self, candidate: Candidate, texts: Any) -> Any:
        return pc.match_substring_regex(texts, self.shape)

    def add(self, batch: Batch, known: Candidate | None = None) -> None:
        """All texts of this shape fit."""


def _plain_cells(kind: str, form: str = "") -> Cells:
    return Cells(Column(name="", type=kind, format=form, missing=()), required=False)


_DOUBLE, _DAYS = _plain_cells("double"), _plain_cells("date", "%Y%m%d")


def _cells_fit(cells: Cells, texts: Any) -> Any:
    _, faults = cells.of(texts)
    return pc.invert(faults[0].rows) if faults else pc.is_valid(texts)


def _literal(character: str) -> str:
    return f"\\{character}" if character in ".'" else character


def _digits(texts: Any, decimal: str, group: str) -> tuple[int, int]:
    """The most digits of numbers before and behind the decimal sign."""
    if not len(texts):
        return 0, 0
    lengths, places = pc.binary_length(texts), pc.find_substring(texts, decimal)
    has_none = pc.less(places, 0)
    whole = pc.if_else(has_none, lengths, places)
    behind = pc.max(pc.if_else(has_none, 0, pc.subtract(pc.subtract(lengths, places), 1)))
    if group:
        groups = pc.multiply(pc.count_substring(texts, group), len(group.encode()))
        whole = pc.subtract(whole, groups)
    whole = pc.subtract(whole, pc.cast(pc.starts_with(texts, "-"), pa.int32()))
    return max(1, pc.max(whole).as_py()), behind.as_py()


_DAY = "[0-9]{1,4}[-/.][0-9]{1,2}[-/.][0-9]{1,4}"
_NAMED_DAY = r"(?:[0-9]{1,2}[-/. ]{0,2})?[A-Za-z]{3,9}[-/. ][-/0-9, ]*[0-9]{2}"


def other_families() -> list[Family]:
    days, clock = [*DATES, *SHORT_DATES], "[T ,]{1,2}[0-9]{1,2}:[0-9]{2}"
    timed = [f"{day or '%Y-%m-%d'} {time}" for day in days for time in TIMES_OF_DAY]
    return [
        Times("date", days, rf"\A{_DAY}\z"),
        Times("date", NAMED_DATES, rf"\A{_NAMED_DAY}\z"),
        Times("timestamp", ["", *timed], rf"\A{_DAY}{clock}[0-9:.]*(?: ?[AaPp][Mm])?\z"),
        Times("timestamp[tz]", [""], rf"\A{_DAY}{clock}[0-9:.]*(?:Z|[-+][0-9:]+)\z"),
        Times("time", [""], r"\A[0-9]{2}:[0-9]{2}[0-9:.]*\z"),
        Booleans(),
    ]
