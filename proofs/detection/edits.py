"""Random edits that try to hide, while scans go on: each must be found when it has settled.

Every content is 64 random bytes, so that no size gives an edit away, and half of the edits put the
mtime back. The oracle is what was written.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from casparian_flow.db.versions import Stat
from casparian_flow.services.scan import scan
from casparian_flow.services.scout import scrub
from proofs.detection.bench import PAUSE_SECONDS, Scratch, current, scan_until_certain, versions

SIZE = 64
KINDS = ("same size", "rename over", "through a hard link", "hard link over", "truncate and grow")


@dataclass
class Tally:
    """What was tried and what came of it."""

    edits: int = 0
    scans: int = 0
    missed: list[str] = field(default_factory=list)
    foreign: int = 0
    """Versions with bytes that nobody ever wrote."""
    recorded: int = 0
    hidden: int = 0
    """mmap stores that left every stamp as it was."""
    shown: int = 0
    """mmap stores that moved a stamp."""
    missed_by_scan: int = 0
    missed_by_scrub: int = 0
    seconds: float = 0.0


def run(place: Scratch, seed: int, edits: int, files: int, tell: Callable[[Tally], None]) -> Tally:
    """Edit every file again and again while another thread scans; check after each round.

    Args:
        tell: called after each round.
    """
    chance = random.Random(seed)
    tally = Tally()
    began = time.monotonic()
    paths = [place.folder / f"d{n % 7}" / f"f{n}" for n in range(files)]
    written = {hashlib.sha256(b"").hexdigest()}
    wanted: dict[bytes, str] = {}
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content := chance.randbytes(SIZE))
        wanted[_key(place, path)] = _hash(content, written)
    while tally.edits < edits:
        done = threading.Event()
        scanner = threading.Thread(target=_scan_on, args=(place, done, tally))
        scanner.start()
        for path in chance.sample(paths, len(paths)):
            for _ in range(chance.choice((1, 1, 2))):
                content = chance.randbytes(SIZE)
                edit(place, path, content, chance)
                wanted[_key(place, path)] = _hash(content, written)
                tally.edits += 1
        done.set()
        scanner.join()
        tally.scans += scan_until_certain(place.ledger, place.root)
        found = current(place.ledger)
        tally.missed += [
            f"{path.decode()} in round with {tally.edits} edits"
            for path, content in wanted.items()
            if found.get(path) != content
        ]
        tally.seconds = time.monotonic() - began
        tell(tally)
    recorded = versions(place.ledger)
    tally.recorded = len(recorded)
    tally.foreign = sum(content not in written for _, content in recorded)
    return tally


def _scan_on(place: Scratch, done: threading.Event, tally: Tally) -> None:
    while not done.wait(PAUSE_SECONDS):
        scan(place.ledger, place.root)
        tally.scans += 1


def _key(place: Scratch, path: Path) -> bytes:
    return os.fsencode(path.relative_to(place.folder))


def _hash(content: bytes, written: set[str]) -> str:
    found = hashlib.sha256(content).hexdigest()
    written.add(found)
    return found


def edit(place: Scratch, path: Path, content: bytes, chance: random.Random) -> None:
    """Give a file other bytes of the same size, in one of the ways that are hard to see."""
    kind = chance.choice(KINDS)
    before = path.stat()
    other = place.beside / "other"
    other.unlink(missing_ok=True)
    if kind == "same size":
        with open(path, "r+b", buffering=0) as file:
            file.write(content)
    elif kind == "through a hard link":
        os.link(path, other)
        with open(other, "r+b", buffering=0) as file:
            file.write(content)
    elif kind == "truncate and grow":
        with open(path, "r+b", buffering=0) as file:
            file.truncate(0)
            file.write(content)
    else:
        other.write_bytes(content)
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        if kind == "rename over":
            other.replace(path)
        else:
            link = path.with_suffix(".tmp")
            os.link(other, link)
            link.replace(path)
    if chance.random() < 0.5:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def run_mapped(place: Scratch, seed: int, stores: int, batch: int, tally: Tally) -> None:
    """Store through mmap into pages that are dirty already; scans may miss it, a scrub may not."""
    chance = random.Random(seed)
    for start in range(0, stores, batch):
        count = min(batch, stores - start)
        paths = [place.folder / "mapped" / f"m{start + n}" for n in range(count)]
        paths[0].parent.mkdir(exist_ok=True)
        views = []
        for path in paths:
            path.write_bytes(bytes(SIZE))
            with open(path, "r+b") as file:
                views.append(mmap.mmap(file.fileno(), 0))
            views[-1][:] = chance.randbytes(SIZE)
        scan_until_certain(place.ledger, place.root)
        wanted = {}
        for path, view in zip(paths, views, strict=True):
            before = Stat.of(path.stat())
            content = chance.randbytes(SIZE)
            view[:] = content
            view.close()
            wanted[_key(place, path)] = hashlib.sha256(content).hexdigest()
            same = Stat.of(path.stat()) == before
            tally.hidden += same
            tally.shown += not same
        scan_until_certain(place.ledger, place.root)
        tally.missed_by_scan += _wrong(place, wanted)
        scrub(place.ledger, place.root, anew=True)
        tally.missed_by_scrub += _wrong(place, wanted)


def _wrong(place: Scratch, wanted: dict[bytes, str]) -> int:
    found = current(place.ledger)
    return sum(found.get(path) != content for path, content in wanted.items())
