"""Confirming deletions: whether what a scan did not find is deleted.

A lost mount, a share that lists nothing or a wrong directory all look like a mass deletion. So a
scan collects what is missing and decides at its end. Many at once are held: they are not marked
deleted until a user confirms it, or until they have been missing for a day. Held files that come
back were never gone, and are not loaded again.

Files that are still on the disk, and passed over since the ignore patterns changed, are marked so
at once, however many, and do not count as deleted. Their versions and rows stay.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from casparian_flow.db import versions
from casparian_flow.db.access import Connection
from casparian_flow.db.audit import Event
from casparian_flow.db.states import PASSED_OVER
from casparian_flow.db.versions import NewDigest, PresentLocation
from casparian_flow.db.visibility import Change

MANY = 100
"""Fewer missing files than this are deletions: somebody has tidied up an inbox."""

SHARE = 0.2
"""Of the present files; a smaller share than this that is missing are deletions."""

HOLD_SECONDS = 86_400.0
"""After a day somebody has noticed a lost mount, so what is still missing is deleted."""


class Settled(NamedTuple):
    """What became of what a scan found missing: numbers of locations."""

    gone: int
    """Marked deleted."""
    held: int
    """Not marked yet."""
    passed_over: int
    change: Change = Change()
    """What readers see since then."""


class Vanished:
    """What one scan of one root found missing.

    Args:
        root_id: the source root's id, and its `name`.
        full: whether the scan is a full one.
        believe: a user confirmed that the files are deleted, however many.
    """

    def __init__(self, root_id: int, name: str, *, full: bool, believe: bool) -> None:
        self._root_id = root_id
        self._name = name
        self._full = full
        self.believe = believe
        self._gone: list[PresentLocation] = []
        self._ignored: list[PresentLocation] = []
        self._lost: list[bytes] = []
        self._hidden: list[bytes] = []
        self._digests: dict[bytes, NewDigest] = {}

    def add(
        self,
        gone: list[PresentLocation],
        ignored: list[PresentLocation],
        lost: list[bytes],
        hidden: list[bytes],
    ) -> None:
        """Collect missing locations and those now passed over; then such directories."""
        self._gone += gone
        self._ignored += ignored
        self._lost += lost
        self._hidden += hidden

    def when_believed(self, folder: bytes, digest: NewDigest) -> None:
        """Save this digest of a directory if the deletions are confirmed."""
        self._digests[folder] = digest

    @property
    def found(self) -> bool:
        """Whether anything is missing, or is passed over now."""
        found = (self._gone, self._ignored, self._lost, self._hidden, self._digests)
        return any(found)

    def settle(self, connection: Connection) -> Settled:
        """Mark confirmed deletions, in the caller's transaction.

        Directories with held files keep no digest, so that the next scan compares them again.
        """
        root_id = self._root_id
        held_since = self._held_since(connection)
        if self._full:
            held = len(self._gone) if held_since else 0
            versions.save_scan_state(connection, root_id, held=held, held_since=held_since)
        passed = versions.mark_gone(connection, root_id, self._ignored, PASSED_OVER).locations
        for folder in self._hidden:
            versions.drop_digests(connection, root_id, folder)
        if held_since:
            return Settled(0, len(self._gone), passed)
        marked = versions.mark_gone(connection, root_id, self._gone)
        for folder in self._lost:
            versions.drop_digests(connection, root_id, folder)
        versions.save_directories(connection, root_id, self._digests)
        return Settled(marked.locations, 0, passed, marked.change)

    def events(self, settled: Settled) -> list[Event]:
        """What the audit is to say of what was settled: that a person believed deletions."""
        if not (self.believe and settled.gone):
            return []
        return [Event("believe-deletions", f"source {self._name}", {"gone": settled.gone})]

    def _held_since(self, connection: Connection) -> float:
        """Since when the missing files are held, seconds since the epoch; 0: they are not."""
        state = versions.scan_state(connection, self._root_id)
        before = state.held if state is not None else 0
        if self.believe or not self._gone:
            return 0.0
        if before and not self._full:
            return float(state.held_since)  # a partial scan does not confirm what a full scan holds
        few = len(self._gone) < MANY
        if few or len(self._gone) < SHARE * versions.count_present(connection, self._root_id):
            return 0.0
        now = time.time()
        since = state.held_since if before and len(self._gone) - before < MANY else now
        # A clock that was set back holds them for another day at most.
        return 0.0 if now - since > HOLD_SECONDS else float(min(since, now))
