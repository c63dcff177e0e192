"""Change the MANIFEST of a plugin with the options of `casparian publish`.

The chosen values replace the author's literals in the source. They are therefore signed with the
artifact, and readers of the MANIFEST need no special case.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from casparian_flow.errors import PluginError
from casparian_flow.security.manifest import Module, of_fields, parse, read_manifest

_ESCAPE = re.compile(
    r"\\(?:(?P<letter>[tnr0\\])|x(?P<x>[0-9A-Fa-f]{2})|u(?P<u>[0-9A-Fa-f]{4})"
    r"|U(?P<U>[0-9A-Fa-f]{8})|(?P<other>.?))",
    re.DOTALL,
)
_LETTERS = {"t": "\t", "n": "\n", "r": "\r", "0": "\0", "\\": "\\"}
_FLAGS = {"true": True, "yes": True, "on": True, "1": True,
          "false": False, "no": False, "off": False, "0": False}  # fmt: skip
_BOM = b"\xef\xbb\xbf"
LINE = 80
"""Characters of a list or dict that is written on one line."""


class Choices(NamedTuple):
    """What the command line chose; fields that were not given keep the author's value."""

    name: str | None = None
    patterns: Sequence[str] = ()
    topics: Sequence[str] = ()
    """New names, in the order of the MANIFEST's topics and as many."""
    options: Mapping[str, str] = {}
    """Option -> its value as typed."""
    contract: Mapping[str, Any] = {}
    """The whole contract, which makes the plugin a table."""
    sinks: Mapping[str, Sequence[str]] = {}
    """Topic, by its new name -> its sinks: all that the MANIFEST then has."""


NOTHING = Choices()


class Chosen(NamedTuple):
    """A plugin's source with the choices in it."""

    source: bytes
    notes: list[str]
    """Warnings, a sentence each."""


class _Edit(NamedTuple):
    start: int
    """Byte offset in the source, as is `end`."""
    end: int
    text: bytes


def choose(source: bytes, file_name: str, choices: Choices) -> Chosen:
    """Apply the choices to the call that makes the MANIFEST; no other byte changes.

    Args:
        source: the plugin's file; UTF-8.
        file_name: its name, for messages.

    Raises:
        PluginError: the source is not a plugin, an option is not declared, a value has another
            type, or the number of topics differs.
    """
    if choices == NOTHING:
        return Chosen(source, [])
    tree = parse(source, file_name)
    module = Module(tree, source, file_name)
    fields = module.manifest_fields()
    writer = _Writer(source, module.manifest_call())
    notes: list[str] = []
    if choices.name is not None:
        if not choices.name:
            raise PluginError("the name in --name is empty", "write it like --name orders")
        writer.field(fields, "name", choices.name)
    if choices.patterns:
        several = len(choices.patterns) > 1 or not isinstance(fields.get("pattern", ""), str)
        chosen = list(dict.fromkeys(choices.patterns))
        writer.field(fields, "pattern", chosen if several else chosen[0])
    if choices.topics:
        renamed = _renamed(fields, file_name, choices.topics)
        notes = list(_mentions(tree, writer.call, file_name, renamed))
        writer.topics(fields, renamed, sinks=not choices.sinks)
    for option, text in choices.options.items():
        writer.option(fields, option, _option_value(fields, file_name, option, text))
    if choices.contract:
        writer.field(fields, "contract", dict(choices.contract))
    if choices.sinks:
        writer.field(fields, "sinks", {name: list(uris) for name, uris in choices.sinks.items()})
    changed = writer.edited()
    if read_manifest(changed, file_name) != of_fields(fields, file_name):
        raise PluginError(
            f"cannot put your choices into the MANIFEST of {file_name}",
            "edit the file, and publish it without --name, --pattern, --topic and --option",
        )
    return Chosen(changed, notes)


