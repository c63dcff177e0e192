"""A type is a grammar and an exact conversion: texts become values, or do not fit.

A cell that its column's grammar does not match, or that does not convert exactly, has no value. No
other cast exists. Works on pyarrow arrays, whose regular expressions (RE2) take linear time; a copy
of this file is imported in the plugin's process.
"""

from __future__ import annotations

import base64
import binascii
import functools
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from casparian_flow.contract import FALSE, TRUE, Column, kind_of, precision_of
from casparian_flow.time_formats import MONTHS, PARTS, YEAR, format_pieces

TIME = "(?:[01][0-9]|2[0-3]):[0-5][0-9](?::[0-5][0-9](?:\\.[0-9]{1,6})?)?"
DATE = f"{YEAR}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])"
ZONE = PARTS["%z"][1]
SAFE_DIGITS = 15
"""A double gives back every number of so many digits; of a longer one it must be tried."""
DOUBLE_CHARACTERS = 1000
"""Longer numbers are no doubles: none has more than 767 digits."""
CAUSE_CHARACTERS = 1000
"""Of a longer text nobody is told why it is no number."""
SMALLEST_NORMAL = 2.2250738585072014e-308
FEW = 2
"""Values that repeat so often on average are converted once each."""
BETWEEN_TRIES = 16
"""Batches of a column without repetitions, until it is looked at again."""


class Fault(NamedTuple):
    """A rule that some cells of a batch break."""

    rows: Any
    """A boolean array without nulls."""
    rule: str
    why: str
    """How a message goes on after the column and the cell: `is no date`."""


class Cells:
    """The conversion of one column."""

    def __init__(self, column: Column, required: bool) -> None:
        self.column = column
        self.type = arrow_type(column.type)
        self._convert = _converter(column)
        self._required = required
        self._missing = [token for token in column.missing if token]
        self._empty_is_missing = "" in column.missing
        self._bounds = [
            (rule, compare, constants([bound], column.type)[0], f"{word} {bound}")
            for rule, bound, compare, word in (
                ("minimum", column.minimum, pc.less, "is below"),
                ("maximum", column.maximum, pc.greater, "is above"),
            )
            if bound is not None
        ]
        self._enum = constants(column.enum, column.type)
        self._tries = 0

    def of(self, texts: Any) -> tuple[Any, list[Fault]]:
        """Convert the texts of a batch.

        Returns:
            the values, which are null where a text is missing or does not fit; and the faults.
        """
        if self._tries:
            self._tries -= 1
            return self._of(texts)
        coded = texts.dictionary_encode()
        if len(coded.dictionary) * FEW > len(coded):
            self._tries = BETWEEN_TRIES
            return self._of(texts)
        values, faults = self._of(coded.dictionary)
        if coded.null_count and self._required:
            faults.append(Fault(pc.is_null(texts), "required", "is missing"))
        spread = [
            fault if len(fault.rows) == len(texts)
            else fault._replace(rows=pc.fill_null(fault.rows.take(coded.indices), False))
            for fault in faults
        ]  # fmt: skip
        return values.take(coded.indices), spread

    def cause(self, text: str) -> str:
        """Why a text is not of the type; empty where its look says so."""
        if kind_of(self.column.type) not in ("integer", "decimal", "double"):
            return ""
        text = text.strip() if self.column.trim else text
        return _cause(self.column, text) if len(text) <= CAUSE_CHARACTERS else ""

    def _of(self, texts: Any) -> tuple[Any, list[Fault]]:
        faults = []
        if self.column.trim:
            texts = pc.utf8_trim_whitespace(texts)
        present = self._without_missing(texts)
        if self._required and present.null_count:
            faults.append(Fault(pc.is_null(present), "required", "is missing"))
        values, bad = self._convert(present)
        if bad is not None:
            faults.append(Fault(bad, self.column.type, f"is no {self.column.type}"))
        faults += self._narrow(present, values)
        return values, faults

    def _without_missing(self, texts: Any) -> Any:
        """The texts, with null for those that mean that there is no value."""
        gone = None
        if self._empty_is_missing:
            gone = pc.equal(pc.binary_length(texts), 0)
        if self._missing:
            listed = pc.is_in(texts, value_set=pa.array(self._missing, pa.string()))
            gone = listed if gone is None else pc.or_(gone, listed)
        if gone is None or not has_any(gone):
            return texts
        return pc.if_else(gone, pa.scalar(None, pa.string()), texts)

    def _narrow(self, texts: Any, values: Any) -> list[Fault]:
        """What breaks the column's constraints."""
        column = self.column
        faults = [(compare(values, bound), rule, why) for rule, compare, bound, why in self._bounds]
        if column.enum:
            within = pc.is_in(values, value_set=self._enum)
            faults.append(
                (pc.and_(pc.invert(within), pc.is_valid(values)), "enum", "is not in enum")
            )
        if column.pattern:
            fits = pc.match_substring_regex(texts, rf"\A(?:{column.pattern})\z")
            faults.append((pc.invert(fits), "pattern", "does not match the pattern"))
        if column.min_length is not None or column.max_length is not None:
            lengths = pc.utf8_length(texts)
            if column.min_length is not None:
                short = pc.less(lengths, column.min_length)
                faults.append((short, "minLength", f"has less than {column.min_length} characters"))
            if column.max_length is not None:
                long = pc.greater(lengths, column.max_length)
                faults.append((long, "maxLength", f"has more than {column.max_length} characters"))
        return [
            Fault(pc.fill_null(rows, False), rule, why)
            for rows, rule, why in faults
            if has_any(rows)
        ]


