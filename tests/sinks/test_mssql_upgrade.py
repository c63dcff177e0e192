"""Tables of earlier releases in SQL Server: read as they are, written once they are converted.

The server is the double of proofs/tds. What a real one would do is not proven here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from casparian_flow.errors import SinkConflict, SinkUnavailable
from casparian_flow.protocol import Output, State
from proofs.tds.catalog import GIVEN
from proofs.tds.place import ServerPlace
from proofs.tds.server import Server
from tests.sinks.earlier_mssql import COLUMNS, LISTED, Earlier
from tests.sinks.stages import TOPIC

OTHER = "others"


@pytest.fixture
def here(tmp_path: Path, provider: str) -> Iterator[ServerPlace]:
    if not provider:
        pytest.skip("UPGRADES OF SQL SERVER ARE NOT TESTED: mssql-python is not installed")
    with Server() as server:
        yield ServerPlace(server, tmp_path)


@pytest.fixture
def earlier(here: ServerPlace) -> Earlier:
    made = Earlier(here.settings)
    made.topic(TOPIC, COLUMNS)
    return made


def of(here: ServerPlace, job: int, **named: Any) -> Output:
    return here.output(job, **named)


def seen(here: ServerPlace, topic: str = TOPIC) -> list[tuple[Any, ...]]:
    return sorted((tuple(sorted(row.items())) for row in here.rows(topic)), key=repr)


def test_until_then_it_is_read_and_not_written(here: ServerPlace, earlier: Earlier) -> None:
    shown = earlier.add(of(here, 1), [(1, "a"), (2, None)])
    retracted = earlier.add(of(here, 2), [(3, "c")], "retracted")
    replaced = earlier.add(of(here, 3), [], "replaced")
    told = [shown, msgspec.structs.replace(replaced, state=State.PAST)]
    assert here.sink.check(told) == []
    assert len(here.sink.check([msgspec.structs.replace(shown, rows=3)])) == 1
    found = {output.output_key: output.state for output in here.sink.records(())}
    assert found[shown.output_key] == State.CURRENT
    assert found[retracted.output_key] == State.RETRACTED
    (outcome,) = here.publish(here.sealed({"id": [9]}, 9))
    assert isinstance(outcome, SinkUnavailable)
    assert outcome.hint == "casparian upgrade"
    for act in (here.sink.change, here.sink.delete):
        with pytest.raises(SinkUnavailable, match="earlier release"):
            act([shown])


def test_readers_see_the_same_afterwards(here: ServerPlace, earlier: Earlier) -> None:
    shown = earlier.add(of(here, 1), [(1, "a"), (2, None)])
    kept = earlier.add(of(here, 2), [(3, "c")], "retracted")
    gone = earlier.add(of(here, 3), [(0, "gone")], "replaced")
    nothing = earlier.add(of(here, 4), [])
    earlier.topic(OTHER, COLUMNS)
    other = earlier.add(of(here, 1, topic=OTHER), [(7, "o")])
    before = seen(here), seen(here, OTHER)
    first, second = here.sink.upgrade()
    assert first.startswith("mssql://dbo.sales: 3 outputs converted; digest ")
    assert second.startswith("mssql://dbo.others: 1 outputs converted; digest ")
    assert (seen(here), seen(here, OTHER)) == before
    assert here.check([shown, kept, nothing, other]) == []
    assert here.sink.upgrade() == []
    listed = {output.output_key for output in here.sink.records(())}
    assert listed == {shown.output_key, kept.output_key, nothing.output_key}
    assert gone.output_key not in listed
    assert not [n for n in here.tables.names() if "retracted" in n or "earlier" in n]


def test_it_is_written_afterwards(here: ServerPlace, earlier: Earlier) -> None:
    shown = earlier.add(of(here, 1), [(1, "a")])
    kept = earlier.add(of(here, 2), [(3, "c")], "retracted")
    here.sink.upgrade()
    here.tell(State.CURRENT, kept)
    here.tell(State.RETRACTED, shown)
    here.show(here.sealed({"id": [5], "more": ["x"]}, 5))
    assert sorted((row["id"], row["more"], row["_cf_job_id"]) for row in here.rows()) == [
        (3, None, 2), (5, "x", 5),
    ]  # fmt: skip
    here.sink.delete([kept])
    assert [row["id"] for row in here.rows()] == [5]


def test_rows_of_others_stay_to_be_seen(here: ServerPlace, earlier: Earlier) -> None:
    shown = earlier.add(of(here, 1), [(1, "a")])
    values = "(77, 'theirs', NULL, NULL, NULL, NULL)"
    earlier.send(f"INSERT INTO [dbo].[{TOPIC}] ({LISTED}) VALUES {values}")
    before = seen(here)
    (said,) = here.sink.upgrade()
    assert "1 rows that Casparian Flow did not write stay current" in said
    assert seen(here) == before
    assert [output.output_key for output in here.sink.records(())] == [shown.output_key]


def test_ledgers_that_gave_equal_ids(here: ServerPlace, earlier: Earlier) -> None:
    """Their rows have the same lineage: each output gets as many as it has."""
    one = earlier.add(of(here, 1, key="one"), [(1, "a")])
    two = earlier.add(of(here, 1, key="two", slot="two"), [(1, "a"), (1, "a")])
    before = seen(here)
    here.sink.upgrade()
    assert seen(here) == before
    assert here.sink.check([one, two]) == []


def test_rights_on_the_table_are_told(here: ServerPlace, earlier: Earlier) -> None:
    earlier.topic(GIVEN, COLUMNS)
    earlier.add(of(here, 1, topic=GIVEN), [(1, "a")])
    (said,) = here.sink.upgrade()
    assert "rights to give again: GRANT SELECT to reader" in said


def test_retracted_rows_with_a_column_that_the_table_has_lost(
    here: ServerPlace, earlier: Earlier
) -> None:
    earlier.add(of(here, 1), [(1, "a")])
    earlier.send(f"ALTER TABLE [dbo].[_cf_retracted_{TOPIC}] ADD [more] bigint NULL")
    before = seen(here), here.tables.names()
    with pytest.raises(SinkConflict, match="lacks the column 'more'"):
        here.sink.upgrade()
    assert (seen(here), here.tables.names()) == before


def test_rows_that_are_missing_are_not_made_up(here: ServerPlace, earlier: Earlier) -> None:
    """`check` tells of them, before and after."""
    shown = earlier.add(of(here, 1), [(1, "a"), (2, "b")])
    earlier.send(f"DELETE FROM [dbo].[{TOPIC}] WHERE id = 1")
    assert len(here.sink.check([shown])) == 1
    here.sink.upgrade()
    assert len(here.sink.check([shown])) == 1
