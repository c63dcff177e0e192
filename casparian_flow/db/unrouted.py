"""Files that no plugin wants: recorded, and nothing is made of them."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from functools import lru_cache
from typing import NamedTuple

from sqlalchemy import Connection, text

from casparian_flow.db import views
from casparian_flow.db.pages import Page, page
from casparian_flow.db.routing import compile_pattern

# A version with a job is wanted. One without is wanted by nobody: its jobs were queued with it, or
# when the rules changed. What an inventory has found of it was made by a job of another ledger.
_UNROUTED = """
    FROM cf_file_location l
    JOIN cf_source_root r ON r.id = l.source_root_id AND r.active
    JOIN cf_file_version v ON v.id = l.current_version_id
    WHERE l.gone_at IS NULL AND (:source IS NULL OR r.name = :source)
      AND NOT EXISTS (SELECT 1 FROM cf_processing_queue j
                      WHERE j.file_version_id = l.current_version_id)
      AND NOT EXISTS (SELECT 1 FROM cf_found_output f
                      WHERE f.source = r.name AND f.path = l.path AND f.ordinal = v.ordinal)
"""

CHOICES = 50
"""Of a pattern with braces, at the most."""

NEAR = 0.6
"""How alike an ending and a rule must be (0 to 1) for the rule to be named."""


def count(connection: Connection, source: str | None = None) -> int:
    """How many there are, of active source roots."""
    query = text(f"SELECT count(*) {_UNROUTED}")
    return int(connection.execute(query, {"source": source}).scalar_one())


def files(connection: Connection, limit: int | None, source: str | None = None) -> Page:
    """They, each with the rule that is nearest to matching it; empty where none is near."""
    found = page(
        connection,
        f"""
        SELECT r.name AS source, l.rel_path, v.size_bytes, v.ordinal AS versions,
               v.content_hash, v.detected_at
        {_UNROUTED} ORDER BY r.name, l.path
        """,
        limit,
        counted=f"SELECT 1 {_UNROUTED}",
        source=source,
    )
    rules = Rules(connection)
    for row in found:
        row["nearest"] = rules.nearest(row["rel_path"])
    return found


class _Rule(NamedTuple):
    shown: str
    pattern: re.Pattern[str]
    literals: tuple[str, ...]
    fault: str
    """Why it does not give a job to what it matches."""


class Rules:
    """The rules of one moment, to find the one that is nearest to matching a file."""

    def __init__(self, connection: Connection) -> None:
        self._rules: list[_Rule] = []
        for row in views.rules(connection):
            try:
                pattern = compile_pattern(row["pattern"])
            except (ValueError, re.error):
                continue
            fault = "" if row["plugins"] else f"no plugin subscribes to tag {row['tag']}"
            if row["plugins"] and row["case"] == "exact":
                fault = "it matches in its own case only"
            shown = f"{row['plugins'] or row['tag']} {row['pattern']}"
            found = _Rule(shown, pattern, literals(row["pattern"].lower()), fault)
            self._rules.append(found)
        self._by_ending = lru_cache(4096)(self._alike)

    def nearest(self, path: str) -> str:
        """The rule in words: plugin and pattern, and what keeps it from matching where it would."""
        for rule in self._rules:
            if rule.fault and rule.pattern.match(path):
                return f"{rule.shown} ({rule.fault})"
        name = path.rpartition("/")[2]
        for rule in self._rules:
            if rule.pattern.match(name) or any(rule.pattern.match(part) for part in _shorter(name)):
                return rule.shown
        return self._by_ending(re.sub(r"\d+", "0", name.lower())[-80:])

    def _alike(self, name: str) -> str:
        """The rule whose literal part is most like a name, or like the name's ending."""
        ending = name[name.rfind(".") :] if "." in name else name
        best, shown = NEAR, ""
        for rule in self._rules:
            for literal in rule.literals:
                for part in {ending, name}:
                    alike = SequenceMatcher(None, part, literal, autojunk=False)
                    if alike.real_quick_ratio() > best and (ratio := alike.ratio()) > best:
                        best, shown = ratio, rule.shown
        return shown


def _shorter(name: str) -> list[str]:
    """The name without what was put behind or between its extensions: `a.csv.bak`, `a.csv.1`."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 1, -1)]


def literals(pattern: str) -> tuple[str, ...]:
    """What a pattern has besides wildcards: `*.{csv,tsv}` has `.csv` and `.tsv`."""
    pending, found = [pattern], list[str]()
    while pending and len(found) < CHOICES:
        text = pending.pop()
        if choice := re.search(r"\{([^{}]*)\}", text):
            each = choice[1].split(",")[: CHOICES - len(found)]
            pending += [
                f"{text[: choice.start()]}{one}{text[choice.end() :]}" for one in each[::-1]
            ]
        elif group := re.search(r"([@+?*!])\(([^()]*)\)", text):
            first = group[2].split("|")[0] if group[1] in "@+" else ""
            pending.append(f"{text[: group.start()]}{first}{text[group.end() :]}")
        else:
            found.append(re.sub(r"\[[^\]]*\]|[*?]", "", text.rpartition("/")[2]))
    return tuple(dict.fromkeys(filter(None, found)))
