"""Crashes at named points, power cuts, and proof that the harness would notice."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from casparian_flow import crashpoints
from casparian_flow.crashpoints import Trap
from casparian_flow.db import kept
from casparian_flow.db.access import open_ledger
from casparian_flow.durable import fsync_path
from casparian_flow.engine.contents import SMALL_BYTES
from casparian_flow.errors import ConfigError
from casparian_flow.services.store import MANY
from casparian_flow.services.store_upkeep import problems
from proofs.crash import oracle
from proofs.crash.matrix import Matrix, Point, staged
from proofs.crash.nursery import Nursery, Order
from proofs.crash.power import LoopGround, why_not
from proofs.crash.scene import Act, Ground, Scene
from proofs.environment import private
from tests.cli.conftest import casparian, source  # noqa: F401
from tests.commands import Casparian
from tests.conftest import write_config

DOCS = Path(__file__).parents[2] / "docs"
SAMPLE = ("sql.marked", "parquet.replaced")
"""Of hundreds; `python -m proofs.crash` tries them all."""

Stage = tuple[Matrix, list[Point]]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One topic in Parquet and one in SQLite, after a clean run."""
    ground = Ground(tmp_path_factory.mktemp("crash"))
    ground.prepare()
    with staged(ground, ["parquet", "sqlite"], print, Matrix) as matrix:
        yield matrix, matrix.record()


UPGRADE = (
    "upgrade_begun", "outputs_upgraded", "table_renamed", "rows_numbered", "retracted_moved",
    "table_upgraded", "topic_upgraded", "upgrade_written", "upgraded",
)  # fmt: skip
"""The steps that convert a SQL sink of an earlier release."""

RARE = {
    "changes.source_set", "topics.removed",
    *(f"rebuild.{step}" for step in ("written", "started", "ended", "cancel_written", "cancelled")),
    "rebuild.restart_written", "rebuild.restarted",
    "connection.checkpointed", "retries.job_taken_back", "main.stage_swept",
    "stage.part_finished", "stage.folder_synced", "parquet.renamed", "parquet.rewritten",
    "parquet.exchanged", "parquet.renamed_in_turn",
    "sql.rows_deleted", "sql.deletion_written", "sql.deleted", "committer.expired",
    "schema.copied", "schema.backed_up", "architect.activated",
    "outputs.forgotten", "outputs.withdrawn", "outputs.queued",
    *(f"sql.{step}" for step in UPGRADE),
}  # fmt: skip
"""What only a log of four megabytes, a recovery, an output of several parts, two Workers that race,
an upgrade, or a command that no act is come to. tests/sinks/test_parquet_crashes.py tries those of
Parquet, tests/sinks/test_sqlite_crashes.py and test_sqlite_upgrade.py those of SQLite,
tests/db/test_earlier.py those of the ledger's upgrade, tests/services/test_standing.py the
commands."""


def documented() -> list[str]:
    """The crash points on a file's way to a table, as the page lists them."""
    page = (DOCS / "job_lifecycle.md").read_text("utf-8").partition("## Crash points")[2]
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    return re.findall(r"`([a-z_]+\.[a-z_]+)`", "\n".join(rows))


def test_every_crash_point_has_a_name_of_its_own() -> None:
    names = crashpoints.known()
    assert len(set(names)) == len(names)
    assert len(documented()) == len(set(documented())) > 50
    assert set(documented()) <= set(names)


@pytest.mark.slow
def test_a_clean_run_comes_to_every_documented_crash_point(recorded: Stage) -> None:
    assert set(documented()) - {point.name for point in recorded[1]} == RARE


def test_what_forks_has_one_thread(tmp_path: Path) -> None:
    """Python 3.12 warns of a fork that leaves threads behind, pyarrow's allocator's for one."""
    with private(tmp_path) as environment, closing(Nursery(environment)) as nursery:
        assert nursery.run(Order(["--help"], str(tmp_path / "said"))) == 0
        assert len(list(Path(f"/proc/{nursery._process.pid}/task").iterdir())) == 1


