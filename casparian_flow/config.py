"""Settings from one TOML file: every key with its unit and default.

The file is that of `--config`, else of `$CASPARIAN_CONFIG`, else the nearest `global_config.toml`
in the current directory or above it. Relative paths in it are relative to its folder. Only this
module reads environment variables. docs/configuration.md explains the keys to users.
"""

from __future__ import annotations

import hashlib
import json
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

Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]

_GUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the configuration file; an unknown key in it is an error."""


class ScanSettings(Section, frozen=True):
    """How often the daemon scans."""

    rescan_seconds: Positive = 60.0
    """Pause between full scans of a source root; file events only make scans sooner."""

    poll_seconds: Positive = 10.0
    """The same for a root without reliable events: a network filesystem, or a failed watcher."""

    scrub_days: Annotated[float, msgspec.Meta(ge=0)] = 7.0
    """Every file is read again this often, even if its size and times did not change; 0: never."""

    scrub_bytes_per_second: Count = 20 << 20
    """Limit of bytes read for that, per second."""


class StoreSettings(Section, frozen=True):
    """Whether the bytes of versions are kept, and how many; docs/store.md says what that costs."""

    keep: bool = True
    """Keep the bytes of each version that a scan records."""

    copy_limit_bytes: Count = 256 << 20
    """A larger file is never copied: its bytes are kept only if blocks can be shared."""

    keep_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Size of the store; 0: a tenth of the disk that is free without it, at most 32 GiB."""


class WorkerSettings(Section, frozen=True):
    """The pool of workers inside the daemon."""

    count: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    """Number of Workers; 0: one per core, at most 8."""

    guests: Count = 4
    """Warm guests per Worker; a guest serves one plugin version."""

    @property
    def effective(self) -> int:
        """The number of Workers to run."""
        return self.count or min(os.cpu_count() or 1, 8)


class JobSettings(Section, frozen=True):
    """How long and how often a job may run."""

    timeout_seconds: Positive = 600.0
    """Wall clock of one attempt; a plugin's MANIFEST may only lower it."""

    max_attempts: Count = 3
    """Attempts before a job is FAILED."""

    retry_seconds: Annotated[float, msgspec.Meta(ge=0)] = 5.0
    """Longest pause before the second attempt; four times as long before each further one, at
    most 15 minutes. The actual pause is random, up to that."""

    drain_seconds: Positive = 20.0
    """How long running jobs may finish after SIGTERM before they are released."""


class GuestSettings(Section, frozen=True):
    """Limits of the processes that run plugin code; a plugin's MANIFEST may only lower them."""

    sandbox: Literal["required", "best-effort", "off"] = "required"
    """`required`: run no plugin if a layer is missing; `best-effort`: use the layers that the
    platform has; `off`: no sandbox. Each attempt records its layers."""

    memory_bytes: Count = 4 << 30
    """Address space of a guest, including what its allocators reserve but do not use."""

    cpu_seconds: Positive = 3600.0
    """Processor time of one attempt, all threads together."""

    scratch_bytes: Annotated[int, msgspec.Meta(ge=0)] = 1 << 30
    """Largest scratch folder of a plugin that asks for one in its MANIFEST."""

    network: bool = False
    """Whether plugins that declare it in their MANIFEST may use the network."""

    output_limit_bytes: Count = 64 << 30
    """Arrow bytes that one attempt may publish."""

    environments_bytes: Count = 20 << 30
    """Size of all plugins' environments; the least recently used are removed beyond it."""

    environment_limit_bytes: Count = 12 << 30
    """Size of one environment, unpacked; a larger one is not built."""

    copy_limit_bytes: Count = 1 << 30
    """A larger file is not copied to the inbox, but hashed in place before and after the run."""

    batch_limit_bytes: Count = 256 << 20
    """Size of one batch; a guest that sends a larger one is killed before it is read."""

    recycle_jobs: Count = 1000
    """Jobs after which a guest is replaced by a new one."""


