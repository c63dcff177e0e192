"""What must be so when everything is at rest: the ledger and the sinks, held to the history.

lost      a content at rest that is no version; a version without its jobs; a job without an
          end, or completed without its rows
twice     rows of one output more than once; one content recorded twice in a row
partial   an output with other rows than its content has; a version nobody ever wrote
audit     `casparian verify` finds something
left      a process, a stage, a guest's folder or a temporary file that outlived its owner
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import psutil

from proofs.chaos.history import History
from proofs.chaos.place import Place
from proofs.chaos.readers import QUERIES, Complain, Readers, Seen, by_version, expected

KINDS = ("lost", "twice", "partial", "audit", "left")

VERSIONS = """
SELECT l.rel_path, v.id, v.content_hash FROM cf_file_version v
JOIN cf_file_location l ON l.id = v.location_id ORDER BY l.id, v.ordinal
"""

JOBS = "SELECT file_version_id, plugin_name, status, reason FROM cf_processing_queue"

MOVED = """
SELECT g.file_version_id, t.location_id, t.ordinal FROM cf_gone_version g
JOIN cf_file_version t ON t.id = g.to_version_id
"""

WORKED = """
SELECT v.location_id, v.ordinal, l.current_version_id, j.plugin_name, j.status = 'COMPLETED'
FROM cf_file_version v JOIN cf_file_location l ON l.id = v.location_id
JOIN cf_processing_queue j ON j.file_version_id = v.id
"""

PLACED = {"lines": ["lines", "entries"], "sizes": ["sizes"]}
"""Plugin -> its topics."""


def check(place: Place, history: History, readers: Readers, complain: Complain) -> dict[str, int]:
    """Look at everything; no file is being changed, no process of the product runs.

    Returns:
        What was compared, and how much of it.
    """
    versions = _versions(place, history, complain)
    jobs = _jobs(place, versions, complain)
    readers.poll()
    _rows(place, history, readers, complain, versions, jobs)
    verdict = place.run("verify")
    if verdict.returncode:
        complain("audit", f"verify: {verdict.stdout}{verdict.stderr}")
    for words in leftovers(place):
        complain("left", words)
    statuses = Counter(status for status, _ in jobs.values())
    return {"files": len(history.present), "versions": len(versions), **statuses}


def _versions(place: Place, history: History, complain: Complain) -> dict[int, tuple[str, str]]:
    """Version id -> its path and hash, after holding them to the history."""
    if history.on_disk() != history.present:
        complain("lost", "a file of the source root was changed, and not by the load")
    of_path: dict[str, list[str]] = defaultdict(list)
    versions = {}
    for path, version_id, digest in place.ask(VERSIONS):
        versions[version_id] = (path, digest)
        if digest not in history.written.get(path, ()):
            complain("partial", f"version {version_id} of {path} has bytes that nobody wrote")
        if of_path[path][-1:] == [digest]:
            complain("twice", f"{path}: version {version_id} is the one before it once more")
        of_path[path].append(digest)
    there = {p for (p,) in place.ask("SELECT rel_path FROM cf_file_location WHERE gone_at IS NULL")}
    for path, digest in history.present.items():
        if of_path.get(path, [])[-1:] != [digest]:
            complain("lost", f"{path}: what it holds at rest ({digest[:12]}) is no version of it")
    for path in there ^ history.present.keys():
        complain("lost", f"{path}: the ledger and the disk differ on whether it is there")
    return versions


def _jobs(
    place: Place, versions: dict[int, tuple[str, str]], complain: Complain
) -> dict[tuple[int, str], tuple[str, str]]:
    """(Version id, plugin) -> status and reason: each must be there, and have an end."""
    jobs = {(version, plugin): (status, why) for version, plugin, status, why in place.ask(JOBS)}
    current = {
        version_id for (version_id,) in place.ask(
            "SELECT current_version_id FROM cf_file_location WHERE gone_at IS NULL"
        )
    }  # fmt: skip
    for version_id, (path, _) in versions.items():
        for plugin in ("lines", "sizes") if path.startswith("twice/") else ("lines",):
            status, why = jobs.get((version_id, plugin), ("no job", ""))
            ended = {"COMPLETED"} if version_id in current else {"COMPLETED", "SUPERSEDED"}
            # A job that was killed as often as jobs may be is given up, and says so; the round
            # before this one has had a person retry it.
            if status not in ended:
                complain("lost", f"{plugin} of version {version_id} of {path}: {status} ({why})")
    return jobs


def _rows(
    place: Place,
    history: History,
    readers: Readers,
    complain: Complain,
    versions: dict[int, tuple[str, str]],
    jobs: dict[tuple[int, str], tuple[str, str]],
) -> None:
    """Every completed job's outputs are in their sinks once, and nothing else is."""
    times: dict[str, Counter[int]] = {topic: Counter() for topic in ("lines", *QUERIES)}
    for file in place.parquet.glob("*.parquet"):
        if seen_file := readers.files.get((file.name, file.stat().st_ino)):
            times["lines"][seen_file.version_id] += 1
    for topic in QUERIES:
        for seen, rows in _table(place, topic).items():
            times[topic][seen.version_id] = _copies(topic, seen, rows, history, complain)
    moves = Moves(place)
    for (version_id, plugin), (status, _) in jobs.items():
        path, digest = versions[version_id]
        shows = status == "COMPLETED" and not moves.has_moved(version_id, plugin)
        for topic in PLACED[plugin]:
            rowless = topic == "entries" and not history.contents[digest].lines
            due = int(shows and not rowless)
            found = times[topic].pop(version_id, 0)
            if found != due:
                kind = "lost" if found < due else "twice"
                complain(kind, f"{topic} of version {version_id} of {path}: {found}, not {due}")
    for topic, left in times.items():
        for version_id in left:
            complain("twice", f"{topic}: rows of version {version_id}, which has no such job")


