"""Make a proposal of the facts that surveys found: a type for each column, and why.

A type is proposed only if no value of any version speaks against it, or a very few of very many,
which are then shown as the rejects that they would be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MISFITS = 1000
TOLERATED = 0.001
"""The share of values that may not fit a type that is still proposed, if `ENOUGH` others fit."""
ENOUGH = 20
CODES = 0.0001
"""The share of such misfits as 007 and 12A, above which a column of numbers is one of codes."""
WORDS = (
    ("yes", "no"), ("y", "n"), ("ja", "nein"), ("j", "n"), ("oui", "non"), ("o", "n"), ("si", "no"),
    ("s\u00ed", "no"), ("sim", "n\u00e3o"), ("s", "n"), ("t", "f"), ("tak", "nie"), ("on", "off"),
    ("true", "false"), ("wahr", "falsch"), ("vrai", "faux"),
)  # fmt: skip
"""Words for true and false. They count only where a person says so."""


@dataclass(frozen=True, kw_only=True)
class Proposed:
    """A column as it is proposed."""

    words: Mapping[str, Any]
    """Its words in a contract, with the name."""
    why: str
    """What speaks for the type, and what a person may decide otherwise."""
    values: int
    missing: Mapping[str, int]
    """Text that means that there is no value -> how often it is there."""
    misfits: int = 0
    """How many values the type does not fit: the rows that would be rejected."""
    first: tuple[int, int, str] | None = None
    """The first of them: version (its place in the facts), physical line and text."""
    is_question: bool = False
    """Whether the column is text only because a person has to decide."""

    @property
    def name(self) -> str:
        return str(self.words["name"])

    @property
    def type(self) -> str:
        return str(self.words["type"])


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What is proposed for a table, from the facts of all its versions."""

    columns: Sequence[Proposed]
    records: int
    differs: Mapping[int, tuple[Sequence[str], Sequence[str]]] = field(default_factory=dict)
    """Version whose columns are not the proposal's -> the columns that it has besides, and those
    that it lacks."""


@dataclass(kw_only=True)
class _Candidate:
    key: str
    misfits: int
    whole: int = 0
    scale: int = 0
    first: tuple[int, int, str] | None = None

    @property
    def notation(self) -> tuple[str, str]:
        """The decimal sign and the separator of groups of a number."""
        return self.key[7], self.key[8:]