class _Writer:
    """Collects edits of the MANIFEST's call, and updates `fields` to match the edited source."""

    def __init__(self, source: bytes, call: ast.Call) -> None:
        self.call = call
        self._source = source
        self._lines = source.removeprefix(_BOM).splitlines(keepends=True)
        self._starts = [len(source) - sum(map(len, self._lines))]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line))
        self._keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        self._edits: list[_Edit] = []
        self._new: list[str] = []
        """Keyword arguments to add to the call."""

    def field(self, fields: dict[str, Any], name: str, value: object) -> None:
        """Set a field, replacing its present value if it has one."""
        fields[name] = value
        if name in self._keywords:
            self._replace(self._keywords[name], value)
        else:
            self._new.append(f"{name}={_literal(value)}")

    def topics(
        self, fields: dict[str, Any], renamed: Mapping[str, str], *, sinks: bool = True
    ) -> None:
        """Rename topics wherever the call names them; lists keep their form.

        Args:
            sinks: also in the MANIFEST's sinks, which nothing else replaces.
        """
        for node in _texts_of(self._keywords.get("topic")):
            self._replace(node, renamed[str(node.value)])
        if "topic" in fields:
            topic = fields["topic"]
            many = isinstance(topic, list)
            fields["topic"] = [renamed[name] for name in topic] if many else renamed[topic]
        if not sinks:
            return
        placed = self._keywords.get("sinks")
        for key in placed.keys if isinstance(placed, ast.Dict) else ():
            if isinstance(key, ast.Constant):
                self._replace(key, renamed[str(key.value)])
        if "sinks" in fields:
            fields["sinks"] = {renamed[key]: sink for key, sink in fields["sinks"].items()}

    def option(self, fields: dict[str, Any], name: str, value: str | int | bool) -> None:
        """Set the value of a declared option."""
        fields["options"] = {**fields["options"], name: value}
        options = self._keywords["options"]
        assert isinstance(options, ast.Dict)
        for key, node in zip(options.keys, options.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == name:
                self._replace(node, value)

    def edited(self) -> bytes:
        """The source with all edits applied."""
        edits = [*self._edits, *self._insertion()]
        text = self._source
        for edit in sorted(edits, reverse=True):
            text = text[: edit.start] + edit.text + text[edit.end :]
        return text

    def _insertion(self) -> Iterator[_Edit]:
        """Insert new keywords before the first, each on its own line if the first has one."""
        if not self._new:
            return
        if not self.call.keywords:
            assert self.call.end_lineno and self.call.end_col_offset
            at = self._at(self.call.end_lineno, self.call.end_col_offset) - 1
            yield _Edit(at, at, ", ".join(self._new).encode())
            return
        first = self.call.keywords[0]
        before = self._lines[first.lineno - 1][: first.col_offset]
        gap = b" "
        if first.lineno > self.call.lineno and not before.strip():
            above = self._lines[first.lineno - 2]
            gap = above[len(above.rstrip(b"\r\n")) :] + before
        at = self._at(first.lineno, first.col_offset)
        yield _Edit(at, at, b"".join(f"{new},".encode() + gap for new in self._new))

    def _replace(self, node: ast.expr, value: object) -> None:
        assert node.end_lineno and node.end_col_offset is not None
        start = self._at(node.lineno, node.col_offset)
        end = self._at(node.end_lineno, node.end_col_offset)
        self._edits.append(_Edit(start, end, _literal(value).encode()))

    def _at(self, line: int, column: int) -> int:
        """Byte offset of a position in the tree: its columns are bytes and leave out a BOM."""
        return self._starts[line - 1] + column


def _texts_of(node: ast.expr | None) -> Iterator[ast.Constant]:
    """The strings of a literal: a string, or a list, tuple or set of strings."""
    items = node.elts if isinstance(node, ast.List | ast.Tuple | ast.Set) else [node]
    for item in items:
        if isinstance(item, ast.Constant) and isinstance(item.value, str):
            yield item


def _literal(value: object, indent: str = "    ") -> str:
    """A Python literal, in double quotes where that needs no escape.

    It is on one line if that has room there, so that a difference between two versions of a plugin
    names the column that changed.

    Args:
        indent: what the line begins with.
    """
    inner = indent + "    "
    if isinstance(value, list):
        items = [_literal(item, inner) for item in value]
        return _collected("[", items, "]", indent)
    if isinstance(value, dict):
        items = [f"{_literal(key)}: {_literal(item, inner)}" for key, item in value.items()]
        return _collected("{", items, "}", indent)
    text = repr(value)
    return f'"{text[1:-1]}"' if text.startswith("'") and '"' not in text else text


def _collected(left: str, items: Sequence[str], right: str, indent: str) -> str:
    line = f"{left}{', '.join(items)}{right}"
    if len(line) <= LINE and "\n" not in line:
        return line
    lines = "".join(f"{indent}    {item},\n" for item in items)
    return f"{left}\n{lines}{indent}{right}"


def _renamed(fields: dict[str, Any], file_name: str, chosen: Sequence[str]) -> dict[str, str]:
    """Each topic of the MANIFEST -> its new name."""
    topic = fields.get("topic", [])
    several = [topic] if isinstance(topic, str) else topic
    known = list(dict.fromkeys([*several, *fields.get("sinks", {})]))
    if len(chosen) != len(known):
        listed = ", ".join(known) or "none"
        raise PluginError(
            f"{len(chosen)} topic{'' if len(chosen) == 1 else 's'} chosen, but the MANIFEST of "
            f"{file_name} has {len(known)}: {listed}",
            "give them all, in that order: "
            + (" ".join(f"--topic {name}" for name in known) or "leave --topic out"),
        )
    if twice := next((name for name in chosen if list(chosen).count(name) > 1), None):
        raise PluginError(
            f"topic {twice[:80]!r} is given twice", "give each topic a name of its own"
        )
    return dict(zip(known, chosen, strict=True))


def _mentions(
    tree: ast.Module, call: ast.Call, file_name: str, renamed: Mapping[str, str]
) -> Iterator[str]:
    """A warning for each string outside the MANIFEST that equals the old name of a topic.

    Raises:
        PluginError: a literal `publish` call uses an old name.
    """
    old = {name for name, new in renamed.items() if name != new}
    in_manifest = {id(node) for node in ast.walk(call)}
    for node in ast.walk(tree):
        topic = _published_to(node)
        if topic is not None and topic.value in old:
            raise PluginError(
                f"{file_name} line {topic.lineno} publishes to the topic {topic.value!r} by "
                "name, so --topic cannot rename it",
                "write MANIFEST.topic there, or MANIFEST.topic[0] where it is a list",
            )
    for node in ast.walk(tree):
        if id(node) not in in_manifest and isinstance(node, ast.Constant) and node.value in old:
            yield (
                f"{file_name} line {node.lineno} has the text {node.value!r}, the old name of "
                f"the topic {renamed[str(node.value)]!r}; publishing to the old name fails"
            )


def _published_to(node: ast.AST) -> ast.Constant | None:
    """The topic of a call like `self.publish("topic", data)`, if it is a literal."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return None
    if node.func.attr != "publish":
        return None
    named = [keyword.value for keyword in node.keywords if keyword.arg == "topic"]
    topic = next(iter([*node.args[:1], *named]), None)
    return topic if isinstance(topic, ast.Constant) else None


def _option_value(
    fields: dict[str, Any], file_name: str, option: str, text: str
) -> str | int | bool:
    """Convert the typed text to the type of the option's declared value."""
    declared: dict[str, str | int | bool] = fields.get("options", {})
    if option not in declared:
        known = ", ".join(f"{name}={_literal(value)}" for name, value in declared.items())
        raise PluginError(
            f"{file_name} has no option {option[:60]!r}; "
            + (f"its options and their values are: {known}" if known else "it has no options"),
            "choose one of these" if known else "leave --option out",
        )
    default = declared[option]
    if isinstance(default, bool):
        if text.lower() not in _FLAGS:
            raise _wrong_type(option, text, "true or false")
        return _FLAGS[text.lower()]
    if isinstance(default, int):
        if not re.fullmatch(r"[+-]?[0-9]{1,9}", text):
            raise _wrong_type(option, text, "a whole number of 9 digits at most")
        return int(text)
    return _unescaped(option, text)


def _wrong_type(option: str, text: str, wanted: str) -> PluginError:
    return PluginError(
        f"option {option} must be {wanted}, not {text[:60]!r}", f"write it like --option {option}=1"
    )


def _unescaped(option: str, text: str) -> str:
    r"""The typed text with escapes such as `\t` and `\x01` replaced by their characters."""

    def character(match: re.Match[str]) -> str:
        if match["letter"]:
            return _LETTERS[match["letter"]]
        code = int(match["x"] or match["u"] or match["U"] or "ffffffff", 16)
        if code > 0x10FFFF:
            raise PluginError(
                f"option {option}: {match[0]!r} is not an escape",
                r"the escapes are \t \n \r \0 \\ \xNN \uNNNN \UNNNNNNNN; a backslash itself is \\",
            )
        return chr(code)

    return _ESCAPE.sub(character, text)
