"""Settings: one TOML file, checked as a whole; `sections` has its tables with every default.

The file is found as `--config`, else `$CASPARIAN_CONFIG`, else the nearest `global_config.toml`
upward from the current directory. Relative paths in it are relative to its folder. This module
is the only reader of the environment.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from casparian_flow import crashpoints
from casparian_flow.atomic import STATE_FOLDER
from casparian_flow.errors import ConfigError
from casparian_flow.sections import (
    AzureSettings,
    GatekeeperSettings,
    GuestSettings,
    JobSettings,
    ListenSettings,
    MssqlSettings,
    OutputSettings,
    ScanSettings,
    Section,
    SnapshotSettings,
    WorkerSettings,
)

FILE_NAME = "global_config.toml"

_OF_A_PERSON = {
    "CASPARIAN_CONFIG", "CASPARIAN_CRASH_AT", "CASPARIAN_CRASH_LOG", "AZURE_TENANT_ID",
    "AZURE_CLIENT_ID", "CASPARIAN_MSSQL", "CASPARIAN_MSSQL_PASSWORD",
}  # fmt: skip
"""Variables that must not reach a command that is tried on a scratch tree."""

_LOOPBACK = re.compile(r"https://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?")


class DatabaseSettings(Section, frozen=True):
    """Where the ledger lives."""

    db_location: str = "casparian_flow.sqlite3"
    """Path of the SQLite database; created and brought up to date on first use."""

    snapshots: SnapshotSettings = SnapshotSettings()
    """The table `[snapshots]` (not a key of this one): a scan knows the database and no more."""

    mssql: MssqlSettings = MssqlSettings()
    """The table `[mssql]`, for the same reason: a scan asks the sinks what they hold."""

    @property
    def path(self) -> Path:
        return Path(self.db_location)

    @property
    def state_folder(self) -> Path:
        """Locks and guests' folders live beside the database they belong to.

        Two configurations that name one database therefore meet the same locks.
        """
        return self.path.parent / STATE_FOLDER

    @property
    def gate(self) -> Path:
        """The file whose lock every writing transaction of every process holds."""
        return self.state_folder / f"{self.path.name}.gate"

    @property
    def daemon_lock(self) -> Path:
        """The file whose lock the one process that claims jobs holds."""
        return self.state_folder / f"{self.path.name}.daemon"

    @property
    def guests_folder(self) -> Path:
        """One folder a running guest, with the guest's inbox in it.

        This database's own: its daemon empties it at the start, while another one's guests run.
        """
        return self.state_folder / f"{self.path.name}.guests"

    @property
    def stage_folder(self) -> Path:
        """Outputs on their way to a sink that has no folder."""
        return self.state_folder / f"{self.path.name}.stage"

    @property
    def snapshots_folder(self) -> Path:
        """The store of this database's snapshots; `services.snapshots` says what is in it."""
        return self.state_folder / "snapshots" / self.path.name

    def snapshot(self, content_hash: str) -> Path:
        """Where the store has this content, if it has it."""
        return self.snapshots_folder / content_hash[:2] / content_hash

    @property
    def control_socket(self) -> Path:
        """The daemon's local socket; in a short folder, since a socket path has 108 bytes."""
        digest = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:24]
        return runtime_folder() / f"{digest}.sock"

    @property
    def control_endpoint(self) -> str:
        """The same as a ZeroMQ address."""
        return f"ipc://{self.control_socket}"


class Settings(Section, frozen=True):
    """The whole configuration; `[database] db_location` alone is complete."""

    home: Path = Path()
    """Folder of the configuration file (not a key of it): relative paths start here."""

    database: DatabaseSettings = DatabaseSettings()
    scan: ScanSettings = ScanSettings()
    snapshots: SnapshotSettings = SnapshotSettings()
    workers: WorkerSettings = WorkerSettings()
    jobs: JobSettings = JobSettings()
    guest: GuestSettings = GuestSettings()
    output: OutputSettings = OutputSettings()
    mssql: MssqlSettings = MssqlSettings()
    gatekeeper: GatekeeperSettings = GatekeeperSettings()
    azure: AzureSettings = AzureSettings()
    listen: ListenSettings = ListenSettings()


if TYPE_CHECKING:
    settings: Settings


def __getattr__(name: str) -> Any:
    """`casparian_flow.config.settings`, read when it is asked for and not before."""
    if name == "settings":
        return load()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(path: str | None = None) -> Settings:
    """Read and check the configuration.

    Args:
        path: the file `--config` named; None searches as the module's docstring says.

    Raises:
        ConfigError: no file, a file that is not TOML, a key nobody knows or a value out of range.
    """
    file = find(path)
    try:
        raw = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}", "mend that line") from error
    try:
        inner = raw.get("database")
        for table, field in ((raw, "home"), (inner, "snapshots"), (inner, "mssql")):
            if isinstance(table, dict) and field in table:
                raise msgspec.ValidationError(f"Object contains unknown field `{field}`")
        checked = msgspec.convert(raw, Settings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{file}: {error}", "docs/configuration.md lists every key") from error
    home = file.parent
    # Resolved: its locks lie beside the one file, however many names lead to it.
    location = os.path.realpath(home / checked.database.path)
    try:
        location.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the database cannot be at {location!r}: a part of that name is not UTF-8",
            "name a place in another folder as [database] db_location",
        ) from error
    mssql = _mssql(checked.mssql)
    database = DatabaseSettings(db_location=location, snapshots=checked.snapshots, mssql=mssql)
    return msgspec.structs.replace(
        checked, home=home, database=database, mssql=mssql, azure=_azure(checked.azure, file)
    )


