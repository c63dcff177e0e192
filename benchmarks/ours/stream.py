"""Batches of 1 MiB from a guest process, validated and dropped: stream.py MIB"""

from __future__ import annotations

import json
import sys
import sysconfig
import time
from pathlib import Path

from casparian_flow.config import GuestSettings
from casparian_flow.engine.bridge import Guest
from casparian_flow.engine.environments import bundle
from casparian_flow.protocol import Artifact
from casparian_flow.sdk import FileInfo

PLUGIN = Path(__file__).parent.parent / "plugins" / "flood.py"
BATCH_LIMIT = 256 << 20
TIMEOUT_SECONDS = 600.0


def main(mib: int) -> None:
    artifact = Artifact(
        plugin_id=1, name="flood", version="1.0.0", source=PLUGIN.read_bytes(), lock="",
        topics=["flood"],
    )  # fmt: skip
    file = FileInfo(
        path="flood", rel_path="flood", source="flood", content_hash="", size_bytes=mib,
        version_id=1, job_id=1,
    )  # fmt: skip
    folder = Path.cwd()
    for inner in ("in", "tmp"):
        (folder / inner).mkdir()
    packages = Path(sysconfig.get_path("purelib"))
    with Guest(
        Path(sys.executable), packages, artifact,
        folder=folder, bundle=bundle(folder / "cache"),
        limits=GuestSettings(batch_limit_bytes=BATCH_LIMIT),
    ) as guest:  # fmt: skip
        guest.load()
        started = time.perf_counter()
        received = sum(batch.nbytes for _, batch in guest.run(file, TIMEOUT_SECONDS))
        seconds = time.perf_counter() - started
    if received != mib << 20:
        sys.exit(f"received {received} bytes of {mib} MiB")
    Path("figures.json").write_text(json.dumps({"streaming": seconds}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
