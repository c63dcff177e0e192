"""What must hold: at the end of a trial, and in the eyes of a reader who never stops looking."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from casparian_flow.db import views
from casparian_flow.db.access import Ledger, open_ledger
from casparian_flow.durable import STATE_FOLDER
from casparian_flow.services.verify import verify
from proofs import sink_reader
from proofs.crash.scene import TOPICS, Act, Scene
from proofs.sink_reader import Group

LEFT = "left behind: "
"""Begins the fault of a file that nobody needs any more."""

PAUSE_SECONDS = 0.02
"""Between two looks of the reader: it shares the machine with what it watches."""


def faults(scene: Scene, act: Act) -> list[str]:
    """What is not as it must be after an act came to its end, a sentence each."""
    settings = scene.settings()
    found: list[str] = []
    with open_ledger(settings.database) as ledger:
        found += [f"verify: {problem}" for problem in verify(settings, ledger).problems]
        found += _of_ledger(scene, act, ledger)
    for topic in TOPICS:
        found += _of_topic(scene, act, topic)
    for folder in (scene.ground.home, scene.ground.sink):
        found += [f"{LEFT}{file}" for file in _left(folder)]
    return found


def _of_ledger(scene: Scene, act: Act, ledger: Ledger) -> Iterator[str]:
    expected = {
        path: [content.hash for content in contents]
        for path, contents in scene.versions(act).items()
    }
    for path, hashes in expected.items():
        rows = ledger.read(lambda c, p=path: views.versions(c, 1, p.encode(), p))  # type: ignore[misc]
        if [row["content_hash"] for row in rows] != hashes:
            yield f"{path} has {len(rows)} versions, not the {len(hashes)} contents that it had"
    jobs = ledger.read(lambda c: views.jobs(c, None))
    done = Counter(job["rel_path"] for job in jobs if job["status"] == "COMPLETED")
    if done != {path: len(hashes) for path, hashes in expected.items()}:
        yield f"jobs completed: {dict(done)}, where each version has one"
    yield from (
        f"job {job['id']} ({job['rel_path']}) is {job['status']}: {job['reason']}"
        for job in jobs
        if job["status"] != "COMPLETED"
    )


def _of_topic(scene: Scene, act: Act, topic: str) -> Iterator[str]:
    """Each content that a reader is to see gave its rows, once, and no other is there."""
    due = [content for content in scene.shown(act, topic) if content.rows(topic)]
    groups: dict[str, list[Group]] = {}
    for group in sink_reader.groups(scene.locations[topic], topic):
        groups.setdefault(group.source_hash, []).append(group)
    for content in due:
        here = groups.pop(content.hash, [])
        name = f"topic {topic}: the rows of {content.lines[0][:20]!r}"
        if not here:
            yield f"{name} are LOST"
        elif len(here) > 1 or len(here[0].rows) > len(content.rows(topic)):
            yield f"{name} are there TWICE"
        elif here[0].rows != content.rows(topic):
            yield f"{name} are not what the file holds"
    for unknown in groups.values():
        yield f"topic {topic}: {len(unknown[0].rows)} rows of a content that is not to be seen"


def _left(folder: Path) -> Iterator[str]:
    """Staged files, guests' folders and temporary files that nobody needs any more."""
    for path in folder.rglob("*"):
        home = path.parent.name
        housed = (home == "stage" or home.endswith(".guests")) and STATE_FOLDER in path.parts
        if housed or path.suffix in (".tmp", ".part"):
            yield str(path)


class Reader:
    """Looks at the tables all the time, and holds that each job's rows are all there or none, and
    in mode replace those of one version of a file."""

    def __init__(self, scene: Scene) -> None:
        self.looks = 0
        """Times that it read the rows of a job."""
        self.faults: list[str] = []
        self._scene = scene
        self._contents = scene.contents()
        self._versions = scene.versions(scene.acts[-1])
        self._known: set[Path] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="reader", daemon=True)

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Look all the time while the block runs."""
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join()

    def look(self) -> None:
        """Look once."""
        for topic, mode in TOPICS.items():
            known = self._known if mode == "append" else set()  # what replaces has the same name
            hashes = set()
            try:
                for source_hash, rows in sink_reader.counts(
                    self._scene.locations[topic], topic, known
                ):
                    self.faults += filter(None, [self._fault(topic, source_hash, rows)])
                    self.looks += 1
                    hashes.add(source_hash)
            except sink_reader.UNREADABLE:
                pass  # not made yet, or being recovered: there is nothing to see
            except pa.ArrowException as error:
                self.faults.append(f"a reader saw a file that is none, in {topic}: {error}")
            if mode == "replace":
                self.faults += self._at_once(topic, hashes)

    def _at_once(self, topic: str, hashes: set[str]) -> Iterator[str]:
        for path, contents in self._versions.items():
            if len(hashes & {content.hash for content in contents}) > 1:
                yield f"a reader saw two versions of {path} at once in {topic}"

    def _look_on(self) -> None:
        while not self._stop.wait(PAUSE_SECONDS):
            self.look()

    def _fault(self, topic: str, source_hash: str, rows: int) -> str:
        content = self._contents.get(source_hash)
        if content is None:
            return f"a reader saw rows of no content in {topic}"
        due = len(content.rows(topic))
        if rows != due:
            return f"a reader saw {rows} of the {due} rows of one job in {topic}"
        return ""
