"""Rows of an Arrow file into a SQLite table, in one transaction: sqlite_insert.py FILE ROUNDS

The last round is measured; it deletes the rows of earlier rounds in its transaction.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path

import pyarrow as pa


def load(file: str) -> None:
    with (
        closing(sqlite3.connect("tables.sqlite3", isolation_level=None)) as connection,
        pa.memory_map(file) as source,
        pa.ipc.open_file(source) as reader,
    ):
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN IMMEDIATE")
        names = ", ".join(reader.schema.names)
        connection.execute(f"CREATE TABLE IF NOT EXISTS measurements ({names})")
        connection.execute("DELETE FROM measurements")
        marks = ", ".join("?" * len(reader.schema))
        for number in range(reader.num_record_batches):
            values = [column.to_pylist() for column in reader.get_batch(number).columns]
            connection.executemany(
                f"INSERT INTO measurements VALUES ({marks})", zip(*values, strict=True)
            )
        connection.execute("COMMIT")


def main(file: str, rounds: int) -> None:
    for _ in range(rounds):
        started = time.perf_counter()
        load(file)
        seconds = time.perf_counter() - started
    Path("figures.json").write_text(json.dumps({"load": seconds}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