def has_any(rows: Any) -> bool:
    """Whether an array of booleans has a true one."""
    return bool(pc.any(rows, min_count=0).as_py())


def has_all(rows: Any) -> bool:
    """Whether an array of booleans has no false one."""
    return bool(pc.all(rows, min_count=0).as_py())


def arrow_type(type_name: str) -> Any:
    """The Arrow type of a contract's type."""
    if kind_of(type_name) == "decimal":
        return pa.decimal128(*precision_of(type_name))
    return {
        "text": pa.string(),
        "integer": pa.int64(),
        "double": pa.float64(),
        "boolean": pa.bool_(),
        "date": pa.date32(),
        "time": pa.time64("us"),
        "timestamp": pa.timestamp("us"),
        "timestamp[tz]": pa.timestamp("us", "UTC"),
        "binary": pa.binary(),
    }[kind_of(type_name)]


def constants(values: Sequence[int | float | str], type_name: str) -> Any:
    """Values of the contract, such as a minimum, as an array of the type."""
    kind = kind_of(type_name)
    if kind == "decimal":
        return pa.array([Decimal(str(value)) for value in values], arrow_type(type_name))
    if kind in ("date", "time", "timestamp", "timestamp[tz]"):
        return _cast_time(pa.array(values, pa.string()), kind)
    return pa.array(values, arrow_type(type_name))


def grammar(column: Column) -> str:
    """The regular expression of a column's texts, without anchors; empty for text."""
    kind = kind_of(column.type)
    if kind == "integer":
        return "-?" + _whole(19, column.group)
    if kind == "decimal":
        precision, scale = precision_of(column.type)
        whole, point = _whole(precision - scale, column.group), re.escape(column.decimal)
        behind = f"{point}[0-9]{{1,{scale}}}" if scale else ""
        return f"-?(?:{whole}(?:{behind})?|{behind})" if scale else f"-?{whole}"
    if kind == "double":
        whole, point = _whole(None, column.group), re.escape(column.decimal)
        return f"-?(?:{whole}(?:{point}[0-9]+)?|{point}[0-9]+)(?:[eE][-+]?[0-9]{{1,4}})?"
    if kind in ("date", "time", "timestamp", "timestamp[tz]"):
        return time_grammar(column.format) if column.format else _ISO[kind]
    return {"binary(hex)": HEX, "binary(base64)": BASE64}.get(column.type, "")


_ISO = {
    "date": DATE,
    "time": TIME,
    "timestamp": f"{DATE}[T ]{TIME}",
    "timestamp[tz]": f"{DATE}[T ]{TIME}(?:{ZONE})",
}
HEX = "(?:[0-9A-Fa-f]{2})*"
BASE64 = "(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"


