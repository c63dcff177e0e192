"""Files of JSON lines whose columns of numbers differ in type, into real sinks in any order."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from casparian_flow.errors import OutputRefused
from casparian_flow.protocol import Output
from tests.plugins.conftest import runner
from tests.sinks.stages import TOPIC, Place

SEED = random.SystemRandom().randrange(1 << 32)
KINDS = {
    "whole": ["0", "1", "-7", "9007199254740992"],
    "long": ["9007199254740993", "-9223372036854775808", "3"],
    "real": ["0.5", "100.10", "1e3", "-2.25", "1e300"],
    "integral": ["2.0", "3.0", "null"],
    "nothing": ["null"],
    "digits": ["12345678901234567.89", "0.1"],
    "big": ["18446744073709551616", "5"],
    "text": ['"A7"', '"10"'],
}


def value(cell: Any) -> Any:
    """A cell as what can be compared: numbers as decimals, whatever the sink's type for them."""
    if isinstance(cell, float):
        return Decimal(repr(cell))
    return Decimal(cell) if isinstance(cell, int) else cell


def read(place: Place) -> dict[int, list[Any]]:
    """Job -> its values, as a reader of all the topic sees them."""
    if place.scheme == "parquet":
        folder = place.home / "out" / TOPIC
        schema = pq.read_schema(folder / "_common_metadata")
        rows = ds.dataset(folder, schema=schema).to_table().to_pylist()
    else:
        with closing(sqlite3.connect(place.database)) as connection:
            connection.row_factory = sqlite3.Row
            rows = [dict(row) for row in connection.execute(f"SELECT * FROM {TOPIC}")]
    found: dict[int, list[Any]] = {}
    for row in rows:
        found.setdefault(row["_cf_job_id"], []).append(value(row["n"]))
    return found


def written(kind: str, texts: list[str], scheme: str) -> list[Any]:
    """What should be read; decimals are text in SQLite, of all their digits."""
    found: list[Any] = []
    for text in texts:
        if text == "null":
            found.append(None)
        elif text[0] == '"':
            found.append(text.strip('"'))
        elif scheme == "sqlite" and kind in ("digits", "big"):
            found.append(f"{Decimal(text):.{18 if kind == 'digits' else 0}f}")
        else:
            found.append(Decimal(text))
    return found


@pytest.mark.of_a_folder
@pytest.mark.parametrize("number", range(12))
def test_values_are_exact_or_the_file_is_refused_in_words(
    place: Place, number: int, tmp_path: Path
) -> None:
    print("seed", SEED + number)
    rng = random.Random(SEED + number)
    run = runner("json_records")
    expected: dict[int, list[Any]] = {}
    refusals: list[str] = []
    for job in range(1, 9):
        kind = rng.choice(list(KINDS))
        texts = [rng.choice(KINDS[kind]) for _ in range(rng.randrange(1, 5))]
        if kind in ("digits", "big", "long"):
            texts.append(KINDS[kind][0])
        file = tmp_path / f"{job}.jsonl"
        file.write_text("".join(f'{{"n": {text}}}\n' for text in texts))
        (batch,) = run(file)["json"].combine_chunks().to_batches()
        try:
            (seen,) = place.publish(place.sealed(batch, job))
        except OutputRefused as error:
            seen = error
        if isinstance(seen, Output):
            expected[job] = written(kind, texts, place.scheme)
        else:
            assert isinstance(seen, OutputRefused)
            assert "column 'n'" in seen.message
            assert str(batch.schema.field("n").type) in seen.message
            refusals.append(kind)
    assert read(place) == expected
    assert len(expected) + len(refusals) == 8


ORDERS = [["whole", "real", "nothing"], ["real", "whole", "nothing"], ["nothing", "real", "whole"],
          ["nothing", "whole", "real"], ["whole", "nothing", "integral", "real", "whole"],
          ["nothing", "digits", "nothing", "digits"], ["nothing", "text", "nothing"],
          ["integral", "whole", "real"], ["big", "nothing", "big"]]  # fmt: skip


@pytest.mark.of_a_folder
@pytest.mark.parametrize("kinds", ORDERS, ids="-".join)
def test_what_agrees_is_taken_in_every_order(
    place: Place, kinds: list[str], tmp_path: Path
) -> None:
    run = runner("json_records")
    expected = {}
    for job, kind in enumerate(kinds, start=1):
        file = tmp_path / f"{job}.jsonl"
        file.write_text("".join(f'{{"n": {text}}}\n' for text in KINDS[kind]))
        (batch,) = run(file)["json"].combine_chunks().to_batches()
        (seen,) = place.publish(place.sealed(batch, job))
        assert isinstance(seen, Output), seen
        expected[job] = written(kind, KINDS[kind], place.scheme)
    assert read(place) == expected


def test_the_message_names_what_settles_it(parquet: Place) -> None:
    """Column, both types, and the command; the facts say of which file and plugin."""
    facts = {
        "plugin": "json_records", "path": b"in/users-2.jsonl.gz",
        "topics": "json/json_rejects",
    }  # fmt: skip
    first, second = (
        parquet.sealed({"id": values}, job, **facts)
        for job, values in ((1, [1]), (2, pa.array(["u-1"])))
    )
    _, refused = parquet.publish(first, second)
    assert isinstance(refused, OutputRefused)
    settles = (
        "casparian publish json_records --name users --pattern 'users*.jsonl.gz' "
        "--topic users --topic users_rejects."
    )
    for word in ("'id'", "int64", "string", settles):
        assert word in refused.message
