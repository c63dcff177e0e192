"""Upkeep of the store: sweep, check, report, and the bytes of one version for `casparian cat`."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, cast

from casparian_flow.config import DatabaseSettings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import kept, routing, versions
from casparian_flow.db.access import Ledger, write_copy
from casparian_flow.db.kept import Content
from casparian_flow.durable import exclusive
from casparian_flow.engine import inbox
from casparian_flow.engine.contents import FAULTS, SmallContents, content_file, digest_of, words
from casparian_flow.errors import CasparianError, JobError, LedgerError, NotFound, counted
from casparian_flow.services.store import CHUNK, budget, clear_dead, evict, make_durable

log = logging.getLogger(__name__)

COPY_CHUNK = 500
"""Contents copied between two looks at the ledger: 8 MiB of small ones."""


@contextlib.contextmanager
def nameless(ledger: Ledger, hashes: Iterable[str]) -> Iterator[list[Content]]:
    """Those of these contents that the store has and no row of the ledger names: an earlier ledger
    recorded them. The block records them; nobody deletes them meanwhile."""
    folder = ledger.database.store_folder
    wanted = set(hashes)
    with contextlib.ExitStack() as stack:
        contents: list[Content] = []
        if wanted and folder.is_dir():
            try:
                stack.enter_context(exclusive(folder / "lock"))
                contents = _nameless(
                    ledger, wanted - ledger.read(partial(kept.known, hashes=wanted))
                )
            except FAULTS as error:
                log.warning("the store cannot be read: %s", words(error))
        yield contents


def _nameless(ledger: Ledger, hashes: set[str]) -> list[Content]:
    folder = ledger.database.store_folder
    with contextlib.closing(SmallContents(folder)) as small:
        rows = small.find(hashes)
        last = max(ledger.read(kept.last_number), small.last() if hashes else 0)
    taken = ledger.read(partial(kept.numbers, wanted=[number for number, *_ in rows]))
    found = {row[1]: Content(*row, False) for row in rows if row[0] not in taken}
    for digest in sorted(hashes - found.keys()):
        with contextlib.suppress(FileNotFoundError):
            size = content_file(folder, digest).stat().st_size
            last += 1
            found[digest] = Content(last, digest, size, True)
    return list(found.values())


def sweep(ledger: Ledger) -> None:
    """Delete bytes that no row of the ledger names, and rows without bytes; then fit the budget.

    A ledger without a source root names nothing, and deletes nothing: it may be a new one in the
    place of one that was lost. Adding the roots brings back what the sinks know of (`nameless`).

    Raises:
        OSError, sqlite3.Error: the store cannot be read or written.
        LedgerError: the ledger cannot be.
    """
    folder = ledger.database.store_folder
    small = SmallContents(folder)
    with contextlib.ExitStack() as stack:
        stack.callback(small.close)
        if folder.is_dir():
            stack.enter_context(exclusive(folder / "lock"))
        clear_dead(folder)
        if not ledger.read(versions.active_paths):
            return
        lost = 0
        for contents, numbers in _chunks(ledger, small):
            rows = {content.id for content in contents if not content.in_file}
            small.delete(numbers - rows)
            missing = [each for each in contents if not _is_there(folder, each, numbers)]
            ledger.write(partial(kept.forget, contents=missing)) if missing else None
            lost += len(missing)
        if lost:
            log.warning("%s missing in %s", counted(lost, "content"), folder)
        for part in folder.glob("??"):
            names = os.listdir(part)
            known = ledger.read(partial(kept.known, hashes=names))
            for name in set(names) - known:
                (part / name).unlink()
        held = ledger.read(kept.state).bytes
        if folder.is_dir() and (excess := held - budget(ledger.database, held)) > 0:
            evict(ledger, small, excess)
        small.shrink()


def _chunks(ledger: Ledger, small: SmallContents) -> Iterator[tuple[list[Content], set[int]]]:
    """All contents of the ledger by their numbers, each chunk with the rows in its range."""
    last = 0
    while contents := ledger.read(partial(kept.after, number=last, limit=CHUNK)):
        yield contents, small.numbers(last, contents[-1].id)
        last = contents[-1].id
    while numbers := small.numbers(last, limit=CHUNK):
        yield [], numbers
        last = max(numbers)


def _is_there(folder: Path, content: Content, rows: set[int]) -> bool:
    if content.in_file:
        return content_file(folder, content.content_hash).exists()
    return content.id in rows


def problems(ledger: Ledger) -> Iterator[str]:
    """A sentence for each content that is missing or damaged; reads every byte of the store."""
    folder = ledger.database.store_folder
    with contextlib.closing(SmallContents(folder)) as small:
        last = 0
        while True:
            try:
                contents = ledger.read(partial(kept.after, number=last, limit=CHUNK))
            except LedgerError as error:
                yield f"the store cannot be checked: {error.message}"
                return
            if not contents:
                return
            for content in contents:
                fault = _fault(folder, small, content)
                # A content that was evicted meanwhile is not missing.
                if fault and ledger.read(partial(kept.is_kept, content=content)):
                    yield _sentence(ledger, folder, small, content, fault)
            last = contents[-1].id


def has_whole(ledger: Ledger, content_hash: str) -> bool:
    """Whether the store has a content, undamaged."""
    content = ledger.read(partial(kept.find, content_hash=content_hash))
    if content is None:
        return False
    folder = ledger.database.store_folder
    with contextlib.closing(SmallContents(folder)) as small:
        return not _fault(folder, small, content)


def _fault(folder: Path, small: SmallContents, content: Content) -> str:
    try:
        if content.in_file:
            with content_file(folder, content.content_hash).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            found = small.read(content.id)
            if found is None:
                return "is missing"
            digest = digest_of(found)
    except FileNotFoundError:
        return "is missing"
    except FAULTS as error:
        return f"cannot be read ({words(error)})"
    return "" if digest == content.content_hash else f"is damaged (it is {digest[:12]} now)"


def _sentence(
    ledger: Ledger, folder: Path, small: SmallContents, content: Content, fault: str
) -> str:
    version = ledger.read(partial(kept.version_with, content_hash=content.content_hash))
    if content.in_file:
        place = str(content_file(folder, content.content_hash))
        remedy = f"delete {place}"
    else:
        place = f"row {content.id} of {small.path}"
        remedy = "delete that row from its table `content`"
    return (
        f"the store's content {content.content_hash[:12]} ({version}), {place}, {fault}; jobs of "
        f"that version read the file itself ({remedy}, then start the daemon)"
    )


def report(ledger: Ledger) -> dict[str, Any]:
    """What the store holds, for `casparian status`."""
    state = ledger.read(kept.state)
    versions, held, evicted = ledger.read(kept.coverage)
    database = ledger.database
    return {
        "keep": database.store.keep,
        "folder": str(database.store_folder),
        "contents": state.contents,
        "bytes": state.bytes,
        "limit": budget(database, state.bytes),
        "versions": versions,
        "kept_versions": held,
        "evicted_versions": evicted,
        "unprotected_jobs": ledger.read(kept.unprotected),
        "fault": f"{counted(state.missed, 'version')} since {state.since[:16]}: {state.fault}"
        if state.fault
        else "",
    }


def copy(database: DatabaseSettings, ledger: Path, target: Path) -> None:
    """Copy the store to a new folder, for a copy of the ledger that nobody else has open.

    Each content is checked on the way. One that is damaged or gone by now is forgotten in the copy
    of the ledger, so that the two agree. Scans go on meanwhile: no lock is held.

    Args:
        ledger: the copy.

    Raises:
        OSError, sqlite3.Error: a disk is full, or cannot be read.
    """
    folder = database.store_folder
    target.mkdir(mode=0o700)
    with (
        contextlib.closing(SmallContents(folder)) as small,
        contextlib.closing(SmallContents(target)) as copied,
        write_copy(ledger) as connection,
    ):
        last = 0
        while contents := kept.after(connection, last, COPY_CHUNK):
            rows: list[tuple[int, str, bytes]] = []
            lost: list[Content] = []
            for content in contents:
                number, digest = content.id, content.content_hash
                if content.in_file:
                    if not _copy_file(folder, target, content):
                        lost.append(content)
                elif (row := small.intact(number, digest)) is not None:
                    rows.append((number, digest, row))
                else:
                    lost.append(content)
            copied.add(rows)
            kept.forget(connection, lost)
            crashpoint("store.chunk_copied")
            last = contents[-1].id
    make_durable([target, *target.rglob("*")])


def _copy_file(folder: Path, target: Path, content: Content) -> bool:
    """Copy a large content; False where it is gone or damaged."""
    file = content_file(target, content.content_hash)
    file.parent.mkdir(mode=0o700, exist_ok=True)
    try:
        with FileIO(str(content_file(folder, content.content_hash))) as source:
            if inbox.copy(source, file) == content.content_hash:
                return True
    except FileNotFoundError:
        return False
    file.unlink()
    return False


# `casparian cat`: the bytes of one version.


def find_version(ledger: Ledger, path: str, number: int | None) -> Any:
    """The version that a person names; without a number, the current one.

    Raises:
        NotFound: there is no such file, or no such version of it.
        CasparianError: the path may mean several files.
    """
    rows = ledger.read(
        lambda c: [
            row
            for root, below, shown in routing.resolve_argument(c, path)
            for row in kept.versions(c, root.id, below, shown)
        ]
    )
    if not rows:
        raise NotFound(f"no file is known as {path}", "casparian files   (or: casparian scan)")
    names = sorted({f"{row.source}/{row.rel_path}" for row in rows})
    if len({row.location_id for row in rows}) > 1:
        raise CasparianError(f"{path} may be {' or '.join(names)}", f"casparian cat {names[0]}")
    for row in rows:
        if row.ordinal == number or (number is None and row.current):
            return row
    raise NotFound(
        f"{names[0]} has no version {number}", f"casparian versions {names[0]}   (lists them)"
    )


@contextlib.contextmanager
def opened(ledger: Ledger, version: Any) -> Iterator[BinaryIO]:
    """The bytes of a version, checked: from the store, else from its file if that has them.

    Args:
        version: of `find_version`.

    Raises:
        CasparianError: neither has them.
    """
    faults = []
    with contextlib.ExitStack() as stack:
        for source in (_from_store, _from_file):
            content, fault = source(ledger, version, stack)
            if content is not None:
                yield content
                return
            faults.append(fault)
    raise CasparianError(
        f"the bytes of version {version.ordinal} of {version.source}/{version.rel_path} are gone: "
        f"{', and '.join(faults)}",
        f"casparian versions {version.source}/{version.rel_path}   (docs/store.md)",
    )


Source = tuple[BinaryIO | None, str]
"""The bytes, ready to be read; or None, and why not."""


def _from_store(ledger: Ledger, version: Any, stack: contextlib.ExitStack) -> Source:
    digest = version.content_hash
    content = ledger.read(partial(kept.find, content_hash=digest))
    if content is None:
        was_evicted = ledger.read(partial(kept.is_evicted, content_hash=digest))
        return None, "the store has evicted them" if was_evicted else "the store does not have them"
    folder = ledger.database.store_folder
    try:
        if not content.in_file:
            with contextlib.closing(SmallContents(folder)) as small:
                found = small.intact(content.id, digest)
            if found is not None:
                return io.BytesIO(found), ""
        else:
            file = stack.enter_context(content_file(folder, digest).open("rb"))
            if hashlib.file_digest(file, "sha256").hexdigest() == digest:
                file.seek(0)
                return file, ""
    except FAULTS as error:
        return None, f"the store cannot be read ({words(error)})"
    return None, "the store's copy is damaged (casparian verify)"


def _from_file(ledger: Ledger, version: Any, stack: contextlib.ExitStack) -> Source:
    """A copy of the file, since it may change while it is written out."""
    path = os.path.join(os.fsencode(version.root_path), version.path)
    try:
        if os.stat(path).st_size != version.size_bytes:
            return None, "the file has other bytes now"
        folder = ledger.database.state_folder
        copy: FileIO = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        stack.enter_context(copy)
        with inbox.opened(path) as source:
            digest = inbox.copy_bytes(source, copy)
    except (JobError, FileNotFoundError, NotADirectoryError):
        return None, "the file is gone"
    if digest != version.content_hash:
        return None, "the file has other bytes now"
    copy.seek(0)
    return cast(BinaryIO, copy), ""
