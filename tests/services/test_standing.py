"""What readers see in real sinks after each thing that changes what stands."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
from sqlalchemy import text

from casparian_flow import config, crashpoints
from casparian_flow.config import Settings
from casparian_flow.db import debts, jobs, outputs, views, visibility
from casparian_flow.db.access import Ledger, open_ledger
from casparian_flow.db.backfill import Choice, backfill
from casparian_flow.db.states import utcnow
from casparian_flow.errors import NotFound
from casparian_flow.services import architect, topics
from casparian_flow.services import outputs as verbs
from casparian_flow.services.scan import Root, scan
from casparian_flow.services.verify import verify
from tests.conftest import write_config
from tests.daemons import work_off
from tests.factories import add_root
from tests.plugs import plugin, publish

URIS = {"parquet": "parquet://output", "sqlite": "sqlite:///out.sqlite3"}


def saying(word: str, uris: str) -> str:
    """A plugin that writes each line behind a word: `word` is its artifact."""
    return plugin(
        f'pattern="*.txt", sinks={{"lines": {uris}}}',
        f"""
        lines = [f"{word} {{line.strip()}}" for line in open(file_path)]
        if lines:
            self.publish("lines", pa.table({{"line": pa.array(lines, pa.string())}}))
        """,
    )


class Flow:
    """A source root and the plugin `rows` into one sink."""

    def __init__(self, settings: Settings, source: Path, scheme: str, mode: str) -> None:
        self.settings = settings
        self.source = source
        self.scheme = scheme
        self.uri = f"{URIS[scheme]}?mode={mode}"
        self.root: Root | None = None

    def publish(self, ledger: Ledger, word: str, version: str) -> str:
        return publish(ledger, self.settings, "rows", saying(word, f'["{self.uri}"]'), version)

    def redo(self, ledger: Ledger) -> None:
        backfill(ledger, Choice("rows", redo=True))
        work_off(self.settings)

    def work(self, ledger: Ledger, **contents: str) -> None:
        for name, words in contents.items():
            (self.source / f"{name}.txt").write_text(words)
        if self.root is None:
            self.root = add_root(ledger, self.source)
        scan(ledger, self.root)
        work_off(self.settings)

    def seen(self, topic: str = "lines") -> list[str]:
        """What a reader sees in the sink."""
        if self.scheme == "sqlite":
            with closing(sqlite3.connect(self.settings.home / "out.sqlite3")) as connection:
                return sorted(row[0] for row in connection.execute(f"SELECT line FROM {topic}"))
        files = sorted(map(str, (self.settings.home / "output" / topic).glob("[!_]*.parquet")))
        if not files:
            return []
        return sorted(ds.dataset(files).to_table(["line"])["line"].to_pylist())

    def check(self, ledger: Ledger) -> None:
        assert verify(self.settings, ledger).problems == []
        assert ledger.read(debts.owed) == {}


@pytest.fixture(params=[("sqlite", "replace"), ("parquet", "append")], ids="-".join)
def flow(request: pytest.FixtureRequest, settings: Settings, source: Path) -> Flow:
    """Each kind of sink and each mode with guests; tests/truth tells both modes to both kinds."""
    return Flow(settings, source, *request.param)


@pytest.fixture
def opened(flow: Flow) -> Iterator[Ledger]:
    with open_ledger(flow.settings.database) as ledger:
        yield ledger


def listed(ledger: Ledger) -> dict[tuple[str, int, int], str]:
    """(file, version, job) -> the state of its output."""
    rows = ledger.read(lambda c: outputs.listed(c, None, None))
    return {(row["rel_path"], row["version"], row["job"]): row["state"] for row in rows}


@pytest.mark.slow_but("sqlite-replace")
def test_the_good_bytes_published_again_are_a_label(flow: Flow, opened: Ledger) -> None:
    """Situations 1 and 3: good, bad, the good bytes again, redone after each."""
    flow.publish(opened, "good", "1.0.0")
    flow.work(opened, a="x")
    flow.publish(opened, "bad", "1.0.1")
    assert flow.seen() == ["good x"]
    flow.redo(opened)
    assert flow.seen() == ["bad x"]
    said = flow.publish(opened, "good", "1.0.2")
    assert "1 output (1 row) is visible now, 1 output (1 row) is hidden now" in said
    assert flow.seen() == ["good x"]
    flow.redo(opened)
    assert flow.seen() == ["good x"]
    assert opened.read(jobs.counts) == {"COMPLETED": 2}
    flow.check(opened)


@pytest.mark.slow_but("sqlite-replace")
def test_a_plugin_that_is_rolled_back_shows_its_rows_at_once(flow: Flow, opened: Ledger) -> None:
    """Situation 2: the rest is queued for it."""
    flow.publish(opened, "good", "1.0.0")
    flow.work(opened, a="x")
    flow.publish(opened, "bad", "1.0.1")
    flow.redo(opened)
    flow.work(opened, b="y")
    assert flow.seen() == ["bad x", "bad y"]
    said = architect.activate(
        opened, flow.settings, config.keys_folder(), "rows", "1.0.0", "the other is bad"
    )
    assert "the rows that it gave of 1 file version show at once: 1 output (1 row) is" in said
    assert "1 job queued for what only other versions of rows have processed" in said
    assert flow.seen() == ["bad y", "good x"]
    work_off(flow.settings)
    assert flow.seen() == ["good x", "good y"]
    flow.check(opened)


def test_a_removed_topic_that_comes_back_in_another_sink_is_named(
    settings: Settings, source: Path
) -> None:
    """It was sent elsewhere before it was removed: nothing remembers where it went."""
    flow = Flow(settings, source, "parquet", "append")
    other = plugin('pattern="*.txt", topic="other"', "pass")
    with open_ledger(settings.database) as ledger:
        flow.publish(ledger, "good", "1.0.0")
        topics.set_topic(ledger, settings, "rows", "lines", [URIS["sqlite"]], "append")
        flow.work(ledger, a="x")
        publish(ledger, settings, "rows", other, "1.0.1")
        topics.remove(ledger, "rows", "lines")
        said = architect.activate(ledger, settings, config.keys_folder(), "rows", "1.0.0", "back")
        assert f"1 output (1 row) stays in {URIS['sqlite']}" in said
        assert "casparian rebuild lines" in said
        assert ledger.read(views.committed)[0]["rows"] == 1
        flow.check(ledger)


def test_what_was_removed_is_made_again_when_its_plugin_is_active(
    tmp_path: Path, source: Path
) -> None:
    settings = write_config(tmp_path / "flow", "[output]\nkeep_replaced_days = 0\n")
    flow = Flow(settings, source, "sqlite", "append")
    with open_ledger(settings.database) as ledger:
        flow.publish(ledger, "good", "1.0.0")
        flow.work(ledger, a="x")
        flow.publish(ledger, "bad", "1.0.1")
        flow.redo(ledger)
        assert set(listed(ledger).values()) == {"REMOVED", "CURRENT"}
        with closing(sqlite3.connect(settings.home / "out.sqlite3")) as connection:
            assert connection.execute("SELECT count(*) FROM _cf_rows_lines").fetchone() == (1,)
        said = architect.activate(
            ledger, settings, config.keys_folder(), "rows", "1.0.0", "the other is bad"
        )
        assert "1 job queued again, whose rows were removed" in said
        assert flow.seen() == ["bad x"]
        work_off(settings)
        assert flow.seen() == ["good x"]
        flow.check(ledger)


@pytest.mark.slow_but("sqlite-replace")
def test_a_version_without_rows_takes_its_place(flow: Flow, opened: Ledger) -> None:
    """Situation 17."""
    flow.publish(opened, "good", "1.0.0")
    flow.work(opened, a="x")
    flow.work(opened, a="")
    assert flow.seen() == ([] if "replace" in flow.uri else ["good x"])
    assert listed(opened) == {("a.txt", 1, 1): "PAST", ("a.txt", 2, 2): "CURRENT"}
    flow.check(opened)


@pytest.mark.slow_but("sqlite-replace")
def test_a_mode_is_what_is_shown(flow: Flow, opened: Ledger) -> None:
    flow.publish(opened, "good", "1.0.0")
    for content in ("x", "y"):
        flow.work(opened, a=content)
    both, last = ["good x", "good y"], ["good y"]
    for mode, rows in (("replace", last), ("append", both), ("replace", last)):
        done = topics.set_topic(opened, flow.settings, "rows", "lines", [URIS[flow.scheme]], mode)
        assert done.notes == []
        assert flow.seen() == rows
        flow.check(opened)
    flow.work(opened, a="z")
    assert flow.seen() == ["good z"]
    assert flow.scheme == "parquet" or flow.seen("lines_history") == [*both, "good z"]
    flow.check(opened)


@pytest.mark.slow_but("sqlite-replace")
def test_a_retraction_belongs_to_a_version(flow: Flow, opened: Ledger) -> None:
    """It keeps its place, and counts for what another artifact gives it later."""
    flow.publish(opened, "good", "1.0.0")
    flow.work(opened, a="x")
    flow.work(opened, a="y")
    before = flow.seen()
    second = opened.read(views.committed)[-1]
    version = str(opened.read(lambda c: debts.records(c, [second["id"]]))[second["id"]].version_id)
    verbs.retract(opened, version)
    older = [] if "replace" in flow.uri else ["good x"]
    assert flow.seen() == older
    flow.publish(opened, "bad", "1.0.1")
    flow.redo(opened)
    redone = ["bad x"] if older else []
    assert flow.seen() == redone, "it is not worked again while it is retracted"
    flow.check(opened)
    verbs.retract(opened, version, undo=True)
    assert flow.seen() == [*redone, "good y"]
    flow.redo(opened)
    assert flow.seen() == [*redone, "bad y"]
    verbs.retract(opened, version)
    architect.activate(opened, flow.settings, config.keys_folder(), "rows", "1.0.0", "bad")
    assert flow.seen() == older
    verbs.retract(opened, version, undo=True)
    assert flow.seen() == before
    with pytest.raises(NotFound):
        verbs.retract(opened, version, undo=True)
    flow.work(opened, a="z")
    assert flow.seen() == ([*before, "good z"] if older else ["good z"])
    flow.check(opened)


TWO = plugin(
    'pattern="*.txt", sinks={{"lines": "{}", "kinds": "{}"}}',
    """
    lines = [line.strip() for line in open(file_path)]
    self.publish("lines", pa.table({"line": pa.array(lines, pa.string())}))
    kinds = [int(line) if line.isdigit() else line for line in lines]
    self.publish("kinds", pa.table({"line": pa.array(kinds)}))
    """,
)


@pytest.mark.slow_cases("parquet://z")
@pytest.mark.parametrize("first", ["sqlite:///a.sqlite3", "parquet://z"])
def test_if_one_store_refuses_nothing_of_the_job_shows(
    settings: Settings, source: Path, first: str
) -> None:
    """Situation 20: the second sink holds another program's table of the topic's name."""
    second = "sqlite:///b.sqlite3"
    source_text = TWO.replace('"{}"', f'"{first}?mode=append"', 1)
    source_text = source_text.replace('"{}"', f'"{second}?mode=error"', 1)
    source_text = source_text.replace("{{", "{").replace("}}", "}")
    with closing(sqlite3.connect(settings.home / "b.sqlite3")) as connection:
        connection.execute("CREATE TABLE kinds (other)")
        connection.execute("INSERT INTO kinds VALUES (1)")
        connection.commit()
    with open_ledger(settings.database) as ledger:
        publish(ledger, settings, "rows", source_text, "1.0.0")
        (source / "a.txt").write_text("x")
        scan(ledger, add_root(ledger, source))
        assert work_off(settings) == {"FAILED": 1}
        if first.startswith("sqlite"):
            with closing(sqlite3.connect(settings.home / "a.sqlite3")) as connection:
                names = {row[0] for row in connection.execute("SELECT name FROM sqlite_schema")}
                shown = "lines" in names and list(connection.execute("SELECT * FROM lines"))
                assert not shown
        else:
            assert list((settings.home / "z" / "lines").glob("[!_]*")) == []
        assert ledger.read(lambda c: outputs.listed(c, None, None)) == []
        with closing(sqlite3.connect(settings.home / "b.sqlite3")) as connection:
            connection.execute("DROP TABLE kinds")
        ledger.write(lambda c: jobs.retry(c, [1]))
        assert work_off(settings) == {"COMPLETED": 1}
        assert set(listed(ledger).values()) == {"CURRENT"}
        assert verify(settings, ledger).problems == []
        assert ledger.read(debts.owed) == {}


@pytest.mark.slow_but("sqlite-replace")
def test_a_sink_that_was_away_is_told_later(flow: Flow, opened: Ledger) -> None:
    flow.publish(opened, "good", "1.0.0")
    flow.work(opened, a="x")

    def work(connection: Any) -> None:
        """As another command that was killed before it told the sink."""
        connection.execute(
            text("INSERT INTO cf_retracted_version (file_version_id, retracted_at) VALUES (1, '')")
        )
        visibility.refresh(connection, visibility.of_versions(connection, [1]))

    opened.write(work)
    assert flow.seen() == ["good x"]
    assert any("does not know yet" in p for p in verify(flow.settings, opened).problems)
    flow.work(opened, b="y")  # the daemon tells it as it starts
    assert flow.seen() == ["good y"]
    flow.check(opened)


@pytest.mark.slow_but("sqlite-replace")
def test_a_sink_may_know_already_what_it_is_owed(flow: Flow, opened: Ledger) -> None:
    """Who told it was killed before it could note that."""
    flow.publish(opened, "good", "1.0.0")
    flow.work(opened, a="x")
    verbs.retract(opened, "1")
    told = text("UPDATE cf_visibility SET told = 'current/' || mode")
    opened.write(lambda c: c.execute(told).rowcount)
    (said,) = verify(flow.settings, opened).problems
    assert "does not know yet what readers are to see of 1 output;" in said
    assert verbs.tell(opened) == []
    flow.check(opened)


@pytest.mark.slow_but("sqlite-replace")
def test_a_forgotten_output_leaves_its_place(flow: Flow, opened: Ledger) -> None:
    """What another artifact gave the version stands again."""
    flow.publish(opened, "good", "1.0.0")
    flow.work(opened, a="x")
    flow.publish(opened, "bad", "1.0.1")
    flow.redo(opened)
    if flow.scheme == "sqlite":
        with closing(sqlite3.connect(flow.settings.home / "out.sqlite3")) as connection:
            connection.execute("DELETE FROM _cf_rows_lines WHERE line = 'bad x'")
            connection.commit()
    else:
        (file,) = (flow.settings.home / "output" / "lines").glob("[!_]*")
        file.unlink()
    assert flow.seen() == []
    verbs.forget(opened, "2")
    assert flow.seen() == ["good x"]
    flow.check(opened)
    assert verbs.restore(opened, "2") == [2]
    work_off(flow.settings)
    assert flow.seen() == ["bad x"]
    flow.check(opened)


@pytest.mark.slow_but("sqlite-replace")
def test_replaced_rows_are_kept_for_a_while(flow: Flow, opened: Ledger) -> None:
    flow.publish(opened, "good", "1.0.0")
    flow.work(opened, a="x")
    flow.publish(opened, "bad", "1.0.1")
    flow.redo(opened)
    old = utcnow() - timedelta(days=8)
    opened.write(
        lambda c: (
            c.execute(
                text("UPDATE cf_visibility SET changed_at = :old WHERE state = 'hidden'"),
                {"old": old},
            ).rowcount
        )
    )
    assert set(listed(opened).values()) == {"HIDDEN", "CURRENT"}
    flow.work(opened, b="y")
    assert sorted(listed(opened).values()) == ["CURRENT", "CURRENT", "REMOVED"]
    assert flow.seen() == ["bad x", "bad y"]
    flow.check(opened)


class Died(BaseException):
    """The process ends where it stands: nothing of ours catches this."""


Verb = Callable[[Flow, Ledger], object]

DECIDED: dict[str, tuple[Verb, list[str]]] = {
    "retract.decided": (lambda flow, ledger: verbs.retract(ledger, "1"), []),
    "outputs.forgotten": (lambda flow, ledger: verbs.forget(ledger, "2"), ["good x"]),
    "outputs.withdrawn": (lambda flow, ledger: verbs.restore(ledger, "2"), ["bad x"]),
    "outputs.queued": (lambda flow, ledger: verbs.restore(ledger, "2"), ["bad x"]),
    "architect.activated": (
        lambda flow, ledger: architect.activate(
            ledger, flow.settings, config.keys_folder(), "rows", "1.0.0", "the other is bad"
        ),
        ["good x"],
    ),
    "topics.set": (
        lambda flow, ledger: topics.set_topic(
            ledger, flow.settings, "rows", "lines", [URIS[flow.scheme]], "append"
        ),
        ["bad x"],
    ),
}
"""Crash point -> who comes to it, and what readers see after the next start."""


@pytest.mark.parametrize("point", DECIDED)
@pytest.mark.slow_but("retract.decided")
def test_what_was_decided_before_a_death_is_seen_after_the_next_start(
    point: str, settings: Settings, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Situation 24."""
    flow = Flow(settings, source, "sqlite", "replace")
    act, rows = DECIDED[point]

    def die(name: str) -> None:
        if name == point:
            raise Died

    with open_ledger(settings.database) as ledger:
        flow.publish(ledger, "good", "1.0.0")
        flow.work(ledger, a="x")
        flow.publish(ledger, "bad", "1.0.1")
        flow.redo(ledger)
        if point.startswith("outputs."):
            lose(flow)
        with monkeypatch.context() as armed, pytest.raises(Died):
            armed.setattr(crashpoints, "_react", die)
            act(flow, ledger)
        if point == "outputs.withdrawn":
            assert verify(settings, ledger).problems
            act(flow, ledger)  # `verify` names what is missing, and the same call restores it
    with open_ledger(settings.database) as ledger:
        flow.work(ledger)
        assert flow.seen() == rows
        flow.check(ledger)


def lose(flow: Flow) -> None:
    """Delete the rows `bad x` from the sink."""
    with closing(sqlite3.connect(flow.settings.home / "out.sqlite3")) as connection:
        connection.execute("DELETE FROM _cf_rows_lines WHERE line = 'bad x'")
        connection.commit()


def test_what_was_decided_to_expire_is_deleted_after_the_next_start(
    settings: Settings, source: Path
) -> None:
    flow = Flow(settings, source, "sqlite", "replace")
    with open_ledger(settings.database) as ledger:
        flow.publish(ledger, "good", "1.0.0")
        flow.work(ledger, a="x")
        flow.publish(ledger, "bad", "1.0.1")
        flow.redo(ledger)
        assert ledger.write(lambda c: visibility.remove_expired(c, utcnow())) == 1
        flow.work(ledger)
        assert flow.seen() == ["bad x"]
        with closing(sqlite3.connect(settings.home / "out.sqlite3")) as connection:
            assert connection.execute("SELECT count(*) FROM _cf_rows_lines").fetchone() == (1,)
        flow.check(ledger)
