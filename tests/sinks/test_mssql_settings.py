"""The way to SQL Server: from the configuration and the environment, and told to nobody."""

from __future__ import annotations

import logging
import subprocess
import sys
import traceback
from pathlib import Path

import msgspec
import pytest

from casparian_flow import config
from casparian_flow.config import DatabaseSettings, MssqlSettings, Settings
from casparian_flow.engine import sinks
from casparian_flow.engine.sinks import mssql_session
from casparian_flow.engine.sinks.mssql_session import check_configured, connection_string
from casparian_flow.errors import ConfigError, SinkUnavailable

SECRET = "geheim;{}=wort"

WRITTEN = """
[database]
db_location = "ledger.sqlite3"
[mssql]
server = "sql.example.com"
database = "warehouse"
user = "casparian"
password = "from the file"
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("CASPARIAN_MSSQL", "CASPARIAN_MSSQL_PASSWORD", "CASPARIAN_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "global_config.toml"
    file.write_text(WRITTEN)
    return file


def test_the_file_says_where_and_the_environment_wins(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config.load(str(file))
    assert settings.mssql.password == "from the file"
    assert settings.database.mssql == settings.mssql
    monkeypatch.setenv("CASPARIAN_MSSQL_PASSWORD", SECRET)
    assert config.load(str(file)).mssql.password == SECRET
    monkeypatch.setenv("CASPARIAN_MSSQL", "Server=other")
    assert connection_string(config.load(str(file)).mssql) == "Server=other;Encrypt=yes"


def test_it_is_no_key_of_the_database(file: Path) -> None:
    file.write_text('[database]\nmssql = {server = "x"}\n')
    with pytest.raises(ConfigError, match="unknown field `mssql`"):
        config.load(str(file))


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (
            {"server": "sql,1433", "database": "x", "user": "u", "password": "a}b;c"},
            "Server={sql,1433};Database={x};UID={u};PWD={a}}b;c};Encrypt={yes};"
            "TrustServerCertificate={no}",
        ),
        (
            {"server": "sql", "encrypt": "strict", "trust_server_certificate": True},
            "Server={sql};Encrypt={strict};TrustServerCertificate={yes};Trusted_Connection={yes}",
        ),
        (
            {"server": "sql", "authentication": "ActiveDirectoryDefault"},
            "Server={sql};Authentication={ActiveDirectoryDefault};Encrypt={yes};"
            "TrustServerCertificate={no}",
        ),
        ({"connection": "Server=a;Encrypt=no"}, "Server=a;Encrypt=no"),
        ({"connection": "encrypt = Optional ;Server=a"}, "encrypt = Optional ;Server=a"),
        ({"connection": "Server=a;"}, "Server=a;Encrypt=yes"),
        # What only looks like it, in a password, turns nothing off.
        (
            {"connection": "Server=a;PWD={x;Encrypt=no}"},
            "Server=a;PWD={x;Encrypt=no};Encrypt=yes",
        ),
        (
            {"connection": "Server=a;PWD={x}};Encrypt=no}"},
            "Server=a;PWD={x}};Encrypt=no};Encrypt=yes",
        ),
    ],
)
def test_what_the_driver_is_told(written: dict[str, object], told: str) -> None:
    assert connection_string(msgspec.convert(written, MssqlSettings)) == told


def test_secrets_are_not_shown(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASPARIAN_MSSQL", f"Server=sql;PWD={SECRET}")
    monkeypatch.setenv("CASPARIAN_MSSQL_PASSWORD", SECRET)
    settings = config.load(str(file))
    shown = f"{settings!r} {settings} {settings.database!r} {settings.mssql}"
    assert "geheim" not in shown
    assert "PWD" not in shown
    assert "sql.example.com" in shown


@pytest.mark.parametrize(
    "told",
    [
        {"connection": f"Server=127.0.0.1,1;UID=u;PWD={SECRET}"},
        {"connection": f"Server=127.0.0.1,1;UID=u;PWD={{{SECRET}"},
        {"connection": f"Server=127.0.0.1,1;UID=u;{SECRET}=1"},
        {"connection": "Server=127.0.0.1,1;UID=u;PWD={geheim}"},
        {"server": "127.0.0.1,1", "user": "u", "password": SECRET},
        {"server": "127.0.0.1,1", "user": "u", "password": "geheim\0"},
    ],
)
def test_secrets_are_in_no_error_and_no_log(
    told: dict[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody listens at port 1; and some of these the driver cannot even read."""
    monkeypatch.setattr(mssql_session, "LOGIN_SECONDS", 1)  # else it knocks all the while
    pytest.importorskip("mssql_python", reason="SECRETS ARE NOT TESTED: no mssql-python")
    database = DatabaseSettings(
        db_location=str(tmp_path / "l"), mssql=msgspec.convert(told, MssqlSettings)
    )
    with caplog.at_level(logging.DEBUG), pytest.raises(SinkUnavailable) as refused:
        list(sinks.open_sink("mssql://sales", database).records(()))
    lines = traceback.format_exception(refused.value)
    for text in (refused.value.message, refused.value.hint, caplog.text, "".join(lines)):
        assert "geheim" not in text
        assert "wort" not in text


def test_without_a_server_it_says_what_to_set(tmp_path: Path) -> None:
    database = DatabaseSettings(db_location=str(tmp_path / "l"))
    with pytest.raises(ConfigError, match="no SQL Server is configured") as refused:
        sinks.check_usable("mssql://sales", database)
    assert "CASPARIAN_MSSQL" in refused.value.hint
    sink = sinks.open_sink("mssql://sales", database)
    with pytest.raises(SinkUnavailable, match="no SQL Server is configured"):
        list(sink.records(()))
    sinks.check_usable("parquet:///x", database)


def test_without_the_driver_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mssql_python", None)
    with pytest.raises(ConfigError, match="mssql-python, which is not installed") as refused:
        check_configured(MssqlSettings(server="sql"))
    assert refused.value.hint == "pip install 'casparian-flow[mssql]'"


@pytest.mark.slow
def test_a_worker_needs_no_driver_and_no_secret(tmp_path: Path) -> None:
    """It stages beside the ledger, and looks at the columns."""
    code = (
        "import sys\n"
        "from casparian_flow.config import DatabaseSettings\n"
        "from casparian_flow.engine import sinks\n"
        f"database = DatabaseSettings(db_location={str(tmp_path / 'l')!r})\n"
        "sink = sinks.open_sink('mssql://sales', database)\n"
        "print(sink.stage_folder)\n"
        "sys.exit('mssql_python' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / ".casparian" / "l.stage")


def test_the_defaults_of_a_file_have_no_server() -> None:
    assert Settings().mssql == MssqlSettings()
    assert not Settings().mssql.server
    assert Settings().mssql.encrypt == "yes"
