"""Scout inside the daemon: one loop that scans each source root when an event or its schedule says.

Events are hints, the scan is the truth. watchdog can lose events without an error, so every root
is also scanned in full on a schedule, and at once when its watcher lost events or was started anew
(`services.watcher`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial

from casparian_flow.config import ScanSettings
from casparian_flow.db import versions
from casparian_flow.db.access import Ledger
from casparian_flow.errors import LedgerError
from casparian_flow.services.hints import FolderSchedule
from casparian_flow.services.scan import Root, ScanReport, scan
from casparian_flow.services.scout import roots, run_in_thread
from casparian_flow.services.watcher import WATCHING, Watcher

log = logging.getLogger(__name__)

CHECK_SECONDS = 5.0
"""The list of roots and the watchers are checked at least this often."""

REST_FACTOR = 10
"""A root is scanned in full for at most a tenth of the time, however long its scan takes."""


class Watch:
    """Watches and scans every active source root until cancelled.

    Args:
        ledger: where roots are read and findings recorded.
        settings: how often to scan.
        on_jobs: called after a scan that queued jobs.
        on_change: called after a scan since which readers are to see something else.
    """

    def __init__(
        self,
        ledger: Ledger,
        settings: ScanSettings,
        on_jobs: Callable[[], None],
        on_change: Callable[[], None],
    ) -> None:
        self._ledger = ledger
        self._settings = settings
        self._on_jobs = on_jobs
        self._on_change = on_change
        self._folders = FolderSchedule()
        self._watchers: dict[int, Watcher] = {}
        self._states: dict[int, str] = {}
        """Root id -> how it is watched, as the ledger has it."""
        self._next_scans: dict[int, float] = {}
        """Root id -> when its next full scan is due (monotonic seconds)."""
        self._rung = True
        self._stop = threading.Event()
        self.last: dict[str, ScanReport] = {}
        """The last full scan of each root, by name."""

    def ring(self) -> None:
        """Read the list of roots again and scan them all in full, now."""
        self._rung = True
        self._folders.wake()

    async def run(self) -> None:
        """Watch and scan until cancelled."""
        self._folders.bind(asyncio.get_running_loop())
        # watchdog warns, at length, when a new folder is announced twice; that does no harm.
        warnings.filterwarnings("ignore", "Callback with id", RuntimeWarning)
        try:
            with _overflows(self.ring):
                await self._loop()
        finally:
            await asyncio.to_thread(self._close)

    async def _loop(self) -> None:
        """Read the list of roots, scan those that are due, wait for a hint or the schedule."""
        while True:
            self._folders.changed.clear()
            try:
                active = await asyncio.to_thread(roots, self._ledger)
                await run_in_thread(self._stop, partial(self._follow, active))
                for root, folders in self._due(active):
                    if folders is None:
                        await self._scan_in_full(root)
                    else:
                        await self._scan(root, folders)
                await self._save_states(active)
            except LedgerError as error:
                log.error("cannot scan the source roots: %s", error.message)
                await asyncio.sleep(self._settings.rescan_seconds)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause()):
                    await self._folders.changed.wait()

    def _due(self, active: list[Root]) -> Iterator[tuple[Root, set[bytes] | None]]:
        """Each root that is due, with the folders to scan; None: all of it."""
        # Not before the roots are read: an error there would lose the ring.
        rung, self._rung = self._rung, False
        for root in active:
            if rung or self._next_scans.get(root.id, 0.0) <= time.monotonic():
                yield root, None
            elif folders := self._folders.due(root.id):
                yield root, folders

    def _follow(self, active: list[Root]) -> None:
        """Start watchers of new roots, stop those of roots that were removed or changed, and start
        those anew that have failed."""
        current = {root.id: root for root in active}
        for root_id, watcher in list(self._watchers.items()):
            if current.get(root_id) != watcher.root:
                watcher.close()
                del self._watchers[root_id]
                self._next_scans.pop(root_id, None)
                self._states.pop(root_id, None)
                self._folders.clear(root_id)
        for root in active:
            if root.id not in self._watchers:
                self._watchers[root.id] = Watcher(root, self._on_event)
            if self._watchers[root.id].ensure_running():
                self._next_scans.pop(root.id, None)

    def _on_event(self, root: Root, folder: bytes) -> None:
        """Called on the watchers' threads."""
        self._folders.add(root.id, folder, root.settle_seconds)

    async def _scan_in_full(self, root: Root) -> None:
        """Scan all of a root, and set when it is scanned in full again."""
        started = time.monotonic()
        self._folders.clear(root.id)
        report = await self._scan(root, None)
        if report is None:
            return
        before = self.last.get(root.name)
        if report.problem and (before is None or before.problem != report.problem):
            log.warning("%s; its files count as unchanged until it is back", report.problem)
        self.last[root.name] = report
        now = time.monotonic()
        rest = max(self._interval(self._watchers[root.id].state), REST_FACTOR * (now - started))
        self._next_scans[root.id] = now + rest

    async def _scan(self, root: Root, folders: set[bytes] | None) -> ScanReport | None:
        """Scan these folders of a root, or all of it; None where the ledger failed.

        Folders with files that are still being written are due again once the files may be at rest.
        """
        try:
            work = partial(scan, self._ledger, root, folders, self._stop)
            report = await run_in_thread(self._stop, work)
        except LedgerError as error:
            log.error("%s: %s", root.name, error.message)
            self._next_scans[root.id] = time.monotonic() + self._settings.rescan_seconds
            return None
        for path in report.unsettled:
            self._folders.add(root.id, path, report.settles_in)
        if report.job_ids:
            self._on_jobs()
        if report.change.any:
            self._on_change()
        return report

    def _interval(self, state: str) -> float:
        """Seconds until the next full scan: fewer where events cannot be relied on.

        Args:
            state: the watcher's.
        """
        slow, fast = self._settings.rescan_seconds, self._settings.poll_seconds
        return slow if state == WATCHING else min(slow, fast)

    async def _save_states(self, active: list[Root]) -> None:
        """Write into the ledger how each root is watched, where that has changed."""
        for root in active:
            state = self._watchers[root.id].state
            if self._states.get(root.id) == state:
                continue
            if state != WATCHING:
                log.warning("source root %s is %s", root.name, state)
            work = partial(versions.save_scan_state, root_id=root.id, watch=state)
            await self._ledger.write_soon(work)
            self._states[root.id] = state

    def _pause(self) -> float:
        """Seconds until something is due."""
        now = time.monotonic()
        times = [*self._next_scans.values(), *self._folders.times(), now + CHECK_SECONDS]
        return max(0.0, min(times) - now)

    def _close(self) -> None:
        for watcher in self._watchers.values():
            watcher.close()


@contextlib.contextmanager
def _overflows(react: Callable[[], None]) -> Iterator[None]:
    """Call `react` when watchdog has lost events.

    It only logs that: as `Inotify queue overflowed`, beside other warnings, or as an error where it
    cannot watch directories again after one.
    """

    class _Overflow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if record.levelno >= logging.ERROR or "overflow" in message.lower():
                log.warning("file events were lost (%s): scanning everything", message)
                react()

    handler = _Overflow(logging.WARNING)
    logger = logging.getLogger("watchdog")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
