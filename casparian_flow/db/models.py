"""The ledger's tables: columns and the constraints that the database enforces.

`db/migrations/` has the same schema as SQL, with the triggers; a test compares the two. Columns
named `_at` are UTC; clock readings used in arithmetic are seconds since the epoch. Users edit
`SourceRoot`, `RoutingRule`, `TopicConfig` and `PluginConfig` through these classes; the other
tables are written by the modules of `db` only.
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
    MetaData,
    UniqueConstraint,
    func,
    select,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, validates

from casparian_flow.db.states import KEEP, REMOVED, OutputState, utcnow
from casparian_flow.db.states import JobStatus as JobStatus
from casparian_flow.protocol import State


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


# Tables that only grow: triggers of the database refuse every UPDATE and DELETE.


class Plugin(Base):
    """A deployed artifact: immutable.

    A stub has a name, a version and an artifact hash, and all other columns empty: a sink has
    outputs of an artifact that this ledger lacks. It becomes a plugin when that is published.
    """

    __tablename__ = "cf_plugin"
    __table_args__ = (UniqueConstraint("name", "version"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    version: Mapped[str]
    source: Mapped[bytes]
    lock: Mapped[str]
    manifest: Mapped[str]
    """JSON of the MANIFEST in the source; empty for a stub."""
    artifact_hash: Mapped[str]
    public_key: Mapped[bytes]
    signature: Mapped[bytes]
    publisher: Mapped[str]
    """Id of the key that published it."""
    deployed_at: Mapped[datetime] = mapped_column(default=utcnow)
    statement: Mapped[bytes | None]
    """The signed bytes; NULL where an earlier release signed it in its own form."""
    verdict: Mapped[str] = mapped_column(default="", server_default="")
    """JSON: the Gatekeeper's ruleset and policy that accepted it."""


class TrustStatement(Base):
    """A signed statement about keys or plugins; in order, they are the trust log.

    Replaying the rows from the first gives which keys are trusted for which plugins, which keys
    are revoked, and which versions were activated or disabled.
    """

    __tablename__ = "cf_trust_statement"

    seq: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    """trust-key, revoke-key, rotate-key, activate, disable."""
    payload: Mapped[bytes]
    """The signed bytes: JSON with the hash of the row before."""
    public_key: Mapped[bytes]
    signature: Mapped[bytes]
    countersignature: Mapped[bytes] = mapped_column(default=b"")
    """The new key's signature over the same bytes, where a key is rotated."""


class LedgerIdentity(Base):
    """The one row with the id of this ledger; signatures name it."""

    __tablename__ = "cf_ledger_identity"

    id: Mapped[str] = mapped_column(primary_key=True)
    """32 random hexadecimal digits, made with the ledger."""


class Epoch(Base):
    """One run of a process that claims jobs; only the newest can be alive."""

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
    """Output of the plugin, and its traceback; at most 64 KiB."""
    seconds: Mapped[float] = mapped_column(default=0.0)
    ended_at: Mapped[datetime] = mapped_column(default=utcnow)
    sandbox: Mapped[str] = mapped_column(default="", server_default="")
    """The layers of the guest's sandbox; empty where none ran."""
    fault: Mapped[str] = mapped_column(default="", server_default="")
    """The class of the error (`casparian_flow.errors`); empty where there was none."""
    signal: Mapped[str] = mapped_column(default="", server_default="")
    """The signal that ended the guest, such as `SIGSEGV`; else empty."""
    exit_code: Mapped[int | None]
    """Of the guest; NULL where it is still alive or a signal ended it."""
    batches: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    rows: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    """Rows of output until it ended."""
    max_rss_bytes: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    """Peak memory of its guest so far; 0 where it was not measured."""
    cpu_seconds: Mapped[float] = mapped_column(default=0.0, server_default=text("0"))
    """Processor time of the guest in this attempt."""


