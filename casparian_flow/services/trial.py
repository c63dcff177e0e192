"""Trials: run a plugin over files in real guests, and record nothing.

The plugin runs as a job of it would: in its locked environment and the sandbox, over exactly the
bytes of a version or of a file. What it publishes goes to a collector instead of sinks. The ledger
is read and never written.

The guests' folders are in one that this process has locked. It is removed at the end, also after
Ctrl-C; the next trial, and the next start of the daemon, remove what a killed process left.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, Self, TypeVar

import msgspec

from casparian_flow import bundled, durable
from casparian_flow.config import DatabaseSettings, Settings
from casparian_flow.crashpoints import crashpoint
from casparian_flow.db import plugins, versions
from casparian_flow.db.access import Ledger
from casparian_flow.engine import canary, contents, dispatch, inbox, locking
from casparian_flow.engine.batches import Rejects
from casparian_flow.engine.bridge import Guest
from casparian_flow.engine.environments import EnvironmentStore, bundle
from casparian_flow.errors import (
    ArtifactRefused,
    EnvironmentFailed,
    JobError,
    NotFound,
    Unavailable,
)
from casparian_flow.protocol import Artifact, Assignment, reject_topics
from casparian_flow.security import gatekeeper
from casparian_flow.security.choices import NOTHING, Choices
from casparian_flow.security.rules import Policy
from casparian_flow.security.sandbox import InPlace
from casparian_flow.services import architect

if TYPE_CHECKING:
    import pyarrow as pa

GUESTS = 2
"""Guests at a time, where there is work for them and a core for each."""

MANY_FILES = 8
MANY_BYTES = 64 << 20
"""From so many files or bytes on, a second guest is worth its start."""


class Collector(Protocol):
    """Takes what a plugin publishes for one file."""

    def see(self, topic: str, batch: pa.RecordBatch) -> None:
        """Take a checked batch."""


C = TypeVar("C", bound=Collector)


class First:
    """The first rows of each topic, and how many rows there are.

    Args:
        topics: those of the plugin.
        rows: how many to keep of each topic of data.
        rejects: how many of each topic of rejects.
    """

    def __init__(self, topics: Sequence[str], rows: int, rejects: int) -> None:
        self.reject_topics = reject_topics(topics)
        self._limits = rows, rejects
        self.rows: dict[str, int] = {}
        self._kept: dict[str, list[pa.RecordBatch]] = {}

    def see(self, topic: str, batch: pa.RecordBatch) -> None:
        seen = self.rows.get(topic, 0)
        self.rows[topic] = seen + batch.num_rows
        room = max(0, self._limits[topic in self.reject_topics] - seen)
        if room or topic not in self._kept:
            self._kept.setdefault(topic, []).append(batch.slice(0, room))

    @property
    def tables(self) -> dict[str, pa.Table]:
        """Topic -> its first rows, with the types that were published."""
        import pyarrow as pa

        return {topic: pa.Table.from_batches(kept) for topic, kept in self._kept.items()}


@dataclass
class Tried(Generic[C]):
    """A trial of a plugin with one file."""

    file: Assignment
    output: C
    log: str = ""
    seconds: float = 0.0
    error: JobError | None = None
    """Why a job would fail; None where it would complete."""

    @property
    def name(self) -> str:
        """The file as people name it."""
        return "/".join(filter(None, [self.file.source, self.file.rel_path]))


class Balance(NamedTuple):
    """What became of the records of a file, as its reader counted them."""

    read: int = 0
    published: int = 0
    rejected: int = 0
    skipped: int = 0
    reasons: str = ""
    """Of those skipped: `preamble 2, footer 1`."""


_BALANCE = re.compile(
    r"^(?:\w+:\w+:)?read ([\d,]+) = ([\d,]+) published \+ ([\d,]+) rejected \+ ([\d,]+) skipped"
    r"(?: \((.*)\))?$",
    re.MULTILINE,
)


def balance(log: str) -> Balance | None:
    """The balance in a plugin's log; None where it printed none."""
    found = _BALANCE.findall(log)
    if not found:
        return None
    *numbers, reasons = found[-1]
    read, published, rejected, skipped = (int(number.replace(",", "")) for number in numbers)
    return Balance(read, published, rejected, skipped, reasons)