def _mssql(written: MssqlSettings) -> MssqlSettings:
    """What the file says of SQL Server, under what the environment says."""
    return msgspec.structs.replace(
        written,
        connection=os.environ.get("CASPARIAN_MSSQL") or written.connection,
        password=os.environ.get("CASPARIAN_MSSQL_PASSWORD") or written.password,
    )


def _azure(written: AzureSettings, file: Path) -> AzureSettings:
    """What the file says of Azure, under what the environment says."""
    effective = msgspec.structs.replace(
        written,
        tenant_id=os.environ.get("AZURE_TENANT_ID") or written.tenant_id,
        client_id=os.environ.get("AZURE_CLIENT_ID") or written.client_id,
    )
    if bool(effective.tenant_id) != bool(effective.client_id):
        raise ConfigError(
            f"only one of Azure's tenant and client id is set (environment, or [azure] in {file})",
            "set both AZURE_TENANT_ID and AZURE_CLIENT_ID, or neither",
        )
    return effective


def variable(name: str) -> str | None:
    """A variable that the configuration lets a sink's URI use; None where it is not set."""
    return os.environ.get(name)


class Authority(NamedTuple):
    """Where identities come from, in place of Azure AD."""

    url: str
    """`https://` and a host of this machine, perhaps a port; no slash at the end."""

    ca: Path
    """The certificate that signed the authority's own, in PEM."""


def test_authority() -> Authority | None:
    """What `CASPARIAN_TEST_AUTHORITY` and `CASPARIAN_TEST_AUTHORITY_CA` name; None: Azure AD.

    A test stands in for Azure AD with it. Only this machine can be named, over TLS, and whoever
    uses it says so each time.

    Raises:
        ConfigError: it is not such an address, or its CA file is not there.
    """
    url = os.environ.get("CASPARIAN_TEST_AUTHORITY")
    if not url:
        return None
    if not _LOOPBACK.fullmatch(url):
        raise ConfigError(
            f"CASPARIAN_TEST_AUTHORITY {url[:80]!r} is not an address of this machine, such as "
            "https://localhost:8443; it is for tests only",
            "unset CASPARIAN_TEST_AUTHORITY",
        )
    ca = Path(os.environ.get("CASPARIAN_TEST_AUTHORITY_CA", ""))
    if not ca.is_file():
        raise ConfigError(
            f"CASPARIAN_TEST_AUTHORITY is set, but CASPARIAN_TEST_AUTHORITY_CA {str(ca)!r} "
            "is not a file",
            "name the authority's CA file, or unset both",
        )
    return Authority(url, ca)


def arm_crashpoints() -> None:
    """Have this process die at the crash point that `CASPARIAN_CRASH_AT` names (`name[:n]`).

    `CASPARIAN_CRASH_LOG` names a file that gets a line for each one it comes to. Without either,
    nothing happens.

    Raises:
        ConfigError: there is no crash point of that name, or the log cannot be written.
    """
    at, log = os.environ.get("CASPARIAN_CRASH_AT", ""), os.environ.get("CASPARIAN_CRASH_LOG", "")
    if at or log:
        crashpoints.arm(crashpoints.Trap(at, log))


def private_environment(person: Path, runtime: Path) -> dict[str, str]:
    """The environment of a command that must not touch this person's keys and daemons.

    Args:
        person: holds its keys. Plugins' environments are shared with this person's own.
        runtime: holds its sockets; short.
    """
    ours = {name: value for name, value in os.environ.items() if name not in _OF_A_PERSON}
    return ours | {
        "XDG_CONFIG_HOME": str(person),
        "XDG_RUNTIME_DIR": str(runtime),
        "XDG_CACHE_HOME": str(cache_folder().parent),
    }


def uv_environment() -> dict[str, str]:
    """The environment of uv: index and secrets are this person's, programs are the system's.

    A file beside a plugin can make uv start programs that it finds on the path, such as
    `nvidia-smi` (`torch-backend = "auto"`), and the path may lead to the plugin's own folder. A
    lock takes nothing from git, so git opens no connection, for which it would run helpers.
    """
    return dict(os.environ) | {"PATH": os.defpath, "GIT_ALLOW_PROTOCOL": "none"}


def find(path: str | None = None) -> Path:
    """The configuration file in force, absolute.

    Raises:
        ConfigError: there is none; the message lists the places tried.
    """
    if file := named(path):
        if not file.is_file():
            raise ConfigError(f"no configuration at {file}", "casparian init")
        return file
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / FILE_NAME).is_file():
            return folder / FILE_NAME
    raise ConfigError(
        f"no configuration: tried --config, $CASPARIAN_CONFIG (both unset) and {FILE_NAME} "
        f"in {here} and every folder above it",
        "casparian init   (makes one here)",
    )


def named(path: str | None = None) -> Path | None:
    """The file that `--config` or `$CASPARIAN_CONFIG` names, absolute; None where neither does."""
    chosen = path or os.environ.get("CASPARIAN_CONFIG")
    return Path(os.path.abspath(chosen)) if chosen else None


def runtime_folder() -> Path:
    """A short, private folder for sockets and their keys; `engine.wire` sees to it that it is."""
    named = os.environ.get("XDG_RUNTIME_DIR")
    if named:
        return Path(named) / "casparian"
    return Path(tempfile.gettempdir()) / f"casparian-{os.getuid()}"


def keys_folder() -> Path:
    """Where this person's signing keys live."""
    return _base("XDG_CONFIG_HOME", ".config") / "casparian" / "keys"


def cache_folder() -> Path:
    """Where plugin environments and the guest's files live; it may be deleted at any time."""
    return _base("XDG_CACHE_HOME", ".cache") / "casparian"


def _base(variable: str, fallback: str) -> Path:
    named = os.environ.get(variable)
    return Path(named) if named else Path.home() / fallback
