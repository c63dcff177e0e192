"""A table's contract: which files are its, which columns it has, and what a cell must look like.

A contract is a literal in a plugin's MANIFEST, in the words of Table Schema and Table Dialect. This
module checks such a literal and says what is wrong with it; `typed` holds rows against it. Uses the
standard library only, because a copy of this file is imported in the plugin's process.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from casparian_flow.contract_words import (
    CONTROL,
    NUMBERS,
    TEXT_LIMIT,
    TIMES,
    TOKENS_LIMIT,
    ContractError,
    character_of,
    choice_of,
    comparable,
    flag_of,
    kind_of,
    known,
    length_of,
    plain,
    precision_of,
    shown,
    text_of,
    texts_of,
    type_of,
    value_of,
)  # fmt: skip
from casparian_flow.path_patterns import path_values, placeholders, routing_glob
from casparian_flow.sdk import column_names
from casparian_flow.time_formats import check_format

__all__ = [
    "Column", "Contract", "ContractError", "Held", "check", "is_survey", "kind_of", "literal",
    "path_values", "precision_of", "read", "routing_glob", "sum_group", "words_of",
]  # fmt: skip

LANGUAGE = 1
"""What the words of a contract mean. A number that was given out never changes its meaning; a word
that shall mean something else comes with the next number."""

READERS = ("delimited", "excel_sheets")
DRIFTS = ("hold", "rescue", "evolve")
EXTRA = "_extra"
"""The column in which `rescue` keeps cells of columns that the contract does not have."""
LINE = "_cf_line"
"""The column of physical lines, if the contract has `lines`."""

COLUMNS_LIMIT = 2000
"""SQLite takes no more columns."""
FILES_LIMIT = 100


class Held(Exception):
    """The file's columns are not the contract's, so this version waits until a person has decided.

    Raised in the plugin's process, before anything is published.
    """


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: a type is a grammar and an exact conversion, the rest narrows it."""

    name: str
    type: str
    format: str = ""
    """Of a date, time or timestamp, in strftime's words; empty: ISO 8601."""
    decimal: str = "."
    group: str = ""
    missing: tuple[str, ...]
    """Texts that mean that there is no value. They count before anything else is checked."""
    true: tuple[str, ...] = ()
    false: tuple[str, ...] = ()
    """Empty, like `true`: those of `TRUE` and `FALSE`."""
    trim: bool = False
    """Whether white space around a cell is left out."""
    required: bool = False
    optional: bool = False
    """Whether a file may lack the column, whatever `drift` says: its cells are null then."""
    unique: bool = False
    minimum: int | float | str | None = None
    maximum: int | float | str | None = None
    """Of decimals and times the text of their normal form."""
    enum: tuple[int | float | str, ...] = ()
    pattern: str = ""
    """A regular expression (RE2) that the whole text matches."""
    min_length: int | None = None
    max_length: int | None = None
    from_path: bool = False
    """Whether the cells come from the file's path, not from the file."""


@dataclass(frozen=True, kw_only=True)
class Contract:
    """A table's contract, checked. `read` makes one, `literal` writes one."""

    table: str
    reader: str
    files: tuple[str, ...]
    """Globs, with placeholders such as {region} or {day:%Y-%m-%d}."""
    source: str = ""
    """The source root; empty: all of them."""
    sinks: tuple[str, ...] = ()
    drift: str = "hold"
    max_rejects: str = ""
    """A number of rows, or a percentage of those read, above which the version is refused."""
    lines: bool = False
    """Whether every row has its physical line in `_cf_line`."""
    key: tuple[str, ...] = ()
    """Columns whose values, taken together, are never missing and never twice in a version."""
    dialect: Mapping[str, str | int] = field(default_factory=dict)
    columns: tuple[Column, ...]

    def column(self, name: str) -> Column | None:
        """The column of this name, if there is one."""
        return next((column for column in self.columns if column.name == name), None)


TRUE, FALSE = ("true", "True", "TRUE"), ("false", "False", "FALSE")


# The words of a literal: how each is called there, and which types take it.

_WORDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "type": ("type", ()),
    "format": ("format", TIMES),
    "decimalChar": ("decimal", ("decimal", "double")),
    "groupChar": ("group", NUMBERS),
    "missingValues": ("missing", ()),
    "trueValues": ("true", ("boolean",)),
    "falseValues": ("false", ("boolean",)),
    "trim": ("trim", ()),
    "required": ("required", ()),
    "optional": ("optional", ()),
    "unique": ("unique", ()),
    "minimum": ("minimum", (*NUMBERS, *TIMES)),
    "maximum": ("maximum", (*NUMBERS, *TIMES)),
    "enum": ("enum", ("text", *NUMBERS, *TIMES)),
    "pattern": ("pattern", ("text",)),
    "minLength": ("min_length", ("text",)),
    "maxLength": ("max_length", ("text",)),
    "from": ("from_path", ()),
}
"""Word of the literal -> the field of `Column`, and the kinds of types that take it (all if none
are named)."""
_KEYS = (
    "language", "table", "reader", "files", "source", "sinks", "drift", "max_rejects", "lines",
    "key", "dialect", "columns",
)  # fmt: skip
DIALECT: dict[str, tuple[str, ...]] = {
    "delimited": (
        "encoding", "delimiter", "quote", "escape", "blanks", "comment", "skip_lines",
        "header_line", "header", "footer", "control",
    ),
    "excel_sheets": ("sheet", "header_line", "header", "footer", "control"),
}  # fmt: skip
"""Reader -> the words of its dialect. What is not said is found in each file."""

_TABLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,55}")
_TOTALS = re.compile(r"\(\?P?<([^>]*)>")


def read(given: object) -> Contract:
    """Make a contract of a literal.

    Args:
        given: what a MANIFEST has as `contract`, or a document of the same words. Columns are a
            list of mappings with a `name`, or a mapping of names to a type or to the other words.

    Raises:
        ContractError: it is not a contract. The message names the key, and what is allowed.
    """
    where = "the contract"
    if not isinstance(given, Mapping):
        raise ContractError(f"{where} is {shown(given)}; it must be a mapping")
    if isinstance(given.get("table"), str):
        where = f"table {plain(given['table'])}"
    given = known(given, _KEYS, where)
    language = given.get("language", LANGUAGE)
    if type(language) is not int or language != LANGUAGE:
        raise ContractError(
            f"{where}: language is {shown(language)}; this Casparian Flow knows {LANGUAGE}: "
            "use the release that wrote the contract, or a newer one"
        )
    reader = choice_of(given, "reader", READERS, where, "delimited")
    drift = choice_of(given, "drift", DRIFTS, where, "hold")
    table = _table(given, where)
    files = _files(given, where)
    key = texts_of(given, "key", where)
    columns = _columns(given, where, key, files)
    contract = Contract(
        table=table,
        reader=reader,
        files=files,
        source=text_of(given, "source", where),
        sinks=texts_of(given, "sinks", where),
        drift=drift,
        max_rejects=_max_rejects(given, where),
        lines=flag_of(given, "lines", where),
        key=key,
        dialect=MappingProxyType(_dialect(given, reader, where)),
        columns=columns,
    )
    _check_together(contract, where)
    return contract


def literal(contract: Contract) -> dict[str, Any]:
    """The contract as a literal of strings, numbers, lists and dicts, without what goes unsaid.

    `read(literal(contract)) == contract`; equal contracts have equal literals.
    """
    made: dict[str, Any] = {"language": LANGUAGE}
    for each in fields(Contract):
        value = getattr(contract, each.name)
        if each.name in ("table", "reader", "drift") or (value and each.name != "columns"):
            made[each.name] = _literal_of(value)
    made["columns"] = [words_of(column, contract.key) for column in contract.columns]
    return made


def check(given: object) -> None:
    """Check what a MANIFEST has as `contract`: a contract, or the orders for a survey.

    Raises:
        ContractError: it is neither.
    """
    if is_survey(given):
        assert isinstance(given, Mapping)
        known(given, ("survey",), "the survey")
        if not isinstance(given["survey"], Mapping):
            raise ContractError(f"the survey is {shown(given['survey'])}; it must be a mapping")
    else:
        read(given)


def is_survey(given: object) -> bool:
    """Whether a MANIFEST's `contract` orders a survey: its plugin publishes facts, not a table."""
    return isinstance(given, Mapping) and "survey" in given


def default_missing(type_name: str, required: bool) -> tuple[str, ...]:
    """What is missing where `missingValues` is not said: the empty cell.

    An empty text is a text, unless the column is required (which it could not fail otherwise).
    """
    return () if type_name == "text" and not required else ("",)


