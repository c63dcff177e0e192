"""Patterns of files with placeholders: {region} stands for one or more characters but slashes,
and {day:%Y-%m-%d} for a date in this form.

Uses the standard library only, because a copy of this file is imported in the plugin's process.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from casparian_flow.time_formats import format_pieces


class _Step(NamedTuple):
    """One step over a path: a character of a set, or several of them."""

    allows: Callable[[str], bool]
    repeats: bool = False
    skips: bool = False
    """Whether the step may also take nothing."""
    folders: bool = False
    """Whether what it takes must be empty or end in a slash."""
    name: str = ""
    """The placeholder that it is part of."""

    def may_end(self, path: str, at: int) -> bool:
        return not self.folders or at == 0 or path[at - 1] == "/"


_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_NAMED = re.compile(r"([^\W\d]\w{0,99})(?::(.+))?", re.DOTALL)
_SET = re.compile(r"\[[!^]?[]-]?(?:\w-\w|(?!\[:)[^]\\/{}-])*-?\]")
"""A set of characters that `_one_of` reads as the glob does: without classes and escapes."""
_RANGE = re.compile(r"(\w)-(\w)")
_DIGITS = {"%Y": 4, "%m": 2, "%d": 2, "%H": 2, "%M": 2, "%S": 2, "%y": 2}
"""Words that a placeholder's format may have, and how many digits each is."""


def placeholders(pattern: str) -> dict[str, str]:
    """The placeholders of a pattern: name -> format, which may be empty.

    Raises:
        ValueError: one of them cannot be read.
    """
    found: dict[str, str] = {}
    for match in _PLACEHOLDER.finditer(pattern):
        named = _NAMED.fullmatch(match[1])
        if not named:
            raise ValueError(
                f"{match[0][:60]!r} is not a placeholder, such as {{region}} or "
                "{day:%Y-%m-%d}; for {a,b} write two patterns"
            )
        if named[1] in found:
            raise ValueError(f"placeholder {{{named[1]}}} is there twice")
        found[named[1]] = named[2] or ""
        for word, text in format_pieces(found[named[1]]):
            if (word and word not in _DIGITS) or "/" in text:
                raise ValueError(
                    f"{word or text!r} cannot be in a path's format; use "
                    f"{', '.join(_DIGITS)} and text without a slash"
                )
    if set("{}") & set(_PLACEHOLDER.sub("", pattern)):
        raise ValueError("a brace without its partner; a placeholder is written {region}")
    if re.search(r"[*}]\{|\}\*", pattern):
        raise ValueError("a placeholder beside another or a * could be read in many ways")
    if found:
        _check_readable(pattern)
    if found and re.search(r"[@!+?*]\(", pattern):
        raise ValueError("placeholders and (...) do not go together; write two patterns")
    return found


def _check_readable(pattern: str) -> None:
    """
    Raises:
        ValueError: `path_values` would read a part of the pattern otherwise than the glob.
    """
    if "//" in pattern:
        raise ValueError("a placeholder's pattern has one slash between folders, not two")
    for found in re.finditer(r"\\.|(\[[!^]?\]?[^\]]*\])", pattern, re.DOTALL):
        if found[1] and (
            not _SET.fullmatch(found[1])
            or any(low > high for low, high in _RANGE.findall(found[1].casefold()))
        ):
            raise ValueError(
                f"{found[1][:60]!r} cannot stand beside a placeholder; write characters such as "
                "[a-z0-9_] there"
            )


def routing_glob(pattern: str) -> str:
    """The glob for the routing rules: `{region}/sales_{day:%Y-%m-%d}.csv` -> `*/sales_*.csv`."""
    return _PLACEHOLDER.sub("*", pattern)


def path_values(patterns: Sequence[str], rel_path: str) -> dict[str, str]:
    """The texts that a file's path has for the placeholders of the patterns that it matches.

    Where a path can be read in several ways, an earlier placeholder takes as little as it can; of
    several patterns the first that has a placeholder gives its text.
    """
    values: dict[str, str] = {}
    for pattern in patterns:
        if placeholders(pattern):
            anchored = pattern if "/" in pattern else f"**/{pattern}"
            for name, text in (_match(list(_steps(anchored)), rel_path) or {}).items():
                values.setdefault(name, text)
    return values


def _match(steps: list[_Step], path: str) -> dict[str, str] | None:
    """The placeholders' texts if the steps take the whole path; in time steps x characters."""
    ends = len(path)
    leads = [[False] * (ends + 2) for _ in range(len(steps) + 1)]
    """Step -> place in the path -> whether the steps from this one on can take the rest."""
    leads[-1][ends] = True
    for index in range(len(steps) - 1, -1, -1):
        step, here, after = steps[index], leads[index], leads[index + 1]
        for at in range(ends, -1, -1):
            ended = step.skips and step.may_end(path, at) and after[at]
            takes = at < ends and step.allows(path[at])
            one = not step.skips and after[at + 1]
            here[at] = ended or (takes and (one or (step.repeats and here[at + 1])))
    if not leads[0][0]:
        return None
    values: dict[str, str] = {}
    at = 0
    for step, after in zip(steps, leads[1:], strict=True):
        start = at
        at += not step.skips
        while not (after[at] and step.may_end(path, at)):
            at += 1
        if step.name:
            values[step.name] = values.get(step.name, "") + path[start:at]
    return values


def _steps(pattern: str) -> Iterator[_Step]:
    at = 0
    while at < len(pattern):
        rest = pattern[at:]
        if rest.startswith("**/") and pattern[at - 1 : at] in ("", "/"):
            yield _Step(lambda _: True, repeats=True, skips=True, folders=True)
            at += 3
        elif rest.startswith("*"):
            run = len(rest) - len(rest.lstrip("*"))
            anything = run > 1 and (at == 0 or pattern[at - 1] == "/") and at + run == len(pattern)
            yield _Step((lambda _: True) if anything else _no_slash, repeats=True, skips=True)
            at += run
        elif rest[0] == "?":
            yield _Step(_no_slash)
            at += 1
        elif found := re.match(r"\[(!|\^)?(\]?[^\]]*)\]", rest):
            yield _Step(_one_of(found[2], bool(found[1])))
            at += found.end()
        elif found := _PLACEHOLDER.match(rest):
            name, _, form = found[1].partition(":")
            yield from _placeholder(name, form)
            at += found.end()
        else:
            at += 1 if rest[0] != "\\" or len(rest) == 1 else 2
            yield _Step(_same(pattern[at - 1]))


def _placeholder(name: str, form: str) -> Iterator[_Step]:
    if not form:
        yield _Step(_no_slash, repeats=True, name=name)
    for word, text in format_pieces(form):
        for _ in range(_DIGITS.get(word, 0)):
            yield _Step(lambda character: character in "0123456789", name=name)
        for character in text:
            yield _Step(_same(character), name=name)


def _no_slash(character: str) -> bool:
    return character != "/"


def _same(wanted: str) -> Callable[[str], bool]:
    return lambda character: character.casefold() == wanted.casefold()


def _one_of(inside: str, negated: bool) -> Callable[[str], bool]:
    """Whether a character is in `a-z0_` or, negated, is not; never a slash."""
    ranges = re.findall(r"(.)-(.)|(.)", inside.casefold(), re.DOTALL)

    def allows(character: str) -> bool:
        folded = character.casefold()
        within = any(low <= folded <= high if low else folded == one for low, high, one in ranges)
        return character != "/" and within != negated

    return allows
