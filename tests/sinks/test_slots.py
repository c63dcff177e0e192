"""Whatever is published, retracted and reinstated in whatever order: a reader of a slot sees what
the model says, and the sink's own check agrees."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from casparian_flow.engine import sinks
from casparian_flow.engine.sinks.base import Claim
from casparian_flow.protocol import Published, StagedOutput
from tests.sinks.conftest import MODES_KNOWN
from tests.sinks.slots import Key, Slot
from tests.sinks.stages import TOPIC, Place

NAMES = ("a", "b")


class Slots(RuleBasedStateMachine):
    """Two slots of a topic, and rows that were appended beside them."""

    scheme: str

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.place = Place(self.scheme, Path(self.folder.name))
        self.slots = {name: Slot() for name in NAMES}
        self.claims: dict[tuple[str, Key], Claim] = {}
        self.appended = 0
        self.attempts = 0

    def _staged(self, name: str, key: Key, *, empty: bool = False) -> StagedOutput:
        ordinal, job = key
        self.attempts += 1
        attempt = f"a{self.attempts}"
        if empty:
            stage = self.place.stage(
                job, attempt, f"{name}{key}", mode="replace", slot=name, ordinal=ordinal
            )
            stage.finish()
            return sinks.seal([stage])[0]
        return self.place.sealed(
            {"id": [f"{name}{key}"] * 3}, job, attempt=attempt, key=f"{name}{key}", slot=name,
            mode="replace", ordinal=ordinal,
        )  # fmt: skip

    @rule(
        keys=st.lists(
            st.tuples(st.sampled_from(NAMES), st.integers(1, 4), st.integers(0, 1), st.booleans()),
            min_size=1,
            max_size=3,
            unique_by=lambda each: each[:3],
        )
    )
    def publish(self, keys: list[tuple[str, int, int, bool]]) -> None:
        """Newer, late or again; some of them in one call."""
        group = []
        for name, ordinal, again, empty in keys:
            # As the ledger gives them: a job id belongs to one version and one location.
            job = 100 * (1 + NAMES.index(name)) + 10 * again + ordinal
            key = (ordinal, job)
            if key in self.slots[name].published:  # the same rows, as its key promises
                empty = not self.claims[name, key].rows  # noqa: PLW2901
            group.append((name, key, self._staged(name, key, empty=empty)))
        outcomes = self.place.publish(*(output for _, _, output in group))
        for (name, key, output), outcome in zip(group, outcomes, strict=True):
            note(f"{name} {key}: {outcome}")
            assert isinstance(outcome, Published), outcome
            slot = self.slots[name]
            if key not in slot.published:
                slot.published.add(key)
                self.claims[name, key] = Claim(
                    topic=TOPIC, output_key=output.output_key, job_id=key[1],
                    target=outcome.target, rows=outcome.rows, digest=outcome.digest,
                )  # fmt: skip
            elif key == max(slot.published):
                assert outcome.adopted
                assert outcome.retracted == (key in slot.retracted)
        self._compare()

    @rule()
    def append(self) -> None:
        self.appended += 1
        self.attempts += 1
        output = self.place.sealed(
            {"id": ["appended"]}, 1000 + self.appended, attempt=f"a{self.attempts}", slot="a"
        )
        assert isinstance(*self.place.publish(output), Published)
        self._compare()

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), undo=st.booleans())
    def retract(self, data: st.DataObject, undo: bool) -> None:
        visible = [(n, k) for n, s in self.slots.items() if (k := s.visible)]
        hidden = [(n, k) for n, s in self.slots.items() for k in s.retracted]
        chosen = sorted(hidden if undo else visible)
        if not chosen:
            return
        name, key = data.draw(st.sampled_from(chosen))
        for _ in range(data.draw(st.integers(1, 2))):
            if undo:
                self.place.sink.reinstate(self.claims[name, key])
                self.slots[name].reinstate(key)
            else:
                self.place.sink.retract(self.claims[name, key])
                self.slots[name].retract(key)
        self._compare()

    def _compare(self) -> None:
        shown = {(name, key) for name, slot in self.slots.items() if (key := slot.visible)}
        wanted = [f"{name}{key}" for name, key in shown for _ in range(self.claims[name, key].rows)]
        seen = sorted(row["id"] for row in self.place.rows())
        assert seen == sorted(wanted + ["appended"] * self.appended)
        assert self.place.sink.check([self.claims[each] for each in shown]) == []
        # A sink may drop what is retracted once a greater one has its place.
        hidden = {each.output_key for each in self.place.sink.inventory(()) if each.retracted}
        retracted = [(n, key) for n, slot in self.slots.items() for key in slot.retracted]
        keys = {self.claims[each].output_key for each in retracted}
        kept = {
            self.claims[n, k].output_key for n, k in retracted if k == max(self.slots[n].published)
        }
        assert kept <= hidden <= keys
        assert self.place.staged_files() == []

    def teardown(self) -> None:
        self.folder.cleanup()


@pytest.mark.parametrize("scheme", MODES_KNOWN)
@pytest.mark.slow
def test_a_slot_is_what_the_model_says(scheme: str) -> None:
    machine = type(f"Slots_{scheme}", (Slots,), {"scheme": scheme})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=15, stateful_step_count=12, deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
