"""Walk a source root: any name, any depth, bounded memory, and no open that could block.

Directories are opened relative to their parent, so that paths longer than PATH_MAX are walked too.
Symbolic links are not followed; FIFOs, sockets and devices are passed over.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from pathspec import GitIgnoreSpec

from casparian_flow.db.versions import Identity, identity
from casparian_flow.durable import STATE_FOLDER

_STATE = f"{STATE_FOLDER}/"
BUILT_IN_IGNORES = (
    # Temporary names, partial downloads, partial copies.
    "*.tmp", "*.part", "*.partial", "*.filepart", "*.crdownload", ".~tmp~/", ".goutputstream-*",
    "*___jb_tmp___", "*___jb_old___",
    # Editors: swap files, backups, locks, automatic saves.
    ".*.sw[a-px]", ".*.kate-swp", "*~", ".[#]*", "[#]*[#]", "~$*", ".~lock.*[#]",
    # Metadata of desktops and servers.
    "._*", ".DS_Store", "Thumbs.db", "desktop.ini", ".nfs[0-9a-f]*", ".fuse_hidden*",
    "@eaDir/", ".AppleDouble/", ".TemporaryItems/", ".Spotlight-V100/", ".fseventsd/",
    "System Volume Information/",
    # Trash and filesystem snapshots.
    ".Trash/", ".Trash-*/", ".Trashes/", "$RECYCLE.BIN/", "[#]recycle/", "@Recycle/", "lost+found/",
    ".snapshot/", ".snapshots/", "~snapshot/", "[#]snapshot/", ".zfs/",
    ".git/", _STATE,
)  # fmt: skip
"""Patterns over a name, with one meaning to gitignore and fnmatch; listed in docs/detection.md."""

CHUNK = 4096
"""Entries of one directory held in memory at a time."""

_IDENTITY = struct.Struct("<QQqqq")
_PARTS = 3 * CHUNK
"""Parts of a directory's digest that are hashed at once."""

_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Ignore:
    """gitignore patterns of one source root; directories are pruned as git prunes them."""

    def __init__(self, patterns: str, done_file: str = "") -> None:
        """Compile.

        Args:
            patterns: gitignore lines, besides the built-in ones; `!` may take a built-in one back,
                except that of our own state folder.
            done_file: name of the markers (see `marker`); they are passed over.

        Raises:
            ValueError: a line that is not a pattern.
        """
        own = [line for line in patterns.splitlines() if line.strip()]
        lines = ([*own, _STATE], [*BUILT_IN_IGNORES, *own, _STATE]) if own else ()
        self._specs = [GitIgnoreSpec.from_lines(group) for group in lines]
        # The built-in ones match the name alone; one expression is ten times as fast. The last
        # pattern that matches decides, so these decide where none of the root's own matches.
        self._files, self._folders = (
            re.compile("|".join(fnmatch.translate(p.rstrip("/")) for p in group))
            for group in (
                [p for p in BUILT_IN_IGNORES if not p.endswith("/")],
                list(BUILT_IN_IGNORES),
            )
        )
        self._markers = marker_names(done_file) if done_file else None

    def file(self, folder: bytes, name: str) -> bool:
        """Whether a file is passed over."""
        if self._markers and self._markers.fullmatch(name):
            return True
        own = self._by_own(f"{_prefix(folder)}{name}") if self._specs else None
        return self._files.match(name) is not None if own is None else own

    def files_in(self, folder: bytes) -> Callable[[str], object]:
        """`file` for the many files of one directory: what it gives is true or false."""
        if self._markers or self._specs:
            return partial(self.file, folder)
        return self._files.match

    def folder(self, folder: bytes, name: str) -> bool:
        """Whether a directory, with all below it, is passed over."""
        own = self._by_own(f"{_prefix(folder)}{name}/") if self._specs else None
        return self._folders.match(name) is not None if own is None else own

    def _by_own(self, path: str) -> bool | None:
        """Whether a path is passed over by the root's own patterns; None where none matches."""
        own, everything = self._specs
        included = own.check_file(path).include
        # A directory that is taken back does not take back everything in it.
        return included if included is not False else everything.match_file(path)


