"""What a person says of a table: it is checked, and changes a contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from casparian_flow import contract
from casparian_flow.config import Settings
from casparian_flow.contract import Contract, ContractError
from casparian_flow.db import versions
from casparian_flow.db.access import Ledger
from casparian_flow.errors import PluginError
from casparian_flow.services import topics
from casparian_flow.time_formats import kind_of_format


class Said(NamedTuple):
    """What a person says of a table; what is empty is found in its files, or stays."""

    types: Mapping[str, str] = {}
    """Column -> type; a boolean may name its values: `boolean:ja/nein`."""
    formats: Mapping[str, str] = {}
    decimal: str = ""
    missing: Sequence[str] = ()
    key: Sequence[str] = ()
    dialect: Mapping[str, str] = {}
    """Words of `Contract.dialect`."""
    source: str = ""
    sinks: Sequence[str] = ()
    drift: str = ""
    max_rejects: str = ""
    lines: bool = False

    @property
    def hints(self) -> dict[str, Any]:
        """What a survey is told, in the words of a contract."""
        columns: dict[str, dict[str, Any]] = {}
        for name, kind in self.types.items():
            columns[name] = words_of_type(kind)
        for name, form in self.formats.items():
            columns.setdefault(name, {})["format"] = form
        hints: dict[str, Any] = {"columns": columns} if columns else {}
        if self.decimal:
            hints["decimalChar"] = self.decimal
        if self.missing:
            hints["missingValues"] = list(self.missing)
        return hints


def words_of_type(said: str) -> dict[str, Any]:
    """A type as a person says it, as words of a column: `boolean:ja/nein` has its values."""
    kind, _, values = said.partition(":")
    yes, _, no = values.partition("/")
    return {"type": kind, **({"trueValues": [yes], "falseValues": [no]} if values else {})}


def check_said(settings: Settings, ledger: Ledger, table: str, said: Said) -> None:
    """Check what a person says before files are read for minutes.

    Raises:
        PluginError: the table's name, a type, a format or another word of the contract is none.
        ConfigError: a sink cannot be used.
    """
    columns = []
    for name, words in said.hints.get("columns", {}).items():
        try:
            kind = kind_of_format(words.get("format", "%Y"))
        except ValueError as error:
            raise refused(ContractError(f"--format {name}: {error}")) from error
        columns.append({"name": name, "type": kind, **words})
    dialect = {word: said.dialect[word] for word in ("header", "footer") if word in said.dialect}
    given: dict[str, Any] = {
        "table": table, "files": ["*"], "columns": columns or [{"name": "any", "type": "text"}],
        "dialect": dialect, "max_rejects": said.max_rejects,
        **({"drift": said.drift} if said.drift else {}),
    }  # fmt: skip
    wanted = read(given)
    if dialect:
        check_patterns(wanted)
    if said.decimal:
        words = {"type": "double", "decimalChar": said.decimal}
        try:
            contract.read(given | {"columns": {"any": words}})
        except ContractError as error:
            _, _, why = str(error).partition(": ")
            raise refused(ContractError(f"--decimal: {why}")) from error
    if said.sinks:
        roots = ledger.read(versions.active_paths)
        topics.of_person(settings, table, said.sinks, "replace", roots)


def changed(given: Contract, said: Said) -> Contract:
    """A contract with what a person says of it in the place of what it has.

    Raises:
        PluginError: a column is not there, or something cannot be used.
    """
    names = [column.name for column in given.columns]
    for what, columns in (("--type", said.types), ("--format", said.formats)):
        for name in columns:
            if name not in names:
                raise PluginError(
                    f"{what} {name}=...: the table has no column {name!r}",
                    f"its columns are {', '.join(names)}",
                )
    literal = contract.literal(given)
    key = said.key or given.key
    for column in literal["columns"]:
        keep_missing(column, given, required=column.get("required", False) or column["name"] in key)
    literal["columns"] = [_changed(column, said, key) for column in literal["columns"]]
    literal["dialect"] = {**literal.get("dialect", {}), **said.dialect}
    for word in ("source", "drift", "max_rejects"):
        if value := getattr(said, word):
            literal[word] = value
    for word in ("sinks", "key"):
        if value := getattr(said, word):
            literal[word] = list(value)
    literal["lines"] = said.lines or given.lines
    return read(literal)


def keep_missing(column: dict[str, Any], given: Contract, *, required: bool) -> None:
    """Write out what is missing in a column of a contract, where the default becomes another.

    A text whose empty cells count as texts gets the default once it is required, for without
    missing values nothing of it could fail.

    Args:
        column: its literal, which is changed.
        required: whether it is required, or of the key, from now on.
    """
    was = given.column(column["name"])
    assert was is not None
    if was.missing != contract.default_missing(was.type, required) and (
        was.missing or not required
    ):
        column["missingValues"] = list(was.missing)


def _changed(column: dict[str, Any], said: Said, key: Sequence[str]) -> dict[str, Any]:
    """A column's literal with what a person says of it.

    Args:
        key: the columns of the new key.
    """
    name = column["name"]
    if name in said.types:
        words = words_of_type(said.types[name])
        if words["type"] != column["type"]:
            column = {key: column[key] for key in _KEPT if key in column}
        column |= words
    if name in said.formats:
        column |= {"format": said.formats[name]}
        if column["type"] in ("text", "integer"):  # a format is of a date, unless more is said
            column["type"] = "date" if name not in said.types else column["type"]
    kind = contract.kind_of(column["type"])
    if said.decimal and kind in ("decimal", "double"):
        column |= {"decimalChar": said.decimal}
        if column.get("groupChar") == said.decimal:
            del column["groupChar"]
    if said.missing and column.get("from") != "path":
        required = column.get("required", False) or name in key
        default = contract.default_missing(column["type"], required)
        have = column.get("missingValues", default)
        column |= {"missingValues": list(dict.fromkeys([*have, *said.missing]))}
    return column


_KEPT = ("name", "required", "unique", "trim", "missingValues", "from", "optional")
"""Words of a column that fit any type."""


def read(literal: Mapping[str, Any]) -> Contract:
    """`contract.read`, with an error that a person can do something about.

    Raises:
        PluginError: it is not a contract.
    """
    try:
        return contract.read(literal)
    except ContractError as error:
        raise refused(error) from error


def check_patterns(wanted: Contract) -> None:
    """
    Raises:
        PluginError: a regular expression of the contract is none.
    """
    from casparian_flow import typed  # loads pyarrow

    try:
        typed.check_patterns(wanted)
    except ContractError as error:
        raise refused(error) from error


def refused(error: ContractError) -> PluginError:
    """An error of a contract for a person."""
    return PluginError(str(error), "docs/table_reference.md lists the words of a contract")
