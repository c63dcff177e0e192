"""Rows of an Arrow file into a Parquet file: parquet_write.py FILE ROUNDS

The last round is measured; earlier rounds leave a file to replace. As durable as ours: the
file is fsynced and renamed, and its folder fsynced. Row groups and compression equal ours.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

GROUP_ROWS = 128 << 10


def write(file: str, target: Path) -> None:
    temporary = target.with_suffix(".tmp")
    with pa.memory_map(file) as source, pa.ipc.open_file(source) as reader:
        pq.write_table(
            reader.read_all(), temporary,
            row_group_size=GROUP_ROWS, compression="zstd", compression_level=1,
        )  # fmt: skip
    fsync(temporary)
    temporary.rename(target)
    fsync(target.parent)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def main(file: str, rounds: int) -> None:
    Path("tables").mkdir()
    for _ in range(rounds):
        started = time.perf_counter()
        write(file, Path("tables/measurements.parquet"))
        seconds = time.perf_counter() - started
    Path("figures.json").write_text(json.dumps({"load": seconds}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
