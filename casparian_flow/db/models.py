"""The ledger's tables: words, columns and the rules the database itself enforces.

No behaviour here. `db/migrations/` holds the same schema as frozen SQL, with the triggers; a test
compares the two. Times called `_at` are UTC; clock readings used in arithmetic are seconds since
the epoch. Users edit `SourceRoot`, `RoutingRule`, `TopicConfig` and `PluginConfig` through these
classes; everything else is written by the modules of `db` only.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from sqlalchemy import (
    CheckConstraint,
    ForeignKey,
    Index,
    MetaData,
    UniqueConstraint,
    func,
    select,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, validates

# What every table of the ledger is declared with.


def utcnow() -> datetime:
    """Now, in UTC, without a zone: the form of every `_at` column."""
    return datetime.now(UTC).replace(tzinfo=None)


class Base(DeclarativeBase):
    """Declarative base; constraint names are fixed so that migrations can name them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


# Where a job and an output can be: the words of the status columns.


PAUSED = "paused: "
"""Begins the `reason` of a job that waits for a sink or the machine, not for its own retry."""


class JobStatus(StrEnum):
    """Where a job is; docs/job_lifecycle.md draws the arrows."""

    QUEUED = "QUEUED"
    """Waits for a worker, or for `not_before`."""
    RUNNING = "RUNNING"
    """A worker holds it under the current fence."""
    COMMITTING = "COMMITTING"
    """Decided: its output will be published, whatever happens."""
    COMPLETED = "COMPLETED"
    """Every output is visible in its sink."""
    FAILED = "FAILED"
    """Attempts used up, or an error that would repeat: the dead letters."""
    ABORTED = "ABORTED"
    """A person said no."""
    SUPERSEDED = "SUPERSEDED"
    """The version's bytes were gone or changed before it could run."""


class OutputState(StrEnum):
    """Where an output is."""

    PLANNED = "PLANNED"
    PUBLISHED = "PUBLISHED"
    REFUSED = "REFUSED"


class Retraction(StrEnum):
    """Where a retracted output is; the sink is asked between the first word and the second."""

    RETRACTING = "RETRACTING"
    RETRACTED = "RETRACTED"
    REINSTATING = "REINSTATING"


JOB_ARROWS = {
    "": {"QUEUED"},
    "QUEUED": {"RUNNING", "ABORTED", "SUPERSEDED"},
    "RUNNING": {"COMMITTING", "QUEUED", "FAILED", "ABORTED", "SUPERSEDED"},
    "COMMITTING": {"COMPLETED", "FAILED"},
    "COMPLETED": {"QUEUED"},
    "FAILED": {"QUEUED"},
    "ABORTED": {"QUEUED"},
    "SUPERSEDED": {"QUEUED"},
}
"""Where a job may go from each status, and from nothing; triggers of the database say the same."""

OUTPUT_ARROWS = {
    "": {"PLANNED"},
    "PLANNED": {"PUBLISHED", "REFUSED", ""},
    "PUBLISHED": {"PLANNED"},
    "REFUSED": {""},
}
"""Where an output may go; to nothing, since a new plan forgets what was not published."""


# The tables that only grow: what was deployed, signed, tried and done.
#
# No row of these is ever updated or deleted; triggers of the database refuse it.


