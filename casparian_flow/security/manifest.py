"""Read a plugin's MANIFEST from its source.

The source is parsed, never compiled or imported. Only literals are accepted, so the result does
not depend on the machine that reads it.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import io
import math
import re
import tokenize
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import msgspec
from packaging.version import InvalidVersion, Version

from casparian_flow import contract, sink_uri
from casparian_flow.errors import ConfigError, PluginError

SOURCE_LIMIT = 1 << 20
"""Bytes. Parsing takes hundreds of times the size of the source in memory."""


def parse(source: bytes, file_name: str) -> ast.Module:
    """Parse a plugin's source without running it.

    Args:
        source: the file's bytes; UTF-8, at most `SOURCE_LIMIT`.
        file_name: the file's name, for messages.

    Raises:
        PluginError: the source is too long, nested too deeply, not UTF-8 or not Python.
    """
    if len(source) > SOURCE_LIMIT:
        raise PluginError(
            f"{file_name} has {len(source)} bytes; the limit for a plugin is {SOURCE_LIMIT}",
            "move data out of the source, and code into a package",
        )
    if b"\0" in source:
        raise PluginError(f"{file_name} has NUL bytes: it is not Python source", "publish a .py")
    try:
        # Only UTF-8: some codecs take hours to decode hostile input.
        encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
        if encoding not in ("utf-8", "utf-8-sig"):
            raise SyntaxError(f"the source says that its encoding is {encoding}, not UTF-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source, file_name)
    # Bytes that are not UTF-8 raise a SyntaxError, or a UnicodeDecodeError (a ValueError).
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        text = printable((getattr(error, "text", None) or "").strip())
        raise PluginError(
            f"{file_name}{f' line {line}' if line else ''}: {getattr(error, 'msg', error)}"
            + (f": {text}" if text else ""),
            "fix that line, and save the file as UTF-8",
        ) from error
    except (RecursionError, MemoryError) as error:
        raise PluginError(
            f"{file_name} nests expressions too deeply", "split the deepest one"
        ) from error


def printable(text: str) -> str:
    """The start of untrusted text, without control characters."""
    return "".join(character if character.isprintable() else "?" for character in text[:60])


EXAMPLE = 'MANIFEST = PluginMetadata(pattern="*.csv", topic="sales_data", subscriptions=["csv"])'

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_TOPIC = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_OPTION = re.compile(r"[a-z][a-z0-9_]{0,63}")
_UNSTORABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_LIMIT = 10**9
"""Larger numbers are mistakes, and some would not fit a database column."""
_BYTES_LIMIT = 1 << 50

CONTRACT_DEPTH = 8
CONTRACT_VALUES = 50_000
CONTRACT_CHARACTERS = 256 << 10
"""A table of a thousand columns, each with a list of values, is within these."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A plugin's MANIFEST, checked; `sdk.PluginMetadata` explains the fields."""

    name: str
    version: str
    """In PEP 440's normal form; empty if `casparian publish` shall choose it."""
    patterns: list[str]
    topics: list[str]
    """Those of `topic`, then those that only `sinks` names; may be empty."""
    priority: int
    subscriptions: list[str]
    sinks: dict[str, str | list[str]]
    """Topic -> sink URI, or several, as written; schemes and paths are not checked here."""
    timeout_seconds: float
    """0: the configured limit."""
    memory_bytes: int = 0
    """0: the configured limit."""
    scratch_bytes: int = 0
    network: bool = False
    options: dict[str, str | int | bool] = msgspec.field(default_factory=dict)
    contract: dict[str, Any] = msgspec.field(default_factory=dict)
    """Values that JSON can hold; empty: the plugin is no table."""
    catch_all: bool = False

    @property
    def is_table(self) -> bool:
        """Whether the plugin publishes typed rows by a contract."""
        return bool(self.contract) and not contract.is_survey(self.contract)

    @property
    def yields_to_tables(self) -> bool:
        """Whether a file that belongs to a table is none of this plugin's."""
        return self.catch_all and not self.contract

    def sinks_of(self, topic: str) -> list[str]:
        """The sink URIs of a topic; empty if the configuration shall choose."""
        return _texts(self.sinks.get(topic, []))


def read_manifest(source: bytes, file_name: str) -> Manifest:
    """Read and check a plugin's MANIFEST, and check that the source has a `Handler`.

    Args:
        source: the file's bytes; UTF-8.
        file_name: the file's name, for messages; its stem is the default name of the plugin.

    Raises:
        PluginError: the source is not a plugin. The message names the line or field, and why.
    """
    return manifest_in(parse(source, file_name), source, file_name)


