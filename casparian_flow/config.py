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
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec

from casparian_flow import crashpoints
from casparian_flow.durable import STATE_FOLDER
from casparian_flow.errors import ConfigError

if TYPE_CHECKING:
    settings: Settings


# The tables of the configuration file: every setting, its unit, its default and why.
#
# `config` reads the file and puts these together; docs/configuration.md is written from them.


Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]

_GUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the configuration file; an unknown key in it is an error."""


class ScanSettings(Section, frozen=True):
    """How often the daemon looks at everything, whatever the watcher said."""

    rescan_seconds: Positive = 60.0
    """Pause between full scans of a source root; events only hasten what a scan would find."""

    poll_seconds: Positive = 10.0
    """The same where no watcher hears of all that changes: it is polled, or its watcher is ill."""

    scrub_days: Annotated[float, msgspec.Meta(ge=0)] = 7.0
    """Every file is read again this often, whatever its stamps say; 0 never does."""

    scrub_bytes_per_second: Count = 20 << 20
    """How much of it may be read in a second."""


class SnapshotSettings(Section, frozen=True):
    """What is kept of the bytes of recorded versions; docs/snapshots.md says what each costs."""

    mode: Literal["off", "reflink", "copy"] = "reflink"
    """`reflink` shares a file's blocks where the filesystem can, which costs no disk, and keeps
    nothing elsewhere; `copy` copies there; `off` keeps nothing anywhere."""

    copy_limit_bytes: Count = 256 << 20
    """A larger file is never copied; its blocks are shared, or it has no snapshot."""

    keep_bytes: Count = 32 << 30
    """Size of the store. What no unfinished job needs makes room, the longest unseen first."""


class WorkerSettings(Section, frozen=True):
    """The pool of workers inside the daemon."""

    count: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    """Workers to run; 0 means one a core, at most 8."""

    guests: Count = 4
    """Warm guests a worker keeps; a guest serves one plugin version."""

    @property
    def effective(self) -> int:
        return self.count or min(os.cpu_count() or 1, 8)


class JobSettings(Section, frozen=True):
    """How long and how often a job may run."""

    timeout_seconds: Positive = 600.0
    """Wall clock of one attempt; a plugin's MANIFEST may only lower it."""

    max_attempts: Count = 3
    """Attempts before a job is FAILED."""

    retry_seconds: Annotated[float, msgspec.Meta(ge=0)] = 5.0
    """Longest pause before the second attempt; four times as long before each further one, at
    most 15 minutes. How long it really is, is drawn anew each time."""

    drain_seconds: Positive = 20.0
    """How long running jobs may finish after SIGTERM before they are released."""


class GuestSettings(Section, frozen=True):
    """Limits of the processes that run plugin code; a plugin's MANIFEST may only lower them."""

    sandbox: Literal["required", "best-effort", "off"] = "required"
    """`required` runs no plugin where the sandbox is not whole; `best-effort` takes what the
    platform has; `off` takes nothing. What a job ran under stands in its attempt."""

    memory_bytes: Count = 4 << 30
    """Address space of a guest; what its allocators reserve counts, not only what they use."""

    cpu_seconds: Positive = 3600.0
    """Processor time of one attempt, all threads together."""

    scratch_bytes: Annotated[int, msgspec.Meta(ge=0)] = 1 << 30
    """Scratch space a plugin may have that asks for it in its MANIFEST; else it has none."""

    network: bool = False
    """Whether plugins that declare it in their MANIFEST may use the network."""

    output_limit_bytes: Count = 64 << 30
    """Arrow bytes that one attempt may publish."""

    environments_bytes: Count = 20 << 30
    """Plugins' environments kept on this machine; beyond it the least recently used ones go."""

    environment_limit_bytes: Count = 12 << 30
    """What one plugin's environment may have, unpacked; a larger one is not built."""

    copy_limit_bytes: Count = 1 << 30
    """A larger file is not copied to the inbox: it is hashed in place before and after the run."""

    batch_limit_bytes: Count = 256 << 20
    """A guest that sends a larger batch is stopped before the batch is read."""

    recycle_jobs: Count = 1000
    """Jobs after which a guest is replaced by a fresh one."""


