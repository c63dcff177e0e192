"""The ledger's tables: words, columns and the rules the database itself enforces.

No behaviour here. `db/migrations/` holds the same schema as frozen SQL, with the triggers; a test
compares the two. Times called `_at` are UTC; clock readings used in arithmetic are seconds since
the epoch. Users edit `SourceRoot`, `RoutingRule`, `TopicConfig` and `PluginConfig` through these
classes; everything else is written by the modules of `db` only.
"""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    CheckConstraint,
    ForeignKey,
    Index,
    UniqueConstraint,
    func,
    select,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column, relationship, validates

# What users import from here is all of it, wherever it is written down.
from casparian_flow.db.base import Base as Base
from casparian_flow.db.base import utcnow as utcnow
from casparian_flow.db.evidence import Attempt as Attempt
from casparian_flow.db.evidence import AuditEntry as AuditEntry
from casparian_flow.db.evidence import Epoch as Epoch
from casparian_flow.db.evidence import FoundOutput as FoundOutput
from casparian_flow.db.evidence import LedgerIdentity as LedgerIdentity
from casparian_flow.db.evidence import Plugin as Plugin
from casparian_flow.db.evidence import TrustStatement as TrustStatement
from casparian_flow.db.states import JobStatus as JobStatus
from casparian_flow.db.states import OutputState as OutputState
from casparian_flow.db.states import Retraction as Retraction


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
    """Daemons that died while a guest had it in hand; see `engine.retries`."""
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
