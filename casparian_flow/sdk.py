"""What a plugin imports: `BasePlugin`, `PluginMetadata`, and nothing heavy.

A plugin is one Python file with a `MANIFEST` and a class `Handler`:

    from casparian_flow.sdk import BasePlugin, PluginMetadata
    import pandas as pd

    MANIFEST = PluginMetadata(pattern="*.csv", topic="sales_data", subscriptions=["csv"])

    class Handler(BasePlugin):
        def execute(self, file_path: str):
            self.publish("sales_data", pd.read_csv(file_path))

This file is copied beside the guest, so it uses the standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PluginMetadata:
    """What a plugin says of itself. It is read from the source, without running it.

    Use literals only: strings, numbers, lists, tuples and dicts.
    """

    pattern: str | Sequence[str]
    """Which files: a glob, or several. Without a slash it matches the name at any depth."""

    topic: str | Sequence[str] = ()
    """The named outputs of the plugin, besides those in `sinks`."""

    priority: int = 0
    """Order of jobs; higher runs first."""

    subscriptions: Sequence[str] = ()
    """Tags of routing rules whose files the plugin wants too."""

    sinks: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    """Topic -> sink URI, or several, such as `parquet://output` or
    `sqlite:///tables.sqlite3?mode=replace`."""

    name: str = ""
    """The plugin's name; the file's name without `.py` where empty."""

    version: str = ""
    """The plugin's version (PEP 440), where `casparian publish` is given none."""

    timeout_seconds: float = 0.0
    """Wall clock of one attempt; 0 takes the configured limit, which it can only lower."""

    memory_bytes: int = 0
    """Address space of its process; 0 takes the configured limit, which it can only lower."""

    scratch_bytes: int = 0
    """Space for temporary files, in the folder that `tempfile` uses; 0: nothing can be written.
    The configuration may grant less."""

    network: bool = False
    """Whether it needs the network. It gets it only where the configuration allows it too."""


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """The file a plugin is looking at, as the ledger knows it."""

    path: str
    """Where the bytes are for this run: a private copy with the original name."""

    rel_path: str
    """The location: its path under the source root, POSIX separators."""

    source: str
    """Name of the source root."""

    content_hash: str
    """SHA-256 of the bytes, hexadecimal."""

    size_bytes: int
    version_id: int
    job_id: int


class BasePlugin:
    """Derive `Handler` from this; one instance serves many files, one after another."""

    file: FileInfo
    """The file of the current `execute` call."""

    _publish: Callable[[str, Any], None]

    def execute(self, file_path: str) -> None:
        """Read one file and publish what is in it. Raise to fail the job.

        Args:
            file_path: the version's bytes, under the file's original name.
        """
        raise TypeError(f"{type(self).__name__} has no execute(self, file_path)")

    def publish(self, topic: str, data: Any) -> None:
        """Send rows to a topic; may be called many times, each with the same columns.

        Args:
            topic: one of the plugin's declared topics.
            data: a pandas DataFrame, a pyarrow Table, RecordBatch or RecordBatchReader, anything
                with the Arrow C stream protocol (polars, DuckDB), or an iterator of these.
                Rows leave in batches; nothing is kept.

        Raises:
            TypeError: `data` is not tabular.
            ValueError: the topic is not declared, or the columns changed between calls.
        """
        self._publish(topic, data)
