"""What the tests of guests share: small plugins, the files they are run over, running them."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from casparian_flow.engine.bridge import Guest
from casparian_flow.protocol import Artifact
from casparian_flow.sdk import FileInfo

Start = Callable[..., Guest]
SECONDS = 60.0
PREAMBLE = """\
import os, sys, json
import pyarrow as pa
from casparian_flow.sdk import BasePlugin

class Handler(BasePlugin):
    def execute(self, file_path):
"""


def plugin(body: str) -> bytes:
    """A plugin whose `execute` is `body`."""
    return (PREAMBLE + textwrap.indent(textwrap.dedent(body), " " * 8)).encode()


def artifact(source: bytes, topics: tuple[str, ...] = ("t",), **wants: Any) -> Artifact:
    return Artifact(
        plugin_id=1, name="demo", version="1.0.0", source=source, lock="", topics=list(topics),
        **wants,
    )  # fmt: skip


def file_info(path: str = "/nowhere/a.csv", job_id: int = 7, **changes: Any) -> FileInfo:
    facts: dict[str, Any] = {
        "path": path,
        "rel_path": "a.csv",
        "source": "inbox",
        "content_hash": hashlib.sha256(b"").hexdigest(),
        "size_bytes": 0,
        "version_id": 3,
        "job_id": job_id,
    }
    return FileInfo(**facts | changes)


def run(guest: Guest, **facts: object) -> dict[str, pa.Table]:
    """Run one job to its end: topic -> table."""
    received: dict[str, list[pa.RecordBatch]] = {}
    for topic, batch in guest.run(file_info(**facts), SECONDS):  # type: ignore[arg-type]
        received.setdefault(topic, []).append(batch)
    return {topic: pa.Table.from_batches(batches) for topic, batches in received.items()}


def loaded(start: Start, body: str, *arguments: object, **limits: object) -> Guest:
    guest = start(plugin(body), *arguments, **limits)
    guest.load()
    return guest
