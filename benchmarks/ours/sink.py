"""Rows of an Arrow file through a sink, into the working directory: sink.py FILE URI MODE ROUNDS

Each round publishes the next version's output; the last is measured.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import msgspec
import pandas  # noqa: F401  pyarrow looks for it; not on the clock
import pyarrow as pa

from casparian_flow.config import DatabaseSettings
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks import parquet, sqlite  # noqa: F401  not on the clock
from casparian_flow.errors import JobError
from casparian_flow.protocol import Output, Publication, State


def load(file: str, location: str, uri: str, mode: str, number: int, last: list[Output]) -> Output:
    output = Output(
        topic="measurements", uri=uri, location=location, mode=mode, output_key=f"{number:064}",
        source="inbox", path=b"measurements", ordinal=number, content_hash="0" * 64, file_bytes=0,
        plugin="bench", plugin_version="1.0.0", artifact_hash="0" * 64, version_id=number,
        job_id=number, state=State.CURRENT,
    )  # fmt: skip
    sink = sinks.open_sink(location, DatabaseSettings())
    stage = sink.open_stage(output, f"attempt{number}")
    with pa.memory_map(file) as source, pa.ipc.open_file(source) as reader:
        for batch in range(reader.num_record_batches):
            stage.write(reader.get_batch(batch))
    stage.finish()
    past = [msgspec.structs.replace(each, state=State.PAST) for each in last]
    [outcome] = sink.publish([Publication(outputs=sinks.seal([stage]), changes=past)])
    if isinstance(outcome, JobError):
        raise outcome
    return outcome[0]


def main(file: str, uri: str, mode: str, rounds: int) -> None:
    location = sinks.resolve(uri, Path.cwd())
    last: list[Output] = []
    for number in range(1, rounds + 1):
        started = time.perf_counter()
        last = [load(file, location, uri, mode, number, last)]
        seconds = time.perf_counter() - started
    Path("figures.json").write_text(json.dumps({"load": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