def time_grammar(form: str, named: bool = False) -> str:
    """The regular expression of a format; `named`: each part is a group of its name."""
    made = ""
    for word, text in format_pieces(form):
        if word:
            part, texts = PARTS[word]
            made += f"(?P<{part}>{texts})" if named else f"(?:{texts})"
        else:
            made += re.escape(text)
    return made


def _whole(digits: int | None, group: str) -> str:
    """The regular expression of a whole number: `0`, or no zero in front.

    Args:
        digits: how many at most; None: any number. Of decimals with too many digits pyarrow makes
            wrong numbers without an error, so these must not reach it.
        group: between groups of three digits; empty: none.
    """
    if digits == 0:
        return "0"
    if digits is None:
        plain, first = "0|[1-9][0-9]*", f"[1-9][0-9]{{0,2}}(?:{re.escape(group)}[0-9]{{3}})+"
        return f"(?:{plain}|{first})" if group else f"(?:{plain})"
    plain = f"0|[1-9][0-9]{{0,{digits - 1}}}"
    groups = (digits - 1) // 3
    if not group or not groups:
        return f"(?:{plain})"
    three = f"(?:{re.escape(group)}[0-9]{{3}})"
    longest = f"[1-9][0-9]{{0,{digits - 3 * groups - 1}}}{three}{{{groups}}}"
    shorter = f"|[1-9][0-9]{{0,2}}{three}{{1,{groups - 1}}}" if groups > 1 else ""
    return f"(?:{plain}|{longest}{shorter})"


def _cause(column: Column, text: str) -> str:
    """Why a number in the column's notation is not of its type; empty for other texts."""
    whole, point = _whole(None, column.group), re.escape(column.decimal)
    found = re.fullmatch(f"-?(0*)({whole}|)(?:{point}([0-9]+))?", text)
    if not found or not any(found.groups()):
        return ""
    zeros, whole, behind = (part or "" for part in found.groups())
    if len(zeros) > (not whole):
        return "it has zeros in front"
    kind = kind_of(column.type)
    if kind == "double":
        return "no double is exactly this number"
    if kind == "integer":
        return "" if behind else "it is beyond 64 bits"
    precision, scale = precision_of(column.type)
    digits = len(whole.replace(column.group, "") if column.group else whole)
    if digits > precision - scale:
        return f"it has {digits} digits before the decimals, and {precision - scale} go"
    decimals = len(behind.rstrip("0"))
    return f"it has {decimals} decimals, and {scale} go" if decimals > scale else ""


# Converters: texts -> values (null where a text is null or does not fit), and where it does not fit
# (None: it fits everywhere).

Converted = tuple[Any, Any | None]
NOTHING = pa.scalar(None, pa.string())


def _converter(column: Column) -> Callable[[Any], Converted]:
    kind = kind_of(column.type)
    if kind == "text":
        return lambda texts: (texts, None)
    if kind == "boolean":
        return functools.partial(_boolean, column.true or TRUE, column.false or FALSE)
    if kind == "binary":
        return functools.partial(_binary, grammar(column), column.type == "binary(hex)")
    if kind in ("integer", "decimal", "double"):
        return _Numbers(column)
    if column.format:
        return functools.partial(_times, kind, rf"\A{time_grammar(column.format, named=True)}\z")
    return functools.partial(_iso_times, kind, rf"\A(?:{_ISO[kind]})\z")


def _split(texts: Any, fits: Any) -> Converted:
    """The texts that fit, and where one does not."""
    if has_all(fits):  # of nulls too
        return texts, None
    bad = pc.fill_null(pc.invert(fits), False)
    return pc.if_else(bad, NOTHING, texts), bad


def _either(first: Any | None, second: Any | None) -> Any | None:
    if first is None or second is None:
        return second if first is None else first
    return pc.or_(first, second)


def _exactly(texts: Any, cast: Callable[[Any], Any]) -> Converted:
    """Cast all texts but those that the cast refuses."""
    try:
        return cast(texts), None
    except pa.ArrowInvalid:
        refused = _refused(texts.unique().drop_null(), cast)
    bad = pc.is_in(texts, value_set=refused)
    return cast(pc.if_else(bad, NOTHING, texts)), bad


