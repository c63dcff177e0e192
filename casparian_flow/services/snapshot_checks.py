"""Care of the snapshot store: what a crash left in it, whether it is whole, and what it holds."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

from casparian_flow.atomic import exclusive
from casparian_flow.db import snapshots as claims
from casparian_flow.db.access import Ledger
from casparian_flow.engine import inbox
from casparian_flow.errors import LedgerError
from casparian_flow.services.snapshots import clear_dead

log = logging.getLogger(__name__)


def sweep(ledger: Ledger) -> None:
    """Bring files and claims together, after a crash or after a person removed files.

    Raises:
        OSError: the store cannot be read or written.
        LedgerError: the ledger cannot be.
    """
    folder = ledger.database.snapshots_folder
    with exclusive(folder / "lock") if folder.is_dir() else contextlib.nullcontext():
        clear_dead(folder)
        claimed = set(ledger.read(claims.every))
        there = {file.name: file for file in folder.glob("??/*")}
        for content_hash in there.keys() - claimed:
            there[content_hash].unlink()
        if lost := sorted(claimed - there.keys()):
            log.warning("%d snapshots are not in %s any more", len(lost), folder)
            ledger.write(partial(claims.forget, hashes=lost))


def problems(ledger: Ledger) -> Iterator[str]:
    """Every snapshot that is not what its name says; reads every byte of the store."""
    try:
        hashes = ledger.read(claims.every)
    except LedgerError as error:
        yield f"the snapshots cannot be checked: {error.message}"
        return
    for content_hash in hashes:
        file = ledger.database.snapshot(content_hash)
        fault = _fault(file, content_hash)
        # What a scan has let go since we began is not missing.
        if fault and ledger.read(partial(claims.is_claimed, content_hash=content_hash)):
            yield (
                f"snapshot {file} {fault}; jobs of that content need its file instead "
                "(remove the snapshot, and start the daemon)"
            )


def _fault(file: Path, content_hash: str) -> str:
    try:
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if digest == content_hash else f"is damaged (its content is {digest[:12]})"


def report(ledger: Ledger) -> dict[str, Any]:
    """What is in force and what the store holds, for `casparian status`.

    Whether blocks can be shared is tried, with the files themselves: filesystems, their settings
    and mounts all have a say in it.
    """
    number, size = ledger.read(claims.held)
    fault = ledger.read(claims.fault)
    return {
        "mode": ledger.database.snapshots.mode,
        "store": str(ledger.database.snapshots_folder),
        "shares": _shares(ledger),
        "sources": {
            sample.name: _shares(ledger, os.path.join(os.fsencode(sample.root_path), sample.path))
            for sample in ledger.read(claims.samples)
        },
        "snapshots": number,
        "bytes": size,
        "keep_bytes": ledger.database.snapshots.keep_bytes,
        "unprotected_jobs": ledger.read(claims.unprotected),
        "fault": f"{fault.files} contents since {fault.since[:16]}: {fault.words}" if fault else "",
    }


def _shares(ledger: Ledger, sample: bytes = b"") -> bool | None:
    """Whether a file's blocks can be shared with the store; None where that cannot be tried.

    Args:
        sample: the file; without one, a scratch file beside the store.
    """
    folder = ledger.database.state_folder
    with contextlib.suppress(OSError), contextlib.ExitStack() as files:
        target, other = (files.enter_context(_scratch_file(folder)) for _ in range(2))
        if not sample:
            other.write(b"shared?")
            return inbox.clone(other, target)
        source = os.fdopen(inbox.open_any(sample, inbox.OPEN), "rb", buffering=0)
        return inbox.clone(files.enter_context(source), target)
    return None


def _scratch_file(folder: Path) -> FileIO:
    return tempfile.TemporaryFile(dir=folder, buffering=0)