def marker_names(done_file: str) -> re.Pattern[str]:
    """A pattern for the names of a root's markers."""
    parts = re.split(r"\{(?:name|stem)\}", done_file)
    return re.compile("(?s:.+)".join(map(re.escape, parts)))


def marker(done_file: str, name: bytes) -> bytes:
    """The marker of a file, in the same directory.

    Args:
        done_file: `{name}` stands for the file's whole name, `{stem}` for the name without its
            last extension; without either, one marker serves all files of its directory.
    """
    stem = os.path.splitext(name)[0]
    return os.fsencode(done_file).replace(b"{name}", name).replace(b"{stem}", stem)


class Listing(NamedTuple):
    """The content of one directory."""

    path: bytes
    """Relative to the source root; empty for the root itself."""
    descriptor: int
    """Open until the consumer of `walk` takes the next listing."""
    entries: list[tuple[bytes, Identity]]
    """Regular files: the first CHUNK of them."""
    files: int
    """Regular files in all."""
    folders: list[bytes]
    """Names of subdirectories that are not ignored."""
    digest: bytes
    """Over every name and stat: while it stays the same, nothing has changed here."""
    problem: str
    """Why it could not be read, else empty."""


def join(folder: bytes, name: bytes) -> bytes:
    """The relative path of a name in a directory."""
    return b"%b/%b" % (folder, name) if folder else name


