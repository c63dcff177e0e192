"""Read a CSV file with types, keep what does not fit, write both as Parquet: duckdb_typed.py FILE

DuckDB reads `1.5` as a whole number and rounds `1.239` to two digits: only what it cannot parse at
all is a reject here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import duckdb

COLUMNS = {
    "id": "BIGINT",
    "at": "TIMESTAMP",
    "day": "DATE",
    "amount": "DECIMAL(18,2)",
    "pieces": "BIGINT",
    "weight": "DOUBLE",
    "city": "VARCHAR",
    "paid": "BOOLEAN",
}


def main(source: str) -> None:
    session = duckdb.connect()
    session.execute("SET threads = 1")  # as one guest has
    session.execute(
        f"COPY (FROM read_csv('{source}', columns={COLUMNS}, header=true, auto_detect=false, "
        "strict_mode=true, store_rejects=true)) TO 'rows.parquet'"
    )
    session.execute("COPY (FROM reject_errors) TO 'rejects.parquet'")
    for file in ("rows.parquet", "rejects.parquet", "."):
        descriptor = os.open(Path(file), os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


if __name__ == "__main__":
    main(sys.argv[1])
