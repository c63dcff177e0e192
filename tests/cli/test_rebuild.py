"""`casparian rebuild`, `topics set --rebuild` and `topics remove`: what a reader of the sinks sees
before, during and after."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from tests.commands import Casparian, Kept, asked, holds
from tests.plugs import plugin

URIS = {"sqlite": "sqlite:///{}.sqlite3", "parquet": "parquet://{}"}
SCHEMES = tuple(URIS)


def saying(word: str, topics: tuple[str, ...] = ("lines",)) -> str:
    """A plugin that writes each line behind a word, and fails where a line is that word."""
    return plugin(
        f'pattern="*.txt", topic={list(topics)}',
        f"""
        lines = [line.strip() for line in open(file_path)]
        if "{word}" in lines:
            raise ValueError("told to")
        for topic in {topics}:
            table = pa.table({{"line": pa.array([f"{word} {{n}}" for n in lines], pa.string())}})
            self.publish(topic, table)
        """,
    )


def seen(casparian: Casparian, name: str = "one", topic: str = "lines") -> list[str]:
    """What stands in a sink, read without us."""
    file = casparian.folder / f"{name}.sqlite3"
    if file.exists():
        with closing(sqlite3.connect(file)) as connection:
            return sorted(row[0] for row in connection.execute(f"SELECT line FROM {topic}"))
    files = sorted(map(str, (casparian.folder / name / topic).glob("[!_]*.parquet")))
    return sorted(ds.dataset(files).to_table(["line"])["line"].to_pylist()) if files else []


class Flow:
    """A plugin, two files and sinks of one kind."""

    def __init__(self, casparian: Casparian, source: Path, scheme: str) -> None:
        self.casparian, self.source, self.scheme = casparian, source, scheme
        self.publish("good", "1.0.0")
        casparian.run("topics", "set", "rows", "lines", self.uri("one"))
        self.work(a="x", b="y")
        self.shows("good x", "good y")

    def uri(self, name: str) -> str:
        return URIS[self.scheme].format(name)

    def publish(self, word: str, version: str, *topics: str) -> None:
        source = saying(word, topics or ("lines",))
        self.casparian.run("publish", self.casparian.plugin("rows", source), "--version", version)

    def work(self, code: int = 0, **contents: str) -> None:
        for name, content in contents.items():
            (self.source / f"{name}.txt").write_text(content)
        self.casparian.run("scan", "--drain", code=code)

    def shows(self, *rows: str, name: str = "one") -> None:
        assert seen(self.casparian, name) == sorted(rows)
        holds(self.casparian)

    def jobs(self) -> dict[int, str]:
        return {row["id"]: row["status"] for row in self.casparian.json("jobs")}


@pytest.fixture(params=SCHEMES)
def flow(request: pytest.FixtureRequest, kept: Kept) -> Flow:
    return kept.begun(request.param, partial(Flow, scheme=request.param))


@pytest.mark.slow_but("sqlite")
def test_a_rebuild_shows_when_every_job_has_ended_well(flow: Flow) -> None:
    casparian = flow.casparian
    flow.publish("y", "1.0.1")  # fails at b.txt
    would = casparian.out("rebuild", "rows", "--dry-run")
    assert "2 jobs would be queued" in would
    assert flow.jobs() == {1: "COMPLETED", 2: "COMPLETED"}
    assert "2 jobs queued" in casparian.out("rebuild", "lines")
    flow.shows("good x", "good y")
    flow.work(code=1)
    flow.shows("good x", "good y")
    assert asked(casparian) == ["good x", "good y"]
    (failed,) = (number for number, status in flow.jobs().items() if status == "FAILED")
    words = "rebuild of lines: 1 of 2 jobs ended well, 1 FAILED"
    for command, code in ((["status", "--check"], 1), (["jobs"], 0), (["rebuild", "rows"], 1)):
        done = casparian.run(*command, code=code)
        said = done.stdout + done.stderr
        assert words in said
        assert f"casparian jobs retry {failed}, or: casparian rebuild lines --cancel" in said
    # The file is mended: what failed stays behind it, and the rest shows.
    flow.work(b="z")
    flow.shows("good x", "good y", "y z")
    casparian.run("jobs", "abort", str(failed), code=1)
    assert "2 jobs" in casparian.out("rebuild", "lines", "--cancel")
    flow.shows("good x", "good y", "y z")
    assert "no rebuild of lines is open" in casparian.err("rebuild", "lines", "--cancel", code=66)
    flow.publish("new", "1.0.2")
    casparian.run("rebuild", "rows")
    flow.work()
    flow.shows("new x", "new y", "new z")
    assert asked(casparian) == ["new x", "new z"]
    actions = [row["action"] for row in casparian.json("audit", "show", "--limit", "99")]
    assert actions.count("rebuild") == 2
    assert actions.count("cancel-rebuild") == actions.count("end-rebuild") == 1


@pytest.mark.slow_but("sqlite")
def test_a_retry_ends_what_a_failure_holds_up(flow: Flow) -> None:
    flow.publish("y", "1.0.1")
    flow.casparian.run("rebuild", "rows")
    flow.work(code=1)
    assert flow.casparian.json("status")["rebuilds"][0]["stopped"] == 1
    # The version's bytes are kept, so only its plugin can be what fails: another try fails too.
    flow.casparian.run("jobs", "retry", "--failed")
    flow.work(code=1)
    flow.shows("good x", "good y")
    flow.casparian.run("rebuild", "rows", "--cancel")
    assert "FAILED" not in flow.jobs().values()
    assert flow.casparian.json("status")["rebuilds"] == []
    flow.shows("good x", "good y")


@pytest.mark.slow_but("sqlite")
def test_a_rebuild_of_the_same_artifact_makes_another_generation(flow: Flow) -> None:
    casparian = flow.casparian
    for _ in range(2):
        before = {row["output_key"] for row in casparian.json("outputs", "list")}
        casparian.run("rebuild", "rows")
        flow.shows("good x", "good y")
        flow.work()
        flow.shows("good x", "good y")
        rows = casparian.json("outputs", "list")
        assert {row["output_key"] for row in rows if row["state"] == "CURRENT"}.isdisjoint(before)
        assert [row["state"] for row in rows if row["output_key"] in before] == ["HIDDEN"] * len(
            before
        )
    assert flow.jobs() == {1: "COMPLETED", 2: "COMPLETED"}
    casparian.run("rebuild", "rows")
    casparian.run("rebuild", "rows", "--cancel")
    assert flow.jobs() == {1: "COMPLETED", 2: "COMPLETED"}
    flow.work()
    flow.shows("good x", "good y")
    casparian.run("rebuild", "rows")
    flow.work()
    flow.shows("good x", "good y")


@pytest.mark.slow_but("sqlite")
def test_a_topic_is_rebuilt_into_another_sink(flow: Flow) -> None:
    casparian = flow.casparian
    said = casparian.run("topics", "set", "rows", "lines", flow.uri("two"), "--rebuild")
    assert "2 jobs queued" in said.stdout
    assert "until the rebuild is complete" in said.stderr
    flow.shows("good x", "good y")
    assert asked(casparian) == ["good x", "good y"]
    # Meanwhile a new file, an edit and a retraction.
    casparian.run("retract", "in/b.txt")
    flow.shows("good x")
    flow.work(a="w", c="z")
    flow.shows()
    flow.shows("good w", "good x", "good z", name="two")
    assert asked(casparian) == ["good w", "good z"]
    casparian.run("retract", "--undo", "in/b.txt")
    flow.shows()
    flow.shows("good w", "good x", "good y", "good z", name="two")
    assert asked(casparian, "lines_history") == ["good w", "good x", "good y", "good z"]


@pytest.mark.slow
def test_versions_whose_bytes_are_gone_keep_their_rows(casparian: Casparian, source: Path) -> None:
    with open(casparian.folder / "global_config.toml", "a") as config:
        config.write("\n[store]\nkeep = false\n")
    flow = Flow(casparian, source, "sqlite")
    flow.work(a="w")
    said = casparian.out("topics", "set", "rows", "lines", flow.uri("two"), "--rebuild")
    assert "2 jobs queued" in said
    assert "1 version left out, whose rows stay:" in said
    assert "a.txt" in said
    (source / "b.txt").unlink()  # its job finds the bytes gone
    flow.work()
    flow.shows("good x", "good y")
    flow.shows("good w", name="two")
    assert asked(casparian, "lines_history") == ["good w", "good x", "good y"]
    assert set(flow.jobs().values()) == {"COMPLETED"}
    assert casparian.json("status")["rebuilds"] == []


def test_what_cannot_be_rebuilt_is_refused_in_words(casparian: Casparian, source: Path) -> None:
    assert "no plugin and no topic" in casparian.err("rebuild", "nothing", code=66)
    casparian.run("publish", casparian.plugin("rows", saying("good")), "--version", "1.0.0")
    assert "has no rows" in casparian.err("rebuild", "lines", code=66)
    casparian.run("plugins", "disable", "rows", "--reason", "a test")
    assert "no version of rows is active" in casparian.err("rebuild", "rows", code=1)


@pytest.mark.slow_but("sqlite")
def test_a_topic_that_is_declared_no_longer_is_removed(flow: Flow) -> None:
    casparian = flow.casparian
    flow.publish("more", "1.0.1", "lines", "marks")
    casparian.run("topics", "set", "rows", "marks", flow.uri("one"))
    flow.work(c="z")
    assert seen(casparian, topic="marks") == ["more z"]
    refused = casparian.err("topics", "remove", "rows", "marks", "--yes", code=78)
    assert "rows 1.0.1 declares the topic 'marks'" in refused
    flow.publish("less", "1.0.2")
    assert "no longer declares the topic marks; 1 row stays" in casparian.err("status")
    assert "take 1 row" in casparian.err("topics", "remove", "rows", "marks", code=1)
    assert seen(casparian, topic="marks") == ["more z"]
    said = casparian.out("topics", "remove", "rows", "marks", "--yes")
    assert "1 output (1 row) is hidden now" in said
    assert seen(casparian, topic="marks") == []
    flow.shows("good x", "good y", "more z")
    assert "no longer declares" not in casparian.err("status")
    assert [row["topic"] for row in casparian.json("topics")] == ["lines"]
    assert "no topic 'marks'" in casparian.err("topics", "remove", "rows", "marks", code=66)


KILLS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sqlite": (
        ("rebuild.written", "rebuild.started"),
        ("committer.decided", "committer.published", "rebuild.ended",
         "committer.completion_written", "committer.completed", "telling.told",
         "telling.recorded"),
        ("rebuild.cancel_written", "rebuild.cancelled"),
    ),
    "parquet": ((), ("rebuild.ended", "telling.told"), ()),
}  # fmt: skip
"""While it begins, ends and is cancelled: each step with one kind of sink, and with the other those
where only the ledger, or only one of two sinks, knows of the end."""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_kill_at_any_step_is_as_if_it_had_not_been(
    casparian: Casparian, source: Path, scheme: str, tmp_path: Path
) -> None:
    """The sink is left, so both the old and the new one are told at the end."""
    flow = Flow(casparian, source, scheme)
    beginning, end, cancelling = KILLS[scheme]
    flow.publish("new", "1.0.1")
    casparian.run("topics", "set", "rows", "lines", flow.uri("two"))
    kept = tmp_path / "kept"

    def each(points: tuple[str, ...], *command: str) -> None:
        shutil.copytree(tmp_path / "flow", kept)
        for point in points:
            assert casparian.killed(point, *command), point
            print("killed at", point)
            rows = seen(casparian), seen(casparian, "two")
            assert rows in ((["good x", "good y"], []), ([], ["new x", "new y"]),
                            (["good x", "good y"], ["new x", "new y"])), point  # fmt: skip
            after[command[0]]()
            shutil.rmtree(tmp_path / "flow")
            shutil.copytree(kept, tmp_path / "flow", symlinks=True)
        shutil.rmtree(kept)

    def ends() -> None:
        flow.work()
        flow.shows()
        flow.shows("new x", "new y", name="two")

    def starts() -> None:
        if not casparian.json("status")["rebuilds"]:
            casparian.run("rebuild", "rows")
        ends()

    after: dict[str, Callable[[], None]] = {"rebuild": starts, "scan": ends}
    each(beginning, "rebuild", "rows")
    casparian.run("rebuild", "rows")
    each(end, "scan", "--drain")
    if not cancelling:
        return

    def stays() -> None:
        if casparian.json("status")["rebuilds"]:
            casparian.run("rebuild", "rows", "--cancel")
        flow.work(code=0)
        flow.shows("good x", "good y")
        flow.shows(name="two")

    # One job is done, the other fails.
    flow.publish("y", "1.0.2")
    casparian.run("rebuild", "rows", "--cancel")
    casparian.run("rebuild", "rows")
    flow.work(code=1)
    after["rebuild"] = stays
    each(cancelling, "rebuild", "rows", "--cancel")


NUMBERS = plugin(
    'pattern="*.txt", topic="lines"',
    """
        table = pa.table({"line": pa.array([int(n) for n in open(file_path)], pa.int64())})
        self.publish("lines", table)
    """,
)


WORDS = NUMBERS.replace("int(n)", 'f"no {int(n)}"').replace("int64", "string")
"""Of Parquet: the one column of a topic cannot be of numbers and of words."""


def test_a_rebuild_whose_rows_have_other_types_than_those_that_stay_is_refused_at_once(
    casparian: Casparian, source: Path
) -> None:
    with open(casparian.folder / "global_config.toml", "a") as config:
        config.write("\n[store]\nkeep = false\n")
    casparian.run("publish", casparian.plugin("rows", NUMBERS), "--version", "1.0.0")
    casparian.run("topics", "set", "rows", "lines", "parquet://one")
    for content in ("1", "2"):
        (source / "a.txt").write_text(content)
        (source / "b.txt").write_text("3")
        casparian.run("scan", "--drain")
    casparian.run("publish", casparian.plugin("rows", WORDS), "--version", "1.0.1")
    for words in (("rebuild", "rows", "--dry-run"), ("rebuild", "rows")):
        done = casparian.run(*words)
        assert "1 version left out" in done.stdout
        assert "a job that gives it columns of other types fails" in done.stderr
    done = casparian.run("scan", "--drain", code=1)
    assert "rows that it leaves out stay there" in done.stdout + done.stderr
    assert list(map(str, seen(casparian))) == ["1", "2", "3"]
    assert asked(casparian, "lines_history") == [1, 2, 3]
    (rebuild,) = casparian.json("status")["rebuilds"]
    assert (rebuild["is_open"], rebuild["stopped"], rebuild["problem"]) == (1, 2, "")
    holds(casparian)
    (first,) = (v for v in casparian.json("versions", "in/a.txt") if v["version"] == 1)
    casparian.run("retract", str(first["version_id"]))
    casparian.run("jobs", "retry", "--failed")
    casparian.run("scan", "--drain")
    assert seen(casparian) == ["no 2", "no 3"]
    holds(casparian)


def test_two_plugins_mend_the_type_of_their_topic_together(
    casparian: Casparian, source: Path
) -> None:
    for version, code in (("1.0.0", NUMBERS), ("1.0.1", WORDS)):
        for name, number in (("rows", "1"), ("more", "2")):
            own = code.replace("*.txt", f"{name}*.txt")
            casparian.run("publish", casparian.plugin(name, own), "--version", version)
            casparian.run("topics", "set", name, "lines", "parquet://one")
            (source / f"{name}.txt").write_text(number)
        if version == "1.0.0":
            casparian.run("scan", "--drain")
    casparian.run("rebuild", "lines")
    casparian.run("scan", "--drain")
    assert seen(casparian) == ["no 1", "no 2"]
    holds(casparian)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_an_edit_with_the_mended_type_comes_in_when_the_rebuild_is_complete(
    casparian: Casparian, source: Path, when: str
) -> None:
    casparian.run("publish", casparian.plugin("rows", NUMBERS), "--version", "1.0.0")
    casparian.run("topics", "set", "rows", "lines", "parquet://one", "--mode", "replace")
    (source / "a.txt").write_text("1")
    (source / "b.txt").write_text("2")
    casparian.run("scan", "--drain")
    casparian.run("publish", casparian.plugin("rows", WORDS), "--version", "1.0.1")
    if when == "before":
        (source / "b.txt").write_text("3")
        casparian.run("scan", "--drain", code=1)
        assert list(map(str, seen(casparian))) == ["1", "2"]
    casparian.run("rebuild", "rows")
    (source / "b.txt").write_text("3")
    casparian.run("scan", "--drain")
    assert seen(casparian) == ["no 1", "no 3"]
    assert casparian.json("status")["jobs"] == {"COMPLETED": 5}
    holds(casparian)


@pytest.mark.slow
def test_a_sink_that_cannot_show_it_goes_on_showing_the_old_rows(
    casparian: Casparian, source: Path
) -> None:
    """A version whose bytes are found gone by its job keeps its rows, and their type."""
    with open(casparian.folder / "global_config.toml", "a") as config:
        config.write("\n[store]\nkeep = false\n")
    casparian.run("publish", casparian.plugin("rows", NUMBERS), "--version", "1.0.0")
    casparian.run("topics", "set", "rows", "lines", "parquet://one")
    (source / "a.txt").write_text("1")
    (source / "b.txt").write_text("2")
    casparian.run("scan", "--drain")
    casparian.run("publish", casparian.plugin("rows", WORDS), "--version", "1.0.1")
    casparian.run("rebuild", "rows")
    (source / "a.txt").unlink()
    for code in (1, 0):  # the next start tries it again, and has no failure of its own
        casparian.run("scan", "--drain", code=code)
        assert list(map(str, seen(casparian))) == ["1", "2"]
        (rebuild,) = casparian.json("status")["rebuilds"]
        assert not rebuild["is_open"]
        assert rebuild["problem"]
        done = casparian.run("status", "--check", code=1)
        said = done.stdout + done.stderr
        assert "rebuild of rows is complete, and its rows do not show:" in said
    (first,) = casparian.json("versions", "in/a.txt")
    casparian.run("retract", str(first["version_id"]))
    assert seen(casparian) == ["no 2"]
    assert casparian.json("status")["rebuilds"] == []
    holds(casparian)
