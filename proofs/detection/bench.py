"""What the proofs of detection share: a scratch ledger, filesystems to try, what is recorded."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import select

from casparian_flow.db.access import Ledger, open_ledger
from casparian_flow.db.models import FileLocation, FileVersion
from casparian_flow.services.scan import Root, scan
from tests import disks
from tests.conftest import write_config
from tests.factories import add_root

FILESYSTEMS = {
    "ext4, 256-byte inodes": ["mkfs.ext4", "-q", "-I", "256"],
    "ext4, 128-byte inodes": ["mkfs.ext4", "-q", "-I", "128"],
    "tmpfs": [],
}


MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""Images and ledgers are here, so that the disk's speed is no part of a proof."""


PAUSE_SECONDS = 0.2
"""Between two scans: the time is the editors' and writers'."""


class Scratch(NamedTuple):
    """A source root on the filesystem under test, and a ledger elsewhere."""

    ledger: Ledger
    root: Root
    folder: Path
    beside: Path
    """A folder on the same filesystem, outside the root."""


@contextlib.contextmanager
def mounted(kind: str, megabytes: int = 512) -> Iterator[Path]:
    """A fresh filesystem of this kind.

    Raises:
        PermissionError: this process may not mount.
    """
    with tempfile.TemporaryDirectory(prefix="casparian-detection-", dir=MEMORY) as base:
        options: list[str | Path] = [*disks.tmpfs()]
        if mkfs := FILESYSTEMS[kind]:
            image = Path(base) / "image"
            disks.make(image, megabytes << 20, *mkfs)
            options = ["-o", "loop", image]
        with disks.mounted(Path(base) / "mounted", *options) as place:
            yield place


@contextlib.contextmanager
def scratch(place: Path, **columns: object) -> Iterator[Scratch]:
    """A root on a filesystem, with a ledger of its own elsewhere."""
    folder, beside = place / "root", place / "beside"
    folder.mkdir()
    beside.mkdir()
    with tempfile.TemporaryDirectory(prefix="casparian-ledger-", dir=MEMORY) as home:
        settings = write_config(Path(home))
        with open_ledger(settings.database) as ledger:
            yield Scratch(ledger, add_root(ledger, folder, **columns), folder, beside)


def current(ledger: Ledger) -> dict[bytes, str]:
    """Path -> hash of its current version."""
    query = select(FileLocation.path, FileVersion.content_hash).join(
        FileVersion, FileVersion.id == FileLocation.current_version_id
    )
    rows = ledger.read(lambda c: c.execute(query).all())
    return {row[0]: row[1] for row in rows}


def versions(ledger: Ledger) -> list[tuple[bytes, str]]:
    """(path, hash) of every version, in order."""
    query = (
        select(FileLocation.path, FileVersion.content_hash)
        .join(FileVersion, FileVersion.location_id == FileLocation.id)
        .order_by(FileLocation.id, FileVersion.ordinal)
    )
    return [(path, content) for path, content in ledger.read(lambda c: c.execute(query).all())]


def scan_until_certain(ledger: Ledger, root: Root) -> int:
    """Scan until no stamp is too young to prove anything; how many scans that took."""
    racy = select(FileLocation.id).where(FileLocation.racy).limit(1)
    for count in range(1, 10_000):
        time.sleep(PAUSE_SECONDS)
        report = scan(ledger, root)
        if not report.unsettled and ledger.read(lambda c: c.execute(racy).first()) is None:
            return count
    raise AssertionError("the files never came to rest")
