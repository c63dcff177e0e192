"""Outputs that a person deleted or altered: named, forgotten, made again once."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from casparian_flow.db import jobs, views
from casparian_flow.db import outputs as db_outputs
from casparian_flow.db.access import Ledger, open_ledger
from casparian_flow.errors import CasparianError, NotFound, SinkConflict
from casparian_flow.services import outputs
from tests.conftest import take_bytes_away, write_config
from tests.daemons import work_off
from tests.e2e.test_disaster import Flow, asked, flow, problems
from tests.plugs import ROWS

__all__ = ["flow"]  # the fixture


def of_a(ledger: Ledger) -> tuple[str, str]:
    """The job of a.txt, and its target."""
    rows = ledger.read(lambda c: db_outputs.listed(c, 99, "lines"))
    row = next(row for row in rows if row["rel_path"] == "a.txt")
    return str(row["job"]), row["target"]


def take_away(flow: Flow, target: str) -> None:
    """Delete what a.txt gave, as a person would."""
    if "sqlite" in flow.plugin:
        with closing(sqlite3.connect(flow.settings.home / "out.sqlite3")) as connection:
            connection.execute("DELETE FROM _cf_rows_lines WHERE line = 'a1'")
            connection.commit()
    else:
        Path(target).unlink()


@pytest.mark.slow_but("sqlite")
def test_a_deleted_output_is_missing_then_forgotten_then_made_again_once(flow: Flow) -> None:
    with open_ledger(flow.settings.database) as ledger:
        root = flow.publish(ledger)
        flow.work(ledger, root, a="a1\na2", b="b1")
        job, target = of_a(ledger)
        with pytest.raises(CasparianError, match="unchanged"):
            outputs.forget(ledger, job)
        with pytest.raises(CasparianError, match="unchanged"):
            outputs.restore(ledger, job)
        before = flow.lines()
        take_away(flow, target)
        assert len(problems(flow, ledger)) == 1
        assert outputs.forget(ledger, job) == [target]
        assert problems(flow, ledger) == []
        assert asked(ledger, "SELECT line FROM lines") == ["b1"]
        assert outputs.restore(ledger, job) == [int(job)]
        assert work_off(flow.settings) == {"COMPLETED": 2}
        assert flow.lines() == before
        assert problems(flow, ledger) == []
        assert asked(ledger, "SELECT line FROM lines") == ["a1", "a2", "b1"]
        actions = ledger.read(lambda c: [row["action"] for row in views.audit(c, 99, "output *")])
        assert actions == ["restore", "forget"]
        take_away(flow, target)
        (flow.source / "a.txt").write_text("changed since")
        take_bytes_away(flow.settings)
        with pytest.raises(CasparianError, match="has changed since version 1"):
            outputs.restore(ledger, job)
        assert ledger.read(jobs.counts) == {"COMPLETED": 2}


@pytest.mark.parametrize("flow", ["sqlite"], indirect=True)
def test_what_is_forgotten_cannot_be_forgotten_again(flow: Flow) -> None:
    with open_ledger(flow.settings.database) as ledger:
        flow.work(ledger, flow.publish(ledger), a="a1", b="b1")
        job, target = of_a(ledger)
        before = flow.lines()
        take_away(flow, target)
        assert outputs.forget(ledger, job) == [target]
        with pytest.raises(CasparianError, match="already forgotten") as refused:
            outputs.forget(ledger, job)
        assert refused.value.hint == f"casparian outputs restore {job}"
        assert outputs.restore(ledger, job) == [int(job)]
        work_off(flow.settings)
        assert flow.lines() == before


@pytest.mark.parametrize("flow", ["sqlite"], indirect=True)
def test_a_job_that_another_command_moved_meanwhile_is_not_restored(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_ledger(flow.settings.database) as ledger:
        flow.work(ledger, flow.publish(ledger), a="a1", b="b1")
        job, target = of_a(ledger)
        take_away(flow, target)

        def meanwhile(point: str) -> None:
            assert point == "outputs.withdrawn"
            ledger.write(lambda c: jobs.restore(c, [int(job)]))

        monkeypatch.setattr(outputs, "crashpoint", meanwhile)
        with pytest.raises(CasparianError, match=f"job {job} ") as refused:
            outputs.restore(ledger, job)
        assert refused.value.hint == f"casparian jobs show {job}"
        actions = ledger.read(lambda c: [row["action"] for row in views.audit(c, 99, "output *")])
        assert actions == []


@pytest.mark.slow_but("sqlite")
def test_a_path_from_the_current_directory_names_an_output_that_is_gone(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_ledger(flow.settings.database) as ledger:
        root = flow.publish(ledger)
        flow.work(ledger, root, a="a1")
        _, target = of_a(ledger)
        monkeypatch.chdir(flow.settings.home)
        take_away(flow, target)
        assert outputs.forget(ledger, os.path.relpath(target)) == [target]


@pytest.mark.parametrize("flow", ["parquet"], indirect=True)
@pytest.mark.slow
def test_an_altered_file_is_named_and_never_overwritten(flow: Flow) -> None:
    with open_ledger(flow.settings.database) as ledger:
        flow.work(ledger, flow.publish(ledger), a="a1")
        target = Path(ledger.read(views.committed)[0]["target"])
        target.write_bytes(target.read_bytes()[:-1] + b"!")
        assert "its bytes have changed" in problems(flow, ledger)[0]
        with pytest.raises(SinkConflict, match="was changed"):
            outputs.restore(ledger, str(target))
        assert target.read_bytes().endswith(b"!")
        assert ledger.read(jobs.counts) == {"COMPLETED": 1}
        with pytest.raises(NotFound):
            outputs.forget(ledger, "7")


@pytest.mark.slow
def test_the_store_is_enough_to_make_an_output_again(tmp_path: Path, source: Path) -> None:
    flow = Flow(write_config(tmp_path / "flow"), source, ROWS)
    with open_ledger(flow.settings.database) as ledger:
        flow.work(ledger, flow.publish(ledger), a="a1\na2", b="b1")
        job, target = of_a(ledger)
        before = flow.lines()
        take_away(flow, target)
        (flow.source / "a.txt").unlink()
        rows = flow.settings.database.store_folder / "small.sqlite3"
        kept = rows.read_bytes()
        rows.write_bytes(kept.replace(b"a1\na2", b"a1\na3"))
        with pytest.raises(
            CasparianError, match="was deleted since version 1, and the store does not have"
        ):
            outputs.restore(ledger, job)
        rows.write_bytes(kept)
        assert outputs.restore(ledger, job) == [int(job)]
        assert work_off(flow.settings) == {"COMPLETED": 2}
        assert flow.lines() == before
        assert problems(flow, ledger) == []