_ABOUT_TRUST = "action IN ('trust-key', 'revoke-key', 'rotate-key', 'activate', 'disable')"


class AuditEntry(Base):
    """An action of a person or a commit, hashed with the row before."""

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


# Sources, files, rules, jobs and outputs.


def _name_of_root(context: Any) -> str:
    """The directory's name, with a number if another root has it: output keys contain it."""
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
    """gitignore patterns, one a line, besides the built-in ones."""
    settle_seconds: Mapped[float] = mapped_column(default=2.0)
    """A file that changed less than this ago is not settled; one-shot scans wait for it."""
    done_file: Mapped[str] = mapped_column(default="", server_default="")
    """Name of the marker without which a file is not taken: `{name}.done`; empty for none."""
    min_age_seconds: Mapped[float] = mapped_column(default=0.0, server_default="0")
    """A file that changed less than this ago is left to a later scan."""
    on_delete: Mapped[str] = mapped_column(server_default=KEEP)
    """One of `ON_DELETE`."""

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
    """Why the root is frozen, else empty."""
    device: Mapped[int | None]
    """Device of the root, to detect a lost mount."""
    routed: Mapped[str] = mapped_column(default="")
    """Fingerprint of the routing by which all present locations were routed."""
    waiting: Mapped[int] = mapped_column(default=0, server_default="0")
    """Files that lack their done file or their minimum age."""
    held: Mapped[int] = mapped_column(default=0, server_default="0")
    """Missing files that are not marked gone yet, since so many vanished at once."""
    held_since: Mapped[float] = mapped_column(default=0.0, server_default="0")
    """When they were first found missing, seconds since the epoch; 0 where there are none."""
    watch: Mapped[str] = mapped_column(default="", server_default="")
    """How the daemon detects changes: `watching`, `polling: why` or `degraded: why`."""
    missed: Mapped[int] = mapped_column(default=0, server_default="0")
    """Total of changed files that no event announced."""
    scrub_after: Mapped[int] = mapped_column(default=0, server_default="0")
    """The last location that the scrub in progress has read; 0 where none is in progress."""
    scrubbed: Mapped[float] = mapped_column(default=0.0, server_default="0")
    """When the last complete scrub ended, seconds since the epoch."""
    hidden: Mapped[int] = mapped_column(default=0, server_default="0")
    """Total of changes that only a scrub found, since the file's timestamps did not change."""


class Unsettled(Base):
    """A file that each scan so far found being written."""

    __tablename__ = "cf_unsettled"

    source_root_id: Mapped[int] = mapped_column(ForeignKey("cf_source_root.id"), primary_key=True)
    path: Mapped[bytes] = mapped_column(primary_key=True)
    """Relative to the source root, as the filesystem has it."""
    first_seen: Mapped[float]
    """When the first of them found it, seconds since the epoch."""