class OutputSettings(Section, frozen=True):
    """Where topics go that nobody placed."""

    default_uri: str = "parquet://output"
    """Sink of a topic that neither the MANIFEST nor `casparian topics set` names."""

    split_bytes: Annotated[int, msgspec.Meta(ge=0)] = 2 << 30
    """A Parquet output beyond this becomes a folder of parts, each about so large; 0 never splits.
    So large that few outputs are, and so small that a part is copied and read at a time."""

    roots: list[str] = msgspec.field(default_factory=lambda: ["."])
    """Folders that a MANIFEST's sinks must lie in; a person's own word is not restricted."""

    env: list[str] = []
    """Environment variables that a sink's URI may use, as in `parquet://${TEAM_DIR}/out`."""


class MssqlSettings(Section, frozen=True):
    """The SQL Server that `mssql://` sinks are tables of (docs/sinks_mssql.md).

    What is secret is never shown: not by `repr`, so not in a traceback either.
    """

    connection: str = ""
    """The whole ODBC connection string; the other keys but the last two are then not read.
    `CASPARIAN_MSSQL` wins."""

    server: str = ""
    """Host, `host,port` or `host\\instance`; empty: there is no server."""

    database: str = ""
    """Empty: the login's own."""

    user: str = ""
    """A SQL login; empty with `authentication` or the machine's own credentials (Kerberos)."""

    password: str = ""
    """Better in the environment: `CASPARIAN_MSSQL_PASSWORD` wins."""

    authentication: str = ""
    """Such as `ActiveDirectoryServicePrincipal`, in the driver's words."""

    encrypt: Literal["yes", "strict", "no"] = "yes"
    """`yes` and `strict` (TDS 8) refuse a server that does not; `no` is for tests."""

    trust_server_certificate: bool = False
    """Whether a certificate that nobody vouches for will do."""

    lock_seconds: Positive = 30.0
    """How long another program's lock is waited for, before the sink is paused."""

    timeout_seconds: Annotated[int, msgspec.Meta(ge=1)] = 3600
    """How long one statement or the transfer of one output may take, before the sink is paused."""

    def __repr__(self) -> str:
        return f"MssqlSettings(server={self.server!r}, database={self.database!r}, ...)"


class GatekeeperSettings(Section, frozen=True):
    """What the Gatekeeper lets pass, besides its ruleset; docs/security.md has the rules."""

    allow: list[str] = []
    """Exceptions, such as `import:os` or `name:getattr`."""

    forbid: list[str] = []
    """What is refused besides, such as `import:requests`; it wins over `allow`."""


class AzureSettings(Section, frozen=True):
    """Azure AD, where publishers must sign in to it; both ids empty: local keys alone."""

    tenant_id: str = ""
    """GUID of the tenant; `AZURE_TENANT_ID` wins."""

    client_id: str = ""
    """GUID of the application; `AZURE_CLIENT_ID` wins."""

    publishers: list[str] = []
    """Object ids of those who may publish; empty: everyone whom the tenant gives a token."""

    def __post_init__(self) -> None:
        """Tokens name GUIDs in lower case; `common` and `organizations` would be any tenant."""
        checked = {
            "tenant_id": self.tenant_id and _guid("tenant id", self.tenant_id),
            "client_id": self.client_id and _guid("client id", self.client_id),
            "publishers": [_guid("publisher", each) for each in self.publishers],
        }
        for name, value in checked.items():
            msgspec.structs.force_setattr(self, name, value)

    @property
    def required(self) -> bool:
        return bool(self.tenant_id and self.client_id)


def _guid(what: str, text: str) -> str:
    if not _GUID.fullmatch(text.lower()):
        raise ConfigError(
            f"Azure's {what} {text[:80]!r} is not a GUID, such as "
            "6e74172b-be56-4843-9ff4-e66a39bb12e3",
            "copy it from the Azure portal; names, `common` and `organizations` will not do",
        )
    return text.lower()


class ListenSettings(Section, frozen=True):
    """The socket of `python -m casparian_flow.main`."""

    endpoint: str = "tcp://127.0.0.1:5555"
    """Where workers in other processes connect; the loopback interface only."""


FILE_NAME = "global_config.toml"

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