class OutputSettings(Section, frozen=True):
    """Default sink, and limits of sinks."""

    default_uri: str = "parquet://output"
    """Sink of a topic for which neither the MANIFEST nor `casparian topics set` names one."""

    split_bytes: Annotated[int, msgspec.Meta(ge=0)] = 2 << 30
    """A larger Parquet output becomes a folder of parts of about this size; 0: never split. Few
    outputs are larger, and a part can be copied and read at once."""

    roots: list[str] = msgspec.field(default_factory=lambda: ["."])
    """Folders that a MANIFEST's sinks must lie in; `casparian topics set` is not restricted."""

    keep_replaced_days: Annotated[float, msgspec.Meta(ge=0)] = 7.0
    """How long sinks keep the rows of outputs that do not stand any more, so that a plugin can be
    rolled back at once; 0: they are removed when they are replaced."""

    env: list[str] = []
    """Environment variables that a sink's URI may use, as in `parquet://${TEAM_DIR}/out`."""


class MssqlSettings(Section, frozen=True):
    """The SQL Server of `mssql://` sinks (docs/sinks_mssql.md). `repr` shows no secrets."""

    connection: str = ""
    """The whole ODBC connection string; it replaces the other keys except the last two.
    `CASPARIAN_MSSQL` takes precedence."""

    server: str = ""
    """Host, `host,port` or `host\\instance`; empty: no server."""

    database: str = ""
    """Empty: the login's default."""

    user: str = ""
    """A SQL login; empty with `authentication` or Kerberos."""

    password: str = ""
    """`CASPARIAN_MSSQL_PASSWORD` takes precedence, and is the better place."""

    authentication: str = ""
    """The driver's authentication mode, such as `ActiveDirectoryServicePrincipal`."""

    encrypt: Literal["yes", "strict", "no"] = "yes"
    """`yes` and `strict` (TDS 8) refuse a server without encryption; `no` is for tests."""

    trust_server_certificate: bool = False
    """Accept any certificate of the server."""

    lock_seconds: Positive = 30.0
    """Longest wait for another program's lock; then the sink is paused."""

    timeout_seconds: Annotated[int, msgspec.Meta(ge=1)] = 3600
    """Longest time of a statement, or of the transfer of an output; then the sink is paused."""

    def __repr__(self) -> str:
        return f"MssqlSettings(server={self.server!r}, database={self.database!r}, ...)"


class GatekeeperSettings(Section, frozen=True):
    """Changes of the Gatekeeper's rules; docs/security.md lists them."""

    allow: list[str] = []
    """Exceptions from the rules, such as `import:os` or `name:getattr`."""

    forbid: list[str] = []
    """Additional prohibitions, such as `import:requests`; they take precedence over `allow`."""


class AzureSettings(Section, frozen=True):
    """Azure AD, if publishers must sign in to it; both ids empty: local keys only."""

    tenant_id: str = ""
    """GUID of the tenant; `AZURE_TENANT_ID` takes precedence."""

    client_id: str = ""
    """GUID of the application; `AZURE_CLIENT_ID` takes precedence."""

    publishers: list[str] = []
    """Object ids of the people who may publish; empty: everyone in the tenant with a token."""

    def __post_init__(self) -> None:
        """Require GUIDs, since `common` and `organizations` would mean any tenant.

        Tokens have them in lower case.
        """
        checked = {
            "tenant_id": self.tenant_id and _guid("tenant id", self.tenant_id),
            "client_id": self.client_id and _guid("client id", self.client_id),
            "publishers": [_guid("publisher", object_id) for object_id in self.publishers],
        }
        for name, value in checked.items():
            msgspec.structs.force_setattr(self, name, value)

    @property
    def required(self) -> bool:
        """Whether publishers must sign in."""
        return bool(self.tenant_id and self.client_id)


def _guid(what: str, text: str) -> str:
    if not _GUID.fullmatch(text.lower()):
        raise ConfigError(
            f"Azure's {what} {text[:80]!r} is not a GUID, such as "
            "6e74172b-be56-4843-9ff4-e66a39bb12e3",
            "copy it from the Azure portal; names, `common` and `organizations` are not accepted",
        )
    return text.lower()


class ListenSettings(Section, frozen=True):
    """The socket of `python -m casparian_flow.main`."""

    endpoint: str = "tcp://127.0.0.1:5555"
    """Address for Workers in other processes; on the loopback interface only."""


FILE_NAME = "global_config.toml"

_LOOPBACK = re.compile(r"https://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?")


