"""Readers that look all the time while a sink is published to, and hold all they see to be whole.

    python -m proofs.polled [--commits 1000] [--seed N]

Every commit is a job with two topics, published to each of `SCENES`, one after the other; a process
of its own reads all of them meanwhile, as anybody can, and none of our code takes part in that. Of
each job it must see every row or none. Appended jobs stay. In mode replace it sees one version of
each location, the same or a newer one than before, from the first on always one. In SQLite both
topics are at the same job in every snapshot.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from casparian_flow.protocol import Output, State
from proofs import arguments, sink_reader
from tests.sinks.parquet_acts import small_groups
from tests.sinks.stages import Place

TOPICS = ("left", "right")
LOCATIONS = 3
"""Whose versions come in turn, in mode replace."""

MOST_ROWS = 50

Look = dict[str, Counter[int]]
"""Topic -> job -> how many of its rows are there, at one look."""


class Scene(NamedTuple):
    """A sink that is published to and read."""

    scheme: str
    mode: str
    split_bytes: int = 0

    @property
    def name(self) -> str:
        return f"{self.scheme} {self.mode}{' in parts' if self.split_bytes else ''}"

    def place(self, home: Path) -> Place:
        folder = home / self.name
        folder.mkdir(exist_ok=True)
        return Place(self.scheme, folder)


SCENES = [
    Scene("sqlite", "append"),
    Scene("sqlite", "replace"),
    Scene("parquet", "append"),
    Scene("parquet", "append", split_bytes=1),
    Scene("parquet", "replace"),
]


def size(seed: int, job: int, topic: str) -> int:
    """How many rows a job has in a topic."""
    return random.Random(f"{seed} {job} {topic}").randint(1, MOST_ROWS)


def publish(scene: Scene, place: Place, seed: int, job: int) -> None:
    """One commit."""
    staged = [
        place.sealed(
            {"n": [job] * size(seed, job, topic)}, job, topic=topic, mode=scene.mode,
            attempt=f"{job}-{topic}", key=f"{job} {topic}", slot=f"{job % LOCATIONS} {topic}",
            ordinal=job, split_bytes=scene.split_bytes,
        )
        for topic in TOPICS
    ]  # fmt: skip
    place.show(*staged, changes=[past(scene, place, job - LOCATIONS, topic) for topic in TOPICS])


def past(scene: Scene, place: Place, job: int, topic: str) -> Output:
    """The version that a job takes the place of, if it was published."""
    return place.output(
        job, key=f"{job} {topic}", topic=topic, mode=scene.mode,
        slot=f"{job % LOCATIONS} {topic}", ordinal=job, state=State.PAST,
    )  # fmt: skip


class Reader:
    """Looks at one scene.

    Args:
        scene: its sink.
        place: where it is.
        seed: of the sizes.
    """

    def __init__(self, scene: Scene, place: Place, seed: int) -> None:
        self.looks = 0
        self.faults: list[str] = []
        self.last: Look = {topic: Counter() for topic in TOPICS}
        self._scene = scene
        self._place = place
        self._seed = seed
        self._known: dict[Path, Counter[int]] = {}

    def look(self) -> None:
        """Look once, and compare with what was seen before."""
        now = self._snapshot() if self._scene.scheme == "sqlite" else self._files()
        self.faults += compare(self._scene, self._seed, self.last, now)
        self.last = now
        self.looks += 1

    def _snapshot(self) -> Look:
        found: Look = {topic: Counter() for topic in TOPICS}
        if not self._place.database.exists():
            return found
        with sink_reader.read_only(self._place.database, timeout=30.0) as opened:
            opened.execute("BEGIN")
            there = {name for (name,) in opened.execute("SELECT name FROM sqlite_schema")}
            for topic in there & set(TOPICS):
                query = f"SELECT _cf_job_id, count(*) FROM {topic} GROUP BY 1"
                found[topic] = Counter(dict(opened.execute(query).fetchall()))
        return found

    def _files(self) -> Look:
        found: Look = {}
        for topic in TOPICS:
            folder = self._place.home / "out" / topic
            found[topic] = Counter()
            for file in [*folder.glob("*.parquet"), *folder.glob("*/*.parquet")]:
                found[topic].update(self._rows(file))
        return found

    def _rows(self, file: Path) -> Counter[int]:
        """Of each job in a file; what was appended never changes, and is read once."""
        if file in self._known:
            return self._known[file]
        with pq.ParquetFile(file) as opened:
            rows = Counter(opened.read(["_cf_job_id"])["_cf_job_id"].to_pylist())
        if self._scene.mode == "append":
            self._known[file] = rows
        return rows


def compare(scene: Scene, seed: int, before: Look, now: Look) -> list[str]:
    """What a reader must not have seen."""
    faults = []
    for topic in TOPICS:
        for job, rows in now[topic].items():
            if rows != size(seed, job, topic):
                faults.append(f"{rows} of the {size(seed, job, topic)} rows of {topic} {job}")
        if scene.mode == "append":
            if lost := before[topic].keys() - now[topic].keys():
                faults.append(f"{topic} had {sorted(lost)} and has not any more")
            continue
        earlier = {job % LOCATIONS: job for job in before[topic]}
        places = Counter(job % LOCATIONS for job in now[topic])
        if earlier.keys() - places.keys() or places.total() > len(places):
            faults.append(f"{topic} has {sorted(now[topic])} after {sorted(before[topic])}")
        if any(job < earlier.get(job % LOCATIONS, 0) for job in now[topic]):
            faults.append(f"{topic} has gone back from {earlier} to {sorted(now[topic])}")
    left, right = (now[topic].keys() for topic in TOPICS)
    if scene.scheme == "sqlite" and left != right:
        faults.append(f"one topic of {sorted(left ^ right)} without the other")
    return [f"{scene.name}: {words}" for words in faults]


def read(home: Path, seed: int) -> None:
    """Be the reader: look until the commits are done, and once more; then tell."""
    readers = [Reader(scene, scene.place(home), seed) for scene in SCENES]
    done = False
    print("reading", flush=True)
    while True:
        for reader in readers:
            reader.look()
        if done:
            break
        done = (home / "done").exists()
    print(json.dumps([[r.looks, r.faults, {t: sorted(j) for t, j in r.last.items()}]
                      for r in readers]))  # fmt: skip


def trial(home: Path, commits: int, seed: int) -> list[tuple[str, int, list[str]]]:
    """Publish so many commits to each scene under a reader: scene, looks, what was not whole.

    Large outputs are in parts where row groups are small (`small_groups`).

    Raises:
        AssertionError: in the end, not everything is there.
    """
    places = [(scene, scene.place(home)) for scene in SCENES]
    command = [sys.executable, "-m", "proofs.polled", "--read", str(home), "--seed", str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as reader:
        assert reader.stdout
        assert reader.stdout.readline() == b"reading\n"
        try:
            for job in range(1, commits + 1):
                for scene, place in places:
                    publish(scene, place, seed, job)
        finally:
            (home / "done").touch()
        told = json.loads(reader.stdout.read())
    summary = []
    for scene, (looks, faults, last) in zip(SCENES, told, strict=True):
        first = 1 if scene.mode == "append" else max(1, commits - LOCATIONS + 1)
        assert last == {topic: [*range(first, commits + 1)] for topic in TOPICS}, (scene, last)
        summary.append((scene.name, looks, faults))
    return summary


def main() -> int:
    parser = arguments.parser("polled", __doc__)
    parser.add_argument("--commits", type=int, default=1000)
    arguments.add_seed(parser)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        read(options.read, options.seed)
        return 0
    small_groups()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="polled-") as folder:
        summary = trial(Path(folder), options.commits, options.seed)
    for name, looks, faults in summary:
        print(f"{name:24} {looks:6} looks, {len(faults)} of something not whole")
        for words in faults[:20]:
            print(f"    {words}")
    took = time.monotonic() - started
    print(f"seed {options.seed}: {options.commits} commits to each in {took:.0f} s")
    return int(any(faults for _, _, faults in summary))


if __name__ == "__main__":
    sys.exit(main())