class Moves:
    """Where the files of versions have gone, and what was worked there since."""

    def __init__(self, place: Place) -> None:
        self._moves = {version: (there, ordinal) for version, there, ordinal in place.ask(MOVED)}
        self._worked: dict[int, list[tuple[int, str, bool]]] = defaultdict(list)
        self._last: dict[int, int] = {}
        for there, ordinal, last, plugin, done in place.ask(WORKED):
            self._worked[there].append((ordinal, plugin, bool(done)))
            self._last[there] = last

    def has_moved(self, version_id: int | None, plugin: str) -> bool:
        """Whether a version's rows show where its file went instead: the plugin, or else all that
        want the file there, have worked it, there or where it went next."""
        while version_id in self._moves:
            there, first = self._moves[version_id]
            worked = [each for each in self._worked[there] if each[0] >= first]
            worked = [each for each in worked if each[1] == plugin] or worked
            if worked and {each[1] for each in worked} == {each[1] for each in worked if each[2]}:
                return True
            version_id = self._last.get(there)
        return False


def _table(place: Place, topic: str) -> dict[Seen, list[Any]]:
    if not place.sink.exists():
        return {}
    if not place.ask("SELECT 1 FROM sqlite_master WHERE name = ?", topic, of=place.sink):
        return {}
    return by_version(place.ask(QUERIES[topic], of=place.sink))


def _copies(topic: str, seen: Seen, rows: list[Any], history: History, complain: Complain) -> int:
    """How often the rows of an output are there, rounded up."""
    content = history.contents.get(seen.source_hash)
    wanted = expected(topic, content.rows) if content else []
    found = Counter(rows)
    most = max(found.values())
    if found != Counter(wanted * most):
        complain("partial", f"{topic} of {seen} has other rows than its content")
    return most


def leftovers(place: Place) -> Iterator[str]:
    """What outlived its owner; no process of the product should run."""
    for process in processes(place):
        yield f"process {process.pid} is still there: {' '.join(process.cmdline())[:200]}"
    guests = place.settings.database.guests_folder
    for folder in (*place.stages(), guests, place.temporary):
        for file in folder.glob("*"):
            yield f"{file} was left behind"


def processes(place: Place) -> list[psutil.Process]:
    """Processes whose command line names this place: commands, daemons and guests."""
    found = []
    for process in psutil.process_iter(["cmdline", "pid", "status"]):
        words = " ".join(process.info["cmdline"] or ())
        if str(place.flow) in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return [process for process in found if process.pid != psutil.Process().pid]
