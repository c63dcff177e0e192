"""Where chaos happens: a configuration, a source root, two plugins, and their three sinks' topics.

`lines` publishes each line of a file to Parquet and to SQLite, one output each; `sizes` takes the
files of `twice` only, and publishes one row of each to SQLite.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

from casparian_flow import config
from casparian_flow.config import Settings
from casparian_flow.db.access import open_ledger
from proofs import sink_reader
from tests.daemons import free_port
from tests.factories import add_root
from tests.plugs import publish

SETTLE_SECONDS = 0.5

LINES = """
from casparian_flow.sdk import BasePlugin, PluginMetadata
import pyarrow as pa

MANIFEST = PluginMetadata(
    pattern="*.txt", sinks={"lines": "parquet://output", "entries": "sqlite:///sink.sqlite3"}
)

class Handler(BasePlugin):
    def execute(self, file_path: str):
        with open(file_path) as file:
            rows = [[int(part) for part in line.split(",")] for line in file]
        table = pa.table({
            "number": pa.array([row[0] for row in rows], pa.int64()),
            "line": pa.array([row[1] for row in rows], pa.int64()),
        })
        self.publish("lines", table)
        self.publish("entries", table)
"""

SIZES = """
from casparian_flow.sdk import BasePlugin, PluginMetadata
import pyarrow as pa

MANIFEST = PluginMetadata(pattern="twice/**", sinks={"sizes": "sqlite:///sink.sqlite3"})

class Handler(BasePlugin):
    def execute(self, file_path: str):
        with open(file_path) as file:
            count = len(file.readlines())
        self.publish("sizes", pa.table({"lines": pa.array([count], pa.int64())}))
"""

CONFIG = """
[database]
db_location = "casparian_flow.sqlite3"
[scan]
rescan_seconds = 5.0
[workers]
count = 2
[jobs]
retry_seconds = 0.1
[listen]
endpoint = "tcp://127.0.0.1:{port}"
"""


class Place:
    """The folders and files of one run; made where they are not there yet.

    Args:
        folder: the state folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.flow = self.folder / "flow"
        self.root = self.folder / "source"
        self.logs = self.folder / "logs"
        self.temporary = self.folder / "tmp"
        """Where what we start keeps its temporary files; nothing may stay there."""
        self.sink = self.flow / "sink.sqlite3"
        self.ledger = self.flow / "casparian_flow.sqlite3"
        self.config = self.flow / config.FILE_NAME
        self.parquet = self.flow / "output" / "lines"
        made = self.folder / "made"
        if not made.exists():
            self._make()
            made.touch()

    @cached_property
    def settings(self) -> Settings:
        return config.load(str(self.config))

    def command(self, *words: str) -> list[str]:
        """A `casparian` command over this place."""
        return [
            sys.executable, "-m", "casparian_flow.cli", "--config", str(self.config), *words,
        ]  # fmt: skip

    def run(self, *words: str, timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words), cwd=self.flow, capture_output=True, text=True,
            timeout=timeout, check=False,
        )  # fmt: skip

    def ask(self, query: str, *values: Any, of: Path | None = None) -> list[tuple[Any, ...]]:
        """Rows of the ledger, or of another database, read and not written."""
        with sink_reader.read_only(of or self.ledger, timeout=30.0) as connection:
            return connection.execute(query, values).fetchall()

    def stages(self) -> list[Path]:
        """The folders where outputs wait to be published."""
        return [self.flow / ".casparian" / "stage", self.flow / "output" / ".casparian" / "stage"]

    def _make(self) -> None:
        for folder in (self.flow, self.root, self.logs, self.temporary):
            folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(CONFIG.format(port=free_port()))
        with open_ledger(self.settings.database) as ledger:
            add_root(ledger, self.root, settle_seconds=SETTLE_SECONDS)
            publish(ledger, self.settings, "lines", LINES, "1.0.0")
            publish(ledger, self.settings, "sizes", SIZES, "1.0.0")