class DatabaseSettings(Section, frozen=True):
    """The ledger's database."""

    db_location: str = "casparian_flow.sqlite3"
    """Path of the SQLite database; created and migrated on first use."""

    store: StoreSettings = StoreSettings()
    """The table `[store]` (not a key of this one), since a scan gets only this object."""

    mssql: MssqlSettings = MssqlSettings()
    """The table `[mssql]`, for the same reason."""

    @property
    def path(self) -> Path:
        """Path of the database."""
        return Path(self.db_location)

    @property
    def state_folder(self) -> Path:
        """Folder of locks and guests, beside the database: all its configurations share it."""
        return self.path.parent / STATE_FOLDER

    @property
    def gate(self) -> Path:
        """Lock file that every write transaction of every process holds."""
        return self.state_folder / f"{self.path.name}.gate"

    @property
    def daemon_lock(self) -> Path:
        """Lock file of the one process that claims jobs."""
        return self.state_folder / f"{self.path.name}.daemon"

    @property
    def telling_lock(self) -> Path:
        """Lock file of whoever tells the sinks what readers are to see."""
        return self.state_folder / f"{self.path.name}.telling"

    @property
    def guests_folder(self) -> Path:
        """Folder with a folder for each running guest; the daemon empties it when it starts."""
        return self.state_folder / f"{self.path.name}.guests"

    @property
    def trials_folder(self) -> Path:
        """The same for the guests of trials, a folder for each process that has some."""
        return self.state_folder / f"{self.path.name}.trials"

    @property
    def stage_folder(self) -> Path:
        """Staged outputs for sinks without a folder."""
        return self.state_folder / f"{self.path.name}.stage"

    @property
    def store_folder(self) -> Path:
        """The bytes of this ledger's versions (`engine.contents`)."""
        return self.state_folder / "store" / self.path.name

    @property
    def earlier_store_folder(self) -> Path:
        """Where it was when its contents were called snapshots; the ledger's migration moves it."""
        return self.state_folder / "snapshots" / self.path.name

    @property
    def control_socket(self) -> Path:
        """The daemon's local socket, in a short folder: a socket's path has at most 108 bytes."""
        digest = hashlib.sha256(os.fsencode(self.path)).hexdigest()[:24]
        return runtime_folder() / f"{digest}.sock"

    @property
    def control_endpoint(self) -> str:
        """The local socket as a ZeroMQ address."""
        return f"ipc://{self.control_socket}"


class Settings(Section, frozen=True):
    """The whole configuration; every key has a default."""

    home: Path = Path()
    """Folder of the configuration file (not a key): base of relative paths."""

    database: DatabaseSettings = DatabaseSettings()
    scan: ScanSettings = ScanSettings()
    store: StoreSettings = StoreSettings()
    workers: WorkerSettings = WorkerSettings()
    jobs: JobSettings = JobSettings()
    guest: GuestSettings = GuestSettings()
    output: OutputSettings = OutputSettings()
    mssql: MssqlSettings = MssqlSettings()
    gatekeeper: GatekeeperSettings = GatekeeperSettings()
    azure: AzureSettings = AzureSettings()
    listen: ListenSettings = ListenSettings()


def __getattr__(name: str) -> Any:
    """Load `casparian_flow.config.settings` on first access."""
    if name == "settings":
        return load()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(path: str | None = None) -> Settings:
    """Read and check the configuration.

    Args:
        path: the file of `--config`; None searches as in the module's docstring.

    Raises:
        ConfigError: no file, invalid TOML, an unknown key or an invalid value.
    """
    file = find(path)
    try:
        raw = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}", "fix that line") from error
    try:
        inner = raw.get("database")
        for table, field in ((raw, "home"), (inner, "store"), (inner, "mssql")):
            if isinstance(table, dict) and field in table:
                raise msgspec.ValidationError(f"Object contains unknown field `{field}`")
        _refuse_snapshots(raw, file)
        checked = msgspec.convert(raw, Settings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{file}: {error}", "docs/configuration.md lists every key") from error
    home = file.parent
    # Resolved, so that all names of the database share its locks.
    location = os.path.realpath(home / checked.database.path)
    try:
        location.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the database cannot be at {location!r}: its name is not UTF-8",
            "choose another folder in [database] db_location",
        ) from error
    mssql = _mssql(checked.mssql)
    database = DatabaseSettings(db_location=location, store=checked.store, mssql=mssql)
    return msgspec.structs.replace(
        checked, home=home, database=database, mssql=mssql, azure=_azure(checked.azure, file)
    )


