"""The ledger lost, restored or cut short over sinks that are ahead of it: nothing comes twice."""

from __future__ import annotations

import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.dataset as ds
import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from casparian_flow.config import Settings
from casparian_flow.db import jobs, rebuild, views
from casparian_flow.db.access import Ledger, get_engine, open_ledger
from casparian_flow.db.models import (
    FileLocation,
    FileVersion,
    Output,
    ProcessingJob,
    SourceRoot,
)
from casparian_flow.engine.sinks import query
from casparian_flow.services import backup, inventory, store_upkeep
from casparian_flow.services.scan import Root, scan
from casparian_flow.services.scout import Scout
from casparian_flow.services.verify import verify
from tests.conftest import write_config
from tests.daemons import work_off
from tests.factories import add_root
from tests.plugs import ROWS, publish

URIS = {"parquet": "parquet://output", "sqlite": "sqlite:///out.sqlite3"}


class Flow(NamedTuple):
    """A folder of its own, with a source root and the plugin `rows` into one sink."""

    settings: Settings
    source: Path
    plugin: str

    def publish(self, ledger: Ledger, version: str = "1.0.0") -> Root:
        root = add_root(ledger, self.source)
        publish(ledger, self.settings, "rows", self.plugin, version)
        return root

    def work(self, ledger: Ledger, root: Root, **contents: str) -> dict[str, int]:
        """Write these files, and have all that is queued worked; the statuses of all jobs."""
        for name, words in contents.items():
            (self.source / f"{name}.txt").write_text(words)
        with Session(get_engine(ledger.database)) as db:
            Scout(db).scan_source(db.get_one(SourceRoot, root.id))
        return work_off(self.settings)

    def lose(self) -> None:
        for file in self.settings.home.glob(f"{self.settings.database.path.name}*"):
            file.unlink()

    def lines(self) -> list[tuple[str, int, int]]:
        """(line, version id, job id) of every row that stands in the sink."""
        columns = ["line", "_cf_file_version_id", "_cf_job_id"]
        if "sqlite" in self.plugin:
            with closing(sqlite3.connect(self.settings.home / "out.sqlite3")) as connection:
                return sorted(connection.execute(f"SELECT {', '.join(columns)} FROM lines"))
        table = ds.dataset(self.settings.home / "output" / "lines").to_table(columns=columns)
        return sorted(tuple(row.values()) for row in table.to_pylist())


one_sink = pytest.mark.parametrize("flow", ["parquet"], indirect=True)


@pytest.fixture(params=URIS)
def flow(request: pytest.FixtureRequest, settings: Settings, source: Path) -> Flow:
    sinks = f'pattern="*.txt", sinks={{"lines": "{URIS[request.param]}"}}'
    return Flow(settings, source, ROWS.replace('pattern="*.txt", topic="lines"', sinks))


def asked(ledger: Ledger, question: str) -> list[Any]:
    with query.answer(question, ledger.read(views.committed)) as rows:
        return sorted(row["line"] for row in rows.read_all().to_pylist())


def lineage(ledger: Ledger) -> dict[int, tuple[str, int]]:
    """Version id -> its path and ordinal."""
    columns = (FileVersion.id, FileLocation.rel_path, FileVersion.ordinal)
    joined = select(*columns).join(FileLocation, FileLocation.id == FileVersion.location_id)
    return {row[0]: (row[1], row[2]) for row in ledger.read(lambda c: c.execute(joined).all())}


def problems(flow: Flow, ledger: Ledger) -> list[str]:
    return verify(flow.settings, ledger).problems


def doubled(flow: Flow) -> list[str]:
    return [line for line, count in Counter(row[0] for row in flow.lines()).items() if count > 1]


