"""Give a guest the bytes of a version: a copy under the original name, hashed while copying.

The plugin gets exactly the bytes of its version, even if the file changes meanwhile, or does not
run. File names are arbitrary bytes.
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
"""The ioctl that makes a file share the blocks of another (reflink)."""
BUFFER_BYTES = 1 << 20
PATH_MAX = 4096
"""Bytes of a path in one system call, including the closing NUL."""
OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Do not follow symlinks, and do not wait for the writer of a FIFO."""
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EISDIR)
"""Errors of opening a path that is no regular file any more: missing, symlink, socket, folder."""


def place(path: bytes, inbox: Path, name: bytes, expected_hash: str, *, link: bool = False) -> Path:
    """Copy a version's bytes to `inbox/<name>`, read-only, replacing an earlier file.

    Args:
        path: the location's file, or the store's; absolute.
        inbox: the guest's inbox; it must exist.
        name: the file's name without a folder.
        expected_hash: SHA-256 of the version, hexadecimal.
        link: hard link instead of copying if blocks cannot be shared. For large files of the store
            only: it changes the ctime.

    Raises:
        Superseded: the file is missing, is not a regular file, or has other bytes.
        Unavailable: it cannot be read, or the inbox cannot be written.
    """
    with opened(path) as source, io_faults(f"cannot copy {os.fsdecode(path)!r} to {inbox}"):
        target = inbox / os.fsdecode(name)
        clear(target)
        try:
            digest = copy(source, target, link)
            if digest != expected_hash:
                raise gone(path, f"its content is now {digest[:12]}, not {expected_hash[:12]}")
        except BaseException:
            clear(target)
            raise
        return target


def place_bytes(content: bytes, inbox: Path, name: bytes) -> Path:
    """Write a version's bytes to `inbox/<name>`, as `place` does.

    Raises:
        Unavailable: the inbox cannot be written.
    """
    target = inbox / os.fsdecode(name)
    with io_faults(f"cannot write to {inbox}"):
        clear(target)
        try:
            with open(target, "xb", buffering=0) as file:
                os.fchmod(file.fileno(), 0o400)
                rest = memoryview(content)
                while rest:
                    rest = rest[file.write(rest) or 0 :]
        except BaseException:
            clear(target)
            raise
    return target


def clear(target: Path) -> None:
    """Remove a file of `place`, or whatever a plugin put at its path."""
    try:
        target.unlink(missing_ok=True)
    except OSError:
        clear_away(target)


def hash_file(path: bytes) -> str:
    """SHA-256 of a file, hexadecimal.

    Raises:
        Superseded: the file is missing, is not a regular file, or changed while it was read.
        Unavailable: it cannot be read.
    """
    with opened(path) as source:
        return hash_opened(source, path)


def hash_opened(source: FileIO, path: bytes) -> str:
    """`hash_file` for a file that is already open."""
    with io_faults(f"cannot read {os.fsdecode(path)!r}"):
        before = stamp(source)
        digest = hashlib.file_digest(source, "sha256").hexdigest()
        if stamp(source) != before:
            raise gone(path, "it changed while being read")
        return digest


@contextlib.contextmanager
def opened(path: bytes) -> Iterator[FileIO]:
    """Open the regular file at `path` for reading."""
    with io_faults(f"cannot open {os.fsdecode(path)!r}"):
        try:
            file = FileIO(path, "rb", opener=lambda name, _: open_any(os.fsencode(name), OPEN))
        except OSError as error:
            if error.errno not in GONE:
                raise
            raise gone(path, error.strerror or str(error)) from error
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise gone(path, "it is no longer a regular file")
        yield file


def open_any(path: bytes, flags: int) -> int:
    """`os.open` for an absolute path of any length; beyond PATH_MAX, folder by folder."""
    if len(path) < PATH_MAX:
        return os.open(path, flags)
    *folders, name = path.strip(b"/").split(b"/")
    parent = os.open(b"/", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for folder in folders:
            child = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=parent)
            os.close(parent)
            parent = child
        return os.open(name, flags, dir_fd=parent)
    finally:
        os.close(parent)


