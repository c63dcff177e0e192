"""Write the rows of the sink benchmark as an Arrow file: rows.py FILE ROWS SEED"""

from __future__ import annotations

import sys

import numpy as np
import pyarrow as pa

BATCH_ROWS = 16_384


def batch(numbers: np.random.Generator, first: int, rows: int) -> pa.RecordBatch:
    """Five columns of floats, three of integers, two of text."""
    counted = np.arange(first, first + rows)
    columns: dict[str, object] = {f"float_{n}": numbers.random(rows) for n in range(5)}
    columns |= {f"integer_{n}": numbers.integers(0, 1_000_000, rows) for n in range(2)}
    columns |= {"number": counted}
    columns |= {name: pa.array([f"{name} {n}" for n in counted]) for name in ("name", "place")}
    return pa.record_batch(columns)


def main(file: str, rows: int, seed: int) -> None:
    numbers = np.random.default_rng(seed)
    first = batch(numbers, 0, min(BATCH_ROWS, rows))
    with pa.OSFile(file, "wb") as sink, pa.ipc.new_file(sink, first.schema) as writer:
        writer.write(first)
        for start in range(BATCH_ROWS, rows, BATCH_ROWS):
            writer.write(batch(numbers, start, min(BATCH_ROWS, rows - start)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