@pytest.mark.parametrize("flow", ["sqlite"], indirect=True)
@pytest.mark.slow
def test_yesterdays_ledger_over_todays_outputs(flow: Flow, tmp_path: Path) -> None:
    with open_ledger(flow.settings.database) as ledger:
        root = flow.publish(ledger)
        flow.work(ledger, root, a="a1", b="b1")
        copy = backup.make(flow.settings, ledger, str(tmp_path / "copy")).path
        flow.work(ledger, root, a="a2", c="c1", d="d1")
        flow.work(ledger, root, a="a3", d="d2")
        today, named = flow.lines(), lineage(ledger)
    flow.lose()
    shutil.copyfile(copy, flow.settings.database.path)
    (flow.source / "c.txt").unlink()
    (flow.source / "d.txt").write_text("d3")
    (flow.source / "e.txt").write_text("e1")
    with open_ledger(flow.settings.database) as ledger:
        root = Root(1, str(flow.source), "source", "", 0.0)
        assert flow.work(ledger, root) == {"COMPLETED": 9}
        assert problems(flow, ledger) == []
        assert set(today) <= set(flow.lines())
        assert {row[0] for row in set(flow.lines()) - set(today)} == {"d3", "e1"}
        assert doubled(flow) == []
        assert named.items() <= lineage(ledger).items()
        assert not {row[1] for row in flow.lines() if row[0] in ("d3", "e1")} & set(named)
        everything = ["a1", "a2", "a3", "b1", "c1", "d1", "d2", "d3", "e1"]
        assert asked(ledger, "SELECT line FROM lines_history") == everything
        assert asked(ledger, "SELECT line FROM lines") == ["a3", "b1", "c1", "d3", "e1"]
        actions = ledger.read(lambda c: [row["action"] for row in views.audit(c, 99, None)])
        assert actions.count("adopt") == 1


@pytest.mark.slow
def test_a_lost_ledger_finds_what_it_had_published(flow: Flow) -> None:
    with open_ledger(flow.settings.database) as ledger:
        root = flow.publish(ledger)
        flow.work(ledger, root, a="a1", b="b1", c="c1")
        flow.work(ledger, root, a="a2", c="c2")
        before, named = flow.lines(), lineage(ledger)
        ids = ledger.read(lambda c: c.execute(select(ProcessingJob.id)).scalars().all())
    flow.lose()
    if "sqlite" not in flow.plugin:  # the sink noted beside the ledger, or the default one
        shutil.rmtree(flow.settings.database.state_folder)
    (flow.source / "b.txt").write_text("b2")
    (flow.source / "c.txt").unlink()
    with open_ledger(flow.settings.database) as ledger:
        root = flow.publish(ledger)
        flow.work(ledger, root, z="z1")
        assert doubled(flow) == []
        assert set(before) <= set(flow.lines())
        assert {row[0] for row in set(flow.lines()) - set(before)} == {"b2", "z1"}
        assert named.items() <= lineage(ledger).items()
        new = {row[1:] for row in set(flow.lines()) - set(before)}
        assert not {version for version, _ in new} & set(named)
        assert not {job for _, job in new} & set(ids)
        assert problems(flow, ledger) == []
        assert asked(ledger, "SELECT line FROM lines") == ["a2", "b2", "c2", "z1"]
        assert len(asked(ledger, "SELECT line FROM lines_history")) == 7
        flow.work(ledger, root, a="a1")
        assert {what for what in lineage(ledger).values() if what[0] == "a.txt"} == {
            ("a.txt", 1), ("a.txt", 2), ("a.txt", 3),
        }  # fmt: skip
        assert problems(flow, ledger) == []


@one_sink
def test_a_lost_ledger_finds_the_bytes_that_the_store_has(flow: Flow) -> None:
    large = "x" * 20_000
    with open_ledger(flow.settings.database) as ledger:
        flow.work(ledger, flow.publish(ledger), a="a1", b=large)
        flow.work(ledger, Root(1, str(flow.source), "source", "", 0.0), a="a2", b="b2")
    flow.lose()
    with open_ledger(flow.settings.database) as ledger:
        store_upkeep.sweep(ledger)  # a daemon starts before the roots are added again
        root = flow.publish(ledger)
        flow.work(ledger, root)
        store_upkeep.sweep(ledger)
        for words in ("a1", "a2", large, "b2"):
            assert store_upkeep.has_whole(ledger, sha256(words.encode()).hexdigest())
        assert problems(flow, ledger) == []
        (started,) = rebuild.start(ledger, "rows")
        assert (started.jobs, started.left_out) == (4, [])
        work_off(flow.settings)
        assert asked(ledger, "SELECT line FROM lines_history") == ["a1", "a2", "b2", large]


