"""What a reader must see: the reference model.

Events go in (a file changes, a plugin is published, a sink is moved, a job fails), rows come out,
for each topic, sink and mode. It is written from the rules (docs/adr/0032), not from the product,
and knows nothing of it. `Model` has a method for each event; a scan is an event, and so is work.

    version slot    (version, plugin, topic, sink): what the plugin's active artifact gave stands,
                    else what the artifact deployed last gave; of one artifact's the latest job's
    location slot   (location, plugin, topic, sink): what stands for the greatest ordinal worked
    append          a topic shows what stands in each version slot
    replace         a topic shows what stands in each location slot
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


class Artifact(NamedTuple):
    """What a plugin's bytes do with a content, whose lines are words here."""

    name: str
    topics: tuple[str, ...] = ("lines",)
    fails: str = "(never)"
    """A content with this line makes it fail."""
    suffix: str = ".txt"
    """Of the files that it wants."""

    def rows(self, topic: str, content: str) -> list[str]:
        """`marked` gets the lines that begin with `!`, any other topic the rest."""
        return [line for line in content.split() if line.startswith("!") == (topic == "marked")]


class Version(NamedTuple):
    """One content of a location."""

    path: str
    ordinal: int
    content: str


class File(NamedTuple):
    """What is on disk under one path."""

    content: str
    stamp: int
    """Stands for inode and time: a moved file keeps it, and so does `cp -p`."""


class Row(NamedTuple):
    """What a reader sees of a row: which version of which file it is from, and who made it."""

    path: str
    ordinal: int
    by: str
    line: str


@dataclass
class Location:
    """A path that was seen at a scan."""

    versions: dict[int, Version] = field(default_factory=dict)
    stamp: int = 0
    gone: bool = False

    @property
    def last(self) -> Version:
        return self.versions[max(self.versions)]


@dataclass
class Job:
    """One version to be worked by one artifact."""

    number: int
    version: Version
    plugin: str
    release: str
    """The plugin's version, whose artifact it is."""
    artifact: Artifact
    rebuild: int = 0
    """Of which rebuild it is; 0: of none."""
    was: str = ""
    """Its status before the rebuild; empty if the rebuild made it."""
    status: str = "queued"
    """queued, done, failed; expired: its rows did not stand, and are kept no longer; cancelled: its
    rebuild was."""
    ended: int = 0
    """When, in the order of all that happened."""


class Output(NamedTuple):
    """What one job gave one topic in one sink; perhaps no rows."""

    job: int
    version: Version
    plugin: str
    release: str
    artifact: Artifact
    topic: str
    sink: str


@dataclass
class Ledger:
    """All that a backup holds."""

    locations: dict[str, Location] = field(default_factory=dict)
    deployed: dict[str, dict[str, Artifact]] = field(default_factory=dict)
    """Plugin -> version -> artifact, in the order of deployment."""
    stubs: set[tuple[str, str]] = field(default_factory=set)
    """(plugin, version) of which it knows only what was adopted: they cannot run."""
    active: dict[str, str] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    removed: list[Output] = field(default_factory=list)
    """Of topics that were removed."""
    retracted: set[Version] = field(default_factory=set)
    moved: dict[Version, Version] = field(default_factory=dict)
    """What a location had when its file moved away -> what that is at its new place."""
    sinks: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    """(plugin, topic) -> the sinks that its rows go to from now on."""
    modes: dict[tuple[str, str, str], str] = field(default_factory=dict)
    """(plugin, topic, sink) -> mode; kept when the topic goes elsewhere."""
    on_delete: str = "keep"
    complete: set[int] = field(default_factory=lambda: {0})
    """Rebuilds of which every job has ended well."""


