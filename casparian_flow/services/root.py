"""A source root as a scan takes it, and what a scan says of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Root(NamedTuple):
    """A source root, free of the ORM."""

    id: int
    path: str
    name: str
    ignore: str
    settle_seconds: float
    done_file: str = ""
    min_age_seconds: float = 0.0

    @classmethod
    def of(cls, row: Any) -> Root:
        """From a `SourceRoot`, or a row of its table."""
        return cls(*(getattr(row, name) for name in cls._fields))


@dataclass
class ScanReport:
    """What a scan found."""

    source: str
    files: int = 0
    """Files looked at, unchanged ones among them."""
    versions: int = 0
    """New versions recorded."""
    job_ids: list[int] = field(default_factory=list)
    """Jobs queued."""
    gone: int = 0
    """Locations marked deleted."""
    held: int = 0
    """Locations that are missing, so many at once that nothing is inferred from it yet."""
    passed_over: int = 0
    """Known locations that are still on the disk, and that scans pass over from now on."""
    waiting: int = 0
    """Files that lack their done file or their minimum age."""
    unreadable: list[str] = field(default_factory=list)
    """`path: why`, for each file or directory that could not be read."""
    unsettled: set[bytes] = field(default_factory=set)
    """Directories with files that were not at rest, or lost a race with another scan."""
    writing: dict[bytes, float] = field(default_factory=dict)
    """Files that were not at rest, and when that was first seen, seconds since the epoch."""
    settles_in: float = 0.0
    """Seconds until all of those could be at rest."""
    problem: str = ""
    """Why the root is frozen; nothing is inferred from a frozen root."""
    fresh: list[bytes] = field(default_factory=list)
    """Files that differ from the ledger, and changed when the watcher had to announce it."""
    unheard: set[int] = field(default_factory=set)
    """Inodes of the directories that the watcher does not watch, and could."""
    too_deep: int = 0
    """Directories whose path is too long for any watcher."""


@dataclass(frozen=True)
class Heard:
    """What a scan needs to know of the watcher to tell what it has missed."""

    since: float
    """When it was armed, seconds since the epoch."""
    inodes: frozenset[int] | None
    """Of the directories it watches; None where the platform does not tell, or nobody asks."""
