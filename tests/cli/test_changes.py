"""Configuration, source roots, rules and topics: what works, and what is refused and why."""

from __future__ import annotations

import asyncio
import os
import shlex
import sqlite3
import subprocess
import sys
import tomllib
from contextlib import closing
from pathlib import Path

import pytest

from casparian_flow import config, main
from casparian_flow.db.access import open_ledger
from casparian_flow.errors import ConfigError
from casparian_flow.services.watch import Watch
from tests.commands import COMMAND, Casparian
from tests.conftest import write_config
from tests.eventually import PATIENCE
from tests.factories import add_plugin
from tests.plugs import ROWS, plugin


def test_init_makes_a_complete_configuration_and_says_what_to_type(bare: Casparian) -> None:
    done = bare.run("init")
    assert "casparian source add DIR" in done.stderr
    file = bare.folder / config.FILE_NAME
    assert tomllib.loads(file.read_text()) == {
        "database": {"db_location": "casparian_flow.sqlite3"}
    }
    uncommented = file.read_text().replace("# [", "[").replace(" = ", "=")
    lines = [line.removeprefix("# ") if "=" in line else line for line in uncommented.splitlines()]
    file.write_text("\n".join(lines))
    assert config.load(str(file)) == config.load(str(_minimal(bare.folder)))


def _minimal(folder: Path) -> Path:
    file = folder / "minimal.toml"
    file.write_text('[database]\ndb_location = "casparian_flow.sqlite3"\n')
    return file


def test_init_keeps_what_is_there(casparian: Casparian) -> None:
    file = casparian.folder / config.FILE_NAME
    before = file.read_text()
    assert "already exists" in casparian.out("init")
    assert file.read_text() == before


def test_init_goes_where_it_is_told(bare: Casparian, monkeypatch: pytest.MonkeyPatch) -> None:
    bare.run("init", "below")
    assert (bare.folder / "below" / config.FILE_NAME).is_file()
    monkeypatch.setenv("CASPARIAN_CONFIG", str(bare.folder / "named.toml"))
    bare.run("init")
    assert (bare.folder / "named.toml").is_file()
    assert bare.json("source", "list") == []


def test_a_scan_of_the_configurations_own_folder_sees_none_of_ours(casparian: Casparian) -> None:
    (casparian.folder / "mine.txt").write_text("mine")
    casparian.run("source", "add", ".", "--settle", "0")
    casparian.run("scan")
    assert [row["rel_path"] for row in casparian.json("files")] == ["mine.txt"]


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no names that are not UTF-8")
def test_a_folder_whose_name_is_not_utf_8_is_refused_for_the_ledger(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not UTF-8") as refused:
        write_config(tmp_path / os.fsdecode(b"caf\xe9"))
    assert "db_location" in refused.value.hint


def test_without_a_configuration_every_place_tried_is_named(bare: Casparian) -> None:
    words = bare.err("status", code=78)
    assert "--config" in words
    assert "$CASPARIAN_CONFIG" in words
    assert "casparian init" in words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[database\n", "not valid TOML"),
        ("[database]\nlocation = 1\n", "location"),
        ("[workers]\ncount = -1\n", "count"),
    ],
)
def test_a_broken_configuration_is_refused(bare: Casparian, text: str, words: str) -> None:
    (bare.folder / config.FILE_NAME).write_text(text)
    assert words in bare.err("status", code=78)


def test_a_database_of_another_program_is_left_alone(casparian: Casparian) -> None:
    path = casparian.folder / "casparian_flow.sqlite3"
    path.unlink()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE theirs (a)")
    other.close()
    assert "another program" in casparian.err("status", code=74)
    path.write_text("prose, and no database at all; but long enough to be looked at as one")
    assert "not a SQLite database" in casparian.err("status", code=74)


def test_a_source_root_comes_and_goes_and_comes_back(casparian: Casparian, source: Path) -> None:
    (source / "a.txt").write_text("a")
    casparian.run("scan")
    casparian.run("source", "remove", "in")
    assert not casparian.json("source", "list")[0]["active"]
    assert "no active root" not in casparian.out("files")
    assert "source list" in casparian.err("source", "remove", "in", code=66)
    assert "in" in casparian.err("scan", "in", code=66)
    casparian.run("source", "add", source, "--name", "inbox", "--ignore", "*.bak")
    (root,) = casparian.json("source", "list")
    assert (root["name"], root["active"], root["ignore"], root["settle_seconds"]) == (
        "inbox", True, "*.bak", 0.0,
    )  # fmt: skip
    (source / "b.bak").write_text("b")
    casparian.run("scan")
    assert [row["rel_path"] for row in casparian.json("files")] == ["a.txt"]


