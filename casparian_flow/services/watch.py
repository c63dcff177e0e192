"""Scout inside the daemon: scans on a schedule, and sooner where a watcher heard something.

Events are hints, the scan is the truth. watchdog can lose events without a word, so every source
root is scanned in full again and again, and at once when a watcher lost some or was armed anew.
Each full scan also tells what the watcher should have announced and did not.
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

from casparian_flow.db import roots as db_roots
from casparian_flow.db.access import Ledger
from casparian_flow.errors import LedgerError
from casparian_flow.sections import ScanSettings
from casparian_flow.services.aside import aside
from casparian_flow.services.hints import GRACE_SECONDS, Hints
from casparian_flow.services.root import Root, ScanReport
from casparian_flow.services.scan import scan
from casparian_flow.services.scout import roots
from casparian_flow.services.watcher import WATCHING, Watcher

log = logging.getLogger(__name__)

REST_FACTOR = 10
"""A root whose scan takes long is scanned less often: at most a tenth of the time."""

LOOK_SECONDS = 5.0
"""Pause before the watchers and the list of roots are looked at again, at the most."""


class Watch:
    """Watches every active source root until cancelled.

    Args:
        ledger: where roots are read and findings recorded.
        settings: how often is scanned.
        on_jobs: called after a scan that queued jobs.
    """

    def __init__(self, ledger: Ledger, settings: ScanSettings, on_jobs: Callable[[], None]) -> None:
        self._ledger = ledger
        self._settings = settings
        self._on_jobs = on_jobs
        self._full: dict[int, float] = {}
        """Root id -> when its next full scan is due (monotonic seconds)."""
        self._began: dict[int, float] = {}
        """Root id -> start of its last full scan (seconds since the epoch)."""
        self._hints = Hints()
        self._watchers: dict[int, Watcher] = {}
        self._states: dict[int, str] = {}
        self._rung = True
        self._stop = threading.Event()
        self.last: dict[str, ScanReport] = {}
        """The last full scan of each root, by name."""

    def ring(self) -> None:
        """Read the list of roots again and scan them all in full, now."""
        self._rung = True
        self._hints.wake()

    async def run(self) -> None:
        """Scan what is due; sleep until something is."""
        self._hints.bind(asyncio.get_running_loop())
        # watchdog warns, at length, when a new folder is announced twice; that does no harm.
        warnings.filterwarnings("ignore", "Callback with id", RuntimeWarning)
        try:
            with _overflows(self.ring):
                while True:
                    self._hints.changed.clear()
                    await self._turn()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._pause()):
                            await self._hints.changed.wait()
        finally:
            await asyncio.to_thread(self._close)

    async def _turn(self) -> None:
        rung, self._rung = self._rung, False
        try:
            known = await asyncio.to_thread(roots, self._ledger)
            await aside(self._stop, partial(self._follow, known))
            for root in known:
                if rung or self._full.get(root.id, 0.0) <= time.monotonic():
                    await self._scan(root, None)
                elif hinted := self._hints.due(root.id):
                    await self._scan(root, hinted)
            await self._judge(known)
            await self._tell(known)
        except LedgerError as error:
            log.error("no source root is scanned: %s", error.message)
            await asyncio.sleep(self._settings.rescan_seconds)

    async def _scan(self, root: Root, only: set[bytes] | None) -> None:
        started, began = time.monotonic(), time.time()
        if only is None:
            self._hints.due(root.id, everything=True)
            self._hints.begin(root.id)
        try:
            report = await aside(self._stop, partial(self._look, root, only))
        except LedgerError as error:
            log.error("%s: %s", root.name, error.message)
            self._full[root.id] = time.monotonic() + self._settings.rescan_seconds
            return
        for path in report.unsettled:
            self._hints.add(root.id, path, report.settles_in)
        self._hints.noticed(root.id, report.fresh)
        if report.job_ids:
            self._on_jobs()
        if only is not None:
            return
        before = self.last.get(root.name)
        if report.problem and (before is None or before.problem != report.problem):
            log.warning("%s; nothing is inferred from that", report.problem)
        self.last[root.name] = report
        self._began[root.id] = began
        now = time.monotonic()
        self._full[root.id] = now + max(self._interval(root, report), REST_FACTOR * (now - started))

    def _look(self, root: Root, only: set[bytes] | None) -> ScanReport:
        watcher = self._watchers[root.id]
        heard = watcher.heard(self._began.get(root.id, 0.0), full=only is None)
        return scan(self._ledger, root, only, self._stop, heard=heard)

    def _interval(self, root: Root, report: ScanReport) -> float:
        """Seconds until the next full scan: fewer where the watcher is in doubt."""
        watcher = self._watchers[root.id]
        if watcher.confirm(report.unheard, report.too_deep) and watcher.state == WATCHING:
            return min(GRACE_SECONDS, self._settings.rescan_seconds)
        slow, fast = self._settings.rescan_seconds, self._settings.poll_seconds
        return slow if watcher.state == WATCHING else min(slow, fast)

    async def _judge(self, known: list[Root]) -> None:
        """Count what was noticed and never announced, once an event has had time to come."""
        for root in known:
            if self._watchers[root.id].busy:
                continue
            if missed := self._hints.missed(root.id):
                log.warning("%s: the watcher announced %d files too few", root.name, missed)
                work = partial(db_roots.count_up, root_id=root.id, missed=missed)
                await self._ledger.write_soon(work)

    async def _tell(self, known: list[Root]) -> None:
        """Keep in the ledger how each root is watched."""
        for root in known:
            state = self._watchers[root.id].state
            if self._states.get(root.id) == state:
                continue
            if state != WATCHING:
                log.warning("source root %s is %s", root.name, state)
            work = partial(db_roots.save_scan_state, root_id=root.id, watch=state)
            await self._ledger.write_soon(work)
            self._states[root.id] = state

    def _pause(self) -> float:
        """Seconds until something is due."""
        now = time.monotonic()
        return max(0.0, min([*self._full.values(), *self._hints.times(), now + LOOK_SECONDS]) - now)

    def _follow(self, known: list[Root]) -> None:
        """Watch new roots and not those that were removed or changed; see to the others."""
        current = {root.id: root for root in known}
        for root_id, watcher in list(self._watchers.items()):
            if current.get(root_id) != watcher.root:
                watcher.close()
                del self._watchers[root_id]
                self._full.pop(root_id, None)
                self._states.pop(root_id, None)
                self._hints.due(root_id, everything=True)
        for root in known:
            if root.id not in self._watchers:
                self._watchers[root.id] = Watcher(root, self._hints)
            if self._watchers[root.id].look():
                self._full.pop(root.id, None)

    def _close(self) -> None:
        for watcher in self._watchers.values():
            watcher.close()


@contextlib.contextmanager
def _overflows(react: Callable[[], None]) -> Iterator[None]:
    """watchdog says in its log, and nowhere else, that it lost events: scan everything then."""

    class _Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.warning("the watcher lost events (%s): scanning everything", record.getMessage())
            react()

    ear = _Ear(logging.WARNING)
    logger = logging.getLogger("watchdog")
    logger.addHandler(ear)
    try:
        yield
    finally:
        logger.removeHandler(ear)
