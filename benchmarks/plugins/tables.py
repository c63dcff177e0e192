"""Benchmark small_files: a CSV file becomes a table, as the peer does it."""

import pandas as pd

from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(pattern="*.csv", topic="measurements")


class Handler(BasePlugin):
    def execute(self, file_path: str) -> None:
        self.publish("measurements", pd.read_csv(file_path))
