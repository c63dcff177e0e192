"""Scout: finds what changed under a source root and records it, with its jobs, in one transaction.

A scan compares the stat identity of every file with the ledger's, a directory's digest first.
Where it differs the file is hashed, and a new hash is a new version. Events from a watcher only
choose which directories are looked at sooner.

Promise: every content that is at rest at a scan becomes a version. A file that changed less than
the settle window ago is not at rest; a file whose stamps are younger than the clock can tell is
hashed again at the next scan (git's racy rule). docs/detection.md says what cannot be seen.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from casparian_flow.db import roots as db_roots
from casparian_flow.db.access import Ledger
from casparian_flow.db.models import SourceRoot
from casparian_flow.errors import SourceError
from casparian_flow.services import inventory
from casparian_flow.services.root import Root, ScanReport
from casparian_flow.services.scan import scan

SETTLE_ROUNDS = 5
"""Looks a one-shot scan spends on files that keep changing."""


class Scout:
    """Scans source roots on behalf of a script that has a Session."""

    def __init__(self, db: Session) -> None:
        """Bind to a session over `get_engine(...)`."""
        self._db = db

    def scan_source(self, root: SourceRoot) -> ScanReport:
        """Scan one root: when this returns, versions are recorded and their jobs queued.

        It works with or without a daemon running, and waits for fresh files to settle. What the
        session has pending is committed first, and its objects are expired after, so that they
        show what was found.

        Raises:
            SourceError: the root is missing or unreadable; nothing was changed.
            LedgerError: the ledger could not be written; finished batches stay recorded.
        """
        self._db.add(root)
        self._db.commit()
        known = Root.of(root)
        self._db.commit()
        engine = self._db.get_bind()
        assert isinstance(engine, Engine)
        with Ledger(engine) as ledger:
            inventory.before_scan(ledger.database, ledger)
            report = scan_until_settled(ledger, known)
        self._db.expire_all()
        if report.problem:
            raise SourceError(report.problem, "nothing was changed; mount or restore it, then scan")
        return report


def scan_until_settled(
    ledger: Ledger, root: Root, stop: threading.Event | None = None, *, believe: bool = False
) -> ScanReport:
    """A full scan, then one shared wait and another look for what was not at rest.

    Args:
        believe: mark what is missing as deleted, however much it is (`services.vanished`).
    """
    stop = stop or threading.Event()
    report = scan(ledger, root, believe=believe)
    for _ in range(SETTLE_ROUNDS):
        if not report.unsettled or report.problem or stop.wait(report.settles_in):
            break
        again = scan(ledger, root, only=report.unsettled)
        report.versions += again.versions
        report.job_ids += again.job_ids
        report.gone += again.gone
        report.unreadable = list(dict.fromkeys([*report.unreadable, *again.unreadable]))
        report.unsettled, report.settles_in = again.unsettled, again.settles_in
        report.writing = again.writing
        report.problem = again.problem
        left = len(again.unsettled)
        ledger.write(partial(db_roots.save_scan_state, root_id=root.id, unsettled=left))
    return report


def roots(ledger: Ledger, names: Sequence[str] = ()) -> list[Root]:
    """The active source roots, or those named.

    Raises:
        SourceError: a name that is no active root.
    """
    found = [Root.of(row) for row in ledger.read(db_roots.active_roots)]
    unknown = set(names) - {root.name for root in found}
    if unknown:
        known = ", ".join(root.name for root in found) or "none"
        raise SourceError(
            f"no active source root named {', '.join(sorted(unknown))} (there are: {known})",
            "casparian source list",
        )
    return [root for root in found if not names or root.name in names]
