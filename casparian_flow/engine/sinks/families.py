"""Files of another kind: an output whose columns share no name with those its topic has.

Such rows are stored, since nothing of them is wrong; that they are probably another table is said
in the attempt's log, in a line that begins with `NOTE`. Outputs that this process has staged count
as the topic's too: files of several kinds are often worked at once, before any is published.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Sequence

from casparian_flow.engine.sinks.base import LINEAGE

NOTE = "families: "
"""Begins the line."""

_TOPICS = 1000
_SHOWN = 8
_lock = threading.Lock()
_staged: OrderedDict[tuple[str, str], Counter[str]] = OrderedDict()
"""Location and topic -> folded names of the columns that this process has staged for it, and how
often; of the topics that came last."""


def note(
    location: str, topic: str, names: Sequence[str], known: Callable[[], Collection[str]],
    settles: str,
) -> str:  # fmt: skip
    """Count an output's columns as its topic's, and say whether they are of another kind.

    Args:
        known: asks the sink for the topic's columns; only called where no other word is enough.
        settles: what to type so that such files get a topic of their own.

    Returns:
        A line for the log; empty where there is nothing to say.
    """
    mine = {name.casefold() for name in names}
    with _lock:
        counts = _staged.setdefault((location, topic), Counter())
        before = sorted(counts)
        counts.update(mine)
        _staged.move_to_end((location, topic))
        while len(_staged) > _TOPICS:
            _staged.popitem(last=False)
    if not mine.isdisjoint(before):
        return ""
    there = [name for name in known() if name not in LINEAGE]
    if not mine.isdisjoint(name.casefold() for name in there) or not (there or before):
        return ""
    words = f"; for a topic of their own: {settles}" if settles else ""
    return (
        f"{NOTE}topic {topic!r} has the columns {_some(there or before)}; this file has none of "
        f"them, but {_some(names)}{words}"
    )


def forget(location: str, topic: str, names: Sequence[str]) -> None:
    """Take back what `note` counted, of an output that came to nothing."""
    with _lock:
        counts = _staged.get((location, topic), Counter())
        counts.subtract({name.casefold() for name in names})
        for name in [name for name, count in counts.items() if count <= 0]:
            del counts[name]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
