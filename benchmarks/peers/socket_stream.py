"""An Arrow IPC stream from one process to another, 1 MiB to a batch: socket_stream.py MIB"""

from __future__ import annotations

import json
import multiprocessing
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

READ_BUFFER = 1 << 20
WRITE_BUFFER = 1 << 16
"""Bytes; columns are larger, and are sent without a copy. The fastest pair of those measured."""


def send(wire: socket.socket, batch: pa.RecordBatch, mib: int) -> None:
    with (
        wire,
        wire.makefile("wb", WRITE_BUFFER) as file,
        pa.ipc.new_stream(file, batch.schema) as writer,
    ):
        for _ in range(mib):
            writer.write_batch(batch)


def main(mib: int) -> None:
    columns = np.random.default_rng(0).random((8, 16_384))
    batch = pa.record_batch({f"column_{n}": values for n, values in enumerate(columns)})
    ours, theirs = socket.socketpair()
    started = time.perf_counter()
    sender = multiprocessing.Process(target=send, args=(theirs, batch, mib))
    sender.start()
    theirs.close()
    with ours, ours.makefile("rb", READ_BUFFER) as file, pa.ipc.open_stream(file) as reader:
        received = sum(batch.nbytes for batch in reader)
    seconds = time.perf_counter() - started
    sender.join()
    if received != mib << 20:
        sys.exit(f"received {received} bytes of {mib} MiB")
    Path("figures.json").write_text(json.dumps({"streaming": seconds}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