def clone(source: FileIO, target: FileIO) -> bool:
    """Make an empty file share all blocks of another; False if the filesystem cannot."""
    try:
        fcntl.ioctl(target, FICLONE, source.fileno())
    except OSError:  # different filesystems, or no support
        return False
    return True


def copy(source: FileIO, target: Path, link: bool = False) -> str:
    """Copy `source` to a new file by reflink, hard link or read; returns its SHA-256.

    Args:
        link: hard link instead of reading if blocks cannot be shared.
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
    """Copy through one buffer; returns the SHA-256 of the bytes."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(BUFFER_BYTES))
    while count := os.readv(source.fileno(), [buffer]):
        rest = buffer[:count]
        digest.update(rest)
        while rest:
            rest = rest[os.write(target.fileno(), rest) :]
    return digest.hexdigest()


def stamp(file: FileIO) -> tuple[int, int, int]:
    """Size, mtime and ctime, which change when a file is written."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def gone(path: bytes, why: str) -> Superseded:
    """The error for a version whose bytes do not exist any more."""
    return Superseded(
        f"the content of this version is gone: {os.fsdecode(path)!r}: {why}",
        "nothing to do: the next scan records the file's new content as a version of its own",
    )


@contextlib.contextmanager
def io_faults(what: str) -> Iterator[None]:
    """Turn OSErrors into Unavailable: the job waits, and no attempt counts."""
    try:
        yield
    except OSError as error:
        raise Unavailable(f"{what}: {error.strerror or error}") from error


class StoreFault(Exception):
    """The store's bytes of a version are missing, damaged or unreadable; its file may have them."""


@contextlib.contextmanager
def proved(job: Assignment) -> Iterator[InPlace]:
    """Check that a file too large to copy has the version's bytes, for a guest to read in place.

    Raises:
        Superseded, Unavailable: as `hash_file`.
    """
    with opened(job.path) as file:  # stays open, so that no other file gets its inode
        _expect(job, hash_opened(file, job.path))
        status = os.fstat(file.fileno())
        yield InPlace(os.fsdecode(job.path), status.st_dev, status.st_ino)


@contextlib.contextmanager
def placed(job: Assignment, folder: Path, copy_limit: int) -> Iterator[FileInfo]:
    """Provide exactly the version's bytes where the guest can read them.

    Args:
        folder: the guest's inbox.
        copy_limit: larger files are not copied: the store's is linked into the inbox, or the file
            is read in place, which the caller has checked with `proved`.

    Raises:
        StoreFault: the store's bytes cannot be used; the plugin has not run.
        Superseded, Unavailable: as `place`.
    """
    name = job.path.rpartition(b"/")[2]
    large = job.size_bytes > copy_limit
    if large and not is_kept(job):
        yield _file(job, Path(os.fsdecode(job.path)))
        _expect(job, hash_file(job.path))  # it may have changed during the run
        return
    if job.kept_bytes is not None:
        digest = hashlib.sha256(job.kept_bytes).hexdigest()
        if digest != job.content_hash:
            raise StoreFault(f"row {job.kept_row} is {digest[:12]}, not {job.content_hash[:12]}")
        file = place_bytes(job.kept_bytes, folder, name)
    else:
        path = os.fsencode(job.kept_file) or job.path
        try:
            file = place(path, folder, name, job.content_hash, link=large)
        except (Superseded, Unavailable) as error:
            if job.kept_file:
                raise StoreFault(error.message) from error
            raise
    crashpoint("runner.file_placed")
    try:
        yield _file(job, file)
    finally:
        clear(file)


def is_kept(job: Assignment) -> bool:
    """Whether the store has the version's bytes, as far as the ledger knows."""
    return bool(job.kept_file) or job.kept_bytes is not None


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