class Trials:
    """Runs one plugin over files; use it in a `with`.

    Args:
        settings: limits of guests and jobs, as for the daemon.
        cache: folder of the environments (`config.cache_folder()`).
        subject: the plugin.
    """

    def __init__(self, settings: Settings, cache: Path, subject: Subject) -> None:
        ceiling = settings.jobs.timeout_seconds
        self.timeout = min(subject.timeout_seconds or ceiling, ceiling)
        self.settings = settings
        self.cache = cache
        self.artifact = subject.artifact
        self.folder = Path()
        self.stopped = threading.Event()
        guest = settings.guest
        self.environments = EnvironmentStore(
            cache / "envs", guest.environments_bytes, self.stopped.is_set,
            guest.environment_limit_bytes,
        )  # fmt: skip
        self._may_be_empty = subject.may_be_empty
        self._stack = contextlib.ExitStack()
        self._lock = threading.Lock()
        self._busy: set[Guest] = set()

    def __enter__(self) -> Self:
        database = self.settings.database
        durable.make_folder(database.state_folder, mode=0o700)
        with contextlib.ExitStack() as stack:
            scratch = durable.scratch(database.trials_folder, _lock(database))
            self.folder = stack.enter_context(scratch)
            crashpoint("trial.folder_made")
            durable.make_private(self.cache)
            canary.check(self.settings.guest, self.cache)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(
        self,
        files: Sequence[Assignment],
        collector: Callable[[], C],
        ended: Callable[[Tried[C]], None] = lambda _: None,
    ) -> list[Tried[C]]:
        """Try every file, in guests that stay warm; the results are in the order of the files.

        A file at which the plugin fails has an error in its result, and the others are tried.

        Args:
            files: of `of_version` and `of_file`.
            collector: makes what takes the rows of one file.
            ended: called after each file, from any thread but one at a time.

        Raises:
            JobError: no guest can be started.
        """
        heavy = len(files) >= MANY_FILES or sum(file.size_bytes for file in files) >= MANY_BYTES
        threads = min(GUESTS if heavy else 1, os.cpu_count() or 1, len(files))
        waiting = queue.SimpleQueue[int]()
        for number in range(len(files)):
            waiting.put(number)
        results: dict[int, Tried[C]] = {}
        faults: list[BaseException] = []

        def work() -> None:  # the kernel ends a guest with the thread that started it
            try:
                with _Bench(self) as bench, contextlib.suppress(queue.Empty):
                    while not self.stopped.is_set():
                        number = waiting.get_nowait()
                        tried = self._try(bench, files[number], collector())
                        with self._lock:
                            results[number] = tried
                            ended(tried)
            except BaseException as error:  # noqa: BLE001  raised by the caller's thread
                faults.append(error)
                self._stop()

        workers = [threading.Thread(target=work) for _ in range(threads)]
        with self._awaited(workers):
            for worker in workers:
                worker.start()
        if faults:
            raise faults[0]
        return [results[number] for number in range(len(files))]

    @contextlib.contextmanager
    def _awaited(self, workers: Sequence[threading.Thread]) -> Iterator[None]:
        """Wait for the threads; where this one is interrupted, end their guests first."""
        try:
            yield
            for worker in workers:
                worker.join()
        except BaseException:
            self._stop()
            for worker in workers:
                worker.join()
            raise

    def _stop(self) -> None:
        self.stopped.set()
        with self._lock:
            for guest in self._busy:
                guest.interrupt()

    @contextlib.contextmanager
    def minded(self, guest: Guest) -> Iterator[None]:
        """Let `_stop` interrupt the guest while the block runs."""
        with self._lock:
            self._busy.add(guest)
            if self.stopped.is_set():
                guest.interrupt()
        try:
            yield
        finally:
            with self._lock:
                self._busy.discard(guest)

    def _try(self, bench: _Bench, file: Assignment, output: C) -> Tried[C]:
        """
        Raises:
            JobError: the guest cannot be started.
        """
        rejects = Rejects(self.artifact.topics, self._may_be_empty)

        def see(topic: str, batch: pa.RecordBatch) -> None:
            rejects.see(topic, batch)
            output.see(topic, batch)

        tried = Tried(file, output)
        started = time.monotonic()
        try:
            bench.run(file, see)
            rejects.judge()
        except JobError as error:
            if isinstance(error, EnvironmentFailed | Unavailable) and not bench.started:
                raise
            tried.error = error
        tried.log, tried.seconds = bench.log, time.monotonic() - started
        return tried


