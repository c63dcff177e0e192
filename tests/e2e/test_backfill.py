"""What was recorded before a plugin, and what another version of it did, is worked on a word."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from sqlalchemy import select

from casparian_flow import config, main
from casparian_flow.config import Settings
from casparian_flow.db import jobs, kept, plugins, views
from casparian_flow.db.access import Connection, Ledger, open_ledger
from casparian_flow.db.backfill import Backfill, Choice, backfill
from casparian_flow.db.models import FileVersion
from casparian_flow.engine.sinks import query
from casparian_flow.services import architect
from casparian_flow.services.scan import scan
from casparian_flow.services.verify import verify
from tests.commands import Casparian
from tests.conftest import write_config
from tests.daemons import work_off
from tests.e2e.test_store import ROWS_SINK, SEES
from tests.factories import add_root
from tests.plugs import publish

A = [("a.txt", f"content {n}") for n in (1, 2, 3)]


def rows(ledger: Ledger, table: str = "seen") -> list[tuple[str, str, str]]:
    """(name, content, plugin version) of every row that `casparian query` shows."""
    question = f"SELECT name, content, _cf_plugin_version AS version FROM {table}"
    with query.answer(question, ledger.read(views.committed)) as found:
        return sorted(tuple(row.values()) for row in found.read_all().to_pylist())


def recorded(tmp_path: Path, source: Path) -> Settings:
    """A file that had three contents, and one that is gone: all before there was a plugin."""
    settings = write_config(tmp_path / "flow", ROWS_SINK)
    with open_ledger(settings.database) as ledger:
        root = add_root(ledger, source)
        (source / "b.txt").write_text("b, as it was")
        (source / "other.md").write_text("no plugin wants it")
        for name, content in A:
            (source / name).write_text(content)
            scan(ledger, root)
        (source / "b.txt").unlink()
        scan(ledger, root)
    return settings


def test_a_plugin_works_older_versions_on_a_word_and_redoes_on_another(
    tmp_path: Path, source: Path
) -> None:
    settings = recorded(tmp_path, source)
    cli = Casparian(settings.home)
    with open_ledger(settings.database) as ledger:
        publish(ledger, settings, "sees", SEES, "1.0.0")
        assert work_off(settings) == {"COMPLETED": 1}
        assert backfill(ledger, Choice("sees", path="b*"), dry_run=True).queued == 1
        assert "3 jobs would be queued" in cli.out("backfill", "sees", "--dry-run")
        assert ledger.read(jobs.counts) == {"COMPLETED": 1}
        said = cli.out("backfill", "sees")
        assert "sees 1.0.0: 3 jobs queued" in said
        assert "_cf_plugin_version" in said
        assert work_off(settings) == {"COMPLETED": 4}
        gone = ("b.txt", "b, as it was", "1.0.0")
        assert rows(ledger) == [(*A[2], "1.0.0"), gone]
        first = [*((*row, "1.0.0") for row in A), gone]
        assert rows(ledger, "seen_history") == first
        assert "sees 1.0.0: 0 jobs queued" in cli.out("backfill", "sees")

        publish(ledger, settings, "sees", SEES + "\n# better\n", "1.1.0")
        said = cli.out("backfill", "sees", "--since", "2020-01-01")
        assert "sees 1.1.0: 0 jobs queued" in said
        assert "4 versions already processed by another version of sees" in said
        assert "0 jobs" in cli.out("backfill", "sees", "--redo", "--since", "9999-01-01")
        assert "sees 1.1.0: 4 jobs queued" in cli.out("backfill", "sees", "--redo")
        assert work_off(settings) == {"COMPLETED": 8}
        assert rows(ledger) == [(*row[:2], "1.1.0") for row in (first[2], gone)]
        again = [(*row[:2], "1.1.0") for row in first]
        assert rows(ledger, "seen_history") == again, "each version once"

        architect.activate(
            ledger, settings, config.keys_folder(), "sees", "1.0.0", "1.1.0 is wrong"
        )
        assert rows(ledger) == [first[2], gone]
        assert backfill(ledger, Choice("sees", redo=True)).queued == 0
        assert verify(settings, ledger).problems == []
        noted = ledger.read(lambda c: views.audit(c, 9, "plugin sees *"))
        asked = [row["subject"] for row in noted if row["action"] == "backfill"]
    assert asked == ["plugin sees 1.1.0", "plugin sees 1.0.0"]


def forget(ledger: Ledger, ordinals: set[int]) -> None:
    """Take the bytes of these versions of all files from the store, as the ledger knows it."""
    lost = select(FileVersion.content_hash).where(FileVersion.ordinal.in_(ordinals))

    def work(connection: Connection) -> None:
        found = [kept.find(connection, each) for each in connection.execute(lost).scalars()]
        kept.forget(connection, [content for content in found if content])

    ledger.write(work)


def test_what_has_no_bytes_any_more_and_what_waits_is_counted(tmp_path: Path, source: Path) -> None:
    settings = recorded(tmp_path, source)
    cli = Casparian(settings.home)
    with open_ledger(settings.database) as ledger:
        publish(ledger, settings, "sees", SEES, "1.0.0")
        forget(ledger, {2})
        publish(ledger, settings, "sees", SEES + "\n# better\n", "1.1.0")
        done = backfill(ledger, Choice("sees", redo=True), dry_run=True)
        assert done == Backfill("1.1.0", 2, 4, bytes_gone=1, worked=0, waits=1)
        said = cli.out("backfill", "sees", "--redo")
        assert "sees 1.1.0: 2 jobs queued" in said
        assert "1 version skipped, since the content is gone" in said
        assert "1 version skipped: another version of sees has an unfinished job" in said


@pytest.mark.slow
def test_what_was_retracted_is_not_worked_again_before_that_is_undone(
    tmp_path: Path, source: Path
) -> None:
    settings = recorded(tmp_path, source)
    cli = Casparian(settings.home)
    with open_ledger(settings.database) as ledger:
        publish(ledger, settings, "sees", SEES, "1.0.0")
        assert work_off(settings) == {"COMPLETED": 1}
        cli.run("retract", "source/a.txt")
        publish(ledger, settings, "sees", SEES + "\n# better\n", "1.1.0")
        done = backfill(ledger, Choice("sees", path="a*", redo=True))
        assert (done.queued, done.retracted) == (2, 1)
        work_off(settings)
        assert rows(ledger, "seen_history") == [(*row, "1.1.0") for row in A[:2]]
        assert "1 version skipped, since retracted" in cli.out(
            "backfill", "sees", "--path", "a*", "--redo"
        )
        cli.run("retract", "source/a.txt", "--undo")
        assert backfill(ledger, Choice("sees", path="a*", redo=True)).queued == 1
        work_off(settings)
        assert (*A[2], "1.1.0") in rows(ledger)
        assert verify(settings, ledger).problems == []


@pytest.mark.slow
def test_a_new_version_says_what_older_ones_have_worked(tmp_path: Path, source: Path) -> None:
    settings = recorded(tmp_path, source)
    cli = Casparian(settings.home)
    better = settings.home / "sees.py"
    with open_ledger(settings.database) as ledger:
        assert "older" not in publish(ledger, settings, "sees", SEES, "1.0.0")
        words = publish(ledger, settings, "sees", SEES + "\n# 2\n", "1.0.1")
        assert "an older version of sees still has 1 unfinished job" in words
        backfill(ledger, Choice("sees"))
        assert work_off(settings) == {"COMPLETED": 4}
        words = publish(ledger, settings, "sees", SEES + "\n# 3\n", "1.1.0")
        assert (
            "older versions of sees have processed 4 file versions: the rows that they gave stay; "
            "to process them with 1.1.0 too, and show its rows instead: "
            "casparian backfill sees --redo"
        ) in words.splitlines()
        better.write_text(SEES + "\n# older\n")
        assert "older versions" not in cli.out("publish", better, "--version", "0.9")

        forget(ledger, {2})
        better.write_text(SEES + "\n# 4\n")
        words = cli.out("publish", better, "--version", "1.2")
        assert "to process the 3 whose content is still there" in words
        said = cli.out("backfill", "sees", "--dry-run")
        assert "--redo processes the 3 whose content is still there with 1.2 too" in said
        better.write_text(SEES.replace("*.txt", "b.txt"))

        async def through_the_daemon() -> str:
            async with main.running(settings, "test", workers=1, watch=False):
                publishing = asyncio.to_thread(cli.process, "publish", better, "--version", "1.3")
                return (await publishing).stdout

        words = asyncio.run(through_the_daemon())
        assert "deployed sees 1.3" in words
        assert "have processed 1 file version: the rows that they gave stay;" in words


def test_what_cannot_be_meant_is_said(tmp_path: Path, source: Path) -> None:
    settings = recorded(tmp_path, source)
    cli = Casparian(settings.home)
    with open_ledger(settings.database) as ledger:
        publish(ledger, settings, "sees", SEES, "1.0.0")
        assert "no plugin is named 'sea'" in cli.err("backfill", "sea", code=66)
        assert "is routed to sees" in cli.err("backfill", "sees", "--path", "*.md")
        plugins.disable(ledger, config.keys_folder(), "sees", None, "wrong")
        assert "no version of sees is active" in cli.err("backfill", "sees", code=1)
