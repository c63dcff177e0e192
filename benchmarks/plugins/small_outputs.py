"""Benchmark query_small: a file with a number becomes twenty rows of one of three schemas."""

import pyarrow as pa

from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(
    pattern="*.txt", sinks={"files": "parquet://output", "rows": "sqlite:///tables.sqlite3"}
)


class Handler(BasePlugin):
    def execute(self, file_path: str) -> None:
        with open(file_path, encoding="utf-8") as file:
            number = int(file.read().split()[1])
        columns = {"id": list(range(20)), "amount": [n * 1.5 for n in range(20)]}
        if number % 3 > 0:
            columns["region"] = ["north", "south"] * 10
        if number % 3 > 1:
            columns["qty"] = list(range(20))
        for topic in ("files", "rows"):
            self.publish(topic, pa.table(columns))