# The checks of a literal, key by key.


def _table(given: Mapping[str, Any], where: str) -> str:
    name = text_of(given, "table", where)
    if not _TABLE.fullmatch(name) or name.endswith("_rejects"):
        raise ContractError(
            f"{where}: the table's name is {shown(name)}; it must be letters, digits, `_`, `-` "
            "and `.`, at most 56, start with a letter or a digit, and not end in _rejects"
        )
    return name


def _files(given: Mapping[str, Any], where: str) -> tuple[str, ...]:
    files = texts_of(given, "files", where)
    if not files:
        raise ContractError(f'{where}: files is missing; write it like files = ["sales_*.csv"]')
    if len(files) > FILES_LIMIT:
        raise ContractError(f"{where}: files has {len(files)} patterns; at most {FILES_LIMIT} go")
    for pattern in files:
        if not pattern.strip("/ ") or pattern.startswith("/") or ".." in pattern.split("/"):
            raise ContractError(
                f"{where}: files has {shown(pattern)}; a pattern is relative to the source root, "
                'like "2024/sales_*.csv"'
            )
        try:
            placeholders(pattern)
        except ValueError as error:
            raise ContractError(f"{where}: files has {shown(pattern)}: {error}") from None
    return tuple(dict.fromkeys(files))


def _max_rejects(given: Mapping[str, Any], where: str) -> str:
    value = given.get("max_rejects", "")
    text = str(value) if type(value) is int else value
    if text == "":
        return ""
    found = re.fullmatch(r"([0-9]{1,9})(?:(\.[0-9]{1,6})?(%))?", text if type(text) is str else "?")
    if not found or (found[3] and float(found[1] + (found[2] or "")) > 100):
        raise ContractError(
            f"{where}: max_rejects is {shown(value)}; write a number of rows such as 37, or a "
            'percentage such as "1%"'
        )
    return str(text)


def _dialect(given: Mapping[str, Any], reader: str, where: str) -> dict[str, str | int]:
    words = given.get("dialect", {})
    where = f"{where}, dialect"
    if not isinstance(words, Mapping):
        raise ContractError(f"{where} is {shown(words)}; it must be a mapping")
    made: dict[str, str | int] = {}
    for key in DIALECT[reader]:
        value = known(words, DIALECT[reader], where).get(key, "")
        if key == "header_line" and type(value) is int and value >= 0:
            value = str(value or "none")
        if key == "skip_lines":
            if value and (type(value) is not int or not 0 <= value < 10**9):
                raise ContractError(f"{where}: skip_lines is {shown(value)}; write a number")
        elif type(value) is not str or len(value) > TEXT_LIMIT or "\0" in value:
            raise ContractError(
                f"{where}: {key} is {shown(value)}; it must be a text of at most {TEXT_LIMIT} "
                "characters"
            )
        if value:
            made[key] = value
    if "header" in made and "header_line" in made:
        raise ContractError(f"{where}: header and header_line both say where the header is")
    if not re.fullmatch("none|[1-9][0-9]{0,8}|", str(made.get("header_line", ""))):
        raise ContractError(
            f"{where}: header_line is {shown(made['header_line'])}; write a line's number or none"
        )
    return made


def _columns(
    given: Mapping[str, Any], where: str, key: tuple[str, ...], files: tuple[str, ...]
) -> tuple[Column, ...]:
    columns = given.get("columns")
    if not columns or not isinstance(columns, Mapping | list | tuple):
        raise ContractError(
            f"{where}: columns is {shown(columns)}; it must be a mapping of names to types, or a "
            "list of mappings with a name and a type"
        )
    if len(columns) > COLUMNS_LIMIT:
        raise ContractError(f"{where} has {len(columns):,} columns; at most {COLUMNS_LIMIT:,} go")
    if isinstance(columns, Mapping):
        named = list(columns.items())
    else:
        named = [
            (each.get("name"), {word: each[word] for word in each if word != "name"})
            if isinstance(each, Mapping)
            else (each, None)
            for each in columns
        ]
    seen: dict[str, str] = {}
    made = []
    for name, words in named:
        _check_name(name, seen, where)
        made.append(_column(name, words, f"{where}, column {plain(name)}", name in key, files))
    return tuple(made)


