"""A version's bytes come to the guest: copied under the original name, hashed on the way.

A plugin so sees exactly the bytes of its version, whatever happens to the file meanwhile, or it
does not run at all. Names are bytes and may be any.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from casparian_flow.crashpoints import crashpoint
from casparian_flow.errors import Superseded, Unavailable
from casparian_flow.protocol import Assignment
from casparian_flow.sdk import FileInfo
from casparian_flow.security.sandbox import InPlace
from casparian_flow.trees import clear_away

FICLONE = 0x40049409
"""Linux's ioctl that makes one file share another's blocks; instant, where it is possible."""
BUFFER_BYTES = 1 << 20
PATH_MAX = 4096
"""Bytes of a path that Linux takes in one call, the closing NUL among them."""
OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Follow no symlink, wait for no FIFO's writer."""
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EISDIR)
"""What opening says of a path that is no file any more: nothing, a symlink, a socket, a folder."""


def place(path: bytes, inbox: Path, name: bytes, expected_hash: str, *, link: bool = False) -> Path:
    """Copy a version's bytes to `inbox/<name>`, read-only; a file left there before goes.

    Args:
        path: the location's file, or the version's snapshot; absolute.
        inbox: the guest's inbox; it must exist.
        name: the file's own name, without a folder.
        expected_hash: SHA-256 of the version, hexadecimal.
        link: rather than to copy them, give the file itself another name, where its blocks
            cannot be shared. For a large snapshot; never for a person's file, whose ctime moves.

    Raises:
        Superseded: the file is gone, is no regular file, or holds other bytes.
        Unavailable: it cannot be read, or the inbox cannot be written.
    """
    with opened(path) as source, io_faults(f"cannot copy {os.fsdecode(path)!r} to {inbox}"):
        placed = inbox / os.fsdecode(name)
        clear(placed)
        try:
            digest = copy(source, placed, link)
            if digest != expected_hash:
                raise gone(path, f"its content is now {digest[:12]}, not {expected_hash[:12]}")
        except BaseException:
            clear(placed)
            raise
        return placed


def clear(placed: Path) -> None:
    """Remove what `place` made, or what a plugin put in its place."""
    try:
        placed.unlink(missing_ok=True)
    except OSError:
        clear_away(placed)


def hash_file(path: bytes) -> str:
    """SHA-256 of a file's bytes, hexadecimal, read while nobody changed it.

    Raises:
        Superseded: the file is gone, is no regular file, or changed while it was read.
        Unavailable: it cannot be read.
    """
    with opened(path) as source:
        return hash_opened(source, path)


def hash_opened(source: FileIO, path: bytes) -> str:
    """`hash_file` of a file that was opened at `path`."""
    with io_faults(f"cannot read {os.fsdecode(path)!r}"):
        before = stamp(source)
        digest = hashlib.file_digest(source, "sha256").hexdigest()
        if stamp(source) != before:
            raise gone(path, "it changed while it was read")
        return digest


@contextlib.contextmanager
def opened(path: bytes) -> Iterator[FileIO]:
    """The regular file at `path`, for reading."""
    with io_faults(f"cannot open {os.fsdecode(path)!r}"):
        try:
            file = FileIO(path, "rb", opener=lambda name, _: open_any(os.fsencode(name), OPEN))
        except OSError as error:
            if error.errno not in GONE:
                raise
            raise gone(path, error.strerror or str(error)) from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise gone(path, "it is not a regular file any more")
        yield file


def open_any(path: bytes, flags: int) -> int:
    """`os.open` for an absolute path of any length: component by component past the kernel's."""
    if len(path) < PATH_MAX:
        return os.open(path, flags)
    *folders, name = path.strip(b"/").split(b"/")
    here = os.open(b"/", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for folder in folders:
            deeper = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=here)
            os.close(here)
            here = deeper
        return os.open(name, flags, dir_fd=here)
    finally:
        os.close(here)


def clone(source: FileIO, target: FileIO) -> bool:
    """Have an empty file share all blocks of another; False where the filesystem cannot."""
    try:
        fcntl.ioctl(target, FICLONE, source.fileno())
    except OSError:  # another filesystem, or one that cannot share
        return False
    return True


def copy(source: FileIO, target: Path, link: bool = False) -> str:
    """Fill a new file from `source`, or make it another name of it; the SHA-256 of what it holds.

    Args:
        link: give the other name where the blocks cannot be shared.
    """
    with open(target, "x+b", buffering=0) as file:
        os.fchmod(file.fileno(), 0o400)
        if clone(source, file):
            return hashlib.file_digest(file, "sha256").hexdigest()
        if not link:
            return copy_bytes(source, file)
    target.unlink()
    os.link(source.name, target)
    with open(target, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_bytes(source: FileIO, target: FileIO) -> str:
    """Copy through one buffer; the SHA-256 of what passed."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(BUFFER_BYTES))
    while count := os.readv(source.fileno(), [buffer]):
        rest = buffer[:count]
        digest.update(rest)
        while rest:
            rest = rest[os.write(target.fileno(), rest) :]
    return digest.hexdigest()


def stamp(file: FileIO) -> tuple[int, int, int]:
    """What changes when a file is written to."""
    look = os.fstat(file.fileno())
    return look.st_size, look.st_mtime_ns, look.st_ctime_ns


def gone(path: bytes, why: str) -> Superseded:
    """The error of a version whose bytes are no more."""
    return Superseded(
        f"the bytes of this version are gone: {os.fsdecode(path)!r}: {why}",
        "nothing to do: what the file holds now is a version of its own after the next scan",
    )


@contextlib.contextmanager
def io_faults(what: str) -> Iterator[None]:
    """Faults of the disk or of permissions are ours to wait out, not the job's."""
    try:
        yield
    except OSError as error:
        raise Unavailable(f"{what}: {error.strerror or error}") from error


# Where a guest finds the bytes of its job: in its inbox, or, of a large file, in place.


class BadSnapshot(Exception):
    """A version's snapshot is not there, not whole or not readable; its file may be."""


@contextlib.contextmanager
def proved(job: Assignment) -> Iterator[InPlace]:
    """A file too large to copy, which is the version: what a guest may be given to read in place.

    Raises:
        Superseded, Unavailable: as `inbox.hash_file`.
    """
    with opened(job.path) as file:  # open until the end: no other file gets its inode
        _expect(job, hash_opened(file, job.path))
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
        _expect(job, hash_file(job.path))  # it may have been written to meanwhile
        return
    path = os.fsencode(job.snapshot) or job.path
    try:
        file = place(path, folder, name, job.content_hash, link=large)
    except (Superseded, Unavailable) as error:
        if job.snapshot:
            raise BadSnapshot(error.message) from error
        raise
    crashpoint("runner.file_placed")
    try:
        yield _file(job, file)
    finally:
        clear(file)


def _expect(job: Assignment, content_hash: str) -> None:
    if content_hash != job.content_hash:
        raise gone(job.path, "its content has changed")


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
