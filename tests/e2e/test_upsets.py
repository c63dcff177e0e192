"""A file cut while its plugin reads it, rows that differ from run to run, and places that fail."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from sqlalchemy import select

from casparian_flow import main
from casparian_flow.config import Settings
from casparian_flow.db.access import Ledger, open_ledger
from casparian_flow.db.models import ProcessingJob
from casparian_flow.services.idle import wait_until_idle
from casparian_flow.services.scan import scan
from casparian_flow.services.verify import verify
from tests.conftest import take_bytes_away, write_config
from tests.daemons import CLI, DAEMON, WORK_SECONDS, all_done, said, start
from tests.disks import fill, in_memory
from tests.eventually import PATIENCE, eventually
from tests.factories import add_root
from tests.plugs import ROWS, publish

WAITS = ROWS.replace(
    '        with open(file_path, encoding="utf-8", errors="replace") as file:',
    """        import os
        self.publish("lines", pa.table({"line": ["the first rows"]}))
        while os.path.getsize(file_path): pass
        with open(file_path, encoding="utf-8", errors="replace") as file:""",
)
"""Publishes, and reads its file only when it has been emptied."""

DRAWS = ROWS.replace(
    "            lines = file.read().splitlines()",
    "            lines = [os.urandom(8).hex() for _ in range(100)]",
).replace("import pyarrow", "import os\nimport pyarrow")
"""Gives other rows each time."""


def staged(settings: Settings) -> list[Path]:
    """The outputs on their way."""
    return list(settings.home.glob("**/.casparian/stage/*"))


def visible(settings: Settings) -> list[str]:
    """What a reader of the topic sees."""
    if (settings.home / "out.sqlite3").exists():
        with closing(sqlite3.connect(settings.home / "out.sqlite3")) as connection:
            return sorted(line for (line,) in connection.execute("SELECT line FROM lines"))
    table = ds.dataset(settings.home / "output" / "lines").to_table()
    return sorted(table["line"].to_pylist())


def test_a_file_that_is_cut_while_its_plugin_reads_it_in_place_gives_nothing(
    ledger: Ledger, tmp_path: Path, source: Path
) -> None:
    settings = write_config(tmp_path / "flow", "[guest]\ncopy_limit_bytes = 1\n")
    root = add_root(ledger, source)
    publish(ledger, settings, "rows", WAITS, "1.0.0")
    file = source / "a.txt"
    file.write_text("as it was recorded")
    scan(ledger, root)
    take_bytes_away(settings)

    async def story() -> dict[str, int]:
        async with main.running(settings, "test", workers=1, watch=False) as daemon:
            await eventually(lambda: staged(settings), WORK_SECONDS)
            os.truncate(file, 0)
            return await all_done(daemon)

    assert asyncio.run(story()) == {"SUPERSEDED": 1}
    assert not (settings.home / "output" / "lines").exists()
    assert staged(settings) == []


@pytest.mark.parametrize(
    ("uri", "at"),
    [
        ("parquet://output", "parquet.linked"),
        ("sqlite:///out.sqlite3", "sqlite.committed"),
    ],
)
@pytest.mark.slow_but("sqlite:///out.sqlite3-sqlite.committed")
def test_of_a_plugin_that_gives_other_rows_each_time_the_decided_attempt_stays(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, uri: str, at: str
) -> None:
    settings = write_config(tmp_path / "flow", f'[output]\ndefault_uri = "{uri}"\n')
    with open_ledger(settings.database) as ledger:
        add_root(ledger, source)
        publish(ledger, settings, "rows", DRAWS, "1.0.0")
    (source / "a.txt").write_text("any")
    monkeypatch.setenv("CASPARIAN_CRASH_AT", at)
    assert drained(settings) == -signal.SIGKILL
    (file,) = staged(settings)
    first = sorted(pq.read_table(file)["line"].to_pylist())
    monkeypatch.delenv("CASPARIAN_CRASH_AT")
    assert drained(settings) == 0
    assert visible(settings) == first
    with open_ledger(settings.database) as ledger:
        assert ledger.read(lambda c: c.execute(select(ProcessingJob.attempts)).scalar_one()) == 1
        assert verify(settings, ledger).problems == []


def drained(settings: Settings) -> int:
    """The exit code of a one-shot that works off what there is."""
    with start(settings, CLI, "scan", "--drain") as command:
        print(command.communicate(timeout=WORK_SECONDS)[1])
    return command.returncode


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A filesystem without a free byte."""
    with in_memory(tmp_path / "full", "64k") as folder:
        fill(folder)
        yield folder


@pytest.mark.slow
def test_a_full_folder_for_temporary_files_stops_no_job(
    settings: Settings, source: Path, full: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_ledger(settings.database) as ledger:
        add_root(ledger, source)
        publish(ledger, settings, "rows", ROWS, "1.0.0")
    (source / "a.txt").write_text("one")
    monkeypatch.setenv("TMPDIR", str(full))
    assert drained(settings) == 0
    assert visible(settings) == ["one"]


def test_a_sentinel_alone_says_what_the_disk_refused(tmp_path: Path, source: Path) -> None:
    """Outside the ledger, which has its files already: the daemon lock finds no room."""
    with in_memory(tmp_path / "small", "64m", files=64) as small:
        settings = write_config(small / "flow")
        with open_ledger(settings.database) as ledger:
            add_root(ledger, source)
            with pytest.raises(OSError, match="No space"):
                for n in range(64):
                    (small / f"{n}").touch()
            with start(settings, DAEMON) as sentinel:
                words = sentinel.communicate(timeout=PATIENCE)[1]
    assert sentinel.returncode == 74
    assert words.startswith(f"error: No space left on device: {settings.database.daemon_lock}\n")
    assert "the same command again" in words
    assert "Traceback" not in words


@pytest.mark.slow
def test_a_daemon_goes_on_when_nobody_reads_what_it_says(
    ledger: Ledger, settings: Settings, source: Path
) -> None:
    add_root(ledger, source)
    publish(ledger, settings, "rows", ROWS, "1.0.0")
    with start(settings, CLI, "start") as daemon:
        said(daemon, "watching")
        assert daemon.stderr
        daemon.stderr.close()
        for n in range(3):  # each is a line that the daemon would say
            (source / f"{n}.txt").write_text(f"{n}")
            wait_until_idle(settings, ledger, WORK_SECONDS)
        daemon.send_signal(signal.SIGTERM)
    assert daemon.returncode == 0
    assert visible(settings) == ["0", "1", "2"]