def manifest_in(tree: ast.Module, source: bytes, file_name: str) -> Manifest:
    """`read_manifest` for a source that is already parsed as `tree`."""
    module = Module(tree, source, file_name)
    fields = module.manifest_fields()
    module.check_handler()
    return of_fields(fields, file_name)


def of_fields(fields: dict[str, Any], file_name: str) -> Manifest:
    """Make a Manifest of the arguments of `PluginMetadata`, whose types are already checked.

    Raises:
        PluginError: a value is invalid; the message names it, and why.
    """
    manifest = Manifest(
        name=fields.get("name") or PurePosixPath(file_name).stem,
        version=normal_version(fields.get("version", ""), file_name),
        patterns=_texts(fields.get("pattern", ())),
        topics=list(dict.fromkeys([*_texts(fields.get("topic", ())), *fields.get("sinks", {})])),
        priority=fields.get("priority", 0),
        subscriptions=_texts(fields.get("subscriptions", ())),
        sinks=fields.get("sinks", {}),
        timeout_seconds=float(fields.get("timeout_seconds", 0)),
        memory_bytes=fields.get("memory_bytes", 0),
        scratch_bytes=fields.get("scratch_bytes", 0),
        network=fields.get("network", False),
        options=fields.get("options", {}),
        contract=fields.get("contract", {}),
        catch_all=fields.get("catch_all", False),
    )
    for fault, hint in _faults(manifest):
        raise PluginError(f"{file_name}: {fault}", hint)
    return manifest


class Module:
    """A parsed plugin."""

    def __init__(self, tree: ast.Module, source: bytes, file_name: str) -> None:
        self.file_name = file_name
        self.lines = source.removeprefix(b"\xef\xbb\xbf").splitlines()
        self.statements = list(_module_level(tree))
        self.aliases = {
            alias.asname: alias.name
            for statement in self.statements
            if isinstance(statement, ast.ImportFrom)
            for alias in statement.names
            if alias.asname
        }

    def manifest_fields(self) -> dict[str, Any]:
        """The arguments of the MANIFEST's call, with their types checked; None is left out."""
        fields: dict[str, Any] = {}
        for keyword in self.manifest_call().keywords:
            field = keyword.arg
            if field is None:
                raise self._computed(keyword)
            if field not in _FIELDS:
                near = difflib.get_close_matches(field, _FIELDS, 1)
                raise self._error(
                    keyword,
                    f"MANIFEST has no field {field[:60]!r}; the fields are {', '.join(_FIELDS)}",
                    f"did you mean {near[0]}?" if near else "remove it",
                )
            if field in fields:
                raise self._error(keyword, f"MANIFEST has {field} twice", "keep one of them")
            accepts, wanted = _FIELDS[field]
            value = self._literal(keyword.value)
            if value is None:
                continue
            if field == "contract" and (again := _key_twice(keyword.value)):
                what = f"the contract has {self._shown(again)} twice"
                raise self._error(again, what, "keep one of them")
            if not accepts(value):
                shown = self._shown(keyword.value)
                raise self._error(keyword, f"{field} must be {wanted}, not {shown}", EXAMPLE)
            fields[field] = value
        return fields

    def check_handler(self) -> None:
        """Raise PluginError if `Handler` is missing or cannot work."""
        shape = "class Handler(BasePlugin), with execute(self, file_path)"
        definitions = [node for node in self.statements if "Handler" in _bound(node)]
        if not definitions:
            raise PluginError(f"{self.file_name} has no class Handler", f"add a {shape}")
        handler = definitions[-1]
        if not isinstance(handler, ast.ClassDef):
            return
        if not handler.bases:
            raise self._error(handler, "class Handler does not derive from BasePlugin", shape)
        inherits = any(self._name(base) != "BasePlugin" for base in handler.bases)
        if not inherits and not any("execute" in _bound(node) for node in _module_level(handler)):
            raise self._error(handler, "class Handler has no method execute", shape)

    def manifest_call(self) -> ast.Call:
        """The call of `PluginMetadata` that is assigned to MANIFEST."""
        assignments = [node for node in self.statements if "MANIFEST" in _bound(node)]
        if not assignments:
            raise PluginError(f"{self.file_name} has no MANIFEST", f"add {EXAMPLE}")
        if len(assignments) > 1:
            raise self._error(assignments[1], "MANIFEST is defined twice", "keep one of them")
        value = getattr(assignments[0], "value", assignments[0])
        if not isinstance(value, ast.Call) or self._name(value.func) != "PluginMetadata":
            raise self._computed(value)
        if value.args:
            raise self._error(value.args[0], "MANIFEST's fields must be named", EXAMPLE)
        return value

    def _literal(self, node: ast.expr) -> Any:
        """The value of a literal; a set becomes a list, in the order of the source."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return -value
            case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
                return [self._literal(item) for item in items]
            case ast.Dict(keys=keys, values=values) if all(
                isinstance(key, ast.Constant) for key in keys
            ):
                return {
                    key.value: self._literal(value)
                    for key, value in zip(keys, values, strict=True)
                    if isinstance(key, ast.Constant)
                }
        raise self._computed(node)

    def _name(self, node: ast.expr) -> str:
        """A name, or the last part of a dotted name, before `import ... as` renamed it."""
        match node:
            case ast.Name(id=name):
                return self.aliases.get(name, name)
            case ast.Attribute(attr=name):
                return name
        return ""

    def _computed(self, node: ast.AST) -> PluginError:
        return self._error(node, f"`{self._shown(node)}` is computed; use a literal", EXAMPLE)

    def _error(self, node: Any, what: str, hint: str) -> PluginError:
        return PluginError(f"{self.file_name} line {node.lineno}: {what}", hint)

    def _shown(self, node: Any) -> str:
        """A node's source text on one line. Not its repr, which fails for very long integers."""
        end = node.end_col_offset if node.end_lineno == node.lineno else None
        line = self.lines[node.lineno - 1][node.col_offset : end].decode(errors="replace")
        return printable(line) + ("" if end is not None and len(line) <= 60 else "...")