def open_folder(root: int, path: bytes) -> int:
    """Open a directory below a root, component by component, following no link.

    Raises:
        OSError: it does not exist, is not a directory, or may not be read.
    """
    descriptor = os.dup(root)
    for name in path.split(b"/") if path else []:
        try:
            child = os.open(name, _OPEN_FOLDER, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = child
    return descriptor


def nearest(root: int, path: bytes, ignore: Ignore) -> bytes | None:
    """A directory that an event named, or the closest one above it that exists.

    Returns:
        None where the directory, or one above it, is passed over.
    """
    reached = b""
    descriptor = os.dup(root)
    try:
        for name in path.split(b"/") if path else []:
            text = os.fsdecode(name)
            ours = _owned(descriptor)
            if ignore.folder(reached, text) or (ours and ours.match(text)):
                return None
            try:
                child = os.open(name, _OPEN_FOLDER, dir_fd=descriptor)
            except OSError:
                return reached
            os.close(descriptor)
            descriptor, reached = child, join(reached, name)
    finally:
        os.close(descriptor)
    return reached


def walk(root: int, ignore: Ignore, start: bytes = b"") -> Iterator[Listing]:
    """Every directory from `start` down, parents before children.

    Args:
        root: descriptor of the source root.
        start: where to begin; relative to the root.

    Raises:
        OSError: `start` itself cannot be opened. A directory below it that cannot be opened or
            read gives a listing with a `problem`.
    """
    stack: list[tuple[int, bytes, list[bytes]]] = []
    try:
        descriptor = open_folder(root, start)
        stack.append((descriptor, start, []))
        listing = list_directory(descriptor, start, ignore)
        yield listing
        stack[-1][2].extend(listing.folders)
        while stack:
            parent, path, names = stack[-1]
            if not names:
                os.close(stack.pop()[0])
                continue
            name = names.pop()
            child = join(path, name)
            try:
                descriptor = os.open(name, _OPEN_FOLDER, dir_fd=parent)
            except FileNotFoundError:
                continue
            except OSError as error:
                yield Listing(child, -1, [], 0, [], b"", str(error.strerror))
                continue
            stack.append((descriptor, child, []))
            listing = list_directory(descriptor, child, ignore)
            yield listing
            stack[-1][2].extend(listing.folders)
    finally:
        for descriptor, _, _ in stack:
            os.close(descriptor)


def list_directory(descriptor: int, path: bytes, ignore: Ignore) -> Listing:
    """List one directory, digesting all of it and keeping the first CHUNK files."""
    digest = hashlib.blake2b(digest_size=16)
    entries: list[tuple[bytes, Identity]] = []
    folders: list[bytes] = []
    parts: list[bytes] = []
    count, problem = 0, ""
    try:
        for entry in _entries(descriptor, path, ignore):
            name, found = entry
            if found is None:
                folders.append(name)
                parts.append(name + b"//")
                continue
            count += 1
            parts += (name, b"/", _IDENTITY.pack(*found))
            if count <= CHUNK:
                entries.append((name, found))
            elif len(parts) >= _PARTS:
                digest.update(b"".join(parts))
                parts.clear()
    except OSError as error:
        problem = str(error.strerror)
    digest.update(b"".join(parts))
    return Listing(path, descriptor, entries, count, folders, digest.digest(), problem)


def chunks(listing: Listing, ignore: Ignore) -> Iterator[list[tuple[bytes, Identity]]]:
    """Every file of a listing, CHUNK at a time; a large directory is read again for it."""
    if listing.files <= CHUNK:
        yield listing.entries
        return
    chunk: list[tuple[bytes, Identity]] = []
    for name, found in _entries(listing.descriptor, listing.path, ignore):
        if found is not None:
            chunk.append((name, found))
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    yield chunk


def is_candidate(listing: Listing, name: bytes, ignore: Ignore) -> bool:
    """Whether a name is a regular file here that is neither ignored nor our own output."""
    try:
        status = os.stat(name, dir_fd=listing.descriptor, follow_symlinks=False)
    except FileNotFoundError:
        return False
    text = os.fsdecode(name)
    if not stat.S_ISREG(status.st_mode) or ignore.file(listing.path, text):
        return False
    ours = _owned(listing.descriptor)
    return not (ours and ours.match(text))


def is_passed_over(listing: Listing, name: bytes, *, folder: bool) -> bool:
    """Whether a file or a folder that was recorded is still here, though scans pass it over.

    A link may stand for it; a folder in the place of a file does not, nor the reverse.
    """
    try:
        mode = os.stat(name, dir_fd=listing.descriptor, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISREG(mode) if folder else stat.S_ISDIR(mode))


def _entries(
    descriptor: int, path: bytes, ignore: Ignore
) -> Iterator[tuple[bytes, Identity | None]]:
    """(name, identity) of each regular file, (name, None) of each directory; not ignored ones."""
    ours, is_ignored = _owned(descriptor), ignore.files_in(path)
    coding, errors = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
    with os.scandir(descriptor) as entries:
        for entry in entries:
            name = entry.name
            if ours and ours.match(name):
                continue
            if entry.is_file(follow_symlinks=False):
                if not is_ignored(name):
                    try:
                        found = identity(entry.stat(follow_symlinks=False))
                    except FileNotFoundError:
                        continue
                    yield name.encode(coding, errors), found
            elif entry.is_dir(follow_symlinks=False) and not ignore.folder(path, name):
                yield name.encode(coding, errors), None


def _owned(descriptor: int) -> re.Pattern[str] | None:
    """A pattern for what `durable.own` has marked as our own output in this directory."""
    try:
        file = os.open(f"{STATE_FOLDER}/owned", os.O_RDONLY | os.O_CLOEXEC, dir_fd=descriptor)
    except OSError:
        return None
    with open(file, encoding="utf-8", errors="surrogateescape") as lines:
        patterns = [fnmatch.translate(line) for line in lines.read().splitlines() if line]
    return re.compile("|".join(patterns)) if patterns else None


def _prefix(folder: bytes) -> str:
    return f"{os.fsdecode(folder)}/" if folder else ""
