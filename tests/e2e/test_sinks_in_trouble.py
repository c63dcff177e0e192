"""Sinks that are full, foreign or misplaced: what is paused, what fails, and what is kept."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pyarrow.dataset as ds
import pytest
from sqlalchemy import insert, select, update

from casparian_flow import main
from casparian_flow.config import Settings
from casparian_flow.db import jobs, views
from casparian_flow.db.access import Ledger
from casparian_flow.db.models import FileVersion, Output, ProcessingJob, TopicConfig
from casparian_flow.db.states import PAUSED
from casparian_flow.protocol import key_of
from casparian_flow.services.scan import scan
from casparian_flow.services.verify import verify
from tests.conftest import write_config
from tests.daemons import WORK_SECONDS, all_done, outcomes, work_off
from tests.disks import remount
from tests.eventually import eventually
from tests.factories import add_root
from tests.plugs import ROWS, plugin, publish


def test_a_full_disk_pauses_the_sink_costs_no_attempt_and_resumes(
    ledger: Ledger,
    settings: Settings,
    source: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("casparian_flow.engine.committer.PAUSE_SECONDS", 0.2)
    root = add_root(ledger, source)
    settings = write_config(settings.home, f'[output]\nroots = ["{small_disk}"]\n')
    sink = f'pattern="*.txt", sinks={{"lines": "parquet://{small_disk}/out"}}'
    publish(ledger, settings, "rows", ROWS.replace('pattern="*.txt", topic="lines"', sink), "1.0.0")
    (source / "large.txt").write_bytes(
        b"\n".join(os.urandom(24).hex().encode() for _ in range(9000))
    )
    (source / "small.txt").write_text("fits")
    scan(ledger, root)

    async def story() -> None:
        async with main.running(settings, "test", workers=1, watch=False) as daemon:
            await paused(daemon.ledger)
            remount(small_disk, "size=64m")
            assert await all_done(daemon) == {"COMPLETED": 2}

    asyncio.run(story())
    attempts = select(ProcessingJob.attempts)
    assert set(ledger.read(lambda c: c.execute(attempts).scalars().all())) == {1}
    assert ds.dataset(small_disk / "out" / "lines").count_rows() == 9001


async def paused(ledger: Ledger) -> None:
    """Wait until some job waits for its sink."""
    waits = select(ProcessingJob.id).where(ProcessingJob.reason.startswith(PAUSED))
    await eventually(lambda: ledger.read_soon(lambda c: c.execute(waits).first()), WORK_SECONDS)


def test_a_foreign_file_at_the_target_is_left_alone_and_the_job_says_so(
    ledger: Ledger, settings: Settings, source: Path
) -> None:
    root = add_root(ledger, source)
    publish(ledger, settings, "rows", ROWS, "1.0.0")
    (source / "a.txt").write_text("one")
    scan(ledger, root)
    content = ledger.read(lambda c: c.execute(select(FileVersion.content_hash)).scalar_one())
    slot = key_of("source", b"a.txt", content, "1", "rows", "lines", "parquet://output")
    target = settings.home / "output" / "lines" / f"{slot[:32]}.parquet"
    target.parent.mkdir(parents=True)
    target.write_text("somebody else's")
    assert work_off(settings) == {"FAILED": 1}
    assert "untouched" in outcomes(ledger)["a.txt"][1]
    assert target.read_text() == "somebody else's"
    assert not list((settings.home / "output" / ".casparian" / "stage").iterdir())
    # The person moves the topic elsewhere and tries again.
    ledger.write(
        lambda c: c.execute(update(TopicConfig).values(uri="sqlite:///out.sqlite3")).rowcount
    )
    ledger.write(lambda c: jobs.retry(c, [1]))
    assert work_off(settings) == {"COMPLETED": 1}


def test_a_topic_may_go_to_two_sinks(ledger: Ledger, settings: Settings, source: Path) -> None:
    root = add_root(ledger, source)
    publish(ledger, settings, "rows", ROWS, "1.0.0")
    ledger.write(
        lambda c: (
            c.execute(
                insert(TopicConfig).values(
                    plugin_name="rows",
                    topic_name="lines",
                    uri="sqlite:///second.sqlite3",
                    mode="append",
                )
            ).rowcount
        )
    )
    (source / "a.txt").write_text("one\ntwo")
    scan(ledger, root)
    assert work_off(settings) == {"COMPLETED": 1}
    assert ds.dataset(settings.home / "output" / "lines").count_rows() == 2
    assert (settings.home / "second.sqlite3").exists()


def test_a_sink_nobody_can_open_fails_the_job_in_words(
    ledger: Ledger, settings: Settings, source: Path
) -> None:
    root = add_root(ledger, source)
    publish(ledger, settings, "rows", ROWS, "1.0.0")
    ledger.write(lambda c: c.execute(update(TopicConfig).values(uri="carrier-pigeon://x")).rowcount)
    (source / "a.txt").write_text("one")
    scan(ledger, root)
    assert work_off(settings) == {"FAILED": 1}
    assert "carrier-pigeon" in outcomes(ledger)["a.txt"][1]


TWO_TOPICS = plugin(
    'pattern="*.txt", sinks={"good": "sqlite:///out.sqlite3", "odd": "sqlite:///out.sqlite3"}',
    """
        with open(file_path) as file:
            words = file.read().split()
        self.publish("good", pa.table({"word": words}))
        odd = [int(word) for word in words] if words[0].isdecimal() else words
        self.publish("odd", pa.table({"word": odd}))
    """,
)


def test_a_sink_refuses_all_topics_of_a_job_together(
    ledger: Ledger, settings: Settings, source: Path
) -> None:
    root = add_root(ledger, source)
    publish(ledger, settings, "pairs", TWO_TOPICS, "1.0.0")
    (source / "a.txt").write_text("1 2")
    scan(ledger, root)
    assert work_off(settings) == {"COMPLETED": 1}
    for name, words in (("b", "one two"), ("c", "3")):
        (source / f"{name}.txt").write_text(words)
    scan(ledger, root)
    assert work_off(settings) == {"COMPLETED": 2, "FAILED": 1}
    status, reason = outcomes(ledger)["b.txt"]
    assert status == "FAILED"
    assert "topic 'odd': column 'word' (string) is INTEGER" in reason
    with closing(sqlite3.connect(settings.home / "out.sqlite3")) as opened:
        for topic in ("good", "odd"):
            found = opened.execute(f"SELECT CAST(word AS TEXT) FROM {topic}").fetchall()
            assert sorted(word for (word,) in found) == ["1", "2", "3"]
    job = select(ProcessingJob.id).where(ProcessingJob.status == "FAILED")
    failed = ledger.read(lambda c: c.execute(job).scalar_one())
    states = select(Output.topic, Output.state).where(Output.job_id == failed)
    assert set(ledger.read(lambda c: c.execute(states).all())) == {
        ("good", "REFUSED"), ("odd", "REFUSED"),
    }  # fmt: skip
    told = ledger.read(lambda c: views.audit(c, 99, f"job {failed}"))
    assert [row["action"] for row in told].count("refuse") == 1
    assert not list((settings.home / ".casparian" / "stage").iterdir())
    assert verify(settings, ledger).problems == []
