"""What a ledger that is older than its sinks says, before and after it has asked them."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.commands import Casparian, asked, holds
from tests.plugs import ROWS

OLDER = "may be older than its sinks"


def test_a_restored_ledger_says_what_it_may_not_know_and_which_topics_went_elsewhere(
    casparian: Casparian, source: Path, tmp_path: Path
) -> None:
    def work(content: str) -> str:
        (source / "a.txt").write_text(content)
        done = casparian.run("scan", "--drain")
        return done.stdout + done.stderr

    casparian.run("publish", casparian.plugin("rows", ROWS))
    casparian.run("topics", "set", "rows", "lines", "parquet://one", "--mode", "replace")
    assert OLDER not in work("1")
    assert OLDER not in casparian.err("query", "SELECT line FROM lines")
    ledger = casparian.folder / "casparian_flow.sqlite3"
    casparian.run("backup", tmp_path / "copy")
    casparian.run("topics", "set", "rows", "lines", "parquet://two?mode=replace", "--rebuild")
    work("1")
    work("2")
    for file in casparian.folder.glob(f"{ledger.name}*"):
        file.unlink()
    shutil.copyfile(tmp_path / "copy", ledger)

    assert OLDER in casparian.err("query", "SELECT line FROM lines")
    done = casparian.run("status", "--check", code=1)
    assert OLDER in done.stderr and "casparian scan" in done.stderr
    said = work("2")
    assert said.count("adopted, so that they are not made twice") == 1
    assert said.count("topic lines of rows went to parquet://two (mode replace)") == 1
    assert "shows again 1 row in parquet://one" in said
    again = "casparian topics set rows lines 'parquet://two?mode=replace' --rebuild"
    assert again in said
    assert OLDER not in casparian.err("query", "SELECT line FROM lines")
    casparian.run(*again.replace("'", "").split()[1:])
    work("2")
    assert not list((casparian.folder / "one" / "lines").glob("*.parquet"))
    assert asked(casparian, "lines") == ["2"]
    holds(casparian)


def test_a_mode_that_was_set_since_the_backup_is_named(
    casparian: Casparian, source: Path, tmp_path: Path
) -> None:
    casparian.run("publish", casparian.plugin("rows", ROWS))
    (source / "a.txt").write_text("1")
    casparian.run("scan", "--drain")
    casparian.run("backup", tmp_path / "copy")
    casparian.run("topics", "set", "rows", "lines", "parquet://output", "--mode", "replace")
    (source / "a.txt").write_text("2")
    casparian.run("scan", "--drain")
    ledger = casparian.folder / "casparian_flow.sqlite3"
    for file in casparian.folder.glob(f"{ledger.name}*"):
        file.unlink()
    shutil.copyfile(tmp_path / "copy", ledger)
    said = casparian.err("scan")
    assert "by this ledger it goes to parquet://output (mode append)" in said
    assert "casparian topics set rows lines 'parquet://output?mode=replace'\n" in said


def test_a_sink_that_somebody_emptied_misses_its_outputs_and_has_not_deleted_them(
    casparian: Casparian, source: Path, tmp_path: Path
) -> None:
    casparian.run("publish", casparian.plugin("rows", ROWS))
    casparian.run("topics", "set", "rows", "lines", "parquet://one", "parquet://two")
    (source / "a.txt").write_text("1")
    casparian.run("scan", "--drain")
    casparian.run("backup", tmp_path / "copy")
    ledger = casparian.folder / "casparian_flow.sqlite3"
    for file in casparian.folder.glob(f"{ledger.name}*"):
        file.unlink()
    shutil.copyfile(tmp_path / "copy", ledger)
    shutil.rmtree(casparian.folder / "one")
    assert "no longer has" not in casparian.err("scan")
    assert str(casparian.folder / "one") in casparian.out("verify", code=1)
