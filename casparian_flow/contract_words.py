"""The words of a contract's literal: each is read and checked, and a wrong one is named.

Uses the standard library only, because a copy of this file is imported in the plugin's process.
"""

from __future__ import annotations

import datetime
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from casparian_flow.sdk import printable

TYPES = (
    "text", "integer", "decimal(p,s)", "double", "boolean", "date", "time", "timestamp",
    "timestamp[tz]", "binary(hex)", "binary(base64)",
)  # fmt: skip
TOKENS_LIMIT = 1000
"""Values of one list, such as missingValues or enum."""
TEXT_LIMIT = 1000
"""Characters of one text, such as a regular expression."""
SHOWN = 60
"""Characters of an untrusted text that a message shows."""
NUMBERS = ("integer", "decimal", "double")
TIMES = ("date", "time", "timestamp", "timestamp[tz]")
_OTHER_WORDS = {
    "string": "text", "str": "text", "varchar": "text", "char": "text", "any": "text",
    "int": "integer", "bigint": "integer", "int64": "integer", "long": "integer",
    "number": "decimal(18,2)", "numeric": "decimal(18,2)", "decimal": "decimal(18,2)",
    "money": "decimal(18,2)", "float": "double", "float64": "double", "real": "double",
    "bool": "boolean", "datetime": "timestamp", "timestamptz": "timestamp[tz]",
    "binary": "binary(hex)", "bytes": "binary(base64)", "year": "integer",
    "bareNumber": "pattern", "constraints": "required", "quoteChar": "quote",
    "escapeChar": "escape", "commentChar": "comment", "sheetName": "sheet", "path": "files",
    "fields": "columns", "primaryKey": "key", "name": "table", "skipRows": "skip_lines",
    "headerRows": "header_line", "null_values": "missingValues", "dateformat": "format",
}  # fmt: skip
"""Words of other notations -> ours, to suggest them."""
_DECIMAL = re.compile(r"decimal\(\s*([0-9]{1,2})\s*,\s*([0-9]{1,2})\s*\)")
_NUMBER = re.compile(r"-?(?:[0-9]{1,38}(?:\.[0-9]{1,38})?|\.[0-9]{1,38})")
CONTROL = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_BEYOND = 10**309
"""No number of a contract is as large, and `str` gives smaller ones at once."""


class ContractError(ValueError):
    """The contract cannot be used: the message names the table, the column and the key."""


def kind_of(type_name: str) -> str:
    """The kind of a type, without its numbers: `decimal` for `decimal(18,2)`."""
    return type_name if type_name == "timestamp[tz]" else type_name.partition("(")[0]


def precision_of(type_name: str) -> tuple[int, int]:
    """Precision and scale of a decimal type."""
    found = _DECIMAL.fullmatch(type_name)
    assert found, type_name
    return int(found[1]), int(found[2])


def known(given: Mapping[Any, Any], keys: Sequence[str], where: str) -> Mapping[str, Any]:
    """The mapping, if it has no other keys."""
    for key in given:
        if key not in keys:
            near = _OTHER_WORDS.get(key, "") if isinstance(key, str) else ""
            close = difflib.get_close_matches(str(key)[:SHOWN], keys, 1)
            near = near if near in keys else next(iter(close), "")
            raise ContractError(
                f"{where}: key {shown(key)} does not exist"
                f"{f'; did you mean {near}?' if near else ''} (the keys are {', '.join(keys)})"
            )
    return given


def text_of(given: Mapping[str, Any], key: str, where: str) -> str:
    value = given.get(key, "")
    if not isinstance(value, str) or len(value) > TEXT_LIMIT or CONTROL.search(value):
        raise ContractError(
            f"{where}: {key} is {shown(value)}; it must be a text of at most {TEXT_LIMIT} "
            "characters without control characters"
        )
    return value


def texts_of(given: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = given.get(key, ())
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or len(values) > TOKENS_LIMIT:
        raise ContractError(
            f"{where}: {key} is {shown(value)}; it must be a list of at most {TOKENS_LIMIT} texts"
        )
    for index, each in enumerate(values):
        text_of({f"{key}[{index}]": each}, f"{key}[{index}]", where)
    return tuple(dict.fromkeys(values))


def flag_of(given: Mapping[str, Any], key: str, where: str) -> bool:
    value = given.get(key, False)
    if not isinstance(value, bool):
        raise ContractError(f"{where}: {key} is {shown(value)}; it must be true or false")
    return value


def choice_of(
    given: Mapping[str, Any], key: str, choices: Sequence[str], where: str, default: str
) -> str:
    value = given.get(key, default)
    if value not in choices:
        raise ContractError(f"{where}: {key} is {shown(value)}; it can be {', '.join(choices)}")
    return str(value)


def length_of(given: Mapping[str, Any], key: str, where: str) -> int | None:
    value = given.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < 10**9):
        raise ContractError(f"{where}: {key} is {shown(value)}; it must be a number of characters")
    return value


