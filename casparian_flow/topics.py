"""What the name of a topic says: one that ends in `_rejects` has what could not be read."""

from __future__ import annotations

from collections.abc import Collection

SUFFIX = "_rejects"


def rejects(topics: Collection[str]) -> set[str]:
    """The topics of rejects among those of one plugin.

    A plugin without any other topic has none: what it makes is data, whatever it is called.
    """
    found = {topic for topic in topics if topic.endswith(SUFFIX)}
    return found if len(found) < len(set(topics)) else set()


def data_of(reject: str, topics: Collection[str]) -> set[str]:
    """The topics of data that a topic of rejects belongs to: the one it is named after, else every
    one of the plugin."""
    own = reject.removesuffix(SUFFIX)
    return {own} if own in topics else set(topics) - rejects(topics)
