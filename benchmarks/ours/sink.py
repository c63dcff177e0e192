"""Rows of an Arrow file through the SQLite sink, into the working directory: sink.py FILE"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pyarrow as pa

from casparian_flow.config import DatabaseSettings
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks.base import Lineage
from casparian_flow.protocol import OutputPlan, Published

URI = "sqlite:///tables.sqlite3"


def main(file: str) -> None:
    location = sinks.resolve(URI, Path.cwd())
    plan = OutputPlan(
        topic="measurements", uri=URI, location=location, mode="append", output_key="0" * 64,
        slot="0" * 64, ordinal=1,
    )  # fmt: skip
    lineage = Lineage(file_version_id=1, job_id=1, source_hash="0" * 64, plugin_version="1.0.0")
    started = time.perf_counter()
    sink = sinks.open_sink(location, DatabaseSettings())
    stage = sink.open_stage(plan, lineage, "attempt")
    with pa.memory_map(file) as source, pa.ipc.open_file(source) as reader:
        for number in range(reader.num_record_batches):
            stage.write(reader.get_batch(number))
    stage.finish()
    [outcome] = sink.publish(sinks.seal([stage]))
    seconds = time.perf_counter() - started
    if not isinstance(outcome, Published):
        raise outcome
    Path("figures.json").write_text(json.dumps({"load": seconds}))


if __name__ == "__main__":
    main(sys.argv[1])
