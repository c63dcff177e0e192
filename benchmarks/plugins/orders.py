"""Benchmark query: a file with a number becomes as many rows in a SQLite sink."""

import pyarrow as pa

from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(pattern="*.txt", sinks={"orders": "sqlite:///tables.sqlite3"})
REGIONS = ["north", "south", "east", "west", "overseas", "nowhere"]
BATCH = 50_000


class Handler(BasePlugin):
    def execute(self, file_path: str) -> None:
        with open(file_path, encoding="utf-8") as file:
            begin, end = map(int, file.read().split())
        for first in range(begin, end, BATCH):
            ids = range(first, min(first + BATCH, end))
            self.publish(
                "orders",
                pa.table(
                    {
                        "id": pa.array(ids, pa.int64()),
                        "customer": [f"customer {n % 9973}" for n in ids],
                        "amount": [n * 7919 % 100_003 / 4 for n in ids],
                        "region": [REGIONS[n * 31 % 6] for n in ids],
                        "qty": [n * 17 % 100 for n in ids],
                        "note": [f"some note on row {n}" for n in ids],
                    }
                ),
            )
