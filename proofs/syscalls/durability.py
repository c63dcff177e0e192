"""What must be on the disk before what: rules over the recorded system calls of one run.

`kill -9` cannot see a forgotten fsync, since the kernel keeps what was written; a power cut can,
and takes a filesystem and root. These rules need neither: like ALICE (OSDI 2014) they ask of the
calls themselves in what order a disk may have to keep them.

    sealed    a staged file is fsynced after its last write, and its folder after its name was
              made, before the ledger names it and before it gets its visible name
    shown     the folder of a visible name is fsynced after it was given, and so is the parent of
              each folder made for it, before the ledger names the visible file
    committed a commit in a write-ahead log is fsynced before its thread does anything else
    whole     a file is clean when it is renamed, and its folder is fsynced before the end
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from casparian_flow.db import audit, integrity
from casparian_flow.db.access import Connection
from proofs.syscalls.supervisor import Call

_WAL = "-wal"
_FRAME_HEADER = 24
"""Bytes of a frame's header in SQLite's write-ahead log; bytes 4 to 8 are not 0 in a commit."""


class Recorder:
    """Notes every call of a run and lets it go on."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def __call__(self, call: Call) -> int:
        self.calls.append(call)
        return 0


def breaches(calls: Sequence[Call], ledger: Path) -> list[str]:
    """What a power cut during this run could have lost.

    Args:
        calls: the run's calls on its tree, from beginning to end.
        ledger: the database file.
    """
    return [*_committed(calls), *_ordered(calls, ledger)]


def _committed(calls: Sequence[Call]) -> Iterator[str]:
    """Each commit is fsynced before its thread makes any other call."""
    for at, call in enumerate(calls):
        if not _is_commit(call):
            continue
        log = call.paths[0]
        own = [c for c in calls[at + 1 :] if c.thread == call.thread][:2]  # the page, and then
        if len(own) < 2 or own[1].kind != "fsync" or own[1].paths[0] != log:
            after = f"{own[1].kind} {own[1].paths[0].name}" if len(own) > 1 else "the end"
            yield f"committed: a commit in {log.name} is followed by {after}, not by its fsync"


def _is_commit(call: Call) -> bool:
    is_header = call.kind == "write" and len(call.data) == _FRAME_HEADER
    return is_header and call.paths[0].name.endswith(_WAL) and call.data[4:8] != bytes(4)


def _ordered(calls: Sequence[Call], ledger: Path) -> Iterator[str]:
    log = Path(f"{ledger}{_WAL}")
    staged = {c.paths[0] for c in calls if c.kind == "write" and c.paths[0].parent.name == "stage"}
    named = [call for call in calls if call.kind in ("link", "rename")]
    visible = {call.paths[1] for call in named if call.paths[0] in staged}
    unnamed = visible | staged
    made: set[Path] = set()
    """Staged files that were opened once."""
    dirty: set[Path] = set()
    """Files with writes that no fsync followed."""
    loose: set[Path] = set()
    """Names, of files and folders, that no fsync of their folder followed."""
    for call in calls:
        path = call.paths[-1]
        match call.kind:
            case "open" if path in staged - made:
                made.add(path)
                loose.add(path)
            case "mkdir":
                loose.add(path)
            case "write":
                dirty.add(path)
            case "fsync":
                dirty.discard(path)
                loose = {name for name in loose if name.parent != path}
            case "link" | "rename":
                if call.paths[0] in dirty:
                    yield f"sealed: {path} appears, and what was written to it is not fsynced"
                loose.discard(call.paths[0])
                loose.add(path)
            case "unlink":
                dirty.discard(path)
                loose.discard(path)
        if call.kind == "write" and path == log:
            told = {name for name in unnamed if os.fsencode(name) in call.data}
            unnamed -= told
            for name in told:
                rule = "sealed" if name in staged else "shown"
                if name in dirty:
                    yield f"{rule}: the ledger names {name}, which is not fsynced"
                for lost in loose & {name, *name.parents}:
                    yield f"{rule}: the ledger names {name}, and {lost.parent} is not fsynced"
    for name in loose & {call.paths[-1] for call in named}:
        yield f"whole: {name} was named, and its folder is never fsynced"
    for name in unnamed:
        yield f"sealed: the ledger never named {name}"


class Commits:
    """Copies the ledger at every fsync of its log: each state that a crash could leave behind.

    The thread that commits waits for its fsync, and one thread commits, so the copy is whole.

    Args:
        ledger: the database file.
        folder: where the copies go.
    """

    def __init__(self, ledger: Path, folder: Path) -> None:
        self._ledger = ledger
        self._folder = folder
        self.copies: list[Path] = []

    def __call__(self, call: Call) -> int:
        if call.kind == "fsync" and call.paths[0] == Path(f"{self._ledger}{_WAL}"):
            copy = self._folder / f"{len(self.copies)}.sqlite3"
            shutil.copyfile(self._ledger, copy)
            shutil.copyfile(f"{self._ledger}{_WAL}", f"{copy}{_WAL}")
            self.copies.append(copy)
        return 0

    def breaches(self) -> Iterator[str]:
        """What does not hold in any of the copies."""
        for number, copy in enumerate(self.copies, 1):
            with closing(sqlite3.connect(copy)) as database:
                if not database.execute("SELECT 1 FROM sqlite_schema").fetchone():
                    continue
            with closing(sqlite3.connect(copy)) as database:
                connection = Connection(database)
                for words in (
                    *integrity.broken_invariants(connection),
                    *audit.problems(connection),
                ):
                    yield f"after commit {number}: {words}"
