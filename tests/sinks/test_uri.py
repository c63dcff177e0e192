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
        ("parquet://out?mode=replace", "parquet:///home/of config/out"),
    ],
)
def test_the_path_becomes_absolute(uri: str, location: str) -> None:
    assert sinks.resolve(uri, HOME) == location
    assert sinks.resolve(location, Path("/elsewhere")) == location


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("ftp://host/x", "sink scheme 'ftp' is not supported; supported: parquet, sqlite, mssql"),
        ("output/folder", "'output/folder' is not supported"),
        ("", "is not supported"),
        ("parquet://", "has no path"),
        ("parquet:///", "has no path"),
        ("sqlite:///", "has no path"),
        ("sqlite://db.sqlite3", "has no path"),
        ("parquet:out", "is not supported"),
        ("parquet://out?compression=zstd", "has no option 'compression'; there is: mode"),
        ("sqlite:///db.sqlite3?mode=ro", "has no mode 'ro'; there are: append, replace, error"),
        ("sqlite:///db.sqlite3?mode=append&mode=append", "mode twice"),
        ("parquet://out?", "has no option ''"),
        ("parquet://${HOME}/out", "variable"),
        ("parquet://.casparian/store", ".casparian"),
        ("sqlite:///a/../.casparian/x", ".casparian"),
    ],
)
def test_others_are_refused_with_what_is_accepted(uri: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as refused:
        sinks.resolve(uri, HOME)
    assert refused.value.hint


@pytest.mark.parametrize(
    ("uri", "schema", "table"),
    [
        ("mssql://table", "", "table"),
        ("mssql://dbo.table", "dbo", "table"),
        ("mssql://[my.schema].[a ]] table]", "my.schema", "a ] table"),
        ("mssql://select", "", "select"),
        ("mssql://Größe.таблица", "Größe", "таблица"),
        ("mssql://" + "x" * 128, "", "x" * 128),
    ],
)
def test_a_table_of_sql_server(uri: str, schema: str, table: str) -> None:
    assert sinks.resolve(uri, HOME) == uri
    assert sinks.table_of(uri) == (schema, table)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("mssql://", "does not name a table"),
        ("mssql://a.b.c", "does not name a table"),
        ("mssql://a]b", "does not name a table"),
        ("mssql://[a", "does not name a table"),
        ("mssql://a\nb", "unprintable"),
        ("mssql://" + "x" * 129, "longer than 128"),
        ("mssql://" + "🐟" * 65, "longer than 128"),
        ("mssql://#temp", "temporary"),
        ("mssql://_cf_outputs", "reserved"),
        ("mssql://dbo.Casparian_Stage_1", "reserved"),
    ],
)
def test_tables_that_are_refused(uri: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sinks.resolve(uri, HOME)


@pytest.mark.of_a_folder
def test_opening_touches_nothing(place: Place) -> None:
    beside = Path(
        ".casparian", "casparian_flow.sqlite3.stage"
    )  # the ledger: a server has no folder
    folder = beside if place.scheme == "mssql" else Path("out", ".casparian", "stage")
    assert place.sink.stage_folder == place.home / folder
    assert list(place.home.iterdir()) == []


def test_resolving_does_not_import_pyarrow() -> None:
    """The command line resolves URIs, and pyarrow takes longer to import than a command to run."""
    code = "import sys; import casparian_flow.engine.sinks; sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
