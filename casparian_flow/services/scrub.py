"""Scrub: every file is read again, however little its stamps say.

A store through mmap into a page that is dirty already, a disk that rots, or a clock that has been
set back to the very tick of an earlier edit leave a file's stamps as they were. Only reading
finds that. A scrub goes through the locations in order of their ids, notes how far it has come,
and reads no more than it may in a second; the scans go on beside it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import files, roots, scrubs
from casparian_flow.db.access import Ledger
from casparian_flow.db.routing import Routing
from casparian_flow.db.scrubs import Claim
from casparian_flow.errors import LedgerError
from casparian_flow.sections import ScanSettings
from casparian_flow.services import walk
from casparian_flow.services.aside import aside
from casparian_flow.services.look import hash_file
from casparian_flow.services.root import Root

log = logging.getLogger(__name__)

LOOKS = 5
"""Two readings in a row must agree before other bytes are believed; readings at the most."""

LOOK_SECONDS = 60.0
"""Pause before it is asked again whether a scrub is due."""


@dataclass
class ScrubReport:
    """What a scrub found."""

    source: str
    files: int = 0
    """Files read."""
    hidden: list[str] = field(default_factory=list)
    """Files with other bytes than their version's, under the same stamps."""
    unreadable: list[str] = field(default_factory=list)
    """`path: why`, for each file that could not be read."""
    job_ids: list[int] = field(default_factory=list)
    """Jobs queued."""
    finished: bool = False
    """Whether it has come to the end."""


def scrub(
    ledger: Ledger,
    root: Root,
    stop: threading.Event | None = None,
    *,
    bytes_per_second: float | None = None,
    anew: bool = False,
) -> ScrubReport:
    """Read the present files of a root again, from where the last scrub of it has stopped.

    Args:
        stop: ends it when set; it goes on from there another time.
        bytes_per_second: None for as fast as it can.
        anew: begin with the first file.

    Raises:
        LedgerError: the ledger could not be written; what was found before is recorded.
    """
    return _Scrub(ledger, root, stop or threading.Event(), bytes_per_second).run(anew)


class _Scrub:
    """The state of one scrub of one root."""

    def __init__(
        self, ledger: Ledger, root: Root, stop: threading.Event, bytes_per_second: float | None
    ) -> None:
        self.ledger = ledger
        self.root = root
        self.stop = stop
        self.bytes_per_second = bytes_per_second
        self.report = ScrubReport(root.name)

    def run(self, anew: bool) -> ScrubReport:
        state = self.ledger.read(lambda c: roots.scan_state(c, self.root.id))
        after = 0 if anew or state is None else state.scrub_after
        try:
            descriptor = os.open(self.root.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            self.report.unreadable.append(f"{self.root.name}: {error.strerror}")
            return self.report
        try:
            while claims := self._next(after):
                for claim in claims:
                    self._read_again(descriptor, claim)
                    if self.stop.is_set():
                        return self.report
                    after = claim.location_id
                self._note(scrub_after=after)
                crashpoint("scrub.noted")
        finally:
            os.close(descriptor)
        self._note(scrub_after=0, scrubbed=time.time())
        self.report.finished = True
        return self.report

    def _next(self, after: int) -> list[Claim]:
        return self.ledger.read(lambda c: scrubs.batch(c, self.root.id, after))

    def _note(self, **values: float) -> None:
        self.ledger.write(lambda c: roots.save_scan_state(c, self.root.id, **values))

    def _read_again(self, root: int, claim: Claim) -> None:
        """Compare one file with its version; a file with other stamps is the next scan's."""
        folder, _, name = claim.path.rpartition(b"/")
        try:
            descriptor = walk.open_folder(root, folder)
            try:
                found = self._at_rest(name, descriptor, claim)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            return
        except OSError as error:
            self.report.unreadable.append(f"{self._subject(claim)}: {error.strerror}")
            return
        self.report.files += 1
        if found is not None:
            self._record(claim, found)

    def _at_rest(self, name: bytes, folder: int, claim: Claim) -> str | None:
        """The hash of other bytes than the version's; None where there are none, or not at rest.

        Stamps that say nothing do not say whether somebody is still writing either: the bytes
        are read until two readings, a settle window apart, agree.
        """
        last = claim.content_hash
        for _ in range(LOOKS):
            _forget_cached(name, folder)
            content = hash_file(name, folder, self.stop, self._pace)
            if content is None or content[1] != claim.stat or content[0] == claim.content_hash:
                return None
            if content[0] == last:
                return last
            last = content[0]
            if self.stop.wait(self.root.settle_seconds):
                return None
        return None

    def _pace(self, length: int) -> None:
        if self.bytes_per_second is not None:
            self.stop.wait(length / self.bytes_per_second)

    def _record(self, claim: Claim, found: str) -> None:
        subject = f"file {self._subject(claim)}"
        routing = self.ledger.read(Routing)
        work = partial(
            scrubs.record, root_id=self.root.id, subject=subject, claim=claim, found=found,
            routing=routing,
        )  # fmt: skip
        recorded = self.ledger.write(work)
        crashpoint("scrub.recorded")
        if recorded.versions:
            self.report.hidden.append(self._subject(claim))
            self.report.job_ids += recorded.job_ids

    def _subject(self, claim: Claim) -> str:
        return f"{self.root.name}/{files.display(claim.path)}"


def _forget_cached(name: bytes, folder: int) -> None:
    """Have what is clean in memory read from the disk again: that is what rots."""
    if not hasattr(os, "posix_fadvise"):
        return
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=folder)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


class Scrubber:
    """Scrubs every active source root when its time has come, until cancelled.

    Args:
        on_jobs: called after a scrub that queued jobs.
    """

    def __init__(self, ledger: Ledger, settings: ScanSettings, on_jobs: Callable[[], None]) -> None:
        self._ledger = ledger
        self._settings = settings
        self._on_jobs = on_jobs
        self._stop = threading.Event()

    async def run(self) -> None:
        """Scrub what is due, one root at a time; with `scrub_days = 0` there is nothing to do."""
        while self._settings.scrub_days:
            try:
                for root in await asyncio.to_thread(self._due):
                    await self._scrub(root)
            except LedgerError as error:
                log.error("no scrub: %s", error.message)
            await asyncio.sleep(LOOK_SECONDS)

    async def _scrub(self, root: Root) -> None:
        pace = float(self._settings.scrub_bytes_per_second)
        work = partial(scrub, self._ledger, root, self._stop, bytes_per_second=pace)
        report = await aside(self._stop, work)
        for words in report.hidden:
            log.warning("%s changed, and its stamps did not show it", words)
        for words in report.unreadable:
            log.warning("scrub: %s", words)
        if report.job_ids:
            self._on_jobs()

    def _due(self) -> list[Root]:
        found = [Root.of(row) for row in self._ledger.read(roots.active_roots)]
        return [root for root in found if self._is_due(root)]

    def _is_due(self, root: Root) -> bool:
        state = self._ledger.read(lambda c: roots.scan_state(c, root.id))
        if state is None or not state.finished or state.problem:
            return False
        # A time in the future is of a clock that has been set back since.
        rested = 0 <= time.time() - state.scrubbed < self._settings.scrub_days * 86_400
        return bool(state.scrub_after) or not rested