def _check_name(name: object, seen: dict[str, str], where: str) -> None:
    if type(name) is not str or not name:
        raise ContractError(f"{where}: a column's name is {shown(name)}; it must be a text")
    (usual,) = column_names([name])
    if name != usual or CONTROL.search(name) or name == EXTRA:
        reason = (
            "it is the column that `rescue` adds" if name == EXTRA
            else "it has a control character" if CONTROL.search(name)
            else "names have at most 100 characters" if len(name) > 100
            else f"a header's cell {shown(name)} becomes the name {shown(usual)}"
        )  # fmt: skip
        raise ContractError(f"{where}: a column cannot be named {shown(name)}: {reason}")
    if other := seen.get(name.casefold()):
        what = "is there twice" if other == name else f"differs from {shown(other)} in case only"
        raise ContractError(f"{where}: column {shown(name)} {what}")
    seen[name.casefold()] = name


def _column(name: str, words: object, where: str, is_key: bool, files: tuple[str, ...]) -> Column:
    if isinstance(words, str):
        words = {"type": words}
    if not isinstance(words, Mapping):
        raise ContractError(f"{where} is {shown(words)}; it must be a type or a mapping")
    type_name = type_of(words.get("type"), where)
    kind = kind_of(type_name)
    allowed = [word for word, (_, kinds) in _WORDS.items() if not kinds or kind in kinds]
    unfit = [word for word in words if word in _WORDS and word not in allowed]
    if unfit:
        raise ContractError(
            f"{where}: {type_name} takes no {unfit[0]}; it takes {', '.join(allowed)}"
        )
    words = known(words, allowed, where)
    required = flag_of(words, "required", where)
    from_path = choice_of(words, "from", ("path", "file"), where, "file") == "path"
    missing = default_missing(type_name, required or is_key)
    if "missingValues" in words:
        missing = texts_of(words, "missingValues", where)
    column = Column(
        name=name,
        type=type_name,
        format=_format(words, kind, where, name if from_path else "", files),
        decimal=character_of(words, "decimalChar", where, "."),
        group=character_of(words, "groupChar", where, ""),
        missing=missing,
        true=texts_of(words, "trueValues", where),
        false=texts_of(words, "falseValues", where),
        trim=flag_of(words, "trim", where),
        required=required,
        optional=flag_of(words, "optional", where),
        unique=flag_of(words, "unique", where),
        minimum=_bound(words, "minimum", type_name, where),
        maximum=_bound(words, "maximum", type_name, where),
        enum=_enum(words, type_name, where),
        pattern=text_of(words, "pattern", where),
        min_length=length_of(words, "minLength", where),
        max_length=length_of(words, "maxLength", where),
        from_path=from_path,
    )
    _check_column(column, is_key, where)
    return column


def _format(
    words: Mapping[str, Any], kind: str, where: str, placeholder: str, files: tuple[str, ...]
) -> str:
    text = text_of(words, "format", where)
    if placeholder:
        forms = [
            found[placeholder] for each in files if placeholder in (found := placeholders(each))
        ]
        if not forms:
            raise ContractError(
                f"{where} comes from the path, but no pattern of files has {{{placeholder}}}"
            )
        if kind in TIMES:
            text = text or next(filter(None, forms), "")
            if other := [form for form in forms if form not in ("", text)]:
                raise ContractError(
                    f"{where}: format is {shown(text)}, but the path has {shown(other[0])}"
                )
    if text:
        try:
            check_format(text, kind)
        except ValueError as error:
            example = {"date": "%d.%m.%Y", "time": "%H:%M"}.get(kind, "%d.%m.%Y %H:%M:%S")
            zone = " %z" if kind == "timestamp[tz]" else ""
            raise ContractError(
                f"{where}: format {shown(text)} cannot be used: {error}; write it like "
                f'"{example}{zone}"'
            ) from None
    return text


def _bound(
    words: Mapping[str, Any], key: str, type_name: str, where: str
) -> int | float | str | None:
    value = words.get(key)
    return None if value is None else value_of(value, type_name, f"{where}: {key}")


