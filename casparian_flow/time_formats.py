"""Formats of dates and times: strftime's words, each with the texts that it stands for.

Uses the standard library only, because a copy of this file is imported in the plugin's process.
"""

from __future__ import annotations

import re

_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
MONTHS = {name[:3].lower(): number for number, name in enumerate(_MONTHS, 1)}
"""The first three letters of an English month, in small letters -> its number."""
YEAR = "(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_HOUR, _HALF = "[01][0-9]|2[0-3]", "0[1-9]|1[0-2]"
PARTS: dict[str, tuple[str, str]] = {
    "%Y": ("year", YEAR),
    "%y": ("year", "[0-9]{2}"),
    "%m": ("month", _HALF),
    "%-m": ("month", "0?[1-9]|1[0-2]"),
    "%b": ("month", "(?i:" + "|".join(name[:3] for name in _MONTHS) + ")"),
    "%B": ("month", "(?i:" + "|".join(_MONTHS) + ")"),
    "%d": ("day", "0[1-9]|[12][0-9]|3[01]"),
    "%-d": ("day", "0?[1-9]|[12][0-9]|3[01]"),
    "%H": ("hour", _HOUR),
    "%-H": ("hour", "[01]?[0-9]|2[0-3]"),
    "%I": ("hour", _HALF),
    "%-I": ("hour", "0?[1-9]|1[0-2]"),
    "%p": ("half", "(?i:AM|PM)"),
    "%M": ("minute", "[0-5][0-9]"),
    "%S": ("second", "[0-5][0-9]"),
    "%f": ("fraction", "[0-9]{1,6}"),
    "%z": ("zone", "Z|[-+](?:0[0-9]|1[0-4])(?::?[0-5][0-9])?"),
}
"""Word -> the part of the time that it says, and a regular expression of its texts. The words with
a dash take one digit or two. A year of two digits is one of 1969 to 2068, as in POSIX."""
_WORD = re.compile(r"%(?:-[A-Za-z]|.)?", re.DOTALL)
_NEEDED: dict[str, tuple[set[str], set[str]]] = {
    "date": ({"year", "month", "day"}, set()),
    "time": ({"hour", "minute"}, {"second", "fraction", "half"}),
    "timestamp": (
        {"year", "month", "day", "hour", "minute"},
        {"second", "fraction", "half"},
    ),
}
_NEEDED["timestamp[tz]"] = (_NEEDED["timestamp"][0] | {"zone"}, _NEEDED["timestamp"][1])
"""Kind -> the parts that its format must have, and those that it may have."""


def format_pieces(text: str) -> list[tuple[str, str]]:
    """A format in pieces: (word, "") for each word of `PARTS`, ("", text) for what is between.

    Raises:
        ValueError: it has a word that `PARTS` does not have.
    """
    pieces: list[tuple[str, str]] = []
    end = 0
    for found in _WORD.finditer(text):
        if found.start() > end:
            pieces.append(("", text[end : found.start()]))
        end = found.end()
        if found[0] == "%%":
            pieces.append(("", "%"))
        elif found[0] in PARTS:
            pieces.append((found[0], ""))
        else:
            raise ValueError(f"{found[0][:20]!r} is not one of {', '.join(PARTS)} and %%")
    if end < len(text):
        pieces.append(("", text[end:]))
    return pieces


def check_format(text: str, kind: str) -> None:
    """Check that a format says all of a date, time, timestamp or timestamp[tz], and once.

    Raises:
        ValueError: it does not.
    """
    parts = [PARTS[word][0] for word, _ in format_pieces(text) if word]
    needed, allowed = _NEEDED[kind]
    twice = {part for part in parts if parts.count(part) > 1}
    if lost := sorted(needed - set(parts)):
        raise ValueError(f"it does not say the {lost[0]}")
    if more := sorted(set(parts) - needed - allowed):
        raise ValueError(f"a {kind} has no {more[0]}")
    if twice:
        raise ValueError(f"it says the {min(twice)} twice")
    if ("half" in parts) != any(word in ("%I", "%-I") for word, _ in format_pieces(text)):
        raise ValueError("%p and %I go together")
    if "fraction" in parts and "second" not in parts:
        raise ValueError("%f needs %S")


def kind_of_format(text: str) -> str:
    """The kind of what a format says: date, time, timestamp or timestamp[tz].

    Raises:
        ValueError: it has a word that `PARTS` does not have.
    """
    parts = {PARTS[word][0] for word, _ in format_pieces(text) if word}
    if "zone" in parts:
        return "timestamp[tz]"
    if "hour" in parts:
        return "timestamp" if "year" in parts else "time"
    return "date"