def _module_level(parent: ast.Module | ast.ClassDef) -> Iterator[ast.stmt]:
    """The statements of a module or class body, with those under `if` and `try`.

    Without recursion: each `elif` adds a level.
    """
    waiting: list[ast.AST] = [*reversed(parent.body)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.stmt):
            yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.expr):
            waiting.extend(reversed(list(ast.iter_child_nodes(node))))


def _bound(statement: ast.stmt) -> list[str]:
    """The names that a statement binds."""
    match statement:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr()):
            return [name]
        case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
            return [alias.asname or alias.name for alias in aliases]
    return []


def _key_twice(node: ast.expr) -> ast.expr | None:
    """A key that a dict in a literal has twice: Python keeps one value, and drops the other."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Dict):
            seen: set[object] = set()
            for key in inner.keys:
                if isinstance(key, ast.Constant):
                    if key.value in seen:
                        return key
                    seen.add(key.value)
    return None


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_texts(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(map(_is_text, value)))


def _is_whole(value: object) -> bool:
    return type(value) is int and abs(value) < _LIMIT


def _is_bytes(value: object) -> bool:
    return type(value) is int and 0 <= value <= _BYTES_LIMIT


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and 0 <= value < _LIMIT


def _is_sinks(value: object) -> bool:
    return (
        isinstance(value, dict)
        and all(map(_is_text, value))
        and all(map(_is_texts, value.values()))
    )


def _is_options(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and (isinstance(option, str | bool) or _is_whole(option))
        for key, option in value.items()
    )


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "pattern": (_is_texts, "a string or a list of strings"),
    "topic": (_is_texts, "a string or a list of strings"),
    "priority": (_is_whole, "a whole number (of 9 digits at most)"),
    "subscriptions": (_is_texts, "a list of strings"),
    "sinks": (_is_sinks, "a dict of strings, topic to sink URI or a list of them"),
    "name": (_is_text, "a string"),
    "version": (_is_text, "a string"),
    "timeout_seconds": (_is_seconds, "a number of seconds, 0 or more"),
    "memory_bytes": (_is_bytes, "a number of bytes, such as 2_000_000_000"),
    "scratch_bytes": (_is_bytes, "a number of bytes, such as 100_000_000"),
    "network": (_is_flag, "True or False"),
    "options": (_is_options, "a dict of strings to strings, whole numbers, True or False"),
    "contract": (_is_dict, "a dict"),
    "catch_all": (_is_flag, "True or False"),
}
"""Fields of `sdk.PluginMetadata`: a check of the value, and its description for messages."""


def _texts(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(dict.fromkeys(value))


def normal_version(text: str, file_name: str) -> str:
    """A plugin's version in PEP 440's normal form; an empty string stays empty.

    Raises:
        PluginError: the text is not a version, or longer than 64 characters.
    """
    with contextlib.suppress(InvalidVersion):
        if len(text) <= 64:
            return str(Version(text)) if text else ""
    raise PluginError(
        f"{file_name}: version {text[:60]!r} is not a version of PEP 440",
        'write it like version="1.0.0"',
    )


def _faults(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Invalid values of a manifest whose types are right: (message, hint)."""
    if not _NAME.fullmatch(manifest.name):
        yield (
            f"the plugin's name {manifest.name[:80]!r} is not a name: letters, digits, `_`, `-` "
            "and `.`, at most 64, not starting with `-` or `.`",
            'rename the file, or give MANIFEST a name="..."',
        )
    for topic in manifest.topics:
        if not _TOPIC.fullmatch(topic):
            yield (
                f"topic {topic[:80]!r} is not a topic's name: letters, digits, `_`, `-` and `.`, "
                "at most 64, starting with a letter or a digit",
                'write it like topic="sales_data"',
            )
    if not manifest.patterns:
        yield "MANIFEST has no pattern, so the plugin would never get a file", 'add pattern="*.csv"'
    for pattern in manifest.patterns:
        if pattern.startswith("/") or ".." in pattern.split("/"):
            yield (
                f"pattern {pattern[:80]!r} leads out of the source root",
                'write it relative to the source root, like "2024/*.csv"',
            )
    for tag in manifest.subscriptions:
        if "," in tag:
            yield f"subscription {tag[:80]!r} has a comma in it", "write it as two subscriptions"
    yield from _faults_of_sinks(manifest)
    yield from _faults_of_options(manifest)
    yield from _faults_of_contract(manifest)
    texts = {
        "pattern": manifest.patterns,
        "subscription": manifest.subscriptions,
        "sink": [sink for topic in manifest.sinks for sink in manifest.sinks_of(topic)],
    }
    for what, values in texts.items():
        for text in values:
            if not text.strip() or _UNSTORABLE.search(text):
                yield (
                    f"{what} {text[:80]!a} is empty or has control characters in it",
                    "remove it, or write it in printable characters",
                )


