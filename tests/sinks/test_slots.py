"""Whatever is published, changed and deleted in whatever order: a reader sees what the model says,
and the sink's own check and records agree.

The states that are told are those that a ledger may tell: of a version at most one output stands,
of a file at most one is current.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from casparian_flow.protocol import Output, State
from proofs.tds.place import ServerPlace
from proofs.tds.server import Server
from tests.sinks.conftest import SCHEMES, SERVERS
from tests.sinks.slots import Model
from tests.sinks.stages import Place

FILES = ("a", "b")
STANDING = (State.CURRENT, State.PAST)


class Slots(RuleBasedStateMachine):
    """Two files with a few versions, each worked by up to two artifacts."""

    scheme: str

    def __init__(self) -> None:
        super().__init__()
        self.around = ExitStack()
        home = Path(self.around.enter_context(tempfile.TemporaryDirectory()))
        self.place = Place(self.scheme, home)
        if self.scheme in SERVERS:
            self.place = ServerPlace(self.around.enter_context(Server()), home)
        self.model = Model()
        self.rows: dict[str, list[str]] = {}
        self.attempts = 0

    def _staged(self, output: Output, rows: int) -> Output:
        self.attempts += 1
        facts = {
            name: getattr(output, name)
            for name in ("topic", "mode", "ordinal", "state", "path", "content_hash")
        }
        made = self.place.output(output.job_id, key=f"job {output.job_id}", **facts)
        if not rows:
            return made
        columns = {"id": [made.output_key] * rows}
        return self.place.sealed(
            columns, output.job_id, key=f"job {output.job_id}", attempt=f"a{self.attempts}", **facts
        )

    def _beside(self, output: Output) -> list[Output]:
        """The changes that keep the slots, when this output gets its state."""
        changes = []
        for other in self.model.told.values():
            if other.output_key == output.output_key or other.state not in STANDING:
                continue
            if output.state not in STANDING:
                continue
            if other.version_slot == output.version_slot:
                changes.append(msgspec.structs.replace(other, state=State.HIDDEN))
            elif other.location_slot == output.location_slot and output.state == State.CURRENT:
                changes.append(msgspec.structs.replace(other, state=State.PAST))
        return changes

    @rule(
        file=st.sampled_from(FILES), ordinal=st.integers(1, 3), again=st.integers(0, 1),
        state=st.sampled_from(list(State)), mode=st.sampled_from(["append", "replace"]),
        rows=st.integers(0, 2),
    )  # fmt: skip
    def publish(
        self, file: str, ordinal: int, again: int, state: State, mode: str, rows: int
    ) -> None:
        """A new output, or one that the sink has, with what it takes the place of."""
        job = 100 * FILES.index(file) + 10 * again + ordinal
        wanted = self.place.output(
            job, key=f"job {job}", slot=file, ordinal=ordinal, state=state, mode=mode
        )
        rows = len(self.rows.get(wanted.output_key, [""] * rows))  # as its key promises
        changes = self._beside(wanted)
        note(f"job {job}: {state} in mode {mode}, {rows} rows, {len(changes)} changes")
        (made,) = self.place.show(self._staged(wanted, rows), changes=changes)
        assert made.state == state
        for each in (*changes, made):
            self.model.tell(each)
        self.rows[made.output_key] = [made.output_key] * rows
        self._compare()

    @precondition(lambda self: self.model.told)
    @rule(data=st.data(), state=st.sampled_from(list(State)), replaces=st.booleans())
    def change(self, data: st.DataObject, state: State, replaces: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.model.told)))
        mode = "replace" if replaces else "append"
        output = msgspec.structs.replace(self.model.told[key], state=state, mode=mode)
        changes = [*self._beside(output), output]
        for _ in range(data.draw(st.integers(1, 2))):
            self.place.sink.change(changes)
        for each in changes:
            self.model.tell(each)
        self._compare()

    @precondition(lambda self: self.model.told)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.model.told)))
        self.place.sink.delete([self.model.told.pop(key)])
        del self.rows[key]
        self._compare()

    def _compare(self) -> None:
        wanted = [row for key in self.model.visible() for row in self.rows[key]]
        assert sorted(row["id"] for row in self.place.rows()) == sorted(wanted)
        assert self.place.check([*self.model.told.values()]) == []
        found = {each.output_key: each.state for each in self.place.sink.records(())}
        assert found == {key: output.state for key, output in self.model.told.items()}
        assert self.place.staged_files() == []

    def teardown(self) -> None:
        self.around.close()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.slow
def test_readers_see_what_the_model_says(scheme: str, provider: str) -> None:
    if scheme in SERVERS and not provider:
        pytest.skip("SQL SERVER IS NOT TESTED: mssql-python is not installed")
    machine = type(f"Slots_{scheme}", (Slots,), {"scheme": scheme})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=20, stateful_step_count=15, deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