class Ended(Matrix):
    """Its commands end with a code, and never come to their point."""

    def __init__(self, ground: Ground, code: int) -> None:
        super().__init__(Scene(ground, ["parquet", "sqlite"]), None, print)  # type: ignore[arg-type]
        self.code = code

    def back_to(self, name: str) -> Act:
        return next(act for act in self.scene.acts if act.name == name)

    @contextmanager
    def _watched(self) -> Iterator[list[str]]:
        yield []

    def _run(self, *_: object, **__: object) -> int:
        return self.code

    def _said(self) -> str:
        return "what it said"


@pytest.mark.parametrize("code", [-signal.SIGALRM, -signal.SIGSEGV, 70, 0])
def test_a_command_that_never_came_to_its_point_is_not_simply_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """It hung until its alarm, died, failed, or took another way and left something amiss."""
    monkeypatch.setattr(oracle, "faults", lambda *_: [] if code else ["rows are missing"])
    ground = Ground(tmp_path)
    ground.prepare()
    matrix = Ended(ground, code)
    assert not matrix.try_point(Point(matrix.scene.acts[0].name, "committer.decided:1"))
    assert matrix.tally.missed == 1
    assert len(matrix.tally.violations) == 1


def test_an_act_that_fails_on_the_way_to_the_next_job_is_no_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oracle, "faults", lambda *_: [f"{oracle.LEFT}a folder"])
    ground = Ground(tmp_path)
    ground.prepare()
    matrix = Ended(ground, 70)
    found = matrix._until_the_next_job(matrix.back_to("second"))
    assert found == ["retract, which came next, ended with 70: what it said"]
    matrix.code = 0
    assert matrix._until_the_next_job(matrix.back_to("second")) == [f"{oracle.LEFT}a folder"]


def test_a_trap_springs_at_its_hit_and_at_no_other(tmp_path: Path) -> None:
    sprung: list[str] = []
    log = tmp_path / "log"
    trap = Trap("scan.listed:2", str(log), lambda: sprung.append(log.read_text()))
    for name in ("scan.listed", "scan.hashed", "scan.listed", "scan.listed"):
        trap(name)
    assert sprung == ["scan.listed:1\nscan.hashed:1\nscan.listed:2\n"]


@pytest.mark.parametrize("at", ["scan.lsited", "scan.listed:x", "nowhere:1"])
def test_a_crash_point_that_is_none_is_refused(at: str) -> None:
    with pytest.raises(ConfigError, match=at):
        Trap(at)


def test_the_environment_arms_a_command(casparian: Casparian, source: Path) -> None:  # noqa: F811
    log = casparian.folder / "hits"
    environment = {**os.environ, "CASPARIAN_CRASH_LOG": str(log)}

    def scan(at: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "casparian_flow.cli", "scan"],
            cwd=casparian.folder, env=environment | {"CASPARIAN_CRASH_AT": at},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert scan("scan.finished").returncode == -signal.SIGKILL
    assert log.read_text().splitlines()[-1] == "scan.finished:1"
    refused = scan("scan.fnished")
    assert refused.returncode == 78
    assert "there is no crash point 'scan.fnished'" in refused.stderr


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.slow_but("sql.marked")
def test_what_was_killed_goes_on(recorded: Stage, name: str) -> None:
    matrix, points = recorded
    point = next(p for p in points if p.name == name and p.act == "second")
    assert matrix.try_point(point), matrix.tally.violations


def test_what_a_dead_daemon_left_goes_with_the_next_one(recorded: Stage) -> None:
    """After the last job, the act that is run again starts none, nor do the two that follow."""
    matrix, points = recorded
    last = [p for p in points if p.act == "second" and p.name == "committer.completed"][-1]
    assert matrix.try_point(last), matrix.tally.violations


