"""Confirming deletions: whether what a scan did not find is deleted.

A lost mount, a share that lists nothing or a wrong directory all look like a mass deletion. So a
scan collects what is missing and decides at its end. Many at once are held: they are not marked
deleted until a user confirms it, or until they have been missing for a day. Held files that come
back were never gone, and are not loaded again.

Files that are elsewhere now have moved (`db.moves`): they are marked gone at once, however many.
Files that are still on the disk, and passed over since the ignore patterns changed, are marked so
at once, however many, and do not count as deleted. Their versions and rows stay.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from casparian_flow.db import moves, versions, visibility
from casparian_flow.db.access import Connection
from casparian_flow.db.audit import Event
from casparian_flow.db.states import PASSED_OVER
from casparian_flow.db.versions import NewDigest, PresentLocation, Sighting, Stat
from casparian_flow.db.visibility import Change, Scope

ACTOR = "scout"

MANY = 100
"""Fewer missing files than this are deletions: somebody has tidied up an inbox."""

SHARE = 0.2
"""Of the present files; a smaller share than this that is missing are deletions."""

HOLD_SECONDS = 86_400.0
"""After a day somebody has noticed a lost mount, so what is still missing is deleted."""


class Settled(NamedTuple):
    """What became of what a scan found missing: numbers of locations."""

    gone: int = 0
    """Marked deleted."""
    moved: int = 0
    """Whose files are elsewhere now, in this scan or an earlier one of any root."""
    held: int = 0
    """Not marked yet."""
    passed_over: int = 0
    retracted: int = 0
    """Versions that are retracted since their files were, where they moved from."""
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
        self._unsettled: set[tuple[int, ...]] = set()
        self.again: list[bytes] = []
        """After `settle`: directories to be scanned again for files that are on their way."""

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

    def is_due(self, connection: Connection) -> bool:
        """Whether anything is missing or passed over now, or gone files are to be looked for."""
        found = (self._gone, self._ignored, self._lost, self._hidden, self._digests)
        return any(found) or moves.is_due(visibility.query_of(connection))

    def may_move(self, stat: Stat) -> None:
        """Collect a file that is not settled: what is missing may be on its way there."""
        self._unsettled.add((stat.device, stat.inode, stat.size, stat.mtime_ns))

    def follow(self, connection: Connection, found: Sequence[Sighting]) -> Settled:
        """Record what has moved of files that were just recorded, in the same transaction."""
        query = visibility.query_of(connection)
        inodes = {each.stat.inode for each in found if each.content_hash}
        moved = moves.follow(query, inodes, is_there, born)
        return Settled(
            moved=moved.moved, retracted=moved.retracted, change=_seen(connection, moved)
        )

    def settle(self, connection: Connection) -> Settled:
        """Mark confirmed deletions, in the caller's transaction.

        Directories with files that are held or on their way keep no digest, so that the next scan
        compares them again.
        """
        root_id = self._root_id
        missing = {each.location_id for each in self._gone}
        query = visibility.query_of(connection)
        found = moves.find(query, missing, born) if missing or moves.is_due(query) else []
        elsewhere = {move.location_id for move in found}
        waits = moves.on_the_way(query, missing - elsewhere, self._unsettled)
        lost = {each for each in missing if each not in elsewhere and each not in waits}
        held_since = self._held_since(connection, len(lost))
        held = len(lost) if held_since else 0
        if self._full:
            versions.save_scan_state(connection, root_id, held=held, held_since=held_since)
        left = [each for each in self._gone if each.location_id in elsewhere]
        moves.leave(query, [(each.location_id, each.inode, each.ctime_ns) for each in left])
        gone = [each for each in self._gone if each.location_id in lost and not held]
        marked = versions.mark_gone(connection, root_id, gone)
        moved = moves.record(query, found)
        moves.looked_for(query)
        # Where one of these was a candidate, the next scan looks again.
        passed = versions.mark_gone(connection, root_id, self._ignored, PASSED_OVER).locations
        for folder in self._hidden:
            versions.drop_digests(connection, root_id, folder)
        change = marked.change.plus(_seen(connection, moved))
        if held or waits:
            # A lost folder that comes back as it was must be compared all the same.
            folders = {each.path.rpartition(b"/")[0] for each in (*left, *gone)}
            versions.invalidate_directories(connection, root_id, folders)
        else:
            for folder in self._lost:
                versions.drop_digests(connection, root_id, folder)
            versions.save_directories(connection, root_id, self._digests)
        self.again = list(self._digests) if waits else []
        return Settled(marked.locations, moved.moved, held, passed, moved.retracted, change)

    def events(self, settled: Settled) -> list[Event]:
        """What the audit is to say of what was settled: that a person believed deletions, and where
        files moved to."""
        events = []
        if self.believe and settled.gone:
            events.append(
                Event("believe-deletions", f"source {self._name}", {"gone": settled.gone})
            )
        if settled.moved:
            detail = {"files": settled.moved, "retracted": settled.retracted}
            events.append(Event("move", f"source {self._name}", detail, ACTOR))
        return events

    def _held_since(self, connection: Connection, lost: int) -> float:
        """Since when missing files are held, seconds since the epoch; 0: they are not.

        Args:
            lost: how many are missing, and not found elsewhere.
        """
        state = versions.scan_state(connection, self._root_id)
        before = state.held if state is not None else 0
        if self.believe or not lost:
            return 0.0
        if before and not self._full:
            return float(state.held_since)  # a partial scan does not confirm what a full scan holds
        if lost < MANY or lost < SHARE * versions.count_present(connection, self._root_id):
            return 0.0
        now = time.time()
        since = state.held_since if before and lost - before < MANY else now
        # A clock that was set back holds them for another day at most.
        return 0.0 if now - since > HOLD_SECONDS else float(min(since, now))


def _seen(connection: Connection, moved: moves.Recorded) -> Change:
    return visibility.refresh(connection, Scope(moved.places)) if moved.places else Change()


def is_there(path: bytes) -> bool:
    """Whether there is a file at a path, or may be: it cannot be told."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def born(path: bytes) -> int | None:
    """When a file was made, in nanoseconds since the epoch; None where nothing says so."""
    try:
        made = getattr(os.stat(path, follow_symlinks=False), "st_birthtime", None)
    except OSError:
        return None
    statx = getattr(ctypes.CDLL(None), "statx", None) if sys.platform == "linux" else None
    if statx is None:
        return None if made is None else int(made * 1e9)
    here, nofollow, wanted, found = -100, 0x100, 0x800, ctypes.create_string_buffer(256)
    if statx(here, path, nofollow, wanted, found) != 0:
        return None
    (has,) = struct.unpack_from("=I", found, 0)
    seconds, nanoseconds = struct.unpack_from("=qI", found, 80)  # stx_btime, after stx_atime
    return int(seconds) * 10**9 + int(nanoseconds) if has & wanted else None