def _refused(texts: Any, cast: Callable[[Any], Any]) -> Any:
    """The texts that a cast refuses, found by halves."""
    try:
        cast(texts)
    except pa.ArrowInvalid:
        if len(texts) == 1:
            return texts
        half = len(texts) // 2
        return pa.concat_arrays([_refused(texts[:half], cast), _refused(texts[half:], cast)])
    return texts[:0]


class _Numbers:
    """Integers, decimals and doubles."""

    def __init__(self, column: Column) -> None:
        self._type = arrow_type(column.type)
        self._grammar = rf"\A(?:{grammar(column)})\z"
        self._group, self._decimal = column.group, column.decimal
        self._is_double = column.type == "double"
        self._zeros = ""
        if kind_of(column.type) == "decimal":
            precision, scale = precision_of(column.type)
            whole, point = _whole(precision - scale, column.group), re.escape(column.decimal)
            behind = f"{point}[0-9]{{{scale}}}" if scale else ""
            self._zeros = rf"\A(-?{whole}{behind}){point if not scale else ''}0+\z"
            self._zeros_without_whole = rf"\A(-?{behind})0+\z" if scale else ""

    def __call__(self, texts: Any) -> Converted:
        fits = pc.match_substring_regex(texts, self._grammar)
        if self._zeros and not has_all(fits):
            texts = self._without_zeros(texts)
            fits = pc.match_substring_regex(texts, self._grammar)
        good, bad = _split(texts, fits)
        if self._group:
            good = pc.replace_substring(good, self._group, "")
        if self._decimal != ".":
            good = pc.replace_substring(good, self._decimal, ".")
        values, beyond = _exactly(good, lambda given: given.cast(self._type))
        if self._is_double:
            values, beyond = _without_inexact(good, values)
        return values, _either(bad, beyond)

    def _without_zeros(self, texts: Any) -> Any:
        """The texts without zeros at their end that are beyond the scale."""
        for zeros in filter(None, (self._zeros, self._zeros_without_whole)):
            texts = pc.replace_substring_regex(texts, zeros, r"\1")
        return texts


def _without_inexact(texts: Any, values: Any) -> Converted:
    """The doubles, without those that do not give their text back."""
    long = pc.match_substring_regex(texts, f"(?:[0-9]\\.?){{{SAFE_DIGITS + 1}}}")
    small = pc.less(pc.abs(values), SMALLEST_NORMAL)
    small = pc.and_(small, pc.match_substring_regex(texts, r"\A[-0.]*[1-9]"))
    odd = pc.fill_null(pc.or_(pc.or_(long, small), pc.invert(pc.is_finite(values))), False)
    if not has_any(odd):
        return values, None
    tried = texts.filter(odd)
    tried = tried.filter(pc.not_equal(values.filter(odd).cast(pa.string()), tried))
    doubtful = tried.unique().to_pylist()  # most programs write doubles as pyarrow does
    wrong = pa.array([text for text in doubtful if not is_double(text)], pa.string())
    bad = pc.is_in(texts, value_set=wrong)
    return pc.if_else(bad, pa.scalar(None, pa.float64()), values), bad


def is_double(text: str) -> bool:
    """Whether the double nearest to a number, written with as many digits, is that number.

    Halfway between two numbers of so many digits, it is also the one that programs write.
    """
    if len(text) > DOUBLE_CHARACTERS:
        return False
    number, double = Decimal(text), float(text)
    digits = "".join(map(str, number.as_tuple().digits)).strip("0")
    written = (f"{double:.{max(0, len(digits) - 1)}e}", repr(double))
    return abs(double) != float("inf") and number in map(Decimal, written)


def _boolean(true: tuple[str, ...], false: tuple[str, ...], texts: Any) -> Converted:
    yes = pc.is_in(texts, value_set=pa.array(true, pa.string()))
    no = pc.is_in(texts, value_set=pa.array(false, pa.string()))
    fits = pc.or_(yes, no)
    values = pc.if_else(fits, yes, pa.scalar(None, pa.bool_()))
    bad = pc.and_(pc.invert(fits), pc.is_valid(texts))
    return values, bad if has_any(bad) else None


def _binary(texts_grammar: str, is_hex: bool, texts: Any) -> Converted:
    good, bad = _split(texts, pc.match_substring_regex(texts, rf"\A(?:{texts_grammar})\z"))
    made = [None if text is None else _bytes(text, is_hex) for text in good.to_pylist()]
    values = pa.array(made, pa.binary())
    lost = pc.and_(pc.is_null(values), pc.is_valid(good))
    return values, _either(bad, lost if has_any(lost) else None)


