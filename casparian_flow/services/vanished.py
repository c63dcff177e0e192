"""What a scan no longer finds, and whether to believe it.

A lost mount, a share that answers with an empty list or a wrong directory all look like a mass
deletion. Deletions are therefore put together over the whole scan and believed at its end. Many
at once are held: nothing is marked deleted until a person says so, or until they have been
missing for a day. Files that come back meanwhile were never gone, and nothing is loaded again.

What is still on the disk, and passed over since the ignore patterns changed, is no such riddle: it
is marked so at once, however much it is, and is not counted as deleted. Its versions and rows stay.
"""

from __future__ import annotations

import time

from sqlalchemy import Connection

from casparian_flow.db import doubts, files, presence, roots, wiring
from casparian_flow.db.presence import Present
from casparian_flow.services.root import Root

MANY = 100
"""Fewer files than this may vanish at once: an inbox that somebody has tidied up."""

SHARE = 0.2
"""Of the files that were there; a smaller share than this may vanish at once."""

HOLD_SECONDS = 86_400.0
"""After a day a lost mount has been noticed, and what is still missing is believed gone."""


class Vanished:
    """Deletions that one scan of one root has come across.

    Args:
        believe: a person said that they are real, however many.
    """

    def __init__(self, root: Root, *, full: bool, believe: bool) -> None:
        self._root = root
        self._full = full
        self.believe = believe
        self._gone: list[Present] = []
        self._ignored: list[Present] = []
        self._lost: list[bytes] = []
        self._digests: list[tuple[bytes, bytes | None]] = []

    def add(self, gone: list[Present], ignored: list[Present], lost: list[bytes]) -> None:
        """Remember locations that are missing, those now passed over, and directories."""
        self._gone += gone
        self._ignored += ignored
        self._lost += lost

    def when_believed(self, folder: bytes, digest: bytes) -> None:
        """A directory's digest that is true once these deletions are."""
        self._digests.append((folder, digest))

    def settle(self, connection: Connection) -> tuple[int, int, int]:
        """Mark what is believed gone, in the caller's transaction; (gone, held, passed over).

        What is not believed keeps its directories without a digest, so that the next scan
        compares them again.
        """
        root_id = self._root.id
        held_since = self._held_since(connection)
        if self._full:
            held = len(self._gone) if held_since else 0
            roots.save_scan_state(connection, root_id, held=held, held_since=held_since)
        passed = presence.mark_gone(connection, root_id, self._ignored, presence.PASSED_OVER)
        if held_since:
            return 0, len(self._gone), passed
        marked = presence.mark_gone(connection, root_id, self._gone)
        for folder in self._lost:
            presence.forget_directory(connection, root_id, folder)
        files.save_directories(connection, root_id, self._digests)
        doubts.uphold(connection, root_id, [path for path, _ in self._digests])
        if self.believe and marked:
            subject = f"source {self._root.name}"
            wiring.note(connection, "believe-deletions", [subject], gone=marked)
        return marked, 0, passed

    def _held_since(self, connection: Connection) -> float:
        """Since when this many have been missing, in seconds since the epoch; 0: not held."""
        state = roots.scan_state(connection, self._root.id)
        before = state.held if state is not None else 0
        if self.believe or not self._gone:
            return 0.0
        if before and not self._full:
            return float(state.held_since)  # what a full scan has held is not believed by parts
        few = len(self._gone) < MANY
        if few or len(self._gone) < SHARE * presence.count_present(connection, self._root.id):
            return 0.0
        now = time.time()
        since = state.held_since if before and len(self._gone) - before < MANY else now
        # A clock that was set back holds them for another day at the most.
        return 0.0 if now - since > HOLD_SECONDS else float(min(since, now))
