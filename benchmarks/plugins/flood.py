"""Benchmark stream: as many MiB as the file is said to have bytes, 1 MiB to a batch."""

import numpy as np
import pyarrow as pa

from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(pattern="*", topic="flood")


columns = np.random.default_rng(0).random((8, 16_384))
batch = pa.record_batch({f"column_{n}": values for n, values in enumerate(columns)})


class Handler(BasePlugin):
    def execute(self, file_path: str) -> None:
        for _ in range(self.file.size_bytes):
            self.publish("flood", batch)