@one_sink
@pytest.mark.slow
def test_another_artifact_of_the_plugin_does_not_make_it_again(flow: Flow) -> None:
    with open_ledger(flow.settings.database) as ledger:
        flow.work(ledger, flow.publish(ledger), a="a1")
    flow.lose()
    with open_ledger(flow.settings.database) as ledger:
        newer = flow._replace(plugin=flow.plugin + "# newer\n")
        root = newer.publish(ledger, "2.0.0")
        scan(ledger, root)
        assert ledger.read(jobs.counts) == {"COMPLETED": 1}
        assert newer.work(ledger, root, a="a2") == {"COMPLETED": 2}
        assert doubled(flow) == []
        assert asked(ledger, "SELECT line FROM lines") == ["a2"]
        assert asked(ledger, "SELECT line FROM lines_history") == ["a1", "a2"]
        assert problems(flow, ledger) == []


@one_sink
@pytest.mark.slow
def test_ids_given_before_a_sink_was_known_are_said_and_nothing_is_doubled(
    flow: Flow, tmp_path: Path
) -> None:
    """The whole folder is lost, and files are recorded before the plugin names its sink."""
    plugin = ROWS.replace('topic="lines"', f'sinks={{"lines": "parquet://{tmp_path}/away"}}')
    roots = f'[output]\nroots = ["{tmp_path}"]\n'
    first = Flow(write_config(tmp_path / "first", roots), flow.source, plugin)
    with open_ledger(first.settings.database) as ledger:
        root = first.publish(ledger)
        first.work(ledger, root, a="a1", b="b1")
        first.work(ledger, root, a="a2")
    second = first._replace(settings=write_config(tmp_path / "second", roots))
    with open_ledger(second.settings.database) as ledger:
        root = add_root(ledger, flow.source)
        scan(ledger, root)
        publish(ledger, second.settings, "rows", plugin, "1.0.0")
        (words,) = inventory.take(second.settings, ledger)
        assert "3 outputs that this ledger did not know" in words
        second.work(ledger, root)
        assert problems(second, ledger) == []
        assert asked(ledger, "SELECT line FROM lines") == ["a2", "b1"]
        assert asked(ledger, "SELECT line FROM lines_history") == ["a1", "a2", "b1"]


@one_sink
@pytest.mark.slow
def test_a_write_ahead_log_deleted_while_stopped(flow: Flow) -> None:
    """What was committed since the last checkpoint is gone from the ledger, not from the sink."""
    with open_ledger(flow.settings.database) as ledger:
        root = flow.publish(ledger)
        flow.work(ledger, root, a="a1")
        ledger.read(lambda c: c.execute(text("PRAGMA wal_checkpoint(PASSIVE)")).all())
        older = flow.settings.database.path.read_bytes()
        flow.work(ledger, root, a="a2", b="b1")
        before = flow.lines()
    flow.lose()
    flow.settings.database.path.write_bytes(older)
    with open_ledger(flow.settings.database) as ledger:
        flow.work(ledger, Root(1, str(flow.source), "source", "", 0.0))
        assert flow.lines() == before
        assert problems(flow, ledger) == []


def adopted(settings: Settings) -> int:
    def count(ledger: Ledger) -> int:
        return ledger.read(lambda c: len(c.execute(select(Output.id)).all()))

    with open_ledger(settings.database) as ledger:
        before = count(ledger)
        assert inventory.take(settings, ledger) == []
        return count(ledger) - before


@one_sink
def test_a_ledger_that_agrees_with_its_sinks_adopts_nothing(flow: Flow, tmp_path: Path) -> None:
    """Neither at its next start, nor as a copy of the whole folder somewhere else."""
    with open_ledger(flow.settings.database) as ledger:
        flow.work(ledger, flow.publish(ledger), a="a1")
    shutil.copytree(flow.settings.home, tmp_path / "copy")
    assert adopted(flow.settings) == 0
    assert adopted(write_config(tmp_path / "copy")) == 0