class _Bench:
    """What one thread has: a warm guest, and the store's rows."""

    def __init__(self, trials: Trials) -> None:
        self._trials = trials
        self._warm: _Seat | None = None
        self._small = contents.SmallContents(trials.settings.database.store_folder)
        self.started = False
        """Whether a guest was started: what fails then fails for one file."""
        self.log = ""
        """What the plugin printed in the last run."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._warm:
            self._warm.close()
        self._small.close()

    def run(self, file: Assignment, see: Callable[[str, pa.RecordBatch], None]) -> None:
        """Run the plugin over one file; use the file itself if the store's bytes are unusable.

        Raises:
            JobError: a job would fail so.
        """
        self.log = ""
        if file.kept_row:
            try:
                kept = self._small.read(file.kept_row) or b""
            except contents.FAULTS:
                kept = b""
            file = msgspec.structs.replace(file, kept_bytes=kept)
        try:
            self._run(file, see)
        except inbox.StoreFault:
            self._run(msgspec.structs.replace(file, kept_file="", kept_bytes=None), see)

    def _run(self, file: Assignment, see: Callable[[str, pa.RecordBatch], None]) -> None:
        limit = self._trials.settings.guest.copy_limit_bytes
        if file.size_bytes > limit and not inbox.is_kept(file):
            with inbox.proved(file) as place, contextlib.closing(self._start(place)) as seat:
                self._read(seat, file, see)
            return
        if self._warm is None or not self._warm.guest.alive:
            if self._warm:
                self._warm.close()
            self._warm = None
            self._warm = self._start()
        self._read(self._warm, file, see)

    def _read(
        self, seat: _Seat, file: Assignment, see: Callable[[str, pa.RecordBatch], None]
    ) -> None:
        trials = self._trials
        try:
            with (
                trials.minded(seat.guest),
                inbox.placed(
                    file, seat.folder / "in", trials.settings.guest.copy_limit_bytes
                ) as placed,
                contextlib.closing(seat.guest.run(placed, trials.timeout)) as batches,
            ):
                for topic, batch in batches:
                    see(topic, batch)
        finally:
            self.log = seat.guest.take_log()

    def _start(self, place: InPlace | None = None) -> _Seat:
        """A new guest, with the plugin loaded."""
        trials = self._trials
        with contextlib.ExitStack() as undo:
            lease = undo.enter_context(trials.environments.lease(trials.artifact.lock))
            with inbox.io_faults(f"cannot create a working folder in {trials.folder}"):
                folder = Path(tempfile.mkdtemp(dir=trials.folder))
                (folder / "in").mkdir()
                (folder / "tmp").mkdir()
            guest = Guest(
                lease.python, lease.site_packages, trials.artifact, folder=folder,
                bundle=bundle(trials.cache), limits=trials.settings.guest, in_place=place,
            )  # fmt: skip
            undo.callback(guest.close)
            try:
                with trials.minded(guest):
                    guest.load()
            finally:
                self.log = guest.take_log()
            self.started = True
            return _Seat(guest, folder, undo.pop_all())


@dataclass
class _Seat:
    """A guest and its folder, which goes with that of all trials."""

    guest: Guest
    folder: Path
    held: contextlib.ExitStack
    """The guest, and the lease on its environment."""

    def close(self) -> None:
        """End the guest."""
        self.held.close()


def sweep(database: DatabaseSettings) -> None:
    """Remove what killed processes left of their trials."""
    if database.trials_folder.is_dir():
        with durable.exclusive(_lock(database)):
            durable.clear_dead(database.trials_folder)


def _lock(database: DatabaseSettings) -> Path:
    folder = database.trials_folder
    return folder.with_name(f"{folder.name}.lock")


# What a plugin can be tried with.


def of_version(settings: Settings, row: Any) -> Assignment:
    """A version of the ledger, from a row of `db.tables.versions`."""
    in_file = contents.content_file(settings.database.store_folder, row.content_hash)
    return Assignment(
        job_id=1, fence=0, attempt="", plugin_id=0, plugin_version="",
        version_id=row.version_id,
        source=row.source,
        path=os.path.join(os.fsencode(row.root_path), row.path),
        rel_path=row.rel_path,
        content_hash=row.content_hash,
        size_bytes=row.size_bytes,
        timeout_seconds=0.0,
        outputs=[],
        kept_file=str(in_file) if row.kept_in_file else "",
        kept_row=row.kept_id if row.kept_id and not row.kept_in_file else 0,
    )  # fmt: skip


def of_file(ledger: Ledger, path: Path) -> Assignment:
    """A file on the disk; below a source root it has the name that it would have there.

    Raises:
        JobError: it cannot be read, or changes meanwhile.
    """
    raw = os.fsencode(os.path.abspath(path))
    source, below = "", os.path.basename(raw)
    for root in ledger.read(versions.active_roots):
        folder = os.fsencode(root.path)
        if raw.startswith(folder.rstrip(b"/") + b"/"):
            source, below = root.name, os.path.relpath(raw, folder)
    return Assignment(
        job_id=1, fence=0, attempt="", plugin_id=0, plugin_version="", version_id=0,
        source=source,
        path=raw,
        rel_path=versions.display(below),
        content_hash=inbox.hash_file(raw),
        size_bytes=os.stat(raw).st_size,
        timeout_seconds=0.0,
        outputs=[],
    )  # fmt: skip


class Subject(NamedTuple):
    """A plugin to be tried."""

    file_name: str
    words: str
    """Which one it is: `sales 1.0.0`, `the bundled plugin delimited`."""
    artifact: Artifact
    timeout_seconds: float = 0.0
    """What its MANIFEST says; 0: the configured limit."""
    may_be_empty: Sequence[str] = ()
    """Data topics that may get no row although a file gives rejects."""


def subject(
    ledger: Ledger, settings: Settings, plugin: str, say: Callable[[str], None] = lambda _: None
) -> Subject:
    """The plugin of a name: a file, if it has a `/` or ends in .py; else a published one, or a
    bundled one.

    Args:
        say: is given a line before what takes time.

    Raises:
        NotFound: there is none.
        PluginError: the file is not a plugin, or could not be published.
        ArtifactRefused: the published one may not run.
    """
    if plugin.endswith(".py") or "/" in plugin:
        return unpublished(settings, Path(plugin).absolute(), say=say)
    if ledger.read(lambda c: plugins.versions(c, plugin)):
        return published(ledger, plugin)
    if plugin in bundled.names():
        return unpublished(settings, bundled.path(plugin), say=say)
    raise NotFound(
        f"no plugin is named {plugin!r}",
        "casparian plugins list, casparian plugins bundled   (a file's path has a / or ends in "
        ".py)",
    )


def published(ledger: Ledger, name: str, version: str | None = None) -> Subject:
    """A published plugin, checked as before a job of it.

    Args:
        version: None takes the active one, else the newest.

    Raises:
        NotFound: there is none.
        ArtifactRefused: it may not run.
    """
    plugin = ledger.read(lambda c: plugins.choose(c, name, version))
    verified = ledger.read(lambda c: dispatch.artifact(c, plugin.id))
    if verified.refusal:
        raise ArtifactRefused(verified.refusal, f"casparian plugins show {name} {plugin.version}")
    return Subject(
        f"{name}.py",
        f"{name} {plugin.version}",
        verified,
        plugins.manifest_of(plugin.manifest).timeout_seconds,
        ledger.read(plugins.may_be_empty).get(name, ()),
    )


def unpublished(
    settings: Settings,
    file: Path,
    choices: Choices = NOTHING,
    lock: str = "",
    say: Callable[[str], None] = lambda _: None,
) -> Subject:
    """A plugin's file, as `casparian publish` would publish it.

    Args:
        choices: what takes the place of the author's values in its MANIFEST.
        lock: that of its dependencies; empty: lock them.

    Raises:
        PluginError: it could not be published.
    """
    source, manifest = architect.read_plugin(file, choices)
    gatekeeper.inspect(source, file.name, Policy.of(settings.gatekeeper)).require()
    if not lock:
        say(f"locking the dependencies of {file.name}")
        lock = locking.lock_dependencies(file)
    made = Artifact(
        plugin_id=0, name=manifest.name, version=manifest.version, source=source, lock=lock,
        topics=manifest.topics,
        memory_bytes=manifest.memory_bytes,
        scratch_bytes=manifest.scratch_bytes,
        network=manifest.network,
    )  # fmt: skip
    is_bundled = file.parent == bundled.folder()
    words = f"the bundled plugin {file.stem}" if is_bundled else str(file)
    return Subject(file.name, words, made, manifest.timeout_seconds)
