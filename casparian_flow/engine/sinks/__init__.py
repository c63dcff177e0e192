"""Sinks: where topics go, named by a URI.

    parquet://path/to/output            a folder; the topic is a folder in it, each output a file
    sqlite:///path/to/db.sqlite3        a database; the topic is a table in it

The path starts at the configuration's folder; one more slash makes it absolute
(`parquet:///abs`, `sqlite:////abs`). pyarrow is imported when a sink is opened, not before.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from casparian_flow.errors import ConfigError
from casparian_flow.protocol import StagedOutput

if TYPE_CHECKING:
    from casparian_flow.engine.sinks.base import Sink
    from casparian_flow.engine.sinks.stage import Stage

PREFIXES = {"parquet": "parquet://", "sqlite": "sqlite:///"}
"""Scheme -> what stands before the path."""

_ACCEPTED = "write parquet://path/to/output or sqlite:///path/to/db.sqlite3"


def resolve(uri: str, home: Path) -> str:
    """The sink's location: its URI with the path made absolute.

    Args:
        uri: as configured, or as a MANIFEST says.
        home: the folder relative paths start at; absolute.

    Raises:
        ConfigError: another scheme, no path, or parameters after a `?`.
    """
    scheme = uri.partition("://")[0]
    prefix = PREFIXES.get(scheme)
    if prefix is None:
        yet = " yet" if scheme == "mssql" else ""
        raise ConfigError(
            f"sink scheme {scheme!r} is not supported{yet}; supported: {', '.join(PREFIXES)}",
            _ACCEPTED,
        )
    path = uri.removeprefix(prefix)
    if path == uri or not path.strip("/"):
        raise ConfigError(f"sink {uri!r} has no path", _ACCEPTED)
    if "?" in path or "\0" in path:
        raise ConfigError(f"sink {uri!r} has parameters; there are none", _ACCEPTED)
    return prefix + os.path.abspath(home / path)


def open_sink(location: str) -> Sink:
    """The sink at a location that `resolve` gave. Touches nothing yet."""
    from casparian_flow.engine.sinks.parquet import ParquetSink
    from casparian_flow.engine.sinks.sqlite import SqliteSink

    scheme = location.partition("://")[0]
    path = Path(location.removeprefix(PREFIXES[scheme]))
    return ParquetSink(path) if scheme == "parquet" else SqliteSink(path)


def seal(stages: Sequence[Stage]) -> list[StagedOutput]:
    """Make staged files durable, each folder once for all: see `stage.seal`."""
    from casparian_flow.engine.sinks import stage

    return stage.seal(stages)