def _refuse_snapshots(raw: dict[str, Any], file: Path) -> None:
    """Say what to write in place of the table of earlier releases, which had three modes.

    Raises:
        ConfigError: the file has it.
    """
    old = raw.get("snapshots")
    if old is None:
        return
    known = old if isinstance(old, dict) else {}
    new = {"keep": known.get("mode") != "off"}
    new |= {key: known[key] for key in ("copy_limit_bytes", "keep_bytes") if key in known}
    lines = ", ".join(f"{key} = {json.dumps(value, default=str)}" for key, value in new.items())
    raise ConfigError(
        f"{file}: the table [snapshots] is [store] now, and `mode` is `keep`",
        f"replace it by [store] with {lines}   (docs/store.md)",
    )


def _mssql(written: MssqlSettings) -> MssqlSettings:
    """`[mssql]`, overridden by the environment."""
    return msgspec.structs.replace(
        written,
        connection=os.environ.get("CASPARIAN_MSSQL") or written.connection,
        password=os.environ.get("CASPARIAN_MSSQL_PASSWORD") or written.password,
    )


def _azure(written: AzureSettings, file: Path) -> AzureSettings:
    """`[azure]`, overridden by the environment."""
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
    """An environment variable in a sink's URI, which `[output] env` allows; None if not set."""
    return os.environ.get(name)


class Authority(NamedTuple):
    """An authority that replaces Azure AD in tests."""

    url: str
    """`https://`, a host of this machine, and maybe a port; no slash at the end."""

    ca: Path
    """The CA certificate of the authority, in PEM."""


def test_authority() -> Authority | None:
    """The authority of `CASPARIAN_TEST_AUTHORITY`, with its `..._CA` file; None: Azure AD.

    Tests replace Azure AD with it. It must be on this machine and use TLS; each use is logged.

    Raises:
        ConfigError: the address is not of that kind, or the CA file does not exist.
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
    """Kill this process at the crash point of `CASPARIAN_CRASH_AT` (`name[:n]`).

    `CASPARIAN_CRASH_LOG` is a file that gets a line for each crash point reached. Does nothing if
    neither is set.

    Raises:
        ConfigError: there is no such crash point, or the log cannot be written.
    """
    at, log = os.environ.get("CASPARIAN_CRASH_AT", ""), os.environ.get("CASPARIAN_CRASH_LOG", "")
    if at or log:
        crashpoints.arm(crashpoints.Trap(at, log))


def uv_environment() -> dict[str, str]:
    """The environment of uv: the user's variables, but only the system's programs.

    A file beside a plugin can make uv run programs from PATH, such as `nvidia-smi`
    (`torch-backend = "auto"`), and PATH may contain the plugin's own folder. A lock needs nothing
    from git, so git may not connect: it would run helper programs.
    """
    return dict(os.environ) | {"PATH": os.defpath, "GIT_ALLOW_PROTOCOL": "none"}


def find(path: str | None = None) -> Path:
    """The absolute path of the configuration file.

    Raises:
        ConfigError: there is none; the message lists where it was searched.
    """
    if file := named(path):
        if not file.is_file():
            raise ConfigError(f"no configuration file at {file}", "casparian init")
        return file
    current = Path.cwd()
    for folder in (current, *current.parents):
        if (folder / FILE_NAME).is_file():
            return folder / FILE_NAME
    raise ConfigError(
        f"no configuration: --config and $CASPARIAN_CONFIG are not set, and {current} and the "
        f"folders above it have no {FILE_NAME}",
        "casparian init   (creates one here)",
    )


def named(path: str | None = None) -> Path | None:
    """The absolute path of `--config` or `$CASPARIAN_CONFIG`; None if neither is given."""
    chosen = path or os.environ.get("CASPARIAN_CONFIG")
    return Path(os.path.abspath(chosen)) if chosen else None


def runtime_folder() -> Path:
    """Folder for sockets and key files, with a short path; `engine.wire` keeps it private."""
    named = os.environ.get("XDG_RUNTIME_DIR")
    if named:
        return Path(named) / "casparian"
    return Path(tempfile.gettempdir()) / f"casparian-{os.getuid()}"


def keys_folder() -> Path:
    """Folder of the user's signing keys."""
    return _base("XDG_CONFIG_HOME", ".config") / "casparian" / "keys"


def cache_folder() -> Path:
    """Folder of plugin environments and the guest's files; it may be deleted at any time."""
    return _base("XDG_CACHE_HOME", ".cache") / "casparian"


def _base(variable: str, fallback: str) -> Path:
    named = os.environ.get(variable)
    return Path(named) if named else Path.home() / fallback