def character_of(given: Mapping[str, Any], key: str, where: str, default: str) -> str:
    value = given.get(key, default)
    usable = (
        isinstance(value, str)
        and len(value) == 1
        and not re.match(r"[^\W_]|[+-]|[^ -\U0010ffff]", value)
    )
    if not usable and value != default:
        raise ContractError(
            f"{where}: {key} is {shown(value)}; it must be one character, and no letter, digit or "
            "sign"
        )
    return str(value)


def type_of(given: object, where: str) -> str:
    text = given.strip() if isinstance(given, str) else ""
    if found := _DECIMAL.fullmatch(text):
        precision, scale = int(found[1]), int(found[2])
        if 1 <= precision <= 38 and scale <= precision:
            return f"decimal({precision},{scale})"
        raise ContractError(
            f"{where}: {plain(text)} does not exist: a decimal has 1 to 38 digits, and of them at "
            "most as many behind the point"
        )
    if text in TYPES and text != "decimal(p,s)":
        return text
    near = _OTHER_WORDS.get(text.lower().partition("(")[0], "")
    near = near if near in TYPES or near.startswith("decimal") else ""
    near = near or next(iter(difflib.get_close_matches(text.lower(), TYPES, 1)), "")
    what = "type is missing" if given is None else f"type {shown(given)} does not exist"
    raise ContractError(
        f"{where}: {what}{f'; did you mean {near}?' if near else ''} "
        f"(the types are {', '.join(TYPES)})"
    )


def value_of(value: object, type_name: str, what: str) -> int | float | str:
    """A value of a column in its normal form: of decimals and times the text."""
    kind = kind_of(type_name)
    text = value if isinstance(value, str) else ""
    is_text = isinstance(value, str) and len(value) <= TEXT_LIMIT and value == printable(value)
    if kind == "text" and is_text:
        return text
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = str(value) if isinstance(value, float) or abs(value) < _BEYOND else ""
    if kind in NUMBERS:
        return _number(text, value, type_name, what)
    try:
        if kind == "date":
            date = datetime.date.fromisoformat(text or str(value))
            return date.isoformat()
        if kind == "time":
            return datetime.time.fromisoformat(text or str(value)).isoformat()
        if kind in TIMES:
            time = datetime.datetime.fromisoformat(text or str(value))
            if (time.tzinfo is None) == (kind == "timestamp"):
                return (time.astimezone(datetime.UTC) if time.tzinfo else time).isoformat(" ")
    except (ValueError, OverflowError):  # a time zone may move it out of the years 1 to 9999
        pass
    example = {"date": " such as 2026-12-31", "time": " such as 23:59:59"}.get(kind, "")
    example = " such as 2026-12-31 23:59:59" if kind == "timestamp" else example
    example = " such as 2026-12-31 23:59:59+00:00" if kind == "timestamp[tz]" else example
    raise ContractError(f"{what} is {shown(value)}, which is no {type_name}{example}")


def _number(text: str, value: object, type_name: str, what: str) -> int | float | str:
    kind = kind_of(type_name)
    try:
        number = Decimal(text)
        if kind == "double" and math.isfinite(float(number)):
            return float(number)
        exponent = number.as_tuple().exponent
        if not isinstance(exponent, int) or max(abs(exponent), number.adjusted()) > TEXT_LIMIT:
            kind = ""  # no number, or one that would take gigabytes written out: 1e999999999
        if kind == "integer" and number == number.to_integral_value():
            if -(2**63) <= number < 2**63:
                return int(number)
        elif kind == "decimal" and _NUMBER.fullmatch(format(number, "f")):
            precision, scale = precision_of(type_name)
            plain = format(number, "f")
            plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
            whole, _, behind = plain.lstrip("-").partition(".")
            if len(behind) <= scale and len(whole.lstrip("0")) <= precision - scale:
                return plain
    except (InvalidOperation, OverflowError, ValueError):
        pass
    raise ContractError(f"{what} is {shown(value)}, which is no {type_name}")


def comparable(bound: int | float | str | None, type_name: str) -> Any:
    """A bound as a value that can be compared."""
    kind = kind_of(type_name)
    if bound is None or kind in ("integer", "double"):
        return bound
    if kind == "decimal":
        return Decimal(bound)
    return datetime.datetime.fromisoformat(str(bound)) if kind != "time" else bound


def shown(value: object) -> str:
    """An untrusted value for a message: printable and short."""
    text = value if isinstance(value, str) else repr(value) if _is_small(value) else ""
    if not isinstance(value, str) and not text:
        return f"a {type(value).__name__}"
    short = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    return repr(printable(short)) if isinstance(value, str) else short


def _is_small(value: object) -> bool:
    """Whether `repr` is quick and short enough."""
    return (
        value is None
        or isinstance(value, bool | float)
        or (isinstance(value, int) and abs(value) < 10**30)
    )


def plain(name: object) -> str:
    """A table's or column's name for a message: without quotes where it needs none."""
    return name if isinstance(name, str) and re.fullmatch(r"\w{1,60}", name) else shown(name)