def test_what_cannot_be_a_source_root_is_refused(casparian: Casparian, source: Path) -> None:
    def refused(*arguments: str | Path) -> str:
        return casparian.err("source", "add", *arguments, code=66)

    (source / "file").write_text("")
    (source / "inner").mkdir()
    other = source.parent / "other"
    other.mkdir()
    (source.parent / "link").symlink_to(source)
    assert "No such file" in refused(source / "missing")
    assert "Not a directory" in refused(source / "file")
    assert "is inside" in refused(source / "inner")
    assert "contains" in refused(source.parent)
    assert "already the source root in" in refused(source)
    assert "already the source root in" in refused(source.parent / "link")
    assert "already has the name in" in refused(other, "--name", "in")
    assert "name" in refused(other, "--name", "a/b")
    assert "ignore pattern" in refused(other, "--ignore", "!")
    assert "settle" in refused(other, "--settle", "-1")
    assert "settle" in refused(other, "--settle", "nan")
    strange = os.fsdecode(os.fsencode(source.parent) + b"/\xff")
    Path(strange).mkdir()
    assert "not UTF-8" in refused(strange)
    assert len(casparian.json("source", "list")) == 1


def test_a_source_root_is_shown_with_what_it_passes_over(
    casparian: Casparian, source: Path
) -> None:
    for name in ("a.bak", "._b.txt", "c.txt"):
        (source / name).write_text("a")
    casparian.run("source", "set", "in", "--ignore", "!._*")
    assert "3 new versions" in casparian.out("scan")
    shown = casparian.json("source", "show", "in")
    assert (shown["ignore"], shown["passed_over"]) == (["!._*"], 0)
    assert {".Trash-*/", "._*", "lost+found/"} < set(shown["ignored_by_default"])
    casparian.run("source", "set", "in", "--ignore", "*.bak")
    scanned = casparian.run("scan")
    assert "deleted" not in scanned.stdout and "2 known files now ignored" in scanned.stderr
    assert casparian.json("source", "show", "in")["passed_over"] == 2
    assert "passed_over" in casparian.out("source", "show", "in")
    assert {row["rel_path"] for row in casparian.json("files", "--gone")} == {"a.bak", "._b.txt"}
    assert "no source root" in casparian.err("source", "show", "x", code=66)


def test_a_rule_queues_what_it_asks_for(casparian: Casparian, source: Path) -> None:
    (source / "a.log").write_text("a")
    casparian.run("publish", casparian.plugin("rows", ROWS))
    casparian.run("scan")
    assert "files --unrouted" in casparian.err("status")
    assert "1 job queued" in casparian.out("rules", "add", "*.log", "plugin:rows")
    rules = casparian.json("rules", "list")
    assert [(rule["pattern"], rule["plugins"]) for rule in rules] == [
        ("*.txt", "rows"), ("*.log", "rows"),
    ]  # fmt: skip
    assert "already" in casparian.err("rules", "add", "*.log", "plugin:rows", code=78)
    casparian.run("rules", "remove", str(rules[1]["id"]))
    assert "rule 99" in casparian.err("rules", "remove", "99", code=66)
    assert "pattern" in casparian.err("rules", "add", "/", "tag", code=78)
    assert "tag" in casparian.err("rules", "add", "*", "a,b", code=78)
    assert "1 job is queued" in casparian.err("status")


def test_a_rule_matches_in_any_case_or_in_its_own(casparian: Casparian, source: Path) -> None:
    for name in ("a.LOG", "b.log"):
        (source / name).write_text("a")
    casparian.run("publish", casparian.plugin("rows", ROWS))
    casparian.run("scan")
    add = ("rules", "add", "*.log", "plugin:rows")
    assert "1 job queued" in casparian.out(*add, "--exact-case")
    assert [rule["case"] for rule in casparian.json("rules", "list")] == ["any", "exact"]
    casparian.run("rules", "remove", "2")
    assert "1 job queued" in casparian.out(*add)
    assert [rule["case"] for rule in casparian.json("rules", "list")] == ["any", "any"]


def test_a_publish_that_widens_the_patterns_of_a_plugin_says_so(
    casparian: Casparian, source: Path
) -> None:
    (source / "a.TXT").write_text("a")
    casparian.run("publish", casparian.plugin("rows", ROWS), "--version", "1.0.0")
    with closing(sqlite3.connect(casparian.folder / "casparian_flow.sqlite3")) as ledger, ledger:
        ledger.execute("UPDATE cf_routing_rule SET any_case = 0")  # as the migration leaves them
    assert "queued" not in casparian.out("scan")
    again = casparian.plugin("rows", f"{ROWS}\n# edited\n")
    published = casparian.run("publish", again, "--version", "2.0.0")
    assert "*.txt matched" in published.stdout + published.stderr
    assert "1 job queued" in published.stdout
    again = casparian.plugin("rows", f"{ROWS}\n# edited again\n")
    assert "*.txt matched" not in casparian.out("publish", again, "--version", "3.0.0")


