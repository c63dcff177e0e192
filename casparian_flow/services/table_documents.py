"""A table's contract as a document: TOML in and out, Table Schema and ODCS out."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any

from casparian_flow.contract import (
    FALSE,
    TRUE,
    Column,
    Contract,
    ContractError,
    kind_of,
    literal,
    precision_of,
    read,
)

_TOML_LIMIT = 1 << 20
"""Characters: a MANIFEST, which the contract is put into, takes no more."""
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPED = {
    "\b": "\\b",
    "\t": "\\t",
    "\n": "\\n",
    "\f": "\\f",
    "\r": "\\r",
    '"': '\\"',
    "\\": "\\\\",
}
_BESIDE = ("dialect", "columns")


def from_toml(text: str) -> Contract:
    """Read a contract from TOML, such as `casparian table show --toml` prints.

    Raises:
        ContractError: it is not TOML, or not a contract.
    """
    if len(text) > _TOML_LIMIT:
        raise ContractError(f"the document has {len(text):,} characters; {_TOML_LIMIT:,} go")
    try:
        given = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ContractError(f"the document is not TOML: {error}") from None
    return read(given)


def to_toml(contract: Contract) -> str:
    """The contract as TOML: `from_toml(to_toml(contract)) == contract`."""
    made = literal(contract)
    lines = [f"{key} = {_value(made[key])}" for key in made if key not in _BESIDE]
    if dialect := made.get("dialect"):
        lines += ["", "[dialect]", *(f"{key} = {_value(value)}" for key, value in dialect.items())]
    lines += ["", "[columns]"]
    for column in made["columns"]:
        words = {key: value for key, value in column.items() if key != "name"}
        short = words["type"] if len(words) == 1 else words
        lines.append(f"{_key(column['name'])} = {_value(short)}")
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _basic(name)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A regular expression is easier to read where its backslashes stay as they are.
        literally = "\\" in value and "'" not in value and value.isprintable()
        return f"'{value}'" if literally else _basic(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return (
            "{ " + ", ".join(f"{_key(key)} = {_value(each)}" for key, each in value.items()) + " }"
        )
    return repr(value)


def _basic(text: str) -> str:
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    if character in _ESCAPED:
        return _ESCAPED[character]
    return f"\\u{ord(character):04x}" if character < " " or character == "\x7f" else character


# Table Schema (Data Package 2). Its types are fewer than ours: `casparian:type` has ours.

_TABLE_SCHEMA = {
    "text": "string", "decimal": "number", "double": "number", "timestamp": "datetime",
    "timestamp[tz]": "datetime", "binary": "string",
}  # fmt: skip


def to_table_schema(contract: Contract) -> dict[str, Any]:
    """The contract's columns as a Table Schema."""
    made: dict[str, Any] = {
        "$schema": "https://datapackage.org/profiles/2.0/tableschema.json",
        "fields": [_field(column) for column in contract.columns],
    }
    if contract.key:
        made["primaryKey"] = list(contract.key)
    made["fieldsMatch"] = ["equal" if contract.drift == "hold" else "partial"]
    return made


def _field(column: Column) -> dict[str, Any]:
    kind = kind_of(column.type)
    made: dict[str, Any] = {
        "name": column.name,
        "type": _TABLE_SCHEMA.get(kind, kind),
        "casparian:type": column.type,
        "missingValues": list(column.missing),
    }
    if column.format:
        made["format"] = column.format
    if kind in ("decimal", "double"):
        made["decimalChar"] = column.decimal
    if column.group:
        made["groupChar"] = column.group
    if kind == "boolean":
        made["trueValues"] = list(column.true or TRUE)
        made["falseValues"] = list(column.false or FALSE)
    if constraints := _constraints(column):
        made["constraints"] = constraints
    return made


def _constraints(column: Column) -> dict[str, Any]:
    made = {
        "required": column.required,
        "unique": column.unique,
        "minimum": column.minimum,
        "maximum": column.maximum,
        "enum": list(column.enum),
        "pattern": column.pattern,
        "minLength": column.min_length,
        "maxLength": column.max_length,
    }
    return {key: value for key, value in made.items() if value not in (None, False, "", [])}


# ODCS (Open Data Contract Standard) 3.1.

_ODCS = {
    "text": "string", "decimal": "number", "double": "number", "timestamp[tz]": "timestamp",
    "binary": "string",
}  # fmt: skip
_OPTIONS = ("minimum", "maximum", "pattern", "minLength", "maxLength")


def to_odcs(contract: Contract, version: str) -> dict[str, Any]:
    """The contract as a document of the Open Data Contract Standard, such as teams exchange.

    Args:
        version: the version of the table.
    """
    return {
        "apiVersion": "v3.1.0",
        "kind": "DataContract",
        "id": contract.table,
        "name": contract.table,
        "version": version,
        "status": "active",
        "schema": [
            {
                "name": contract.table,
                "logicalType": "object",
                "physicalType": "table",
                "properties": [_property(column, contract) for column in contract.columns],
            }
        ],
    }


def _property(column: Column, contract: Contract) -> dict[str, Any]:
    kind, constraints = kind_of(column.type), _constraints(column)
    made: dict[str, Any] = {
        "name": column.name,
        "logicalType": _ODCS.get(kind, kind),
        "physicalType": column.type,
        "required": column.required or column.name in contract.key,
        "unique": column.unique or contract.key == (column.name,),
    }
    if column.name in contract.key:
        made |= {"primaryKey": True, "primaryKeyPosition": contract.key.index(column.name) + 1}
    options = {key: constraints[key] for key in _OPTIONS if key in constraints}
    if kind == "decimal":
        precision, scale = precision_of(column.type)
        made["customProperties"] = [
            {"property": "precision", "value": precision}, {"property": "scale", "value": scale}
        ]  # fmt: skip
    if column.format:
        options["format"] = column.format
    if options:
        made["logicalTypeOptions"] = options
    if column.enum:
        arguments = {"validValues": list(column.enum)}
        made["quality"] = [
            {"type": "library", "metric": "invalidValues", "arguments": arguments, "mustBe": 0}
        ]
    return made
