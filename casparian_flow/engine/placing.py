"""Where a guest finds the bytes of its job: in its inbox, or, of a large file, in place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from casparian_flow.crashpoints import crashpoint
from casparian_flow.engine import inbox
from casparian_flow.errors import Superseded, Unavailable
from casparian_flow.protocol import Assignment
from casparian_flow.sdk import FileInfo
from casparian_flow.security.sandbox import InPlace


class BadSnapshot(Exception):
    """A version's snapshot is not there, not whole or not readable; its file may be."""


@contextlib.contextmanager
def proved(job: Assignment) -> Iterator[InPlace]:
    """A file too large to copy, which is the version: what a guest may be given to read in place.

    Raises:
        Superseded, Unavailable: as `inbox.hash_file`.
    """
    with inbox.opened(job.path) as file:  # open until the end: no other file gets its inode
        _expect(job, inbox.hash_opened(file, job.path))
        look = os.fstat(file.fileno())
        yield InPlace(os.fsdecode(job.path), look.st_dev, look.st_ino)


@contextlib.contextmanager
def placed(job: Assignment, folder: Path, copy_limit: int) -> Iterator[FileInfo]:
    """The version's bytes where the guest can read them, and nothing but those bytes.

    Args:
        folder: the guest's inbox.
        copy_limit: a file with more bytes is not copied: its snapshot gets a second name in the
            inbox, or it is read in place, where the caller has `proved` it before.

    Raises:
        BadSnapshot: the job has a snapshot that cannot be used; nothing has run.
        Superseded, Unavailable: as `inbox.place`.
    """
    name = job.path.rpartition(b"/")[2]
    large = job.size_bytes > copy_limit
    if large and not job.snapshot:
        yield _file(job, Path(os.fsdecode(job.path)))
        _expect(job, inbox.hash_file(job.path))  # it may have been written to meanwhile
        return
    path = os.fsencode(job.snapshot) or job.path
    try:
        file = inbox.place(path, folder, name, job.content_hash, link=large)
    except (Superseded, Unavailable) as error:
        if job.snapshot:
            raise BadSnapshot(error.message) from error
        raise
    crashpoint("runner.file_placed")
    try:
        yield _file(job, file)
    finally:
        inbox.clear(file)


def _expect(job: Assignment, content_hash: str) -> None:
    if content_hash != job.content_hash:
        raise inbox.gone(job.path, "its content has changed")


def _file(job: Assignment, path: Path) -> FileInfo:
    return FileInfo(
        path=str(path),
        rel_path=job.rel_path,
        source=job.source,
        content_hash=job.content_hash,
        size_bytes=job.size_bytes,
        version_id=job.version_id,
        job_id=job.job_id,
    )