class _Column:
    """What the versions say of a column together."""

    def __init__(self, name: str, found: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
        self.name = name
        self.values = sum(facts["values"] for _, facts in found)
        self.missing: Counter[str] = Counter()
        for _, facts in found:
            self.missing.update(facts.get("missing", {}))
        self.said = next((facts["said"] for _, facts in found if "said" in facts), None)
        self.misfits = sum(facts.get("misfits", 0) for _, facts in found)
        self.first = _first(found, "first")
        self.blanks = sum(facts.get("blanks", 0) for _, facts in found)
        self.is_open = all(facts.get("open", True) for _, facts in found)
        few = [facts.get("few") for _, facts in found]
        self.few = None if None in few else sorted({text for texts in few for text in texts or ()})
        self.low: int | None = min(
            (f["low"] for _, f in found if f.get("low") is not None), default=None
        )
        self.high: int | None = max(
            (f["high"] for _, f in found if f.get("high") is not None), default=None
        )
        self.is_unique = len(found) == 1 and bool(found[0][1].get("unique"))
        self.zero = _first(found, "zero")
        self.sample = next((str(f["sample"]) for _, f in found if f.get("sample")), "")
        self.codes = sum(facts.get("codes", 0) for _, facts in found)
        dated = [facts["days"] for _, facts in found if facts.get("low") is not None]
        self.are_days = bool(dated) and all(dated)
        self.is_beyond = any(facts.get("beyond") for _, facts in found)
        self.candidates = {} if self.said else self._candidates(found)

    def _candidates(self, found: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, _Candidate]:
        made: dict[str, _Candidate] = {}
        for key in dict.fromkeys(key for _, facts in found for key in facts["candidates"]):
            candidate = made[key] = _Candidate(key=key, misfits=0)
            for version, facts in found:
                each = facts["candidates"].get(key, {"misfits": facts["values"]})
                candidate.misfits += each["misfits"]
                candidate.whole = max(candidate.whole, each.get("whole", 0))
                candidate.scale = max(candidate.scale, each.get("scale", 0))
                if each.get("first") and not candidate.first:
                    candidate.first = (version, *each["first"])
        return made

    @property
    def whole(self) -> int:
        """The most digits of a whole number."""
        integer = self.candidates.get("integer")
        return integer.whole if integer else 0

    def fitting(self, kind: str) -> list[_Candidate]:
        """The candidates of a kind that may be proposed, those with the fewest misfits first."""
        most = min(MISFITS, self.values * TOLERATED)
        found = [
            each
            for each in self.candidates.values()
            if each.key.partition(" ")[0] == kind
            and self.is_open
            and (each.misfits == 0 or each.misfits <= most)
            and (each.misfits == 0 or self.values - each.misfits >= ENOUGH)
        ]
        fewest = min((each.misfits for each in found), default=0)
        return [each for each in found if each.misfits == fewest]


def _first(found: Sequence[tuple[int, Mapping[str, Any]]], key: str) -> tuple[int, int, str] | None:
    for version, facts in found:
        if facts.get(key):
            line, text = facts[key]
            return version, line, text
    return None


def merge(facts: Sequence[Mapping[str, Any]]) -> Proposal:
    """Make a proposal of the facts of all versions.

    Args:
        facts: what `survey.Survey.facts` gave for each version; a `dialect` with a `delimiter`
            helps to read commas in numbers.
    """
    headers = [tuple(column["name"] for column in each["columns"]) for each in facts]
    if not headers:
        return Proposal(columns=(), records=0)
    sets = Counter(frozenset(header) for header in headers)
    usual = max(headers, key=lambda header: sets[frozenset(header)])
    differs = {
        version: (
            [name for name in header if name not in usual],
            [name for name in usual if name not in header],
        )
        for version, header in enumerate(headers)
        if set(header) != set(usual)
    }
    by_name: dict[str, list[tuple[int, Mapping[str, Any]]]] = {name: [] for name in usual}
    for version, each in enumerate(facts):
        for column in each["columns"]:
            if column["name"] in by_name:
                by_name[column["name"]].append((version, column))
    columns = [_Column(name, found) for name, found in by_name.items()]
    sign = _decimal_sign(columns, facts)
    return Proposal(
        columns=[_proposed(column, sign) for column in columns],
        records=sum(each["records"] for each in facts),
        differs=differs,
    )


def _decimal_sign(columns: Sequence[_Column], facts: Sequence[Mapping[str, Any]]) -> str:
    """The decimal sign of the numbers that can be read in one way only; empty if there is none.

    Where commas separate fields, it is the point, unless all such numbers have commas.
    """
    signs = {
        readings[0].notation[0]
        for column in columns
        if len(readings := _readings(column)) == 1 and readings[0].scale
    }
    delimiters = {each.get("dialect", {}).get("delimiter") for each in facts}
    if delimiters == {","} and signs != {","}:
        return "."
    return signs.pop() if len(signs) == 1 else ""


def _readings(column: _Column) -> list[_Candidate]:
    """The notations in which a column's numbers can be read, one for each meaning."""
    if column.said or any(not each.misfits for each in column.fitting("integer")):
        return []
    meanings: dict[tuple[str, int], _Candidate] = {}
    for each in column.fitting("number"):
        sign = each.notation[0] if each.scale else ""
        meanings.setdefault((sign, each.scale), each)
    return list(meanings.values())


def _proposed(column: _Column, sign: str) -> Proposed:
    if column.said is not None:
        return _made(column, column.said, "as you said", column.misfits, column.first)
    if not column.values and column.is_open:
        return _text(column, "no values")
    for decide in (_boolean, _number, _time):
        if (found := decide(column, sign)) is not None:
            return found
    return _text(column, _near_miss(column))


def _boolean(column: _Column, sign: str) -> Proposed | None:
    found = column.fitting("boolean")
    return _typed(column, found[0], {"type": "boolean"}, "true and false") if found else None


def _number(column: _Column, sign: str) -> Proposed | None:
    integers, readings = column.fitting("integer"), _readings(column)
    doubles = column.fitting("double")
    if not (integers or readings or doubles):
        return None
    if column.codes > column.values * CODES:
        return _text(column, _about_codes(column))
    exact = [each for each in (*readings, *doubles) if not each.misfits]
    if integers and (not integers[0].misfits or not exact):
        return _integer(column, integers[0], "")
    if readings and readings[0].misfits and exact:
        readings = []
    odd = readings and sign and readings[0].scale and not _fits_sign(readings[0], sign)
    if len(readings) == 1 and odd:
        what = f"{column.sample} would have a decimal {_NAMES[readings[0].notation[0]]}, and other "
        return _text(column, f"{what}numbers have a {_NAMES[sign]}: --decimal", is_question=True)
    if len(readings) > 1:
        chosen = [each for each in readings if sign and _fits_sign(each, sign)]
        if len(chosen) != 1:
            return _which_number(column, readings)
        readings = chosen
    if readings:
        return _decimal(column, readings[0], doubles)
    return _typed(column, doubles[0], {"type": "double"}, "numbers with exponents")


_NAMES = {".": "point", ",": "comma"}


def _fits_sign(candidate: _Candidate, sign: str) -> bool:
    """Whether a notation has this decimal sign, if it has one, and no groups with it."""
    decimal, group = candidate.notation
    return decimal == sign if candidate.scale else group != sign


def _integer(column: _Column, candidate: _Candidate, group: str) -> Proposed:
    words: dict[str, Any] = {"type": "integer"}
    whole = max(candidate.whole, column.whole)
    if whole > 38:
        return _text(column, f"whole numbers of up to {whole} digits, and 38 go")
    if column.is_beyond or whole > 18 + (not group):
        words["type"] = "decimal(38,0)"
    if group:
        words["groupChar"] = group
    if group == "." and words["type"] != "integer":
        words["decimalChar"] = ","
    why = f"whole numbers of up to {whole} digits"
    if column.low is not None and column.high is not None and not group and not column.is_beyond:
        why = f"{_shown(column.low)} .. {_shown(column.high)}" + (
            "; unique" if column.is_unique else ""
        )
    why += f"; groups of three, separated by {group!r}" if group else ""
    why += " (beyond 64 bits)" if words["type"] != "integer" else ""
    if (column.low, column.high) == (0, 1) and not group:
        why = f"0 and 1; may be a boolean: --type {column.name}=boolean:1/0"
    elif column.are_days and not column.is_beyond:
        why += f"; may be dates: --format {column.name}=%Y%m%d"
    return _typed(column, candidate, words, why)


def _shown(number: int) -> str:
    return str(number) if abs(number) < 10_000 else f"{number:,}"  # 2026 may be a year


def _decimal(column: _Column, candidate: _Candidate, doubles: list[_Candidate]) -> Proposed:
    decimal, group = candidate.notation
    if not candidate.scale:
        return _integer(column, candidate, group)
    whole, scale = max(candidate.whole, column.whole), candidate.scale
    if whole + scale > 38:
        if doubles:
            return _typed(
                column, doubles[0], {"type": "double"}, f"numbers of {whole + scale} digits"
            )
        return _text(column, f"numbers of up to {whole + scale} digits, and 38 go")
    words: dict[str, Any] = {"type": f"decimal({18 if whole + scale <= 18 else 38},{scale})"}
    why = f"up to {scale} {'digit' if scale == 1 else 'digits'} behind the "
    why += _NAMES.get(decimal, decimal)
    if decimal != ".":
        words["decimalChar"] = decimal
    if group:
        words["groupChar"] = group
        why += f", groups of three separated by {group!r}"
    return _typed(column, candidate, words, why)


def _which_number(column: _Column, readings: Sequence[_Candidate]) -> Proposed:
    integer = column.candidates.get("integer")
    text = integer.first[2] if integer and integer.first else column.sample
    why = f"{text} may be a whole number or have decimals: --decimal . or --decimal ,"
    return _text(column, why, is_question=True)


def _about_codes(column: _Column) -> str:
    if column.zero:
        return f"{column.zero[2]}: a number would lose its zero"
    integer = column.candidates["integer"].first if "integer" in column.candidates else None
    return f"{integer[2]}: looks like a code" if integer else "looks like codes"


def _time(column: _Column, sign: str) -> Proposed | None:
    for kind in ("date", "timestamp", "timestamp[tz]", "time"):
        found = column.fitting(kind)
        if not found:
            continue
        sure = [each for each in found if "%y" not in each.key and "%b" not in each.key.lower()]
        formats = list(dict.fromkeys(_strict(each.key, sure) for each in sure))
        if kind in formats:  # ISO 8601, which other formats repeat
            formats = [kind]
        if not sure:
            form = found[0].key.partition(" ")[2]
            why = "month by name" if "%b" in form.lower() else "year of two digits"
            choices = [each.key.partition(" ")[2] for each in found]
            orders = {"".join(c for c in each if c in "dmyYbB") for each in choices}
            more = f" (or {choices[1]})" if len(orders) > 1 else ""
            why = f"may be a {kind} ({why}): --format {column.name}={form}{more}"
            return _text(column, why, is_question=True)
        if len(formats) > 1:
            first, second, *_ = (form.partition(" ")[2] for form in formats)
            why = f"{column.sample} may be {first} or {second}: --format {column.name}=..."
            return _text(column, why, is_question=True)
        chosen = next(each for each in sure if each.key == formats[0])
        form = chosen.key.partition(" ")[2]
        words = {"type": kind} | ({"format": form} if form else {})
        return _typed(column, chosen, words, (form or "ISO 8601") + _ruled_out(column, chosen))
    return None


def _strict(key: str, found: Sequence[_Candidate]) -> str:
    """The format with two digits each that says the same, if it fits as well."""
    strict = key.replace("%-", "%")
    return strict if any(each.key == strict for each in found) else key


def _ruled_out(column: _Column, chosen: _Candidate) -> str:
    """What speaks against the same format with day and month in the other order."""
    form = chosen.key
    kind, _, rest = form.partition(" ")
    swapped = f"{kind} " + rest.replace("%d", "\0").replace("%m", "%d").replace("\0", "%m").replace(
        "%-d", "\0").replace("%-m", "%-d").replace("\0", "%-m")  # fmt: skip
    other = column.candidates.get(swapped)
    if swapped == form or other is None or other.first is None or chosen.misfits:
        return ""
    return f"; {other.first[2]} rules out {swapped.partition(' ')[2]}"


def _near_miss(column: _Column) -> str:
    """Why a column is text: words that may be true and false, or what nearly fits."""
    few = column.few or []
    for true, false in WORDS:
        if len(few) == 2 and {text.casefold() for text in few} == {true, false}:
            yes = next(text for text in few if text.casefold() == true)
            no = next(text for text in few if text.casefold() == false)
            return f"{yes}, {no}: may be a boolean: --type {column.name}=boolean:{yes}/{no}"
    if column.zero:
        return _about_codes(column)
    near = min(column.candidates.values(), key=lambda each: each.misfits, default=None)
    if near is None or near.misfits * 2 > column.values or not near.first or not column.is_open:
        return ""
    kind, _, rest = near.key.partition(" ")
    kind = "number" if kind == "number" else f"{kind} {rest}".strip()
    _, line, text = near.first
    share = f"{near.misfits:,} of {column.values:,} values"
    return f"{share} are no {kind}, first {text!r} in line {line}"


def _typed(column: _Column, candidate: _Candidate, words: Mapping[str, Any], why: str) -> Proposed:
    made = dict(words)
    tokens = [token for token, _ in column.missing.most_common() if token]
    if tokens:
        made["missingValues"] = ["", *tokens]
        why += f"; missing is {', '.join(map(repr, tokens[:5]))}"
    if column.blanks:
        made["trim"] = True
        why += "; blanks around values are left out"
    return _made(column, made, why, candidate.misfits, candidate.first)


def _text(column: _Column, why: str, is_question: bool = False) -> Proposed:
    return _made(column, {"type": "text"}, why, 0, None, is_question)


def _made(
    column: _Column,
    words: Mapping[str, Any],
    why: str,
    misfits: int,
    first: tuple[int, int, str] | None,
    is_question: bool = False,
) -> Proposed:
    return Proposed(
        words={"name": column.name, **words},
        why=why,
        values=column.values,
        missing=dict(column.missing) if words["type"] != "text" else {},
        misfits=misfits,
        first=first if misfits else None,
        is_question=is_question,
    )
