"""Files of another kind in one topic: said in the log, and stored all the same."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from casparian_flow.engine.runner import _with_notes
from casparian_flow.engine.sinks import topic_schema
from casparian_flow.engine.sinks.base import otherwise, own_topic
from casparian_flow.engine.sinks.stage import Stage
from casparian_flow.protocol import Output
from tests.sinks.stages import Place

FACTS: dict[str, Any] = {"plugin": "delimited", "path": b"in/prices.csv"}


@pytest.fixture(autouse=True)
def no_earlier_outputs() -> None:
    """A process remembers what it staged; tables of the server's double have the same names."""
    topic_schema._staged.clear()


def staged(place: Place, columns: dict[str, Any], job: int = 1, topic: str = "sales") -> Stage:
    """An output that is finished, not yet published."""
    stage = place.stage(job, topic=topic, **FACTS)
    stage.write(pa.record_batch(columns))
    stage.finish()
    return stage


def published(place: Place, stage: Stage) -> None:
    (seen,) = place.publish(stage.seal())
    assert isinstance(seen, Output)


def test_a_file_without_any_column_of_its_topic_is_told(place: Place) -> None:
    first = staged(place, {"id": [1], "amount": [2]})
    assert first.note == ""
    published(place, first)
    second = staged(place, {"sku": ["a"], "price": [1]}, job=2)
    settles = "publish delimited --name prices --pattern 'prices*.csv' --topic prices"
    for word in (topic_schema.FAMILY_NOTE, "'sales'", "'id'", "'sku'", "'price'", settles):
        assert word in second.note
    published(place, second)
    assert len(place.rows()) == 2


@pytest.mark.of_a_folder
def test_what_an_earlier_process_published_counts(place: Place) -> None:
    published(place, staged(place, {"id": [1]}))
    topic_schema._staged.clear()
    assert "has the columns 'id'" in staged(place, {"sku": ["a"]}, job=2).note
    topic_schema._staged.clear()
    assert staged(place, {"ID": [1], "sku": ["a"]}, job=3).note == ""


def test_files_of_several_kinds_that_are_worked_at_once_are_told(place: Place) -> None:
    assert staged(place, {"id": [1]}).note == ""
    assert "'id'" in staged(place, {"sku": [1]}, job=2).note
    assert staged(place, {"Id": [2], "new": [1]}, job=3).note == ""
    assert staged(place, {"sku": [1]}, job=4, topic="another").note == ""


def test_what_came_to_nothing_does_not_count(place: Place) -> None:
    stage = staged(place, {"id": [1]})
    stage.discard()
    stage.discard()
    assert staged(place, {"sku": [1]}, job=2).note == ""


def test_the_note_ends_the_log_on_a_line_of_its_own(parquet: Place) -> None:
    told = [staged(parquet, {"id": [1]}), staged(parquet, {"sku": [1]}, job=2)]
    assert _with_notes("printed\n", told[:1]) == "printed\n"
    for log in ("printed", "printed\n"):
        assert _with_notes(log, told) == f"printed\n{told[1].note}\n"
    assert _with_notes("", told) == f"{told[1].note}\n"


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("in/prices_2024.csv.gz", "--name prices --pattern 'prices*.csv.gz' --topic prices"),
        ("in/2024_01.csv", "--name 2024_01 --pattern 2024_01.csv --topic 2024_01"),
        ("d.csv", "--name d --pattern d.csv --topic d"),
        ("b (2).csv", "--name b_2 --pattern 'b ?2?.csv' --topic b_2"),
    ],
)
def test_a_pattern_that_would_fit_other_families_is_the_name_itself(
    parquet: Place, path: str, command: str
) -> None:
    output = parquet.output(topic="delimited", plugin="delimited", path=path.encode())
    assert own_topic(output) == f"casparian publish delimited {command}"


def test_words_for_json_name_the_option_that_settles_the_type(parquet: Place) -> None:
    named: dict[str, Any] = {"topic": "json", "path": b"sales_1.json"}
    of_json = parquet.output(plugin="json_records", **named)
    assert "--option 'types=unit price:text'" in otherwise(own_topic(of_json), "unit price")
    assert "--option" not in otherwise(own_topic(parquet.output(plugin="mine", **named)), "id")