def test_the_oracle_notices(recorded: Stage) -> None:
    matrix, _ = recorded
    act = matrix.back_to("second")
    before = matrix.scene.acts[matrix.scene.acts.index(act) - 1]
    assert oracle.faults(matrix.scene, before) == []
    folder = matrix.ground.sink / "tables" / "lines"
    first, second = sorted(folder.glob("*.parquet"))
    moved = first.rename(matrix.ground.scratch / "moved")
    assert any("LOST" in fault for fault in oracle.faults(matrix.scene, before))
    moved.rename(first)
    twice = shutil.copy(second, folder / "twice.parquet")
    assert any("TWICE" in fault for fault in oracle.faults(matrix.scene, before))
    Path(twice).unlink()
    stage = matrix.ground.sink / "tables" / ".casparian" / "stage" / "left"
    stage.touch()
    assert oracle.faults(matrix.scene, before) == [f"left behind: {stage}"]
    matrix.back_to("retract")
    found = [fault for fault in oracle.faults(matrix.scene, before) if "topic now" in fault]
    assert [words.split()[-1] for words in found] == ["LOST", "seen", "seen"], found


def test_a_reader_notices_two_versions_at_once(recorded: Stage) -> None:
    matrix, _ = recorded
    now = matrix.ground.sink / "tables" / "now"
    matrix.back_to("second")
    before = {file.name: file.read_bytes() for file in now.glob("*.parquet")}
    matrix.back_to("retract")
    reader = oracle.Reader(matrix.scene)
    reader.look()
    assert reader.faults == []
    for name, data in before.items():
        (now / f"before-{name}").write_bytes(data)
    reader.look()
    assert reader.faults == ["a reader saw two versions of orders.txt at once in now"]


def test_a_reader_notices_half_of_an_output(recorded: Stage) -> None:
    import pyarrow.parquet as pq

    matrix, _ = recorded
    matrix.back_to("second")
    reader = oracle.Reader(matrix.scene)
    reader.look()
    assert (reader.faults, reader.looks) == ([], 8)  # two jobs, four topics
    folder = matrix.ground.sink / "tables" / "lines"
    table = pq.read_table(max(folder.glob("*.parquet"), key=lambda p: p.stat().st_size))
    pq.write_table(table.slice(1), folder / "half.parquet")
    (folder / "torn.parquet").write_bytes(b"PAR1")
    reader.look()
    assert f"{table.num_rows - 1} of the {table.num_rows} rows" in reader.faults[0]
    assert "a file that is none" in reader.faults[1]


def test_a_power_cut_forgets_what_was_not_made_durable(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    ground = LoopGround(tmp_path, filesystems=2)
    ground.prepare()
    try:
        for name in ("kept", "forgotten"):
            (ground.home / name).write_bytes(b"x")
        fsync_path(ground.home / "kept")
        fsync_path(ground.home)
        (ground.sink / "forgotten").write_bytes(b"x")
        ground.cut()
        ground.power_on()
        assert (ground.home / "kept").read_bytes() == b"x"
        assert not (ground.sink / "forgotten").exists()
    finally:
        ground.close()


def test_contents_made_durable_in_rows_and_with_their_filesystem_outlive_a_power_cut(
    tmp_path: Path,
) -> None:
    if reason := why_not():
        pytest.skip(reason)
    ground = LoopGround(tmp_path, filesystems=1)
    ground.prepare()
    try:
        settings = write_config(ground.home, f"[store]\nkeep_bytes = {1 << 30}\n")
        for n in range(MANY):
            (ground.inbox / f"{n}.txt").write_text(f"content {n}")
            large = f"content {n}".ljust(SMALL_BYTES + 1)
            (ground.inbox / f"large {n}.txt").write_text(large)
        flow = Casparian(ground.home)
        flow.process("source", "add", ground.inbox, "--settle", "0")
        flow.process("scan")
        ground.cut()
        ground.power_on()
        with open_ledger(settings.database) as ledger:
            assert ledger.read(kept.state).contents == 2 * MANY
            assert list(problems(ledger)) == []
    finally:
        ground.close()