def _faults_of_options(manifest: Manifest) -> Iterator[tuple[str, str]]:
    for name, value in manifest.options.items():
        if not _OPTION.fullmatch(name):
            yield (
                f"option {name[:80]!r} is not an option's name: small letters, digits and `_`",
                'write it like options={"header_line": 0}',
            )
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            yield f"option {name!r} has characters that are not Unicode text", "remove them"


def _faults_of_contract(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """The first fault of a contract."""
    hint = "write it with: casparian table add   (docs/table_reference.md has its words)"
    if fault := _unfit(manifest.contract):
        yield f"the contract has {fault}", hint
    elif manifest.contract:
        try:
            contract.check(manifest.contract)
        except contract.ContractError as error:
            yield str(error), hint


def _unfit(literal: object) -> str:
    """What a literal has that no JSON can hold, or more of it than a contract ever needs."""
    waiting: list[tuple[object, int]] = [(literal, 1)]
    values = characters = 0
    while waiting:
        value, depth = waiting.pop()
        values += 1
        match value:
            case str():
                characters += len(value)
                fault = "text that is not Unicode" if re.search("[\ud800-\udfff]", value) else ""
            case None | bool():
                fault = ""
            case int():
                whole = -(1 << 63) <= value < 1 << 63
                fault = "" if whole else "a whole number of more than 64 bits"
            case float():
                fault = "" if math.isfinite(value) else "a number that is not finite"
            case list():
                fault = ""
                waiting += [(item, depth + 1) for item in value]
            case dict():
                named = all(isinstance(key, str) for key in value)
                fault = "" if named else "a key that is no string"
                waiting += [(part, depth + 1) for pair in value.items() for part in pair]
            case _:
                fault = f"a value of the type {type(value).__name__}"
        if depth > CONTRACT_DEPTH:
            fault = f"values nested more than {CONTRACT_DEPTH} deep"
        if values > CONTRACT_VALUES or characters > CONTRACT_CHARACTERS:
            fault = f"more than {CONTRACT_VALUES} values or {CONTRACT_CHARACTERS} characters"
        if fault:
            return fault
    return ""


def _faults_of_sinks(manifest: Manifest) -> Iterator[tuple[str, str]]:
    for topic in manifest.sinks:
        named = manifest.sinks_of(topic)
        if not named:
            yield (
                f"topic {topic!r} has an empty list of sinks",
                ("name a sink, or leave the topic out"),
            )
        for sink in filter(None, named):
            try:
                sink_uri.read(sink)
            except ConfigError as error:
                yield f"topic {topic!r}: {error.message}", error.hint
