"""Very wide, very long: `python -m proofs.extremes` tries each on every sink.

Each is kept to the last byte, or refused by name with nothing left. It takes some minutes, 2 GiB of
memory and a gibibyte in the temporary folder.
"""

from __future__ import annotations

import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from casparian_flow.errors import OutputRefused
from casparian_flow.protocol import Output
from tests.sinks.stages import TOPIC, Place

MB = 1_000_000


def extremes() -> Iterator[tuple[str, Any]]:
    """Names and batches of one row, the next made when the last is done with."""
    for count in (2000, 10_000, 100_000):
        names = [f"column {number}" for number in range(count)]
        columns = [pa.array([number]) for number in range(count)]
        yield f"{count:,} columns", pa.RecordBatch.from_arrays(columns, names=names)
    yield "a name of 10 MB", pa.record_batch({"n" * (10 * MB): [1]})
    yield "100 MB of text", pa.record_batch({"long": ["ü" * (50 * MB)]})
    yield "100 MB of bytes", pa.record_batch({"long": [bytes(range(250)) * (MB * 100 // 250)]})
    yield "1 GB and a byte", pa.record_batch({"long": [b"x" * (1000 * MB + 1)]})


def stored(place: Place, name: str) -> Any:
    """The one value of a column."""
    if place.scheme == "parquet":
        (file,) = (place.home / "out" / TOPIC).glob("*.parquet")
        return pq.ParquetFile(file).read([name])[name][0].as_py()
    with closing(sqlite3.connect(place.database)) as connection:
        quoted = name.replace('"', '""')
        (value,) = connection.execute(f'SELECT "{quoted}" FROM {TOPIC}').fetchone()
    return value


def attempt(place: Place, batch: Any) -> str:
    """What became of it.

    Raises:
        AssertionError: it is there and is not the same, or is refused and something is there.
    """
    first, last = batch.schema.names[0], batch.schema.names[-1]
    try:
        (seen,) = place.publish(place.sealed(batch))
    except OutputRefused as error:
        assert not place.staged_files()
        assert not place.rows()
        assert "column " in error.message
        return f"refused: {error.message[:150]}"
    assert isinstance(seen, Output), seen
    for name in {first, last}:
        assert stored(place, name) == batch[name][0].as_py()
    return "exact"


def main() -> None:
    for name, batch in extremes():
        for scheme in ("parquet", "sqlite"):
            with tempfile.TemporaryDirectory() as folder:
                begun = time.monotonic()
                words = attempt(Place(scheme, Path(folder)), batch)
                seconds = time.monotonic() - begun
            sys.stdout.write(f"{scheme:8} {name:16} {seconds:6.1f} s  {words}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
