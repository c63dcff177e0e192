"""The situations of an ordinary year, each told once: events, and the rows that must show.

`Story` tells one to a model alone (`test_model`), or to a model and the product side by side
(`test_situations`). Rows are spelled `path ordinal artifact line`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from tests.truth.model import Artifact, Model, Row

GOOD = Artifact("good")
BAD = Artifact("bad")
TWO = Artifact("two", ("lines", "marked"))
"""Has a second topic."""
FRAIL = Artifact("frail", fails="boom")
TWO_FRAIL = Artifact("two-frail", ("lines", "marked"), fails="boom")
OF_LOGS = Artifact("of-logs", suffix=".log")


class World(Protocol):
    """What shows rows: the model, or the product in its harness."""

    def look(self) -> None: ...
    def rows(self, topic: str, sink: str, kind: str = "topic") -> list[Row] | None: ...
    def query(self, topic: str, kind: str = "current") -> list[Row]: ...


class Story:
    """Tells events to a model, and to the product if there is one, and compares what shows.

    Args:
        mode: that topics are in from the beginning.
    """

    def __init__(self, model: Model, product: Any = None, mode: str = "append") -> None:
        self.model = model
        self.mode = mode
        self.told: list[str] = []
        self._product = product

    def __getattr__(self, event: str) -> Callable[..., Any]:
        def tell(*args: Any, **options: Any) -> Any:
            self.told.append(f"{event}({', '.join(map(repr, [*args, *options.items()]))})")
            done = getattr(self.model, event)(*args, **options)
            if self._product is not None:
                also = getattr(self._product, event)(*args, **options)
                if event in _COUNTED:
                    assert also == done, f"{self.told[-1]} queued {also} jobs, not {done}"
                self.compare()
            return done

        return tell

    def begin(self, plugin: str, artifact: Artifact) -> None:
        """Publish a plugin whose topics are in the story's mode."""
        self.publish(plugin, "1.0.0", artifact)
        for topic in artifact.topics:
            self.set_topic(plugin, topic, {"S1": self.mode})

    def returns(self, sink: str) -> None:
        """A sink comes back, and gets at once what was decided for it."""
        for world in filter(None, (self.model, self._product)):
            world.come_back(sink)
        self.work()

    def settle(self) -> None:
        """Everything that changed is found, and worked."""
        self.scan()
        self.work()

    def shows(
        self, *rows: str, past: Sequence[str] = (), topic: str = "lines", sink: str = "S1"
    ) -> None:
        """What readers of a topic in a sink see.

        Args:
            rows: of the present versions.
            past: of earlier versions, which the mode `replace` does not show.
        """
        every = sorted([*rows, *past])
        wanted = {
            "topic": sorted(rows) if self.mode == "replace" else every,
            "current": sorted(rows),
            "history": every,
        }
        for kind, expected in wanted.items():
            assert spelled(self.model.rows(topic, sink, kind)) == expected, (kind, self.told)

    def answers(self, *rows: str, past: Sequence[str] = (), topic: str = "lines") -> None:
        """What `casparian query` gives of `topic`, and with `past` of its history."""
        assert spelled(self.model.query(topic)) == sorted(rows), self.told
        assert spelled(self.model.query(topic, "history")) == sorted([*rows, *past]), self.told

    def compare(self) -> None:
        """Model and product show the same rows, in every topic, sink and view."""
        if self._product is not None and (found := differences(self.model, self._product)):
            raise AssertionError("\n".join([*self.told, *found, *self._product.told()]))


_COUNTED = {"activate", "redo"}


def differences(model: Model, product: World) -> list[str]:
    """Where model and product differ: a sentence, and the rows of both."""
    product.look()
    return [
        f"{name}:\n  right {spelled(right)}\n  shown {spelled(shown)}"
        for name, right, shown in _views(model, product)
        if right != shown
    ]


def _views(model: Model, product: World) -> Iterable[tuple[str, list[Row], list[Row]]]:
    topics = {topic for _, topic in model.ledger.sinks} | {o.topic for o in model.ledger.outputs}
    sinks = {sink for targets in model.ledger.sinks.values() for sink in targets}
    sinks |= {output.sink for output in model.ledger.outputs}
    for topic in sorted(topics):
        for sink in sorted(sinks):
            for kind in ("topic", "current", "history"):
                shown = product.rows(topic, sink, kind)
                if shown is not None:
                    yield f"{kind} of {topic} in {sink}", model.rows(topic, sink, kind), shown
        for kind in ("current", "history"):
            name = f"casparian query, {kind} of {topic}"
            yield name, model.query(topic, kind), product.query(topic, kind)


