"""Tasks that do nothing on huey over SQLite, two worker processes: huey_queue.py TASKS"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from huey import SqliteHuey

huey = SqliteHuey("queue", filename="huey.sqlite3", fsync=True)
DONE = Path("done")
MARK = b"00000001"


@huey.task()
def mark() -> None:
    descriptor = os.open(DONE, os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, MARK)
    os.close(descriptor)


def main(tasks: int) -> None:
    DONE.touch()
    started = time.perf_counter()
    for _ in range(tasks):
        mark()
    queued = time.perf_counter()
    consumer = huey.create_consumer(
        workers=2, worker_type="process", initial_delay=0.001, max_delay=0.01, periodic=False,
        check_worker_health=False,
    )  # fmt: skip
    consumer.start()
    while DONE.stat().st_size < tasks * len(MARK):
        time.sleep(0.005)
    ended = time.perf_counter()
    consumer.stop(graceful=True)
    figures = {"queueing": queued - started, "jobs": ended - queued}
    Path("figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(int(sys.argv[1]))