@pytest.mark.slow
def test_a_topic_goes_where_it_is_sent(casparian: Casparian, source: Path) -> None:
    assert "no plugin is named" in casparian.err("topics", "set", "rows", "a", "b", code=66)
    casparian.run("publish", casparian.plugin("rows", ROWS))
    set_lines = ("topics", "set", "rows", "lines")
    assert "scheme 'ftp'" in casparian.err(*set_lines, "ftp://x", code=78)
    assert "mode" in casparian.err(*set_lines, "parquet://x", "--mode", "sometimes", code=78)
    assert "declares no topic 'other'" in casparian.err(
        "topics", "set", "rows", "other", "parquet://output"
    )
    both = casparian.out(*set_lines, "parquet://out?mode=replace", "sqlite:///two.sqlite3")
    assert both == (
        "rows: topic lines goes to parquet://out (mode replace)\n"
        "rows: topic lines goes to sqlite:///two.sqlite3 (mode append)\n"
    )
    placed = [(t["uri"], t["mode"]) for t in casparian.json("topics") if t["topic"] == "lines"]
    assert placed == [("parquet://out", "replace"), ("sqlite:///two.sqlite3", "append")]
    casparian.run(*set_lines, "sqlite:///tables.sqlite3")
    (source / "a.txt").write_text("one\ntwo\n")
    casparian.run("scan", "--drain")
    topics = {row["topic"]: (row["uri"], row["rows"]) for row in casparian.json("topics")}
    assert topics == {"lines": ("sqlite:///tables.sqlite3", 2), "other": ("parquet://output", 0)}
    assert "note: 1 output (2 rows) stays in sqlite:///tables.sqlite3" in casparian.err(
        *set_lines, "parquet://output"
    )
    casparian.run(*set_lines, "sqlite:///tables.sqlite3")
    assert casparian.json("topics", "list") == casparian.json("topics")
    assert casparian.json("query", "SELECT line FROM lines ORDER BY line") == [
        {"line": "one"}, {"line": "two"},
    ]  # fmt: skip
    assert casparian.json("verify")["problems"] == []


def test_what_no_ledger_can_take_is_no_bug(casparian: Casparian, tmp_path: Path) -> None:
    huge = str(1 << 64)
    assert "out of range" in casparian.err("jobs", "show", huge, code=2)
    assert "out of range" in casparian.err("rules", "remove", huge, code=2)
    assert "is not UTF-8" in casparian.err("jobs", "--path", "a\udcff", code=2)
    assert "is not UTF-8" in casparian.err("source", "remove", "a\udcff", code=2)
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f'rmdir "$PWD"; exec {shlex.join(COMMAND)} status'
    done = subprocess.run(
        ["sh", "-c", script], cwd=gone, capture_output=True, text=True, check=False
    )
    assert (done.returncode, "current directory" in done.stderr) == (2, True)


def test_a_rule_names_the_plugins_that_really_subscribe(casparian: Casparian) -> None:
    casparian.run("rules", "add", "*.csv", "a_b")
    casparian.run("rules", "add", "*.csv", "AxB")
    settings = config.load(str(casparian.folder / config.FILE_NAME))
    with open_ledger(settings.database) as ledger:
        add_plugin(ledger, "p", subscriptions="axb")
    assert [rule["plugins"] for rule in casparian.json("rules", "list")] == [None, None]


NUMBERS = plugin(
    'pattern="*.txt", topic="numbers"',
    """
        self.publish("numbers", pa.table({"n": [float(line) for line in open(file_path)]}))
    """,
)


@pytest.mark.slow
def test_what_one_sink_has_no_value_for_no_other_sink_gets(
    casparian: Casparian, source: Path
) -> None:
    casparian.run("publish", casparian.plugin("rows", NUMBERS), "--version", "1.0.0")
    casparian.run("topics", "set", "rows", "numbers", "parquet://out", "sqlite:///two.sqlite3")
    (source / "a.txt").write_text("1.5\nnan\n")
    said = casparian.err("scan", "--drain", code=1)
    assert "column 'n' (double) cannot be stored in SQLite: it has no NaN" in said
    assert not list((casparian.folder / "out").rglob("*.parquet"))
    (source / "a.txt").write_text("1.5\n2.5\n")
    casparian.run("scan", "--drain")
    assert len(list((casparian.folder / "out").rglob("*.parquet"))) == 1
    found = casparian.json("query", "SELECT n FROM numbers ORDER BY n")
    assert found == [{"n": 1.5}, {"n": 2.5}]


def test_a_change_wakes_the_daemon_that_runs(
    casparian: Casparian, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config.load(str(casparian.folder / config.FILE_NAME))
    other = source.with_name("other")
    other.mkdir()

    async def story() -> None:
        woken = asyncio.Event()
        monkeypatch.setattr(Watch, "ring", lambda _: woken.set())
        async with main.running(settings, "test", workers=0, watch=False):
            await asyncio.to_thread(casparian.process, "source", "add", other)
            async with asyncio.timeout(PATIENCE):
                await woken.wait()

    asyncio.run(story())
