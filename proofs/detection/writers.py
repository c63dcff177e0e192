"""Slow writers, while scans go on: no version may have bytes that were never at rest.

A writer appends, pauses, appends. The oracle is how long each content really stayed: on a busy
machine a pause may become longer than was meant, and what stayed for a settle window was at rest.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from casparian_flow.services.scan import scan
from casparian_flow.services.scout import scan_until_settled
from proofs.detection.bench import PAUSE_SECONDS, Scratch, versions

OLD = 1_577_836_800
"""2020: what half of the writers set their mtimes to after each write, as `cp -p` would."""

CLOCK_SLACK = 0.03
"""Seconds by which stamps may lag behind the clock: the tick of a coarse kernel clock, twice."""


@dataclass
class Tally:
    """What was tried and what came of it."""

    writers: int = 0
    writes: int = 0
    overslept: int = 0
    """Pauses that became as long as the window, though they were meant to be shorter."""
    versions: int = 0
    unfinished: int = 0
    """Versions of contents that were at rest, but not the last."""
    never_at_rest: list[str] = field(default_factory=list)
    lost: int = 0
    """Writers whose last content is no version."""
    scans: int = 0
    seconds: float = 0.0


@dataclass
class _Writer:
    path: Path
    pauses: list[float]
    preserves: bool
    content: bytes = b""
    began: float = 0.0
    written: float = 0.0
    rested: set[str] = field(default_factory=set)
    """Hashes of what stayed for a window, or is the last."""


def run(
    place: Scratch, seed: int, writers: int, at_once: int, pauses: tuple[float, float]
) -> Tally:
    """Let writers append, so many at once, while another thread scans.

    Args:
        pauses: the shortest and the longest, in settle windows.
    """
    chance = random.Random(seed)
    window = place.root.settle_seconds
    tally = Tally(writers)
    began = time.monotonic()
    done = threading.Event()
    scanner = threading.Thread(target=_scan_on, args=(place, done, tally))
    scanner.start()
    crowd = [
        _Writer(
            place.folder / f"d{n % 50}" / f"w{n}",
            [window * chance.uniform(*pauses) for _ in range(chance.randint(2, 5))],
            chance.random() < 0.5,
        )
        for n in range(writers)
    ]
    waiting = crowd[::-1]
    busy: list[tuple[float, int]] = []
    numbers = {id(writer): number for number, writer in enumerate(crowd)}
    while waiting or busy:
        while waiting and len(busy) < at_once:
            writer = waiting.pop()
            start = time.monotonic() + window * chance.random()
            heapq.heappush(busy, (start, numbers[id(writer)]))
        due, number = heapq.heappop(busy)
        time.sleep(max(0.0, due - time.monotonic()))
        writer = crowd[number]
        _write(writer, chance.randbytes(20), window, tally, longest=pauses[1])
        if writer.pauses:
            heapq.heappush(busy, (writer.written + writer.pauses.pop(), number))
        else:
            writer.rested.add(hashlib.sha256(writer.content).hexdigest())
            _finish(place, writer)
    done.set()
    scanner.join()
    scan_until_settled(place.ledger, place.root)
    _check(place, crowd, tally)
    tally.seconds = time.monotonic() - began
    return tally


def _write(writer: _Writer, piece: bytes, window: float, tally: Tally, *, longest: float) -> None:
    """Append. What was there has stayed for as long as from before its write to after ours, at
    the most; only what cannot have stayed for a window was surely never at rest."""
    before, earlier = writer.began, hashlib.sha256(writer.content).hexdigest()
    writer.began = time.monotonic()
    writer.path.parent.mkdir(exist_ok=True)
    with open(writer.path, "ab", buffering=0) as file:
        file.write(piece)
    writer.written = time.monotonic()
    if writer.preserves:
        os.utime(writer.path, (OLD, OLD))
    if writer.content and writer.written - before >= window - CLOCK_SLACK:
        writer.rested.add(earlier)
        tally.overslept += longest < 1
    writer.content += piece
    tally.writes += 1


def _finish(place: Scratch, writer: _Writer) -> None:
    if place.root.done_file:
        Path(f"{writer.path}.done").touch()


def _scan_on(place: Scratch, done: threading.Event, tally: Tally) -> None:
    while not done.wait(PAUSE_SECONDS):
        scan(place.ledger, place.root)
        tally.scans += 1


def _check(place: Scratch, crowd: list[_Writer], tally: Tally) -> None:
    known = {os.fsencode(writer.path.relative_to(place.folder)): writer for writer in crowd}
    last: dict[bytes, str] = {}
    for path, content in versions(place.ledger):
        tally.versions += 1
        last[path] = content
        if content not in known[path].rested:
            tally.never_at_rest.append(path.decode())
    finals = {path: hashlib.sha256(writer.content).hexdigest() for path, writer in known.items()}
    tally.lost = sum(last.get(path) != content for path, content in finals.items())
    tally.unfinished = tally.versions - len(last)