def _bytes(text: str, is_hex: bool) -> bytes | None:
    if is_hex:
        return binascii.unhexlify(text)
    made = base64.b64decode(text, validate=True)
    return made if base64.b64encode(made).decode() == text else None


def _iso_times(kind: str, pattern: str, texts: Any) -> Converted:
    good, bad = _split(texts, pc.match_substring_regex(texts, pattern))
    return _checked_times(kind, good, bad)


def _times(kind: str, pattern: str, texts: Any) -> Converted:
    """Dates and times of a format: their parts, put together as ISO 8601 has them."""
    found = pc.extract_regex(texts, pattern)
    parts = dict(zip((each.name for each in found.type), found.flatten(), strict=True))
    iso = _iso(kind, parts)  # null where a part is null
    bad = pc.and_(pc.is_null(found), pc.is_valid(texts))
    return _checked_times(kind, iso, bad if has_any(bad) else None)


def _iso(kind: str, parts: dict[str, Any]) -> Any:
    def two(part: str) -> Any:
        return pc.utf8_lpad(parts[part], 2, "0") if part in parts else "00"

    pieces: list[Any] = []
    if "year" in parts:
        pieces += [_year(parts["year"]), "-", _month(parts["month"]), "-", two("day"), " "]
    if "hour" in parts:
        hour = _hour(parts["hour"], parts["half"]) if "half" in parts else two("hour")
        pieces += [hour, ":", two("minute"), ":", two("second")]
        pieces += [".", parts["fraction"]] if "fraction" in parts else []
        pieces += [parts["zone"]] if "zone" in parts else []
    else:
        pieces.pop()
    return pc.binary_join_element_wise(*pieces, "")


def _year(years: Any) -> Any:
    if not len(years) or not has_any(pc.equal(pc.binary_length(years), 2)):
        return years
    century = pc.if_else(pc.less(years, "69"), "20", "19")
    return pc.binary_join_element_wise(century, years, "")


def _month(months: Any) -> Any:
    if not has_any(pc.match_substring_regex(months, "[A-Za-z]")):
        return pc.utf8_lpad(months, 2, "0")
    starts = pc.utf8_lower(pc.utf8_slice_codeunits(months, 0, 3))
    numbers = pa.array([f"{number:02}" for number in MONTHS.values()])
    return numbers.take(pc.index_in(starts, value_set=pa.array(list(MONTHS))))


def _hour(hours: Any, halves: Any) -> Any:
    """The hour of 24, as two digits, of one of 12."""
    of_12 = pc.utf8_lpad(hours, 2, "0")
    half = pc.utf8_lower(halves)
    numbers = [f"{hour:02}{half}" for half in ("am", "pm") for hour in (12, *range(1, 12))]
    at = pc.index_in(pc.binary_join_element_wise(of_12, half, ""), value_set=pa.array(numbers))
    return pa.array([f"{hour:02}" for hour in range(24)]).take(at)


def _checked_times(kind: str, iso: Any, bad: Any | None) -> Converted:
    values, beyond = _exactly(iso, lambda given: _cast_time(given, kind))
    return values, _either(bad, beyond)


FIRST, LAST = pa.scalar("0001-01-01 00:00:00Z"), pa.scalar("9999-12-31 23:59:59.999999Z")


def _cast_time(iso: Any, kind: str) -> Any:
    """Cast texts of ISO 8601.

    Raises:
        pyarrow.ArrowInvalid: one is no time, such as 30 February, or not in the years 1 to 9999.
    """
    if kind == "time":
        dated = pc.binary_join_element_wise("1970-01-01 ", iso, "")
        return dated.cast(pa.timestamp("us")).cast(pa.time64("us"))
    values = iso.cast(arrow_type(kind))
    if kind == "timestamp[tz]":
        first, last = (bound.cast(values.type) for bound in (FIRST, LAST))
        beyond = pc.or_(pc.less(values, first), pc.greater(values, last))
        if has_any(beyond):
            raise pa.ArrowInvalid("not in the years 1 to 9999")
    return values