class Plugin(Base):
    """A deployed artifact: immutable."""

    __tablename__ = "cf_plugin"
    __table_args__ = (UniqueConstraint("name", "version"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    version: Mapped[str]
    source: Mapped[bytes]
    lock: Mapped[str]
    manifest: Mapped[str]
    """JSON of what was read from the source."""
    artifact_hash: Mapped[str]
    public_key: Mapped[bytes]
    signature: Mapped[bytes]
    publisher: Mapped[str]
    """Who published: the key's id."""
    deployed_at: Mapped[datetime] = mapped_column(default=utcnow)
    statement: Mapped[bytes | None]
    """What was signed, byte for byte; NULL where an earlier release signed it in its own form."""
    verdict: Mapped[str] = mapped_column(default="", server_default="")
    """JSON: the Gatekeeper's ruleset and policy under which it was let in."""


class TrustStatement(Base):
    """What people signed about keys and plugins, in order: the trust of this ledger.

    Replaying the rows from the first gives which keys are trusted for which plugins, which keys
    are revoked, and which versions were activated or disabled.
    """

    __tablename__ = "cf_trust_statement"

    seq: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    """trust-key, revoke-key, rotate-key, activate, disable."""
    payload: Mapped[bytes]
    """What was signed, byte for byte: JSON, with the hash of the row before in it."""
    public_key: Mapped[bytes]
    signature: Mapped[bytes]
    countersignature: Mapped[bytes] = mapped_column(default=b"")
    """The new key's signature over the same bytes, where a key is rotated."""


class LedgerIdentity(Base):
    """The one row that tells this ledger from every other; signatures name it."""

    __tablename__ = "cf_ledger_identity"

    id: Mapped[str] = mapped_column(primary_key=True)
    """32 random hexadecimal digits, made when the ledger was."""


class Epoch(Base):
    """One run of a process that claims jobs; the newest is the only living one."""

    __tablename__ = "cf_epoch"

    id: Mapped[int] = mapped_column(primary_key=True)
    started_at: Mapped[datetime] = mapped_column(default=utcnow)
    pid: Mapped[int]
    host: Mapped[str]


class Attempt(Base):
    """One run of a job, written when it ended."""

    __tablename__ = "cf_attempt"
    __table_args__ = (UniqueConstraint("job_id", "fence"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("cf_processing_queue.id"))
    fence: Mapped[int]
    epoch: Mapped[int] = mapped_column(ForeignKey("cf_epoch.id"))
    worker: Mapped[str]
    outcome: Mapped[str]
    error: Mapped[str] = mapped_column(default="")
    log: Mapped[str] = mapped_column(default="")
    """What the plugin printed, and its traceback; at most 64 KiB."""
    seconds: Mapped[float] = mapped_column(default=0.0)
    ended_at: Mapped[datetime] = mapped_column(default=utcnow)
    sandbox: Mapped[str] = mapped_column(default="", server_default="")
    """What the guest was held by; empty where none ran."""
    fault: Mapped[str] = mapped_column(default="", server_default="")
    """The class of the error (`casparian_flow.errors`); empty where it ended well."""
    signal: Mapped[str] = mapped_column(default="", server_default="")
    """What ended the guest, such as `SIGSEGV`; empty where no signal did."""
    exit_code: Mapped[int | None]
    """Of the guest; NULL where it lived on or a signal ended it."""
    batches: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    rows: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    """What had come of its output when it ended."""
    max_rss_bytes: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    """The most memory its guest had held so far; 0 where nobody measured it."""
    cpu_seconds: Mapped[float] = mapped_column(default=0.0, server_default=text("0"))
    """Processor time of the guest in this attempt."""


class FoundOutput(Base):
    """An output that stood in a sink and not in this ledger, as an inventory found it.

    The ledger was lost, or is older than its sinks. Its ids are not given again; the version and
    the job that it names get them back when the version's content is found again.
    """

    __tablename__ = "cf_found_output"
    __table_args__ = (
        Index("ix_cf_found_output_version", "source", "path", "ordinal"),
        Index("ix_cf_found_output_file_version_id", "file_version_id"),
        Index("ix_cf_found_output_job_id", "job_id"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    output_key: Mapped[str] = mapped_column(unique=True)
    location: Mapped[str]
    """The sink with its path made absolute."""
    topic: Mapped[str]
    uri: Mapped[str]
    target: Mapped[str]
    rows: Mapped[int]
    digest: Mapped[str]
    job_id: Mapped[int]
    file_version_id: Mapped[int]
    source: Mapped[str]
    """Name of the source root; empty where an earlier release published it."""
    path: Mapped[bytes]
    ordinal: Mapped[int]
    content_hash: Mapped[str]
    size_bytes: Mapped[int]
    artifact_hash: Mapped[str]
    plugin_name: Mapped[str]
    plugin_version: Mapped[str]
    found_at: Mapped[datetime] = mapped_column(default=utcnow)
    mode: Mapped[str] = mapped_column(default="append", server_default="append")
    slot: Mapped[str] = mapped_column(default="", server_default="")


_ABOUT_TRUST = "action IN ('trust-key', 'revoke-key', 'rotate-key', 'activate', 'disable')"


class AuditEntry(Base):
    """What people did and what was committed, each row hashed with the one before."""

    __tablename__ = "cf_audit"
    __table_args__ = (
        Index("ix_cf_audit_trust", "seq", sqlite_where=text(_ABOUT_TRUST)),
        Index("ix_cf_audit_seal", "seq", sqlite_where=text("action = 'seal'")),
    )

    seq: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[str]
    actor: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str]
    detail: Mapped[str]
    """JSON."""
    previous: Mapped[str]
    hash: Mapped[str]
    """SHA-256 over every other column, hexadecimal."""


# What users import from here is all of it, wherever it is written down.


def _name_of_root(context: Any) -> str:
    """The directory's own name, numbered if another root has it: output keys contain it."""
    base = Path(context.get_current_parameters()["path"]).name or "root"
    taken = set(
        context.connection.execute(
            select(SourceRoot.name).where(func.substr(SourceRoot.name, 1, len(base)) == base)
        ).scalars()
    )
    names = (base if n == 1 else f"{base}-{n}" for n in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)


class SourceRoot(Base):
    """A watched directory."""

    __tablename__ = "cf_source_root"
    __table_args__ = (CheckConstraint("settle_seconds >= 0", name="settle"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str] = mapped_column(unique=True)
    """Absolute; a relative path is made so when the object is created."""
    name: Mapped[str] = mapped_column(unique=True, default=_name_of_root)
    active: Mapped[bool] = mapped_column(default=True)
    ignore: Mapped[str] = mapped_column(default="")
    """gitignore patterns, a line each, besides the built-in ones."""
    settle_seconds: Mapped[float] = mapped_column(default=2.0)
    """A file that changed less than this ago is not at rest; one-shot scans wait for it."""
    done_file: Mapped[str] = mapped_column(default="", server_default="")
    """Name of the marker without which a file is not taken: `{name}.done`; empty for none."""
    min_age_seconds: Mapped[float] = mapped_column(default=0.0, server_default="0")
    """A file that changed less than this ago is left to a later scan; nobody waits for it."""

    locations: Mapped[list[FileLocation]] = relationship(back_populates="source_root")

    def __init__(self, **columns: Any) -> None:
        if columns.get("name", "") is None:
            del columns["name"]
        super().__init__(**columns)

    @validates("path")
    def _absolute(self, _key: str, path: str) -> str:
        return os.path.abspath(path)


class ScanState(Base):
    """What the last scan of a source root found."""

    __tablename__ = "cf_scan_state"

    source_root_id: Mapped[int] = mapped_column(ForeignKey("cf_source_root.id"), primary_key=True)
    started: Mapped[float] = mapped_column(default=0.0)
    """Start of the last scan that finished, seconds since the epoch."""
    finished: Mapped[float] = mapped_column(default=0.0)
    files: Mapped[int] = mapped_column(default=0)
    unreadable: Mapped[int] = mapped_column(default=0)
    unsettled: Mapped[int] = mapped_column(default=0)
    problem: Mapped[str] = mapped_column(default="")
    """Why the root is frozen; empty where it is not."""
    device: Mapped[int | None]
    """Device of the root, to notice a lost mount."""
    routed: Mapped[str] = mapped_column(default="")
    """Fingerprint of the routing that every present location has been through."""
    waiting: Mapped[int] = mapped_column(default=0, server_default="0")
    """Files that lack their done file or their minimum age."""
    held: Mapped[int] = mapped_column(default=0, server_default="0")
    """Files that vanished with so many others at once that nobody believes it yet."""
    held_since: Mapped[float] = mapped_column(default=0.0, server_default="0")
    """When those were first found missing, seconds since the epoch; 0 where there are none."""
    watch: Mapped[str] = mapped_column(default="", server_default="")
    """How the daemon hears of changes: `watching`, `polling: why` or `degraded: why`."""
    missed: Mapped[int] = mapped_column(default=0, server_default="0")
    """Changed files, ever, that the watcher should have announced and did not."""
    scrub_after: Mapped[int] = mapped_column(default=0, server_default="0")
    """The last location the scrub under way has read; 0 where none is."""
    scrubbed: Mapped[float] = mapped_column(default=0.0, server_default="0")
    """When every present file had last been read again, seconds since the epoch."""
    hidden: Mapped[int] = mapped_column(default=0, server_default="0")
    """Changes, ever, that only a scrub has found: the stamps of the file did not show them."""


class Unsettled(Base):
    """A file that every scan since has found being written."""

    __tablename__ = "cf_unsettled"

    source_root_id: Mapped[int] = mapped_column(ForeignKey("cf_source_root.id"), primary_key=True)
    path: Mapped[bytes] = mapped_column(primary_key=True)
    """Relative to the source root, as the filesystem has it."""
    first_seen: Mapped[float]
    """When the first of those scans found it, seconds since the epoch."""


class Directory(Base):
    """A directory under a source root, with a digest that says nothing in it has changed."""

    __tablename__ = "cf_directory"
    __table_args__ = (UniqueConstraint("source_root_id", "path"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    source_root_id: Mapped[int] = mapped_column(ForeignKey("cf_source_root.id"))
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("cf_directory.id"), index=True)
    path: Mapped[bytes]
    """Relative to the source root; empty for the root itself."""
    digest: Mapped[bytes | None]
    """Over the names and stat identities in it; NULL while anything in it needs another look."""


class FileLocation(Base):
    """A path under a source root, for as long as it is known."""

    __tablename__ = "cf_file_location"
    __table_args__ = (UniqueConstraint("source_root_id", "path"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    source_root_id: Mapped[int] = mapped_column(ForeignKey("cf_source_root.id"))
    directory_id: Mapped[int] = mapped_column(ForeignKey("cf_directory.id"), index=True)
    path: Mapped[bytes]
    """Relative path as the filesystem has it: any bytes."""
    rel_path: Mapped[str]
    """The same as text with POSIX separators; bytes that are not UTF-8 are escaped."""
    discovered_at: Mapped[datetime] = mapped_column(default=utcnow)
    gone_at: Mapped[datetime | None]
    """When a scan found it deleted; NULL while it is there."""
    current_version_id: Mapped[int | None] = mapped_column(
        ForeignKey("cf_file_version.id", use_alter=True)
    )
    problem: Mapped[str] = mapped_column(default="")
    """Why the last scan could not read it, or that scans pass it over; else empty."""
    device: Mapped[int | None]
    inode: Mapped[int | None]
    size_bytes: Mapped[int | None]
    mtime_ns: Mapped[int | None]
    ctime_ns: Mapped[int | None]
    racy: Mapped[bool] = mapped_column(default=False)
    """Its stamps were too young to prove anything; the next scan hashes it again."""

    source_root: Mapped[SourceRoot] = relationship(back_populates="locations")
    versions: Mapped[list[FileVersion]] = relationship(
        back_populates="location", foreign_keys="FileVersion.location_id"
    )


class FileVersion(Base):
    """One content a location has had: never updated, never deleted."""

    __tablename__ = "cf_file_version"
    __table_args__ = (
        UniqueConstraint("location_id", "ordinal"),
        CheckConstraint("length(content_hash) = 64", name="content_hash"),
        CheckConstraint("size_bytes >= 0", name="size_bytes"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    location_id: Mapped[int] = mapped_column(ForeignKey("cf_file_location.id"))
    ordinal: Mapped[int]
    """1 for the first content of the location, and on."""
    content_hash: Mapped[str]
    """SHA-256, hexadecimal."""
    size_bytes: Mapped[int]
    detected_at: Mapped[datetime] = mapped_column(default=utcnow)

    location: Mapped[FileLocation] = relationship(
        back_populates="versions", foreign_keys=[location_id]
    )


class RoutingRule(Base):
    """glob -> tag."""

    __tablename__ = "cf_routing_rule"
    __table_args__ = (UniqueConstraint("pattern", "tag"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    pattern: Mapped[str]
    tag: Mapped[str] = mapped_column(index=True)
    priority: Mapped[int] = mapped_column(default=0)
    any_case: Mapped[bool] = mapped_column(default=True, server_default=text("0"))
    """Whether `*.csv` matches `ORDERS.CSV`. Rules from before there was a choice do not."""


class PluginConfig(Base):
    """What a plugin subscribes to, and which of its versions takes new jobs."""

    __tablename__ = "cf_plugin_config"

    id: Mapped[int] = mapped_column(primary_key=True)
    plugin_name: Mapped[str] = mapped_column(unique=True)
    subscription_tags: Mapped[str] = mapped_column(default="")
    """Tags, comma separated."""
    active_version: Mapped[str | None]
    """NULL until a version is deployed."""


class TopicConfig(Base):
    """Where a plugin's topic goes."""

    __tablename__ = "cf_topic_config"
    __table_args__ = (UniqueConstraint("plugin_name", "topic_name", "uri"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    plugin_name: Mapped[str]
    topic_name: Mapped[str]
    uri: Mapped[str]
    mode: Mapped[str] = mapped_column(default="append")


class EmptyTopic(Base):
    """A topic of data that a file may give no row while it gives rejects, as a person said: such a
    file is COMPLETED, and its rejects are published."""

    __tablename__ = "cf_empty_topic"

    plugin_name: Mapped[str] = mapped_column(primary_key=True)
    topic_name: Mapped[str] = mapped_column(primary_key=True)
    allowed_at: Mapped[datetime] = mapped_column(default=utcnow)


_STATUSES = ", ".join(f"'{status}'" for status in JobStatus)
_RETRACTIONS = ", ".join(f"'{state}'" for state in Retraction)
_STATES = ", ".join(f"'{state}'" for state in OutputState)


class ProcessingJob(Base):
    """One version x one plugin artifact."""

    __tablename__ = "cf_processing_queue"
    __table_args__ = (
        UniqueConstraint("file_version_id", "plugin_id"),
        CheckConstraint(f"status IN ({_STATUSES})", name="status"),
        CheckConstraint("(status = 'RUNNING') = (worker IS NOT NULL)", name="worker"),
        CheckConstraint("attempts >= 0 AND fence >= attempts", name="fence"),
        Index("ix_cf_processing_queue_order", "status", text("priority DESC"), "id"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    file_version_id: Mapped[int] = mapped_column(ForeignKey("cf_file_version.id"))
    plugin_id: Mapped[int] = mapped_column(ForeignKey("cf_plugin.id"))
    plugin_name: Mapped[str]
    status: Mapped[str] = mapped_column(default=JobStatus.QUEUED)
    priority: Mapped[int] = mapped_column(default=0)
    fence: Mapped[int] = mapped_column(default=0)
    """Counts claims; a result under an older fence is refused."""
    attempts: Mapped[int] = mapped_column(default=0)
    """Attempts counted against the job's budget."""
    not_before: Mapped[float] = mapped_column(default=0.0)
    """Earliest claim, seconds since the epoch."""
    worker: Mapped[str | None]
    epoch: Mapped[int | None] = mapped_column(ForeignKey("cf_epoch.id"))
    """The daemon run that claimed it last."""
    reason: Mapped[str] = mapped_column(default="")
    """Why it waits, failed or was superseded, in words."""
    crashes: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    """Daemons that died while a guest had it in hand; see `engine.dispatch`."""
    created_at: Mapped[datetime] = mapped_column(default=utcnow)
    finished_at: Mapped[datetime | None]


class DismissedFailure(Base):
    """A failure that a person has accepted: it is counted no more."""

    __tablename__ = "cf_dismissed_failure"

    job_id: Mapped[int] = mapped_column(ForeignKey("cf_processing_queue.id"), primary_key=True)
    fence: Mapped[int]
    """Of the job when it was dismissed: once it has been claimed again, it may fail anew."""
    dismissed_at: Mapped[datetime] = mapped_column(default=utcnow)


class ForgottenOutput(Base):
    """A published output that a person took away on purpose: no claim on its sink any more."""

    __tablename__ = "cf_forgotten_output"

    output_key: Mapped[str] = mapped_column(primary_key=True)
    forgotten_at: Mapped[datetime] = mapped_column(default=utcnow)


class RetractedOutput(Base):
    """A published output whose rows a person took back: its sink keeps them, and no reader sees
    them."""

    __tablename__ = "cf_retracted_output"
    __table_args__ = (CheckConstraint(f"state IN ({_RETRACTIONS})", name="state"),)

    output_key: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[str]
    retracted_at: Mapped[datetime] = mapped_column(default=utcnow)


class Output(Base):
    """One output of a job: planned when the job was decided, then published."""

    __tablename__ = "cf_output"
    __table_args__ = (
        UniqueConstraint("job_id", "topic", "uri"),
        CheckConstraint(f"state IN ({_STATES})", name="state"),
        CheckConstraint("(state = 'PUBLISHED') = (published_at IS NOT NULL)", name="published"),
        Index("ix_cf_output_topic", "topic", "state"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("cf_processing_queue.id"))
    topic: Mapped[str]
    uri: Mapped[str]
    """The sink as configured when the job was claimed."""
    location: Mapped[str]
    """The sink with its path made absolute."""
    mode: Mapped[str]
    output_key: Mapped[str]
    state: Mapped[str] = mapped_column(default=OutputState.PLANNED)
    stage: Mapped[str]
    """The sealed file, until the output is published."""
    target: Mapped[str] = mapped_column(default="")
    rows: Mapped[int]
    size_bytes: Mapped[int]
    digest: Mapped[str]
    published_at: Mapped[datetime | None]
    slot: Mapped[str] = mapped_column(default="", server_default="", index=True)
    """What the outputs of all versions of the location share here (`protocol.OutputPlan.slot`);
    empty where an earlier release planned it, to which every output was in mode append."""


class Snapshot(Base):
    """A content whose bytes the store has, for as long as it has them."""

    __tablename__ = "cf_snapshot"
    __table_args__ = (
        CheckConstraint("length(content_hash) = 64", name="content_hash"),
        CheckConstraint("size_bytes >= 0", name="size_bytes"),
    )

    content_hash: Mapped[str] = mapped_column(primary_key=True)
    """SHA-256, hexadecimal: of as many versions as have this content."""
    size_bytes: Mapped[int]
    kept_at: Mapped[datetime] = mapped_column(index=True)
    """When a scan last captured this content."""


class SnapshotFault(Base):
    """Why the store did not take what it should have; a single row."""

    __tablename__ = "cf_snapshot_fault"
    __table_args__ = (CheckConstraint("id = 1", name="single"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    words: Mapped[str]
    """Empty where the last ones were taken."""
    files: Mapped[int]
    """Contents that were recorded without a snapshot since the store last took one."""
    since: Mapped[datetime]
