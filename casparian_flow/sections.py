"""The tables of the configuration file: every setting, its unit, its default and why.

`config` reads the file and puts these together; docs/configuration.md is written from them.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Literal

import msgspec

from casparian_flow.errors import ConfigError

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
