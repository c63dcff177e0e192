"""The product under the model's events, in this process and without guests.

The ledger, the Scout, the Architect, the Dispatcher, the stages, the Committer, the sinks and their
readers are the real ones. A plugin's code runs in this process, in the place of its guest.
`Product` has the methods of `model.Model`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import shutil
import sqlite3
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from casparian_flow import config
from casparian_flow.db import backfill, failures, jobs, rebuild, views
from casparian_flow.db.access import Ledger, get_engine
from casparian_flow.db.models import FileLocation, FileVersion, SourceRoot
from casparian_flow.engine import committer, dispatch, sinks
from casparian_flow.engine.committer import Committer
from casparian_flow.engine.endings import Ending
from casparian_flow.engine.inbox import placed
from casparian_flow.engine.runner import Runner, _by_topic, _discard, _flat, released
from casparian_flow.engine.sinks import query as sink_query
from casparian_flow.engine.sinks import sqlite
from casparian_flow.engine.sinks.stage import Stage
from casparian_flow.errors import NotFound, PluginFailed, SinkUnavailable
from casparian_flow.protocol import Artifact as Deployed
from casparian_flow.protocol import Assignment, Output, Welcome
from casparian_flow.sdk import BasePlugin
from casparian_flow.services import architect, backup, inventory, outputs, sources, topics
from casparian_flow.services import jobs as job_verbs
from casparian_flow.services.scout import Scout
from casparian_flow.services.verify import verify
from tests.disks import mount, unmount
from tests.factories import add_root
from tests.plugs import LOCK, remembered
from tests.truth.model import Artifact, Row

CONFIG = """
[database]
db_location = "ledger.sqlite3"
[jobs]
max_attempts = 1
[output]
default_uri = "{uri}"
"""

SOURCE = """\
from casparian_flow.sdk import BasePlugin, PluginMetadata
import pyarrow as pa

MANIFEST = PluginMetadata(name="{plugin}", pattern="*{suffix}", topic={topics})


class Handler(BasePlugin):
    def execute(self, file_path: str):
        with open(file_path, encoding="utf-8") as file:
            lines = file.read().split()
        if "{fails}" in lines:
            raise ValueError("{name} fails at {fails}")
        for topic in {topics}:
            own = [line for line in lines if line.startswith("!") == (topic == "marked")]
            if own:
                self.publish(topic, pa.table({{"line": own, "maker": ["{name}"] * len(own)}}))
"""

URIS = {"parquet": "parquet://{}", "sqlite": "sqlite:///{}/rows.sqlite3"}

STRANGER = b"of another program"


class InProcess(Runner):
    """Runs plugins in this process; the rest is the Runner's."""

    def _run_placed(self, job: Assignment, artifact: Deployed) -> list[Stage]:
        plans = _by_topic(job.outputs)
        stages: dict[str, list[Stage]] = {}

        def publish(topic: str, table: pa.Table) -> None:
            if topic not in stages:
                self._open(stages.setdefault(topic, []), job, plans[topic])
            for batch in table.to_batches():
                for stage in stages[topic]:
                    stage.write(batch)

        handler = _handler(artifact.source)
        handler._publish = publish
        inbox = Path(self._welcome.guests_folder) / "in"
        inbox.mkdir(parents=True, exist_ok=True)
        try:
            with placed(job, inbox, self._limits.copy_limit_bytes) as file:
                try:
                    handler.execute(file.path)
                except ValueError as error:
                    raise PluginFailed(str(error)) from error
            for stage in _flat(stages):
                stage.finish()
        except BaseException:
            _discard(_flat(stages))
            raise
        return _flat(stages)


@functools.lru_cache(maxsize=256)
def _code(source: bytes) -> Any:
    return compile(source, "plugin.py", "exec")


def _handler(source: bytes) -> BasePlugin:
    names: dict[str, Any] = {}
    exec(_code(source), names)
    handler: BasePlugin = names["Handler"]()
    return handler