class Directory(Base):
    """A directory under a source root, with a digest that changes when anything in it does."""

    __tablename__ = "cf_directory"
    __table_args__ = (UniqueConstraint("source_root_id", "path"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    source_root_id: Mapped[int] = mapped_column(ForeignKey("cf_source_root.id"))
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("cf_directory.id"), index=True)
    path: Mapped[bytes]
    """Relative to the source root; empty for the root itself."""
    digest: Mapped[bytes | None]
    """Over the names and stats in it; NULL while a file in it must be compared again."""


class FileLocation(Base):
    """A path under a source root; never deleted."""

    __tablename__ = "cf_file_location"
    __table_args__ = (UniqueConstraint("source_root_id", "path"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    source_root_id: Mapped[int] = mapped_column(ForeignKey("cf_source_root.id"))
    directory_id: Mapped[int] = mapped_column(ForeignKey("cf_directory.id"), index=True)
    path: Mapped[bytes]
    """Relative path, as bytes."""
    rel_path: Mapped[str]
    """The same as text with POSIX separators; bytes that are not UTF-8 are escaped."""
    discovered_at: Mapped[datetime] = mapped_column(default=utcnow)
    gone_at: Mapped[datetime | None]
    """When a scan found it deleted; NULL while it is present."""
    current_version_id: Mapped[int | None] = mapped_column(
        ForeignKey("cf_file_version.id", use_alter=True)
    )
    problem: Mapped[str] = mapped_column(default="")
    """Why the last scan could not read it, or that scans pass it over; else empty."""
    device: Mapped[int | None]
    inode: Mapped[int | None] = mapped_column(index=True)
    size_bytes: Mapped[int | None]
    mtime_ns: Mapped[int | None] = mapped_column(index=True)
    ctime_ns: Mapped[int | None]
    racy: Mapped[bool] = mapped_column(default=False)
    """Its timestamps were too recent to rule out a later write; the next scan hashes it again."""

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
    """1 for the first content of the location, 2 for the next, and so on."""
    content_hash: Mapped[str]
    """SHA-256, hexadecimal."""
    size_bytes: Mapped[int]
    detected_at: Mapped[datetime] = mapped_column(default=utcnow)

    location: Mapped[FileLocation] = relationship(
        back_populates="versions", foreign_keys=[location_id]
    )


class RoutingRule(Base):
    """A glob, and the tag that matching files get."""

    __tablename__ = "cf_routing_rule"
    __table_args__ = (UniqueConstraint("pattern", "tag"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    pattern: Mapped[str]
    tag: Mapped[str] = mapped_column(index=True)
    priority: Mapped[int] = mapped_column(default=0)
    any_case: Mapped[bool] = mapped_column(default=True, server_default=text("0"))
    """Whether `*.csv` matches `ORDERS.CSV`; not in rules older than this column."""


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
    """A topic that a file may give no rows while it gives rejects, by a user's choice: such a file
    is COMPLETED, and its rejects are published."""

    __tablename__ = "cf_empty_topic"

    plugin_name: Mapped[str] = mapped_column(primary_key=True)
    topic_name: Mapped[str] = mapped_column(primary_key=True)
    allowed_at: Mapped[datetime] = mapped_column(default=utcnow)


_STATUSES = ", ".join(f"'{status}'" for status in JobStatus)
_SEEN = ", ".join(f"'{state}'" for state in (*State, REMOVED))
_STATES = ", ".join(f"'{state}'" for state in OutputState)


class ProcessingJob(Base):
    """One version and one plugin artifact."""

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
    """Attempts counted against `[jobs] max_attempts`."""
    not_before: Mapped[float] = mapped_column(default=0.0)
    """Earliest claim, seconds since the epoch."""
    worker: Mapped[str | None]
    epoch: Mapped[int | None] = mapped_column(ForeignKey("cf_epoch.id"))
    """The daemon run that claimed it last."""
    reason: Mapped[str] = mapped_column(default="")
    """Why it waits, failed or was superseded."""
    crashes: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    """Daemons that died while a guest ran it; see `engine.dispatch`."""
    created_at: Mapped[datetime] = mapped_column(default=utcnow)
    finished_at: Mapped[datetime | None]
    generation: Mapped[int] = mapped_column(server_default=text("0"))
    """Which rebuild of its outputs the next attempt makes; 0: none (`db.rebuild`)."""


class DismissedFailure(Base):
    """A failure that a user has accepted: it is no longer counted."""

    __tablename__ = "cf_dismissed_failure"

    job_id: Mapped[int] = mapped_column(ForeignKey("cf_processing_queue.id"), primary_key=True)
    fence: Mapped[int]
    """Of the job when it was dismissed: a later failure is not."""
    dismissed_at: Mapped[datetime] = mapped_column(default=utcnow)


class ForgottenOutput(Base):
    """A published output that a user deleted in its sink: `verify` does not expect it."""

    __tablename__ = "cf_forgotten_output"

    output_key: Mapped[str] = mapped_column(primary_key=True)
    forgotten_at: Mapped[datetime] = mapped_column(default=utcnow)


class RetractedVersion(Base):
    """A version whose rows a user has hidden, of all plugins and topics; it keeps its place."""

    __tablename__ = "cf_retracted_version"

    file_version_id: Mapped[int] = mapped_column(
        ForeignKey("cf_file_version.id"), primary_key=True, autoincrement=False
    )
    retracted_at: Mapped[datetime] = mapped_column(default=utcnow)


class GoneVersion(Base):
    """The version that a location had when its file was found gone, and what that file is now."""

    __tablename__ = "cf_gone_version"
    __table_args__ = (
        CheckConstraint("(to_version_id IS NULL) = (found_at IS NULL)", name="moved"),
        Index(
            "ix_cf_gone_version_content", "content_hash", sqlite_where=text("to_version_id IS NULL")
        ),
        Index("ix_cf_gone_version_due", "file_version_id", sqlite_where=text("due")),
        Index(
            "ix_cf_gone_version_moved", "to_version_id",
            sqlite_where=text("to_version_id IS NOT NULL"),
        ),
    )  # fmt: skip

    file_version_id: Mapped[int] = mapped_column(
        ForeignKey("cf_file_version.id"), primary_key=True, autoincrement=False
    )
    content_hash: Mapped[str]
    """The version's, for the index."""
    to_version_id: Mapped[int | None] = mapped_column(ForeignKey("cf_file_version.id"))
    """The version that the file is where it moved to; NULL while it is known nowhere."""
    due: Mapped[bool] = mapped_column(default=True, server_default=text("1"))
    """Whether the next scan looks for it."""
    found_at: Mapped[datetime | None]
    """When it was found at its new place."""


class Output(Base):
    """One output of a job: planned when the job is decided, then published."""

    __tablename__ = "cf_output"
    __table_args__ = (
        UniqueConstraint("job_id", "topic", "uri", "generation"),
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
    """The staged file, until the output is published."""
    target: Mapped[str] = mapped_column(default="")
    rows: Mapped[int]
    size_bytes: Mapped[int]
    digest: Mapped[str]
    published_at: Mapped[datetime | None]
    slot: Mapped[str] = mapped_column(default="", server_default="", index=True)
    """`protocol.Output.location_slot`; what an earlier release planned may have none."""
    generation: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    """That of its job when it was planned."""


_DEBT = "told <> state || '/' || mode"


class Visibility(Base):
    """What readers see of a published output: `db.visibility` decides, the sink is told."""

    __tablename__ = "cf_visibility"
    __table_args__ = (
        CheckConstraint(f"state IN ({_SEEN})", name="state"),
        Index("ix_cf_visibility_debts", "output_id", sqlite_where=text(_DEBT)),
        Index("ix_cf_visibility_hidden", "changed_at", sqlite_where=text("state = 'hidden'")),
    )

    output_id: Mapped[int] = mapped_column(
        ForeignKey("cf_output.id"), primary_key=True, autoincrement=False
    )
    state: Mapped[str]
    """A `protocol.State`, or `REMOVED`."""
    mode: Mapped[str]
    """That of the topic in this sink now; of a sink that the topic left, that of the output."""
    told: Mapped[str] = mapped_column(default="", server_default="")
    """`state/mode` as the sink has confirmed it last. While it differs, the sink is to be told."""
    shown_at: Mapped[datetime | None]
    """When it was first visible; NULL if it never was."""
    hidden_at: Mapped[datetime | None]
    """Since when it is not visible; NULL while it is."""
    changed_at: Mapped[datetime]
    """When `state` last changed."""


class Rebuild(Base):
    """Outputs of a plugin that are made again, beside those that stand, and take their place
    together (`db.rebuild`)."""

    __tablename__ = "cf_rebuild"
    __table_args__ = (
        CheckConstraint("outcome IN ('', 'done', 'cancelled')", name="outcome"),
        CheckConstraint("(outcome = '') = (ended_at IS NULL)", name="ended"),
        Index(
            "ix_cf_rebuild_open", "plugin_name", unique=True, sqlite_where=text("ended_at IS NULL")
        ),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    plugin_name: Mapped[str]
    topic: Mapped[str] = mapped_column(default="", server_default="")
    """Of the plugin; empty: all of its topics."""
    started_at: Mapped[datetime] = mapped_column(default=utcnow)
    ended_at: Mapped[datetime | None]
    """NULL while it is open."""
    outcome: Mapped[str] = mapped_column(default="", server_default="")
    """`done` or `cancelled`; empty while it is open."""
    problem: Mapped[str] = mapped_column(default="", server_default="")
    """Why a sink cannot show it, though it is done; else empty."""


class RebuildJob(Base):
    """A job of a rebuild."""

    __tablename__ = "cf_rebuild_job"

    rebuild_id: Mapped[int] = mapped_column(ForeignKey("cf_rebuild.id"), primary_key=True)
    job_id: Mapped[int] = mapped_column(
        ForeignKey("cf_processing_queue.id"), primary_key=True, index=True
    )
    generation: Mapped[int]
    """Of the outputs that the job makes for the rebuild."""
    was: Mapped[str]
    """The job's status before the rebuild; empty where the rebuild made the job."""


class LeftOutput(Base):
    """An output that stays behind: in a sink that its topic does not go to any more, after a
    rebuild into the present ones, or of a topic that a user removed."""

    __tablename__ = "cf_left_output"

    output_id: Mapped[int] = mapped_column(
        ForeignKey("cf_output.id"), primary_key=True, autoincrement=False
    )
    rebuild_id: Mapped[int | None] = mapped_column(ForeignKey("cf_rebuild.id"))
    """NULL where a user removed the topic."""


class IdFloor(Base):
    """The one row with the highest ids of an earlier ledger that sinks have; new ids are above."""

    __tablename__ = "cf_id_floor"
    __table_args__ = (CheckConstraint("id = 1", name="single"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    version_id: Mapped[int]
    job_id: Mapped[int]


class AskedSink(Base):
    """A sink that this ledger was to ask for outputs it does not know."""

    __tablename__ = "cf_asked_sink"

    location: Mapped[str] = mapped_column(primary_key=True)
    asked_at: Mapped[datetime | None]
    """Since when the ledger knows what it has; while NULL, no job is claimed that writes there."""
    problem: Mapped[str]
    """Why it could not be asked the last time, else empty."""


class KeptContent(Base):
    """A content whose bytes the store has, durably."""

    __tablename__ = "cf_kept_content"
    __table_args__ = (
        CheckConstraint("length(content_hash) = 64", name="content_hash"),
        CheckConstraint("size_bytes >= 0", name="size_bytes"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    """Goes up with the time at which contents came, and is never given twice. The number of a small
    content's row in the store."""
    content_hash: Mapped[str] = mapped_column(unique=True)
    """SHA-256, hexadecimal; any number of versions may have this content."""
    size_bytes: Mapped[int]
    in_file: Mapped[bool]
    """The store has it as a file of its own, not as a row."""
    kept_at: Mapped[datetime]


class EvictedContent(Base):
    """A content whose bytes the store had, and gave up for others."""

    __tablename__ = "cf_evicted_content"

    content_hash: Mapped[str] = mapped_column(primary_key=True)
    evicted_at: Mapped[datetime]


class StoreState(Base):
    """What the store holds in all, and why it could not take a content; a single row."""

    __tablename__ = "cf_store"
    __table_args__ = (CheckConstraint("id = 1", name="single"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    contents: Mapped[int]
    bytes: Mapped[int]
    fault: Mapped[str]
    """Why the last contents were not taken; empty where they were."""
    missed: Mapped[int]
    """Contents recorded without their bytes since then."""
    since: Mapped[datetime]
