"""The words of T-SQL that the sink uses, and its expressions.

A statement is read word by word; what is not expected is refused. An expression becomes a function
of the row and the variables around it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from proofs.tds.tables import fold

_WORD = re.compile(
    r"""\s*(?:--[^\n]*\n\s*)*(?:
      (?P<quoted>\[(?:[^\]]|\]\])*\])
    | N?(?P<text>'(?:[^']|'')*')
    | (?P<number>\d+)
    | (?P<variable>@{1,2}\w+)
    | (?P<name>[^\W\d]\w*)
    | (?P<mark><>|!=|<=|>=|[-+(),.=<>*;])
    )""",
    re.VERBOSE,
)


class Scope(NamedTuple):
    """What an expression may ask for."""

    variables: Mapping[str, Any]
    row: Mapping[str, Any]
    """Column, folded -> value."""
    functions: Mapping[str, Callable[..., Any]]


Expression = Callable[[Scope], Any]


class Unknown(ValueError):
    """A statement that is not one of the sink's."""


class Words:
    """The words of some statements, one after the other."""

    def __init__(self, text: str) -> None:
        self._words: list[re.Match[str]] = []
        at = 0
        while text[at:].strip():
            found = _WORD.match(text, at)
            if found is None:
                raise Unknown(f"{text[at : at + 40]!r} in {text!r}")
            self._words.append(found)
            at = found.end()
        self._text = text
        self._at = 0

    @property
    def over(self) -> bool:
        return self._at >= len(self._words)

    @property
    def place(self) -> int:
        """Where the next word begins in the text."""
        return len(self._text) if self.over else self._words[self._at].start()

    def text(self, start: int) -> str:
        """What was read since a place."""
        return self._text[start : self.place].strip()

    def sees(self, *words: str) -> bool:
        """Whether these words come next; keywords and marks, in any case."""
        coming = self._words[self._at : self._at + len(words)]
        return [w[0].strip().upper() for w in coming] == [word.upper() for word in words]

    def accept(self, *words: str) -> bool:
        """Pass these words over if they come next."""
        if seen := self.sees(*words):
            self._at += len(words)
        return seen

    def expect(self, *words: str) -> None:
        """Pass these words over.

        Raises:
            Unknown: others come.
        """
        if not self.accept(*words):
            raise self.unknown(" ".join(words))

    def unknown(self, wanted: str = "something else") -> Unknown:
        place = self.place
        return Unknown(f"{wanted} wanted before {self._text[place : place + 60]!r}: {self._text!r}")

    def take(self, group: str) -> str:
        """The next word, which is of this kind.

        Raises:
            Unknown: it is of another.
        """
        if self.over or self._words[self._at][group] is None:
            raise self.unknown(group)
        self._at += 1
        return self._words[self._at - 1][group]

    def is_a(self, group: str) -> bool:
        return not self.over and self._words[self._at][group] is not None

    def name(self) -> str:
        """One name, bracketed or not."""
        if self.is_a("quoted"):
            return self.take("quoted")[1:-1].replace("]]", "]")
        return self.take("name")

    def names(self) -> str:
        """The name of a table; the schema before it is kept where it is not `dbo`."""
        parts = [self.name()]
        while self.accept("."):
            parts.append(self.name())
        return table_name(parts)

    def listed(self, read: Callable[[], Any]) -> list[Any]:
        """What stands between commas."""
        found = [read()]
        while self.accept(","):
            found.append(read())
        return found

    def literal(self) -> str:
        return self.take("text")[1:-1].replace("''", "'")

    def expression(self) -> Expression:
        """One expression, as long as it goes on.

        Raises:
            Unknown: it is not one of the sink's.
        """
        left = self._both()
        while self.accept("OR"):
            left = _either(left, self._both())
        return left

    def _both(self) -> Expression:
        left = self._negated()
        while self.accept("AND"):
            left = _each(left, self._negated())
        return left

    def _negated(self) -> Expression:
        if self.accept("NOT"):
            inner = self._compared()
            return lambda scope: None if (value := inner(scope)) is None else not value
        return self._compared()

    def _compared(self) -> Expression:
        left = self._value()
        if self.accept("IS", "NULL"):
            return lambda scope: left(scope) is None
        if self.accept("IS", "NOT", "NULL"):
            return lambda scope: left(scope) is not None
        if self.accept("IN", "("):
            values = self.listed(self._value)
            self.expect(")")
            return lambda scope: left(scope) in [value(scope) for value in values]
        for mark, compare in _COMPARISONS.items():
            if self.accept(mark):
                return _comparison(compare, left, self._value())
        return left

    def _value(self) -> Expression:
        if self.accept("("):
            inner = self.expression()
            self.expect(")")
            return inner
        if self.accept("NULL"):
            return lambda scope: None
        if self.is_a("text"):
            text = self.literal()
            return lambda scope: text
        if self.accept("-"):
            number = -int(self.take("number"))
            return lambda scope: number
        if self.is_a("number"):
            number = int(self.take("number"))
            return lambda scope: number
        if self.is_a("variable"):
            variable = self.take("variable")
            return lambda scope: scope.variables[variable]
        name = self.name()
        if self.accept("("):
            return self._call(name.upper())
        whole = last = fold(name)
        while self.accept("."):
            last = fold(self.name())
            whole = f"{whole}.{last}"
        # Only where tables are joined do names of their columns have the table before them.
        return lambda scope: scope.row[whole] if whole in scope.row else scope.row[last]

    def _call(self, name: str) -> Expression:
        arguments = [] if self.sees(")") else self.listed(self.expression)
        self.expect(")")
        return lambda scope: scope.functions[name](*(value(scope) for value in arguments))


def table_name(parts: list[str]) -> str:
    """How tables are called here: `schema.table`, and without the schema where it is `dbo`."""
    return ".".join(part for part in parts if part.casefold() != "dbo")


def parts_of(name: str) -> str:
    """A table's name, from the text that T-SQL takes for one."""
    return Words(name).names()


def schema_of(name: str) -> tuple[str, str]:
    """Schema, empty for `dbo`, and name of a table as it is called here."""
    schema, _, table = name.rpartition(".")
    return schema, table


_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "=": lambda a, b: a == b,
    "<>": lambda a, b: a != b,
    "!=": lambda a, b: a != b,
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
}


def _comparison(
    compare: Callable[[Any, Any], bool], left: Expression, right: Expression
) -> Expression:
    def compared(scope: Scope) -> bool | None:
        a, b = left(scope), right(scope)
        return None if a is None or b is None else compare(a, b)

    return compared


def _each(left: Expression, right: Expression) -> Expression:
    return lambda scope: left(scope) and right(scope)


def _either(left: Expression, right: Expression) -> Expression:
    return lambda scope: left(scope) or right(scope)
