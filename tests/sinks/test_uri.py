"""Sink URIs: what is accepted, and what is said of the rest."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from casparian_flow.engine import sinks
from casparian_flow.errors import ConfigError
from tests.sinks.stages import Place

HOME = Path("/home/of config")


@pytest.mark.parametrize(
    ("uri", "location"),
    [
        ("parquet://out", "parquet:///home/of config/out"),
        ("parquet://path/to/output", "parquet:///home/of config/path/to/output"),
        ("parquet://../beside", "parquet:///home/beside"),
        ("parquet:///srv/out/", "parquet:///srv/out"),
        ("parquet://100% done #1", "parquet:///home/of config/100% done #1"),
        ("sqlite:///path/to/db.sqlite3", "sqlite:////home/of config/path/to/db.sqlite3"),
        ("sqlite:////srv/db.sqlite3", "sqlite:////srv/db.sqlite3"),
    ],
)
def test_the_path_becomes_absolute(uri: str, location: str) -> None:
    assert sinks.resolve(uri, HOME) == location
    assert sinks.resolve(location, Path("/elsewhere")) == location


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("mssql://table", "sink scheme 'mssql' is not supported yet; supported: parquet, sqlite"),
        ("ftp://host/x", "sink scheme 'ftp' is not supported; supported: parquet, sqlite"),
        ("output/folder", "'output/folder' is not supported"),
        ("", "is not supported"),
        ("parquet://", "has no path"),
        ("parquet:///", "has no path"),
        ("sqlite:///", "has no path"),
        ("sqlite://db.sqlite3", "has no path"),
        ("parquet:out", "is not supported"),
        ("parquet://out?compression=zstd", "has parameters"),
        ("sqlite:///db.sqlite3?mode=ro", "has parameters"),
    ],
)
def test_others_are_refused_with_what_is_accepted(uri: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as refused:
        sinks.resolve(uri, HOME)
    assert "parquet://path/to/output" in refused.value.hint
    assert "sqlite:///path/to/db.sqlite3" in refused.value.hint


def test_opening_touches_nothing(place: Place) -> None:
    assert place.sink.stage_folder == place.home / "out" / ".casparian" / "stage"
    assert list(place.home.iterdir()) == []


def test_resolving_does_not_import_pyarrow() -> None:
    """The command line resolves URIs, and pyarrow takes longer to import than a command to run."""
    code = "import sys; import casparian_flow.engine.sinks; sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