def source_of(plugin: str, artifact: Artifact) -> str:
    """A plugin that does what the model's artifact does."""
    values = {**artifact._asdict(), "topics": list(artifact.topics), "plugin": plugin}
    return SOURCE.format(**values)


class Product:
    """A source root, a ledger and sinks in a folder.

    Args:
        folder: empty; `close` leaves it.
        kinds: sink -> `sqlite` or `parquet`.
    """

    events: Collection[str] = ()
    """Those that it has; empty for all."""
    works_when_killed = False
    """Whether `kill` kills it at work."""

    def __init__(self, folder: Path, kinds: dict[str, str]) -> None:
        self.kinds = kinds
        self.home, self.source = folder / "flow", folder / "source"
        self.home.mkdir(parents=True)
        self.source.mkdir()
        self.uris = {name: URIS[kind].format(name) for name, kind in kinds.items()}
        file = self.home / config.FILE_NAME
        file.write_text(CONFIG.format(uri=self.uris["S1"]))
        self.settings = config.load(str(file))
        self._backup = folder / "backup.sqlite3"
        self._refused: set[tuple[str, str]] = set()
        self._away: dict[str, str] = {}
        self._others: dict[str, sqlite3.Connection] = {}
        self._loop = asyncio.new_event_loop()
        self._open()
        add_root(self.ledger, self.source)
        self._start()

    def _open(self) -> None:
        self._engine = get_engine(self.settings.database)
        self.ledger = Ledger(self._engine)

    def _start(self) -> None:
        """What a daemon does when it starts."""
        database, limits = self.settings.database, self.settings.jobs
        guests = database.guests_folder
        inventory.take(self.settings, self.ledger)
        outputs.tell(self.ledger)
        self._epoch = self.ledger.write(lambda c: dispatch.begin_epoch(c, limits, Ending(), guests))
        inventory.begin(database, self.ledger)
        guests.mkdir(parents=True, exist_ok=True)
        welcome = Welcome(
            guests_folder=str(guests), inode=0, database=str(database.path), guests=1,
            limits=self.settings.guest,
        )  # fmt: skip
        self._runner = InProcess(welcome, config.cache_folder())
        self._finish()

    def close(self) -> None:
        """Let go of everything."""
        for sink in sorted(self._away):
            self.come_back(sink)
        self._close()
        self._loop.close()

    def _close(self) -> None:
        self._runner.close()
        self.ledger.close()
        self._engine.dispose()

    # Events on disk.

    def write(self, path: str, content: str) -> None:
        file = self.source / path
        file.parent.mkdir(parents=True, exist_ok=True)
        # A file of another inode and time, as an editor writes it.
        temporary = file.with_name(f".{file.name}.new")
        temporary.write_text(content)
        temporary.replace(file)

    def delete(self, path: str) -> None:
        (self.source / path).unlink()

    def move(self, old: str, new: str) -> None:
        (self.source / new).parent.mkdir(parents=True, exist_ok=True)
        (self.source / old).rename(self.source / new)

    def copy(self, old: str, new: str) -> None:
        (self.source / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(self.source / old, self.source / new)

    def scan(self) -> None:
        with Session(self._engine) as db:
            Scout(db).scan_source(db.scalars(select(SourceRoot)).one())

    # What users ask.

    def publish(self, plugin: str, release: str, artifact: Artifact) -> None:
        file, keys = Path(f"{plugin}.py"), config.keys_folder()
        source = source_of(plugin, artifact).encode()
        signed = architect.sign(self.ledger, file, source, LOCK, plugin, release, keys)
        with remembered():
            architect.deploy(self.ledger, self.settings, signed)

    def activate(self, plugin: str, release: str) -> int:
        before, keys = self._queued(), config.keys_folder()
        architect.activate(self.ledger, self.settings, keys, plugin, release, "a test")
        return self._queued() - before

    def redo(self, plugin: str) -> int:
        return backfill.backfill(self.ledger, backfill.Choice(plugin, redo=True)).queued

    def retry(self) -> None:
        job_verbs.retry(self.ledger, None)

    def retract(self, path: str, ordinal: int = 0) -> None:
        self._retract(path, ordinal)

    def reinstate(self, path: str, ordinal: int = 0) -> None:
        self._retract(path, ordinal, undo=True)

    def _retract(self, path: str, ordinal: int, *, undo: bool = False) -> None:
        try:
            outputs.retract(self.ledger, self._name(path, ordinal), undo=undo)
        except SinkUnavailable:
            if not self._away:  # else it is decided, and the sink is told when it is back
                raise

    def _name(self, path: str, ordinal: int) -> str:
        """As a person names a file, or one version of it."""
        if not ordinal:
            return str(self.source / path)
        return str(next(n for n, at in self._versions().items() if at == (path, ordinal)))

    def set_topic(self, plugin: str, topic: str, sinks: dict[str, str]) -> None:
        uris = [f"{self.uris[sink]}?mode={mode}" for sink, mode in sinks.items()]
        topics.set_topic(self.ledger, self.settings, plugin, topic, uris, "append")

    def remove_topic(self, plugin: str, topic: str) -> None:
        topics.remove(self.ledger, plugin, topic)

    def rebuild(self, plugin: str) -> None:
        """A rebuild that is open is cancelled first."""
        with contextlib.suppress(NotFound):
            rebuild.cancel(self.ledger, plugin)
            outputs.tell(self.ledger)
        with contextlib.suppress(NotFound):
            rebuild.start(self.ledger, plugin)

    def set_on_delete(self, what: str) -> None:
        name = self.source.name
        sources.set_source(self.ledger, name, sources.SourceOptions(on_delete=what))

    def backup(self) -> None:
        backup.make(self.settings, self.ledger, str(self._backup), force=True)

    def restore(self) -> None:
        self._close()
        database = self.settings.database.path
        for end in ("", "-wal", "-shm"):
            database.with_name(database.name + end).unlink(missing_ok=True)
        shutil.copyfile(self._backup, database)
        self._open()
        self._start()

    # What happens.

    def kill(self) -> None:
        """The process ends where it stands, and another one starts."""
        self._close()
        self._open()
        self._start()

    def refuse(self, topic: str, sink: str) -> None:
        """A stranger's file or table is in the way; in a database that has the topic, a trigger."""
        self._refused.add((topic, sink))
        if self.kinds[sink] == "sqlite":
            rows = f"_cf_rows_{topic}"
            known = "SELECT 1 FROM sqlite_schema WHERE name = ?"
            with self._database(sink) as connection:
                if connection.execute(known, [rows]).fetchone():
                    connection.execute(
                        f'CREATE TRIGGER "no {topic}" BEFORE INSERT ON "{rows}" '
                        "BEGIN SELECT RAISE(ABORT, 'not here'); END"
                    )
                else:
                    connection.execute(f'CREATE TABLE "{topic}" (stranger)')

    def accept(self, topic: str, sink: str) -> None:
        self._refused.discard((topic, sink))
        if self.kinds[sink] == "sqlite":
            table = "SELECT 1 FROM sqlite_schema WHERE name = ? AND type = 'table'"
            with self._database(sink) as connection:
                connection.execute(f'DROP TRIGGER IF EXISTS "no {topic}"')
                if connection.execute(table, [topic]).fetchone():
                    connection.execute(f'DROP TABLE "{topic}"')

    def expire(self) -> None:
        self._finish(keep_days=0.0)

    def go_away(self, sink: str, when: str = "early") -> None:
        """A folder's disk can be read and not written; another program writes into a database."""
        self._away[sink] = when
        self._shut(sink)

    def _shut(self, sink: str) -> None:
        folder = self.home / sink
        if self.kinds[sink] == "sqlite":
            other = sqlite3.connect(folder / "rows.sqlite3", isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            self._others[sink] = other
        else:
            mount(folder, "--bind", folder)
            mount(folder, "-o", "remount,ro,bind")

    def _unshut(self, sink: str) -> None:
        if other := self._others.pop(sink, None):
            other.close()
        else:
            unmount(self.home / sink)

    def come_back(self, sink: str) -> None:
        self._unshut(sink)
        del self._away[sink]
        self._finish()

    def work(self) -> None:
        """Run every job that can be claimed, each once, and publish what they give."""
        if inventory.waiting(self.settings, self.ledger):
            inventory.take(self.settings, self.ledger)  # as a daemon does again and again
        done: set[int] = set()
        while claimed := self._claim():
            waiting = [job for job in claimed if job.job_id in done]
            if self._away and waiting:  # else a rebuild that ended has it tried again
                self._finish([released(job) for job in claimed])  # their sink is away
                assert len(waiting) == len(claimed)
                break
            done |= {job.job_id for job in claimed}
            strangers = list(self._strangers(claimed))
            work = [(job, self._artifact(job.plugin_id)) for job in claimed]
            late = [sink for sink, when in self._away.items() if when == "late"]
            for sink in late:
                self._unshut(sink)
            receipts = self._runner.run(work)
            for sink in late:
                self._shut(sink)
            self._finish(receipts)
            for file in strangers:
                file.unlink()

    def _claim(self) -> list[Assignment]:
        with contextlib.closing(dispatch.Dispatcher(self.settings, self._epoch)) as dispatcher:
            claimed = self.ledger.write(lambda c: dispatcher.claim(c, "w", 100, frozenset()))
            return dispatcher.with_bytes(claimed)

    def _artifact(self, plugin_id: int) -> Deployed:
        return self.ledger.read(lambda c: dispatch.artifact(c, plugin_id))

    def _finish(self, receipts: Any = (), keep_days: float = 7.0) -> None:
        """Have a Committer decide these, and publish all that was decided."""
        committer.PAUSE_SECONDS = 0.0  # a sink that was away is tried again at once
        sqlite.BUSY_SECONDS = 0.05
        limits = self.settings.jobs
        one = Committer(self.ledger, self._epoch, limits, lambda: None, keep_days)
        for receipt in receipts:
            one.accept("w", receipt)
        self._loop.run_until_complete(one.finish())

    def _strangers(self, claimed: list[Assignment]) -> Iterator[Path]:
        """Files of strangers where outputs that are to be refused would go."""
        for output in (output for job in claimed for output in job.outputs):
            sink = next(name for name, uri in self.uris.items() if uri == output.uri)
            if (output.topic, sink) in self._refused and self.kinds[sink] == "parquet":
                yield from self._in_the_way(output)

    def _in_the_way(self, output: Output) -> Iterator[Path]:
        folder = Path(output.location.removeprefix(sinks.PREFIXES["parquet"])) / output.topic
        folder.mkdir(parents=True, exist_ok=True)
        slot = output.location_slot if output.mode == "replace" else output.version_slot
        file = folder / f"{slot[:32]}.parquet"
        assert not file.exists(), "a file of this slot is there: nothing can be in its way"
        file.write_bytes(STRANGER)
        yield file

    # What readers see.

    def rows(self, topic: str, sink: str, kind: str = "topic") -> list[Row] | None:
        """The rows of a view; None if this kind of sink has none."""
        if self.kinds[sink] == "sqlite":
            name = topic if kind == "topic" else f"{topic}_{kind}"
            return self._named(self._table(sink, name))
        return None if kind != "topic" else self._named(self._files(sink, topic))

    def look(self) -> None:
        """Read anew what `query` gives: all of it is one statement."""
        known = self.ledger.read(views.committed)
        names = sorted({f"{output['topic']}{end}" for output in known for end in ("", "_history")})
        parts = [f"SELECT '{name}' AS \"from\", * FROM {name}" for name in names]
        self._answers: dict[str, list[dict[str, Any]]] = {}
        for row in self._ask(" UNION ALL BY NAME ".join(parts)) if parts else ():
            self._answers.setdefault(row["from"], []).append(row)

    def _ask(self, question: str) -> list[dict[str, Any]]:
        with sink_query.answer(question, self.ledger.read(views.committed)) as reader:
            rows: list[dict[str, Any]] = reader.read_all().to_pylist()
            return rows

    def query(self, topic: str, kind: str = "current") -> list[Row]:
        name = topic if kind == "current" else f"{topic}_history"
        return self._named(self._answers.get(name, []))

    def _table(self, sink: str, name: str) -> list[dict[str, Any]]:
        with self._database(sink) as connection:
            there = "SELECT 1 FROM sqlite_schema WHERE name = ? AND type = 'view'"
            if not connection.execute(there, [name]).fetchone():
                return []
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute(f'SELECT * FROM "{name}"')]

    @contextlib.contextmanager
    def _database(self, sink: str) -> Iterator[sqlite3.Connection]:
        folder = self.home / sink
        folder.mkdir(exist_ok=True)
        with contextlib.closing(sqlite3.connect(folder / "rows.sqlite3")) as connection, connection:
            yield connection

    def _files(self, sink: str, topic: str) -> list[dict[str, Any]]:
        files = sorted((self.home / sink / topic).glob("*.parquet"))
        return [row for file in files for row in pq.read_table(file).to_pylist()]

    def _named(self, found: list[dict[str, Any]]) -> list[Row]:
        versions = self._versions() if found else {}
        return sorted(
            Row(*versions[row["_cf_file_version_id"]], row["maker"], row["line"]) for row in found
        )

    def _versions(self) -> dict[int, tuple[str, int]]:
        """Version id -> its path and ordinal."""
        columns = FileVersion.id, FileLocation.rel_path, FileVersion.ordinal
        joined = select(*columns).join(FileLocation, FileLocation.id == FileVersion.location_id)
        return {
            row[0]: (row[1], row[2]) for row in self.ledger.read(lambda c: c.execute(joined).all())
        }

    # What is said.

    def failures(self) -> set[tuple[str, int, str, str]]:
        query = f"""
            SELECT l.rel_path, v.ordinal, j.plugin_name, {failures.STATE}
            FROM cf_processing_queue j JOIN cf_file_version v ON v.id = j.file_version_id
            JOIN cf_file_location l ON l.id = v.location_id WHERE j.status = 'FAILED'
            """
        return {tuple(row) for row in self.ledger.read(lambda c: c.execute(text(query)).all())}

    def problems(self) -> list[str]:
        """What `casparian verify` finds."""
        return verify(self.settings, self.ledger).problems

    def told(self) -> list[str]:
        """What the ledger says of each job, for whoever looks for the cause of a difference."""
        query = """
            SELECT j.id, l.rel_path || ' ' || v.ordinal, p.name || ' ' || p.version, j.status,
                   j.reason, (SELECT group_concat(o.topic || ' in ' || o.uri || ' ' || o.state ||
                       coalesce(' ' || s.state || ', told ' || s.told, ''), '; ')
                       FROM cf_output o LEFT JOIN cf_visibility s ON s.output_id = o.id
                       WHERE o.job_id = j.id)
            FROM cf_processing_queue j JOIN cf_plugin p ON p.id = j.plugin_id
            JOIN cf_file_version v ON v.id = j.file_version_id
            JOIN cf_file_location l ON l.id = v.location_id ORDER BY j.id
            """
        rows = self.ledger.read(lambda c: c.execute(text(query)).all())
        return [" | ".join(map(str, row)) for row in rows]

    def _queued(self) -> int:
        return self.ledger.read(jobs.counts).get("QUEUED", 0)