def _enum(words: Mapping[str, Any], type_name: str, where: str) -> tuple[int | float | str, ...]:
    values = words.get("enum", ())
    if "enum" in words and (not isinstance(values, list | tuple) or not values):
        raise ContractError(f"{where}: enum is {shown(values)}; it must be a list of values")
    if len(values) > TOKENS_LIMIT:
        raise ContractError(f"{where}: enum has {len(values):,} values; {TOKENS_LIMIT:,} go")
    made = (value_of(value, type_name, f"{where}: a value of enum") for value in values)
    return tuple(dict.fromkeys(made))


def _check_column(column: Column, is_key: bool, where: str) -> None:
    """Raise ContractError if words of one column contradict each other."""
    if column.optional and (column.required or is_key):
        raise ContractError(f"{where} is both required and optional; leave one of them out")
    if column.type == "text" and (column.required or is_key) and not column.missing:
        raise ContractError(
            f"{where} is required, but its missingValues are empty, so that nothing is missing; "
            'write missingValues = [""]'
        )
    if column.group == column.decimal and kind_of(column.type) in ("decimal", "double"):
        raise ContractError(f"{where}: decimalChar and groupChar are both {shown(column.group)}")
    if both := set(column.true or TRUE) & set(column.false or FALSE):
        raise ContractError(f"{where}: {shown(min(both))} is true and false")
    tokens = {*column.true, *column.false}
    if both := tokens & set(column.missing):
        raise ContractError(f"{where}: {shown(min(both))} is both a value and missing")
    low, high = (comparable(bound, column.type) for bound in (column.minimum, column.maximum))
    if low is not None and high is not None and low > high:
        raise ContractError(f"{where}: minimum is above maximum, so that no value would fit")
    if column.max_length is not None and (column.min_length or 0) > column.max_length:
        raise ContractError(f"{where}: minLength is above maxLength, so that no text would fit")


def _check_together(contract: Contract, where: str) -> None:
    """Raise ContractError if parts of the contract contradict each other."""
    names = [column.name for column in contract.columns]
    for name in contract.key:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            raise ContractError(
                f"{where}: key names {shown(name)}, which is no column"
                + (f"; did you mean {shown(near[0])}?" if near else "")
            )
    if len(set(contract.key)) < len(contract.key):
        raise ContractError(f"{where}: key names a column twice")
    if all(column.from_path for column in contract.columns):
        raise ContractError(f"{where}: no column comes from the file")
    from_path = {column.name for column in contract.columns if column.from_path}
    for pattern in contract.files:
        if lost := [name for name in placeholders(pattern) if name not in from_path]:
            raise ContractError(
                f'{where}: files has {{{lost[0]}}}, but no column {lost[0]} with from = "path"'
            )
    _check_control(contract, where)


def _check_control(contract: Contract, where: str) -> None:
    if not (control := str(contract.dialect.get("control", ""))):
        return
    groups = _TOTALS.findall(control)
    sums: dict[str, list[str]] = {}
    for column in contract.columns:
        if kind_of(column.type) in ("integer", "decimal"):
            sums.setdefault(sum_group(column.name), []).append(column.name)
    if not groups:
        raise ContractError(f"{where}: control has no group (?P<rows>...) or (?P<sum_COLUMN>...)")
    for group in groups:
        if group != "rows" and group not in sums:
            raise ContractError(
                f"{where}: control has the group {shown(group)}; it can be rows or sum_COLUMN "
                "with a column of integers or decimals: "
                + (", ".join(sorted(sums)[:10]) or "there is none")
            )
        if len(both := sums.get(group, [])) > 1:
            raise ContractError(
                f"{where}: control has the group {shown(group)}, which could be the sum of "
                f"{shown(both[0])} or of {shown(both[1])}; leave it out, or rename a column"
            )


def sum_group(name: str) -> str:
    """The group of a control line that has the sum of this column."""
    return "sum_" + re.sub(r"\W", "_", name)


# Writing a literal.


def _literal_of(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def words_of(column: Column, key: Sequence[str] = ()) -> dict[str, Any]:
    """A column as a literal, without what goes unsaid.

    Args:
        key: the columns of the contract's key, which are required.
    """
    usual = Column(
        name=column.name,
        type=column.type,
        missing=default_missing(column.type, column.required or column.name in key),
    )
    made: dict[str, Any] = {"name": column.name, "type": column.type}
    for word, (name, _) in _WORDS.items():
        value = getattr(column, name)
        if word != "type" and value != getattr(usual, name):
            made[word] = "path" if name == "from_path" else _literal_of(value)
    return made