def spelled(rows: Iterable[Row]) -> list[str]:
    return sorted(" ".join(map(str, row)) for row in rows)


# The situations. Each is a function that takes a Story; its number is in its name.


def s01_the_good_bytes_again_after_a_bad_version(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one two")
    s.settle()
    s.shows("a.txt 1 good one", "a.txt 1 good two")
    s.publish("p", "1.0.1", BAD)
    assert s.redo("p") == 1
    s.work()
    s.shows("a.txt 1 bad one", "a.txt 1 bad two")
    s.publish("p", "1.0.2", GOOD)
    s.shows("a.txt 1 good one", "a.txt 1 good two")
    assert s.redo("p") == 0
    s.work()
    s.shows("a.txt 1 good one", "a.txt 1 good two")


def s02_an_earlier_version_is_activated_again(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.publish("p", "1.0.1", BAD)
    s.redo("p")
    s.write("b.txt", "two")
    s.settle()
    s.shows("a.txt 1 bad one", "b.txt 1 bad two")
    assert s.activate("p", "1.0.0") == 1
    s.shows("a.txt 1 good one", "b.txt 1 bad two")
    s.work()
    s.shows("a.txt 1 good one", "b.txt 1 good two")


def s03_the_same_bytes_under_a_new_version(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.publish("p", "1.0.1", GOOD)
    assert s.redo("p") == 0
    s.write("b.txt", "two")
    s.settle()
    s.shows("a.txt 1 good one", "b.txt 1 good two")


def s04_a_sink_is_moved_then_a_new_version_works_everything(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.set_topic("p", "lines", {"S2": s.mode})
    s.publish("p", "1.0.1", BAD)
    s.redo("p")
    s.work()
    s.answers("a.txt 1 bad one")
    s.shows("a.txt 1 good one", sink="S1")
    s.shows("a.txt 1 bad one", sink="S2")


def s05_a_sink_is_moved_and_nothing_else(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.set_topic("p", "lines", {"S2": s.mode})
    s.write("a.txt", "two")
    s.settle()
    s.shows("a.txt 1 good one", sink="S1")
    s.shows("a.txt 2 good two", sink="S2")
    s.answers("a.txt 2 good two", past=["a.txt 1 good one"])


def s05_a_rebuild_takes_the_rows_to_the_new_sink(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.set_topic("p", "lines", {"S2": s.mode})
    s.rebuild("p")
    s.shows("a.txt 1 good one", sink="S1")
    s.work()
    s.shows(sink="S1")
    s.shows("a.txt 1 good one", sink="S2")
    s.answers("a.txt 1 good one")


def s06_a_rebuild_shows_when_every_job_has_ended_well(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.write("b.txt", "boom")
    s.settle()
    s.publish("p", "1.0.1", FRAIL)
    s.rebuild("p")
    s.work()
    s.shows("a.txt 1 good one", "b.txt 1 good boom")
    s.publish("p", "1.0.2", BAD)
    s.rebuild("p")
    s.shows("a.txt 1 good one", "b.txt 1 good boom")
    s.work()
    s.shows("a.txt 1 bad one", "b.txt 1 bad boom")


def s06_edits_and_retractions_count_during_a_rebuild(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.write("b.txt", "two")
    s.settle()
    s.publish("p", "1.0.1", BAD)
    s.rebuild("p")
    s.retract("b.txt")
    s.write("a.txt", "three")
    s.scan()
    s.shows("a.txt 1 good one")
    s.work()
    s.shows("a.txt 2 bad three", past=["a.txt 1 bad one"])


def s07_a_mended_type_is_a_rebuild(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.publish("p", "1.0.1", BAD._replace(name="mended"))
    s.rebuild("p")
    s.work()
    s.shows("a.txt 1 mended one")


def s08_a_renamed_folder_takes_its_rows_along(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("old/a.txt", "same")
    s.write("old/b.txt", "same")
    s.settle()
    s.move("old/a.txt", "new/a.txt")
    s.move("old/b.txt", "new/b.txt")
    s.scan()
    s.shows("old/a.txt 1 good same", "old/b.txt 1 good same")
    s.work()
    s.shows("new/a.txt 1 good same", "new/b.txt 1 good same")
    s.move("new/a.txt", "old/a.txt")
    s.settle()
    s.shows("old/a.txt 1 good same", "new/b.txt 1 good same")


def s08_a_retraction_goes_with_the_file(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.retract("a.txt")
    s.move("a.txt", "archive/a.txt")
    s.settle()
    s.shows()


def s09_copied_then_the_original_is_deleted(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.copy("a.txt", "b.txt")
    s.settle()
    s.shows("a.txt 1 good one", "b.txt 1 good one")
    s.delete("a.txt")
    s.settle()
    s.shows("b.txt 1 good one")


def s10_an_equal_file_comes_as_another_goes(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.delete("a.txt")
    s.write("b.txt", "one")
    s.settle()
    s.shows("a.txt 1 good one", "b.txt 1 good one")


def s11_a_log_is_rotated(s: Story) -> None:
    s.begin("p", GOOD._replace(suffix=""))
    s.write("x.log", "one")
    s.settle()
    s.move("x.log", "x.log.1")
    s.write("x.log", "two")
    s.settle()
    s.shows("x.log 2 good two", "x.log.1 1 good one", past=["x.log 1 good one"])
    s.answers("x.log 2 good two", "x.log.1 1 good one", past=["x.log 1 good one"])


def s12_a_rotated_log_is_compressed(s: Story) -> None:
    """A compressed copy is another content: nobody wants it here, and the rows stay."""
    s.begin("p", OF_LOGS._replace(suffix=".1"))
    s.write("x.log.1", "one")
    s.settle()
    s.delete("x.log.1")
    s.write("x.log.2.gz", "(packed)")
    s.settle()
    s.shows("x.log.1 1 of-logs one")


def s13_a_deleted_file_keeps_its_rows(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.delete("a.txt")
    s.settle()
    s.shows("a.txt 1 good one")


def s14_a_deleted_file_takes_its_rows_along_if_told_to(s: Story) -> None:
    s.begin("p", GOOD)
    s.set_on_delete("retract")
    s.write("a.txt", "one")
    s.settle()
    s.write("a.txt", "two")
    s.settle()
    s.delete("a.txt")
    s.settle()
    s.shows()
    s.set_on_delete("keep")
    s.shows("a.txt 2 good two", past=["a.txt 1 good one"])


def s15_a_file_comes_back(s: Story) -> None:
    s.begin("p", GOOD)
    s.set_on_delete("retract")
    s.write("a.txt", "one")
    s.settle()
    s.delete("a.txt")
    s.settle()
    s.shows()
    s.write("a.txt", "one")
    s.scan()
    s.shows("a.txt 1 good one")
    s.work()
    s.shows("a.txt 1 good one")


def s16_a_file_is_edited_before_its_job_runs(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.scan()
    s.write("a.txt", "two")
    s.work()
    s.shows("a.txt 1 good one")
    s.settle()
    s.shows("a.txt 2 good two", past=["a.txt 1 good one"])


def s17_a_version_without_rows_takes_its_place(s: Story) -> None:
    s.begin("p", TWO)
    s.write("a.txt", "one !two")
    s.settle()
    s.write("a.txt", "!three")
    s.settle()
    s.shows(past=["a.txt 1 two one"])
    s.shows("a.txt 2 two !three", topic="marked", past=["a.txt 1 two !two"])
    s.answers(past=["a.txt 1 two one"])


def s18_a_failed_version_leaves_the_old_rows(s: Story) -> None:
    s.begin("p", FRAIL)
    s.write("a.txt", "one")
    s.settle()
    s.write("a.txt", "boom")
    s.settle()
    s.shows("a.txt 1 frail one")
    assert s.model.stale() == {("a.txt", "p")}
    s.publish("p", "1.0.1", GOOD)
    s.redo("p")
    s.work()
    s.shows("a.txt 2 good boom", past=["a.txt 1 good one"])


def s19_a_rename_changes_who_wants_the_file(s: Story) -> None:
    s.begin("p", GOOD)
    s.begin("q", OF_LOGS)
    s.write("a.txt", "one")
    s.settle()
    s.move("a.txt", "a.log")
    s.scan()
    s.shows("a.txt 1 good one")
    s.work()
    s.shows("a.log 1 of-logs one")


def s20_one_of_two_sinks_refuses(s: Story) -> None:
    s.begin("p", TWO)
    s.set_topic("p", "marked", {"S2": s.mode})
    s.refuse("marked", "S2")
    s.write("a.txt", "one !two")
    s.settle()
    s.shows()
    s.shows(topic="marked", sink="S2")
    s.accept("marked", "S2")
    s.retry()
    s.work()
    s.shows("a.txt 1 two one")
    s.shows("a.txt 1 two !two", topic="marked", sink="S2")


def s20_one_of_two_sinks_is_away(s: Story) -> None:
    s.begin("p", TWO)
    s.set_topic("p", "marked", {"S2": s.mode})
    s.write("a.txt", "one !two")
    s.settle()
    s.go_away("S2")
    s.write("a.txt", "three !four")
    s.settle()
    s.shows("a.txt 1 two one")
    s.retract("a.txt", 1)
    s.shows()
    s.shows("a.txt 1 two !two", topic="marked", sink="S2")
    s.returns("S2")
    s.shows("a.txt 2 two three")
    s.shows("a.txt 2 two !four", topic="marked", sink="S2")


def s21_a_topic_is_declared_no_longer(s: Story) -> None:
    s.begin("p", TWO)
    s.write("a.txt", "one !two")
    s.settle()
    s.publish("p", "1.0.1", GOOD)
    s.redo("p")
    s.work()
    s.write("a.txt", "three !four")
    s.settle()
    s.shows("a.txt 2 good three", past=["a.txt 1 good one"])
    s.shows("a.txt 1 two !two", topic="marked")


def s21_a_topic_is_removed(s: Story) -> None:
    s.begin("p", TWO)
    s.write("a.txt", "one !two")
    s.settle()
    s.publish("p", "1.0.1", GOOD)
    s.remove_topic("p", "marked")
    s.shows("a.txt 1 two one")
    s.shows(topic="marked")


def s22_a_failure_closes(s: Story) -> None:
    s.begin("p", FRAIL)
    for path in ("mended.txt", "other.txt", "gone.txt"):
        s.write(path, "boom")
    s.settle()
    assert {state for *_, state in s.model.failures()} == {"open"}
    s.write("mended.txt", "one")
    s.delete("gone.txt")
    s.settle()
    states = {path: state for path, *_, state in s.model.failures()}
    assert states == {"mended.txt": "mended", "other.txt": "open", "gone.txt": "gone unread"}
    s.publish("p", "1.0.1", GOOD)
    s.redo("p")
    s.work()
    assert ("other.txt", 1, "p", "mended") in s.model.failures()
    s.shows(
        "mended.txt 2 good one", "other.txt 1 good boom", "gone.txt 1 good boom",
        past=["mended.txt 1 good boom"],
    )  # fmt: skip


def s23_a_ledger_is_restored_from_a_backup(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.write("c.txt", "five")
    s.settle()
    s.backup()
    s.write("a.txt", "two")
    s.write("b.txt", "three")
    s.settle()
    s.publish("p", "1.0.1", BAD)
    s.write("b.txt", "four")
    s.settle()
    s.retract("c.txt")
    s.shows("a.txt 2 good two", "b.txt 2 bad four", past=["a.txt 1 good one", "b.txt 1 good three"])
    s.restore()
    s.shows("a.txt 2 good two", "b.txt 2 bad four", past=["a.txt 1 good one", "b.txt 1 good three"])
    s.settle()
    s.shows("a.txt 2 good two", "b.txt 2 bad four", past=["a.txt 1 good one", "b.txt 1 good three"])
    s.write("a.txt", "six")
    s.settle()
    s.shows(
        "a.txt 3 good six", "b.txt 2 bad four",
        past=["a.txt 1 good one", "a.txt 2 good two", "b.txt 1 good three"],
    )  # fmt: skip


def s24_killed_and_started_again(s: Story) -> None:
    s.begin("p", TWO)
    s.write("a.txt", "one !two")
    s.scan()
    s.kill()
    s.work()
    s.kill()
    s.write("a.txt", "three")
    s.settle()
    s.retract("a.txt", 1)
    s.kill()
    s.shows("a.txt 2 two three")
    s.reinstate("a.txt", 1)
    s.shows("a.txt 2 two three", past=["a.txt 1 two one"])


# Moves between their situations.


def u01_a_file_that_moved_is_not_deleted(s: Story) -> None:
    s.begin("p", GOOD)
    s.set_on_delete("retract")
    for content in ("one", "two"):
        s.write("a.txt", content)
        s.settle()
    s.move("a.txt", "b.txt")
    s.scan()
    s.shows("a.txt 2 good two", past=["a.txt 1 good one"])
    s.work()
    s.shows("b.txt 1 good two", past=["a.txt 1 good one"])
    s.delete("b.txt")
    s.settle()
    s.shows()


def u02_another_file_comes_to_the_place_of_one_that_moved(s: Story) -> None:
    """As `x.log` -> `x.log.1` with a scan before the new `x.log`: each line once, in all modes."""
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.move("a.txt", "a1.txt")
    s.settle()
    s.write("a.txt", "two")
    s.scan()
    s.shows("a1.txt 1 good one")
    s.work()
    s.shows("a.txt 2 good two", "a1.txt 1 good one")


def u03_a_file_moves_on_before_it_is_worked(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.move("a.txt", "b.txt")
    s.scan()
    s.move("b.txt", "c.txt")
    s.scan()
    s.shows("a.txt 1 good one")
    s.work()
    s.shows("c.txt 1 good one")


def u04_a_moved_file_changes_before_it_is_worked(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.move("a.txt", "b.txt")
    s.scan()
    s.write("b.txt", "two")
    s.scan()
    s.shows("a.txt 1 good one")
    s.work()
    s.shows("b.txt 2 good two", past=["b.txt 1 good one"])


def u05_a_retraction_and_its_undo_are_of_the_file(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.move("a.txt", "b.txt")
    s.scan()
    s.retract("a.txt")
    s.shows()
    s.work()
    s.shows()
    s.reinstate("b.txt")
    s.shows("b.txt 1 good one")
    s.move("b.txt", "a.txt")
    s.settle()
    s.shows("a.txt 1 good one")
    s.retract("a.txt")
    s.move("a.txt", "b.txt")
    s.settle()
    s.shows()


def u06_what_failed_at_its_new_place_shows_at_the_old_one(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "boom")
    s.settle()
    s.publish("p", "1.0.1", FRAIL)
    s.move("a.txt", "b.txt")
    s.settle()
    s.shows("a.txt 1 good boom")
    s.publish("p", "1.0.2", BAD)
    s.redo("p")
    s.work()
    s.shows("b.txt 1 bad boom")
    s.activate("p", "1.0.0")
    s.work()
    s.shows("b.txt 1 good boom")


def u07_a_moved_file_is_rebuilt(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.move("a.txt", "b.txt")
    s.settle()
    s.publish("p", "1.0.1", BAD)
    s.rebuild("p")
    s.shows("b.txt 1 good one")
    s.work()
    s.shows("b.txt 1 bad one")
    s.expire()
    s.shows("b.txt 1 bad one")
    s.move("b.txt", "a.txt")
    s.scan()
    s.shows("a.txt 1 bad one")


def u08_a_moved_file_that_nobody_wants_keeps_its_rows(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.move("a.txt", "a.dat")
    s.settle()
    s.shows("a.txt 1 good one")


def u09_a_file_comes_back_to_where_it_was(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.move("a.txt", "b.txt")
    s.settle()
    s.copy("b.txt", "a.txt")
    s.scan()
    s.shows("a.txt 1 good one", "b.txt 1 good one")
    s.delete("b.txt")
    s.settle()
    s.shows("a.txt 1 good one")


def u10_the_topic_has_another_sink_since(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.set_topic("p", "lines", {"S2": s.mode})
    s.move("a.txt", "b.txt")
    s.scan()
    s.shows("a.txt 1 good one", sink="S1")
    s.work()
    s.shows(sink="S1")
    s.shows("b.txt 1 good one", sink="S2")
    s.answers("b.txt 1 good one")


def u11_a_file_moves_over_another(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.write("b.txt", "two")
    s.settle()
    s.move("a.txt", "b.txt")
    s.scan()
    s.shows("a.txt 1 good one", "b.txt 1 good two")
    s.work()
    s.shows("b.txt 2 good one", past=["b.txt 1 good two"])


# What the page says between its situations.


def t01_a_retraction_keeps_its_place(s: Story) -> None:
    s.begin("p", GOOD)
    for content in ("one", "two"):
        s.write("a.txt", content)
        s.settle()
    s.retract("a.txt", 2)
    s.shows(past=["a.txt 1 good one"])
    s.publish("p", "1.0.1", BAD)
    s.redo("p")
    s.work()
    s.shows(past=["a.txt 1 bad one"])
    s.write("a.txt", "three")
    s.settle()
    s.shows("a.txt 3 bad three", past=["a.txt 1 bad one"])
    s.reinstate("a.txt", 2)
    s.shows("a.txt 3 bad three", past=["a.txt 1 bad one", "a.txt 2 good two"])


def t02_a_mode_is_of_what_is_shown(s: Story) -> None:
    s.begin("p", GOOD)
    for content in ("one", "two", "one"):
        s.write("a.txt", content)
        s.settle()
    s.shows("a.txt 3 good one", past=["a.txt 1 good one", "a.txt 2 good two"])
    for s.mode in ("replace", "append", "replace"):
        s.set_topic("p", "lines", {"S1": s.mode})
        s.shows("a.txt 3 good one", past=["a.txt 1 good one", "a.txt 2 good two"])
    s.set_topic("p", "lines", {"S2": "append"})
    s.shows("a.txt 3 good one", past=["a.txt 1 good one", "a.txt 2 good two"])


def t03_what_was_deployed_last_stands_where_the_active_has_none(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "boom")
    s.settle()
    s.publish("p", "1.0.1", BAD)
    s.redo("p")
    s.work()
    s.publish("p", "1.0.2", FRAIL)
    s.redo("p")
    s.work()
    s.shows("a.txt 1 bad boom")
    s.activate("p", "1.0.0")
    s.shows("a.txt 1 good boom")


def t04_rows_that_do_not_stand_are_not_kept_for_ever(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.publish("p", "1.0.1", BAD)
    s.redo("p")
    s.work()
    s.expire()
    assert s.activate("p", "1.0.0") == 1
    s.shows("a.txt 1 bad one")
    s.work()
    s.shows("a.txt 1 good one")


def t05_two_sinks_of_one_topic(s: Story) -> None:
    s.begin("p", GOOD)
    s.set_topic("p", "lines", {"S1": s.mode, "S2": s.mode})
    s.write("a.txt", "one")
    s.settle()
    s.shows("a.txt 1 good one", sink="S1")
    s.shows("a.txt 1 good one", sink="S2")
    s.answers("a.txt 1 good one")


def t06_two_plugins_share_a_topic(s: Story) -> None:
    s.begin("p", GOOD)
    s.begin("q", BAD)
    s.write("a.txt", "one")
    s.settle()
    s.shows("a.txt 1 good one", "a.txt 1 bad one")
    s.publish("q", "1.0.1", BAD._replace(name="other"))
    s.redo("q")
    s.work()
    s.shows("a.txt 1 good one", "a.txt 1 other one")


def t07_an_undo_after_the_backup_is_lost_with_the_ledger(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.retract("a.txt")
    s.backup()
    s.reinstate("a.txt")
    s.shows("a.txt 1 good one")
    s.restore()
    s.shows()


def t08_a_stub_is_published_again(s: Story) -> None:
    s.begin("p", GOOD)
    s.backup()
    s.publish("p", "1.0.1", BAD)
    s.write("a.txt", "one")
    s.settle()
    s.restore()
    s.settle()
    s.shows("a.txt 1 bad one")
    s.redo("p")
    s.work()
    s.shows("a.txt 1 good one")
    s.publish("p", "1.0.1", BAD)
    s.shows("a.txt 1 bad one")


def t09_going_back_takes_back_what_failed(s: Story) -> None:
    s.begin("p", GOOD)
    s.publish("p", "1.0.1", FRAIL)
    s.write("a.txt", "boom")
    s.settle()
    s.shows()
    assert s.activate("p", "1.0.0") == 1
    s.work()
    s.shows("a.txt 1 good boom")


def t10_removed_rows_come_again_with_the_same_bytes(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.publish("p", "1.0.1", BAD)
    s.redo("p")
    s.work()
    s.expire()
    s.publish("p", "1.0.2", GOOD)
    s.shows("a.txt 1 bad one")
    assert s.redo("p") == 0
    s.work()
    s.shows("a.txt 1 good one")


def t11_going_forward_takes_the_rest_along(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.write("b.txt", "two")
    s.settle()
    s.publish("p", "1.0.1", BAD)
    s.redo("p")
    s.work()
    assert s.activate("p", "1.0.0") == 0
    s.write("b.txt", "three")
    s.settle()
    s.shows("a.txt 1 good one", "b.txt 2 good three", past=["b.txt 1 good two"])
    assert s.activate("p", "1.0.1") == 1
    s.shows("a.txt 1 bad one", "b.txt 2 good three", past=["b.txt 1 bad two"])
    s.work()
    s.shows("a.txt 1 bad one", "b.txt 2 bad three", past=["b.txt 1 bad two"])


def t12_a_version_that_never_ran_is_activated(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.publish("p", "1.0.1", BAD)
    s.activate("p", "1.0.0")
    assert s.activate("p", "1.0.1") == 1
    s.shows("a.txt 1 good one")
    s.work()
    s.shows("a.txt 1 bad one")


def t13_a_removed_topic_is_declared_again(s: Story) -> None:
    s.begin("p", TWO)
    s.write("a.txt", "one !two")
    s.write("b.txt", "!three")
    s.settle()
    s.publish("p", "1.0.1", GOOD)
    s.remove_topic("p", "marked")
    s.write("a.txt", "!four")
    s.settle()
    s.shows(topic="marked")
    assert s.activate("p", "1.0.0") == 1
    s.set_topic("p", "marked", {"S1": s.mode})
    s.shows("a.txt 1 two !two", "b.txt 1 two !three", topic="marked")
    s.work()
    s.shows("a.txt 2 two !four", "b.txt 1 two !three", topic="marked", past=["a.txt 1 two !two"])


def t14_a_removed_topic_whose_rows_are_no_longer_there_is_worked_again(s: Story) -> None:
    s.begin("p", TWO)
    s.write("a.txt", "one !two")
    s.settle()
    s.publish("p", "1.0.1", GOOD)
    s.remove_topic("p", "marked")
    s.expire()
    assert s.activate("p", "1.0.0") == 1
    s.work()
    s.shows("a.txt 1 two !two", topic="marked")


def t15_a_restored_ledger_learns_what_its_sinks_have_deleted(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.backup()
    s.publish("p", "1.0.1", BAD)
    s.redo("p")
    s.work()
    s.expire()
    s.restore()
    s.shows("a.txt 1 bad one")
    s.settle()
    s.shows("a.txt 1 bad one")
    assert s.activate("p", "1.0.0") == 1
    s.work()
    s.shows("a.txt 1 good one")


def t16_a_failure_that_is_mended_stays_so_during_a_rebuild(s: Story) -> None:
    s.begin("p", TWO)
    s.refuse("marked", "S1")
    s.write("a.txt", "one !two")
    s.settle()
    s.accept("marked", "S1")
    s.publish("p", "1.0.1", GOOD)
    assert s.redo("p") == 1
    s.work()
    s.rebuild("p")
    s.retry()
    s.work()
    s.shows("a.txt 1 good one")
    s.shows(topic="marked")


def t17_what_a_restored_ledger_adopts_is_rebuilt_by_the_same_bytes(s: Story) -> None:
    s.begin("p", GOOD)
    s.backup()
    s.write("a.txt", "one")
    s.publish("p", "1.0.1", GOOD)
    s.settle()
    s.restore()
    s.rebuild("p")
    s.work()
    s.shows("a.txt 1 good one")


def t18_a_version_of_a_deleted_file_is_retracted(s: Story) -> None:
    s.begin("p", GOOD)
    s.set_on_delete("retract")
    s.write("a.txt", "one")
    s.settle()
    s.delete("a.txt")
    s.settle()
    s.retract("a.txt", 1)
    s.write("a.txt", "one")
    s.settle()
    s.shows()
    s.reinstate("a.txt", 1)
    s.shows("a.txt 1 good one")


def t19_an_open_rebuild_is_backed_up(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.settle()
    s.publish("p", "1.0.1", BAD)
    s.write("a.txt", "two")
    s.settle()
    s.rebuild("p")
    s.backup()
    s.shows("a.txt 2 bad two", past=["a.txt 1 good one"])
    s.work()
    s.shows("a.txt 2 bad two", past=["a.txt 1 bad one"])


def t20_removed_rows_of_a_retracted_version_are_not_worked_again(s: Story) -> None:
    s.begin("p", GOOD)
    s.write("a.txt", "one")
    s.write("b.txt", "two")
    s.settle()
    s.publish("p", "1.0.1", BAD)
    s.redo("p")
    s.work()
    s.retract("a.txt", 1)
    s.expire()
    assert s.activate("p", "1.0.0") == 1
    s.work()
    s.shows("b.txt 1 good two")


SITUATIONS = [
    told for name, told in sorted(globals().items()) if name[:1] in "stu" and name[1:3].isdigit()
]