class Model:
    """A source root, a ledger, sinks, and their readers."""

    def __init__(self, *, kept: bool = True, default_sink: str = "S1") -> None:
        self.kept = kept  # whether every version's bytes are kept, or only those on disk are there
        self.default_sink = default_sink
        self.disk: dict[str, File] = {}
        self.ledger = Ledger()
        self.refused: set[tuple[str, str]] = set()  # (topic, sink): the sink refuses it
        self.away: dict[str, Callable[[str, str], list[Row]]] = {}  # sink -> its rows when it went
        self._backup = Ledger()
        self._deleted: set[Output] = set()  # by sinks, since nobody's slot was theirs
        self.count = 0

    # Events on disk. Nothing is noticed before the next scan.

    def write(self, path: str, content: str) -> None:
        """A content appears, changes, or comes back."""
        self.disk[path] = File(content, self._next())

    def delete(self, path: str) -> None:
        del self.disk[path]

    def move(self, old: str, new: str) -> None:
        self.disk[new] = self.disk.pop(old)

    def copy(self, old: str, new: str) -> None:
        """As `cp -p`: the time is kept."""
        self.disk[new] = self.disk[old]

    def scan(self) -> None:
        known = self.ledger.locations
        for path, file in self.disk.items():
            location = known.setdefault(path, Location())
            if not location.versions or location.last.content != file.content:
                ordinal = max(location.versions, default=0) + 1
                location.versions[ordinal] = Version(path, ordinal, file.content)
            self.ledger.moved.pop(location.last, None)  # back, with that content
            location.gone, location.stamp = False, file.stamp
        for path in known.keys() - self.disk.keys():
            known[path].gone = True
        self._find_moves()
        self._queue_missing()

    def _find_moves(self) -> None:
        """A gone location's file is where its content and its inode or time are now.

        Of several candidates those of one name pair; what does not pair is no move.
        """
        known, moved = self.ledger.locations, self.ledger.moved
        gone = [path for path, at in known.items() if at.gone and at.last not in moved]
        pairs = [(old, new) for old in gone for new in self.disk if self._alike(old, new)]
        for old, new in pairs:
            rivals = [pair for pair in pairs if (pair[0] == old) != (pair[1] == new)]
            if rivals and (
                _name(old) != _name(new) or any(_name(one) == _name(two) for one, two in rivals)
            ):
                continue
            moved[known[old].last] = known[new].last
            if known[old].last in self.ledger.retracted:  # a retraction goes with the file
                self.ledger.retracted.add(known[new].last)

    def _alike(self, old: str, new: str) -> bool:
        here, there = self.ledger.locations[old], self.ledger.locations[new]
        same = here.last.content == there.last.content and here.stamp == there.stamp
        return same and here.last.content != ""

    # What users ask.

    def publish(self, plugin: str, release: str, artifact: Artifact) -> None:
        """Deploy an artifact under a version; the greatest version is active from then on. What it
        worked under another version, and has no rows of any more, is queued."""
        deployed = self.ledger.deployed.setdefault(plugin, {})
        if release in deployed and (plugin, release) not in self.ledger.stubs:
            return
        deployed.pop(release, None)
        deployed[release] = artifact
        self.ledger.stubs.discard((plugin, release))
        known = [r for r in deployed if (plugin, r) not in self.ledger.stubs]
        if release == max(known, key=_number):
            self._make_active(plugin, release)
            own = [j for j in self.ledger.jobs if (j.plugin, j.artifact) == (plugin, artifact)]
            self._redo(plugin, {job.version for job in own if job.status == "expired"})
        self._queue_missing()

    def activate(self, plugin: str, release: str) -> int:
        """What it has worked shows at once; what only other versions of the plugin have had is
        queued for it, and what it worked and has no rows of any more, and what lacks a job (a
        restored ledger may have lost it): how much."""
        self._make_active(plugin, release)
        before = len(self.ledger.jobs)
        self._redo(plugin, {j.version for j in self.ledger.jobs if j.plugin == plugin})
        self._queue_missing()
        return len(self.ledger.jobs) - before

    def _make_active(self, plugin: str, release: str) -> None:
        self.ledger.active[plugin] = release
        for topic in self.ledger.deployed[plugin][release].topics:
            if (plugin, topic) not in self.ledger.sinks:
                self.set_topic(plugin, topic, {self.default_sink: "append"})
        back = [o for o in self.ledger.removed if self._gives(plugin, o)]
        self.ledger.removed = [o for o in self.ledger.removed if o not in back]
        self.ledger.outputs += back

    def _gives(self, plugin: str, output: Output) -> bool:
        """Whether the plugin's active artifact gave it, or would."""
        active = self.artifact(plugin)
        return (output.plugin, output.artifact) == (
            plugin,
            active,
        ) and output.topic in active.topics

    def redo(self, plugin: str) -> int:
        """Queue every version that the active artifact has not worked: how many."""
        known = self.ledger.locations.values()
        return self._redo(plugin, {v for at in known for v in at.versions.values()})

    def _redo(self, plugin: str, versions: set[Version]) -> int:
        queued = 0
        for version in sorted(versions - self.ledger.retracted):
            jobs = [j for j in self.ledger.jobs if (j.version, j.plugin) == (version, plugin)]
            own = [j for j in jobs if j.artifact == self.artifact(plugin)]
            busy = any(j.status == "queued" for j in jobs)
            expired = all(j.status == "expired" for j in own)
            if self._is_there(version) and expired and (own or not busy):
                queued += self._queue(version, plugin)
        return queued

    def retry(self) -> None:
        """Queue what has failed, and is not closed, once more."""
        self._retry()

    def _retry(self, rebuilt: Collection[str] = ()) -> None:
        """
        Args:
            rebuilt: only what active artifacts of these plugins failed at.
        """
        failed = [job for job in self.ledger.jobs if job.status == "failed"]
        for job in [job for job in failed if self._failure(job) == "open"]:
            if not rebuilt or (job.plugin in rebuilt and job.artifact == self.artifact(job.plugin)):
                job.status = "queued"

    def retract(self, path: str, ordinal: int = 0) -> None:
        """Hide a version's rows, or those of all versions of a location that were worked; also
        where a version's file was before it moved, and where it is now."""
        self.ledger.retracted.update(self._named(path, ordinal))

    def reinstate(self, path: str, ordinal: int = 0) -> None:
        """Undo `retract`."""
        self.ledger.retracted.difference_update(self._named(path, ordinal))

    def _named(self, path: str, ordinal: int) -> list[Version]:
        worked = [output.version for output in self.ledger.outputs]
        named = [v for v in worked if v.path == path and ordinal in (0, v.ordinal)]
        moved = self.ledger.moved
        for version in named:  # it grows
            named += [v for v in moved if moved[v] == version and v not in named]
            if version in moved and moved[version] not in named:
                named.append(moved[version])
        return named

    def set_topic(self, plugin: str, topic: str, sinks: dict[str, str]) -> None:
        """Send a topic to these sinks from now on; a mode counts for what is there already."""
        self.ledger.sinks[plugin, topic] = list(sinks)
        self.ledger.modes.update({(plugin, topic, sink): mode for sink, mode in sinks.items()})

    def remove_topic(self, plugin: str, topic: str) -> None:
        """Of a topic that the active version does not declare. Its rows come back when what gave
        them is active again."""
        self.ledger.sinks.pop((plugin, topic), None)
        dropped = [o for o in self.ledger.outputs if (o.plugin, o.topic) == (plugin, topic)]
        self._drop(dropped)
        self.ledger.removed += dropped

    def set_on_delete(self, what: str) -> None:
        self.ledger.on_delete = what

    def rebuild(self, plugin: str) -> None:
        """Work everything that stands again, into the present sinks. A rebuild of the plugin that
        has not ended is cancelled."""
        for job in [j for j in self.ledger.jobs if j.plugin == plugin]:
            if job.rebuild not in self.ledger.complete:
                self._cancel(job)
        number, active = self._next(), self.artifact(plugin)
        for version in dict.fromkeys(o.version for o in self.ledger.outputs if o.plugin == plugin):
            if not self._is_there(version) or not version.path.endswith(active.suffix):
                continue
            mine = [j for j in self.ledger.jobs if (j.version, j.plugin) == (version, plugin)]
            waits = [j for j in mine if j.artifact == active and j.status in _UNWORKED]
            for job in waits:
                job.rebuild, job.was, job.status = number, job.status, "queued"
            if not waits:
                self._queue(version, plugin, number)

    def _cancel(self, job: Job) -> None:
        if job.was != "queued":  # else somebody had asked for it before
            job.status = "cancelled"
            self._drop(output for output in self.ledger.outputs if output.job == job.number)
        job.rebuild = 0

    def backup(self) -> None:
        self._backup = copy.deepcopy(self.ledger)

    def restore(self) -> None:
        """The ledger is as it was at the backup, and adopts what its sinks have beyond that."""
        lost, self.ledger = self.ledger, copy.deepcopy(self._backup)
        for output in lost.outputs:
            if output not in self.ledger.outputs:
                self._adopt(output)
                topic = output.plugin, output.topic, output.sink
                self.ledger.modes.setdefault(topic, lost.modes[topic])
        self._forget(self._deleted & {*self.ledger.outputs, *self.ledger.removed})
        worked = {output.version for output in lost.outputs}
        self.ledger.retracted |= lost.retracted & worked
        self._end_rebuilds()

    def _adopt(self, output: Output) -> None:
        location = self.ledger.locations.setdefault(output.version.path, Location())
        if output.version not in location.versions.values():
            location.versions[output.version.ordinal] = output.version
            location.gone = False  # the next scan looks
        deployed = self.ledger.deployed.setdefault(output.plugin, {})
        if output.release not in deployed:
            deployed[output.release] = output.artifact
            self.ledger.stubs.add((output.plugin, output.release))
        known = [job.rebuild for job in self.ledger.jobs if job.number == output.job]
        jobs = [job for job in self.ledger.jobs if job.number != output.job]
        adopted = Job(*output[:5], rebuild=next(iter(known), 0), status="done", ended=self._next())
        self.ledger.jobs = [*jobs, adopted]
        self.ledger.outputs.append(output)

    # What happens.

    def kill(self) -> None:
        """A daemon is killed, and starts again: as if it had not been."""

    def refuse(self, topic: str, sink: str) -> None:
        """A sink refuses a topic from now on."""
        self.refused.add((topic, sink))

    def accept(self, topic: str, sink: str) -> None:
        self.refused.discard((topic, sink))

    def expire(self) -> None:
        """The time is over that rows are kept which do not stand in any slot."""
        sinks = {output.sink for output in self.ledger.outputs}
        stand = {o for sink in sinks for o in self._standing(self._in(sink))}
        self._forget({o for o in self.ledger.outputs if o not in stand} | {*self.ledger.removed})

    def _forget(self, lost: set[Output]) -> None:
        """Their sinks have deleted them."""
        self._deleted |= lost
        numbers = {output.job for output in lost}
        for job in self.ledger.jobs:
            if job.number in numbers:
                job.status = "expired"
        self.ledger.removed = [o for o in self.ledger.removed if o not in lost]
        self._drop(lost)

    def go_away(self, sink: str, _when: str = "early") -> None:
        """A sink can be read and not written: its readers see what they saw.

        Args:
            _when: makes no difference to them: whether jobs find it so `early`, when they stage
                their rows, or `late`, when these are to be published.
        """
        rows = {kind: dict(self._all_rows(sink, kind)) for kind in ("topic", "current", "history")}
        self.away[sink] = lambda topic, kind: rows[kind].get(topic, [])

    def come_back(self, sink: str) -> None:
        del self.away[sink]

    def work(self) -> None:
        """Every queued job is run, and what it gives is published."""
        self._run_queued()
        self._end_rebuilds()
        self._run_queued()  # what they had tried again

    def _run_queued(self) -> None:
        for job in self.ledger.jobs:
            if job.status == "queued" and self._is_there(job.version):
                self._run(job)

    def _run(self, job: Job) -> None:
        job.ended = self._next()
        targets = [(t, sink) for t in job.artifact.topics for sink in self._sinks(job.plugin, t)]
        given = {(t, s) for t, s in targets if job.artifact.rows(t, job.version.content)}
        if job.artifact.fails in job.version.content.split() or self.refused & given:
            job.status = "failed"  # of two topics of one job neither shows
        elif self.away.keys().isdisjoint(sink for _, sink in targets):
            job.status = "done"
            facts = job.number, job.version, job.plugin, job.release, job.artifact
            self.ledger.outputs += [Output(*facts, topic, sink) for topic, sink in targets]

    def _end_rebuilds(self) -> None:
        """Show the new generation when every job of it has ended well: in place of the old."""
        for number in {job.rebuild for job in self.ledger.jobs} - self.ledger.complete:
            jobs = [job for job in self.ledger.jobs if job.rebuild == number]
            if all(job.status == "done" for job in jobs):
                self.ledger.complete.add(number)
                rebuilt = {(job.version, job.plugin) for job in jobs}
                self._retry({job.plugin for job in jobs})
                self._drop(
                    o
                    for o in self.ledger.outputs
                    if (o.version, o.plugin) in rebuilt
                    and o.topic in self.artifact(o.plugin).topics
                    and o.sink not in self._sinks(o.plugin, o.topic)
                )

    def _drop(self, outputs: Iterable[Output]) -> None:
        dropped = set(outputs)
        self.ledger.outputs = [o for o in self.ledger.outputs if o not in dropped]

    # The queue.

    def _queue_missing(self) -> None:
        """A present file's current version, for each plugin that wants it and has not had it."""
        had = {(job.version, job.plugin) for job in self.ledger.jobs}
        for plugin in self.ledger.active:
            for location in self.ledger.locations.values():
                if not location.gone and (location.last, plugin) not in had:
                    self._queue(location.last, plugin)

    def _queue(self, version: Version, plugin: str, rebuild: int = 0) -> bool:
        release, artifact = self.ledger.active[plugin], self.artifact(plugin)
        wanted = version.path.endswith(artifact.suffix)
        if wanted:
            job = Job(self._next(), version, plugin, release, artifact, rebuild)
            self.ledger.jobs.append(job)
        return wanted

    def _next(self) -> int:
        self.count += 1
        return self.count

    def artifact(self, plugin: str) -> Artifact:
        """The active one."""
        return self.ledger.deployed[plugin][self.ledger.active[plugin]]

    def _sinks(self, plugin: str, topic: str) -> list[str]:
        return self.ledger.sinks.get((plugin, topic), [self.default_sink])

    def _is_there(self, version: Version) -> bool:
        """Whether the version's bytes can be had."""
        location = self.ledger.locations[version.path]
        file = self.disk.get(version.path, File("", 0))
        return self.kept or (version == location.last and file.content == version.content)

    # What stands.

    def states(self, outputs: list[Output]) -> dict[Output, str]:
        """current, past, retracted or hidden, for each of these outputs.

        With the outputs of one sink that is what its readers see, with those of all sinks what
        `casparian query` shows, for then the sink is no part of a slot.
        """
        standing = self._standing(outputs)
        greatest: dict[tuple[str, str, str], int] = {}
        for output in standing:
            slot = output.version.path, output.plugin, output.topic
            greatest[slot] = max(greatest.get(slot, 0), output.version.ordinal)
        return dict.fromkeys(outputs, "hidden") | {
            output: self._state(output, greatest[output.version.path, output.plugin, output.topic])
            for output in standing
        }

    def _standing(self, outputs: list[Output]) -> list[Output]:
        """That of each version slot that stands in it."""
        rebuilds = {job.number: job.rebuild for job in self.ledger.jobs}
        slots: dict[tuple[Version, str, str], list[Output]] = {}
        for output in outputs:
            if rebuilds[output.job] in self.ledger.complete:
                slot = output.version, output.plugin, output.topic
                slots.setdefault(slot, []).append(output)
        return [max(rivals, key=self._rank) for rivals in slots.values()]

    def _rank(self, output: Output) -> tuple[bool, int, int]:
        deployed = self.ledger.deployed[output.plugin]
        releases = [r for r, artifact in deployed.items() if artifact == output.artifact]
        active = self.ledger.active.get(output.plugin) in releases
        return active, list(deployed).index(releases[-1]), output.job

    def _state(self, output: Output, greatest: int) -> str:
        """Of an output that stands in its version slot."""
        location = self.ledger.locations[output.version.path]
        if output.version in self.ledger.retracted:
            return "retracted"
        if self.ledger.on_delete == "retract" and self._is_deleted(location):
            return "hidden"
        if self._has_moved(output.version, output.plugin):
            return "hidden"
        is_left = self._has_moved(location.last, output.plugin)
        return "current" if output.version.ordinal == greatest and not is_left else "past"

    def _is_deleted(self, location: Location) -> bool:
        """Whether the file is nowhere; a file that has moved is where it is now."""
        to = self.ledger.moved.get(location.last)
        return location.gone and not (to and not self._is_deleted(self.ledger.locations[to.path]))

    def _has_moved(self, version: Version, plugin: str) -> bool:
        """Whether a version is published where its file is now: by the plugin, or, if that does not
        want it there, by all who do. It may have moved on before that."""
        to = self.ledger.moved.get(version)
        if to is None:
            return False
        jobs = [
            job
            for job in self.ledger.jobs
            if job.version.path == to.path and job.version.ordinal >= to.ordinal
        ]
        jobs = [job for job in jobs if job.plugin == plugin] or jobs
        done = {job.plugin for job in jobs if job.status in ("done", "expired")}
        if jobs and done == {job.plugin for job in jobs}:
            return True
        return self._has_moved(self.ledger.locations[to.path].last, plugin)

    # What readers see.

    def rows(self, topic: str, sink: str, kind: str = "topic") -> list[Row]:
        """The rows of a topic in a sink.

        Args:
            kind: `topic`, `current` or `history`.
        """
        if sink in self.away:
            return self.away[sink](topic, kind)
        return dict(self._all_rows(sink, kind)).get(topic, [])

    def query(self, topic: str, kind: str = "current") -> list[Row]:
        """The rows of a topic (`current`) or of its `history`, as `casparian query` gives them."""
        states = self.states([o for o in self.ledger.outputs if o.topic == topic])
        return _rows(o for o, state in states.items() if state in _SHOWN[kind])

    def _all_rows(self, sink: str, kind: str) -> Iterable[tuple[str, list[Row]]]:
        states = self.states(self._in(sink))
        for topic in dict.fromkeys(output.topic for output in states):
            shown = [
                output
                for output, state in states.items()
                if output.topic == topic and state in self._shown(output, kind)
            ]
            yield topic, _rows(shown)

    def _in(self, sink: str) -> list[Output]:
        return [output for output in self.ledger.outputs if output.sink == sink]

    def _shown(self, output: Output, kind: str) -> set[str]:
        if kind == "topic":
            mode = self.ledger.modes[output.plugin, output.topic, output.sink]
            kind = "current" if mode == "replace" else "history"
        return _SHOWN[kind]

    # What is said of jobs.

    def failures(self) -> set[tuple[str, int, str, str]]:
        """Of each failure: path, ordinal, plugin, and whether it is open, mended or gone unread."""
        failed = [job for job in self.ledger.jobs if job.status == "failed"]
        return {(*job.version[:2], job.plugin, self._failure(job)) for job in failed}

    def _failure(self, failed: Job) -> str:
        path, ordinal, _ = failed.version
        if failed.rebuild not in self.ledger.complete:
            return "open"  # its rebuild waits for it
        for job in self.ledger.jobs:
            same = (job.version.path, job.plugin) == (path, failed.plugin)
            if same and job.status == "done" and job.version.ordinal >= ordinal:
                active = self.artifact(job.plugin)
                if job.ended > failed.number or job.artifact == active != failed.artifact:
                    return "mended"
        return "gone unread" if self.ledger.locations[path].gone else "open"

    def stale(self) -> set[tuple[str, str]]:
        """(path, plugin) of files whose rows are of an earlier version than they have now."""
        states = self.states(self.ledger.outputs)
        return {
            (o.version.path, o.plugin)
            for o, state in states.items()
            if state == "current" and o.version != self.ledger.locations[o.version.path].last
        }


_UNWORKED = ("queued", "failed", "cancelled")

_SHOWN = {"current": {"current"}, "history": {"current", "past"}}


def _rows(outputs: Iterable[Output]) -> list[Row]:
    return sorted(
        Row(*output.version[:2], output.artifact.name, line)
        for output in outputs
        for line in output.artifact.rows(output.topic, output.version.content)
    )


def _number(release: str) -> list[int]:
    return [int(part) for part in release.split(".")]


def _name(path: str) -> str:
    return path.rpartition("/")[2]
